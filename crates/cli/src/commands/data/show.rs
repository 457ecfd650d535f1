//! Data for people: figures, a histogram, samples with what is trained between marks.

use std::ops::Range;

use serde::Serialize;
use shanty_data::{SplitSummary, Tokenizer};

use super::inspect::Shown;
use crate::{
    format,
    job_file::short,
    ui::{Paint, paint},
};

/// What stands between these is trained. They hold without colour.
const OPEN: &str = "⟦";
const CLOSE: &str = "⟧";
/// A line break, made visible.
const BREAK: &str = "↵";
/// Width of the longest bar.
const BAR: u64 = 40;
/// Of one sample, so many letters are shown; half of them from its end.
const LETTERS: usize = 2400;

/// Tokens next to each other that are trained, or are not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) trained: bool,
}

/// The text of tokens, in trained and untrained pieces.
pub(super) fn pieces(
    ids: &[u32],
    trained: &[Range<u32>],
    tokenizer: &Tokenizer,
) -> Result<Vec<Piece>, shanty_data::Error> {
    let mut pieces = Vec::new();
    let mut push = |range: Range<usize>, trained: bool| {
        if !range.is_empty() {
            pieces.push(Piece { text: tokenizer.decode(&ids[range], false)?, trained });
        }
        Ok::<(), shanty_data::Error>(())
    };
    let mut at = 0;
    for range in trained {
        let (start, end) = (range.start as usize, range.end as usize);
        push(at..start, false)?;
        push(start..end, true)?;
        at = end;
    }
    push(at..ids.len(), false)?;
    Ok(pieces)
}

fn head(text: &str, color: bool) -> String {
    paint(color, Paint::Bold, &format!("{text:<12}"))
}

/// The whole report.
pub(super) fn render(
    what: &str,
    summary: &SplitSummary,
    max_length: u32,
    samples: &[Shown],
    tokenizer: &Tokenizer,
    color: bool,
) -> String {
    let mut lines: Vec<String> = Vec::new();
    for (index, sample) in samples.iter().enumerate() {
        lines.push(title(&format!("sample {} of {}", index + 1, samples.len()), sample, color));
        lines.push(body(&sample.pieces, color));
        lines.extend(fate(sample, max_length, color));
        lines.push(String::new());
    }
    if !samples.is_empty() {
        let marked = paint(color, Paint::Green, &format!("{OPEN}trained{CLOSE}"));
        lines.push(format!("{marked} is trained, all else is only read; {BREAK} is a line break"));
        lines.push(String::new());
    }
    lines.push(format!("{}{what}", head("data", color)));
    lines.push(format!(
        "{:12}{} records ({}) in {} file{}, {} samples, {} rows of up to {} tokens",
        "",
        format::count(summary.records),
        summary.form,
        summary.files,
        if summary.files == 1 { "" } else { "s" },
        format::count(summary.samples),
        format::count(summary.rows),
        format::count(u64::from(max_length)),
    ));
    if !summary.ignored_columns.is_empty() {
        lines.push(format!("{:12}not read: {}", "", summary.ignored_columns.join(", ")));
    }
    lines.extend(sources(summary, color));
    lines.push(format!(
        "{}{}, of which {} are trained ({}); {:.1} % of the rows' room is filled",
        head("tokens", color),
        format::count(summary.tokens),
        format::count(summary.trained_tokens),
        format::percent(summary.trained_tokens, summary.tokens),
        100.0 * (1.0 - summary.padding_fraction),
    ));
    lines.push(format!("{}{}", head("end token", color), ends(summary, tokenizer)));
    lines.extend(left_out(summary, max_length, color));
    lines.push(histogram(summary, max_length, color));
    lines.join("\n")
}

/// One packed row.
pub(super) fn render_row(id: u64, tokens: u64, max_length: u32, samples: &[Shown], color: bool) -> String {
    let mut lines = vec![format!(
        "{}{id}: {} samples, {} of {} tokens filled",
        head("row", color),
        samples.len(),
        format::count(tokens),
        format::count(u64::from(max_length)),
    )];
    for (index, sample) in samples.iter().enumerate() {
        lines.push(String::new());
        lines.push(title(&format!("sample {} of {}", index + 1, samples.len()), sample, color));
        lines.push(body(&sample.pieces, color));
    }
    lines.join("\n")
}

