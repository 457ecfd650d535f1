//! A batch script for Slurm.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{File, Job, template};
use crate::{Error, Result};

/// What stands for the number of an array's task in an override.
const TASK: &str = "{task}";

/// What the user says of the allocation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slurm {
    /// The program, absolute; in the container where there is one.
    pub program: PathBuf,
    /// How many nodes: `2`, or from some to others, `1-4`.
    pub nodes: String,
    /// GPUs of each node.
    pub gpus: Option<u32>,
    /// Processors of each node.
    pub cpus: Option<u32>,
    /// Memory of each node, as Slurm writes it.
    pub memory: Option<String>,
    /// The time limit, as Slurm writes it.
    pub time: Option<String>,
    /// Tasks of an array, as Slurm writes them.
    pub array: Option<String>,
    /// More options of `sbatch`, such as `--partition=gpu`.
    pub lines: Vec<String>,
    /// Whether the job is requeued after it was asked to end.
    pub requeue: bool,
    /// How long before the time limit it is asked to, seconds.
    pub grace: u32,
    /// A container: a file of Apptainer (`….sif`), or the name of an image for Pyxis.
    pub container: Option<String>,
    /// More flags of `shanty worker`.
    pub worker: Vec<String>,
    /// A coordinator that is outside the allocation.
    pub outside: Option<Outside>,
}

/// A coordinator that runs already, and what workers show to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outside {
    /// Its URL.
    pub coordinator: String,
    /// The authority that it is known by.
    pub ca: Option<PathBuf>,
    /// The file of a token.
    pub token_file: Option<PathBuf>,
    /// A certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

impl Slurm {
    /// The folder of the coordinator's state, of certificates and of Slurm's output: beside the run's own.
    pub fn folder(job: &Job) -> PathBuf {
        let mut name = job.folder.file_name().unwrap_or_default().to_owned();
        name.push(".slurm");
        job.folder.with_file_name(name)
    }

    /// The batch script.
    ///
    /// # Errors
    /// [`Error::Unfit`] for numbers and lists that Slurm would not take.
    pub fn render(&self, job: &Job) -> Result<File> {
        self.check()?;
        let path = |path: &Path| path.display().to_string();
        let program = template::quote(&path(&self.program));
        let apptainer = self.container.as_ref().filter(|image| image.ends_with(".sif"));
        let command = match apptainer {
            Some(image) => {
                let nv = if self.gpus.is_some() { "--nv " } else { "" };
                format!("apptainer exec {nv}{} {program}", template::quote(image))
            }
            None => program,
        };
        let pyxis = self.container.as_ref().filter(|_| apptainer.is_none());
        let srun: Vec<String> = pyxis
            .map(|image| {
                let here = job.file.parent().map(path).unwrap_or_default();
                let store = job.folder.parent().map(path).unwrap_or_default();
                vec![
                    format!("--container-image={image}"),
                    format!("--container-mounts={here}:{here},{store}:{store}"),
                ]
            })
            .unwrap_or_default();
        let worker_command = if pyxis.is_some() { "shanty".to_owned() } else { command.clone() };
        let sets: Vec<String> = job.overrides.iter().map(|set| self.with_task(set)).collect();
        let outside = self.outside.as_ref();
        let text = template::fill(
            "slurm",
            include_str!("../../templates/slurm.sh"),
            json!({
                "name": job.name,
                "nodes": self.nodes,
                "gpus": self.gpus,
                "cpus": self.cpus,
                "memory": self.memory,
                "time": self.time,
                "array": self.array,
                "lines": self.lines,
                "requeue": self.requeue,
                "grace": self.grace,
                "folder": path(&Self::folder(job)),
                "command": command,
                "worker_command": worker_command,
                "srun": srun,
                "worker": self.worker,
                "job": path(&job.file),
                "sets": sets,
                "store_of_task": self.store_of_task(job),
                "outside": outside.map(|outside| outside.coordinator.clone()),
                "ca": outside.and_then(|outside| outside.ca.as_deref().map(path)),
                "token_file": outside.and_then(|outside| outside.token_file.as_deref().map(path)),
                "cert": outside.and_then(|outside| outside.certificate.as_ref().map(|(cert, _)| path(cert))),
                "key": outside.and_then(|outside| outside.certificate.as_ref().map(|(_, key)| path(key))),
            }),
        )?;
        Ok(File { name: format!("{}.sbatch", job.name), text, executable: true })
    }

    /// Each task's store, unless the user gives one that differs from task to task.
    fn store_of_task(&self, job: &Job) -> Option<String> {
        let own = |set: &String| set.starts_with("checkpoint.store=") && set.contains(TASK);
        let needed = self.array.is_some() && !job.overrides.iter().any(own);
        needed.then(|| self.with_task(&format!("checkpoint.store={}-{TASK}", job.store)))
    }

    /// A word of the shell in which the number of the array's task stands for `{task}`.
    fn with_task(&self, word: &str) -> String {
        if self.array.is_none() || !word.contains(TASK) {
            return template::quote(word);
        }
        let parts: Vec<String> = word
            .split(TASK)
            .map(|part| if part.is_empty() { String::new() } else { template::quote(part) })
            .collect();
        parts.join("\"$task\"")
    }

    fn check(&self) -> Result<()> {
        let unfit = |what, value: &str, rule: &str| {
            Err(Error::Unfit { what, value: format!("`{value}`"), rule: rule.to_owned() })
        };
        let number = |text: &str| text.parse::<u32>().ok().filter(|number| *number > 0);
        let (least, most) = self.nodes.split_once('-').unwrap_or((&self.nodes, &self.nodes));
        match (number(least), number(most)) {
            (Some(least), Some(most)) if least <= most => {}
            _ => return unfit("--nodes", &self.nodes, "must be a number, or two as `1-4`"),
        }
        if let Some(array) = self.array.as_ref().filter(|array| {
            array.is_empty()
                || !array.chars().all(|letter| letter.is_ascii_digit() || ",-:%".contains(letter))
        }) {
            return unfit("--array", array, "must be numbers and ranges, such as `0-7%2`");
        }
        for (what, value) in [("--time", &self.time), ("--memory", &self.memory)] {
            let fits = |letter: char| letter.is_ascii_alphanumeric() || ":-.".contains(letter);
            if let Some(value) = value.as_ref().filter(|value| value.is_empty() || !value.chars().all(fits)) {
                return unfit(what, value, "must be as Slurm writes it, such as `04:00:00` or `64G`");
            }
        }
        if let Some(line) =
            self.lines.iter().find(|line| !line.starts_with('-') || line.contains(['\n', '\r']))
        {
            return unfit("--sbatch", line, "must be one option of sbatch, such as `--partition=gpu`");
        }
        if let (Some(array), Some(_)) = (&self.array, &self.outside) {
            return unfit(
                "--array",
                array,
                "must be absent with `--coordinator`: each task has a coordinator of its own",
            );
        }
        if self.grace < 10 {
            return unfit(
                "--grace",
                &self.grace.to_string(),
                "must be at least 10 seconds: a checkpoint is written in them",
            );
        }
        Ok(())
    }
}
