//! Shows a diagnostic: with its line and a caret on a terminal, as one object for scripts.

use std::{
    fmt,
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

use miette::{
    Diagnostic as Report, GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteError,
    MietteSpanContents, Severity, SourceCode, SourceSpan, SpanContents,
};
use shanty_diagnostic::Diagnostic;

/// Wide enough for a path and a sentence, narrow enough for a split terminal.
const WIDTH: usize = 100;
/// Of a long line (data rows are), so much is shown around the fault.
const SHOWN_CHARS: usize = 80;
/// Lines beyond this are not looked for: a fault that deep is told by its numbers alone.
const LONGEST_LOOK_BYTES: u64 = 64 << 20;

/// An error as text: code, message, the line at fault with a caret under it, and the hint.
/// Without `color` there is no escape sequence and nothing beyond ASCII but what the message and the file hold.
pub fn render(diagnostic: &Diagnostic, color: bool) -> String {
    render_as(diagnostic, Severity::Error, color)
}

/// A warning as text.
pub fn render_warning(diagnostic: &Diagnostic, color: bool) -> String {
    render_as(diagnostic, Severity::Warning, color)
}

/// Many errors, one after the other.
pub fn render_all(diagnostics: &[Diagnostic], color: bool) -> String {
    diagnostics.iter().map(|diagnostic| render(diagnostic, color)).collect::<Vec<_>>().join("\n")
}

/// An error as one JSON object in one line: `code`, `message`, and where known `file`, `line`, `column`, `hint`.
pub fn to_json(diagnostic: &Diagnostic) -> String {
    serde_json::to_string(diagnostic).expect("text and numbers can be written as JSON")
}

fn render_as(diagnostic: &Diagnostic, severity: Severity, color: bool) -> String {
    let shown = Shown::new(diagnostic, severity);
    let theme = if color { GraphicalTheme::unicode() } else { GraphicalTheme::none() };
    let mut handler = GraphicalReportHandler::new_themed(theme)
        .with_width(WIDTH)
        .with_context_lines(1)
        .with_links(false)
        .with_break_words(false);
    if let Some(footer) = footer(diagnostic, shown.source.is_some()) {
        handler = handler.with_footer(footer);
    }
    let mut text = String::new();
    match handler.render_report(&mut text, &shown) {
        Ok(()) => without_trailing_space(&text),
        // Cannot happen with a text as the target; the plain words are still better than nothing.
        Err(fmt::Error) => format!("{}: {}\n", diagnostic.code, diagnostic.message),
    }
}

fn footer(diagnostic: &Diagnostic, line_is_shown: bool) -> Option<String> {
    let mut lines = Vec::new();
    if let Some(file) = diagnostic.file.as_ref().filter(|_| !line_is_shown) {
        let numbers = [diagnostic.line, diagnostic.column];
        let numbers: String = numbers.iter().flatten().map(|number| format!(":{number}")).collect();
        lines.push(format!("in {}{numbers}", file.display()));
    }
    if let Some(hint) = &diagnostic.hint {
        lines.push(format!("hint: {hint}"));
    }
    (!lines.is_empty()).then(|| lines.join("\n"))
}

fn without_trailing_space(text: &str) -> String {
    let lines: Vec<&str> = text.trim_end().lines().map(str::trim_end).collect();
    lines.join("\n") + "\n"
}

/// A diagnostic as miette wants it.
#[derive(Debug)]
struct Shown<'a> {
    diagnostic: &'a Diagnostic,
    severity: Severity,
    source: Option<Window>,
}

impl<'a> Shown<'a> {
    fn new(diagnostic: &'a Diagnostic, severity: Severity) -> Self {
        let source = diagnostic.file.as_deref().zip(diagnostic.line).and_then(|(file, line)| {
            Window::read(file, line, diagnostic.column.unwrap_or(1), diagnostic.width.unwrap_or(1))
        });
        Self { diagnostic, severity, source }
    }
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.diagnostic.message)
    }
}

impl std::error::Error for Shown<'_> {}

impl Report for Shown<'_> {
    fn code<'b>(&'b self) -> Option<Box<dyn fmt::Display + 'b>> {
        Some(Box::new(&self.diagnostic.code))
    }

    fn severity(&self) -> Option<Severity> {
        Some(self.severity)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.source.as_ref().map(|window| window as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let window = self.source.as_ref()?;
        let label = LabeledSpan::new_primary_with_span(None, window.fault);
        Some(Box::new(std::iter::once(label)))
    }
}

/// The line at fault with its neighbours, cut to what can be shown.
#[derive(Debug)]
struct Window {
    name: String,
    text: String,
    /// Number of the first line in `text`, from 0.
    first_line: usize,
    /// Column of the fault, from 0, as it is in the file.
    column: usize,
    /// The fault, bytes in `text`.
    fault: SourceSpan,
}

impl Window {
    fn read(file: &Path, line: usize, column: usize, width: usize) -> Option<Self> {
        let first = line.saturating_sub(1).max(1);
        let lines = read_lines(file, first, line + 1)?;
        let at_fault = lines.get(line - first)?;
        let start = column.saturating_sub(1).min(at_fault.chars().count());
        // A long line is cut around the fault; its neighbours are cut the same way, to stay below each other.
        let cut =
            if at_fault.chars().count() > SHOWN_CHARS { start.saturating_sub(SHOWN_CHARS / 2) } else { 0 };
        let shown: Vec<String> =
            lines.iter().map(|line| line.chars().skip(cut).take(SHOWN_CHARS).collect()).collect();
        let before: usize = shown[..line - first].iter().map(|line| line.len() + 1).sum();
        let bytes_of =
            |chars: usize| -> usize { shown[line - first].chars().take(chars).map(char::len_utf8).sum() };
        let (from, to) = (bytes_of(start - cut), bytes_of(start - cut + width.max(1)));
        Some(Self {
            name: file.display().to_string(),
            text: shown.join("\n"),
            first_line: first - 1,
            column: column.saturating_sub(1),
            fault: SourceSpan::new((before + from).into(), to - from),
        })
    }
}

impl SourceCode for Window {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        before: usize,
        after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let inner = self.text.read_span(span, before, after)?;
        let column = if before == 0 { self.column } else { 0 };
        Ok(Box::new(MietteSpanContents::new_named(
            self.name.clone(),
            inner.data(),
            *inner.span(),
            inner.line() + self.first_line,
            column,
            inner.line_count(),
        )))
    }
}

/// Lines `first ..= last` of a file, from 1; fewer where it ends before.
fn read_lines(file: &Path, first: usize, last: usize) -> Option<Vec<String>> {
    let mut reader = BufReader::new(File::open(file).ok()?.take(LONGEST_LOOK_BYTES));
    let mut lines = Vec::new();
    let mut bytes = Vec::new();
    for number in 1..=last {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes).ok()? == 0 {
            break;
        }
        if number >= first {
            let line = String::from_utf8_lossy(&bytes);
            let line = line.trim_start_matches('\u{feff}').trim_end_matches(['\n', '\r']);
            lines.push(line.replace(|letter: char| letter.is_control() && letter != '\t', " "));
        }
    }
    Some(lines)
}
