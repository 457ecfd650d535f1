//! Error codes and their pages.

use std::collections::BTreeMap;

use anyhow::Result;

use super::Complaint;
use crate::tree::Tree;

/// What every page tells.
const SECTIONS: &[&str] = &["## What happened", "## Likely causes", "## What to do"];

/// Every code that the program gives has a page of the right form, and every page is about such a code.
pub(super) fn pages(tree: &Tree) -> Result<Vec<Complaint>> {
    let mut codes: BTreeMap<&str, (&str, usize)> = BTreeMap::new();
    for source in tree.sources().filter(|source| source.name.starts_with("crates/")) {
        for (number, code) in source.program_lines() {
            for found in codes_in(code) {
                codes.entry(found).or_insert((source.name, number));
            }
        }
    }
    let mut complaints = Vec::new();
    for (code, (file, line)) in &codes {
        if !tree.files.contains_key(&format!("docs/errors/{code}.md")) {
            complaints.push(Complaint::at(file, *line, format!("{code} has no page docs/errors/{code}.md")));
        }
    }
    for (name, text) in tree.texts() {
        let page = name.strip_prefix("docs/errors/").and_then(|name| name.strip_suffix(".md"));
        let Some(code) = page.filter(|page| *page != "README") else { continue };
        if !codes.contains_key(code) {
            complaints.push(Complaint::new(name, "no program gives this code"));
        }
        if !text.starts_with(&format!("# {code}: ")) {
            complaints.push(Complaint::at(name, 1, format!("must begin with `# {code}: ` and a title")));
        }
        for section in SECTIONS.iter().filter(|section| !text.contains(*section)) {
            complaints.push(Complaint::new(name, format!("lacks `{section}`")));
        }
    }
    Ok(complaints)
}

/// The quoted codes in a line: `"SH0102"`.
fn codes_in(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("\"SH").filter_map(|(at, _)| {
        let code = line.get(at + 1..at + 7)?;
        let is_code = code[2..].chars().all(|letter| letter.is_ascii_digit());
        (is_code && line[at + 7..].starts_with('"')).then_some(code)
    })
}

#[cfg(test)]
mod tests {
    use super::{super::complaints, *};

    #[test]
    fn codes_and_pages_are_held_against_each_other() {
        let page = |code: &str| {
            format!("# {code}: title\n\n## What happened\n\n## Likely causes\n\n## What to do\n")
        };
        let source = "fn a() { new(\"SH0101\"); new(\"SH0102\"); say(\"SH01\", \"SH01023\") }\n\
                      #[cfg(test)]\nmod tests { const A: &str = \"SH0199\"; }\n";
        let seen = complaints(
            pages,
            &[
                ("crates/a/src/a.rs", source),
                ("docs/errors/README.md", "all of them"),
                ("docs/errors/SH0101.md", &page("SH0101")),
                (
                    "docs/errors/SH0103.md",
                    &page("SH0103").replace("# SH0103", "# SH0104").replace("## What to do", ""),
                ),
            ],
        );
        assert_eq!(
            seen,
            [
                "crates/a/src/a.rs:1: SH0102 has no page docs/errors/SH0102.md",
                "docs/errors/SH0103.md: no program gives this code",
                "docs/errors/SH0103.md:1: must begin with `# SH0103: ` and a title",
                "docs/errors/SH0103.md: lacks `## What to do`",
            ]
        );
    }
}
