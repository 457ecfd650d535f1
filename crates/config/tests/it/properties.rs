use proptest::prelude::*;
use shanty_config::{from_json, render::render, to_json};

use crate::{Bench, GOOD};

const EXAMPLE: &str = include_str!("../../../../examples/shakespeare/job.toml");

/// What a slip of the hand puts into a file.
fn slips() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        prop::sample::select(vec![
            "\"", "[", "]", "{", "}", "=", ".", "\n", "'", "#", "é", "\u{0}", "-1", "1e999", "nan"
        ])
        .prop_map(str::to_owned),
        any::<char>().prop_map(String::from),
        "[ -~]{1,8}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever stands in the file: no panic, and every place that an error names is in the file and can be shown.
    #[test]
    fn a_slip_of_the_hand_is_never_answered_with_a_panic(at in 0..EXAMPLE.len(), cut in 0usize..6, slip in slips()) {
        let boundary = |mut at: usize| {
            while !EXAMPLE.is_char_boundary(at) {
                at -= 1;
            }
            at
        };
        let (from, to) = (boundary(at), boundary((at + cut).min(EXAMPLE.len())));
        let text = format!("{}{slip}{}", &EXAMPLE[..from], &EXAMPLE[to.max(from)..]);
        let bench = Bench::new();
        if let Err(errors) = bench.load(&text) {
            for diagnostic in errors.diagnostics() {
                let shown = render(&diagnostic, false);
                prop_assert!(shown.contains(&diagnostic.code), "{shown}");
                if let Some(line) = diagnostic.line {
                    let lines: Vec<&str> = text.split('\n').collect();
                    prop_assert!(line <= lines.len(), "line {line} of {}: {diagnostic}", lines.len());
                    let column = diagnostic.column.expect("a line has a column");
                    prop_assert!(column <= lines[line - 1].chars().count() + 1, "column {column}: {diagnostic}");
                    prop_assert!(shown.contains(&format!("job.toml:{line}:{column}]")), "{shown}");
                }
            }
        }
    }

    /// Numbers as people write them keep all their bits on the wire.
    #[test]
    fn a_rate_survives_the_wire(digits in 1u64..1_000_000_000_000_000, exponent in -20i32..-8) {
        let rate = format!("{digits}e{exponent}");
        let job = Bench::new().load_with(GOOD, &[], &[("train.learning_rate", &rate)]).expect("right").value;
        let there = from_json(&to_json(&job)).expect("what was written");
        prop_assert_eq!(there.train.learning_rate.map(f64::to_bits), job.train.learning_rate.map(f64::to_bits));
    }
}
