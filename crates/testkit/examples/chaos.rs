//! A thousand random faults on real processes over tiny jobs; `cargo xtask chaos` builds and starts it.
//!
//! As root it goes into network and mount namespaces of its own first, so that workers have links that can be cut, and
//! the run a small disk that can be filled. Progress goes to standard error, the report as JSON to standard output.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the report is data, and people watch")]

use std::{
    env,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use shanty_testkit::{
    TinyJob,
    chaos::{MIX, Options, Report},
};

/// Set in the process that is inside the namespaces.
const INSIDE: &str = "SHANTY_CHAOS_INSIDE";
/// What a final loss may differ from the undisturbed one by: sums of other crews are taken in another order.
const LOSS_TOLERANCE: f64 = 1e-3;

fn say(text: &str) {
    eprintln!("{text}");
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Plays; whether nothing was lost.
fn run(arguments: &[&str]) -> Result<bool> {
    let (mut options, keep) = parse(arguments)?;
    if env::var_os(INSIDE).is_none() {
        enter(arguments);
        say("not root, or no `unshare`: no links are cut and no disk is filled");
        options.sea = false;
    }
    let folder = tempfile::tempdir()?;
    say(&format!("seed {}, in {}", options.seed, folder.path().display()));
    let (seed, batch) = (options.job.seed, options.job.global_batch_size as u64);
    let belongs = |rows: u64, step: u64| {
        shanty_data::order::step_rows(seed, rows, batch, step).expect("rows and batch are not 0")
    };
    let played = shanty_testkit::chaos::run(&options, folder.path(), &belongs, &say);
    if keep || played.is_err() {
        say(&format!("everything of it is in {}", folder.keep().display()));
    }
    let report = played.with_context(|| format!("seed {}", options.seed))?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(is_sound(&report))
}

/// Replaces this process by one inside namespaces of its own; returns if that cannot be.
fn enter(arguments: &[&str]) {
    let Ok(program) = env::current_exe() else { return };
    let probe = Command::new("unshare").args(["--net", "--mount", "true"]).output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        return;
    }
    // The namespaces end with the last process in them, and everything that was set up there with them.
    let script =
        "ip link set lo up && mount -t tmpfs tmpfs /run && mkdir -p /run/netns && exec \"$0\" \"$@\"";
    let error = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .args(["sh", "-c", script])
        .arg(program)
        .args(arguments)
        .env(INSIDE, "1")
        .exec();
    say(&format!("unshare: {error}"));
}

fn parse(arguments: &[&str]) -> Result<(Options, bool)> {
    let job = TinyJob {
        name: "tiny",
        lines: 160,
        steps: 1500,
        global_batch_size: 12,
        every_steps: 100,
        learning_rate: 1e-3,
        workers: (1, 4),
        ..TinyJob::default()
    };
    let mut options = Options {
        shanty: PathBuf::new(),
        faults: 1000,
        pause: Duration::from_millis(2400),
        kinds: MIX.to_vec(),
        workers: 4,
        job,
        seed: std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_secs()),
        sea: true,
    };
    let mut keep = false;
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().copied().with_context(|| format!("{argument} needs a value"));
        match *argument {
            "--faults" => options.faults = value()?.parse()?,
            "--pause-ms" => options.pause = Duration::from_millis(value()?.parse()?),
            "--seed" => options.seed = value()?.parse()?,
            "--steps" => options.job.steps = value()?.parse()?,
            "--workers" => {
                options.workers = value()?.parse()?;
                options.job.workers.1 = options.workers as u32;
            }
            "--kinds" => {
                let names = value()?.split(',');
                let kinds = names.map(|name| Ok((name.parse()?, weight_of(name))));
                options.kinds = kinds.collect::<Result<_>>()?;
            }
            "--shanty" => options.shanty = Path::new(value()?).canonicalize()?,
            "--keep" => keep = true,
            other => bail!("unknown argument {other}"),
        }
    }
    if options.shanty.as_os_str().is_empty() {
        bail!("--shanty names the program that is tried");
    }
    Ok((options, keep))
}

fn weight_of(name: &str) -> u32 {
    MIX.iter().find(|(fault, _)| fault.as_str() == name).map_or(1, |(_, weight)| *weight)
}

/// Nothing lost, nothing twice, nothing left out, and the same adapter as if nothing had happened.
fn is_sound(report: &Report) -> bool {
    let exact = report.steps_lost == 0 && report.duplicates == 0 && report.omissions == 0;
    if !exact {
        say("rows or steps were lost or trained twice");
    }
    let close = report.loss_difference <= LOSS_TOLERANCE;
    if !close {
        say(&format!("a final loss differs by {} from the undisturbed run's", report.loss_difference));
    }
    exact && close
}
