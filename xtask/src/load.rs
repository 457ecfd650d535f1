//! `cargo xtask load`: the coordinator under 8, 64, 256 and 1,024 simulated workers, generator included on this machine.
//!
//! The example `load` of the coordinator's crate does the work; the coordinator is a process of its own. One JSON object
//! a size goes to standard output, the table to standard error. What the keys mean is in docs/reliability.md.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::say;

const SIZES: [&str; 4] = ["8", "64", "256", "1024"];

/// What is asked for.
struct Options {
    sizes: Vec<String>,
    /// Flags that the example gets as they are.
    passed: Vec<String>,
    release: bool,
}

/// Runs each size; whether all ran.
pub(crate) fn run(root: &Path, arguments: &[&str]) -> Result<bool> {
    let options = parse(arguments)?;
    let program = optimized(root, "load", options.release)?;
    say(&format!("coordinator: {}", if options.release { "release build" } else { BUILT }));
    say(
        "workers  commit ms p50/p99/max     own ms p50/p99/max        lease ms p50/p99/max      cores  us/worker·step  MiB  others' cores",
    );
    for size in &options.sizes {
        let object = measure(&program, size, &options.passed)?;
        say(&line(&object));
        print(&object);
    }
    Ok(true)
}

/// How an example is built without `--release`.
pub(crate) const BUILT: &str =
    "development build: the coordinator at opt-level 2, all dependencies at 3, with debug assertions";

fn parse(arguments: &[&str]) -> Result<Options> {
    let mut options =
        Options { sizes: SIZES.map(str::to_owned).to_vec(), passed: Vec::new(), release: false };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().with_context(|| format!("{argument} needs a value"));
        match *argument {
            "--release" => options.release = true,
            "--workers" => options.sizes = value()?.split(',').map(str::to_owned).collect(),
            "--steps" | "--warm-up" | "--step-ms" => {
                options.passed.extend([(*argument).to_owned(), (*value()?).to_owned()]);
            }
            other => bail!("unknown argument {other}"),
        }
    }
    Ok(options)
}

/// Builds an example; gives the program. The development profile optimises what counts here, too.
pub(crate) fn optimized(root: &Path, example: &str, release: bool) -> Result<PathBuf> {
    Ok(built(root, &["--example", example], release)?.join("examples").join(example))
}

/// Builds what cargo's flags name; gives the folder of the profile.
pub(crate) fn built(root: &Path, what: &[&str], release: bool) -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--locked", "--workspace"]).args(what).current_dir(root);
    if release {
        command.arg("--release");
    }
    ensure!(command.status().context("failed to start cargo")?.success(), "the build failed");
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    Ok(target.join(if release { "release" } else { "debug" }))
}

fn measure(program: &Path, size: &str, passed: &[String]) -> Result<Value> {
    let output = Command::new(program)
        .args(["crew", "--workers", size])
        .args(passed)
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("failed to start {}", program.display()))?;
    ensure!(output.status.success(), "{size} workers: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn line(object: &Value) -> String {
    let spread = |key: &str| {
        let of = |point: &str| object[key][point].as_f64().unwrap_or(f64::NAN);
        format!("{:.1} / {:.1} / {:.1}", of("p50"), of("p99"), of("max"))
    };
    let number = |key: &str| object[key].as_f64().unwrap_or(f64::NAN);
    format!(
        "{:>7}  {:<24}  {:<24}  {:<24}  {:>5.3}  {:>14.0}  {:>3.0}  {:>13.2}",
        number("workers"),
        spread("commit_ms"),
        spread("own_ms"),
        spread("lease_ms"),
        number("cpu_cores"),
        number("cpu_us_per_worker_step"),
        number("memory_bytes") / f64::from(1 << 20),
        number("others_cpu_cores"),
    )
}

/// What scripts read.
#[expect(clippy::print_stdout, reason = "the figures are data")]
fn print(object: &Value) {
    println!("{object}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_flags_of_the_generator_are_told_apart() {
        let options = parse(&["--workers", "8,16", "--steps", "5", "--release"]).unwrap();
        assert_eq!(options.sizes, ["8", "16"]);
        assert_eq!(options.passed, ["--steps", "5"]);
        assert!(options.release);
        assert!(parse(&["--workers"]).is_err());
        assert!(parse(&["--color"]).is_err());
        assert_eq!(parse(&[]).unwrap().sizes.len(), 4);
    }

    #[test]
    fn a_size_is_one_line() {
        let spread = serde_json::json!({ "p50": 1.0, "p99": 2.0, "max": 3.0 });
        let object = serde_json::json!({
            "workers": 8, "commit_ms": spread, "own_ms": spread, "lease_ms": spread, "cpu_cores": 0.01,
            "cpu_us_per_worker_step": 120.0, "memory_bytes": 33_554_432, "others_cpu_cores": 0.2,
        });
        let line = line(&object);
        assert!(line.contains("1.0 / 2.0 / 3.0") && line.contains(" 32 "), "{line}");
    }
}
