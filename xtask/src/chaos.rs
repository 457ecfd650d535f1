//! `cargo xtask chaos`: a thousand random faults on real processes over tiny jobs.
//!
//! The example `chaos` of the test kit does the work on a `shanty` that is built first, or that `--shanty` names.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};

use crate::load::{built, optimized};

/// Plays; whether nothing was lost.
pub(crate) fn run(root: &Path, arguments: &[&str]) -> Result<bool> {
    let mut command = Command::new(optimized(root, "chaos", false)?);
    if !arguments.contains(&"--shanty") {
        command.arg("--shanty").arg(built(root, &["--bin", "shanty"], false)?.join("shanty"));
    }
    let status = command.args(arguments).status().context("failed to start the example `chaos`")?;
    Ok(status.success())
}
