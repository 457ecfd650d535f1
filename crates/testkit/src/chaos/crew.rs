//! The processes, and whoever starts them again.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context;
use serde_json::Value;
use shanty_chaos::process;

use super::sea::Sea;
use crate::process::{Running, Shanty};

/// A service manager's pause before it starts a process again.
const RESTART_AFTER: Duration = Duration::from_millis(100);

/// A coordinator and its workers, all of which are started again when they end.
pub(super) struct Crew {
    shanty: Shanty,
    program: PathBuf,
    pub(super) sea: Option<Sea>,
    state: PathBuf,
    address: String,
    coordinator: Option<Running>,
    slots: Vec<Slot>,
    /// Processes that were struck, so that their end explains itself.
    pub(super) struck: BTreeSet<u32>,
    pub(super) unexplained_exits: u64,
    /// What processes said last that ended without a reason.
    pub(super) last_words: Vec<String>,
}

#[derive(Default)]
struct Slot {
    running: Option<Running>,
    device: Option<u32>,
    restart_at: Option<Instant>,
}

impl Crew {
    /// Starts a coordinator with its state in `state`.
    pub(super) fn start(
        program: &Path,
        folder: &Path,
        state: &Path,
        workers: usize,
        sea: Option<Sea>,
    ) -> anyhow::Result<Self> {
        let host = sea.as_ref().map_or_else(|| "127.0.0.1".to_owned(), |sea| sea.address(None));
        let mut crew = Self {
            shanty: Shanty::new(program, folder),
            program: program.to_owned(),
            sea,
            state: state.to_owned(),
            address: format!("http://{host}:0"),
            coordinator: None,
            slots: (0..workers).map(|_| Slot::default()).collect(),
            struck: BTreeSet::new(),
            unexplained_exits: 0,
            last_words: Vec::new(),
        };
        let mut coordinator = crew.launch_coordinator()?;
        let event =
            coordinator.wait_for("the coordinator's address", |event| event["event"] == "listening")?;
        event["address"].as_str().context("the event holds the address")?.clone_into(&mut crew.address);
        crew.coordinator = Some(coordinator);
        Ok(crew)
    }

    fn launch_coordinator(&self) -> anyhow::Result<Running> {
        let state = self.state.to_str().context("the state folder's path is text")?;
        let listen = self.address.trim_start_matches("http://");
        let mut arguments = vec!["coordinator", "--listen", listen, "--state-dir", state, "--output", "json"];
        if self.sea.is_some() {
            arguments.push("--insecure");
        }
        self.shanty.start(&arguments)
    }

    fn launch_worker(&self, number: usize) -> anyhow::Result<Running> {
        let program = self.program.to_str().context("the program's path is text")?;
        let worker = ["worker", "--coordinator", &self.address, "--device", "cpu", "--threads", "1"];
        match &self.sea {
            None => self.shanty.start(&worker),
            Some(sea) => {
                let (name, address) = (sea.name(number), sea.address(Some(number)));
                let inside = ["netns", "exec", &name, program];
                let bind = ["--bind", &address];
                self.shanty.of("ip").start(&[&inside[..], &worker[..], &bind[..]].concat())
            }
        }
    }

    /// Starts again what has ended.
    pub(super) fn tend(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if self.coordinator.as_mut().is_none_or(|running| running.has_ended()) {
            if let Some(ended) = self.coordinator.take() {
                let pid = ended.pid();
                if !self.struck.remove(&pid) {
                    self.note("the coordinator", ended);
                }
            }
            self.coordinator = Some(self.launch_coordinator()?);
        }
        for number in 0..self.slots.len() {
            let slot = &mut self.slots[number];
            if let Some(running) = &mut slot.running {
                if slot.device.is_none() {
                    slot.device = device_of(running.pid());
                }
                if running.has_ended() {
                    let device = slot.device.take();
                    slot.restart_at = Some(now + RESTART_AFTER);
                    let ended = slot.running.take();
                    let explained = device.is_some_and(|device| self.struck.remove(&device));
                    if let Some(ended) = ended.filter(|_| !explained) {
                        self.unexplained_exits += 1;
                        self.note(&format!("worker {number}"), ended);
                    }
                }
            } else if slot.restart_at.is_none_or(|at| now >= at) {
                let running = self.launch_worker(number)?;
                self.slots[number].running = Some(running);
            }
        }
        Ok(())
    }

    fn note(&mut self, who: &str, ended: Running) {
        let words = match ended.finish() {
            Ok(finished) => {
                let errors = finished.stderr;
                let tail: Vec<&str> = errors.lines().rev().take(3).collect();
                format!("{who} ended with {}: {}", finished.status, tail.join(" | "))
            }
            Err(error) => format!("{who}: {error:#}"),
        };
        self.last_words.push(words);
    }

    /// Device processes that live, by slot.
    pub(super) fn devices(&self) -> Vec<u32> {
        let devices = self.slots.iter().filter_map(|slot| slot.device);
        devices.filter(|device| process::is_alive(*device)).collect()
    }

    /// The coordinator's process, if it lives.
    pub(super) fn coordinator(&self) -> Option<u32> {
        self.coordinator.as_ref().map(Running::pid).filter(|pid| process::is_alive(*pid))
    }

    /// Runs a command against the coordinator; none if that fails, as while the coordinator is away.
    pub(super) fn ask(&self, arguments: &[&str]) -> Option<Value> {
        let tail = ["--coordinator", &self.address, "--output", "json"];
        self.shanty.run(&[arguments, &tail[..]].concat()).ok()?.expect_code(0).ok()?.object().ok()
    }

    /// Ends all of them.
    pub(super) fn end(mut self) -> anyhow::Result<Option<Sea>> {
        for slot in &mut self.slots {
            if let Some(running) = slot.running.take() {
                running.kill_all()?;
            }
        }
        if let Some(coordinator) = self.coordinator.take() {
            coordinator.interrupt();
            coordinator.finish()?;
        }
        Ok(self.sea.take())
    }
}

fn device_of(parent: u32) -> Option<u32> {
    let is_device = |pid: &u32| process::command(*pid).as_deref() == Some("worker-device");
    process::children(parent).into_iter().find(is_device)
}
