//! The `shanty` program: one binary that launches, watches and uses fine-tuning jobs.
//!
//! [`args`] says what can be asked, [`commands`] answers, one file a command; [`ui`] knows how things look.

use std::process::ExitCode;

mod args;
mod bar;
mod base;
mod client;
mod commands;
mod dashboard;
mod engine;
mod error;
mod failure;
mod flags;
mod job_file;
mod launched;
mod model;
mod preflight;
mod prepared;
mod progress;
mod run;
mod sample;
mod score;
mod stream;
mod ui;
mod watch;

pub(crate) use shanty_tui::format;

fn main() -> ExitCode {
    ui::install_panic_hook();
    // The hook has said what there is to say; a defect exits as any failure does.
    std::panic::catch_unwind(command).unwrap_or(failure::Exit::Failed.into())
}

fn command() -> ExitCode {
    match args::parse() {
        args::Parsed::Command(cli) => {
            let ui = ui::Ui::new(cli.output, cli.color);
            match commands::dispatch(cli.command, &ui) {
                Ok(exit) => exit.into(),
                Err(failure) => {
                    ui.report(&failure);
                    failure.exit().into()
                }
            }
        }
        args::Parsed::Answered(code) => code,
    }
}
