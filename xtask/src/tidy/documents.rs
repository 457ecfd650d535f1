//! What documents promise.

use std::path::{Component, Path, PathBuf};

use anyhow::Result;

use shanty_config::env_vars::ENVIRONMENT_VARIABLES;

use super::Complaint;
use crate::tree::Tree;

/// Every variable of ours that a program reads is declared in `shanty_config::env_vars`, and so has its line in
/// `docs/reference/environment.md`.
pub(super) fn variables(tree: &Tree) -> Result<Vec<Complaint>> {
    let is_declared = |variable: &str| {
        ENVIRONMENT_VARIABLES.iter().any(|known| known.name.trim_end_matches('…') == variable)
    };
    let mut complaints = Vec::new();
    for source in tree.sources().filter(|source| source.name.starts_with("crates/")) {
        for (number, code) in source.program_lines() {
            let quoted = code.split('"').skip(1).step_by(2);
            let ours = quoted.filter(|text| text.starts_with("SHANTY_") && text.chars().all(in_a_name));
            for variable in ours.filter(|variable| !is_declared(variable)) {
                complaints.push(Complaint::at(
                    source.name,
                    number,
                    format!("{variable} is not declared in env_vars"),
                ));
            }
        }
    }
    Ok(complaints)
}

fn in_a_name(letter: char) -> bool {
    letter.is_ascii_uppercase() || letter.is_ascii_digit() || letter == '_'
}

/// A relative link of a document leads to a file or folder of the repository.
pub(super) fn links(tree: &Tree) -> Result<Vec<Complaint>> {
    let mut complaints = Vec::new();
    for (name, text) in tree.texts().filter(|(name, _)| name.ends_with(".md")) {
        let folder = Path::new(name).parent().unwrap_or(Path::new(""));
        for (index, line) in text.lines().enumerate() {
            for target in targets(line).filter(|target| !leads_somewhere(tree, folder, target)) {
                complaints.push(Complaint::at(
                    name,
                    index + 1,
                    format!("the link to {target} leads nowhere"),
                ));
            }
        }
    }
    Ok(complaints)
}

/// The relative targets of a line's links: `[text](target)`.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| {
        let target = rest.split([')', ' ']).next()?.split('#').next()?;
        (!target.is_empty() && !target.contains(':')).then_some(target)
    })
}

fn leads_somewhere(tree: &Tree, folder: &Path, target: &str) -> bool {
    let mut path = PathBuf::new();
    for part in folder.join(target).components() {
        match part {
            Component::ParentDir => {
                path.pop();
            }
            Component::Normal(part) => path.push(part),
            _ => {}
        }
    }
    let path = path.to_string_lossy();
    let below = format!("{}/", path.trim_end_matches('/'));
    tree.files.contains_key(&*path) || tree.files.keys().any(|file| file.starts_with(&below))
}

#[cfg(test)]
mod tests {
    use super::{super::complaints, *};

    #[test]
    fn an_undeclared_variable_is_seen() {
        let bad = "fn a() { var(\"SHANTY_SECRET\"); var(\"SHANTY_LOG\"); say(\"SHANTY_LOUD is a word\") }\n\
                   const PREFIX: &str = \"SHANTY_JOB__\";\n#[cfg(test)]\nmod tests { const A: &str = \"SHANTY_TEST\"; }\n";
        let seen = complaints(variables, &[("crates/a/src/a.rs", bad)]);
        assert_eq!(seen, ["crates/a/src/a.rs:1: SHANTY_SECRET is not declared in env_vars"]);
    }

    #[test]
    fn a_link_to_nothing_is_seen() {
        let text =
            "[a](b.md) [c](../x.md#part) [d](gone.md) [e](https://x.org/y) [f](../crates) [g](#here)\n";
        let files = [("docs/a.md", text), ("docs/b.md", ""), ("x.md", ""), ("crates/y/z.rs", "")];
        assert_eq!(complaints(links, &files), ["docs/a.md:1: the link to gone.md leads nowhere"]);
    }
}
