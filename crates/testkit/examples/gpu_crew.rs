//! Checks worker processes on a card: `gpu_crew SHANTY REPOSITORY [RESULT.json [cpu]]`.
//!
//! The Shakespeare example on one worker beside the CPU's curve; two and four workers on the one card beside one; `kill -9`
//! of a worker among two, of the only one, and of everything, each resumed or carried on; that `cuda` never becomes the CPU.
//! `cargo xtask gpu-check` packs it. With `cpu` the same goes through its motions, shorter, where there is no card.

#![allow(clippy::print_stdout, reason = "a tool that prints a table")]

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shanty_testkit::{Finished, Running, Shanty, adapter, process, rows, wait};

/// How long runs are.
struct Scale {
    /// The device that is checked.
    device: &'static str,
    /// Steps of the runs that are compared; long enough to be killed in the middle of.
    steps: u64,
    /// When something is killed.
    kill_at: u64,
    /// Steps between checkpoints.
    every: u64,
    /// Steps of the CPU's curve.
    cpu_steps: u64,
    /// Longest row, tokens.
    length: u64,
}

const ON_CARD: Scale =
    Scale { device: "cuda", steps: 240, kill_at: 60, every: 20, cpu_steps: 20, length: 256 };
const ON_CPU: Scale = Scale { device: "cpu", steps: 12, kill_at: 5, every: 2, cpu_steps: 3, length: 64 };

/// Relative difference of a step's losses between the CPU in f32 and the card in bf16: 2^-8 a rounding, over 20 updates.
const CPU_TOLERANCE: f64 = 2e-2;
/// Relative difference of a step's losses between runs on a card whose micro-batches are cut otherwise: each product's sums
/// run in another order before they are rounded to bf16, and AdamW's updates carry that on.
const CUT_TOLERANCE: f64 = 2e-2;
/// The same where micro-batches are cut alike: what a library does otherwise in another process. None was seen.
const SAME_CUT_TOLERANCE: f64 = 1e-5;

struct Line {
    name: &'static str,
    holds: bool,
    said: String,
}

struct Checks {
    scale: Scale,
    program: PathBuf,
    job: PathBuf,
    scratch: tempfile::TempDir,
    lines: Vec<Line>,
}

/// A run's folder and what came of it.
struct Done {
    folder: PathBuf,
    losses: BTreeMap<u64, f64>,
    rows: BTreeMap<u64, Vec<u64>>,
    last: Value,
    seconds: f64,
    /// The median step's tokens a second.
    rate: f64,
}

impl Done {
    fn adapter(&self) -> Result<PathBuf> {
        let name = self.last["adapter"].as_str().context("the run tells its adapter's folder")?;
        Ok(self.folder.join(name))
    }
}

impl Checks {
    /// The program in a folder of its own.
    fn place(&self, name: &str) -> Result<Shanty> {
        let folder = self.scratch.path().join(name);
        std::fs::create_dir_all(&folder)?;
        Ok(Shanty::new(&self.program, folder))
    }

    fn start(
        &self,
        shanty: &Shanty,
        command: &str,
        device: &str,
        workers: u32,
        steps: u64,
    ) -> Result<Running> {
        let job = self.job.to_str().context("the job's path is text")?;
        let store = shanty.folder().join("run");
        let settings = [
            format!("cluster.device={device}"),
            format!("checkpoint.store={}", store.display()),
            format!("train.steps={steps}"),
            format!("checkpoint.every_steps={}", self.scale.every),
            format!("data.max_length={}", self.scale.length),
        ];
        let mut arguments: Vec<String> = [command, job].map(str::to_owned).to_vec();
        for setting in settings {
            arguments.extend(["--set".to_owned(), setting]);
        }
        let workers = workers.to_string();
        arguments.extend(["--workers", &workers, "--threads", "2", "--output", "json"].map(str::to_owned));
        shanty.start(&arguments)
    }

