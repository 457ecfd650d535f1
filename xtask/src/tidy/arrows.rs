//! Which crate may depend on which, and that versions and lints stand once.

use anyhow::{Context, Result};

use super::Complaint;
use crate::tree::Tree;

/// Whom each crate may know, beside `shanty-diagnostic`, which all may.
const ARROWS: &[(&str, &[&str])] = &[
    ("diagnostic", &[]),
    ("proto", &[]),
    ("config", &[]),
    ("telemetry", &[]),
    ("launch", &[]),
    ("gguf", &[]),
    ("cuda", &[]),
    ("chaos", &[]),
    ("access", &[]),
    ("peft-core", &["gguf", "cuda"]),
    ("remote", &[]),
    ("data", &["gguf", "remote", "gguf"]),
    ("collective", &["cuda"]),
    ("checkpoint", &["remote"]),
    ("coordinator", &["access", "proto", "config", "data", "checkpoint", "telemetry"]),
    (
        "worker",
        &[
            "access",
            "peft-core",
            "cuda",
            "data",
            "remote",
            "collective",
            "checkpoint",
            "config",
            "proto",
            "telemetry",
        ],
    ),
    ("tui", &["access", "proto"]),
    (
        "cli",
        &[
            "access",
            "coordinator",
            "worker",
            "tui",
            "config",
            "proto",
            "telemetry",
            "peft-core",
            "data",
            "remote",
            "collective",
            "checkpoint",
            "chaos",
            "launch",
        ],
    ),
    ("fuzz", &["gguf", "peft-core", "data"]),
    (
        "testkit",
        &["chaos", "proto", "config", "data", "checkpoint", "collective", "coordinator", "telemetry"],
    ),
];

/// A crate depends on those that the house lets it know. Tests may know anybody.
pub(super) fn arrows(tree: &Tree) -> Result<Vec<Complaint>> {
    let mut complaints = Vec::new();
    for (folder, text) in tree.manifests() {
        let Some(name) = folder.strip_prefix("crates/") else { continue };
        let file = format!("{folder}/Cargo.toml");
        let Some((_, allowed)) = ARROWS.iter().find(|(known, _)| *known == name) else {
            complaints.push(Complaint::new(&file, "a crate that the house does not know: add it to ARROWS"));
            continue;
        };
        for dependency in dependencies(&file, text, "dependencies")? {
            let Some(other) = dependency.strip_prefix("shanty-") else { continue };
            if other != "diagnostic" && !allowed.contains(&other) {
                complaints.push(Complaint::new(&file, format!("{name} may not know {other}")));
            }
        }
    }
    Ok(complaints)
}

/// Versions and lints are the workspace's.
pub(super) fn once(tree: &Tree) -> Result<Vec<Complaint>> {
    let mut complaints = Vec::new();
    for (folder, text) in tree.manifests() {
        let file = format!("{folder}/Cargo.toml");
        let manifest: toml::Table = text.parse().with_context(|| file.clone())?;
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(entries) = manifest.get(section).and_then(toml::Value::as_table) else { continue };
            for (name, entry) in entries {
                let inherits = entry.get("workspace").and_then(toml::Value::as_bool) == Some(true);
                if !inherits {
                    complaints.push(Complaint::new(&file, format!("{name} names a version of its own")));
                }
            }
        }
        let lints =
            manifest.get("lints").and_then(|lints| lints.get("workspace")).and_then(toml::Value::as_bool);
        if manifest.contains_key("package") && lints != Some(true) {
            complaints.push(Complaint::new(&file, "lacks `[lints] workspace = true`"));
        }
    }
    Ok(complaints)
}

fn dependencies(file: &str, text: &str, section: &str) -> Result<Vec<String>> {
    let manifest: toml::Table = text.parse().with_context(|| file.to_owned())?;
    let entries = manifest.get(section).and_then(toml::Value::as_table);
    Ok(entries.map(|entries| entries.keys().cloned().collect()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::{super::complaints, *};

    #[test]
    fn a_forbidden_arrow_is_seen_and_one_of_a_test_is_not() {
        let bad = "[dependencies]\nshanty-worker.workspace = true\nshanty-diagnostic.workspace = true\n\
                   [dev-dependencies]\nshanty-cli.workspace = true\n";
        let expected = ["crates/coordinator/Cargo.toml: coordinator may not know worker"];
        assert_eq!(complaints(arrows, &[("crates/coordinator/Cargo.toml", bad)]), expected);
        assert_eq!(complaints(arrows, &[("crates/novel/Cargo.toml", "")]).len(), 1);
    }

    #[test]
    fn a_version_and_a_lint_of_its_own_are_seen() {
        let bad = "[package]\nname = \"a\"\n[dependencies]\na = \"1\"\nb = { version = \"1\" }\nc.workspace = true\n";
        let seen = complaints(once, &[("crates/a/Cargo.toml", bad)]);
        assert_eq!(seen.len(), 3, "{seen:?}");
        assert!(seen[2].contains("[lints]"));
    }
}
