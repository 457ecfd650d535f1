//! `shanty resume`: the next attempt, from the newest good checkpoint.

use std::path::Path;

use serde_json::json;
use shanty_proto::v1::ResumeJobRequest;

use crate::{
    base,
    client::{Identity, Target, block_on, wire},
    commands::run::announce,
    error::Error,
    failure::{CommandResult, Exit},
    job_file::{JobFile, store_of},
    preflight::Preflight,
    progress::{self, Reporter},
    run::{
        LocalOptions,
        ending::end_of_job,
        local::{Begin, LocalRun},
        store::Store,
    },
    ui::Ui,
    watch::Watcher,
};

/// Go on with an interrupted, failed or cancelled job from its newest good checkpoint
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty resume job.toml                                    a run of this machine, also after kill -9
  shanty resume shakespeare-0198f2 --coordinator http://head:7461

With the same workers and threads, the resumed run gives the same adapter, bit by bit, as one that was never
interrupted.")]
pub(crate) struct Args {
    /// The job file of a run on this machine, or with --coordinator the job's id
    #[arg(value_name = "JOB.toml|JOB")]
    job: String,
    /// Override a key of the job file, as for `run`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    local: LocalOptions,
    /// The coordinator that has the job, as http://host:port
    #[arg(long, env = "SHANTY_COORDINATOR", value_name = "URL")]
    coordinator: Option<String>,
    /// With --coordinator: do not watch it
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    identity: Identity,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let names_a_file = Path::new(&args.job).extension().is_some_and(|extension| extension == "toml");
    match args.coordinator {
        Some(coordinator) if !names_a_file => {
            let target = Target { coordinator: Some(coordinator), store: None, identity: args.identity };
            block_on(remote(&target, &args.job, args.detach, ui))
        }
        _ => local(&JobFile { job: args.job.into(), set: args.set }, &args.local, ui),
    }
}

fn local(file: &JobFile, options: &LocalOptions, ui: &Ui) -> CommandResult<Exit> {
    let mut job = file.load(&options.overrides(), ui)?;
    base::fetch(&mut job, ui)?;
    let spec = &job.value;
    let store = Store::new(store_of(spec), options.state_dir.clone());
    if !store.holds_a_job() {
        return Err(Error::NothingToResume { store: store.root().to_owned(), run: file.run_command() }.into());
    }
    let workers = spec.cluster.workers.max;
    let preflight = Preflight::of(&job, options.threads_each(workers))?;
    announce(ui, &spec.name, &preflight, workers, options.threads_each(workers))?;
    LocalRun { ui, file, job: &job, options, store, begin: Begin::Resumed }.execute()
}

async fn remote(target: &Target, job: &str, detach: bool, ui: &Ui) -> CommandResult<Exit> {
    let (connection, job_id) = target.connect_for(job).await?;
    let client = connection.client;
    let before = client.job_status(&job_id).await?;
    let request = ResumeJobRequest { job_id: job_id.clone(), ..ResumeJobRequest::default() };
    let answer = client.jobs().resume_job(request).await.map_err(wire)?.into_inner();
    if detach {
        ui.data(&json!({ "job": job_id, "attempt": answer.attempt, "step": answer.step }), |_| {
            format!("{job_id}: attempt {} goes on after step {}", answer.attempt, answer.step)
        })?;
        return Ok(Exit::Done);
    }
    let mut watcher = Watcher::new(&client, &job_id);
    watcher.skip(answer.step, &before);
    let mut reporter = Reporter::new(ui);
    let over = tokio::select! {
        over = watcher.follow(&mut reporter) => over?,
        _ = tokio::signal::ctrl_c() => return Ok(Exit::Interrupted),
    };
    reporter.finish()?;
    let seconds = over.ended_unix_ms.saturating_sub(over.started_unix_ms) as f64 / 1000.0;
    ui.data(&progress::finished(&over, seconds), |_| {
        format!("{job_id}: {}", progress::state_name(over.state()))
    })?;
    end_of_job(&over)
}
