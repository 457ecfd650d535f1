//! The house rules.
//!
//! A rule is a function from the tree to complaints. To change a rule, change its list here and say why in the commit.

mod arrows;
mod documents;
mod error_pages;
mod files;
mod graph;
mod sources;

use std::{fmt, path::Path};

use anyhow::Result;

use crate::{say, tree::Tree};

/// A rule that is broken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Complaint {
    file: String,
    line: Option<usize>,
    what: String,
}

impl Complaint {
    fn new(file: &str, what: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line: None, what: what.into() }
    }

    fn at(file: &str, line: usize, what: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line: Some(line), what: what.into() }
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

type Rule = fn(&Tree) -> Result<Vec<Complaint>>;

const RULES: &[(&str, Rule)] = &[
    ("crates know only whom they may know", arrows::arrows),
    ("versions and lints stand once, in the workspace", arrows::once),
    ("light crates pull in nothing heavy", graph::graph),
    ("unsafe only where devices are, with its reason", sources::unsafe_code),
    ("the coordinator's machine is pure", sources::pure_machine),
    ("nothing unfinished, nothing left from debugging", sources::unfinished),
    ("no test is skipped without a reason", sources::ignored_tests),
    ("every crate says what it is", sources::crate_docs),
    ("no path of somebody's machine", files::machine_paths),
    ("files of a readable length", files::length),
    ("no large file by accident", files::size),
    ("every error has a page, every page an error", error_pages::pages),
    ("every environment variable is declared", documents::variables),
    ("documents link to what is there", documents::links),
];

/// Checks all rules; whether all hold.
pub(crate) fn run(root: &Path) -> Result<bool> {
    let tree = Tree::read(root)?;
    let mut broken = 0;
    for (name, rule) in RULES {
        let complaints = rule(&tree)?;
        if !complaints.is_empty() {
            say(&format!("tidy: {name}"));
        }
        for complaint in &complaints {
            say(&format!("  {complaint}"));
        }
        broken += complaints.len();
    }
    match broken {
        0 => say(&format!("tidy: {} rules hold for {} files", RULES.len(), tree.files.len())),
        _ => say(&format!("tidy: {broken} complaints")),
    }
    Ok(broken == 0)
}

/// The complaints of a rule about a tree, as text, for its test.
#[cfg(test)]
fn complaints(rule: Rule, files: &[(&str, &str)]) -> Vec<String> {
    rule(&Tree::of(files)).expect("the rule can be checked").iter().map(Complaint::to_string).collect()
}
