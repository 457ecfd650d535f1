//! A generation's steps: compute, reduce, apply. docs/concepts/step-protocol.md tells why in this order.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use shanty_collective::{Collective, Feedback, HopPoint};
use shanty_config::UsualLoss;
use shanty_proto::v1::{Announcement, MemberPhase, StepReport, StepTimings, worker_message::Message};
use tracing::{debug, info};

use crate::{
    Error,
    control::Control,
    engine::{Memory, NoSink, ReductionError, Row, SumSink, Total, missing_state},
    failpoint::{Failpoints, Place, Point},
    row_log::Entry,
    rows::hash_of_rows,
};

use super::{
    Stop, Surroundings,
    check::Check,
    formation::Formation,
    job::Job,
    link,
    pipeline::Pipeline,
    reduction::{self, Begun, Members},
    shard::{self, Group},
    spoilt::{Fault, Skipped},
    start,
    state::{Applied, State},
};

/// What ties this worker to the others of a generation.
pub(super) struct Links {
    _collective: Box<dyn Collective>,
    _group: Option<Group>,
}

/// A generation that this worker takes part in.
pub(super) struct Generation<'a> {
    pub(super) around: &'a Surroundings,
    pub(super) job: &'a mut Job,
    pub(super) formation: Formation,
    pub(super) collective: Box<dyn Collective>,
    /// Those who share a base with this worker.
    pub(super) group: Option<Group>,
    pub(super) pipeline: Pipeline,
    pub(super) checkpoint_step: Option<u64>,
    /// The step after which the ranks compared their adapters last.
    pub(super) compared_step: u64,
    /// What a loss spike is measured by: the same on all ranks.
    pub(super) usual_loss: UsualLoss,
    hops: Arc<Hops>,
}

/// What failpoints at the ring's hops need to know.
#[derive(Debug, Default)]
struct Hops {
    step: AtomicU64,
    /// Hops of this step's reduction so far.
    passed: AtomicUsize,
    reducing: AtomicBool,
    died: Mutex<Option<Error>>,
}

/// A failpoint while a part of the gradient is made and a part is not; hands on what it hears.
struct MidBackward<'a> {
    control: &'a Control,
    failpoints: &'a Failpoints,
    place: Place,
    reached: Result<(), Error>,
    then: &'a mut dyn SumSink,
}

impl SumSink for MidBackward<'_> {
    fn ready(&mut self, range: Range<usize>, memory: Memory<'_>) {
        self.control.advance();
        if self.reached.is_ok() {
            self.reached = self.failpoints.reach(Point::MidBackward, self.place);
        }
        self.then.ready(range, memory);
    }
}

impl Formation {
    pub(super) fn place(&self, step: u64) -> Place {
        Place { generation: self.generation, step, rank: self.rank }
    }
}

impl<'a> Generation<'a> {
    /// Joins the others and comes to hold the state that the generation starts from.
    pub(super) fn join(
        around: &'a Surroundings,
        job: &'a mut Job,
        formation: Formation,
    ) -> Result<Self, Stop> {
        around.control.set_phase(MemberPhase::Forming);
        start::prepare(job, &formation.start)?;
        let (abort, requests) = around.control.handles(formation.generation)?;
        let mut collective = link::join(around, job, &formation, abort)?;
        let group = shard::join(around, job, &formation)?;
        start::reach_start(around, job, &formation, &mut *collective)?;
        take_first_rows(job, &formation)?;
        let pipeline = Pipeline::new(around.rows.clone(), requests, &job.plan, &formation);
        let owed = std::mem::take(&mut job.owed);
        if collective.feedback().is_some() {
            // Left with the job too: a generation may end at any time.
            job.owed.clone_from(&owed);
            collective.set_feedback(Some(Feedback::restored(owed)));
        }
        let hops = Arc::new(Hops::default());
        if around.failpoints.is_armed() {
            collective.set_hop_hook(Some(hop_hook(around, &formation, &hops, &*collective)));
        }
        job.world_size = formation.world_size();
        job.evaluated_step = formation.start.evaluated_step;
        let checkpoint_step = formation.start.checkpoint_step;
        // What members hold at the start was compared when it moved, or when they left the generation before.
        let (compared_step, usual_loss) = (formation.start.applied_step, formation.start.usual_loss);
        Ok(Self {
            around,
            job,
            formation,
            collective,
            group,
            pipeline,
            checkpoint_step,
            compared_step,
            usual_loss,
            hops,
        })
    }

