//! `shanty data`: what there is to know of data before anything is trained on it.

mod inspect;
mod show;

use crate::{
    failure::{CommandResult, Exit},
    ui::Ui,
};

/// Look at training data as a job would see it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Inspect(inspect::Args),
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    match args.command {
        Command::Inspect(args) => inspect::execute(args, ui),
    }
}
