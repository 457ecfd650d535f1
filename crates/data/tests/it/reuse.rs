//! The prepared folder: found again, made anew, damaged.

use std::fs;

use shanty_data::{Error, Prepared, Progress, Split, Stage, Summary, prepare};
use shanty_diagnostic::Diagnose;

use crate::helpers::{Bench, check_split};

fn bench() -> Bench {
    let lines: String = (0..500).map(|index| format!("{{\"text\": \"line {index} of many\"}}\n")).collect();
    let mut bench = Bench::new().train(lines);
    bench.options.eval =
        Some(bench.write("eval.jsonl", "{\"text\": \"held out\"}\n").to_str().unwrap().to_owned());
    bench
}

fn stages(bench: &Bench) -> (Summary, Vec<Stage>) {
    let mut stages: Vec<Stage> = Vec::new();
    let mut report = |progress: &Progress| {
        assert!(progress.bytes_done <= progress.bytes_total);
        if stages.last() != Some(&progress.stage) {
            stages.push(progress.stage.clone());
        }
    };
    let summary = prepare(&bench.options, &mut report).unwrap();
    (summary, stages)
}

const FRESH: [Stage; 4] =
    [Stage::Hashing, Stage::Tokenising(Split::Train), Stage::Tokenising(Split::Eval), Stage::Done];

#[test]
fn same_inputs_are_not_tokenised_again() {
    let bench = bench();
    let (first, fresh) = stages(&bench);
    assert_eq!(fresh, FRESH);
    let (again, reused) = stages(&bench);
    assert_eq!(reused, [Stage::Hashing, Stage::Reused]);
    assert_eq!(first, again);
    let prepared = Prepared::open(&bench.options.out).unwrap();
    prepared.verify().unwrap();
    check_split(&prepared, Split::Train);
    check_split(&prepared, Split::Eval);
    assert_eq!(*prepared.summary(), first);
}

#[test]
fn hash_depends_on_rows_and_not_on_threads_or_places() {
    let mut one = bench();
    one.options.threads = 1;
    let mut two = bench();
    two.options.threads = 3;
    let hash = one.prepare().unwrap().hash;
    assert_eq!(hash, two.prepare().unwrap().hash);
    assert_eq!(hash.len(), 64);
}

#[test]
fn other_inputs_are_tokenised_anew() {
    let mut bench = bench();
    let first = bench.prepare().unwrap();
    bench.options.max_length = 128;
    let (second, fresh) = stages(&bench);
    assert_eq!(fresh, FRESH);
    assert_ne!(first.hash, second.hash);
    bench.write("eval.jsonl", "{\"text\": \"held aside\"}\n");
    let (third, fresh) = stages(&bench);
    assert_eq!(fresh, FRESH);
    assert_ne!(second.hash, third.hash);
    let names: Vec<_> =
        fs::read_dir(bench.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "nothing temporary stays: {names:?}");
}

#[test]
fn flipped_byte_is_noticed_wherever_it_is() {
    let bench = bench();
    bench.prepare().unwrap();
    let mut names: Vec<String> = fs::read_dir(&bench.options.out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "eval.index",
            "eval.rows",
            "eval.samples",
            "manifest.b3",
            "manifest.json",
            "train.index",
            "train.rows",
            "train.samples"
        ]
    );
    for name in names {
        let path = bench.options.out.join(&name);
        let good = fs::read(&path).unwrap();
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            let error =
                Prepared::open(&bench.options.out).and_then(|prepared| prepared.verify()).unwrap_err();
            assert_eq!(error.diagnostic().code, "SH0215", "{name} byte {at}: {error}");
        }
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert_eq!(Prepared::open(&bench.options.out).unwrap_err().diagnostic().code, "SH0215", "{name} cut");
        fs::write(&path, good).unwrap();
    }
    Prepared::open(&bench.options.out).unwrap().verify().unwrap();
}

#[test]
fn damaged_row_is_not_trained() {
    let bench = bench();
    bench.prepare().unwrap();
    let path = bench.options.out.join("train.rows");
    let mut bytes = fs::read(&path).unwrap();
    bytes[5] ^= 0x80;
    fs::write(&path, bytes).unwrap();
    let prepared = Prepared::open(&bench.options.out).unwrap();
    assert!(matches!(prepared.row(Split::Train, 0), Err(Error::Damaged { .. })));
    assert!(prepared.row(Split::Train, 1).is_ok());
}

#[test]
fn damaged_folder_is_made_anew_and_says_so() {
    let bench = bench();
    let first = bench.prepare().unwrap();
    let path = bench.options.out.join("train.index");
    let mut bytes = fs::read(&path).unwrap();
    bytes[3] ^= 1;
    fs::write(&path, bytes).unwrap();
    let (again, seen) = stages(&bench);
    assert!(matches!(&seen[1], Stage::Damaged(reason) if reason.contains("train.index")), "{seen:?}");
    assert_eq!(seen.last(), Some(&Stage::Done));
    assert_eq!(first, again);
    Prepared::open(&bench.options.out).unwrap().verify().unwrap();
}

#[test]
fn rows_that_there_are_not_are_errors() {
    let bench = bench();
    let summary = bench.prepare().unwrap();
    let prepared = Prepared::open(&bench.options.out).unwrap();
    let past = summary.train.rows;
    for error in [
        prepared.row(Split::Train, past).map(|_| ()).unwrap_err(),
        prepared.trained_tokens(Split::Train, u64::MAX).map(|_| ()).unwrap_err(),
        prepared.samples_of_row(Split::Eval, 1).map(|_| ()).unwrap_err(),
    ] {
        assert_eq!(error.diagnostic().code, "SH0220");
    }
}

#[test]
fn folders_without_manifest_are_not_prepared_data() {
    let bench = bench();
    assert_eq!(Prepared::open(&bench.path("")).unwrap_err().diagnostic().code, "SH0216");
    assert_eq!(Prepared::open(&bench.path("none")).unwrap_err().diagnostic().code, "SH0216");
}

#[test]
fn leftovers_of_killed_runs_are_removed_and_those_of_living_ones_stay() {
    let bench = bench();
    // No process has this number: the kernel's highest is 2^22.
    let dead = bench.path(".prepared.part-4194305");
    let alive = bench.path(".prepared.part-1");
    let other = bench.path(".prepared.part-notes");
    for folder in [&dead, &alive, &other] {
        fs::create_dir(folder).unwrap();
    }
    bench.prepare().unwrap();
    assert!(!dead.exists());
    assert!(alive.exists() && other.exists());
}