    /// Makes the steps that are left and what is due between them. Returns after the last, or after the one that all leave
    /// after, with the collectives: they stay open until all members are done.
    pub(super) fn run(mut self) -> Result<Links, Stop> {
        loop {
            self.boundary()?;
            if self.applied() >= self.job.plan.steps() {
                self.finish()?;
                return Ok(self.links());
            }
            if !self.around.control.begin_step(self.formation.generation, self.applied() + 1)? {
                return Ok(self.links());
            }
            self.step()?;
        }
    }

    fn links(self) -> Links {
        Links { _collective: self.collective, _group: self.group }
    }

    /// Updates in the state.
    pub(super) fn applied(&self) -> u64 {
        self.job.state.as_ref().map_or(0, State::applied)
    }

    pub(super) fn reach(&self, point: Point, step: u64) -> Result<(), Stop> {
        Ok(self.around.failpoints.reach(point, self.formation.place(step))?)
    }

    fn step(&mut self) -> Result<(), Stop> {
        let step = self.applied() + 1;
        let generation = self.formation.generation;
        let control = Arc::clone(&self.around.control);
        control.wait_for_credit(generation, step)?;
        let began = Instant::now();
        // Rows that do not come are nobody's fault here.
        control.set_phase(MemberPhase::Waiting);
        self.pipeline.ask_up_to(control.credited_step(generation), &self.job.plan);
        let (leased, data_seconds) = self.pipeline.take(step)??;
        control.set_phase(MemberPhase::Computing);
        self.check_announcement(step, &leased.announcement)?;
        if self.formation.start.skip_steps.contains(&step) {
            return self.skip_as_planned(step, leased.announcement);
        }

        let computing = Instant::now();
        let begun = self.compute(step, &leased.rows)?;
        let reducing = begun.since.unwrap_or_else(Instant::now);
        let compute_seconds = (reducing - computing).as_secs_f64();

        control.set_phase(MemberPhase::Reducing);
        let total = self.reduce(step, begun)?;
        let reduce_seconds = reducing.elapsed().as_secs_f64();
        total.compare(step, &leased.announcement)?;
        self.reach(Point::AfterReduction, step)?;

        let updating = Instant::now();
        let (applied, skipped) = match self.try_apply(step, total)? {
            Ok(applied) => (applied, None),
            Err(fault) => (Applied::nothing(), Some(self.spoilt(step, &fault, &leased.rows)?)),
        };
        let update_seconds = updating.elapsed().as_secs_f64();
        let tokens = leased.rows.iter().map(|row| row.token_ids.len() as u64).sum();
        let timings = StepTimings { data_seconds, compute_seconds, reduce_seconds, update_seconds, tokens };
        let seconds = began.elapsed().as_secs_f64();
        self.reach(Point::AfterUpdate, step)?;
        self.report_step(step, total, applied, skipped, seconds, timings);
        Ok(())
    }

    /// Applies a committed step, unless it is bad.
    fn try_apply(&mut self, step: u64, total: Check) -> Result<Result<Applied, Fault>, Stop> {
        if let Some(fault) = self.fault_of(total) {
            return Ok(Err(fault));
        }
        let Some(applied) = self.apply(step, total)? else {
            return Ok(Err(Fault::NotFinite("the gradient")));
        };
        self.settle_debts();
        self.usual_loss.learn(total.loss() / total.tokens.max(1) as f64);
        Ok(Ok(applied))
    }

    /// A step that was bad in an earlier generation: all ranks were told to pass over it.
    fn skip_as_planned(&mut self, step: u64, announced: Announcement) -> Result<(), Stop> {
        self.skip(step)?;
        info!(step, "passed over");
        let skipped = Skipped { reason: "it was bad before".to_owned(), samples: Vec::new() };
        let total = Check::new(announced.tokens, announced.rows, announced.row_hash, 0.0, 0);
        self.report_step(step, total, Applied::nothing(), Some(skipped), 0.0, StepTimings::default());
        Ok(())
    }

    /// The announcement must be of the rows that follow from the job: those of all ranks, kept ones included.
    fn check_announcement(&self, step: u64, announced: &Announcement) -> Result<(), Stop> {
        let rows = self.job.plan.rows_of_step(step);
        let (count, hash) = (rows.len() as u64, hash_of_rows(rows));
        if (announced.rows, announced.row_hash) == (count, hash) {
            return Ok(());
        }
        let reason = format!(
            "{} rows with hash {:016x} are announced, the order has {count} with {hash:016x}",
            announced.rows, announced.row_hash
        );
        Err(Error::WrongRows { step, reason }.into())
    }

