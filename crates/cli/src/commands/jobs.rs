//! `shanty jobs`: what a coordinator has to do, is doing, and has done.

use std::cmp::Reverse;

use serde::Serialize;
use shanty_proto::v1::{JobState, JobSummary};

use crate::{
    client::{Target, block_on},
    failure::{CommandResult, Exit},
    format, progress,
    ui::Ui,
};

/// List jobs: at work, waiting in the order of their turn, ended
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty jobs
  shanty jobs --coordinator http://head:7411 --output json")]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,
}

#[derive(Serialize)]
struct Line {
    job: String,
    state: &'static str,
    reason: String,
    step: u64,
    steps: u64,
    loss: Option<f64>,
    members: u32,
    submitted_unix_ms: u64,
    owner: String,
    priority: i32,
    place: Option<u32>,
    share: u32,
}

impl From<JobSummary> for Line {
    fn from(summary: JobSummary) -> Self {
        Self {
            state: progress::state_name(JobState::try_from(summary.state).unwrap_or_default()),
            job: summary.job_id,
            reason: summary.reason,
            step: summary.step,
            steps: summary.steps,
            loss: summary.loss,
            members: summary.members,
            submitted_unix_ms: summary.submitted_unix_ms,
            owner: summary.owner,
            priority: summary.priority,
            place: summary.place,
            share: summary.share,
        }
    }
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    block_on(async {
        let mut jobs = Vec::new();
        for connection in args.target.connect_all().await? {
            jobs.extend(connection.client.list().await?);
        }
        jobs.sort_by_key(order);
        let lines: Vec<Line> = jobs.into_iter().map(Line::from).collect();
        if ui.is_json() {
            lines.iter().try_for_each(|line| ui.json(line))?;
        } else if lines.is_empty() {
            ui.note("no jobs yet");
        } else {
            ui.line(render(&lines))?;
        }
        Ok(Exit::Done)
    })
}

/// At work, then those that wait by their place, then those that ended; of equals the newest first.
fn order(job: &JobSummary) -> (bool, u32, Reverse<u64>) {
    let ended = matches!(job.state(), JobState::Succeeded | JobState::Failed | JobState::Cancelled);
    (ended, job.place.unwrap_or_default(), Reverse(job.submitted_unix_ms))
}

fn render(lines: &[Line]) -> String {
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            vec![
                line.job.clone(),
                line.state.to_owned(),
                format!("{}/{}", line.step, line.steps),
                line.loss.map_or("-".to_owned(), |loss| format!("{loss:.4}")),
                format!("{}/{}", line.members, line.share),
                line.priority.to_string(),
                if line.owner.is_empty() { "-".to_owned() } else { line.owner.clone() },
                line.reason.clone(),
            ]
        })
        .collect();
    format::table(&["JOB", "STATE", "STEP", "LOSS", "MEMBERS", "PRIORITY", "OWNER", "REASON"], &rows)
}
