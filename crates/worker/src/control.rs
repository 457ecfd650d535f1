//! What the session and the trainer share: membership, credit, the phase that beats report.
//!
//! The trainer blocks in computation, in collectives, in waits for rows and for credit. The session must be able to
//! end each of these at once when the coordinator says `Leave`: [`Control::interrupt`] does all four.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use shanty_collective::AbortHandle;
use shanty_proto::v1::{Attachment, MemberPhase};
use tokio_util::sync::CancellationToken;

/// First pause between two requests for a beat while the trainer is out of credit; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// The shared state of session and trainer.
#[derive(Debug, Default)]
pub(crate) struct Control {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Wakes the session for an extra beat: the trainer is short of credit.
    pub(crate) beat_wanted: tokio::sync::Notify,
    /// Cancelled when a failpoint's simulated death ended this worker: no goodbye, no last report.
    pub(crate) dead: CancellationToken,
}

#[derive(Debug, Default)]
struct Inner {
    membership: Option<Membership>,
    credit: Option<Credit>,
    phase: MemberPhase,
    /// Updates in the state that the trainer holds; it may outlive a membership.
    applied: u64,
    /// The part of a shared base that the trainer has loaded.
    part: Option<u32>,
}

#[derive(Debug)]
struct Membership {
    attachment: Attachment,
    /// Ends the collective's calls.
    abort: AbortHandle,
    /// Ends requests for rows.
    requests: CancellationToken,
    interrupted: bool,
}

impl Membership {
    fn interrupt(&mut self, reason: &str) {
        self.interrupted = true;
        self.abort.abort(reason);
        self.requests.cancel();
    }

    fn is_active(&self, generation: u64) -> bool {
        self.attachment.generation == generation && !self.interrupted
    }
}

#[derive(Debug, Clone, Copy)]
struct Credit {
    generation: u64,
    up_to_step: u64,
    expires: Instant,
}

/// The generation was left, or is about to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interrupted;

impl Control {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every critical section below is a handful of assignments: the state is whole even if a thread died in one.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- the session's side ----

    /// The worker became a member of a generation. One that it belonged to ends. The applied step is filled in.
    pub(crate) fn enter(&self, attachment: Attachment) {
        self.drop_membership("a newer generation began");
        let mut inner = self.lock();
        inner.membership = Some(Membership {
            attachment,
            abort: AbortHandle::new(),
            requests: CancellationToken::new(),
            interrupted: false,
        });
        inner.phase = MemberPhase::Forming;
        self.changed.notify_all();
    }

    /// Ends whatever the trainer does in a generation, at once. Whole micro-batches and a finished reduction stand.
    pub(crate) fn interrupt(&self, generation: u64, reason: &str) {
        let mut inner = self.lock();
        if let Some(membership) = &mut inner.membership
            && membership.attachment.generation == generation
        {
            membership.interrupt(reason);
        }
        self.changed.notify_all();
    }

    /// The worker belongs to no generation any more.
    pub(crate) fn drop_membership(&self, reason: &str) {
        let mut inner = self.lock();
        if let Some(mut membership) = inner.membership.take() {
            membership.interrupt(reason);
        }
        self.changed.notify_all();
    }

    /// Ends this worker as if it had been killed.
    pub(crate) fn die(&self) {
        self.dead.cancel();
        self.drop_membership("killed");
    }

    /// A credit arrived; `sent` is when the acknowledged beat was sent.
    pub(crate) fn grant(&self, generation: u64, up_to_step: u64, sent: Instant, lasts: Duration) {
        let mut inner = self.lock();
        let expires = sent + lasts;
        inner.credit = Some(match inner.credit {
            Some(old) if old.generation == generation => Credit {
                generation,
                up_to_step: old.up_to_step.max(up_to_step),
                expires: old.expires.max(expires),
            },
            Some(old) if old.generation > generation => old,
            _ => Credit { generation, up_to_step, expires },
        });
        self.changed.notify_all();
    }

    /// What the worker belongs to, for beats and for re-attaching.
    pub(crate) fn attachment(&self) -> Option<Attachment> {
        let inner = self.lock();
        let attachment = inner.membership.as_ref().map(|membership| membership.attachment.clone());
        attachment.map(|attachment| Attachment { applied_step: inner.applied, ..attachment })
    }

    /// The part of a shared base that is loaded, for the coordinator.
    pub(crate) fn part(&self) -> Option<u32> {
        self.lock().part
    }

    /// What the worker does, for beats.
    pub(crate) fn phase(&self) -> MemberPhase {
        self.lock().phase
    }

    // ---- the trainer's side ----

    /// Sets what beats say.
    pub(crate) fn set_phase(&self, phase: MemberPhase) {
        self.lock().phase = phase;
    }

    /// The trainer has loaded this part of a shared base, or none.
    pub(crate) fn set_part(&self, part: Option<u32>) {
        self.lock().part = part;
    }

    /// The state that the trainer holds now has `applied` updates.
    pub(crate) fn set_applied(&self, applied: u64) {
        self.lock().applied = applied;
    }

