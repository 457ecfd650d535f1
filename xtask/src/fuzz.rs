//! `cargo xtask fuzz`: every reader of foreign files under fuzzing, some minutes each.
//!
//! With cargo-fuzz and a nightly toolchain the targets of `fuzz/` run under libFuzzer, beginning from the committed corpora.
//! Without, the driver of `crates/fuzz` changes the corpora by a seeded mutator, and the difference is said aloud.

use std::{
    env,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// The targets, as in `crates/fuzz`.
pub(crate) const TARGETS: [&str; 5] =
    ["safetensors_header", "gguf", "adapter_config", "jsonl", "chat_template"];

/// What a run is asked for.
struct Options {
    /// Seconds for each target.
    seconds: u64,
    seed: u64,
    targets: Vec<String>,
}

/// Runs the targets that `arguments` name, or all; whether nothing broke.
pub(crate) fn run(root: &Path, arguments: &[&str]) -> Result<bool> {
    let options = parse(arguments)?;
    let libfuzzer = has_cargo_fuzz();
    if !libfuzzer {
        crate::say(
            "no cargo-fuzz with a nightly toolchain here: inputs are changed at random, without a view of coverage",
        );
    }
    let mut whole = true;
    for target in &options.targets {
        let ended = match libfuzzer {
            true => with_cargo_fuzz(root, target, &options)?,
            false => with_driver(root, target, &options)?,
        };
        if !ended {
            crate::say(&format!("{target}: broken"));
        }
        whole &= ended;
    }
    Ok(whole)
}

fn parse(arguments: &[&str]) -> Result<Options> {
    let mut options = Options { seconds: 300, seed: 1, targets: Vec::new() };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut number = || crate::number_after(argument, &mut rest);
        match *argument {
            "--seconds" => options.seconds = number()?,
            "--seed" => options.seed = number()?,
            name if TARGETS.contains(&name) => options.targets.push(name.to_owned()),
            other => bail!("no target `{other}`; there are {}", TARGETS.join(", ")),
        }
    }
    if options.targets.is_empty() {
        options.targets = TARGETS.iter().map(|target| (*target).to_owned()).collect();
    }
    Ok(options)
}

/// Through rustup's own `cargo`: that of a fixed toolchain knows no `+nightly`.
fn nightly() -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "cargo", "fuzz"]).env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
    command
}

fn has_cargo_fuzz() -> bool {
    let asked = nightly().arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    asked.is_ok_and(|status| status.success())
}

fn with_cargo_fuzz(root: &Path, target: &str, options: &Options) -> Result<bool> {
    let seeds = root.join("crates/fuzz/corpus").join(target);
    let found = root.join("fuzz/corpus").join(target);
    std::fs::create_dir_all(&found).with_context(|| found.display().to_string())?;
    let status = nightly()
        .args(["run", target])
        .args([&found, &seeds])
        .arg("--")
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-seed={}", options.seed))
        .args(["-max_len=16384", "-timeout=5", "-rss_limit_mb=2048"])
        .current_dir(root)
        .status()
        .context("failed to start cargo-fuzz")?;
    Ok(status.success())
}

fn with_driver(root: &Path, target: &str, options: &Options) -> Result<bool> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["run", "--quiet", "--package", "shanty-fuzz", "--", target])
        .args([options.seconds.to_string(), options.seed.to_string(), "fuzz/artifacts".to_owned()])
        .current_dir(root)
        .status()
        .context("failed to start cargo")?;
    Ok(status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_targets_for_five_minutes_unless_asked_otherwise() {
        let usual = parse(&[]).expect("nothing is asked for");
        assert_eq!((usual.seconds, usual.targets.len()), (300, TARGETS.len()));
        let asked = parse(&["gguf", "--seconds", "5", "--seed", "9"]).expect("known arguments");
        assert_eq!((asked.seconds, asked.seed, &*asked.targets), (5, 9, &["gguf".to_owned()][..]));
        assert!(parse(&["nothing"]).is_err() && parse(&["--seconds", "many"]).is_err());
    }

    #[test]
    fn every_target_has_seeds_and_a_libfuzzer_program() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for target in TARGETS {
            assert!(root.join("crates/fuzz/corpus").join(target).is_dir(), "{target}");
            assert!(root.join(format!("fuzz/fuzz_targets/{target}.rs")).is_file(), "{target}");
        }
    }
}
