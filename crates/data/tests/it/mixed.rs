//! Several sources, mixed by weight: counts, order, copies, hash.

use std::collections::HashMap;

use serde_json::json;
use shanty_data::{
    Format, MixPart, Prepared, Split, TrainData, TrainSource,
    order::{Order, mixed_epoch_order, row_of},
};
use shanty_diagnostic::Diagnose;

use crate::helpers::{Bench, check_split};

fn source(bench: &Bench, name: &str, rows: usize, weight: Option<f64>) -> TrainSource {
    let lines: String =
        (0..rows).map(|row| format!("{}\n", json!({"text": format!("{name} {row} sings")}))).collect();
    let path = bench.write(&format!("{name}.jsonl"), lines).to_str().unwrap().to_owned();
    TrainSource { path, format: None, weight }
}

fn mixed(weights: [Option<f64>; 2]) -> Bench {
    let mut bench = Bench::new();
    bench.options.packing = false;
    bench.options.train =
        TrainData(vec![source(&bench, "few", 4, weights[0]), source(&bench, "many", 16, weights[1])]);
    bench
}

#[test]
fn an_epoch_has_the_share_of_each_source_in_exact_counts() {
    let bench = mixed([Some(1.0), Some(1.0)]);
    let summary = bench.prepare().unwrap();
    let prepared = Prepared::open(&bench.options.out).unwrap();
    check_split(&prepared, Split::Train);
    assert_eq!(
        summary.train.mix(),
        [MixPart { rows: 4, rows_per_epoch: 10 }, MixPart { rows: 16, rows_per_epoch: 10 }]
    );
    let order = Order::mixed(17, 20, &summary.train.mix(), 5).unwrap();
    let mut seen: HashMap<u64, u64> = HashMap::new();
    for epoch in 0..4 {
        let rows: Vec<u64> = (1..=4).flat_map(|step| order.step_rows(epoch * 4 + step)).collect();
        assert_eq!(rows.iter().filter(|id| row_of(**id, 20) < 4).count(), 10, "epoch {epoch}");
        let mut ids = rows.clone();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 20, "no id comes twice in an epoch");
        for id in rows {
            *seen.entry(row_of(id, 20)).or_default() += 1;
            let row = prepared.row(Split::Train, id).unwrap();
            assert_eq!(row.id, id);
            let plain = prepared.row(Split::Train, row_of(id, 20)).unwrap();
            assert_eq!(row.token_ids, plain.token_ids);
            assert_eq!(prepared.trained_tokens(Split::Train, id).unwrap(), plain.trained_tokens());
        }
    }
    // 40 draws of 4 rows: each ten times. 40 draws of 16 rows: two or three times each, none left out.
    assert!((0..4).all(|row| seen[&row] == 10), "{seen:?}");
    assert!((4..20).all(|row| (2..=3).contains(&seen[&row])), "{seen:?}");
    assert!(prepared.row(Split::Train, 20 * 5).is_err(), "more copies than an epoch can have");
}

#[test]
fn without_weights_every_row_comes_once() {
    let bench = mixed([None, None]);
    let summary = bench.prepare().unwrap();
    assert!(summary.train.mix().is_empty());
    assert_eq!(summary.train.sources.len(), 2);
    assert_eq!(summary.train.rows, 20);
    let order = Order::mixed(17, 20, &summary.train.mix(), 20).unwrap();
    assert_eq!(order.step_rows(1), shanty_data::order::epoch_order(17, 0, 20));
}

#[test]
fn weights_are_a_part_of_the_hash_and_of_what_is_reused() {
    let mut bench = mixed([Some(1.0), Some(1.0)]);
    let equal = bench.prepare().unwrap();
    bench.options.train.0[0].weight = Some(3.0);
    let heavy = bench.prepare().unwrap();
    assert_ne!(equal.hash, heavy.hash);
    assert_eq!(heavy.train.sources[0].rows_per_epoch, 15);
    bench.options.train.0.iter_mut().for_each(|source| source.weight = None);
    let plain = bench.prepare().unwrap();
    assert!(plain.hash != equal.hash && plain.hash != heavy.hash);
}

