//! `cargo xtask gpu-check`: packs the check of the GPU engine into one folder for a machine with a card and no Rust.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

/// Where the bundle goes; git ignores it.
const FOLDER: &str = ".gpu";

/// The programs in it, packed: a tree that is carried to a machine with a card is often not allowed to be large.
const ARCHIVE: &str = "programs.tar.xz";

/// What runs there. Models and reference numbers come from the checkout that the folder lies in.
const SCRIPT: &str = r#"#!/bin/sh
# Checks and measures the GPU engine and workers on a card: run.sh [check|crew|time|steps|longest|all] [RESULT.json]
here=$(cd "$(dirname "$0")" && pwd) || exit 2
what=${1:-all}
result=${2:-$here/result.json}
export LD_LIBRARY_PATH="/usr/local/cuda/lib64:$LD_LIBRARY_PATH"
programs=$(mktemp -d) || exit 2
trap 'rm -rf "$programs"' EXIT
tar -xJf "$here/programs.tar.xz" -C "$programs" 2>/dev/null \
    || python3 -m tarfile -e "$here/programs.tar.xz" "$programs" || exit 2
chmod +x "$programs"/*
status=0
if [ "$what" != crew ]; then
    "$programs/gpu_check" "$here/.." "$result" "$what" || status=1
fi
if [ "$what" = crew ] || [ "$what" = all ]; then
    "$programs/gpu_crew" "$programs/shanty" "$here/.." "${result%.json}.crew.json" || status=1
fi
exit $status
"#;

/// Builds the checks and the program, strips and packs them; returns what to tell.
pub(crate) fn pack(root: &Path) -> Result<String> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = ["--package", "shanty-peft-core", "--example", "gpu_check"];
    let others = [
        "--package",
        "shanty-testkit",
        "--example",
        "gpu_crew",
        "--package",
        "shanty-cli",
        "--bin",
        "shanty",
    ];
    let arguments = ["build", "--release"].iter().chain(&built).chain(&others);
    run(Command::new(cargo).args(arguments).current_dir(root))?;
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let folder = root.join(FOLDER);
    fs::create_dir_all(&folder).with_context(|| format!("failed to make `{}`", folder.display()))?;
    let stripped = target.join("gpu-check");
    fs::create_dir_all(&stripped).with_context(|| format!("failed to make `{}`", stripped.display()))?;
    let programs = ["examples/gpu_check", "examples/gpu_crew", "shanty"];
    let mut names = Vec::new();
    for program in programs {
        let built = target.join("release").join(program);
        let name = built.file_name().with_context(|| format!("`{program}` has no name"))?.to_owned();
        run(Command::new("strip").arg("-o").arg(stripped.join(&name)).arg(&built))?;
        names.push(name);
    }
    let archive = folder.join(ARCHIVE);
    run(Command::new("tar").arg("-cJf").arg(&archive).arg("-C").arg(&stripped).args(&names))?;
    let script = folder.join("run.sh");
    fs::write(&script, SCRIPT).with_context(|| format!("failed to write `{}`", script.display()))?;
    let bytes = fs::metadata(&archive)?.len();
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
