//! `shanty explain`: what an error means and what to do about it.

use serde::Serialize;

use crate::{
    error::Error,
    failure::{CommandResult, Exit},
    ui::{Paint, Ui, paint},
};

mod pages {
    include!(concat!(env!("OUT_DIR"), "/error_pages.rs"));
}

/// Explain an error code: what happened, likely causes, what to do
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty explain SH0102
  shanty explain              lists all codes")]
pub(crate) struct Args {
    /// The code, with or without SH, in any case; all codes when absent
    code: Option<String>,
}

#[derive(Serialize)]
struct Page<'a> {
    code: &'a str,
    title: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    match args.code {
        Some(code) => one(&code, ui)?,
        None => all(ui)?,
    }
    Ok(Exit::Done)
}

fn one(asked: &str, ui: &Ui) -> CommandResult<()> {
    let code = normalize(asked);
    let Some((code, text)) = pages::PAGES.iter().copied().find(|(known, _)| *known == code) else {
        return Err(Error::UnknownCode { code: asked.to_owned(), nearest: nearest(&code) }.into());
    };
    ui.data(&Page { code, title: title(text), text: Some(text) }, |_| render(text, ui.color_on_stdout()))
}

fn all(ui: &Ui) -> CommandResult<()> {
    for (code, text) in pages::PAGES {
        ui.data(&Page { code, title: title(text), text: None }, |page| {
            format!("{}  {}", page.code, page.title)
        })?;
    }
    Ok(())
}

/// `0102`, `sh0102` and `SH0102` are the same code.
fn normalize(asked: &str) -> String {
    let upper = asked.trim().to_ascii_uppercase();
    if upper.starts_with("SH") { upper } else { format!("SH{upper}") }
}

/// `# SH0102: unknown key` → `unknown key`.
fn title(text: &'static str) -> &'static str {
    let heading = text.lines().next().unwrap_or_default().trim_start_matches('#').trim();
    heading.split_once(':').map_or(heading, |(_, title)| title.trim())
}

/// Markdown headings in bold, where there is colour; the text as it is.
fn render(text: &str, color: bool) -> String {
    let lines = text.trim_end().lines().map(|line| match line.trim_start_matches('#') {
        heading if heading.len() < line.len() => paint(color, Paint::Bold, heading.trim()),
        _ => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The known code that differs in the fewest places, if it is close at all.
fn nearest(code: &str) -> Option<String> {
    let distance = |known: &str| {
        let same = known.chars().zip(code.chars()).filter(|(a, b)| a == b).count();
        known.chars().count().max(code.chars().count()) - same
    };
    let (known, _) = pages::PAGES.iter().min_by_key(|(known, _)| distance(known))?;
    (distance(known) <= 2).then(|| (*known).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_forgiving() {
        assert_eq!(normalize("0102"), "SH0102");
        assert_eq!(normalize(" sh0102 "), "SH0102");
    }

    #[test]
    fn every_page_has_its_code_a_title_and_what_to_do() {
        assert!(!pages::PAGES.is_empty());
        for (code, text) in pages::PAGES {
            assert!(text.starts_with(&format!("# {code}: ")), "{code} starts with another heading");
            assert!(!title(text).is_empty(), "{code} has no title");
            assert!(text.to_lowercase().contains("what to do"), "{code} does not say what to do");
        }
    }

    #[test]
    fn nearest_code_is_near() {
        assert_eq!(nearest("SH0991").as_deref(), Some("SH0901"));
        assert_eq!(nearest("banana"), None);
    }
}