#[test]
fn sources_may_have_forms_of_their_own_and_rows_never_hold_two() {
    let mut bench = Bench::new();
    let pair =
        bench.write("pair.jsonl", "{\"prompt\": \"a\", \"completion\": \" b\", \"text\": \"c\"}\n".repeat(3));
    let pair = TrainSource {
        path: pair.to_str().unwrap().to_owned(),
        format: Some(Format::PromptCompletion),
        weight: Some(1.0),
    };
    bench.options.train = TrainData(vec![source(&bench, "few", 4, Some(1.0)), pair]);
    let summary = bench.prepare().unwrap();
    assert_eq!(summary.train.form, "text + prompt-completion");
    // Short samples share rows, but only with their own kind.
    assert_eq!(summary.train.sources.iter().map(|source| source.rows).collect::<Vec<_>>(), [1, 1]);
    let prepared = Prepared::open(&bench.options.out).unwrap();
    let files = |row| prepared.samples_of_row(Split::Train, row).unwrap();
    assert!(files(0).iter().all(|source| source.file.ends_with("few.jsonl")));
    assert!(files(1).iter().all(|source| source.file.ends_with("pair.jsonl")));
}

#[test]
fn impossible_mixes_are_refused() {
    let cases = [
        ([Some(1.0), None], "SH0219", "all must, or none"),
        ([Some(0.0), Some(1.0)], "SH0219", "must be above 0"),
        ([Some(f64::NAN), Some(1.0)], "SH0219", "must be above 0"),
        ([Some(f64::INFINITY), Some(1.0)], "SH0219", "must be above 0"),
    ];
    for (weights, code, says) in cases {
        let error = mixed(weights).prepare().unwrap_err().diagnostic();
        assert_eq!(error.code, code, "{error:?}");
        assert!(error.message.contains(says), "{error:?}");
    }
    let mut bench = mixed([Some(1.0), Some(1.0)]);
    bench.write("few.jsonl", "{\"text\": \"\"}\n");
    let error = bench.prepare().unwrap_err().diagnostic();
    assert_eq!(error.code, "SH0214", "{error:?}");
    assert!(error.message.contains("few.jsonl"), "{error:?}");
    bench.options.train = TrainData(Vec::new());
    assert_eq!(bench.prepare().unwrap_err().diagnostic().code, "SH0219");
    let parts = [MixPart { rows: 4, rows_per_epoch: 5 }, MixPart { rows: 4, rows_per_epoch: 4 }];
    assert!(Order::mixed(1, 8, &parts, 2).is_err());
    assert!(Order::mixed(1, 8, &[MixPart { rows: 8, rows_per_epoch: 0 }], 2).is_err());
}

const GOLDEN: [[u64; 12]; 3] = [
    [3, 26, 14, 4, 0, 5, 8, 10, 1, 2, 13, 12],
    [26, 21, 13, 9, 14, 12, 1, 0, 6, 11, 24, 7],
    [1, 13, 0, 2, 12, 4, 8, 9, 7, 5, 14, 26],
];

/// By an implementation in Python, apart from this one (`mixed_order.py`). Never edit them: a resumed job must go on with the rows
/// that it would have trained.
#[test]
fn mixed_order_is_what_it_always_was() {
    let parts = [MixPart { rows: 3, rows_per_epoch: 7 }, MixPart { rows: 9, rows_per_epoch: 5 }];
    assert_eq!(mixed_epoch_order(17, 0, &parts), GOLDEN[0]);
    assert_eq!(mixed_epoch_order(17, 1, &parts), GOLDEN[1]);
    assert_eq!(mixed_epoch_order(u64::MAX, 9, &parts), GOLDEN[2]);
}
