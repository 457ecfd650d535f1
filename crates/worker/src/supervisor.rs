//! The parent of a host's device processes. It only spawns and kills.
//!
//! Each child holds the reading end of a pipe from here as its standard input and ends when the pipe closes, so no
//! child outlives its parent, however the parent ended. A child that dies is reported and not replaced: the crew goes
//! on without it, and whoever started the host (a person, an orchestrator) decides about a new one.

use std::{
    ffi::OsString,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::process::{Child, ChildStdin, Command};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::Error;

/// Signals within this time are one request.
const SAME_REQUEST: Duration = Duration::from_secs(1);

/// How to start the process of one device: `shanty worker-device …`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceCommand {
    /// The program, usually this one.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables set for it beside those inherited.
    pub environment: Vec<(OsString, OsString)>,
}

/// What the supervisor runs.
#[derive(Debug, Clone)]
pub struct SupervisorOptions {
    /// One entry a device.
    pub devices: Vec<DeviceCommand>,
    /// How long a child may take to end by itself once it was asked to: it hands back what it holds first.
    pub grace: Duration,
    /// Cancelled to kill children that have not ended yet.
    pub kill: CancellationToken,
}

impl SupervisorOptions {
    /// Runs `devices`, with two minutes to end by themselves.
    pub fn new(devices: Vec<DeviceCommand>) -> Self {
        Self { devices, grace: Duration::from_secs(120), kill: CancellationToken::new() }
    }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChildExit {
    /// Number of the device, from 0.
    pub device: usize,
    /// Its process id.
    pub pid: u32,
    /// How it ended.
    pub status: ExitStatus,
    /// Whether it had been asked to end.
    pub asked: bool,
}

/// A running child and the pipe that keeps it alive.
struct Running {
    device: usize,
    pid: u32,
    child: Child,
    lifeline: Option<ChildStdin>,
}

/// The children of a host, all spawned.
pub struct Supervisor {
    children: Vec<Running>,
    grace: Duration,
    kill: CancellationToken,
}

impl Supervisor {
    /// Spawns all children. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Process`] if one cannot be started; those already started are killed.
    pub fn spawn(options: SupervisorOptions) -> Result<Self, Error> {
        let mut children = Vec::with_capacity(options.devices.len());
        for (device, command) in options.devices.into_iter().enumerate() {
            let fail = |source| Error::Process { what: command.program.display().to_string(), source };
            let mut child = Command::new(&command.program)
                .args(&command.arguments)
                .envs(command.environment.iter().cloned())
                .stdin(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .map_err(fail)?;
            let pid = child.id().unwrap_or_default();
            let lifeline = child.stdin.take();
            info!(device, pid, "device process started");
            children.push(Running { device, pid, child, lifeline });
        }
        Ok(Self { children, grace: options.grace, kill: options.kill })
    }

    /// Process ids of the children, by device.
    pub fn pids(&self) -> Vec<u32> {
        self.children.iter().map(|running| running.pid).collect()
    }

    /// Waits until all children have ended. When `shutdown` is cancelled they are asked to end (SIGTERM), and killed
    /// after the grace.
    pub async fn run(self, shutdown: CancellationToken) -> Vec<ChildExit> {
        let grace = self.grace;
        let ends = self
            .children
            .into_iter()
            .map(|running| watch(running, grace, shutdown.clone(), self.kill.clone()));
        let mut exits: Vec<ChildExit> = futures::future::join_all(ends).await.into_iter().flatten().collect();
        exits.sort_by_key(|exit| exit.device);
        exits
    }
}

/// Whether a host's children ended well: each by itself with success, or because it was asked to.
pub fn ended_well(exits: &[ChildExit]) -> bool {
    exits.iter().all(|exit| exit.asked || exit.status.success())
}

async fn watch(
    mut running: Running,
    grace: Duration,
    shutdown: CancellationToken,
    kill: CancellationToken,
) -> Option<ChildExit> {
    let (device, pid) = (running.device, running.pid);
    let by_itself = tokio::select! {
        status = running.child.wait() => Some(status),
        () = shutdown.cancelled() => None,
    };
    let asked = by_itself.is_none();
    let status = match by_itself {
        Some(status) => status,
        None => stop(&mut running, grace, &kill).await,
    };
    match status {
        Ok(status) => {
            if asked || status.success() {
                info!(device, pid, %status, "device process ended");
            } else {
                warn!(device, pid, %status, "device process died");
            }
            Some(ChildExit { device, pid, status, asked })
        }
        Err(error) => {
            warn!(device, pid, %error, "device process could not be waited for");
            None
        }
    }
}

async fn stop(
    running: &mut Running,
    grace: Duration,
    kill: &CancellationToken,
) -> std::io::Result<ExitStatus> {
    let pid = i32::try_from(running.pid).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid.filter(|_| running.child.id().is_some()) {
        // If it ended meanwhile there is nobody to ask: `wait` below tells.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    tokio::select! {
        status = running.child.wait() => return status,
        () = tokio::time::sleep(grace) => {}
        () = kill.cancelled() => {}
    }
    running.lifeline = None;
    running.child.start_kill()?;
    running.child.wait().await
}

/// Ends this process at once when its standard input closes: the parent is gone.
///
/// # Errors
/// [`Error::Process`] if the thread that watches cannot be started.
pub fn end_with_parent() -> Result<(), Error> {
    let watch = || {
        let mut input = std::io::stdin().lock();
        // Whatever the parent may write is passed over; only the end counts.
        let _ = std::io::copy(&mut input, &mut std::io::sink());
        #[expect(clippy::exit, reason = "nobody is left to report to, and a collective may hang")]
        std::process::exit(1);
    };
    std::thread::Builder::new()
        .name("lifeline".to_owned())
        .spawn(watch)
        .map(|_| ())
        .map_err(|source| Error::Process { what: "the thread that watches the parent".to_owned(), source })
}

/// A token that is cancelled when the process is asked to end: by SIGINT (ctrl-c) or SIGTERM.
///
/// # Errors
/// [`Error::Process`] if the signals cannot be listened for.
pub fn shutdown_on_signals() -> Result<CancellationToken, Error> {
    Ok(signals()?.first)
}

/// What the process was asked by SIGINT (ctrl-c) or SIGTERM.
#[derive(Debug, Clone)]
pub struct Signals {
    /// To end, when it has put down what it holds.
    pub first: CancellationToken,
    /// To end at once: it was asked again. A terminal asks parent and child together, and the parent asks its child: what
    /// comes within a second counts as one.
    pub again: CancellationToken,
}

/// Tokens that are cancelled when the process is asked to end.
///
/// # Errors
/// [`Error::Process`] if the signals cannot be listened for.
pub fn signals() -> Result<Signals, Error> {
    use tokio::signal::unix::{SignalKind, signal};

    let fail = |source| Error::Process { what: "the signal handler".to_owned(), source };
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fail)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(fail)?;
    let signals = Signals { first: CancellationToken::new(), again: CancellationToken::new() };
    let Signals { first, again } = signals.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => info!("interrupted"),
            _ = terminate.recv() => info!("asked to end"),
        }
        let asked = tokio::time::Instant::now();
        first.cancel();
        while asked.elapsed() < SAME_REQUEST {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        info!("asked again");
        again.cancel();
    });
    Ok(signals)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> DeviceCommand {
        DeviceCommand {
            program: "/bin/sh".into(),
            arguments: ["-c".into(), script.into()].to_vec(),
            environment: Vec::new(),
        }
    }

    #[tokio::test]
    async fn children_that_end_are_reported_with_their_status() {
        let supervisor =
            Supervisor::spawn(SupervisorOptions::new(vec![shell("exit 0"), shell("exit 3")])).unwrap();
        let exits = supervisor.run(CancellationToken::new()).await;
        assert_eq!(exits.iter().map(|exit| exit.status.code()).collect::<Vec<_>>(), [Some(0), Some(3)]);
        assert!(!ended_well(&exits));
    }

    #[tokio::test]
    async fn a_child_that_ignores_the_request_is_killed() {
        let mut options = SupervisorOptions::new(vec![shell("trap '' TERM; while :; do sleep 0.05; done")]);
        options.grace = Duration::from_millis(200);
        let supervisor = Supervisor::spawn(options).unwrap();
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        let exits = supervisor.run(shutdown).await;
        assert!(exits[0].asked);
        assert!(!exits[0].status.success());
    }

    #[tokio::test]
    async fn a_child_that_reads_its_lifeline_ends_when_the_parent_drops_it() {
        let mut supervisor =
            Supervisor::spawn(SupervisorOptions::new(vec![shell("cat > /dev/null; exit 7")])).unwrap();
        supervisor.children[0].lifeline = None;
        let exits = supervisor.run(CancellationToken::new()).await;
        assert_eq!(exits[0].status.code(), Some(7));
    }

    #[tokio::test]
    async fn a_program_that_does_not_exist_is_named() {
        let command = DeviceCommand { program: "/no/such/program".into(), ..shell("") };
        let error = Supervisor::spawn(SupervisorOptions::new(vec![command])).err().unwrap();
        assert!(error.to_string().contains("/no/such/program"), "{error}");
    }
}
