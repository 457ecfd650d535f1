//! The model of a trainer: rows for gradients, the protocol as it is. `trainer.rs` is what it is a model of.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError},
    },
    time::Duration,
};

use shanty_proto::v1::{
    Announcement, Assign, BaseReady, Broken, CheckpointWritten, Finished, Form, KeptSum, LeaseRowsRequest,
    Leave, Left, MemberPhase, Release, Split, StepReport, StepTimings, worker_message::Message,
};
use tokio::{
    sync::mpsc::UnboundedSender,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::sea::{Call, Shared, State, lock};
use crate::{
    control::{Control, Interrupted},
    plan::JobPlan,
    rows::{Lease, Leased, RowClient, hash_of_rows},
    trainer::{
        Command,
        formation::{Formation, Origin},
    },
};

/// How often the model looks whether something changed that a thread would be woken by.
const LOOK: Duration = Duration::from_millis(3);
/// As the trainer's: how long a failed collective waits for the coordinator to say why.
const PATIENCE: Duration = Duration::from_millis(150);

struct Job {
    plan: JobPlan,
    state: Option<State>,
    /// Rows of the local sum, and the step that they are of.
    sum: (u64, Vec<u64>),
}

/// The generation that the worker belongs to; leaves the collective when it is dropped, as a dead process does.
struct Berth {
    sea: Shared,
    job_id: String,
    attempt: u32,
    generation: u64,
    rank: u32,
    world: u32,
}

impl Drop for Berth {
    fn drop(&mut self) {
        lock(&self.sea).gone(self.generation, self.rank);
    }
}

enum Stop {
    Interrupted,
    Broken(String),
}

impl From<Interrupted> for Stop {
    fn from(_: Interrupted) -> Self {
        Self::Interrupted
    }
}

/// A model of a trainer.
pub(super) struct Model {
    sea: Shared,
    control: Arc<Control>,
    commands: Receiver<Command>,
    reports: UnboundedSender<Message>,
    rows: RowClient,
    job: Option<Job>,
    member: Option<Berth>,
}

impl Model {
    pub(super) fn new(
        sea: Shared,
        control: Arc<Control>,
        commands: Receiver<Command>,
        reports: UnboundedSender<Message>,
        rows: RowClient,
    ) -> Self {
        Self { sea, control, commands, reports, rows, job: None, member: None }
    }

    /// Follows commands.
    pub(super) async fn run(mut self) {
        self.control.set_phase(MemberPhase::Idle);
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    self.control.set_at_work(true);
                    self.follow(command).await;
                    self.control.set_at_work(false);
                }
                Err(TryRecvError::Empty) => sleep(LOOK).await,
                Err(TryRecvError::Disconnected) => return,
            }
        }
    }

    async fn follow(&mut self, command: Command) {
        match command {
            Command::Assign(assign) => self.assign(assign).await,
            Command::Form(form) => self.form(form).await,
            Command::Leave(leave) => self.leave(&leave),
            Command::Release(release) => self.release(&release),
            Command::Dropped => {
                self.member = None;
                let phase = if self.job.is_some() { MemberPhase::Ready } else { MemberPhase::Idle };
                self.control.set_phase(phase);
            }
            _ => {}
        }
    }

    fn report(&self, message: Message) {
        // A closed channel means that the session is over, and with it this host.
        let _ = self.reports.send(message);
    }

    async fn assign(&mut self, assign: Assign) {
        self.member = None;
        let (job_id, attempt) = (assign.job_id.clone(), assign.attempt);
        let plan = JobPlan::new(assign).expect("the coordinator's assignment makes sense");
        let same = self.job.as_ref().is_some_and(|job| job.plan.needs_same_engine(&plan));
        if !same {
            self.control.set_phase(MemberPhase::Loading);
            self.control.set_applied(0);
            self.job = None;
            let time = lock(&self.sea).chance.milliseconds(5, 200);
            sleep(time).await;
        }
        let before = self.job.take().filter(|job| job.plan.attempt == attempt);
        let (state, sum) = before.map_or((None, (0, Vec::new())), |job| (job.state, job.sum));
        self.job = Some(Job { plan, state, sum });
        self.control.set_phase(MemberPhase::Ready);
        self.report(Message::BaseReady(BaseReady {
            job_id,
            attempt,
            base_hash: "base".to_owned(),
            trainable_parameters: 1,
            ..BaseReady::default()
        }));
    }

    async fn form(&mut self, form: Form) {
        self.member = None;
        let job = self.job.as_ref().expect("nobody forms without a base");
        let formation = Formation::new(form.clone(), &job.plan).expect("the announcement makes sense");
        let berth = Berth {
            sea: Arc::clone(&self.sea),
            job_id: form.job_id,
            attempt: form.attempt,
            generation: formation.generation,
            rank: formation.rank,
            world: formation.world_size(),
        };
        let ended = self.take_part(&formation, &berth).await;
        self.control.set_phase(MemberPhase::Waiting);
        if let Err(Stop::Broken(error)) = ended {
            self.tell_broken(&berth, error).await;
        }
        self.member = Some(berth);
    }

    async fn tell_broken(&self, berth: &Berth, error: String) {
        lock(&self.sea).gone(berth.generation, berth.rank);
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if self.control.check(berth.generation).is_err() {
                return;
            }
            sleep(LOOK).await;
        }
        let step = self.applied() + 1;
        lock(&self.sea).note("broken", &[berth.generation, berth.rank.into(), step]);
        self.report(Message::Broken(Broken {
            job_id: berth.job_id.clone(),
            attempt: berth.attempt,
            generation: berth.generation,
            step,
            error,
            ..Broken::default()
        }));
    }

    fn applied(&self) -> u64 {
        self.job.as_ref().and_then(|job| job.state.as_ref()).map_or(0, State::applied)
    }

    async fn take_part(&mut self, formation: &Formation, berth: &Berth) -> Result<(), Stop> {
        let generation = berth.generation;
        self.control.check(generation)?;
        self.keep_or_drop_sum(formation);
        let own = self.job.as_ref().and_then(|job| job.state.clone()).unwrap_or_default();
        let begins_at = formation.start.applied_step;
        lock(&self.sea).join(generation, berth.rank, berth.world, begins_at, own);
        let states = loop {
            let call = lock(&self.sea).joined(generation);
            match call {
                Call::Done(states) => break states,
                Call::Broke => return Err(Stop::Broken("the ring did not close".to_owned())),
                Call::Waits => sleep(LOOK).await,
            }
            self.control.check(generation)?;
        };
        let transfer = lock(&self.sea).chance.milliseconds(0, 20);
        sleep(transfer).await;
        self.control.check(generation)?;
        self.take_state(formation, &states);
        let mut kept_checkpoint = formation.start.checkpoint_step;
        loop {
            self.boundary(berth, &mut kept_checkpoint).await?;
            let steps = self.job().plan.steps();
            if self.applied() >= steps {
                return self.finish(berth).await;
            }
            if !self.control.begin_step(generation, self.applied() + 1)? {
                return Ok(());
            }
            self.step(formation, berth).await?;
        }
    }

    fn job(&self) -> &Job {
        self.job.as_ref().expect("it is loaded")
    }

    fn job_mut(&mut self) -> &mut Job {
        self.job.as_mut().expect("it is loaded")
    }

    fn keep_or_drop_sum(&mut self, formation: &Formation) {
        let expected = formation.start.first_rows.as_ref().map_or(&[][..], |(kept, _)| kept);
        let step = formation.start.applied_step + 1;
        let job = self.job_mut();
        if expected.is_empty() {
            job.sum = (step, Vec::new());
            return;
        }
        assert_eq!((job.sum.0, &job.sum.1[..]), (step, expected), "the sum that the generation counts on");
    }

    fn take_state(&mut self, formation: &Formation, states: &std::collections::BTreeMap<u32, State>) {
        let applied = formation.start.applied_step;
        let state = match &formation.start.from {
            Origin::Seed => State::default(),
            Origin::Checkpoint(path) => lock(&self.sea).read_checkpoint(path),
            Origin::Members { donor, receivers } => {
                let given = states[donor].clone();
                if !receivers.contains(&formation.rank) {
                    let own = self.job().state.as_ref();
                    assert_eq!(own, Some(&given), "a member that is no receiver has another state");
                }
                given
            }
        };
        assert_eq!(state.applied(), applied, "the state that the generation begins with");
        self.job_mut().state = Some(state);
        self.control.set_applied(applied);
    }

    async fn credit(&self, generation: u64, step: u64) -> Result<(), Stop> {
        loop {
            self.control.check(generation)?;
            if self.control.credited_step(generation) >= step && self.control.holds_credit(generation) {
                return Ok(());
            }
            self.control.set_phase(MemberPhase::Waiting);
            self.control.beat_wanted.notify_one();
            sleep(LOOK * 4).await;
        }
    }

    async fn boundary(&mut self, berth: &Berth, kept: &mut Option<u64>) -> Result<(), Stop> {
        let applied = self.applied();
        if !self.job().plan.checkpoint_is_due(applied, *kept) {
            return Ok(());
        }
        self.credit(berth.generation, applied).await?;
        if berth.rank == 0 {
            let time = lock(&self.sea).chance.milliseconds(0, 30);
            sleep(time).await;
            // A worker whose credit has expired writes no manifest.
            if self.control.holds_credit(berth.generation) {
                let state = self.job().state.clone().expect("a member has a state");
                let record = lock(&self.sea).keep_checkpoint(berth.generation, berth.attempt, &state);
                self.report(Message::Checkpoint(CheckpointWritten {
                    job_id: berth.job_id.clone(),
                    attempt: berth.attempt,
                    generation: berth.generation,
                    step: applied,
                    path: record.path,
                    size_bytes: 1,
                    seconds: 0.0,
                    ..CheckpointWritten::default()
                }));
            }
        }
        *kept = Some(applied);
        Ok(())
    }

    async fn finish(&mut self, berth: &Berth) -> Result<(), Stop> {
        let steps = self.applied();
        self.credit(berth.generation, steps).await?;
        if berth.rank == 0 {
            let state = self.job().state.clone();
            lock(&self.sea).finished = state;
            self.report(Message::Finished(Finished {
                job_id: berth.job_id.clone(),
                attempt: berth.attempt,
                generation: berth.generation,
                step: steps,
                adapter: "/adapter".to_owned(),
                ..Finished::default()
            }));
        }
        Ok(())
    }

    async fn step(&mut self, formation: &Formation, berth: &Berth) -> Result<(), Stop> {
        let step = self.applied() + 1;
        let generation = berth.generation;
        self.credit(generation, step).await?;
        self.control.set_phase(MemberPhase::Computing);
        let start = &formation.start;
        let to_compute = match (&start.first_rows, start.applied_step + 1 == step) {
            (Some((_, compute)), true) => compute.clone(),
            _ => self.job().plan.rows_of_rank(step, berth.world, berth.rank),
        };
        let leased = self.lease(berth, step, &to_compute).await?;
        let whole = self.job().plan.rows_of_step(step);
        let announced = (leased.announcement.rows, leased.announcement.row_hash);
        assert_eq!(
            announced,
            (whole.len() as u64, hash_of_rows(whole.iter().copied())),
            "announcement of {step}"
        );
        self.compute(generation, step, &leased).await?;
        self.credit(generation, step).await?;
        self.reduce(berth, step, leased.announcement).await
    }

    async fn lease(&self, berth: &Berth, step: u64, rows: &[u64]) -> Result<Leased, Stop> {
        let request = LeaseRowsRequest {
            job_id: berth.job_id.clone(),
            attempt: berth.attempt,
            generation: berth.generation,
            split: Split::Train.into(),
            step,
            row_ids: rows.to_vec(),
            ..LeaseRowsRequest::default()
        };
        let (_, cancel) = self.control.handles(berth.generation)?;
        let lease: Lease = self.rows.lease(request.clone(), cancel.clone());
        let twice = lock(&self.sea).faults.twice;
        // A request that comes twice gets the same rows twice, and nothing else happens.
        let repeat =
            lock(&self.sea).strikes(twice).then(|| self.rows.lease(request, CancellationToken::new()));
        let leased = self.wait(berth, &lease).await?;
        if let Some(repeat) = repeat
            && let Ok(Some(Ok(again))) = repeat.look()
        {
            assert_eq!(again, leased, "the same request gets the same rows");
        }
        Ok(leased)
    }

    async fn wait(&self, berth: &Berth, lease: &Lease) -> Result<Leased, Stop> {
        loop {
            self.control.check(berth.generation)?;
            match lease.look()? {
                Some(Ok(leased)) => return Ok(leased),
                Some(Err(error)) => panic!("rows were refused: {error}"),
                None => sleep(LOOK).await,
            }
        }
    }

    async fn compute(&mut self, generation: u64, step: u64, leased: &Leased) -> Result<(), Stop> {
        let job = self.job_mut();
        if job.sum.0 != step {
            job.sum = (step, Vec::new());
        }
        for row in &leased.rows {
            self.control.check(generation)?;
            let time = {
                let mut sea = lock(&self.sea);
                let stall = sea.faults.stall * 10;
                if sea.strikes(stall) {
                    sea.chance.milliseconds(100, 2500)
                } else {
                    sea.chance.milliseconds(1, 20)
                }
            };
            sleep(time).await;
            self.control.advance();
            self.job_mut().sum.1.push(row.id);
        }
        Ok(self.control.check(generation)?)
    }

    async fn reduce(&mut self, berth: &Berth, step: u64, announced: Announcement) -> Result<(), Stop> {
        let generation = berth.generation;
        self.control.set_phase(MemberPhase::Reducing);
        let own = self.job().sum.1.clone();
        lock(&self.sea).enter(generation, step, berth.rank, own);
        let mut rows = loop {
            let call = lock(&self.sea).sum(generation, step);
            match call {
                Call::Done(rows) => break rows,
                Call::Broke => return Err(Stop::Broken("the ring broke".to_owned())),
                Call::Waits => sleep(LOOK).await,
            }
            // A reduction that is whole already stands, whatever the coordinator says meanwhile.
            self.control.check(generation)?;
        };
        let reduced = Announcement {
            tokens: rows.len() as u64 * 3,
            rows: rows.len() as u64,
            row_hash: hash_of_rows(rows.iter().copied()),
        };
        assert_eq!(reduced, announced, "the sum of step {step} in generation {generation}");
        rows.sort_unstable();
        lock(&self.sea).applied(generation, berth.rank, step, &rows);
        let job = self.job_mut();
        job.state.as_mut().expect("a member has a state").steps.push(rows);
        job.sum = (step + 1, Vec::new());
        self.control.set_applied(step);
        self.report(Message::Step(StepReport {
            job_id: berth.job_id.clone(),
            attempt: berth.attempt,
            generation,
            step,
            rank: berth.rank,
            loss: 1.0,
            reduced: Some(reduced),
            gradient_norm: 1.0,
            learning_rate: 1.0,
            seconds: 0.05,
            timings: Some(StepTimings::default()),
            ..StepReport::default()
        }));
        Ok(())
    }

    fn leave(&mut self, leave: &Leave) {
        let Some(berth) = self.member.as_ref().filter(|berth| berth.generation == leave.generation) else {
            return;
        };
        if leave.after_step.is_none() {
            // Others may still be in the last collective of a step that all leave after.
            lock(&self.sea).gone(berth.generation, berth.rank);
        }
        let Some(job) = &self.job else { return };
        let applied = job.state.as_ref().map_or(0, State::applied);
        let hash = job.state.as_ref().map(|state| format!("{:?}", state.steps));
        let state_hash =
            hash.map_or_else(String::new, |text| blake3::hash(text.as_bytes()).to_hex().to_string());
        let (step, rows) = &job.sum;
        let kept = (!rows.is_empty() && *step == applied + 1).then(|| KeptSum {
            step: *step,
            row_ids: rows.clone(),
            ..KeptSum::default()
        });
        lock(&self.sea).note("left", &[berth.generation, berth.rank.into(), applied]);
        self.report(Message::Left(Left {
            job_id: berth.job_id.clone(),
            attempt: berth.attempt,
            generation: berth.generation,
            applied_step: applied,
            state_hash,
            kept,
            ..Left::default()
        }));
    }

    fn release(&mut self, release: &Release) {
        if self.job.as_ref().is_some_and(|job| job.plan.job_id != release.job_id) {
            return;
        }
        self.member = None;
        self.job = None;
        self.control.set_applied(0);
        self.control.set_phase(MemberPhase::Idle);
    }
}
