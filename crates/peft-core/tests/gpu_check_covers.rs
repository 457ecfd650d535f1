//! The check of the GPU engine compares every operation that a backend has: no GPU is needed to see to that.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

use std::{collections::BTreeSet, fs, path::Path};

/// Names of the trait's functions, in their order.
fn operations() -> Vec<String> {
    let source =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/mod.rs")).unwrap();
    let body = source.split_once("pub trait Backend:").unwrap().1;
    let body = body.split_once("\n}\n").unwrap().0;
    let names = body.lines().filter_map(|line| line.strip_prefix("    fn "));
    names.map(|line| line.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()).collect()
}

/// What the check says, all files in one.
fn check() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/gpu_check");
    let files = fs::read_dir(folder).unwrap().map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap());
    files.collect()
}

/// What whole models, their training and their memory go through instead: `models.rs` compares these with the CPU.
const BY_MODELS: [&str; 3] = ["with_gradient", "in_one_piece", "allocate_parameters"];

#[test]
fn every_operation_of_a_backend_is_compared() {
    let (operations, check) = (operations(), check());
    assert!(operations.len() > 50, "the trait is read wrongly: {operations:?}");
    let missing: BTreeSet<&String> = operations
        .iter()
        .filter(|name| !BY_MODELS.contains(&name.as_str()) && !check.contains(&format!(".{name}(")))
        .collect();
    assert!(missing.is_empty(), "gpu_check compares nothing of {missing:?}");
    for name in BY_MODELS {
        assert!(operations.iter().any(|operation| operation == name), "`{name}` is no operation any more");
    }
}
