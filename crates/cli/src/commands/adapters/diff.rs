//! `shanty adapters diff`: how two adapters differ.

use std::path::PathBuf;

use serde_json::json;
use shanty_peft_core::adapter_files::{StoredAdapter, compare};

use super::number;
use crate::{failure::CommandResult, format, ui::Ui};

/// Tensors and settings that are shown before the rest is counted.
const SHOWN: usize = 12;

/// Show how two adapters differ: settings, tensors, and the direction of what they change
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty adapters diff runs/pirate/adapter runs/gnome/adapter
  shanty adapters diff before after --output json

A tensor's difference is |first - second| / |second|. The cosine compares what the two add to the weights, all modules
together: 1 the same direction, 0 nothing in common, -1 opposite.")]
pub(super) struct Args {
    /// The first adapter's folder
    #[arg(value_name = "FIRST")]
    first: PathBuf,
    /// The second adapter's folder
    #[arg(value_name = "SECOND")]
    second: PathBuf,
}

pub(super) fn execute(args: &Args, ui: &Ui) -> CommandResult<()> {
    let (first, second) = (StoredAdapter::open(&args.first)?, StoredAdapter::open(&args.second)?);
    let difference = compare(&first, &second)?;
    if ui.is_json() {
        let settings: Vec<_> = difference
            .settings
            .iter()
            .map(|(key, a, b)| json!({ "key": key, "first": a, "second": b }))
            .collect();
        let numbers: Vec<_> = difference
            .numbers
            .iter()
            .map(|(name, relative)| json!({ "name": name, "difference": relative }))
            .collect();
        let shapes: Vec<_> = difference
            .shapes
            .iter()
            .map(|(name, a, b)| json!({ "name": name, "first": a, "second": b }))
            .collect();
        return ui.json(&json!({
            "same": difference.is_none(), "settings": settings, "only_first": difference.only_first,
            "only_second": difference.only_second, "shapes": shapes, "numbers": numbers,
            "same_tensors": difference.same, "cosine": difference.cosine,
        }));
    }
    if difference.is_none() {
        return ui.line(format!("the same: settings and {} tensors", difference.same));
    }
    let mut parts = Vec::new();
    if !difference.settings.is_empty() {
        let rows = difference.settings.iter().map(|(key, a, b)| {
            vec![key.clone(), shortened(&a.to_string()), shortened(&b.to_string())]
        });
        parts.push(table(&["setting", "first", "second"], rows.collect()));
    }
    for (title, names) in [("only in the first", &difference.only_first), ("only in the second", &difference.only_second)] {
        if !names.is_empty() {
            parts.push(table(&[title], names.iter().map(|name| vec![name.clone()]).collect()));
        }
    }
    if !difference.shapes.is_empty() {
        let rows = difference
            .shapes
            .iter()
            .map(|(name, a, b)| vec![name.clone(), format!("{a:?}"), format!("{b:?}")]);
        parts.push(table(&["tensor", "shape in the first", "in the second"], rows.collect()));
    }
    if !difference.numbers.is_empty() {
        let mut numbers = difference.numbers.clone();
        numbers.sort_by(|a, b| b.1.total_cmp(&a.1));
        let rows = numbers.iter().map(|(name, relative)| vec![name.clone(), number(*relative)]);
        parts.push(table(&["tensor", "difference"], rows.collect()));
    }
    let mut last = format!("{} tensors are the same, {} differ", difference.same, difference.numbers.len());
    if let Some(cosine) = difference.cosine {
        last.push_str(&format!("; cosine of the changes {cosine:.4}"));
    }
    parts.push(last);
    ui.line(parts.join("\n\n"))
}

fn table(header: &[&str], mut rows: Vec<Vec<String>>) -> String {
    let more = rows.len().saturating_sub(SHOWN);
    rows.truncate(SHOWN);
    let mut text = format::table(header, &rows);
    if more > 0 {
        text.push_str(&format!("\n… and {more} more"));
    }
    text
}

/// At most 60 letters of a value.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
