//! Pages that are made from the source.

use std::{
    fmt::Write,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use shanty_config::reference;

use crate::{say, tree::Tree};

/// The table that the coordinator answers by; it needs nothing of the coordinator.
#[path = "../../crates/coordinator/src/metrics/table.rs"]
mod metrics;

/// Ranges of codes and whose they are, as `shanty-diagnostic` says.
const RANGES: &[(&str, &str)] = &[
    ("SH01", "Job and service files, logs"),
    ("SH02", "Data"),
    ("SH03", "Base models"),
    ("SH04", "Adapters"),
    ("SH05", "Checkpoints"),
    ("SH06", "Training steps"),
    ("SH07", "Coordinator, workers, collectives"),
    ("SH08", "Devices"),
    ("SH09", "The command line and its surroundings"),
];

/// A flag of `shanty` that prints its own reference page; the page is made once the program has it.
const CLI_REFERENCE_FLAG: &str = "--markdown-help";

/// Writes all pages.
pub(crate) fn write(root: &Path) -> Result<bool> {
    for (name, text) in pages(root)? {
        let path = root.join(&name);
        if fs::read_to_string(&path).ok().as_deref() == Some(&text) {
            continue;
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, text).with_context(|| name.clone())?;
        say(&format!("docs: wrote {name}"));
    }
    Ok(true)
}

/// Whether all pages are as the source says.
pub(crate) fn check(root: &Path) -> Result<bool> {
    let mut fresh = true;
    for (name, text) in pages(root)? {
        if fs::read_to_string(root.join(&name)).ok().as_deref() != Some(&text) {
            say(&format!("docs: {name} is stale; run `cargo xtask docs`"));
            fresh = false;
        }
    }
    Ok(fresh)
}

fn pages(root: &Path) -> Result<Vec<(String, String)>> {
    let tree = Tree::read(root)?;
    let mut pages = vec![
        ("docs/reference/job.md".to_owned(), reference::job_page()),
        ("docs/reference/services.md".to_owned(), reference::services_page()),
        ("docs/reference/environment.md".to_owned(), reference::environment_page()),
        ("docs/reference/metrics.md".to_owned(), metrics::reference()),
        ("docs/errors/README.md".to_owned(), error_index(&tree)),
    ];
    let cli_offers = tree.sources().any(|source| {
        source.name.starts_with("crates/cli/src/") && source.text.contains(&CLI_REFERENCE_FLAG[2..])
    });
    if cli_offers {
        pages.push(("docs/reference/cli.md".to_owned(), cli_page(root)?));
    }
    Ok(pages)
}

fn cli_page(root: &Path) -> Result<String> {
    let output = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--package", "shanty-cli", "--bin", "shanty", "--", CLI_REFERENCE_FLAG])
        .env("NO_COLOR", "1")
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()
        .context("failed to run shanty")?;
    ensure!(output.status.success(), "shanty {CLI_REFERENCE_FLAG} failed");
    Ok(String::from_utf8(output.stdout)?)
}

/// `docs/errors/README.md`: every page with its title, by range.
fn error_index(tree: &Tree) -> String {
    let mut page = "<!-- Made by `cargo xtask docs` from the pages' titles. -->\n# Errors\n\n\
                    `shanty explain SH0102` shows a page in the terminal.\n"
        .to_owned();
    for (range, whose) in RANGES {
        let mut entries = tree.texts().filter_map(|(name, text)| {
            let code = name.strip_prefix("docs/errors/")?.strip_suffix(".md")?;
            let title = text.lines().next()?.strip_prefix(&format!("# {code}: "))?;
            code.starts_with(range).then(|| format!("- [{code}]({code}.md): {title}\n"))
        });
        if let Some(first) = entries.next() {
            let _ = write!(page, "\n## {whose}\n\n{first}");
            page.extend(entries);
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_lists_pages_by_range() {
        let index = error_index(&Tree::of(&[
            ("docs/errors/README.md", "# Errors\n"),
            ("docs/errors/SH0102.md", "# SH0102: unknown key\n"),
            ("docs/errors/SH0301.md", "# SH0301: no such tensor\n"),
        ]));
        let (files, models) = index.split_once("## Base models").expect("both ranges");
        assert!(files.contains("- [SH0102](SH0102.md): unknown key\n"), "{index}");
        assert!(models.contains("- [SH0301](SH0301.md): no such tensor\n"), "{index}");
        assert!(!index.contains("## Data\n"), "empty ranges are left out");
    }

    #[test]
    fn every_range_is_known() {
        let ranges: Vec<String> = (1..=9).map(|number| format!("SH0{number}")).collect();
        assert!(RANGES.iter().map(|(range, _)| *range).eq(ranges.iter().map(String::as_str)));
    }
}
