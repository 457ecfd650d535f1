//! Checkpoints, written by a thread of their own while steps go on.
//!
//! A step hands a copy of the state over and goes on; it never waits for a disk or a store. One checkpoint is written at a
//! time. If the next is due before that, it waits on the tray; if yet another comes, it takes the waiting one's place: a
//! store that is slower than checkpoints are due gets every other one, and never more than two are in memory.
//! What fails for a reason that may pass is tried again; then the job goes on with the checkpoints that it has.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use shanty_checkpoint::{Blocking, Keep, Snapshot, WritePoint};
use shanty_diagnostic::{Diagnose, Diagnostic, Kind};
use shanty_proto::v1::{CheckpointFailed, CheckpointWritten, worker_message::Message};
use tokio::sync::mpsc::UnboundedSender;
use tracing::{info, warn};

use crate::{
    Error,
    control::Control,
    failpoint::{Failpoints, Place, Point},
};

use super::{Stop, Surroundings, keep::Draft};

/// How often a wait for the writer looks whether the generation was left.
const LOOK: Duration = Duration::from_millis(20);
/// How often a checkpoint is tried.
const TRIES: u32 = 4;
/// The pause after the first try; each later one is twice as long.
const PAUSE: Duration = Duration::from_millis(500);

/// The thread that writes checkpoints, once there was one to write.
#[derive(Default)]
pub(crate) struct Checkpoints {
    desk: Option<Desk>,
}

struct Desk {
    tray: Arc<Tray>,
    writer: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Tray {
    papers: Mutex<Papers>,
    changed: Condvar,
}

#[derive(Default)]
struct Papers {
    next: Option<(Ticket, Draft)>,
    busy: bool,
    closed: bool,
    /// A failpoint's simulated death.
    died: Option<Error>,
}

impl Tray {
    fn lock(&self) -> MutexGuard<'_, Papers> {
        // What lies there is whole after any panic.
        self.papers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a writer uses of its worker.
pub(super) struct Ticket {
    pub(super) job: String,
    pub(super) attempt: u32,
    pub(super) control: Arc<Control>,
    pub(super) reports: UnboundedSender<Message>,
    pub(super) failpoints: Failpoints,
    pub(super) place: Place,
    /// A folder or a URL.
    pub(super) store: String,
    /// How many checkpoints stay.
    pub(super) keep: Keep,
    /// How long the step was held up for the copy.
    pub(super) held: Duration,
}

impl Checkpoints {
    /// Hands a checkpoint to the writer, which may still be at work on the one before.
    pub(super) fn begin(&mut self, ticket: Ticket, draft: Draft) -> Result<(), Error> {
        let desk = match &mut self.desk {
            Some(desk) => desk,
            empty => empty.insert(Desk::new()?),
        };
        let mut papers = desk.tray.lock();
        let passed_over = papers.next.replace((ticket, draft));
        drop(papers);
        desk.tray.changed.notify_all();
        if let Some((ticket, draft)) = passed_over {
            ticket.pass_over(&draft);
        }
        Ok(())
    }

    /// Waits until nothing is being written, but not beyond the generation: the write goes on without it.
    pub(super) fn wait_or_leave(&mut self, around: &Surroundings, generation: u64) -> Result<(), Stop> {
        let Some(desk) = &self.desk else { return Ok(()) };
        loop {
            let papers = desk.tray.lock();
            let mut papers = desk
                .tray
                .changed
                .wait_timeout_while(papers, LOOK, |papers| papers.is_at_work())
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if let Some(error) = papers.died.take() {
                return Err(error.into());
            }
            if !papers.is_at_work() {
                return Ok(());
            }
            drop(papers);
            if desk.writer.as_ref().is_none_or(JoinHandle::is_finished) {
                let source = std::io::Error::other("it ended unexpectedly");
                let what = "the thread that writes checkpoints".to_owned();
                return Err(Error::Process { what, source }.into());
            }
            around.control.check(generation)?;
        }
    }

