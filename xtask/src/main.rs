//! House rules as code, and generated docs.
//!
//! - `cargo xtask tidy`: checks the house rules; each rule is a function with a test of its own.
//! - `cargo xtask fuzz`: fuzzes every reader of files that others wrote.
//! - `cargo xtask gpu-check`: packs the check of the GPU engine for a machine with a card.
//! - `cargo xtask chaos`: a thousand random faults on real processes.
//! - `cargo xtask load`: the coordinator under simulated workers.
//! - `cargo xtask simulate`: random schedules against the machine, and over a simulated network.
//! - `cargo xtask docs`: writes the pages that are made from the source; `--check` fails where one is stale.

mod chaos;
mod docs;
mod fuzz;
mod gpu_check;
mod load;
mod simulate;
mod tidy;
mod tree;

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
usage: cargo xtask COMMAND

  tidy            checks the house rules
  docs            writes the pages that are made from the source
  docs --check    fails where such a page is stale
  fuzz [--seconds N] [--seed N] [TARGET…]
                  fuzzes the readers of foreign files, 300 seconds each
  load [--workers N,…] [--steps N] [--step-ms N] [--release]
                  the coordinator under 8, 64, 256 and 1,024 simulated workers: latency, CPU, memory
  chaos [--faults N] [--pause-ms N] [--kinds KIND,…] [--seed N] [--steps N] [--workers N] [--shanty PROGRAM] [--keep]
                  1,000 random faults on real processes: detection, stall, steps lost, duplicates, omissions
  simulate [--pure N] [--network N] [--first SEED] [--seed SEED]
                  100,000 random schedules against the pure machine, 1,000 of the crew over a simulated network
  gpu-check       packs the check of the GPU engine into .gpu/, for a machine with a card";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("xtask: {error:#}"));
            ExitCode::from(2)
        }
    }
}

/// Whether all is well.
fn run(arguments: &[&str]) -> Result<bool> {
    let root = workspace_root();
    match arguments {
        ["tidy"] => tidy::run(&root),
        ["docs"] => docs::write(&root),
        ["docs", "--check"] => docs::check(&root),
        ["fuzz", asked @ ..] => fuzz::run(&root, asked),
        ["chaos", asked @ ..] => chaos::run(&root, asked),
        ["load", asked @ ..] => load::run(&root, asked),
        ["simulate", asked @ ..] => simulate::run(&root, asked),
        ["gpu-check"] => {
            say(&gpu_check::pack(&root)?);
            Ok(true)
        }
        [] | ["help" | "--help" | "-h"] => {
            say(USAGE);
            Ok(true)
        }
        other => bail!("unknown arguments {other:?}\n{USAGE}"),
    }
}

/// The number that follows an argument.
pub(crate) fn number_after(argument: &str, rest: &mut std::slice::Iter<'_, &str>) -> Result<u64> {
    let value = rest.next().with_context(|| format!("{argument} needs a number"))?;
    value.parse().with_context(|| format!("{argument} needs a number, not `{value}`"))
}

fn workspace_root() -> PathBuf {
    // Cargo names the folder at run time, too: a binary that was built in another checkout looks at the right one.
    let built = || env!("CARGO_MANIFEST_DIR").into();
    let here = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(built);
    let here = Path::new(&here);
    here.parent().unwrap_or(here).to_owned()
}

/// What people read goes to stderr.
#[expect(clippy::print_stderr, reason = "the one place where xtask speaks")]
pub(crate) fn say(text: &str) {
    eprintln!("{text}");
}
