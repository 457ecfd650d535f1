//! Jobs on a real Slurm of two nodes: handed in, asked to end, requeued, out of time, on a drained node, cancelled.

use std::{fs, path::Path, time::Duration};

use anyhow::Context;
use serde_json::Value;
use shanty_testkit::{Shanty, Slurm, TinyJob, process::PATIENCE, wait};

use crate::support::Place;

/// Longer than any of Slurm's own clocks: time limits are looked at every half minute.
const SLURMS_PATIENCE: Duration = Duration::from_secs(150);

/// A job that Slurm runs, and the commands that look at it.
struct Allocated {
    id: String,
    name: &'static str,
    shanty: Shanty,
    folder: std::path::PathBuf,
}

impl Allocated {
    fn submit(place: &Place, flags: &[&str]) -> anyhow::Result<Self> {
        let arguments = ["submit", "job.toml", "--engine", "slurm", "--output", "json"];
        let answer = place.shanty.run(&[&arguments[..], flags].concat())?.expect_code(0)?.object()?;
        let id = answer["slurm_job"].as_str().context("the answer names Slurm's job")?.to_owned();
        let folder = Path::new(answer["script"].as_str().context("and its script")?)
            .parent()
            .context("in a folder")?;
        Ok(Self { id, name: place.job.name, shanty: place.shanty.clone(), folder: folder.to_owned() })
    }

    /// Once its coordinator runs: the variables by which commands reach it.
    fn ask(&self, arguments: &[&str]) -> anyhow::Result<shanty_testkit::Finished> {
        let text = fs::read_to_string(self.folder.join("environment"))?;
        let mut shanty = self.shanty.clone();
        for pair in text.trim().trim_start_matches("export ").split_whitespace() {
            let (key, value) = pair.split_once('=').context("KEY=VALUE")?;
            shanty = shanty.environment(key, value.trim_matches('\''));
        }
        shanty.run(&[arguments, &["--output", "json"]].concat())
    }

    fn wait_for(&self, slurm: &Slurm, what: &str, accept: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        wait::until(what, SLURMS_PATIENCE, || {
            let status = self.ask(&["status", self.name]).and_then(|finished| finished.object());
            Ok(status.ok().filter(|status| accept(status)))
        })
        .with_context(|| {
            format!("{:?}\n{}\n{}", self.ask(&["status", self.name]).ok(), self.output(), slurm.logs())
        })
    }

    /// What the batch script printed.
    fn output(&self) -> String {
        fs::read_to_string(self.folder.join(format!("slurm-{}.out", self.id))).unwrap_or_default()
    }
}

/// Names of the workers that are at work.
fn members(status: &Value) -> Vec<String> {
    let members = status["members"].as_array().cloned().unwrap_or_default();
    let at_work = |member: &&Value| member["rank"].is_number() && member["reason"].is_null();
    let mut names: Vec<String> = members
        .iter()
        .filter(at_work)
        .filter_map(|member| member["worker"].as_str().map(str::to_owned))
        .collect();
    names.sort();
    names
}

fn step(status: &Value) -> u64 {
    status["step"].as_u64().unwrap_or_default()
}

fn place_on(slurm: &Slurm, job: TinyJob) -> Place {
    let conf = slurm.conf().display().to_string();
    Place::new(job).unwrap().environment("SLURM_CONF", &conf).environment("PATH", &Slurm::path())
}

