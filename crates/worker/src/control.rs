//! What the session and the trainer share: membership, credit, the phase that beats report.
//!
//! The trainer blocks in computation, in collectives, in waits for rows and for credit. The session must be able to
//! end each of these at once when the coordinator says `Leave`: [`Control::interrupt`] does all four.

use std::{
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use shanty_collective::AbortHandle;
use shanty_proto::v1::{Attachment, MemberPhase};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// First pause between two requests for a beat while the trainer is out of credit; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// How long a trainer may take to answer an interruption before the coordinator said what is usual.
const UNTOLD_DEADLINE: Duration = Duration::from_secs(120);

/// The shared state of session and trainer.
#[derive(Debug, Default)]
pub(crate) struct Control {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Wakes the session for an extra beat: the trainer is short of credit.
    pub(crate) beat_wanted: tokio::sync::Notify,
    /// Cancelled when a failpoint's simulated death ended this worker: no goodbye, no last report.
    pub(crate) dead: CancellationToken,
    /// Grows with what the trainer gets done.
    progress: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    membership: Option<Membership>,
    credit: Option<Credit>,
    /// The job and attempt that the credit is of: each numbers its generations by itself.
    credit_of: Option<(String, u32)>,
    phase: MemberPhase,
    /// Updates in the state that the trainer holds; it may outlive a membership.
    applied: u64,
    /// The part of a shared base that the trainer has loaded.
    part: Option<u32>,
    /// How long a member may be without progress, as the coordinator has learnt.
    deadline: Option<Duration>,
    /// Whether the trainer follows a command, and since when it is to stop doing so.
    at_work: bool,
    interrupted_at: Option<Instant>,
}

impl Inner {
    fn note_interruption(&mut self) {
        if self.at_work {
            self.interrupted_at.get_or_insert_with(Instant::now);
        }
    }
}

#[derive(Debug)]
struct Membership {
    attachment: Attachment,
    /// Ends the collective's calls.
    abort: AbortHandle,
    /// Ends requests for rows.
    requests: CancellationToken,
    interrupted: bool,
    /// The step that is made or was made last.
    step: u64,
    /// The generation is left after this step.
    stop_after: Option<u64>,
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
        let credit_of = Some((attachment.job_id.clone(), attachment.attempt));
        if inner.credit_of != credit_of {
            inner.credit = None;
            inner.credit_of = credit_of;
        }
        inner.membership = Some(Membership {
            attachment,
            abort: AbortHandle::new(),
            requests: CancellationToken::new(),
            interrupted: false,
            step: 0,
            stop_after: None,
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
            inner.note_interruption();
        }
        self.changed.notify_all();
    }

    /// Ends the generation once `step` is applied; at once if a later one is under way.
    pub(crate) fn leave_after(&self, generation: u64, step: u64, reason: &str) {
        let mut inner = self.lock();
        if let Some(membership) = &mut inner.membership
            && membership.attachment.generation == generation
        {
            if membership.step > step {
                membership.interrupt(reason);
                inner.note_interruption();
            } else {
                membership.stop_after = Some(step);
            }
        }
        self.changed.notify_all();
    }

    /// The worker belongs to no generation any more.
    pub(crate) fn drop_membership(&self, reason: &str) {
        let mut inner = self.lock();
        if let Some(mut membership) = inner.membership.take() {
            membership.interrupt(reason);
            inner.note_interruption();
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

    /// What the worker does, for beats, and how much it has got done.
    pub(crate) fn phase(&self) -> (MemberPhase, u64) {
        (self.lock().phase, self.progress.load(Ordering::Relaxed))
    }

    /// The coordinator says how long a member may be without progress.
    pub(crate) fn set_deadline(&self, deadline: Duration) {
        self.lock().deadline = Some(deadline);
    }

    /// For how long the trainer has not answered an interruption, if that is longer than it may take.
    pub(crate) fn hung_for(&self) -> Option<Duration> {
        let inner = self.lock();
        // Twice: first the collective's abort and the micro-batch, then whatever a driver needs to give up.
        let limit = inner.deadline.unwrap_or(UNTOLD_DEADLINE) * 2;
        inner.interrupted_at.map(|since| since.elapsed()).filter(|silent| *silent > limit)
    }

    // ---- the trainer's side ----

    /// Sets what beats say.
    pub(crate) fn set_phase(&self, phase: MemberPhase) {
        self.lock().phase = phase;
        self.advance();
    }

    /// The trainer got something done.
    pub(crate) fn advance(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// The trainer follows a command, or waits for the next.
    pub(crate) fn set_at_work(&self, at_work: bool) {
        let mut inner = self.lock();
        inner.at_work = at_work;
        inner.interrupted_at = None;
    }

    /// The trainer is about to make a step; says whether it is to be made, as the generation may be left before it.
    ///
    /// # Errors
    /// [`Interrupted`] if the generation is left already.
    pub(crate) fn begin_step(&self, generation: u64, step: u64) -> Result<bool, Interrupted> {
        match &mut self.lock().membership {
            Some(membership) if membership.is_active(generation) => {
                if membership.stop_after.is_some_and(|last| step > last) {
                    return Ok(false);
                }
                membership.step = step;
                Ok(true)
            }
            _ => Err(Interrupted),
        }
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
        let mut ask_at = Instant::now();
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
            // Each answer wakes this loop, with credit or without: a beat is asked for when its time has come, not by answers.
            if now >= ask_at {
                self.beat_wanted.notify_one();
                ask_at = now + pause;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            let wait = ask_at.saturating_duration_since(now);
            inner = self.changed.wait_timeout(inner, wait).unwrap_or_else(PoisonError::into_inner).0;
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

    /// Found by `cargo xtask chaos`: after a job of many generations its workers waited for ever in the next job's first.
    #[test]
    fn the_first_generation_of_the_next_job_gets_credit_after_a_job_of_many_generations() {
        let control = member(9);
        control.grant(9, 500, Instant::now(), LONG);
        control.drop_membership("the job ended");
        control.enter(Attachment { job_id: "next".to_owned(), generation: 1, ..Attachment::default() });
        assert!(!control.holds_credit(1));
        control.grant(1, 4, Instant::now(), LONG);
        assert_eq!(control.credited_step(1), 4);
        control.enter(Attachment { job_id: "third".to_owned(), generation: 1, ..Attachment::default() });
        assert_eq!(control.credited_step(1), 0, "another job's credit of the same number is none here");
    }

    /// Found by `cargo xtask chaos`: four workers without credit took a whole core with beats and their answers.
    #[test]
    fn answers_without_credit_do_not_make_a_worker_beat_faster() {
        let control = member(1);
        let waiting = {
            let control = Arc::clone(&control);
            std::thread::spawn(move || control.wait_for_credit(1, 100))
        };
        let begin = std::time::Instant::now();
        let mut wanted = 0;
        while begin.elapsed() < Duration::from_millis(300) {
            // Each beat is answered at once, with a credit that does not reach far enough.
            let asked = std::pin::pin!(control.beat_wanted.notified()).enable();
            if asked {
                wanted += 1;
                control.grant(1, 9, Instant::now(), LONG);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        control.interrupt(1, "over");
        assert_eq!(waiting.join().unwrap(), Err(Interrupted));
        // At 0, 10, 30, 70, 150 and 310 ms; a thread that comes late asks later.
        assert!((1..=6).contains(&wanted), "{wanted}");
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
    fn leaving_after_a_step_lets_that_step_be_made_and_no_later_one() {
        let control = member(1);
        let (abort, _) = control.handles(1).unwrap();
        assert_eq!(control.begin_step(1, 4), Ok(true));
        control.leave_after(1, 5, "somebody joins");
        assert_eq!(control.begin_step(1, 5), Ok(true));
        assert!(!abort.is_aborted(), "the step goes on");
        assert_eq!(control.begin_step(1, 6), Ok(false));
        // Heard too late: the step after it is under way, and the others do not make it.
        let late = member(2);
        let (abort, _) = late.handles(2).unwrap();
        assert_eq!(late.begin_step(2, 6), Ok(true));
        late.leave_after(2, 5, "somebody joins");
        assert!(abort.is_aborted());
        assert_eq!(late.begin_step(2, 7), Err(Interrupted));
    }

    #[test]
    fn a_trainer_that_does_not_answer_an_interruption_hangs() {
        let control = member(1);
        control.set_deadline(Duration::ZERO);
        control.set_at_work(true);
        assert_eq!(control.hung_for(), None);
        control.interrupt(1, "leave");
        std::thread::sleep(Duration::from_millis(2));
        assert!(control.hung_for().is_some());
        control.set_at_work(false);
        assert_eq!(control.hung_for(), None, "it answered");
        control.drop_membership("an idle trainer has nothing to answer");
        assert_eq!(control.hung_for(), None);
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
