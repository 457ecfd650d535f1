//! `shanty render`: the files by which an engine launches a job.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use serde_json::json;
use shanty_launch::render::File;

use crate::{
    client::Target,
    engine::{ClusterFlags, Described, Engine},
    error::Error,
    failure::{CommandResult, Exit},
    job_file::JobFile,
    ui::Ui,
};

/// Print the files by which Slurm, Kubernetes, compose or systemd launches a job
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty render --engine slurm job.toml --nodes 4 --gpus 8 --time 12:00:00 --sbatch=--partition=gpu > job.sbatch
  shanty render --engine slurm job.toml --nodes 2 --coordinator https://head:7461 --ca ca.pem --token-file worker.token
  shanty render --engine kubernetes job.toml --nodes 4 --gpus 8 --queue research --volume shared:/data | kubectl apply -f -
  shanty render --engine compose job.toml --nodes 2 --out .
  shanty render --engine systemd --coordinator https://head:7461 --out units

With --coordinator, Slurm's script starts workers for a coordinator that runs elsewhere. Files that the job names need not be
on this machine.")]
pub(crate) struct Args {
    /// What launches the crew
    #[arg(long, value_enum)]
    engine: Engine,
    /// The job file; --engine systemd needs none
    #[arg(value_name = "JOB.toml")]
    job: Option<PathBuf>,
    /// Override a key of the job file, for example train.steps=5; may be given many times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Write the files into this folder, instead of to stdout
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    cluster: ClusterFlags,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let described = match args.job {
        Some(job) => {
            let file = JobFile { job, set: args.set };
            let spec = file.first_task().load_unseen(&[])?;
            Some(Described::of(&file, &spec)?)
        }
        None => None,
    };
    let files = args.cluster.render(args.engine, described.as_ref(), &args.target)?;
    match args.out {
        Some(folder) => {
            for file in &files {
                let path = write(&folder, file)?;
                ui.data(&json!({ "file": path }), |_| path.display().to_string())?;
            }
        }
        None if ui.is_json() => {
            for file in &files {
                ui.json(&json!({ "name": file.name, "text": file.text, "executable": file.executable }))?;
            }
        }
        None => {
            for file in &files {
                if files.len() > 1 {
                    ui.line(format!("# ---- {}", file.name))?;
                }
                ui.piece(&file.text)?;
            }
        }
    }
    Ok(Exit::Done)
}

/// Writes a file into a folder, which is made if need be.
pub(crate) fn write(folder: &std::path::Path, file: &File) -> CommandResult<PathBuf> {
    let path = folder.join(&file.name);
    let all = || {
        fs::create_dir_all(folder)?;
        fs::write(&path, &file.text)?;
        let mode = if file.executable { 0o755 } else { 0o644 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
    };
    all().map_err(|source| Error::File { action: "write", path: path.clone(), source })?;
    Ok(path)
}