    /// The handles that end a generation's collective and its requests for rows; none if it was left already.
    pub(crate) fn handles(&self, generation: u64) -> Result<(AbortHandle, CancellationToken), Interrupted> {
        match &self.lock().membership {
            Some(membership) if membership.is_active(generation) => {
                Ok((membership.abort.clone(), membership.requests.clone()))
            }
            _ => Err(Interrupted),
        }
    }

    /// Whether the trainer may go on with a generation.
    pub(crate) fn check(&self, generation: u64) -> Result<(), Interrupted> {
        self.handles(generation).map(|_| ())
    }

    /// The highest step that the credit of `generation` covers; 0 without one.
    pub(crate) fn credited_step(&self, generation: u64) -> u64 {
        self.lock()
            .credit
            .filter(|credit| credit.generation == generation)
            .map_or(0, |credit| credit.up_to_step)
    }

    /// Whether the last credit of `generation` is unexpired. Stays true for a while after the generation was left:
    /// what was applied in it is part of the lineage.
    pub(crate) fn holds_credit(&self, generation: u64) -> bool {
        self.lock()
            .credit
            .is_some_and(|credit| credit.generation == generation && Instant::now() < credit.expires)
    }

    /// Waits until there is credit for `step`, asking for beats meanwhile.
    ///
    /// # Errors
    /// [`Interrupted`] if the generation is left first.
    pub(crate) fn wait_for_credit(&self, generation: u64, step: u64) -> Result<(), Interrupted> {
        let mut pause = FIRST_PAUSE;
        let mut before = None;
        let mut inner = self.lock();
        loop {
            match &inner.membership {
                Some(membership) if membership.is_active(generation) => {}
                _ => return Err(Interrupted),
            }
            let now = Instant::now();
            let covered = inner.credit.is_some_and(|credit| {
                credit.generation == generation && credit.up_to_step >= step && now < credit.expires
            });
            if covered {
                if let Some(phase) = before {
                    inner.phase = phase;
                }
                return Ok(());
            }
            before.get_or_insert(inner.phase);
            inner.phase = MemberPhase::Waiting;
            self.beat_wanted.notify_one();
            inner = self.changed.wait_timeout(inner, pause).unwrap_or_else(PoisonError::into_inner).0;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Waits up to `patience` for the generation to be interrupted.
    pub(crate) fn wait_for_interruption(
        &self,
        generation: u64,
        patience: Duration,
    ) -> Result<(), Interrupted> {
        let deadline = Instant::now() + patience;
        let mut inner = self.lock();
        loop {
            match &inner.membership {
                Some(membership) if membership.is_active(generation) => {}
                _ => return Err(Interrupted),
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            else {
                return Ok(());
            };
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn member(generation: u64) -> Arc<Control> {
        let control = Arc::new(Control::default());
        control.enter(Attachment { generation, ..Attachment::default() });
        control
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn credit_counts_from_the_sending_of_the_beat() {
        let control = member(1);
        let sent = Instant::now().checked_sub(Duration::from_secs(2)).unwrap();
        control.grant(1, 5, sent, Duration::from_secs(1));
        assert!(!control.holds_credit(1), "it was over before the answer came");
        control.grant(1, 5, sent, LONG);
        assert!(control.holds_credit(1));
        assert!(control.wait_for_credit(1, 5).is_ok());
    }

    #[test]
    fn an_older_answer_takes_nothing_away_and_another_generation_has_its_own() {
        let control = member(1);
        let now = Instant::now();
        control.grant(1, 9, now, LONG);
        control.grant(1, 7, now, Duration::ZERO);
        assert!(control.holds_credit(1));
        assert_eq!(control.credited_step(1), 9);
        control.enter(Attachment { generation: 2, ..Attachment::default() });
        assert!(!control.holds_credit(2));
        control.grant(2, 4, now, LONG);
        control.grant(1, 20, now, LONG);
        assert_eq!(control.credited_step(2), 4);
    }

    #[test]
    fn an_interruption_ends_every_kind_of_wait() {
        let control = member(1);
        let (abort, requests) = control.handles(1).unwrap();
        let waiting = {
            let control = Arc::clone(&control);
            std::thread::spawn(move || control.wait_for_credit(1, 1))
        };
        control.interrupt(2, "not this one");
        assert!(control.check(1).is_ok());
        control.interrupt(1, "leave");
        assert_eq!(waiting.join().unwrap(), Err(Interrupted));
        assert!(abort.is_aborted() && requests.is_cancelled());
        assert_eq!(control.wait_for_interruption(1, LONG), Err(Interrupted));
        assert!(control.attachment().is_some(), "it still holds the state of the generation that it left");
    }

    #[test]
    fn a_newer_generation_ends_the_one_before() {
        let control = member(1);
        let (abort, _) = control.handles(1).unwrap();
        control.set_applied(7);
        control.enter(Attachment { generation: 2, ..Attachment::default() });
        assert!(abort.is_aborted());
        assert_eq!(control.check(1), Err(Interrupted));
        let attachment = control.attachment().unwrap();
        assert_eq!((attachment.generation, attachment.applied_step), (2, 7));
    }
}