#[test]
fn a_job_goes_on_through_a_requeue_a_drained_node_and_a_time_limit_and_is_not_requeued_once_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let Some(slurm) = Slurm::start(folder.path(), 2).unwrap() else { return };
    let endless =
        TinyJob { name: "limited", steps: 1_000_000, every_steps: 0, workers: (1, 1), ..TinyJob::default() };
    let limited = place_on(&slurm, endless);
    let flags = ["--nodes", "1", "--time", "2", "--grace", "40", "--no-requeue"];
    let out_of_time = Allocated::submit(&limited, &flags).unwrap();

    let place =
        place_on(&slurm, TinyJob { steps: STEPS, every_steps: 0, workers: (1, 2), ..TinyJob::default() });
    let job = Allocated::submit(&place, &["--nodes", "1-2"]).unwrap();
    let two = |status: &Value| members(status).len() == 2;
    let status = job.wait_for(&slurm, "two at work", |status| two(status) && step(status) >= 20).unwrap();
    let prefixes = [format!("slurm-{}-0-", job.id), format!("slurm-{}-1-", job.id)];
    for (member, prefix) in members(&status).iter().zip(&prefixes) {
        assert!(member.starts_with(prefix), "{member} is not called after {prefix}");
    }

    // Asked to end: it writes a checkpoint, goes back into the queue, and goes on there, with workers of the same names.
    slurm.ask("scancel", &["--signal=TERM", "--batch", &job.id]).unwrap();
    slurm.wait_for_job(&job.id, "Restarts", &["1"], PATIENCE).with_context(|| job.output()).unwrap();
    let again = |status: &Value| two(status) && status["generation"].as_u64() > Some(1) && step(status) > 20;
    let before = status;
    let status = job
        .wait_for(&slurm, "two at work again", |status| again(status) && members(status) != members(&before));
    let status = status.unwrap();
    let kept = status["checkpoints"][0]["step"].as_u64().unwrap();
    assert!(kept >= step(&before) && kept <= step(&status), "{status}");
    for (member, prefix) in members(&status).iter().zip(&prefixes) {
        assert!(member.starts_with(prefix), "{member} is not recognised as {prefix}");
    }

    // A node that an administrator drains is left at the next requeue, and the job goes on with one worker.
    slurm.ask("scontrol", &["update", "NodeName=n2", "State=DRAIN", "Reason=test"]).unwrap();
    slurm.ask("scancel", &["--signal=TERM", "--batch", &job.id]).unwrap();
    slurm.wait_for_job(&job.id, "Restarts", &["2"], PATIENCE).unwrap();
    job.wait_for(&slurm, "one at work", |status| members(status).len() == 1 && step(status) > kept).unwrap();
    assert_eq!(slurm.job(&job.id, "NodeList").unwrap(), "n1");

    // Nothing is trained twice or left out, over three allocations.
    slurm
        .wait_for_job(&job.id, "JobState", &["COMPLETED", "FAILED"], SLURMS_PATIENCE)
        .with_context(|| job.output())
        .unwrap();
    assert_eq!(slurm.job(&job.id, "ExitCode").unwrap(), "0:0", "{}", job.output());
    place.check_exactly_once().unwrap();

    // The time limit is near: drained, with a checkpoint of the last step; without --requeue that is the end.
    slurm.wait_for_job(&out_of_time.id, "JobState", &["FAILED", "TIMEOUT"], SLURMS_PATIENCE).unwrap();
    assert_eq!(slurm.job(&out_of_time.id, "ExitCode").unwrap(), "130:0", "{}", out_of_time.output());
    slurm.ask("scontrol", &["update", "NodeName=n2", "State=RESUME"]).unwrap();

    // Handed in again it goes on there; cancelled by a user, it ends with 93 and is not requeued.
    let again = Allocated::submit(&limited, &["--nodes", "1"]).unwrap();
    let status = again.wait_for(&slurm, "steps beyond the limit", |status| {
        members(status).iter().any(|member| member.starts_with(&format!("slurm-{}-", again.id)))
            && step(status) > 0
    });
    let status = status.unwrap();
    let kept = status["checkpoints"][0]["step"].as_u64().expect("it was kept at the limit");
    assert!(kept > 0 && step(&status) >= kept, "{status}");
    assert_eq!(status["ledger"]["recomputed"], 0, "{status}");
    again.ask(&["cancel", "limited"]).unwrap().expect_code(0).unwrap();
    slurm.wait_for_job(&again.id, "JobState", &["FAILED"], PATIENCE).with_context(|| again.output()).unwrap();
    assert_eq!(slurm.job(&again.id, "ExitCode").unwrap(), "93:0", "{}", again.output());
    assert_eq!(slurm.job(&again.id, "Restarts").unwrap(), "0");
}

/// Steps that take longer than what is done to the job meanwhile.
const STEPS: u64 = 3_000;
