//! The thread that trains: idle, then loaded, then a member of one generation after another.
//!
//! Between generations it follows commands in order. Within one it looks at none: the session interrupts it through
//! [`Control`], and the command that says why lies next in the channel.

mod boundary;
mod check;
mod checkpoint;
mod compare;
mod debts;
pub(crate) mod formation;
mod job;
mod keep;
mod link;
mod pipeline;
mod reduction;
mod shard;
mod spoilt;
mod start;
mod state;
mod step;
mod sum;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use shanty_collective::tcp;
use shanty_proto::v1::{
    Assign, BaseReady, Broken, Form, Keep, KeptSum, Leave, Left, MemberPhase, Release, WorkerFailure,
    worker_message::Message,
};
use tokio::sync::mpsc::UnboundedSender;
use tracing::{error, info, warn};

use crate::{
    Error,
    control::{Control, Interrupted},
    engine::{EngineLoader, LoadRequest},
    failpoint::Failpoints,
    plan::JobPlan,
    row_log::RowLog,
    rows::RowClient,
};

use formation::Formation;
use job::Job;
use step::{Generation, Links};

/// How long a failed collective waits for the coordinator to say why, before the worker says that it broke: the
/// coordinator notices a lost member as well, and its reason is better than "connection reset".
const PATIENCE: Duration = Duration::from_millis(150);

/// What the coordinator wants, in the order in which it said so.
#[derive(Debug)]
pub(crate) enum Command {
    /// Load base and adapter.
    Assign(Assign),
    /// Take part in a generation.
    Form(Form),
    /// Take no further part in it.
    Leave(Leave),
    /// Write a checkpoint of the state that a generation was left with.
    Keep(Keep),
    /// The job is over.
    Release(Release),
    /// The coordinator went on without this worker.
    Dropped,
    /// The process ends.
    Close,
}

/// Why a generation's work stops.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The generation was left; the next command says why.
    Interrupted,
    /// A collective failed by itself.
    Broken(String),
    /// The worker cannot go on with the job.
    Failed(Error),
    /// A failpoint's simulated death.
    Killed,
}

impl From<Interrupted> for Stop {
    fn from(_: Interrupted) -> Self {
        Self::Interrupted
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        match error {
            Error::Killed => Self::Killed,
            error => Self::Failed(error),
        }
    }
}

/// What the trainer uses of its surroundings.
pub(crate) struct Surroundings {
    pub(crate) worker_id: String,
    pub(crate) threads: usize,
    pub(crate) device: String,
    pub(crate) memory_limit_bytes: Option<u64>,
    pub(crate) control: Arc<Control>,
    pub(crate) reports: UnboundedSender<Message>,
    pub(crate) rows: RowClient,
    pub(crate) listener: tcp::Listener,
    pub(crate) failpoints: Failpoints,
}

impl Surroundings {
    /// Tells the coordinator. A closed channel means that the session is over, and with it this process.
    pub(crate) fn report(&self, message: Message) {
        let _ = self.reports.send(message);
    }
}

/// The generation that the trainer belongs to.
struct Member {
    job_id: String,
    attempt: u32,
    generation: u64,
    /// Kept after the last step until the generation is over.
    links: Option<Links>,
}

/// The trainer.
pub(crate) struct Trainer {
    around: Surroundings,
    loader: Box<dyn EngineLoader>,
    commands: Receiver<Command>,
    job: Option<Job>,
    member: Option<Member>,
}

impl Trainer {
    pub(crate) fn new(
        around: Surroundings,
        loader: Box<dyn EngineLoader>,
        commands: Receiver<Command>,
    ) -> Self {
        Self { around, loader, commands, job: None, member: None }
    }

