//! A generation's steps: compute, reduce, apply. docs/concepts/step-protocol.md tells why in this order.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use shanty_collective::{Collective, HopPoint};
use shanty_proto::v1::{Announcement, MemberPhase, StepReport, StepTimings, worker_message::Message};
use tracing::{debug, info};

use crate::{
    Error,
    engine::Row,
    failpoint::{Place, Point},
    row_log::Entry,
    rows::hash_of_rows,
};

use super::{
    Stop, Surroundings,
    check::Check,
    formation::Formation,
    job::Job,
    pipeline::Pipeline,
    shard::{self, Group},
    start,
    state::{Applied, State},
};

/// Entries of the gradient in one all-reduce. Between two, a member that is to leave does.
const CHUNK: usize = 1 << 22;

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
    pub(super) evaluated_step: Option<u64>,
    pub(super) checkpoint_step: Option<u64>,
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
        let mut collective: Box<dyn Collective> =
            match around.listener.join(&formation.join_options(&job.plan.job_id), abort) {
                Ok(collective) => Box::new(collective),
                Err(error) => return Err(start::broken(around, &formation, &error)),
            };
        let group = shard::join(around, job, &formation)?;
        start::reach_start(around, job, &formation, &mut *collective)?;
        take_first_rows(job, &formation)?;
        let pipeline = Pipeline::new(around.rows.clone(), requests, &job.plan, &formation);
        let hops = Arc::new(Hops::default());
        if around.failpoints.is_armed() {
            collective.set_hop_hook(Some(hop_hook(around, &formation, &hops, &*collective)));
        }
        let (evaluated_step, checkpoint_step) =
            (formation.start.evaluated_step, formation.start.checkpoint_step);
        Ok(Self {
            around,
            job,
            formation,
            collective,
            group,
            pipeline,
            evaluated_step,
            checkpoint_step,
            hops,
        })
    }

    /// Makes the steps that are left and what is due between them. Returns after the last, with the collectives: they
    /// stay open until all members are done.
    pub(super) fn run(mut self) -> Result<Links, Stop> {
        loop {
            self.boundary()?;
            if self.applied() >= self.job.plan.steps() {
                self.finish()?;
                return Ok(Links { _collective: self.collective, _group: self.group });
            }
            self.step()?;
        }
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
        control.set_phase(MemberPhase::Computing);
        self.pipeline.ask_up_to(control.credited_step(generation), &self.job.plan);
        let (leased, data_seconds) = self.pipeline.take(step)??;
        self.check_announcement(step, &leased.announcement)?;

        let computing = Instant::now();
        self.compute(step, &leased.rows)?;
        let compute_seconds = computing.elapsed().as_secs_f64();

        let reducing = Instant::now();
        control.set_phase(MemberPhase::Reducing);
        let total = self.reduce(step)?;
        let reduce_seconds = reducing.elapsed().as_secs_f64();
        total.compare(step, &leased.announcement)?;
        self.reach(Point::AfterReduction, step)?;

        let updating = Instant::now();
        let applied = self.apply(step, total)?;
        let update_seconds = updating.elapsed().as_secs_f64();
        let timings = StepTimings { data_seconds, compute_seconds, reduce_seconds, update_seconds };
        let seconds = began.elapsed().as_secs_f64();
        self.reach(Point::AfterUpdate, step)?;
        self.report_step(step, total, applied, seconds, timings);
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
    fn compute(&mut self, step: u64, rows: &[Row]) -> Result<(), Stop> {
        let place = self.formation.place(step);
        let failpoints = &self.around.failpoints;
        let seed = self.job.plan.spec.train.seed;
        let micro_batch_rows = usize::try_from(self.job.micro_batch_rows.max(1)).unwrap_or(usize::MAX);
        self.job.sum.begin(step, self.job.reduced.len());
        for micro_batch in rows.chunks(micro_batch_rows) {
            self.round(true)?;
            let Some(state) = &self.job.state else { return Err(missing_state().into()) };
            let engine = &mut self.job.engine;
            let mut died = Ok(());
            let mut during = || {
                if died.is_ok() {
                    died = failpoints.reach(Point::MidBackward, place);
                }
            };
            let ids = micro_batch.iter().map(|row| row.id);
            let added = self.job.sum.add(ids, |gradient| {
                engine.forward_backward(&state.parameters, micro_batch, seed, step, gradient, &mut during)
            });
            added.map_err(|error| self.stop_for(error))?;
            died?;
        }
        self.keep_company(true)
    }

    /// Sums over all ranks: the gradient into `job.reduced`, the integers last. With them the step is committed.
    fn reduce(&mut self, step: u64) -> Result<Check, Stop> {
        self.job.row_log.write(&Entry::Entering {
            attempt: self.job.plan.attempt,
            generation: self.formation.generation,
            step,
            rank: self.formation.rank,
            world_size: self.formation.world_size(),
            rows: self.job.sum.rows().to_vec(),
        })?;
        self.reach(Point::EnteringReduction, step)?;
        self.hops.step.store(step, Ordering::Relaxed);
        self.hops.passed.store(0, Ordering::Relaxed);
        self.hops.reducing.store(true, Ordering::Relaxed);
        let reduced = self.reduce_all();
        self.hops.reducing.store(false, Ordering::Relaxed);
        if let Some(error) = self.hops.died.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error.into());
        }
        reduced.map_err(|error| start::broken(self.around, &self.formation, &error))
    }

    fn reduce_all(&mut self) -> Result<Check, shanty_collective::Error> {
        let sum = &self.job.sum;
        for (local, reduced) in sum.gradient().chunks(CHUNK).zip(self.job.reduced.chunks_mut(CHUNK)) {
            self.collective.all_reduce_f32(local, reduced)?;
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

    /// Applies a committed step. Every rank does the same with the same bits.
    fn apply(&mut self, step: u64, total: Check) -> Result<Applied, Stop> {
        if total.not_finite > 0 {
            let rows = self.job.sum.not_finite().1.to_vec();
            return Err(Error::NotFinite { what: "the loss", step, rows }.into());
        }
        let Some(state) = &mut self.job.state else { return Err(missing_state().into()) };
        let engine = &*self.job.engine;
        let Some(applied) = self.job.update.apply(state, &mut self.job.reduced, total.tokens, engine)? else {
            // The rows are known only to the rank whose own sum is at fault.
            let own = self.job.sum.gradient().iter().any(|value| !value.is_finite());
            let rows = if own { self.job.sum.rows().to_vec() } else { Vec::new() };
            return Err(Error::NotFinite { what: "the gradient", step, rows }.into());
        };
        self.job.sum.clear();
        self.around.control.set_applied(step);
        self.job.row_log.write(&Entry::Applied {
            attempt: self.job.plan.attempt,
            generation: self.formation.generation,
            step,
            rank: self.formation.rank,
        })?;
        Ok(applied)
    }

    fn report_step(&self, step: u64, total: Check, applied: Applied, seconds: f64, timings: StepTimings) {
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
        }));
    }
}

/// Keeps the local sum if the generation counts on it, drops it otherwise.
fn take_first_rows(job: &mut Job, formation: &Formation) -> Result<(), Error> {
    let expected = formation.start.first_rows.as_ref().map_or(&[][..], |(kept, _)| kept);
    if expected.is_empty() {
        job.sum.clear();
        return Ok(());
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

pub(super) fn missing_state() -> Error {
    Error::Protocol { message: "Form", reason: "it gave this worker no state".to_owned() }
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