    /// Waits until all that was handed over is written or given up.
    pub(crate) fn wait(&mut self) {
        // Dropping the desk waits.
        self.desk = None;
    }
}

impl Papers {
    fn is_at_work(&self) -> bool {
        (self.busy || self.next.is_some()) && self.died.is_none()
    }
}

impl Desk {
    fn new() -> Result<Self, Error> {
        let tray = Arc::new(Tray::default());
        let shared = Arc::clone(&tray);
        let writer = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(move || work(&shared));
        let failed =
            |source| Error::Process { what: "the thread that writes checkpoints".to_owned(), source };
        Ok(Self { tray, writer: Some(writer.map_err(failed)?) })
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.tray.lock().closed = true;
        self.tray.changed.notify_all();
        if let Some(writer) = self.writer.take() {
            // One that panicked has written nothing, and nobody waits for what it would have said.
            let _ = writer.join();
        }
    }
}

/// Writes one checkpoint after the other, until the desk is closed and the tray empty.
fn work(tray: &Tray) {
    loop {
        let mut papers = tray
            .changed
            .wait_while(tray.lock(), |papers| papers.next.is_none() && !papers.closed)
            .unwrap_or_else(PoisonError::into_inner);
        let Some((ticket, draft)) = papers.next.take() else { return };
        papers.busy = true;
        drop(papers);
        let written = ticket.work_on(tray, draft);
        let mut papers = tray.lock();
        papers.busy = false;
        if let Err(error) = written {
            papers.died = Some(error);
        }
        drop(papers);
        tray.changed.notify_all();
    }
}

/// How a try ended.
enum Outcome {
    /// The checkpoint is there, or somebody else's, or this worker may not write one any more.
    Over,
    /// It is not there.
    Failed(Diagnostic),
    /// A failpoint ended the worker.
    Died(Error),
}

impl Ticket {
    /// Tries until it is written, or until no try helps. An error is a failpoint's death.
    fn work_on(&self, tray: &Tray, draft: Draft) -> Result<(), Error> {
        let snapshot = match draft.finish() {
            Ok(snapshot) => snapshot,
            Err(error) => {
                self.tell_failed(&error.diagnostic());
                return Ok(());
            }
        };
        let mut pause = PAUSE;
        for tried in 1.. {
            let error = match self.write(&snapshot) {
                Outcome::Over => return Ok(()),
                Outcome::Died(error) => return Err(error),
                Outcome::Failed(error) => error,
            };
            let papers = tray.lock();
            // A newer one is worth more than this one's repeat.
            if error.kind != Kind::Transient || tried >= TRIES || papers.next.is_some() || papers.closed {
                drop(papers);
                self.tell_failed(&error);
                return Ok(());
            }
            warn!(step = self.place.step, error = error.message, "a checkpoint is tried again");
            let waiting = |papers: &mut Papers| papers.next.is_none() && !papers.closed;
            drop(tray.changed.wait_timeout_while(papers, pause, waiting));
            pause *= 2;
        }
        Ok(())
    }

    /// Tries once; tells, and applies retention. A checkpoint that was given up or that exists already is no failure.
    fn write(&self, snapshot: &Snapshot) -> Outcome {
        let store = match Blocking::open(&self.store) {
            Ok(store) => store,
            Err(error) => return Outcome::Failed(error.diagnostic()),
        };
        let mut died = None;
        let written = store.write_with(snapshot, &mut |point| {
            let point = match point {
                WritePoint::BeforeManifest => Point::BeforeManifest,
                WritePoint::AfterManifest => Point::AfterManifest,
            };
            if let Err(error) = self.failpoints.reach(point, self.place) {
                died = Some(error);
                return Err("killed at a failpoint".to_owned());
            }
            if point == Point::BeforeManifest && !self.control.holds_credit(self.place.generation) {
                return Err("the credit of this worker ran out".to_owned());
            }
            Ok(())
        });
        if let Some(error) = died {
            self.control.die();
            return Outcome::Died(error);
        }
        let written = match written {
            Ok(written) => written,
            Err(
                error @ (shanty_checkpoint::Error::GivenUp { .. } | shanty_checkpoint::Error::Exists { .. }),
            ) => {
                warn!(step = self.place.step, %error, "no checkpoint was written");
                return Outcome::Over;
            }
            Err(error) => {
                warn!(step = self.place.step, %error, "failed to write a checkpoint");
                return Outcome::Failed(error.diagnostic());
            }
        };
        let held_seconds = self.held.as_secs_f64();
        info!(
            step = self.place.step,
            path = %written.path,
            bytes = written.bytes,
            seconds = written.seconds,
            held_seconds,
            "checkpoint written"
        );
        let removed = match store.apply_retention(self.keep, &[]) {
            Ok(removed) => removed.checkpoints.iter().map(shanty_checkpoint::Key::path).collect(),
            Err(error) => {
                warn!(%error, "old checkpoints could not be removed");
                Vec::new()
            }
        };
        // A closed channel means that the session is over.
        let _ = self.reports.send(Message::Checkpoint(CheckpointWritten {
            job_id: snapshot.job.clone(),
            attempt: snapshot.key.attempt,
            generation: snapshot.key.generation,
            step: snapshot.key.step,
            path: written.path,
            size_bytes: written.bytes,
            seconds: written.seconds,
            removed,
            held_seconds,
        }));
        Outcome::Over
    }

    fn pass_over(&self, draft: &Draft) {
        let message =
            format!("a newer checkpoint was due before that of step {} could be begun", draft.key.step);
        let hint = "the store is slower than checkpoints are due: raise `checkpoint.every_steps`";
        self.tell_failed(&Diagnostic::new("SH0532", message).kind(Kind::Transient).hint(hint));
    }

