//! `shanty prepare-data`: the coordinator's helper. Tokenising takes memory and all cores, and must not take the
//! coordinator down.

use std::{
    io::Read,
    time::{Duration, Instant},
};

use shanty_coordinator::prepare::{PrepareLine, PrepareRequest};
use shanty_data::{PrepareOptions, Progress, Stage};
use shanty_diagnostic::Diagnose;

use crate::{
    error::Error,
    failure::{CommandResult, Exit},
    prepared::format_of,
    ui::Ui,
};

/// Progress is told no more often than this.
const INTERVAL: Duration = Duration::from_millis(200);

/// Prepare data as a JSON request on stdin says; JSON lines tell how it goes
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn execute(_: Args, ui: &Ui) -> CommandResult<Exit> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| Error::PrepareRequest { reason: error.to_string() })?;
    let request: PrepareRequest =
        serde_json::from_str(&text).map_err(|error| Error::PrepareRequest { reason: error.to_string() })?;
    let mut last: Option<Instant> = None;
    // A reader that went away is noticed at the last line at the latest.
    let mut tell = |progress: &Progress| {
        if last.is_none_or(|last| last.elapsed() >= INTERVAL) {
            last = Some(Instant::now());
            drop(ui.json(&line(progress)));
        }
    };
    match shanty_data::prepare(&options(request), &mut tell) {
        Ok(summary) => {
            ui.json(&PrepareLine::Done { summary })?;
            Ok(Exit::Done)
        }
        Err(error) => {
            let diagnostic = error.diagnostic();
            let exit = if diagnostic.kind.exit_code() == 2 { Exit::Usage } else { Exit::Failed };
            ui.json(&PrepareLine::failed(diagnostic))?;
            Ok(exit)
        }
    }
}

fn options(request: PrepareRequest) -> PrepareOptions {
    PrepareOptions {
        model_dir: request.model_dir,
        train: request.train,
        eval: request.eval,
        format: format_of(request.format),
        max_length: u32::try_from(request.max_length).unwrap_or(u32::MAX),
        packing: request.packing,
        virtual_tokens: u32::try_from(request.virtual_tokens).unwrap_or(u32::MAX),
        template_time: None,
        out: request.out,
        threads: request.threads,
    }
}

fn line(progress: &Progress) -> PrepareLine {
    let stage = match &progress.stage {
        Stage::Hashing => "reads the input".to_owned(),
        Stage::Reused => "uses what was prepared before".to_owned(),
        Stage::Damaged(how) => format!("prepares anew, because what was there is damaged: {how}"),
        Stage::Tokenising(split) => format!("tokenises {}", split.name()),
        Stage::Done => "has prepared the data".to_owned(),
    };
    PrepareLine::Progress {
        stage,
        bytes_done: progress.bytes_done,
        bytes_total: progress.bytes_total,
        samples: progress.samples,
    }
}
