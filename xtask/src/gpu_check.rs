//! `cargo xtask gpu-check`: packs the check of the GPU engine into one folder for a machine with a card and no Rust.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

/// Where the bundle goes; git ignores it.
const FOLDER: &str = ".gpu";

/// What runs there. Models and reference numbers come from the checkout that the folder lies in.
const SCRIPT: &str = r#"#!/bin/sh
# Checks and measures the GPU engine: run.sh [check|time|all] [RESULT.json]
here=$(cd "$(dirname "$0")" && pwd) || exit 2
export LD_LIBRARY_PATH="/usr/local/cuda/lib64:$LD_LIBRARY_PATH"
exec "$here/gpu_check" "$here/.." "${2:-$here/result.json}" "${1:-all}"
"#;

/// Builds the check, strips it and writes the bundle; returns what to tell.
pub(crate) fn pack(root: &Path) -> Result<String> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["build", "--release", "--package", "shanty-peft-core", "--example", "gpu_check"];
    run(Command::new(cargo).args(arguments).current_dir(root))?;
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let built = target.join("release/examples/gpu_check");
    let folder = root.join(FOLDER);
    fs::create_dir_all(&folder).with_context(|| format!("failed to make `{}`", folder.display()))?;
    let packed = folder.join("gpu_check");
    run(Command::new("strip").arg("-o").arg(&packed).arg(&built))?;
    let script = folder.join("run.sh");
    fs::write(&script, SCRIPT).with_context(|| format!("failed to write `{}`", script.display()))?;
    let bytes = fs::metadata(&packed)?.len();
    Ok(format!(
        "packed {FOLDER}/ ({:.1} MB)\ncopy this checkout to a machine with an NVIDIA card and run:\n\n  sh {FOLDER}/run.sh",
        bytes as f64 / 1e6
    ))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("failed to start {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}
