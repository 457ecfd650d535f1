//! Every input of every committed corpus, and some changes of each: no panic, no memory beyond what a file's size allows.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

use std::time::Duration;

use shanty_fuzz::{TARGETS, allowed_bytes, corpus, driver, memory::Counting, memory::peak_of};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn committed_corpora_break_nothing() {
    for target in &TARGETS {
        let inputs = driver::corpus(&corpus(target)).unwrap();
        assert!(inputs.len() >= 4, "{} has a corpus of {}", target.name, inputs.len());
        for (path, input) in inputs {
            assert!(input.len() <= 64 << 10, "{} is not small", path.display());
            shanty_fuzz::check(target, &input);
        }
    }
}

#[test]
fn a_second_of_changes_breaks_nothing() {
    let artefacts = std::env::temp_dir().join(format!("shanty-fuzz-{}", std::process::id()));
    for target in &TARGETS {
        let outcome = driver::run(target, 7, Duration::from_secs(1), &artefacts).unwrap();
        assert!(outcome.inputs > 20, "{}: {} inputs", target.name, outcome.inputs);
    }
}

/// The count would be worth nothing if it saw nothing.
#[test]
fn memory_is_counted() {
    let (peak, sum) = peak_of(|| {
        let first = vec![1_u8; 5000];
        drop(vec![1_u8; 3000]);
        first.len()
    });
    assert_eq!((peak, sum), (8000, 5000));
    assert!(allowed_bytes(1000) < 1 << 20);
}
