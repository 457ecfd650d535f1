//! `shanty export tensorboard` and `shanty export wandb`: the history of a job for other programs.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use shanty_proto::v1::{Evaluation, ListStepsRequest, StepRecord};
use shanty_telemetry::tensorboard::Events;

use crate::{
    client::{Client, Target, block_on, wire},
    error::Error,
    failure::{CommandResult, Exit},
    ui::Ui,
};

/// Steps of one answer.
const STEPS: u32 = 20_000;

/// Write the history of a job as an event file for TensorBoard
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty export tensorboard shakespeare --out tb
  tensorboard --logdir tb")]
pub(crate) struct TensorBoard {
    /// The job's id or name
    job: String,
    /// Folder of all jobs' histories; the job's goes below it
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    target: Target,
}

/// Write the history of a job as JSON lines with the keys of Weights & Biases
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty export wandb shakespeare --out history.jsonl

One object a step: _step, _timestamp (seconds), _runtime (seconds), train/loss, train/learning_rate,
train/grad_norm, train/tokens, train/tokens_per_second, eval/loss. Each line is what `wandb.log`
takes.")]
pub(crate) struct Wandb {
    /// The job's id or name
    job: String,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    target: Target,
}

/// The steps and evaluations of a job.
struct History {
    job_id: String,
    began_unix_ms: u64,
    steps: Vec<StepRecord>,
    evaluations: Vec<Evaluation>,
}

impl TensorBoard {
    pub(crate) fn execute(self, ui: &Ui) -> CommandResult<Exit> {
        let history = block_on(history(&self.target, &self.job))?;
        let folder = self.out.join(&history.job_id);
        std::fs::create_dir_all(&folder).map_err(|source| failed("create", &folder, source))?;
        // TensorBoard knows its files by this name; another export takes the place of the one before.
        let file = folder.join(format!("events.out.tfevents.{}.shanty", history.began_unix_ms / 1000));
        let written = File::create(&file).and_then(|out| write_events(BufWriter::new(out), &history));
        written.map_err(|source| failed("write", &file, source))?;
        told(ui, &history, &file)
    }
}

impl Wandb {
    pub(crate) fn execute(self, ui: &Ui) -> CommandResult<Exit> {
        let history = block_on(history(&self.target, &self.job))?;
        let written = File::create(&self.out).and_then(|out| write_lines(BufWriter::new(out), &history));
        written.map_err(|source| failed("write", &self.out, source))?;
        told(ui, &history, &self.out)
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::File { action, path: path.to_owned(), source }
}

fn told(ui: &Ui, history: &History, file: &Path) -> CommandResult<Exit> {
    let told = json!({
        "job": history.job_id, "file": file, "steps": history.steps.len(),
        "evaluations": history.evaluations.len(),
    });
    ui.data(&told, |_| format!("wrote {} steps to {}", history.steps.len(), file.display()))?;
    Ok(Exit::Done)
}

async fn history(target: &Target, job: &str) -> CommandResult<History> {
    let (connection, job_id) = target.connect_for(job).await?;
    let status = connection.client.job_status(&job_id).await?;
    let steps = all_steps(&connection.client, &job_id, status.step).await?;
    Ok(History { began_unix_ms: status.started_unix_ms, steps, evaluations: status.evaluations, job_id })
}

/// All steps, part by part: an answer that is asked for more than it may hold leaves steps out.
async fn all_steps(client: &Client, job_id: &str, last: u64) -> CommandResult<Vec<StepRecord>> {
    let mut steps = Vec::new();
    let mut from_step = 1;
    while from_step <= last {
        let limit = u32::try_from(last - from_step + 1).unwrap_or(u32::MAX);
        let request = ListStepsRequest {
            job_id: job_id.to_owned(),
            from_step,
            limit: limit.max(STEPS),
            ..ListStepsRequest::default()
        };
        let part = client.status().list_steps(request).await.map_err(wire)?.into_inner().steps;
        let Some(newest) = part.last().map(|step| step.step) else { break };
        steps.extend(part);
        from_step = newest + 1;
    }
    Ok(steps)
}

/// What a step is measured by, by the names of both formats.
fn of_step(step: &StepRecord) -> [(&'static str, f64); 5] {
    [
        ("train/loss", step.loss),
        ("train/learning_rate", step.learning_rate),
        ("train/grad_norm", step.gradient_norm),
        ("train/tokens", step.tokens as f64),
        ("train/tokens_per_second", step.tokens_per_second),
    ]
}

/// When a step was committed, for an evaluation that has no time of its own.
fn time_of(history: &History, step: u64) -> u64 {
    let known = history.steps.iter().rfind(|one| one.step <= step);
    known.map_or(history.began_unix_ms, |one| one.unix_ms)
}

fn write_events(out: impl Write, history: &History) -> io::Result<()> {
    let seconds = |unix_ms: u64| unix_ms as f64 / 1000.0;
    let mut events = Events::begin(out, seconds(history.began_unix_ms))?;
    for step in &history.steps {
        events.scalars(seconds(step.unix_ms), step.step, &of_step(step))?;
    }
    for evaluation in &history.evaluations {
        let when = seconds(time_of(history, evaluation.step));
        events.scalars(when, evaluation.step, &[("eval/loss", evaluation.loss)])?;
    }
    events.finish().map(drop)
}

fn write_lines(mut out: impl Write, history: &History) -> io::Result<()> {
    let mut line = |step: u64, unix_ms: u64, values: &[(&str, f64)]| {
        let mut object = Map::new();
        object.insert("_step".to_owned(), step.into());
        object.insert("_timestamp".to_owned(), (unix_ms as f64 / 1000.0).into());
        let ran = unix_ms.saturating_sub(history.began_unix_ms) as f64 / 1000.0;
        object.insert("_runtime".to_owned(), ran.into());
        object.extend(values.iter().map(|(name, value)| ((*name).to_owned(), Value::from(*value))));
        writeln!(out, "{}", Value::Object(object))
    };
    let evaluated = |step: u64| history.evaluations.iter().rfind(|one| one.step == step).map(|one| one.loss);
    if let Some(loss) = evaluated(0) {
        line(0, history.began_unix_ms, &[("eval/loss", loss)])?;
    }
    for step in &history.steps {
        let mut values = of_step(step).to_vec();
        values.extend(evaluated(step.step).map(|loss| ("eval/loss", loss)));
        line(step.step, step.unix_ms, &values)?;
    }
    out.flush()
}