    /// Adds whole micro-batches to the local sum. When the generation is left in between, the sum stays as it is.
    ///
    /// With other members, the reduction begins while the last micro-batch computes: what it has made final is summed
    /// meanwhile. If that breaks, the micro-batch is finished all the same, and the local sum is whole.
    fn compute(&mut self, step: u64, rows: &[Row]) -> Result<Begun, Stop> {
        let place = self.formation.place(step);
        let seed = self.job.plan.spec.train.seed;
        let micro_batch_rows = usize::try_from(self.job.micro_batch_rows.max(1)).unwrap_or(usize::MAX);
        if self.job.state.is_none() {
            return Err(missing_state().into());
        }
        let Job { engine, sum, .. } = &mut *self.job;
        sum.begin(step, &mut **engine)?;
        let mut begun = Begun::default();
        let mut micro_batches = rows.chunks(micro_batch_rows).peekable();
        while let Some(micro_batch) = micro_batches.next() {
            self.round(true)?;
            let is_last = micro_batches.peek().is_none();
            // Those who share a base may need this member's part for micro-batches after its last.
            let reduces = is_last && self.formation.world_size() > 1 && self.group.is_none();
            if reduces {
                self.enter_reduction(step, micro_batch)?;
            }
            let (control, failpoints) = (&*self.around.control, &self.around.failpoints);
            let Job { engine, sum, .. } = &mut *self.job;
            let length = engine.facts().flat_length;
            let mut reached = Ok(());
            let mut add = |then: &mut dyn SumSink| {
                let mut midway = MidBackward { control, failpoints, place, reached: Ok(()), then };
                let ids = micro_batch.iter().map(|row| row.id);
                let added = sum.add(&mut **engine, ids, |engine| {
                    engine.accumulate(micro_batch, seed, step, &mut midway)
                });
                reached = midway.reached;
                control.advance();
                if reduces {
                    // What is left is to wait for the others.
                    control.set_phase(MemberPhase::Reducing);
                }
                added
            };
            if reduces {
                let advance = || control.advance();
                let (added, reduced) = reduction::beside(&mut *self.collective, length, &advance, add);
                begun = reduced;
                self.take_death()?;
                added?;
            } else {
                let added = add(&mut NoSink);
                added.map_err(|error| self.stop_for(error))?;
            }
            reached?;
        }
        self.keep_company(true)?;
        let Job { engine, sum, .. } = &mut *self.job;
        sum.complete(&mut **engine)?;
        self.around.control.check(self.formation.generation)?;
        Ok(begun)
    }