fn title(name: &str, sample: &Shown, color: bool) -> String {
    let name = paint(color, Paint::Bold, name);
    format!(
        "{name}  {}:{}  {} tokens, {} trained",
        short(&sample.file),
        sample.line,
        format::count(sample.tokens),
        format::count(sample.trained_tokens),
    )
}

/// The text, indented, with marks around what is trained and line breaks made visible.
fn body(pieces: &[Piece], color: bool) -> String {
    let total: usize = pieces.iter().map(|piece| piece.text.chars().count()).sum();
    // The middle of a long text is what says least.
    let hidden = if total > LETTERS { LETTERS / 2..total - LETTERS / 2 } else { total..total };
    let mut out = String::from("  ");
    let mut at = 0;
    let mut told = false;
    for piece in pieces {
        let mut line = String::new();
        let mut flush = |line: &mut String| {
            if !line.is_empty() {
                let marked = if piece.trained { format!("{OPEN}{line}{CLOSE}") } else { line.clone() };
                out.push_str(&if piece.trained { paint(color, Paint::Green, &marked) } else { marked });
                line.clear();
            }
        };
        for letter in piece.text.chars() {
            at += 1;
            if hidden.contains(&(at - 1)) {
                if !std::mem::replace(&mut told, true) {
                    line.push_str(&format!(" … {} letters … ", format::count(hidden.len() as u64)));
                }
                continue;
            }
            match letter {
                '\n' => {
                    line.push_str(BREAK);
                    line.push('\n');
                    line.push_str("  ");
                }
                '\t' => line.push('→'),
                // Whatever would move the cursor or change colours is shown, not done.
                other if other.is_control() => line.extend(other.escape_unicode()),
                other => line.push(other),
            }
        }
        flush(&mut line);
    }
    out.trim_end_matches(['\n', ' ']).to_owned()
}

/// What becomes of a record that is not trained as a whole.
fn fate(sample: &Shown, max_length: u32, color: bool) -> Option<String> {
    let text = match sample.what.as_str() {
        "kept" => return None,
        "cut" => format!("longer than a row of {max_length} tokens: cut into consecutive samples"),
        "truncated" => {
            format!("cut off after {} tokens; the rest is lost", format::count(sample.kept_tokens))
        }
        other => format!("left out: {}", reason(other, max_length)),
    };
    Some(format!("  {}", paint(color, Paint::Yellow, &text)))
}

/// Why a record is left out or cut, in words.
fn reason(what: &str, max_length: u32) -> String {
    match what {
        "empty" => "no text".to_owned(),
        "no_answer" => "no answer of the assistant".to_owned(),
        "unweighted" => "all answers have weight 0".to_owned(),
        "truncated_away" => format!("nothing to be trained within {max_length} tokens"),
        other => other.to_owned(),
    }
}

fn sources(summary: &SplitSummary, color: bool) -> Option<String> {
    if summary.sources.is_empty() {
        return None;
    }
    let rows: Vec<Vec<String>> = summary
        .sources
        .iter()
        .map(|source| {
            vec![
                source.weight.map_or_else(|| "-".to_owned(), |weight| weight.to_string()),
                format::count(source.rows),
                format!(
                    "{} ({:.2} passes)",
                    format::count(source.rows_per_epoch),
                    source.rows_per_epoch as f64 / source.rows.max(1) as f64
                ),
                format::count(source.trained_tokens),
                source.form.clone(),
                source.path.clone(),
            ]
        })
        .collect();
    let table = format::table(&["weight", "rows", "an epoch", "trained tokens", "form", "source"], &rows);
    let mut lines = table.lines();
    let first = format!("{}{}", head("sources", color), lines.next().unwrap_or_default());
    Some(
        std::iter::once(first)
            .chain(lines.map(|line| format!("{:12}{line}", "")))
            .collect::<Vec<_>>()
            .join("\n"),
    )
}

fn ends(summary: &SplitSummary, tokenizer: &Tokenizer) -> String {
    let ids = tokenizer.stop_ids().iter();
    let names: Vec<String> =
        ids.filter_map(|id| tokenizer.token(*id)).map(|token| format!("`{token}`")).collect();
    let names = if names.is_empty() { "the model names none".to_owned() } else { names.join(", ") };
    format!(
        "{} of {} samples train one ({names})",
        format::count(summary.samples_with_end),
        format::count(summary.samples)
    )
}

