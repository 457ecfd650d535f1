//! `shanty completions`: what a shell needs to complete arguments.

use crate::{
    args,
    failure::{CommandResult, Exit},
    ui::Ui,
};

/// Print completions for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty completions bash > /etc/bash_completion.d/shanty
  shanty completions zsh  > ~/.zfunc/_shanty
  shanty completions fish > ~/.config/fish/completions/shanty.fish")]
pub(crate) struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut args::command(), "shanty", &mut script);
    ui.piece(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}