    /// Notes the rows that this member enters the reduction with, `coming` ones included: nothing is reduced before.
    fn enter_reduction(&mut self, step: u64, coming: &[Row]) -> Result<(), Stop> {
        let mut rows = self.job.sum.rows().to_vec();
        rows.extend(coming.iter().map(|row| row.id));
        self.job.row_log.write(&Entry::Entering {
            attempt: self.job.plan.attempt,
            generation: self.formation.generation,
            step,
            rank: self.formation.rank,
            world_size: self.formation.world_size(),
            rows,
        })?;
        let length = self.job.flat_length();
        if let Some(feedback) = self.collective.feedback() {
            feedback.begin(length);
        }
        self.hops.step.store(step, Ordering::Relaxed);
        self.hops.passed.store(0, Ordering::Relaxed);
        self.hops.reducing.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Fails where a failpoint's simulated death came in the middle of a reduction.
    fn take_death(&self) -> Result<(), Stop> {
        match self.hops.died.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Sums over all ranks: the gradient where the engine computes, the integers last. With them the step is committed.
    fn reduce(&mut self, step: u64, begun: Begun) -> Result<Check, Stop> {
        if begun.since.is_none() {
            self.enter_reduction(step, &[])?;
        }
        self.reach(Point::EnteringReduction, step)?;
        let reduced = self.reduce_all(begun);
        self.hops.reducing.store(false, Ordering::Relaxed);
        self.take_death()?;
        reduced.map_err(|error| match error {
            ReductionError::Collective(error) => start::broken(self.around, &self.formation, &error),
            ReductionError::Engine(error) => error.into(),
        })
    }

    fn reduce_all(&mut self, begun: Begun) -> Result<Check, ReductionError> {
        let Job { engine, sum, .. } = &mut *self.job;
        // Alone, a member's own sum is the total.
        if self.formation.world_size() > 1 {
            let advance = || self.around.control.advance();
            engine.reduce(&mut Members::new(&mut *self.collective, begun, &advance))?;
        }
        let rows = sum.rows();
        let own = Check::new(
            sum.tokens(),
            rows.len() as u64,
            hash_of_rows(rows.iter().copied()),
            sum.loss(),
            sum.not_finite().0,
        );
        let mut words = own.to_words();
        self.collective.all_reduce_u64(&mut words)?;
        Ok(Check::from_words(words))
    }

    /// The step is applied: what was rounded away from its sums is owed from now on.
    fn settle_debts(&mut self) {
        if let Some(feedback) = self.collective.feedback() {
            feedback.commit();
            self.job.owed.clear();
            self.job.owed.extend_from_slice(feedback.owed());
        }
    }

    /// Applies a committed step. Every rank does the same with the same bits. None, and nothing is changed, if the gradient is
    /// not finite.
    fn apply(&mut self, step: u64, total: Check) -> Result<Option<Applied>, Stop> {
        let Some(state) = &mut self.job.state else { return Err(missing_state().into()) };
        let engine = &mut *self.job.engine;
        let from = if self.formation.world_size() > 1 { Total::Reduced } else { Total::Own };
        let Some(applied) = self.job.update.apply(state, engine, from, total.tokens)? else {
            return Ok(None);
        };
        self.job.drop_sum()?;
        self.around.control.set_applied(step);
        self.job.row_log.write(&Entry::Applied {
            attempt: self.job.plan.attempt,
            generation: self.formation.generation,
            step,
            rank: self.formation.rank,
        })?;
        Ok(Some(applied))
    }

    fn report_step(
        &self,
        step: u64,
        total: Check,
        applied: Applied,
        skipped: Option<Skipped>,
        seconds: f64,
        timings: StepTimings,
    ) {
        let loss = total.loss() / total.tokens.max(1) as f64;
        if self.formation.rank == 0 {
            info!(step, loss, gradient_norm = applied.gradient_norm, seconds, "step applied");
        } else {
            debug!(step, loss, seconds, "step applied");
        }
        self.around.report(Message::Step(StepReport {
            job_id: self.job.plan.job_id.clone(),
            attempt: self.job.plan.attempt,
            generation: self.formation.generation,
            step,
            rank: self.formation.rank,
            loss,
            reduced: Some(total.as_announcement()),
            gradient_norm: applied.gradient_norm,
            learning_rate: applied.learning_rate,
            seconds,
            timings: Some(timings),
            bad_samples: skipped.as_ref().map(|skipped| skipped.samples.clone()).unwrap_or_default(),
            skipped: skipped.map(|skipped| skipped.reason).unwrap_or_default(),
        }));
    }
}

/// Keeps the local sum if the generation counts on it, drops it otherwise.
fn take_first_rows(job: &mut Job, formation: &Formation) -> Result<(), Error> {
    let expected = formation.start.first_rows.as_ref().map_or(&[][..], |(kept, _)| kept);
    if expected.is_empty() {
        return job.drop_sum();
    }
    let step = formation.start.applied_step + 1;
    let holds = job.sum.kept().is_some_and(|(of, rows)| of == step && same_rows(rows, expected));
    if holds {
        return Ok(());
    }
    let reason = format!(
        "it counts on a sum of {} rows for step {step} that this worker does not hold",
        expected.len()
    );
    Err(Error::Protocol { message: "Form", reason })
}

fn same_rows(left: &[u64], right: &[u64]) -> bool {
    let sorted = |rows: &[u64]| {
        let mut rows = rows.to_vec();
        rows.sort_unstable();
        rows
    };
    sorted(left) == sorted(right)
}

/// Passes failpoints at the hops of a step's reduction, counted over all its operations.
fn hop_hook(
    around: &Surroundings,
    formation: &Formation,
    hops: &Arc<Hops>,
    collective: &dyn Collective,
) -> shanty_collective::HopHook {
    let (failpoints, hops) = (around.failpoints.clone(), Arc::clone(hops));
    let (formation, abort) = (formation.clone(), collective.abort_handle());
    Box::new(move |_: HopPoint| {
        if !hops.reducing.load(Ordering::Relaxed) {
            return;
        }
        let hop = hops.passed.fetch_add(1, Ordering::Relaxed);
        let place = formation.place(hops.step.load(Ordering::Relaxed));
        if let Err(error) = failpoints.reach(Point::RingHop(hop), place) {
            if matches!(error, Error::Killed) {
                *hops.died.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
            abort.abort("failpoint");
        }
    })
}
