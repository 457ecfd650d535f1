//! `shanty submit`: hands a job to a coordinator.

use std::path::PathBuf;

use serde_json::json;
use shanty_config::{JobSpec, Loaded, job::Shard};
use shanty_launch::{Error as LaunchError, render::Slurm};
use shanty_proto::v1::SubmitJobRequest;
use uuid::Uuid;

use crate::{
    base,
    client::{Target, block_on, wire},
    commands::{render, status},
    engine::{ClusterFlags, Described, Engine},
    failure::{CommandResult, Exit},
    job_file::{JobFile, quote},
    preflight::{Preflight, check_data},
    ui::Ui,
};

/// Check a job file and queue the job at a coordinator
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty submit job.toml --coordinator http://head:7461
  shanty submit job.toml --set train.learning_rate=1e-4 --output json
  shanty submit urgent.toml --priority 90 --watch
  shanty submit job.toml --engine slurm --nodes 4 --gpus 8 --time 12:00:00

With --engine slurm the job gets an allocation of its own: the coordinator runs on its first node, and a requeued or repeated
submission goes on from the last checkpoint. With --coordinator as well, the job goes there, and the allocation is of workers for it.")]
pub(crate) struct Args {
    #[command(flatten)]
    job: JobFile,
    /// Names this submission: a repeat with the same id gives the same job
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// From 0 to 100: jobs of a higher priority are next, and lower ones make room for them; `cluster.priority` when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100))]
    priority: Option<u32>,
    /// Follow it until it is over; the exit code then says how
    #[arg(long, conflicts_with = "engine")]
    watch: bool,
    /// Have an engine launch it: hands a batch script to Slurm's sbatch
    #[arg(long, value_parser = ["slurm"])]
    engine: Option<String>,
    #[command(flatten)]
    cluster: ClusterFlags,
    #[command(flatten)]
    target: Target,
}

/// The name of the user, as the system has it.
fn user() -> Option<String> {
    ["USER", "LOGNAME"].iter().find_map(|name| std::env::var(name).ok().filter(|user| !user.is_empty()))
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let priority = args.priority.map(|priority| ("cluster.priority".to_owned(), priority.to_string()));
    let overrides: Vec<(String, String)> = priority.into_iter().collect();
    let mut job = if args.engine.is_some() {
        args.job.first_task().load(&overrides, ui)?
    } else {
        args.job.load(&overrides, ui)?
    };
    if job.value.cluster.owner.is_none() {
        job.value.cluster.owner = user();
    }
    base::pin(&mut job, ui)?;
    check_data(&job)?;
    if args.engine.is_some() {
        let allocated = allocate(&args, &job)?;
        let text = format!("{} ({})", allocated.id, allocated.script.display());
        if args.target.coordinator.is_none() {
            let folder = args.cluster.folder_of_task(&allocated.folder);
            ui.data(&json!({ "slurm_job": allocated.id, "script": allocated.script }), |_| text.clone())?;
            let environment = quote(&folder.join("environment").display().to_string());
            ui.note(format!("once it runs: . {environment}; shanty status {} --watch", job.value.name));
            return Ok(Exit::Done);
        }
        ui.note(format!("workers: Slurm's job {text}"));
    }
    decide_shard(&mut job, ui)?;
    let request = SubmitJobRequest {
        request_id: args.request_id.unwrap_or_else(|| Uuid::new_v4().to_string()),
        spec_json: shanty_config::to_json(&job.value),
    };
    block_on(async {
        let client = args.target.connect().await?;
        let job_id = client.jobs().submit_job(request).await.map_err(wire)?.into_inner().job_id;
        ui.data(&json!({ "job": job_id, "coordinator": client.address() }), |_| job_id.clone())?;
        if args.watch {
            return status::follow(&client, &job_id, ui).await;
        }
        ui.note(format!("follow it with: shanty status {job_id} --watch --coordinator {}", client.address()));
        Ok(Exit::Done)
    })
}

/// What Slurm took.
struct Allocated {
    id: String,
    script: PathBuf,
    folder: PathBuf,
}

/// Hands the job's batch script to `sbatch`. It stays in the job's folder, to be looked at and handed in again.
fn allocate(args: &Args, job: &Loaded<JobSpec>) -> CommandResult<Allocated> {
    let described = Described::of(&args.job, job)?;
    let folder = Slurm::folder(&described.job);
    let files = args.cluster.render(Engine::Slurm, Some(&described), &args.target)?;
    let mut script = PathBuf::new();
    for file in &files {
        script = render::write(&folder, file)?;
    }
    let failed = |reason: String| LaunchError::Program { program: "sbatch".to_owned(), reason };
    let answer = std::process::Command::new("sbatch")
        .arg("--parsable")
        .arg(&script)
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !answer.status.success() {
        return Err(failed(String::from_utf8_lossy(&answer.stderr).trim().to_owned()).into());
    }
    // `ID` or `ID;CLUSTER`.
    let text = String::from_utf8_lossy(&answer.stdout);
    let id = text.trim().split(';').next().unwrap_or_default().to_owned();
    Ok(Allocated { id, script, folder })
}

/// Whether workers share the base is decided here, where the base is at hand and the job says what a worker may take; else each has its
/// own.
fn decide_shard(job: &mut Loaded<JobSpec>, ui: &Ui) -> CommandResult<()> {
    let spec = &job.value;
    let known = spec.base.model.is_dir() && spec.train.memory_limit().is_some();
    if spec.base.shard != Shard::Auto || !known {
        return Ok(());
    }
    let shard = Preflight::of(job, 1)?.shard;
    if shard.parts > 1 {
        ui.note(format!("{} workers share a base: {}", shard.parts, shard.reason));
    }
    job.value.base.shard = shard.word();
    Ok(())
}