    /// Follows commands until `Close` or the end of the session.
    ///
    /// # Errors
    /// [`Error::Killed`] if a failpoint simulated this worker's death.
    pub(crate) fn run(mut self) -> Result<(), Error> {
        self.around.control.set_phase(MemberPhase::Idle);
        while let Ok(command) = self.commands.recv() {
            self.around.control.set_at_work(true);
            match command {
                Command::Assign(assign) => self.assign(assign),
                Command::Form(form) => self.form(form)?,
                Command::Leave(leave) => self.leave(&leave),
                Command::Keep(wanted) => {
                    if let Some(job) = &mut self.job {
                        keep::keep(&self.around, job, &wanted);
                    }
                }
                Command::Release(release) => self.release(&release),
                Command::Dropped => {
                    self.member = None;
                    let phase = if self.job.is_some() { MemberPhase::Ready } else { MemberPhase::Idle };
                    self.around.control.set_phase(phase);
                }
                Command::Close => break,
            }
            self.around.control.set_at_work(false);
        }
        if let Some(job) = &mut self.job {
            job.checkpoints.wait();
        }
        Ok(())
    }

    fn assign(&mut self, assign: Assign) {
        let (job_id, attempt) = (assign.job_id.clone(), assign.attempt);
        self.member = None;
        let began = Instant::now();
        match self.load(assign) {
            Ok(()) => {
                let Some(job) = &self.job else { return };
                let facts = job.engine.facts();
                self.around.control.set_phase(MemberPhase::Ready);
                self.around.report(Message::BaseReady(BaseReady {
                    job_id,
                    attempt,
                    base_hash: facts.base_hash.clone(),
                    trainable_parameters: facts.trainable_parameters,
                    total_parameters: facts.total_parameters,
                    matched_modules: facts.matched_modules.clone(),
                    seconds: began.elapsed().as_secs_f64(),
                    shard_part: job.plan.part(),
                }));
            }
            Err(error) => {
                self.job = None;
                self.around.control.set_phase(MemberPhase::Idle);
                self.fail(&job_id, attempt, &error);
            }
        }
    }

    /// Loads what the assignment needs. What is loaded already serves again.
    fn load(&mut self, assign: Assign) -> Result<(), Error> {
        let plan = JobPlan::new(assign)?;
        if let Some(job) = &mut self.job
            && job.plan.needs_same_engine(&plan)
            && job.plan.part == plan.part
        {
            if job.plan.attempt != plan.attempt {
                job.forget_state()?;
                self.around.control.set_applied(0);
            }
            job.plan = plan;
            return Ok(());
        }
        // Another part of the same base: adapter and optimizer stay.
        let same_attempt = |job: &&Job| job.plan.needs_same_engine(&plan) && job.plan.attempt == plan.attempt;
        let carried = match self.job.as_ref().filter(same_attempt) {
            Some(job) => job.carried()?,
            None => None,
        };
        self.drop_job();
        self.around.control.set_phase(MemberPhase::Loading);
        info!(job = %plan.job_id, base = %plan.spec.base.model.display(), "loading the base");
        let row_log = RowLog::open(&plan.store, &self.around.worker_id)?;
        let mut spec = plan.spec.clone();
        spec.base.model = local_base(&plan.spec.base.model)?;
        let request = LoadRequest {
            spec: &spec,
            threads: self.around.threads,
            device: &self.around.device,
            memory_limit_bytes: self.around.memory_limit_bytes,
            steps: plan.steps(),
            store: &plan.store,
            part: plan.part,
        };
        let mut told = 0;
        let engine = self.loader.load(request, &mut |share| {
            let quarters = (share * 4.0) as u32;
            if quarters > told {
                told = quarters;
                info!(percent = quarters * 25, "loading the base");
            }
        })?;
        let mut job = Job::new(plan, engine, row_log);
        if let Some(carried) = carried {
            self.around.control.set_applied(carried.applied());
            job.carry(carried)?;
        }
        self.around.control.set_part(job.plan.part());
        self.job = Some(job);
        Ok(())
    }

    fn form(&mut self, form: Form) -> Result<(), Error> {
        let (job_id, attempt, generation) = (form.job_id.clone(), form.attempt, form.generation);
        self.member = None;
        let taken_part = self.take_part(form);
        let stop = match taken_part {
            Ok(links) => {
                self.around.control.set_phase(MemberPhase::Waiting);
                self.member = Some(Member { job_id, attempt, generation, links: Some(links) });
                return Ok(());
            }
            Err(stop) => stop,
        };
        self.around.control.set_phase(MemberPhase::Waiting);
        self.member = Some(Member { job_id: job_id.clone(), attempt, generation, links: None });
        match stop {
            Stop::Interrupted => {}
            Stop::Broken(reason) => self.tell_broken(job_id, attempt, generation, reason),
            Stop::Failed(error) => {
                if let Some(job) = &mut self.job {
                    // What failed is told already.
                    let _ = job.drop_sum();
                }
                // The coordinator goes on without this worker; it may be assigned anew.
                self.member = None;
                self.around.control.drop_membership("this worker failed");
                self.fail(&job_id, attempt, &error);
            }
            Stop::Killed => {
                self.around.control.die();
                return Err(Error::Killed);
            }
        }
        Ok(())
    }