    /// A run that nothing disturbs.
    fn straight(&self, name: &str, device: &str, workers: u32, steps: u64) -> Result<Done> {
        let began = Instant::now();
        let shanty = self.place(name)?;
        let finished = self.start(&shanty, "run", device, workers, steps)?.finish()?.expect_code(0)?;
        done(&shanty, finished, began.elapsed())
    }

    fn check(&mut self, name: &'static str, work: impl FnOnce(&Self) -> Result<(bool, String)>) {
        let (holds, said) = match work(self) {
            Ok(result) => result,
            Err(error) => (false, format!("{error:#}")),
        };
        println!("{} {name}: {said}", if holds { "ok  " } else { "FAIL" });
        self.lines.push(Line { name, holds, said });
    }
}

fn done(shanty: &Shanty, finished: Finished, took: Duration) -> Result<Done> {
    let last = finished.events().pop().context("nothing was printed")?;
    ensure!(last["state"] == "succeeded", "the run ended so: {last}");
    let mut rates: Vec<f64> =
        finished.events_of("step").iter().filter_map(|event| event["tokens_per_second"].as_f64()).collect();
    rates.sort_by(f64::total_cmp);
    let rate = rates.get(rates.len() / 2).copied().unwrap_or(f64::NAN);
    let rows = rows::trained(&rows::read(&shanty.folder().join("run"))?);
    Ok(Done {
        folder: shanty.folder().to_owned(),
        losses: finished.losses(),
        rows,
        last,
        seconds: took.as_secs_f64(),
        rate,
    })
}

/// Largest relative difference of two runs' losses, step by step.
fn apart(one: &BTreeMap<u64, f64>, other: &BTreeMap<u64, f64>, steps: u64) -> Result<f64> {
    let mut largest = 0.0_f64;
    for step in 1..=steps {
        let loss = |losses: &BTreeMap<u64, f64>| losses.get(&step).copied().context("a step was not told");
        let (one, other) = (loss(one)?, loss(other)?);
        ensure!(one.is_finite() && other.is_finite(), "step {step} has no loss");
        largest = largest.max((one / other - 1.0).abs());
    }
    Ok(largest)
}

/// Each step of the final lineage was trained on the rows of the undisturbed run, each once.
fn same_rows(disturbed: &Done, straight: &Done) -> Result<()> {
    ensure!(disturbed.rows.len() == straight.rows.len(), "{} steps were applied", disturbed.rows.len());
    for (step, rows) in &straight.rows {
        // An epoch's last batch may be short.
        ensure!(rows.windows(2).all(|pair| pair[0] < pair[1]), "step {step} was trained on a row twice");
        ensure!(disturbed.rows.get(step) == Some(rows), "step {step} was trained on other rows");
    }
    Ok(())
}

/// Process ids of a run's workers.
fn workers(running: &Running, count: usize) -> Result<Vec<u32>> {
    wait::until("the workers", process::PATIENCE, || {
        let children = running.descendants();
        Ok((children.len() >= count).then_some(children))
    })
}

/// Devices that members of a run say they have.
fn devices(shanty: &Shanty) -> Result<Vec<String>> {
    let logs = shanty.folder().join("run/logs");
    let mut devices = Vec::new();
    for entry in std::fs::read_dir(&logs)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("worker-"))
            && path.extension().is_some_and(|extension| extension == "jsonl")
        {
            let text = std::fs::read_to_string(&path)?;
            let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            devices.extend(lines.filter_map(|line| device_in(&line)));
        }
    }
    Ok(devices)
}

