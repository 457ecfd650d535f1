//! `shanty-fuzz TARGET SECONDS SEED ARTEFACTS`: runs one target on a stable toolchain. `cargo xtask fuzz` calls it.

use std::{env, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail};
use shanty_fuzz::{TARGETS, driver, memory::Counting, target};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[expect(clippy::print_stderr, reason = "a program for people")]
fn main() -> ExitCode {
    match run() {
        Ok(text) => {
            eprintln!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<String> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [name, seconds, seed, artefacts] = arguments.as_slice() else {
        bail!("usage: shanty-fuzz TARGET SECONDS SEED ARTEFACTS");
    };
    let known = || TARGETS.map(|target| target.name).join(", ");
    let target = target(name).with_context(|| format!("no target `{name}`; there are {}", known()))?;
    let time = Duration::from_secs(seconds.parse()?);
    let outcome = driver::run(target, seed.parse()?, time, Path::new(artefacts))?;
    Ok(format!("{name}: {} inputs in {seconds} s, the slowest took {:?}", outcome.inputs, outcome.slowest))
}
