//! `cargo xtask simulate`: random schedules against the pure machine, and against the whole crew over a simulated network.
//!
//! Both are tests of the suite, which plays a few hundred schedules of each; here they play many more.

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context, Result, bail};

use crate::say;

/// Tests of `crates/coordinator/tests/simulation` that play schedules, each as many as it is told.
const PURE_TESTS: u64 = 7;
/// Tests of `crates/worker/src/simulation` that do.
const NETWORK_TESTS: u64 = 5;

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    pure: u64,
    network: u64,
    /// The first seed.
    first: u64,
    /// One seed alone.
    seed: Option<u64>,
}

/// Plays; whether all schedules ended well.
pub(crate) fn run(root: &Path, arguments: &[&str]) -> Result<bool> {
    let options = parse(arguments)?;
    let pure = options.pure.div_ceil(PURE_TESTS);
    let network = options.network.div_ceil(NETWORK_TESTS);
    let mut sound = true;
    if pure > 0 {
        sound &= play(root, "the pure machine", pure, PURE_TESTS, &["--test", "simulation", "--"], &options)?;
    }
    if network > 0 {
        let target = ["--lib", "simulation::", "--", "--nocapture"];
        sound &= play(root, "the crew over a network", network, NETWORK_TESTS, &target, &options)?;
    }
    Ok(sound)
}

fn play(root: &Path, name: &str, runs: u64, tests: u64, target: &[&str], options: &Options) -> Result<bool> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let packages = ["test", "--locked", "--package", "shanty-coordinator", "--package", "shanty-worker"];
    let test = || {
        let mut command = Command::new(&cargo);
        command.args(packages).args(["--features", "shanty-worker/simulation"]).current_dir(root);
        command
    };
    let kind = if target[0] == "--lib" { &target[..1] } else { &target[..2] };
    if !test().arg("--no-run").args(kind).status().context("failed to start cargo")?.success() {
        return Ok(false);
    }
    let began = Instant::now();
    let mut command = test();
    command.args(target).env("SHANTY_SIMULATION_RUNS", runs.to_string());
    command.env("SHANTY_SIMULATION_FIRST", options.first.to_string());
    if let Some(seed) = options.seed {
        command.env("SHANTY_SIMULATION_SEED", seed.to_string());
    }
    let sound = command.status().context("failed to start cargo")?.success();
    let (count, seconds) = (runs * tests, began.elapsed().as_secs_f64());
    let ended = if sound { "all ended well" } else { "NOT all ended well" };
    say(&format!("{name}: {count} schedules from seed {} in {seconds:.0} s, {ended}", options.first));
    Ok(sound)
}

fn parse(arguments: &[&str]) -> Result<Options> {
    let mut options = Options { pure: 100_000, network: 1_000, first: 0, seed: None };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut number = || crate::number_after(argument, &mut rest);
        match *argument {
            "--pure" => options.pure = number()?,
            "--network" => options.network = number()?,
            "--first" => options.first = number()?,
            "--seed" => options.seed = Some(number()?),
            other => bail!("unknown argument {other}"),
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_schedules_are_understood() {
        let options = parse(&["--pure", "10", "--network", "0", "--first", "7"]).unwrap();
        assert_eq!(options, Options { pure: 10, network: 0, first: 7, seed: None });
        assert!(parse(&["--pure"]).is_err() && parse(&["--wet"]).is_err());
    }
}
