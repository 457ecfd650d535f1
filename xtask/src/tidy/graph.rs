//! What crates pull in through all of their dependencies.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Complaint;
use crate::tree::Tree;

/// What knows tensors or GPUs.
const HEAVY: &[&str] =
    &["candle-core", "candle-nn", "candle-transformers", "cudarc", "gemm", "shanty-peft-core"];
/// What is asynchronous or speaks to networks.
const NETWORKS: &[&str] = &["tokio", "tonic", "object_store", "hyper", "reqwest"];
/// What needs a C++ compiler, another program or a library of the system to build or to run.
const FOREIGN: &[&str] =
    &["openssl", "openssl-sys", "native-tls", "aws-lc-sys", "protoc-bin-vendored", "onig_sys"];

/// What a crate must not pull in.
const ABSENT: &[(&str, &[&[&str]])] = &[
    ("shanty-diagnostic", &[HEAVY, NETWORKS]),
    ("shanty-proto", &[HEAVY]),
    ("shanty-config", &[HEAVY, NETWORKS]),
    // It sends traces by OTLP.
    ("shanty-telemetry", &[HEAVY]),
    ("shanty-gguf", &[HEAVY, NETWORKS]),
    ("shanty-data", &[HEAVY, &["tonic"]]),
    ("shanty-remote", &[HEAVY, FOREIGN, &["tonic"]]),
    ("shanty-coordinator", &[HEAVY]),
    ("shanty-peft-core", &[NETWORKS]),
    ("shanty-cli", &[FOREIGN]),
    ("xtask", &[HEAVY, NETWORKS]),
];

/// Light crates stay light, through the whole graph.
pub(super) fn graph(tree: &Tree) -> Result<Vec<Complaint>> {
    let mut complaints = Vec::new();
    for (name, lists) in ABSENT {
        let output = Command::new(env!("CARGO"))
            .args(["tree", "--locked", "--package", name, "--edges", "normal", "--prefix", "none"])
            .args(["--format", "{p}"])
            .current_dir(&tree.root)
            .output()
            .context("failed to run cargo tree")?;
        let failure = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cargo tree --package {name}: {failure}");
        complaints.extend(unwanted(name, &String::from_utf8_lossy(&output.stdout), lists));
    }
    Ok(complaints)
}

/// The lines of `cargo tree` that name what must be absent, once each.
fn unwanted(name: &str, listing: &str, lists: &[&[&str]]) -> Vec<Complaint> {
    let mut found: Vec<&str> = listing
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|package| lists.iter().any(|list| list.contains(package)))
        .collect();
    found.sort_unstable();
    found.dedup();
    let how =
        |package: &str| format!("pulls in {package}; see `cargo tree -p {name} -e normal -i {package}`");
    found.into_iter().map(|package| Complaint::new(name, how(package))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heavy_packages_are_seen_once_and_names_must_match_whole() {
        let listing = "shanty-coordinator v0.1.0 (x)\ntokio v1.0.0\ngemm-common v0.19.0\ncudarc v0.19.0\ncudarc v0.19.0 (*)\n";
        let seen = unwanted("shanty-coordinator", listing, &[HEAVY]);
        assert_eq!(seen.len(), 1);
        assert!(seen[0].to_string().contains("pulls in cudarc"));
        assert_eq!(unwanted("shanty-peft-core", listing, &[NETWORKS]).len(), 1);
    }
}
