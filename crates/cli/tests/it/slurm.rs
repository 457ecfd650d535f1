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

/// The step of the newest checkpoint.
fn kept(status: &Value) -> u64 {
    let checkpoints = status["checkpoints"].as_array().cloned().unwrap_or_default();
    checkpoints.iter().filter_map(|checkpoint| checkpoint["step"].as_u64()).max().unwrap_or_default()
}

fn place_on(slurm: &Slurm, job: TinyJob) -> Place {
    let conf = slurm.conf().display().to_string();
    Place::new(job)
        .unwrap()
        .environment("SLURM_CONF", &conf)
        .environment("PATH", &Slurm::path())
        .environment("SHANTY_LOG", "warn,shanty_coordinator=info")
}

#[test]
fn a_job_goes_on_after_a_requeue_a_time_limit_and_a_drained_node_and_a_cancelled_one_is_not_requeued() {
    let folder = tempfile::tempdir().unwrap();
    let Some(slurm) = Slurm::start(folder.path(), 2).unwrap() else { return };
    // Its time is up while the other job is looked at: Slurm counts in minutes.
    let endless =
        TinyJob { name: "limited", steps: 1_000_000, every_steps: 0, workers: (1, 1), ..TinyJob::default() };
    let limited = place_on(&slurm, endless);
    let flags = ["--nodes", "1", "--time", "2", "--grace", "40", "--no-requeue"];
    let out_of_time = Allocated::submit(&limited, &flags).unwrap();

    two_nodes_and_a_requeue(&slurm);

    // The time limit is near: drained, with a checkpoint of the last step; without requeue that is the end.
    slurm.wait_for_job(&out_of_time.id, "JobState", &["FAILED", "TIMEOUT"], SLURMS_PATIENCE).unwrap();
    assert_eq!(slurm.job(&out_of_time.id, "ExitCode").unwrap(), "130:0", "{}", out_of_time.output());

    // Handed in again it goes on there.
    let again = Allocated::submit(&limited, &["--nodes", "1"]).unwrap();
    let of_this = |status: &Value| {
        members(status).iter().any(|member| member.starts_with(&format!("slurm-{}-0-", again.id)))
    };
    let goes_on = |status: &Value| of_this(status) && step(status) > kept(status);
    let status = again.wait_for(&slurm, "steps beyond the limit", goes_on).unwrap();
    let first = kept(&status);
    assert!(first > 0, "{status}");
    assert_eq!(status["ledger"]["recomputed"], 0, "{status}");

    // Its node is drained by an administrator: at the next requeue it goes to the other, and goes on there.
    let node = slurm.job(&again.id, "NodeList").unwrap();
    let drain = ["update", &format!("NodeName={node}"), "State=DRAIN", "Reason=test"];
    slurm.ask("scontrol", &drain).unwrap();
    slurm.ask("scancel", &["--signal=TERM", "--batch", &again.id]).unwrap();
    slurm.wait_for_job(&again.id, "Restarts", &["1"], PATIENCE).with_context(|| again.output()).unwrap();
    let goes_on = |status: &Value| of_this(status) && kept(status) > first && step(status) > kept(status);
    let status = again.wait_for(&slurm, "steps on another node", goes_on).unwrap();
    assert_ne!(slurm.job(&again.id, "NodeList").unwrap(), node);
    assert_eq!(status["ledger"]["recomputed"], 0, "{status}");

    // Cancelled by a user it ends with 93, and is not requeued.
    again.ask(&["cancel", "limited"]).unwrap().expect_code(0).unwrap();
    slurm.wait_for_job(&again.id, "JobState", &["FAILED"], PATIENCE).with_context(|| again.output()).unwrap();
    assert_eq!(slurm.job(&again.id, "ExitCode").unwrap(), "93:0", "{}", again.output());
    assert_eq!(slurm.job(&again.id, "Restarts").unwrap(), "1");
}

/// Asked to end, a job on two nodes writes a checkpoint, goes back into the queue, and goes on there to its end, with workers
/// of the same names; nothing is trained twice or left out.
fn two_nodes_and_a_requeue(slurm: &Slurm) {
    let place =
        place_on(slurm, TinyJob { steps: 6_000, every_steps: 0, workers: (2, 2), ..TinyJob::default() });
    let job = Allocated::submit(&place, &["--nodes", "2"]).unwrap();
    let two = |status: &Value| members(status).len() == 2;
    let before = job.wait_for(slurm, "two at work", |status| two(status) && step(status) >= 5).unwrap();
    slurm.ask("scancel", &["--signal=TERM", "--batch", &job.id]).unwrap();
    slurm.wait_for_job(&job.id, "Restarts", &["1"], PATIENCE).with_context(|| job.output()).unwrap();
    let others = |status: &Value| two(status) && members(status) != members(&before);
    let after = job.wait_for(slurm, "two at work again", |status| others(status)).unwrap();
    for status in [&before, &after] {
        for (rank, member) in members(status).iter().enumerate() {
            let place = format!("slurm-{}-{rank}-", job.id);
            assert!(member.starts_with(&place), "{member} is not called after {place}");
        }
    }
    assert!(kept(&after) >= step(&before) && kept(&after) <= step(&after), "{after}");
    slurm
        .wait_for_job(&job.id, "JobState", &["COMPLETED", "FAILED"], SLURMS_PATIENCE)
        .with_context(|| job.output())
        .unwrap();
    assert_eq!(slurm.job(&job.id, "ExitCode").unwrap(), "0:0", "{}", job.output());
    place.check_exactly_once().unwrap();
}
