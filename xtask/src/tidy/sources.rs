//! What Rust sources may hold.

use anyhow::Result;

use super::Complaint;
use crate::tree::{Source, Tree};

/// Where `unsafe` may stand: backends and NCCL, and where allocations are counted (an allocator is unsafe to write).
const UNSAFE_ALLOWED: &[&str] = &[
    "crates/collective/src/nccl",
    "crates/cuda/src/span.rs",
    "crates/peft-core/src/backend/cuda",
    "crates/peft-core/src/backend/cpu",
    "crates/peft-core/tests/allocation.rs",
    "crates/peft-core/tests/many_adapters.rs",
    "crates/peft-core/tests/merge.rs",
    "crates/fuzz/src/memory.rs",
];
/// How far above an `unsafe` its reason may stand, lines.
const REASON_WITHIN: usize = 6;

/// `unsafe` stands only where devices are, and each has a `SAFETY:` comment.
pub(super) fn unsafe_code(tree: &Tree) -> Result<Vec<Complaint>> {
    let mut complaints = Vec::new();
    for source in tree.sources().filter(|source| !source.name.starts_with("xtask/")) {
        let lines: Vec<&str> = source.text.lines().collect();
        for (number, code) in source.code_lines() {
            if !holds_word(code, "unsafe") {
                continue;
            }
            let allowed = UNSAFE_ALLOWED.iter().any(|place| source.name.starts_with(place));
            let above = &lines[number.saturating_sub(REASON_WITHIN + 1)..number];
            let has_reason = above.iter().any(|line| line.contains("SAFETY:") || line.contains("# Safety"));
            if !allowed {
                complaints.push(Complaint::at(source.name, number, "unsafe outside the device crates"));
            } else if !has_reason {
                complaints.push(Complaint::at(source.name, number, "unsafe without a SAFETY: comment"));
            }
        }
    }
    Ok(complaints)
}

/// Time, chance and the world reach the machine as arguments only.
const IMPURE: &[&str] = &[
    "Instant::now",
    "SystemTime",
    "rand::",
    "thread_rng",
    "Uuid::new",
    "std::fs",
    "std::net",
    "std::env",
    "std::thread",
    "tokio",
    "async fn",
    "tracing",
    "rusqlite",
    "HashMap<",
    "HashSet<",
];

/// `coordinator::machine` has no clock, no randomness, no I/O, and no order that differs from run to run.
pub(super) fn pure_machine(tree: &Tree) -> Result<Vec<Complaint>> {
    let mut complaints = Vec::new();
    let is_machine = |source: &Source<'_>| {
        source.name.starts_with("crates/coordinator/src/machine/")
            || source.name == "crates/coordinator/src/machine.rs"
    };
    for source in tree.sources().filter(is_machine) {
        for (number, code) in source.program_lines() {
            for word in IMPURE.iter().filter(|word| code.contains(**word)) {
                complaints.push(Complaint::at(
                    source.name,
                    number,
                    format!("the machine is pure: no {word}"),
                ));
            }
        }
    }
    Ok(complaints)
}

/// No `todo!`, no `unimplemented!`, no `dbg!`, in tests neither.
pub(super) fn unfinished(tree: &Tree) -> Result<Vec<Complaint>> {
    let mut complaints = Vec::new();
    for source in tree.sources() {
        for (number, code) in source.code_lines() {
            for name in ["todo", "unimplemented", "dbg"] {
                if holds_word(code, name) && code.contains(&format!("{name}!")) {
                    complaints.push(Complaint::at(source.name, number, format!("{name}! is left over")));
                }
            }
        }
    }
    Ok(complaints)
}

/// A test that does not run says why: `#[ignore = "…"]`.
pub(super) fn ignored_tests(tree: &Tree) -> Result<Vec<Complaint>> {
    let bare = concat!("#[ign", "ore]");
    let mut complaints = Vec::new();
    for source in tree.sources() {
        for (number, code) in source.code_lines().filter(|(_, code)| code.contains(bare)) {
            let _ = code;
            complaints.push(Complaint::at(source.name, number, "a test is skipped without a reason"));
        }
    }
    Ok(complaints)
}

/// Every crate's root begins with its documentation.
pub(super) fn crate_docs(tree: &Tree) -> Result<Vec<Complaint>> {
    let is_root = |name: &str| name.ends_with("src/lib.rs") || name.ends_with("src/main.rs");
    Ok(tree
        .sources()
        .filter(|source| is_root(source.name) && !source.text.starts_with("//!"))
        .map(|source| Complaint::at(source.name, 1, "a crate begins with `//!` and what it is"))
        .collect())
}

/// Whether a line holds a word that is not part of a longer one.
fn holds_word(line: &str, word: &str) -> bool {
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(is_part) && !line[at + word.len()..].starts_with(is_part))
}

#[cfg(test)]
mod tests {
    use super::{super::complaints, *};

    #[test]
    fn unsafe_is_seen_outside_the_device_crates_and_without_its_reason() {
        let code = "fn a() {\n    unsafe { b() }\n}\n";
        let reasoned = "fn a() {\n    // SAFETY: b has no condition\n    unsafe { b() }\n}\n";
        let seen = complaints(
            unsafe_code,
            &[
                ("crates/data/src/a.rs", reasoned),
                ("crates/collective/src/nccl/a.rs", code),
                ("crates/peft-core/src/backend/cuda/a.rs", reasoned),
                ("crates/data/src/b.rs", "// unsafe is a word here\n#![deny(unsafe_op_in_unsafe_fn)]\n"),
            ],
        );
        assert_eq!(
            seen,
            [
                "crates/collective/src/nccl/a.rs:2: unsafe without a SAFETY: comment",
                "crates/data/src/a.rs:3: unsafe outside the device crates",
            ]
        );
    }

    #[test]
    fn a_clock_in_the_machine_is_seen_and_one_in_its_tests_is_not() {
        let bad = "use std::time::Instant;\nfn a() { Instant::now(); }\n#[cfg(test)]\nmod tests {\n  use std::fs;\n}\n";
        let seen = complaints(
            pure_machine,
            &[("crates/coordinator/src/machine/a.rs", bad), ("crates/coordinator/src/server.rs", bad)],
        );
        assert_eq!(seen, ["crates/coordinator/src/machine/a.rs:2: the machine is pure: no Instant::now"]);
    }

    #[test]
    fn leftovers_are_seen() {
        let bad = format!("fn a() {{ {}!() }}\nfn b() {{ {}!(1) }}\nfn todo_list() {{}}\n", "todo", "dbg");
        assert_eq!(complaints(unfinished, &[("crates/a/src/a.rs", &bad)]).len(), 2);
    }

    #[test]
    fn a_skipped_test_needs_a_reason() {
        let bad = format!("{}{}\nfn a() {{}}\n#[ignore = \"needs a GPU\"]\nfn b() {{}}\n", "#[ign", "ore]");
        let seen = complaints(ignored_tests, &[("crates/a/src/a.rs", &bad)]);
        assert_eq!(seen, ["crates/a/src/a.rs:1: a test is skipped without a reason"]);
    }

    #[test]
    fn a_crate_without_a_word_about_itself_is_seen() {
        let files = [("crates/a/src/lib.rs", "mod a;\n"), ("crates/b/src/lib.rs", "//! What b is.\n")];
        assert_eq!(complaints(crate_docs, &files).len(), 1);
    }
}
