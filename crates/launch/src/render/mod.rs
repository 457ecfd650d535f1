//! The files by which engines launch a crew: made from templates, of a job and of what the user says about the cluster.

mod compose;
mod kubernetes;
mod slurm;
mod systemd;
mod template;

use std::path::PathBuf;

pub(crate) use self::template::quote;
pub use self::{
    compose::Compose,
    kubernetes::{Kubernetes, Mount},
    slurm::{Outside, Slurm},
    systemd::Systemd,
};

/// What files need to know of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Its name: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// The job file, absolute.
    pub file: PathBuf,
    /// The job file's text.
    pub text: String,
    /// `KEY=VALUE`, as behind `--set`.
    pub overrides: Vec<String>,
    /// The folder or URL of its checkpoints.
    pub store: String,
    /// The folder of the run on this machine.
    pub folder: PathBuf,
}

/// A file that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its name, relative.
    pub name: String,
    /// What is in it.
    pub text: String,
    /// Whether it is a program.
    pub executable: bool,
}

impl File {
    fn text(name: impl Into<String>, text: String) -> Self {
        Self { name: name.into(), text, executable: false }
    }
}
