//! The worker processes of a run. They are children of this process and die with it.

use std::{
    fs::{self, File},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use shanty_peft_core::backend::cuda;
use tokio::{
    process::{Child, ChildStdin, Command},
    time::timeout,
};

use shanty_access::Secret;
use shanty_config::env_vars::SHANTY_TOKEN;

use crate::{error::Error, failure::CommandResult};

/// How long workers may take to end by themselves: a step, and a checkpoint after it.
const GRACE: Duration = Duration::from_secs(120);

/// What workers are started with.
#[derive(Debug, Clone)]
pub(crate) struct CrewOptions {
    pub(crate) coordinator: String,
    /// Lets them work for this run's job, and do nothing else.
    pub(crate) token: Secret,
    pub(crate) workers: u32,
    pub(crate) threads: usize,
    /// Workers take turns with them.
    pub(crate) devices: Vec<String>,
    /// Logs and row logs go below it.
    pub(crate) store: PathBuf,
}

impl CrewOptions {
    /// The device of a worker.
    fn device(&self, number: u32) -> String {
        let turn = number as usize % self.devices.len().max(1);
        self.devices.get(turn).cloned().unwrap_or_else(|| "cpu".to_owned())
    }

    /// What one of several workers of a card may take of it: their share of what is free, so that each plans with what it
    /// will get. One alone takes what it finds.
    fn memory(&self, device: &str) -> Option<u64> {
        let index = device.strip_prefix("cuda:")?.parse().ok()?;
        let sharers = (0..self.workers).filter(|number| self.device(*number) == device).count() as u64;
        // Beside what a step takes, each process has a context and kernels there.
        const OWN: u64 = 1 << 30;
        let free = cuda::free_bytes(index).filter(|_| sharers > 1)?;
        Some((free / 100 * 96 / sharers).saturating_sub(OWN))
    }
}

/// The worker processes of a run.
pub(crate) struct Crew {
    members: Vec<Hand>,
}

struct Hand {
    number: u32,
    child: Child,
    /// The child ends when this pipe closes, however this process ends.
    lifeline: Option<ChildStdin>,
    ended: Option<ExitStatus>,
}

impl Crew {
    /// Starts all workers.
    pub(crate) fn start(options: &CrewOptions) -> CommandResult<Self> {
        let program = std::env::current_exe().map_err(|source| Error::Start { what: "a worker", source })?;
        let logs = options.store.join("logs");
        fs::create_dir_all(&logs).map_err(|source| Error::File {
            action: "create",
            path: logs.clone(),
            source,
        })?;
        let members = (0..options.workers).map(|number| start(number, &program, &logs, options));
        Ok(Self { members: members.collect::<CommandResult<_>>()? })
    }

    /// Waits until a worker ends; says which and how. Pending once none is left.
    pub(crate) async fn next_end(&mut self) -> (u32, String) {
        let living = self.members.iter_mut().filter(|hand| hand.ended.is_none());
        let mut ends: Vec<_> = living.map(|hand| Box::pin(hand.wait())).collect();
        if ends.is_empty() {
            drop(ends);
            return std::future::pending().await;
        }
        let (end, _, _) = futures::future::select_all(ends.drain(..)).await;
        end
    }

    /// Whether all workers have ended.
    pub(crate) fn is_gone(&self) -> bool {
        self.members.iter().all(|hand| hand.ended.is_some())
    }

    /// Asks all workers to end, waits for them, and kills those that do not.
    pub(crate) async fn stop(&mut self) {
        for hand in self.members.iter().filter(|hand| hand.ended.is_none()) {
            hand.signal(Signal::TERM);
        }
        let ends = self.members.iter_mut().filter(|hand| hand.ended.is_none()).map(Hand::wait);
        let _ = timeout(GRACE, futures::future::join_all(ends)).await;
        self.kill();
    }

    /// Kills all workers.
    pub(crate) fn kill(&mut self) {
        for hand in self.members.iter_mut().filter(|hand| hand.ended.is_none()) {
            hand.lifeline = None;
            // Gone already: then there is nothing to kill.
            let _ = hand.child.start_kill();
        }
    }
}

fn start(number: u32, program: &Path, logs: &Path, options: &CrewOptions) -> CommandResult<Hand> {
    let errors = logs.join(format!("worker-{number}.stderr"));
    let file = File::options().create(true).append(true).open(&errors).map_err(|source| Error::File {
        action: "write",
        path: errors,
        source,
    })?;
    let device = options.device(number);
    let mut child = Command::new(program)
        .arg("worker-device")
        .args(["--coordinator", &options.coordinator])
        .args(["--device", &device])
        .args(["--threads", &options.threads.to_string()])
        .args(options.memory(&device).iter().flat_map(|bytes| ["--memory".to_owned(), bytes.to_string()]))
        .arg("--log-file")
        .arg(logs.join(format!("worker-{number}.jsonl")))
        // Not an argument: those can be read by everybody on the machine.
        .env(SHANTY_TOKEN, options.token.expose())
        // Ctrl-C is for this process; it asks the workers itself.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(file)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| Error::Start { what: "a worker", source })?;
    let lifeline = child.stdin.take();
    Ok(Hand { number, child, lifeline, ended: None })
}

impl Hand {
    async fn wait(&mut self) -> (u32, String) {
        let text = match self.child.wait().await {
            Ok(status) => {
                self.ended = Some(status);
                how(status)
            }
            Err(error) => {
                self.ended = Some(ExitStatus::from_raw(0));
                format!("cannot be waited for: {error}")
            }
        };
        (self.number, text)
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It may have ended meanwhile; `wait` tells.
            let _ = kill_process(pid, signal);
        }
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "ended".to_owned(),
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(9)) => {
            "was killed (signal 9; by a person, or by the system when memory ran out)".to_owned()
        }
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_take_turns_with_the_cards() {
        let options = |devices: &[&str]| CrewOptions {
            coordinator: String::new(),
            workers: 3,
            threads: 1,
            devices: devices.iter().map(|device| (*device).to_owned()).collect(),
            store: PathBuf::new(),
            token: Secret::new("shanty-of-nobody"),
        };
        let turns =
            |devices: &[&str]| (0..3).map(|number| options(devices).device(number)).collect::<Vec<_>>();
        assert_eq!(turns(&["cuda:0", "cuda:1"]), ["cuda:0", "cuda:1", "cuda:0"]);
        assert_eq!(turns(&["cpu"]), ["cpu", "cpu", "cpu"]);
        // The memory of the CPU is divided by nobody here, and one worker of a card takes what it finds.
        assert_eq!(options(&["cpu"]).memory("cpu"), None);
        assert_eq!(options(&["cuda:0", "cuda:1", "cuda:2"]).memory("cuda:1"), None);
    }
}
