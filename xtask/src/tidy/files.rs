//! What files may hold and how long and large they may be.

use anyhow::Result;

use super::Complaint;
use crate::tree::Tree;

/// Longest Rust source, lines, its test module not counted.
const LONGEST: usize = 500;
/// Largest file that needs no entry in [`LARGE_ALLOWED`].
const LARGEST_BYTES: u64 = 1 << 20;
/// What is large on purpose.
const LARGE_ALLOWED: &[&str] = &["examples/tiny-llama-14m/", "examples/tasks/", "Cargo.lock"];

/// Beginnings of absolute paths that exist on somebody's machine only, and the folder beside the repository.
const FOREIGN_PATHS: &[&str] =
    &[concat!("/", "work/"), concat!("/", "root/"), concat!("/", "home/"), concat!("..", "/shared")];

/// No path of somebody's machine in any text.
pub(super) fn machine_paths(tree: &Tree) -> Result<Vec<Complaint>> {
    let mut complaints = Vec::new();
    for (name, text) in tree.texts() {
        if name == "Cargo.lock" || name.starts_with("examples/tasks/") || name.ends_with("tokenizer.json") {
            continue;
        }
        for (index, line) in text.lines().enumerate() {
            for path in FOREIGN_PATHS.iter().filter(|path| holds_path(line, path)) {
                complaints.push(Complaint::at(
                    name,
                    index + 1,
                    format!("a path of somebody's machine: {path}"),
                ));
            }
        }
    }
    Ok(complaints)
}

/// Whether a line holds a path that begins so (and not one that merely goes on so).
fn holds_path(line: &str, path: &str) -> bool {
    let goes_on =
        |letter: char| letter.is_alphanumeric() || matches!(letter, '_' | '-' | '.' | '}' | ')' | '*');
    line.match_indices(path).any(|(at, _)| !line[..at].ends_with(goes_on) || path.starts_with('.'))
}

/// Sources are split by duty before they reach 500 lines. Tests may be longer: a table of cases is.
pub(super) fn length(tree: &Tree) -> Result<Vec<Complaint>> {
    let mut complaints = Vec::new();
    for source in tree.sources().filter(|source| !source.is_test()) {
        let lines = source.program_length();
        if lines > LONGEST {
            let what = format!("{lines} lines without its tests: split it by duty before {LONGEST}");
            complaints.push(Complaint::new(source.name, what));
        }
    }
    Ok(complaints)
}

/// Large files are there on purpose.
pub(super) fn size(tree: &Tree) -> Result<Vec<Complaint>> {
    let is_allowed = |name: &str| LARGE_ALLOWED.iter().any(|allowed| name.starts_with(allowed));
    Ok(tree
        .files
        .iter()
        .filter(|(name, file)| file.size_bytes > LARGEST_BYTES && !is_allowed(name))
        .map(|(name, file)| Complaint::new(name, format!("{} KiB: more than 1 MiB", file.size_bytes >> 10)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::{super::complaints, *};

    #[test]
    fn paths_of_a_machine_are_seen_and_others_are_not() {
        let bad = ["see /wo", "rk/main\nln -s ..", "/shared x\nfn f() {} // /ho", "me/me/x\n"].concat();
        assert_eq!(complaints(machine_paths, &[("docs/a.md", &bad)]).len(), 3);
        let good = ["docs/wo", "rk/a.md\nhttps://x.org/ho", "me/\n"].concat();
        assert_eq!(complaints(machine_paths, &[("docs/a.md", &good)]), [] as [String; 0]);
    }

    #[test]
    fn a_long_source_is_seen_and_long_tests_are_not() {
        let long = "fn a() {}\n".repeat(501);
        let tested = format!("fn a() {{}}\n#[cfg(test)]\nmod tests {{\n{long}}}\n");
        let files = [
            ("crates/a/src/a.rs", long.as_str()),
            ("crates/a/tests/a.rs", &long),
            ("crates/a/src/b.rs", &tested),
        ];
        let seen = complaints(length, &files);
        assert_eq!(seen.len(), 1);
        assert!(seen[0].starts_with("crates/a/src/a.rs: 501 lines"), "{seen:?}");
    }

    #[test]
    fn a_large_file_is_seen_unless_it_is_meant() {
        let large = " ".repeat((1 << 20) + 1);
        let files = [("docs/picture.svg", large.as_str()), ("examples/tasks/a.jsonl", &large)];
        assert_eq!(complaints(size, &files), ["docs/picture.svg: 1024 KiB: more than 1 MiB"]);
    }
}
