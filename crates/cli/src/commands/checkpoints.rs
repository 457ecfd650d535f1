//! `shanty checkpoints`: the points that a job can go on from.

use serde::Serialize;
use shanty_proto::v1::{Checkpoint, ListCheckpointsRequest};

use crate::{
    client::{Target, block_on, wire},
    failure::{CommandResult, Exit},
    format,
    ui::Ui,
};

/// List a job's checkpoints, newest first
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty checkpoints shakespeare
  shanty checkpoints shakespeare --output json")]
pub(crate) struct Args {
    /// The job's id or name
    job: String,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Serialize)]
pub(crate) struct Line {
    attempt: u32,
    step: u64,
    generation: u64,
    path: String,
    bytes: u64,
    seconds: f64,
    written_unix_ms: u64,
}

impl From<Checkpoint> for Line {
    fn from(checkpoint: Checkpoint) -> Self {
        Self {
            attempt: checkpoint.attempt,
            step: checkpoint.step,
            generation: checkpoint.generation,
            path: checkpoint.path,
            bytes: checkpoint.size_bytes,
            seconds: checkpoint.seconds,
            written_unix_ms: checkpoint.written_unix_ms,
        }
    }
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    block_on(async {
        let (connection, job_id) = args.target.connect_for(&args.job).await?;
        let request = ListCheckpointsRequest { job_id };
        let answer = connection.client.jobs().list_checkpoints(request).await.map_err(wire)?.into_inner();
        let mut lines: Vec<Line> = answer.checkpoints.into_iter().map(Line::from).collect();
        lines.sort_by_key(|line| std::cmp::Reverse((line.step, line.attempt, line.generation)));
        if ui.is_json() {
            lines.iter().try_for_each(|line| ui.json(line))?;
        } else if lines.is_empty() {
            ui.note("no checkpoint yet");
        } else {
            ui.line(render(&lines))?;
        }
        Ok(Exit::Done)
    })
}

fn render(lines: &[Line]) -> String {
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            vec![
                line.step.to_string(),
                line.attempt.to_string(),
                format::bytes(line.bytes),
                format::seconds(line.seconds),
                line.path.clone(),
            ]
        })
        .collect();
    format::table(&["STEP", "ATTEMPT", "SIZE", "TOOK", "PATH"], &rows)
}
