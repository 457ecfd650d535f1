//! What can be asked on the command line.

use std::{ffi::OsString, process::ExitCode};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, builder::styling};

use crate::{commands, ui};

const AFTER_HELP: &str = "\
Start here:
  shanty run examples/shakespeare/job.toml     trains an adapter on this machine
  shanty plan job.toml                         what it will cost, before it costs anything
  shanty explain SH0102                        what an error means and what to do about it

Exit codes:
  0  done     1  failed     2  wrong use or bad input
  93 stopped by the user, not to be requeued     130 interrupted";

/// Fine-tunes large language models on many devices by hauling only what is small.
#[derive(Debug, Parser)]
#[command(name = "shanty", version, after_help = AFTER_HELP, propagate_version = false)]
#[command(disable_help_subcommand = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// How data and errors are printed; `json` is for scripts
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT", help_heading = "Output")]
    pub(crate) output: OutputFormat,

    /// When to use colour; NO_COLOR is obeyed too
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN", help_heading = "Output")]
    pub(crate) color: Color,
}

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    #[default]
    Text,
    /// For scripts: objects on stdout, one object a line where there are many.
    Json,
}

/// When to use colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(commands::run::Args),
    Plan(commands::plan::Args),
    Resume(commands::resume::Args),
    Submit(commands::submit::Args),
    Render(commands::render::Args),
    Jobs(commands::jobs::Args),
    Status(commands::status::Args),
    Top(commands::top::Args),
    Logs(commands::logs::Args),
    Cancel(commands::cancel::Args),
    Drain(commands::drain::Args),
    Checkpoints(commands::checkpoints::Args),
    Coordinator(commands::coordinator::Args),
    Worker(commands::worker::Args),
    Up(commands::up::Args),
    Certs(commands::certs::Args),
    Token(commands::token::Args),
    #[command(hide = true)]
    WorkerDevice(commands::worker_device::Args),
    #[command(hide = true)]
    PrepareData(commands::prepare_data::Args),
    Data(commands::data::Args),
    Generate(commands::generate::Args),
    Chat(commands::chat::Args),
    Eval(commands::eval::Args),
    Merge(commands::merge::Args),
    Export(commands::export::Args),
    Adapters(commands::adapters::Args),
    Logits(commands::logits::Args),
    Bench(commands::bench::Args),
    Doctor(commands::doctor::Args),
    Health(commands::health::Args),
    Chaos(commands::chaos::Args),
    Explain(commands::explain::Args),
    Completions(commands::completions::Args),
}

/// What came of reading the arguments.
pub(crate) enum Parsed {
    /// There is something to do.
    Command(Box<Cli>),
    /// Help, version or a complaint was printed already.
    Answered(ExitCode),
}

/// Reads the program's arguments.
pub(crate) fn parse() -> Parsed {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let color = flag_value(&arguments, "--color").unwrap_or_default();
    let parsed = command()
        .color(match ui::wanted_color(color) {
            Color::Auto => clap::ColorChoice::Auto,
            Color::Always => clap::ColorChoice::Always,
            Color::Never => clap::ColorChoice::Never,
        })
        .try_get_matches_from(&arguments)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    match parsed {
        Ok(cli) => Parsed::Command(Box::new(cli)),
        Err(error) => {
            let output = flag_value(&arguments, "--output").unwrap_or_default();
            Parsed::Answered(ui::answer_usage(&error, output))
        }
    }
}

/// The whole command tree, with the program's colours.
pub(crate) fn command() -> clap::Command {
    let styles = styling::Styles::styled()
        .header(styling::AnsiColor::Green.on_default().bold())
        .usage(styling::AnsiColor::Green.on_default().bold())
        .literal(styling::AnsiColor::Cyan.on_default().bold())
        .placeholder(styling::AnsiColor::Cyan.on_default());
    Cli::command().styles(styles)
}

/// The value of a global flag, read before (or in spite of) clap's own verdict on the arguments.
fn flag_value<T: ValueEnum>(arguments: &[OsString], flag: &str) -> Option<T> {
    let mut rest = arguments.iter().filter_map(|argument| argument.to_str());
    while let Some(argument) = rest.next() {
        if argument == "--" {
            return None;
        }
        if argument == flag {
            return T::from_str(rest.next()?, true).ok();
        }
        if let Some(value) = argument.strip_prefix(flag).and_then(|value| value.strip_prefix('=')) {
            return T::from_str(value, true).ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_tree_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn global_flags_are_found_before_the_arguments_are_understood() {
        let arguments: Vec<OsString> =
            ["shanty", "nonsense", "--output", "json", "--color=never"].map(OsString::from).to_vec();
        assert_eq!(flag_value(&arguments, "--output"), Some(OutputFormat::Json));
        assert_eq!(flag_value(&arguments, "--color"), Some(Color::Never));
        assert_eq!(flag_value::<Color>(&arguments[..2], "--color"), None);
    }
}
