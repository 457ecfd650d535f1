//! Checkpoints, written by a thread of their own while steps go on. One at a time.

use std::{
    path::PathBuf,
    sync::{Arc, mpsc},
    time::Duration,
};

use shanty_checkpoint::{Blocking, Snapshot, WritePoint};
use shanty_proto::v1::{CheckpointWritten, worker_message::Message};
use tokio::sync::mpsc::UnboundedSender;
use tracing::{info, warn};

use crate::{
    Error,
    control::Control,
    failpoint::{Failpoints, Place, Point},
};

use super::{Stop, Surroundings};

/// How often a wait for the writer looks whether the generation was left.
const LOOK: Duration = Duration::from_millis(20);

/// The checkpoint that is being written, if any.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints {
    pending: Option<mpsc::Receiver<Result<(), Error>>>,
}

/// What a writer uses of its worker.
pub(super) struct Ticket {
    pub(super) control: Arc<Control>,
    pub(super) reports: UnboundedSender<Message>,
    pub(super) failpoints: Failpoints,
    pub(super) place: Place,
    pub(super) store: PathBuf,
    /// How many checkpoints stay.
    pub(super) keep: usize,
}

impl Checkpoints {
    /// Begins to write. The one before must have been waited for.
    pub(super) fn begin(&mut self, ticket: Ticket, snapshot: Snapshot) -> Result<(), Error> {
        let (sender, receiver) = mpsc::channel();
        std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || {
                // Nobody listens any more if the job was dropped.
                let _ = sender.send(ticket.write(&snapshot));
            })
            .map_err(|source| Error::Process {
                what: "the thread that writes checkpoints".to_owned(),
                source,
            })?;
        self.pending = Some(receiver);
        Ok(())
    }

    /// Waits for the pending write, but not beyond the generation: the write goes on without it.
    pub(super) fn wait_or_leave(&mut self, around: &Surroundings, generation: u64) -> Result<(), Stop> {
        while let Some(receiver) = &self.pending {
            match receiver.recv_timeout(LOOK) {
                Err(mpsc::RecvTimeoutError::Timeout) => around.control.check(generation)?,
                Ok(result) => {
                    self.pending = None;
                    result?;
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    self.pending = None;
                    let source = std::io::Error::other("it ended unexpectedly");
                    return Err(Error::Process {
                        what: "the thread that writes checkpoints".to_owned(),
                        source,
                    }
                    .into());
                }
            }
        }
        Ok(())
    }

    /// Waits for the pending write. Its error was logged.
    pub(crate) fn wait(&mut self) {
        if let Some(receiver) = self.pending.take() {
            let _ = receiver.recv();
        }
    }
}

impl Ticket {
    /// Writes, tells, and applies retention. A checkpoint that was given up or that exists already is no error: the
    /// job can go on without it. A full disk is one.
    fn write(self, snapshot: &Snapshot) -> Result<(), Error> {
        let store = Blocking::open(&self.store.display().to_string()).map_err(|error| Error::part(&error))?;
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
            return Err(error);
        }
        let written = match written {
            Ok(written) => written,
            Err(
                error @ (shanty_checkpoint::Error::GivenUp { .. } | shanty_checkpoint::Error::Exists { .. }),
            ) => {
                warn!(step = self.place.step, %error, "no checkpoint was written");
                return Ok(());
            }
            Err(error) => {
                warn!(step = self.place.step, %error, "failed to write a checkpoint");
                return Err(Error::part(&error));
            }
        };
        info!(step = self.place.step, path = %written.path, bytes = written.bytes, "checkpoint written");
        // A closed channel means that the session is over.
        let _ = self.reports.send(Message::Checkpoint(CheckpointWritten {
            job_id: snapshot.job.clone(),
            attempt: snapshot.key.attempt,
            generation: snapshot.key.generation,
            step: snapshot.key.step,
            path: written.path,
            size_bytes: written.bytes,
            seconds: written.seconds,
            ..CheckpointWritten::default()
        }));
        if let Err(error) =
            store.apply_retention(shanty_checkpoint::Keep { newest: self.keep.max(1), best: 0 }, &[])
        {
            warn!(%error, "old checkpoints could not be removed");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use shanty_checkpoint::{Key, Optimizer, State};
    use shanty_proto::v1::Attachment;

    use super::*;

    fn snapshot(generation: u64) -> Snapshot {
        Snapshot {
            job: "test-1".to_owned(),
            key: Key { attempt: 1, step: 5, generation },
            files: vec![
                ("adapter_config.json".to_owned(), b"{}".to_vec().into()),
                ("adapter_model.safetensors".to_owned(), vec![1, 2, 3].into()),
            ],
            optimizer: Optimizer { parameters: vec![1.0], exp_avg: vec![0.5], exp_avg_sq: vec![0.25] },
            state: State::default(),
        }
    }

    /// Writes with a credit that lasts for `lasts`, 50 ms after it was given.
    fn write(store: &std::path::Path, lasts: Duration) -> (Result<(), Error>, bool) {
        let control = Arc::new(Control::default());
        control.enter(Attachment { generation: 3, ..Attachment::default() });
        let sent = Instant::now().checked_sub(Duration::from_millis(50)).unwrap();
        control.grant(3, 9, sent, lasts);
        let (reports, mut reported) = tokio::sync::mpsc::unbounded_channel();
        let ticket = Ticket {
            control,
            reports,
            failpoints: Failpoints::none(),
            place: Place { generation: 3, step: 5, rank: 0 },
            store: store.to_owned(),
            keep: 2,
        };
        let result = ticket.write(&snapshot(3));
        (result, reported.try_recv().is_ok())
    }

    fn manifests(store: &std::path::Path) -> usize {
        Blocking::open(&store.display().to_string()).unwrap().list().unwrap().len()
    }

    #[test]
    fn a_writer_whose_credit_has_expired_writes_no_manifest() {
        let store = tempfile::tempdir().unwrap();
        let (result, told) = write(store.path(), Duration::from_millis(20));
        assert!(result.is_ok(), "the job can go on without it: {result:?}");
        assert!(!told);
        assert_eq!(manifests(store.path()), 0);
    }

    #[test]
    fn a_writer_with_credit_does_and_tells() {
        let store = tempfile::tempdir().unwrap();
        let (result, told) = write(store.path(), Duration::from_secs(60));
        assert!(result.is_ok() && told, "{result:?}");
        assert_eq!(manifests(store.path()), 1);
    }
}