    fn take_part(&mut self, form: Form) -> Result<Links, Stop> {
        let Some(job) = &mut self.job else {
            let reason = "no base is loaded".to_owned();
            return Err(Error::Protocol { message: "Form", reason }.into());
        };
        let formation = Formation::new(form, &job.plan)?;
        info!(
            generation = formation.generation,
            rank = formation.rank,
            world_size = formation.world_size(),
            step = formation.start.applied_step,
            "forming a generation"
        );
        Generation::join(&self.around, job, formation)?.run()
    }

    fn tell_broken(&self, job_id: String, attempt: u32, generation: u64, reason: String) {
        if self.around.control.wait_for_interruption(generation, PATIENCE).is_err() {
            return;
        }
        warn!(generation, %reason, "the generation broke");
        let step = self.applied() + 1;
        self.around.report(Message::Broken(Broken { job_id, attempt, generation, step, error: reason }));
    }

    fn leave(&mut self, leave: &Leave) {
        let Some(member) = &mut self.member else { return };
        if member.generation != leave.generation {
            return;
        }
        if leave.after_step.is_none() {
            // Others may still be in the last collective of the step that all left after.
            member.links = None;
        }
        let Some(job) = &self.job else { return };
        let (applied_step, state_hash) = match &job.state {
            Some(state) => (state.applied(), state.hash(&*job.engine)),
            None => (0, Ok(String::new())),
        };
        let state_hash = match state_hash {
            Ok(hash) => hash,
            Err(error) => {
                let (job_id, attempt) = (member.job_id.clone(), member.attempt);
                self.member = None;
                return self.fail(&job_id, attempt, &error);
            }
        };
        let kept = job.sum.kept().map(|(step, rows)| KeptSum { step, row_ids: rows.to_vec() });
        let kept_rows = kept.as_ref().map_or(0, |kept| kept.row_ids.len());
        info!(generation = leave.generation, applied_step, kept_rows, "left the generation");
        self.around.report(Message::Left(Left {
            job_id: member.job_id.clone(),
            attempt: member.attempt,
            generation: member.generation,
            applied_step,
            state_hash,
            kept,
        }));
    }

    fn release(&mut self, release: &Release) {
        if self.job.as_ref().is_some_and(|job| job.plan.job_id != release.job_id) {
            return;
        }
        self.member = None;
        self.drop_job();
        self.around.control.set_phase(MemberPhase::Idle);
    }

    /// Lets go of base, state and sum. A checkpoint that is being written is finished first.
    fn drop_job(&mut self) {
        if let Some(mut job) = self.job.take() {
            job.checkpoints.wait();
        }
        self.around.control.set_applied(0);
        self.around.control.set_part(None);
    }

    fn fail(&self, job_id: &str, attempt: u32, error: &Error) {
        error!(job = job_id, code = %error.detail().code, %error, "cannot go on with the job");
        let error = Some(error.detail());
        self.around.report(Message::Failure(WorkerFailure { job_id: job_id.to_owned(), attempt, error }));
    }

    fn applied(&self) -> u64 {
        self.job.as_ref().and_then(|job| job.state.as_ref()).map_or(0, state::State::applied)
    }
}

/// The folder of the base: as it is named, or of the hub's cache, downloaded if it is not there.
fn local_base(model: &Path) -> Result<PathBuf, Error> {
    let mut told = 0;
    let folder = shanty_remote::hub::local_folder(model, &mut |progress| {
        let tenths = progress.bytes_done * 10 / progress.bytes_total.max(1);
        if tenths > told {
            told = tenths;
            info!(percent = tenths * 10, bytes = progress.bytes_total, "downloading the base");
        }
    });
    folder.map_err(|error| Error::part(&error))
}