    fn tell_failed(&self, error: &Diagnostic) {
        warn!(step = self.place.step, code = error.code, error = error.message, "there is no checkpoint");
        let _ = self.reports.send(Message::CheckpointFailed(CheckpointFailed {
            job_id: self.job.clone(),
            attempt: self.attempt,
            generation: self.place.generation,
            step: self.place.step,
            error: Some(shanty_proto::to_detail(error)),
        }));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use shanty_checkpoint::{Key, Optimizer, State};
    use shanty_proto::v1::Attachment;
    use tokio::{
        sync::mpsc::{UnboundedReceiver, unbounded_channel},
        time::Instant,
    };

    use super::*;

    fn draft(step: u64) -> Draft {
        Draft::of(Snapshot {
            job: "test-1".to_owned(),
            key: Key { attempt: 1, step, generation: 3 },
            files: vec![
                ("adapter_config.json".to_owned(), b"{}".to_vec().into()),
                ("adapter_model.safetensors".to_owned(), vec![1, 2, 3].into()),
            ],
            optimizer: Optimizer { parameters: vec![1.0], exp_avg: vec![0.5], exp_avg_sq: vec![0.25] },
            state: State::default(),
        })
    }

    /// Tickets with a credit that lasts for `lasts`, 50 ms after it was given.
    fn tickets(store: &Path, lasts: Duration) -> (impl Fn(u64) -> Ticket, UnboundedReceiver<Message>) {
        let control = Arc::new(Control::default());
        control.enter(Attachment { generation: 3, ..Attachment::default() });
        let sent = Instant::now().checked_sub(Duration::from_millis(50)).unwrap();
        control.grant(3, 99, sent, lasts);
        let (reports, reported) = unbounded_channel();
        let store = store.display().to_string();
        let ticket = move |step| Ticket {
            job: "test-1".to_owned(),
            attempt: 1,
            control: Arc::clone(&control),
            reports: reports.clone(),
            failpoints: Failpoints::none(),
            place: Place { generation: 3, step, rank: 0 },
            store: store.clone(),
            keep: Keep { newest: 2, best: 0 },
            held: Duration::ZERO,
        };
        (ticket, reported)
    }

    fn steps(store: &Path) -> Vec<u64> {
        let listed = Blocking::open(&store.display().to_string()).unwrap().list().unwrap();
        listed.iter().map(|manifest| manifest.step).collect()
    }

    #[test]
    fn a_writer_whose_credit_has_expired_writes_no_manifest() {
        let store = tempfile::tempdir().unwrap();
        let (ticket, mut reported) = tickets(store.path(), Duration::from_millis(20));
        let mut checkpoints = Checkpoints::default();
        checkpoints.begin(ticket(5), draft(5)).unwrap();
        checkpoints.wait();
        assert!(reported.try_recv().is_err(), "the job can go on without it, and nobody is told");
        assert!(steps(store.path()).is_empty());
    }

    #[test]
    fn a_writer_with_credit_does_and_tells() {
        let store = tempfile::tempdir().unwrap();
        let (ticket, mut reported) = tickets(store.path(), Duration::from_secs(60));
        let mut checkpoints = Checkpoints::default();
        checkpoints.begin(ticket(5), draft(5)).unwrap();
        checkpoints.wait();
        assert!(matches!(reported.try_recv(), Ok(Message::Checkpoint(written)) if written.step == 5));
        assert_eq!(steps(store.path()), [5]);
    }

    #[test]
    fn a_store_that_fails_is_tried_again_and_a_newer_checkpoint_takes_the_place_of_an_older() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store");
        // Nothing can be written below a file.
        std::fs::create_dir(&store).unwrap();
        std::fs::write(store.join("checkpoints"), "in the way").unwrap();
        let (ticket, mut reported) = tickets(&store, Duration::from_secs(60));
        let mut checkpoints = Checkpoints::default();
        checkpoints.begin(ticket(5), draft(5)).unwrap();
        let desk = checkpoints.desk.as_ref().unwrap();
        while desk.tray.lock().next.is_some() {
            std::thread::yield_now();
        }
        // The first is at work or waits for its next try; no step waits for either of these.
        checkpoints.begin(ticket(10), draft(10)).unwrap();
        std::fs::remove_file(store.join("checkpoints")).unwrap();
        checkpoints.wait();
        let mut told = Vec::new();
        while let Ok(message) = reported.try_recv() {
            told.push(match message {
                Message::Checkpoint(written) => format!("{} written", written.step),
                Message::CheckpointFailed(failed) => {
                    format!("{} failed with {}", failed.step, failed.error.unwrap().code)
                }
                other => format!("{other:?}"),
            });
        }
        assert_eq!(told.last().map(String::as_str), Some("10 written"), "{told:?}");
        assert!(steps(&store).contains(&10));
    }
}