fn left_out(summary: &SplitSummary, max_length: u32, color: bool) -> Vec<String> {
    let dropped = &summary.dropped;
    let mut lines = vec![format!("{}{} records", head("left out", color), format::count(dropped.total()))];
    let example = |what: &str| {
        let places: Vec<String> = summary
            .examples
            .iter()
            .filter(|example| example.what == what)
            .map(|example| format!("{}:{}", short(&example.file), example.line))
            .collect();
        if places.is_empty() { String::new() } else { format!(" ({})", places.join(", ")) }
    };
    let reasons = [
        ("empty", dropped.empty),
        ("no_answer", dropped.no_answer),
        ("unweighted", dropped.unweighted),
        ("truncated_away", dropped.truncated_away),
    ];
    for (what, count) in reasons.into_iter().filter(|(_, count)| *count > 0) {
        lines.push(format!(
            "{:12}{} {}{}",
            "",
            format::count(count),
            reason(what, max_length),
            example(what)
        ));
    }
    let cut_off = head("cut off", color);
    if summary.truncated == 0 {
        lines.push(format!("{cut_off}0 records"));
    } else {
        lines.push(format!(
            "{cut_off}{} records lost {} tokens beyond {max_length}, {} of them to be trained{}",
            format::count(summary.truncated),
            format::count(summary.truncated_tokens),
            format::count(summary.truncated_trained_tokens),
            example("truncated"),
        ));
    }
    if summary.cut > 0 {
        lines.push(format!(
            "{:12}{} texts are longer than a row and became several samples",
            "",
            format::count(summary.cut)
        ));
    }
    if summary.merged_boundaries > 0 {
        let count = format::count(summary.merged_boundaries);
        lines.push(format!("{:12}{count} prompts and completions meet inside a token (it is trained)", ""));
    }
    lines
}

/// Lengths of records before anything is cut; what is longer than a row is marked.
fn histogram(summary: &SplitSummary, max_length: u32, color: bool) -> String {
    let total: u64 = summary.lengths.iter().map(|bucket| bucket.records).sum();
    let at_share = |share: f64| {
        let mut seen = 0;
        let wanted = (total as f64 * share).ceil() as u64;
        let bucket = summary.lengths.iter().find(|bucket| {
            seen += bucket.records;
            seen >= wanted
        });
        bucket.map_or(0, |bucket| bucket.up_to.min(summary.longest))
    };
    let mut lines = vec![format!(
        "{}half of the records have up to {} tokens, 95 % up to {}, the longest {}",
        head("lengths", color),
        format::count(at_share(0.5)),
        format::count(at_share(0.95)),
        format::count(summary.longest),
    )];
    let most = summary.lengths.iter().map(|bucket| bucket.records).max().unwrap_or(1).max(1);
    for bucket in &summary.lengths {
        let eighths = (bucket.records * BAR * 8).div_ceil(most);
        let full = "█".repeat((eighths / 8) as usize);
        let rest = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][(eighths % 8) as usize];
        let too_long = bucket.up_to > u64::from(max_length);
        let mark = if too_long { "  longer than a row" } else { "" };
        let bar = format!("{full}{rest}");
        let bar = paint(color, if too_long { Paint::Yellow } else { Paint::Cyan }, &bar);
        lines.push(format!(
            "{:12}up to {:>9}  {bar} {}{mark}",
            "",
            format::count(bucket.up_to),
            format::count(bucket.records)
        ));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(text: &str, trained: bool) -> Piece {
        Piece { text: text.to_owned(), trained }
    }

    #[test]
    fn trained_text_is_marked_with_and_without_colour() {
        let pieces = [piece("ask\n", false), piece("say\nit", true)];
        assert_eq!(body(&pieces, false), "  ask↵\n  ⟦say↵\n  it⟧");
        assert!(body(&pieces, true).contains("\x1b[32m⟦say"));
    }

    #[test]
    fn control_characters_are_shown_and_not_done() {
        assert_eq!(body(&[piece("a\x1b[2Jb\t", false)], false), "  a\\u{1b}[2Jb→");
    }

    #[test]
    fn long_texts_lose_their_middle() {
        let shown = body(&[piece(&"a".repeat(LETTERS), false), piece(&"b".repeat(1000), true)], false);
        assert!(shown.contains(" … 1,000 letters … "), "{shown}");
        assert!(shown.ends_with("b⟧"));
        assert!(shown.chars().count() < LETTERS + 50);
    }
}
