//! Kinds of faults, and those that are made with signals.

use std::{
    str::FromStr,
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::Duration,
};

use rustix::process::Signal;

use crate::{
    error::{Error, Result},
    process,
};

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// `kill -9` of a worker.
    Kill,
    /// A worker stands still (SIGSTOP) and goes on later.
    Stop,
    /// A worker's link is cut and comes back later.
    Partition,
    /// A worker gets a fraction of its time.
    Slow,
    /// `kill -9` of the coordinator.
    Coordinator,
    /// The disk of the run is full for a while.
    DiskFull,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Kill, Self::Stop, Self::Partition, Self::Slow, Self::Coordinator, Self::DiskFull];

    /// Its name, as commands take and print it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Partition => "partition",
            Self::Slow => "slow",
            Self::Coordinator => "coordinator",
            Self::DiskFull => "disk-full",
        }
    }

    /// Whether it strikes a worker.
    pub fn strikes_a_worker(self) -> bool {
        !matches!(self, Self::Coordinator | Self::DiskFull)
    }
}

impl FromStr for Fault {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|fault| fault.as_str() == name);
        found.ok_or_else(|| Error::UnknownFault { name: name.to_owned() })
    }
}

type Undo = Box<dyn FnOnce() -> Result<()> + Send>;

/// A fault that lasts until it is healed or dropped.
#[must_use = "a blow that is dropped is healed at once"]
pub struct Blow {
    undo: Option<Undo>,
}

impl std::fmt::Debug for Blow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blow").field("lasts", &self.undo.is_some()).finish()
    }
}

impl Blow {
    pub(crate) fn new(undo: impl FnOnce() -> Result<()> + Send + 'static) -> Self {
        Self { undo: Some(Box::new(undo)) }
    }

    /// Undoes it.
    ///
    /// # Errors
    /// What could not be undone. A process that is gone meanwhile is no error.
    pub fn heal(mut self) -> Result<()> {
        self.undo.take().map_or(Ok(()), |undo| undo())
    }
}

impl Drop for Blow {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take() {
            // Nobody is there to be told.
            let _ = undo();
        }
    }
}

/// `kill -9`.
///
/// # Errors
/// [`Error::Process`]
pub fn kill(pid: u32) -> Result<()> {
    process::signal(pid, Signal::KILL, "kill")
}

/// Stops a process until the blow is healed.
///
/// # Errors
/// [`Error::Process`]
pub fn stop(pid: u32) -> Result<Blow> {
    process::signal(pid, Signal::STOP, "stop")?;
    Ok(Blow::new(move || {
        // Killed meanwhile: then it need not go on.
        let _ = process::signal(pid, Signal::CONT, "continue");
        Ok(())
    }))
}

/// Lets a process run for `share` of the time, in turns of 100 milliseconds, until the blow is healed.
///
/// # Errors
/// [`Error::Process`]
pub fn slow(pid: u32, share: f64) -> Result<Blow> {
    const TURN: Duration = Duration::from_millis(100);
    process::signal(pid, Signal::CONT, "continue")?;
    let share = share.clamp(0.01, 1.0);
    let (over, wait) = channel::<()>();
    let turns = move || {
        loop {
            for (signal, time) in
                [(Signal::STOP, TURN.mul_f64(1.0 - share)), (Signal::CONT, TURN.mul_f64(share))]
            {
                if process::signal(pid, signal, "slow down").is_err() {
                    return;
                }
                if wait.recv_timeout(time) != Err(RecvTimeoutError::Timeout) {
                    let _ = process::signal(pid, Signal::CONT, "continue");
                    return;
                }
            }
        }
    };
    let thread = std::thread::Builder::new()
        .name("slow".to_owned())
        .spawn(turns)
        .map_err(|source| Error::Process { action: "slow down", pid, source })?;
    Ok(Blow::new(move || end(over, thread)))
}

fn end(over: Sender<()>, thread: JoinHandle<()>) -> Result<()> {
    drop(over);
    // A thread that panicked sends no more signals either.
    let _ = thread.join();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("600").spawn().unwrap()
    }

    fn becomes(pid: u32, state: char) -> bool {
        (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(2));
            process::state(pid) == Some(state)
        })
    }

    #[test]
    fn names_are_read_back() {
        for fault in Fault::ALL {
            assert_eq!(fault.as_str().parse::<Fault>().unwrap(), fault);
        }
        assert!("flood".parse::<Fault>().is_err());
    }

    #[test]
    fn a_stopped_process_goes_on_when_healed_or_dropped() {
        let mut child = sleeper();
        let blow = stop(child.id()).unwrap();
        assert!(becomes(child.id(), 'T'));
        blow.heal().unwrap();
        assert!(becomes(child.id(), 'S'));
        drop(stop(child.id()).unwrap());
        assert!(becomes(child.id(), 'S'));
        kill(child.id()).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(kill(child.id()).is_err(), "a process that is gone cannot be killed");
    }

    #[test]
    fn a_slowed_process_stands_still_in_turns_and_is_free_afterwards() {
        let mut child = sleeper();
        let blow = slow(child.id(), 0.5).unwrap();
        assert!(becomes(child.id(), 'T') && becomes(child.id(), 'S') && becomes(child.id(), 'T'));
        blow.heal().unwrap();
        assert!(becomes(child.id(), 'S'));
        assert!(!becomes(child.id(), 'T'), "nobody stops it any more");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