/// The engine's device, wherever a log line's fields lie.
fn device_in(line: &Value) -> Option<String> {
    let fields = [line, &line["fields"]];
    fields.iter().find_map(|fields| Some(fields["engine_device"].as_str()?.to_owned()))
}

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let program = arguments.next().context("gpu_crew SHANTY REPOSITORY [RESULT.json]")?;
    let repository = arguments.next().context("gpu_crew SHANTY REPOSITORY [RESULT.json]")?;
    let result = arguments.next();
    let scale =
        if arguments.next().is_some_and(|device| device.as_os_str() == "cpu") { ON_CPU } else { ON_CARD };
    let program =
        std::fs::canonicalize(&program).with_context(|| format!("failed to find `{}`", program.display()))?;
    let job = std::fs::canonicalize(repository.join("examples/shakespeare/job.toml"))?;
    let mut checks = Checks { scale, program, job, scratch: tempfile::tempdir()?, lines: Vec::new() };
    run(&mut checks);
    let failed = checks.lines.iter().filter(|line| !line.holds).count();
    println!("\n| worker processes on a card | | |\n| --- | --- | --- |");
    for Line { name, holds, said } in &checks.lines {
        println!("| {name} | {} | {said} |", if *holds { "holds" } else { "**FAILS**" });
    }
    println!("{} checks, {failed} failed", checks.lines.len());
    if let Some(result) = result {
        let lines: Vec<Value> = checks
            .lines
            .iter()
            .map(|line| json!({"name": line.name, "holds": line.holds, "said": line.said}))
            .collect();
        std::fs::write(result, serde_json::to_string_pretty(&lines)?)?;
    }
    ensure!(failed == 0, "{failed} checks failed");
    Ok(())
}

fn run(checks: &mut Checks) {
    let Scale { device, steps, kill_at, cpu_steps, .. } = checks.scale;
    let mut alone = None;
    checks.check("`auto` takes the card and trains the example", |checks| {
        let done = checks.straight("auto", "auto", 1, steps)?;
        let names = devices(&checks.place("auto")?)?;
        let on_card = !names.is_empty() && names.iter().all(|name| name.starts_with(device));
        let said = format!(
            "on {names:?}: loss {:.3} to {:.3} in {steps} steps, {:.1} s in all, {:.0} tokens/s at the median step",
            done.losses.get(&1).copied().unwrap_or(f64::NAN),
            done.losses.get(&steps).copied().unwrap_or(f64::NAN),
            done.seconds,
            done.rate
        );
        let learned = done.losses.get(&steps) < done.losses.get(&1);
        alone = Some(done);
        Ok((on_card && learned, said))
    });
    let Some(alone) = alone else { return };
    checks.check("its first steps are the CPU's", |checks| {
        let cpu = checks.straight("cpu", "cpu", 1, cpu_steps)?;
        // The schedule depends on the number of steps: the card trains as many.
        let card = checks.straight("card-short", device, 1, cpu_steps)?;
        let apart = apart(&card.losses, &cpu.losses, cpu_steps)?;
        Ok((apart <= CPU_TOLERANCE, format!("losses at most {apart:.1e} apart, of {CPU_TOLERANCE:.0e}")))
    });
    for (name, label, count) in
        [("two", "two workers on one card train as one", 2), ("four", "four workers on one card do too", 4)]
    {
        checks.check(label, |checks| {
            let done = checks.straight(name, device, count, steps)?;
            same_rows(&done, &alone)?;
            let apart = apart(&done.losses, &alone.losses, steps)?;
            let weights = adapter::largest_difference(&done.adapter()?, &alone.adapter()?)?;
            let said = format!(
                "losses at most {apart:.1e} apart, of {CUT_TOLERANCE:.0e}; weights {weights:.1e}; {:.1} s, {:.0} tokens/s",
                done.seconds, done.rate
            );
            Ok((apart <= CUT_TOLERANCE, said))
        });
    }
    checks.check("kill -9 of one of two: the other goes on", |checks| {
        let began = Instant::now();
        let shanty = checks.place("one-of-two")?;
        let mut running = checks.start(&shanty, "run", device, 2, steps)?;
        running.wait_for_step(kill_at)?;
        process::kill_9(workers(&running, 2)?[1]);
        let finished = running.finish()?.expect_code(0)?;
        let lost = finished.events_of("member_lost");
        ensure!(lost.len() == 1, "{} workers were lost", lost.len());
        let done = done(&shanty, finished, began.elapsed())?;
        same_rows(&done, &alone)?;
        let apart = apart(&done.losses, &alone.losses, steps)?;
        let said = format!(
            "noticed in {} ms, stood for {} ms; every row once; losses at most {apart:.1e} apart",
            lost[0]["detection_ms"], lost[0]["stall_ms"]
        );
        Ok((apart <= CUT_TOLERANCE, said))
    });
    checks.check("kill -9 of the only worker: resumed from its checkpoint", |checks| {
        let shanty = checks.place("only")?;
        let mut running = checks.start(&shanty, "run", device, 1, steps)?;
        running.wait_for_step(kill_at)?;
        process::kill_9(workers(&running, 1)?[0]);
        let ended = running.finish()?;
        ensure!(ended.code() != Some(0), "a run without workers ended well");
        resumed(checks, &shanty, &ended, &alone)
    });
    checks.check("kill -9 of everything: resumed from its checkpoint", |checks| {
        let shanty = checks.place("all")?;
        let mut running = checks.start(&shanty, "run", device, 1, steps)?;
        running.wait_for_step(kill_at)?;
        let ended = running.kill_all()?;
        resumed(checks, &shanty, &ended, &alone)
    });
    checks.check("`cuda` without a card is an error, `auto` takes the CPU", |checks| {
        let blind = checks.place("blind")?.environment("CUDA_VISIBLE_DEVICES", "");
        let refused = checks.start(&blind, "run", "cuda", 1, cpu_steps)?.finish()?;
        let steps = refused.events_of("step").len();
        ensure!(refused.code() != Some(0) && steps == 0, "it trained {steps} steps without a card");
        let codes: Vec<&str> =
            refused.stderr.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| is_code(word)).collect();
        let events = refused.stdout.clone();
        let code = codes.first().copied().map(str::to_owned);
        let code = code.or_else(|| {
            let mut words = events.split(|c: char| !c.is_ascii_alphanumeric());
            words.find(|word| is_code(word)).map(str::to_owned)
        });
        let blind = checks.place("blind-auto")?.environment("CUDA_VISIBLE_DEVICES", "");
        let mut running = checks.start(&blind, "run", "auto", 1, cpu_steps)?;
        running.wait_for_step(1)?;
        running.kill_all()?;
        let names = devices(&blind)?;
        let on_cpu = !names.is_empty() && names.iter().all(|name| name == "cpu");
        let said =
            format!("exit {:?}, {}; auto on {names:?}", refused.code(), code.as_deref().unwrap_or("no code"));
        Ok((code.is_some() && on_cpu, said))
    });
}

