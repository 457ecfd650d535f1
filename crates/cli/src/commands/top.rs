//! `shanty top`: jobs in the terminal, as they go along.

use std::{io::IsTerminal, sync::Arc, time::Duration};

use clap::ValueEnum;
use shanty_tui::{Options, feed::Connect, state::Tab, view::Theme};

use crate::{
    client::{Client, Target, block_on},
    error::Error,
    failure::{CommandResult, Exit},
    ui::Ui,
};

/// Show jobs, their crews, curves, recoveries and logs in the terminal, as they go along
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty top
  shanty top shakespeare
  shanty top --coordinator https://head:7461 --ca ca.pem --every 5     over a slow link
  shanty top shakespeare --once --page members                         one page as text")]
pub(crate) struct Args {
    /// The job's id or name; the list of all jobs when absent
    job: Option<String>,
    /// Print one page as text and end; done by itself where there is no terminal to draw on
    #[arg(long)]
    once: bool,
    /// The page of the job that `--once` prints
    #[arg(long, value_enum, value_name = "PAGE", requires = "job")]
    page: Option<PageName>,
    /// Seconds between two questions to the coordinator; steps and events come as they happen
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=3600))]
    every: u16,
    #[command(flatten)]
    target: Target,
}

/// A page of a job.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum PageName {
    Overview,
    Members,
    Recoveries,
    Checkpoints,
    Events,
    Logs,
}

impl From<PageName> for Tab {
    fn from(page: PageName) -> Self {
        match page {
            PageName::Overview => Self::Overview,
            PageName::Members => Self::Members,
            PageName::Recoveries => Self::Recoveries,
            PageName::Checkpoints => Self::Checkpoints,
            PageName::Events => Self::Events,
            PageName::Logs => Self::Logs,
        }
    }
}

/// A screen of this size is drawn where there is none to ask for its size.
const SIZE: (u16, u16) = (80, 24);

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    if ui.is_json() {
        let hint =
            "`shanty status JOB --output json` and `shanty jobs --output json` are for scripts".to_owned();
        let message = "`top` draws for people: it has no JSON".to_owned();
        return Err(Error::Usage { message, hint }.into());
    }
    block_on(async {
        // A run that has ended answers from what it left, for as long as the connection is held.
        let (connection, job) = match &args.job {
            Some(job) => {
                let (connection, id) = args.target.connect_for(job).await?;
                (connection, Some(id))
            }
            None => (args.target.connect_any().await?, None),
        };
        let address = connection.client.address().to_owned();
        let theme =
            Theme { color: ui.color_on_stdout(), unicode: shows_unicode(|name| std::env::var(name).ok()) };
        let options =
            Options { address: address.clone(), job, theme, every: Duration::from_secs(args.every.into()) };
        let credentials = args.target.credentials();
        let connect: Connect = Arc::new(move || {
            let (address, credentials) = (address.clone(), credentials.clone());
            Box::pin(async move {
                let client = Client::connect(&address, &credentials).await;
                client.map(|client| client.channel()).map_err(|failure| failure.message())
            })
        });
        let can_draw = std::io::stdout().is_terminal()
            && std::io::stdin().is_terminal()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        if args.once || !can_draw {
            if !args.once {
                ui.note("no terminal to draw on: this is one page, as of now");
            }
            let page = args.page.map(Tab::from);
            ui.line(shanty_tui::once(&options, connect, page, size()).await?)?;
            return Ok(Exit::Done);
        }
        let ended_by_signal = Box::pin(shanty_tui::run(options, connect)).await?;
        Ok(if ended_by_signal { Exit::Interrupted } else { Exit::Done })
    })
}

/// The terminal's size, or what `COLUMNS` and `LINES` say, or [`SIZE`].
fn size() -> (u16, u16) {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u16>().ok().filter(|number| *number > 0);
    let asked = number("COLUMNS").zip(number("LINES"));
    asked.or_else(shanty_tui::terminal::size).unwrap_or(SIZE)
}

/// Whether the locale says that letters beyond ASCII are understood. One that says nothing is taken for a modern one.
fn shows_unicode(variable: impl Fn(&str) -> Option<String>) -> bool {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    match set("LC_ALL").or_else(|| set("LC_CTYPE")).or_else(|| set("LANG")) {
        Some(locale) => {
            let locale = locale.to_ascii_lowercase();
            locale.contains("utf-8") || locale.contains("utf8")
        }
        None => set("TERM").is_none_or(|term| term != "linux" && term != "vt100" && term != "dumb"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locale_says_whether_letters_beyond_ascii_are_understood() {
        let with = |pairs: &[(&str, &str)]| {
            let find = |name: &str| Some(pairs.iter().find(|(key, _)| *key == name)?.1.to_owned());
            shows_unicode(find)
        };
        assert!(with(&[]));
        assert!(with(&[("LANG", "de_DE.UTF-8")]));
        assert!(!with(&[("LANG", "de_DE.UTF-8"), ("LC_ALL", "C")]), "LC_ALL wins");
        assert!(!with(&[("TERM", "linux")]));
        assert!(with(&[("LC_CTYPE", "C.utf8"), ("TERM", "linux")]));
    }
}
