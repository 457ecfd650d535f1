//! How things look: data on stdout, the rest on stderr, colour where it is wanted, errors for people or for scripts.

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use clap::error::ErrorKind;
use serde::Serialize;
use shanty_diagnostic::Diagnostic;

use crate::{
    args::{Color, OutputFormat},
    error::Error,
    failure::{CommandResult, Exit, Failure},
};

/// Where to tell us about defects.
const ISSUES: &str = concat!(env!("CARGO_PKG_REPOSITORY"), "/issues");

/// What the user wants to see, and how.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ui {
    output: OutputFormat,
    color: Color,
}

impl Ui {
    pub(crate) fn new(output: OutputFormat, color: Color) -> Self {
        Self { output, color: wanted_color(color) }
    }

    /// Whether scripts read the output.
    pub(crate) fn is_json(&self) -> bool {
        self.output == OutputFormat::Json
    }

    /// Whether stderr is a terminal that a live region may be drawn on.
    pub(crate) fn is_live(&self) -> bool {
        !self.is_json()
            && io::stderr().is_terminal()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
    }

    /// Whether stderr gets colour.
    pub(crate) fn color_on_stderr(&self) -> bool {
        self.colored(io::stderr().is_terminal())
    }

    /// Whether stdout gets colour.
    pub(crate) fn color_on_stdout(&self) -> bool {
        self.colored(io::stdout().is_terminal())
    }

    fn colored(&self, terminal: bool) -> bool {
        match self.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal,
        }
    }

    /// Prints one line of data.
    pub(crate) fn line(&self, text: impl AsRef<str>) -> CommandResult<()> {
        write_stdout(|out| writeln!(out, "{}", text.as_ref()))
    }

    /// Prints data as it comes, without a line's end.
    pub(crate) fn piece(&self, text: &str) -> CommandResult<()> {
        write_stdout(|out| write!(out, "{text}"))
    }

    /// Prints one JSON object on a line of its own.
    pub(crate) fn json(&self, value: &impl Serialize) -> CommandResult<()> {
        let line = serde_json::to_string(value).map_err(Error::json)?;
        write_stdout(|out| writeln!(out, "{line}"))
    }

    /// Prints an object for scripts, or what `text` makes for people.
    pub(crate) fn data<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> CommandResult<()> {
        if self.is_json() { self.json(value) } else { self.line(text(value)) }
    }

    /// Tells people something on stderr; scripts are spared.
    pub(crate) fn note(&self, text: impl AsRef<str>) {
        if !self.is_json() {
            write_stderr(text.as_ref());
        }
    }

    /// Tells people and the readers of a script's log something on stderr.
    pub(crate) fn always_note(&self, text: &str) {
        write_stderr(text);
    }

    /// Warns people on stderr; scripts are spared.
    pub(crate) fn warn(&self, text: impl AsRef<str>) {
        let mark = paint(self.color_on_stderr(), Paint::Yellow, "warning:");
        self.note(format!("{mark} {}", text.as_ref()));
    }

    /// Shows a warning with its place and hint; scripts are spared.
    pub(crate) fn warning(&self, diagnostic: &Diagnostic) {
        self.note(shanty_config::render::render_warning(diagnostic, self.color_on_stderr()));
    }

    /// Reports an error: one JSON object, or text with place, caret and hint.
    pub(crate) fn report(&self, failure: &Failure) {
        let diagnostics = failure.diagnostics();
        let Some(first) = diagnostics.first() else { return };
        if self.is_json() {
            write_stderr(&shanty_config::render::to_json(first));
        } else {
            write_stderr(&shanty_config::render::render_all(diagnostics, self.color_on_stderr()));
        }
    }
}

/// Colours that are used; meaning is never carried by them alone.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Paint {
    Bold,
    Dim,
    Green,
    Yellow,
    Red,
    Cyan,
}

/// `text` in colour, if wanted.
pub(crate) fn paint(wanted: bool, paint: Paint, text: &str) -> String {
    if !wanted {
        return text.to_owned();
    }
    let code = match paint {
        Paint::Bold => 1,
        Paint::Dim => 2,
        Paint::Green => 32,
        Paint::Yellow => 33,
        Paint::Red => 31,
        Paint::Cyan => 36,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// `NO_COLOR` wins over `auto`, a flag wins over `NO_COLOR`.
pub(crate) fn wanted_color(flag: Color) -> Color {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if flag == Color::Auto && no_color { Color::Never } else { flag }
}

/// Prints what clap has to say: help and version are answers, the rest is wrong use.
pub(crate) fn answer_usage(error: &clap::Error, output: OutputFormat) -> ExitCode {
    let answer = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if answer || output == OutputFormat::Text {
        // A closed pipe is no reason to complain about help.
        drop(error.print());
    } else {
        let text = error.render().to_string();
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let message = lines.next().unwrap_or("wrong use").trim_start_matches("error: ").to_owned();
        let hint = lines.next_back().unwrap_or("try `shanty --help`").to_owned();
        let ui = Ui::new(output, Color::Never);
        ui.report(&Error::Usage { message, hint }.into());
    }
    if answer { Exit::Done.into() } else { Exit::Usage.into() }
}

/// Turns a panic into a short apology.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let place =
            info.location().map(|place| format!("{}:{}", place.file(), place.line())).unwrap_or_default();
        let cause = payload_text(info.payload());
        write_stderr(&format!(
            "sorry, this is a defect in shanty {}: {cause} ({place})\nplease report it with what you did: {ISSUES}",
            env!("CARGO_PKG_VERSION")
        ));
    }));
}

/// What a panic said: a text, however it was made.
fn payload_text(payload: &(dyn std::any::Any + Send)) -> &str {
    let owned = || payload.downcast_ref::<String>().map(String::as_str);
    payload.downcast_ref::<&str>().copied().or_else(owned).unwrap_or("no message")
}

fn write_stdout(write: impl FnOnce(&mut io::StdoutLock<'static>) -> io::Result<()>) -> CommandResult<()> {
    let mut out = io::stdout().lock();
    write(&mut out).and_then(|()| out.flush()).map_err(|source| match source.kind() {
        // Whoever read has enough: `shanty logs | head` is no failure worth a word.
        io::ErrorKind::BrokenPipe => Failure::silent(),
        _ => Error::Stdout { source }.into(),
    })
}

fn write_stderr(text: &str) {
    // Nobody is left to tell when stderr is gone.
    drop(writeln!(io::stderr().lock(), "{}", text.trim_end()));
}