fn is_code(word: &str) -> bool {
    word.len() == 6 && word.starts_with("SH08")
}

/// Resumes what was killed, and compares with what ran through.
fn resumed(checks: &Checks, shanty: &Shanty, ended: &Finished, alone: &Done) -> Result<(bool, String)> {
    let told = ended.losses();
    ensure!(told.len() < alone.losses.len(), "it was over before it was killed");
    let began = Instant::now();
    let finished = checks
        .start(shanty, "resume", checks.scale.device, 1, checks.scale.steps)?
        .finish()?
        .expect_code(0)?;
    let mut done = done(shanty, finished, began.elapsed())?;
    let from = done.losses.keys().next().copied().unwrap_or(0);
    ensure!(from > 1, "it began anew");
    let mut losses = told;
    losses.append(&mut done.losses);
    done.losses = losses;
    same_rows(&done, alone)?;
    let apart = apart(&done.losses, &alone.losses, checks.scale.steps)?;
    let bits = adapter::same_bits(&done.adapter()?, &alone.adapter()?)?;
    let bits = if bits { "the adapter has the same bits" } else { "the adapter has other bits" };
    let said =
        format!("on from step {from}; losses at most {apart:.1e} apart, of {SAME_CUT_TOLERANCE:.0e}; {bits}");
    Ok((apart <= SAME_CUT_TOLERANCE, said))
}
