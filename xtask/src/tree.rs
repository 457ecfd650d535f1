//! The files of the repository.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// Every file that is tracked, or would be if it were added, by its path from the root.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    pub(crate) root: PathBuf,
    pub(crate) files: BTreeMap<String, File>,
}

/// A file of the tree.
#[derive(Debug)]
pub(crate) struct File {
    pub(crate) size_bytes: u64,
    /// None for what is no text.
    pub(crate) text: Option<String>,
}

impl Tree {
    /// Reads what git knows of.
    pub(crate) fn read(root: &Path) -> Result<Self> {
        let output = Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
            .current_dir(root)
            .output()
            .context("failed to run git")?;
        ensure!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
        let mut files = BTreeMap::new();
        for name in String::from_utf8(output.stdout)?.split('\0').filter(|name| !name.is_empty()) {
            // A file that was removed and not yet committed is still listed.
            let Ok(bytes) = fs::read(root.join(name)) else { continue };
            let size_bytes = bytes.len() as u64;
            files.insert(name.to_owned(), File { size_bytes, text: String::from_utf8(bytes).ok() });
        }
        Ok(Self { root: root.to_owned(), files })
    }

    /// A tree for tests.
    #[cfg(test)]
    pub(crate) fn of(files: &[(&str, &str)]) -> Self {
        let file = |text: &str| File { size_bytes: text.len() as u64, text: Some(text.to_owned()) };
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), file(text))).collect();
        Self { root: PathBuf::new(), files }
    }

    /// All text files.
    pub(crate) fn texts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().filter_map(|(name, file)| Some((name.as_str(), file.text.as_deref()?)))
    }

    /// All Rust sources.
    pub(crate) fn sources(&self) -> impl Iterator<Item = Source<'_>> {
        self.texts().filter(|(name, _)| name.ends_with(".rs")).map(|(name, text)| Source { name, text })
    }

    /// The manifest of each crate: its folder and its text.
    pub(crate) fn manifests(&self) -> impl Iterator<Item = (&str, &str)> {
        self.texts().filter_map(|(name, text)| {
            let folder = name.strip_suffix("/Cargo.toml")?;
            // The programs for cargo-fuzz stand outside of the workspace.
            (folder != "fuzz").then_some((folder, text))
        })
    }
}

/// A Rust source.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) name: &'a str,
    pub(crate) text: &'a str,
}

impl<'a> Source<'a> {
    /// Whether the whole file is a test.
    pub(crate) fn is_test(&self) -> bool {
        let file = self.name.rsplit('/').next().unwrap_or(self.name);
        self.name.contains("/tests/") || self.name.starts_with("crates/testkit/") || file == "tests.rs"
    }

    /// The lines of the program: from 1, without the test module that ends a file, without comments.
    pub(crate) fn program_lines(&self) -> impl Iterator<Item = (usize, &'a str)> {
        let length = if self.is_test() { 0 } else { self.program_length() };
        self.code_lines().take(length)
    }

    /// All lines, from 1, without comments (but with what follows `//` in a text: rules look for words that no
    /// text needs).
    pub(crate) fn code_lines(&self) -> impl Iterator<Item = (usize, &'a str)> {
        let without_comment = |line: &'a str| {
            let end = comment_start(line).unwrap_or(line.len());
            &line[..end]
        };
        self.text.lines().enumerate().map(move |(index, line)| (index + 1, without_comment(line)))
    }

    /// Lines before the test module.
    pub(crate) fn program_length(&self) -> usize {
        let lines: Vec<&str> = self.text.lines().collect();
        let is_test_module = |index: &usize| {
            let next = lines[index + 1..].iter().find(|line| !line.trim_start().starts_with("#["));
            lines[*index] == "#[cfg(test)]" && next.is_some_and(|line| line.contains("mod "))
        };
        (0..lines.len()).find(is_test_module).unwrap_or(lines.len())
    }
}

/// Where a comment begins: at a `//` that is not part of a URL.
fn comment_start(line: &str) -> Option<usize> {
    line.match_indices("//").map(|(at, _)| at).find(|at| !line[..*at].ends_with(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_ends_where_its_test_module_begins() {
        let text =
            "//! Doc.\nfn a() {} // b\n\n#[cfg(test)]\n#[path = \"x.rs\"]\nmod tests {\n fn c() {}\n}\n";
        let source = Source { name: "crates/a/src/a.rs", text };
        let lines: Vec<_> = source.program_lines().collect();
        assert_eq!(lines, [(1, ""), (2, "fn a() {} "), (3, "")]);
        assert_eq!(Source { name: "crates/a/tests/a.rs", text }.program_lines().count(), 0);
    }

    #[test]
    fn a_url_is_no_comment() {
        assert_eq!(comment_start("let a = \"http://x\"; // b"), Some(20));
        assert_eq!(comment_start("let a = \"http://x\";"), None);
    }
}
