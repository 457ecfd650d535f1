//! A coordinator and workers as processes of their own, to be killed and started again one by one.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;

use crate::process::{Finished, PATIENCE, Running, Shanty};
use crate::wait;

/// A coordinator and its workers. All are killed when it is dropped.
#[derive(Debug)]
pub struct LocalCluster {
    shanty: Shanty,
    state: PathBuf,
    address: String,
    coordinator: Option<Running>,
    workers: Vec<Running>,
}

impl LocalCluster {
    /// Starts a coordinator with its state in `state`, on a free port.
    pub fn start(shanty: Shanty, state: &Path) -> anyhow::Result<Self> {
        let (coordinator, address) = start_coordinator(&shanty, state, "127.0.0.1:0")?;
        Ok(Self {
            shanty,
            state: state.to_owned(),
            address,
            coordinator: Some(coordinator),
            workers: Vec::new(),
        })
    }

    /// The coordinator, as http://host:port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Starts one more worker; gives its number.
    pub fn add_worker(&mut self) -> anyhow::Result<usize> {
        self.add_worker_with(&[])
    }

    /// Starts one more worker with variables set; gives its number.
    pub fn add_worker_with(&mut self, environment: &[(&str, &str)]) -> anyhow::Result<usize> {
        let mut shanty = self.shanty.clone();
        for (key, value) in environment {
            shanty = shanty.environment(key, value);
        }
        let arguments = ["worker", "--coordinator", &self.address, "--device", "cpu", "--threads", "1"];
        self.workers.push(shanty.start(&arguments)?);
        Ok(self.workers.len() - 1)
    }

    /// A worker's process.
    pub fn worker(&self, number: usize) -> &Running {
        &self.workers[number]
    }

    /// Waits until a worker's process has ended.
    pub fn wait_for_end_of(&mut self, number: usize) -> anyhow::Result<()> {
        let worker = &mut self.workers[number];
        wait::until("the worker to end", PATIENCE, || Ok(worker.has_ended().then_some(())))
    }

    /// `kill -9` of the coordinator, which then starts again on the same address and state.
    pub fn restart_coordinator(&mut self) -> anyhow::Result<()> {
        self.kill_coordinator()?;
        let listen = self.address.trim_start_matches("http://").to_owned();
        let (coordinator, address) = start_coordinator(&self.shanty, &self.state, &listen)?;
        anyhow::ensure!(
            address == self.address,
            "the coordinator came back at {address}, not {}",
            self.address
        );
        self.coordinator = Some(coordinator);
        Ok(())
    }

    /// `kill -9` of the coordinator.
    pub fn kill_coordinator(&mut self) -> anyhow::Result<()> {
        match self.coordinator.take() {
            Some(coordinator) => coordinator.kill_all().map(drop),
            None => Ok(()),
        }
    }

    /// Submits a job; gives its id.
    pub fn submit(&self, job: &Path) -> anyhow::Result<String> {
        let job = job.to_str().context("the job's path is text")?;
        let answer = self.ask(&["submit", job])?.expect_code(0)?.object()?;
        Ok(answer["job"].as_str().context("the answer names the job")?.to_owned())
    }

    /// The job's status.
    pub fn status(&self, job: &str) -> anyhow::Result<Value> {
        self.ask(&["status", job])?.expect_code(0)?.object()
    }

    /// Waits until the job's status is as wanted. While the coordinator is away, there is none.
    pub fn wait_for_status(
        &self,
        job: &str,
        what: &str,
        accept: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        wait::until(what, PATIENCE, || Ok(self.status(job).ok().filter(|status| accept(status))))
            .with_context(|| format!("last status: {:?}", self.status(job).ok()))
    }

    /// Runs a command against the coordinator, with JSON output.
    pub fn ask(&self, arguments: &[&str]) -> anyhow::Result<Finished> {
        let tail = ["--coordinator", &self.address, "--output", "json"];
        self.shanty.run(&[arguments, &tail[..]].concat())
    }
}

fn start_coordinator(shanty: &Shanty, state: &Path, listen: &str) -> anyhow::Result<(Running, String)> {
    let state = state.to_str().context("the state folder's path is text")?;
    let arguments = ["coordinator", "--listen", listen, "--state-dir", state, "--output", "json"];
    let mut coordinator = shanty.start(&arguments)?;
    let event = coordinator.wait_for("the coordinator's address", |event| event["event"] == "listening")?;
    let address = event["address"].as_str().context("the event holds the address")?.to_owned();
    Ok((coordinator, address))
}
