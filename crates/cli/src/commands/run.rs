//! `shanty run`: from a job file to an adapter, on this machine.

use serde_json::json;

use crate::{
    base,
    failure::{CommandResult, Exit},
    format,
    job_file::{JobFile, store_of},
    preflight::{Preflight, check_data},
    run::{
        LocalOptions,
        local::{Begin, LocalRun, require_free},
        store::Store,
    },
    ui::Ui,
};

/// Train an adapter on this machine: coordinator, workers and progress in one go
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty run examples/shakespeare/job.toml
  shanty run job.toml --workers 2 --set train.steps=100
  shanty run job.toml --output json | jq 'select(.event == \"step\") | .loss'

Everything of the run lies in its folder, runs/NAME unless the job file names another.
Ctrl-C stops it cleanly; `shanty resume JOB.toml` goes on, also after a crash.")]
pub(crate) struct Args {
    #[command(flatten)]
    file: JobFile,
    #[command(flatten)]
    local: LocalOptions,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let mut job = args.file.load(&args.local.overrides(), ui)?;
    let store = Store::new(store_of(&job.value), args.local.state_dir.clone());
    require_free(&store, &job.value, &args.file)?;
    base::fetch(&mut job, ui)?;
    check_data(&job)?;
    let workers = job.value.cluster.workers.max;
    let preflight = Preflight::of(&job, args.local.threads_each(workers))?;
    // Decided once: what is free may be another number when the workers look.
    job.value.base.shard = preflight.shard.word();
    let spec = &job.value;
    announce(ui, &spec.name, &preflight, workers, args.local.threads_each(workers))?;
    LocalRun { ui, file: &args.file, job: &job, options: &args.local, store, begin: Begin::Anew }.execute()
}

/// Says what will be trained, before it is.
pub(crate) fn announce(
    ui: &Ui,
    name: &str,
    preflight: &Preflight,
    workers: u32,
    threads: usize,
) -> CommandResult<()> {
    if ui.is_json() {
        return ui.json(&json!({
            "event": "started", "job": name, "matched_modules": preflight.matched_modules,
            "trainable_parameters": preflight.trainable_parameters,
            "total_parameters": preflight.total_parameters, "workers": workers, "threads": threads,
            "shard": preflight.shard.parts,
        }));
    }
    for warning in &preflight.warnings {
        ui.warn(warning);
    }
    ui.note(format!(
        "trains {} of {} parameters ({}) in {}",
        format::count(preflight.trainable_parameters),
        format::count(preflight.total_parameters),
        format::percent(preflight.trainable_parameters, preflight.total_parameters),
        preflight.what(),
    ));
    ui.note(format!(
        "on {workers} worker{} with {threads} thread{} each, {} a worker",
        if workers == 1 { "" } else { "s" },
        if threads == 1 { "" } else { "s" },
        format::bytes(preflight.memory.total()),
    ));
    if preflight.shard.parts > 1 {
        ui.note(format!("{} workers share a base: {}", preflight.shard.parts, preflight.shard.reason));
    }
    Ok(())
}
