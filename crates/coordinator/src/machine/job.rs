//! A job, as the machine holds it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use shanty_config::JobSpec;
use shanty_data::order::Order;
use shanty_proto::{Attempt, Generation, JobId, Rank, Step, WorkerId};

use super::{
    crew::Crew,
    event::{KeptSum, Moment},
    health::Health,
    ledger::{Ledger, rows_between, rows_through},
    record::{
        CheckpointRecord, DataFacts, EvaluationRecord, EventRecord, FailureRecord, GenerationRecord,
        JobRecord, JobState, StepRecord,
    },
    turns::Standing,
};

/// Events that the status shows.
const EVENTS_SHOWN: usize = 100;
/// How far below the watermark reports are still told from repeats in memory; the store tells the rest.
const RECENT_STEPS: u64 = 256;

/// What a job is doing.
#[derive(Debug, Clone)]
pub(crate) enum Phase {
    /// Waits for its turn.
    Queued,
    /// Its data is being prepared.
    Preparing,
    /// No generation is alive.
    Forming(Forming),
    /// The newest generation is alive.
    Running,
    /// The newest generation is being left.
    Leaving(Leaving),
    /// Nothing more happens: `Succeeded`, `Failed` or `Cancelled`.
    Ended(JobState),
}

/// Waiting for a generation.
#[derive(Debug, Clone)]
pub(crate) struct Forming {
    /// Where its state comes from.
    pub origin: Origin,
    /// When enough workers were first ready.
    pub enough_since: Option<Duration>,
}

/// Where the next generation's state comes from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Origin {
    /// Initialised from the seed.
    Fresh,
    /// A checkpoint is to be found once no old generation can write one any more.
    Fenced,
    /// It is being looked for.
    Searching,
    /// It was found.
    Checkpoint(CheckpointRecord),
    /// Workers that left the last generation hold it.
    Holders(BTreeMap<WorkerId, Holder>),
}

/// A worker that left the last generation and still lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// Its place in the last generation.
    pub rank: Rank,
    /// Updates applied.
    pub applied: Step,
    /// The sum that it keeps.
    pub kept: Option<KeptSum>,
    /// Hash of its adapter and optimizer.
    pub hash: String,
    /// It was asked to load another part of its base since: what its group added up is void.
    pub moved: bool,
}

/// A generation is being left.
#[derive(Debug, Clone)]
pub(crate) struct Leaving {
    /// When it began.
    pub since: Duration,
    /// Why, as it is told to the members.
    pub cause: String,
    /// All leave once they have applied this step; nothing if they leave at once.
    pub after: Option<Step>,
}

/// Why a generation ends early.
#[derive(Debug, Clone)]
pub(crate) struct Cause {
    /// In one word; see [`super::record::RecoveryRecord::cause`].
    pub kind: &'static str,
    /// In words.
    pub text: String,
    /// The worker that it is about.
    pub worker: Option<WorkerId>,
    /// How long it had gone unnoticed.
    pub detection_ms: Option<f64>,
}

impl Cause {
    pub fn new(kind: &'static str, text: String) -> Self {
        Self { kind, text, worker: None, detection_ms: None }
    }

    pub fn of(self, worker: &WorkerId, detection_ms: Option<f64>) -> Self {
        Self { worker: Some(worker.clone()), detection_ms, ..self }
    }

    /// Whether something went wrong, as opposed to workers that come and go.
    pub fn is_unwanted(&self) -> bool {
        !matches!(self.kind, "joined" | "drained" | "straggler" | "gives_way" | "shrunk")
    }
}

/// A break that no step has been committed after yet.
#[derive(Debug, Clone)]
pub(crate) struct Break {
    /// When it was noticed.
    pub noticed: Duration,
    /// Its first cause.
    pub cause: Cause,
    /// Committed steps that have to be trained again.
    pub steps_lost: u64,
    /// Rows requeued before it.
    pub requeued_before: u64,
}

/// A job.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub id: JobId,
    pub sequence: u64,
    pub request_id: String,
    pub spec: Arc<JobSpec>,
    pub spec_json: Arc<str>,
    pub phase: Phase,
    pub standing: Standing,
    pub reason: String,
    pub failure: Option<FailureRecord>,
    pub attempt: Attempt,
    pub facts: Option<DataFacts>,
    pub order: Option<Order>,
    pub watermark: Step,
    pub furthest: Step,
    pub evaluated: Option<Step>,
    pub checkpoint: Option<Step>,
    pub requeued: u64,
    pub recomputed: u64,
    pub total_losses: u32,
    pub adapter: String,
    pub submitted_unix_ms: u64,
    pub started_unix_ms: u64,
    pub ended_unix_ms: u64,
    /// The newest generation.
    pub generation: Option<Arc<GenerationRecord>>,
    /// Its members as they are now.
    pub crew: Crew,
    /// Whether a generation of this attempt was formed.
    pub formed: bool,
    /// Whether the newest generation committed a step.
    pub advanced: bool,
    /// Generations in a row that broke before their first step.
    pub fruitless: u32,
    pub broken: Option<Break>,
    /// Hash of the base that the first ready worker loaded in this attempt.
    pub base_hash: Option<String>,
    /// Steps that have a record, near the watermark.
    pub recorded: BTreeSet<Step>,
    pub last_step: Option<StepRecord>,
    pub tokens_per_second: f64,
    pub seconds_per_step: f64,
    pub evaluations: Vec<EvaluationRecord>,
    pub checkpoints: Vec<CheckpointRecord>,
    pub events: Vec<EventRecord>,
    pub health: Health,
}

impl Job {
    pub fn new(
        id: JobId,
        sequence: u64,
        request_id: String,
        spec: Arc<JobSpec>,
        spec_json: Arc<str>,
    ) -> Self {
        Self {
            id,
            sequence,
            request_id,
            spec,
            spec_json,
            phase: Phase::Queued,
            standing: Standing::default(),
            reason: "waits for its turn".to_owned(),
            failure: None,
            attempt: Attempt(1),
            facts: None,
            order: None,
            watermark: Step(0),
            furthest: Step(0),
            evaluated: None,
            checkpoint: None,
            requeued: 0,
            recomputed: 0,
            total_losses: 0,
            adapter: String::new(),
            submitted_unix_ms: 0,
            started_unix_ms: 0,
            ended_unix_ms: 0,
            generation: None,
            crew: Crew::default(),
            formed: false,
            advanced: false,
            fruitless: 0,
            broken: None,
            base_hash: None,
            recorded: BTreeSet::new(),
            last_step: None,
            tokens_per_second: 0.0,
            seconds_per_step: 0.0,
            evaluations: Vec::new(),
            checkpoints: Vec::new(),
            events: Vec::new(),
            health: Health::default(),
        }
    }

    /// The state that users see.
    pub fn state(&self) -> JobState {
        match &self.phase {
            Phase::Queued => JobState::Queued,
            Phase::Preparing => JobState::Preparing,
            Phase::Forming(_) if self.formed => JobState::Recovering,
            Phase::Forming(_) => JobState::Forming,
            Phase::Running => JobState::Running,
            Phase::Leaving(_) => JobState::Recovering,
            Phase::Ended(state) => *state,
        }
    }

    pub fn is_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }

    /// Whether workers may be asked to load its base.
    pub fn wants_workers(&self) -> bool {
        matches!(self.phase, Phase::Forming(_) | Phase::Running | Phase::Leaving(_))
    }

    /// Number of the newest generation; 0 before the first.
    pub fn generation_number(&self) -> Generation {
        self.generation.as_ref().map_or(Generation(0), |generation| generation.generation)
    }

    /// The step that the newest generation began after.
    pub fn begun_from(&self) -> Step {
        self.generation.as_ref().map_or(Step(0), |generation| generation.start.applied)
    }

    /// Whether members make steps: the generation runs, or is left after one.
    pub fn is_stepping(&self) -> bool {
        match &self.phase {
            Phase::Running => true,
            Phase::Leaving(leaving) => leaving.after.is_some(),
            _ => false,
        }
    }

    /// Whether a worker is a member of a living generation, or holds the state of the last one.
    pub fn needs(&self, worker: &WorkerId) -> bool {
        match &self.phase {
            Phase::Running | Phase::Leaving(_) => {
                self.crew.of(worker).is_some_and(|member| member.lost.is_none())
            }
            Phase::Forming(Forming { origin: Origin::Holders(holders), .. })
                if holders.contains_key(worker) =>
            {
                true
            }
            Phase::Forming(_) => self.is_to_say(worker),
            Phase::Queued | Phase::Preparing | Phase::Ended(_) => false,
        }
    }

    /// Whether a worker came back after its generation was over, and has yet to say what it holds.
    pub fn is_to_say(&self, worker: &WorkerId) -> bool {
        let forms = matches!(self.phase, Phase::Forming(_));
        let says = |member: &super::crew::Member| member.attached && member.left.is_none();
        forms && self.crew.of(worker).is_some_and(says)
    }

    /// Updates that the job makes in all; 0 before its data is prepared.
    pub fn steps(&self) -> Step {
        let Some(order) = &self.order else { return Step(0) };
        let of_epochs = u64::from(self.spec.train.epochs) * order.steps_per_epoch();
        Step(self.spec.train.steps.unwrap_or(of_epochs))
    }

    /// Takes over what the prepared data is.
    pub fn set_facts(&mut self, facts: DataFacts) -> Result<(), shanty_data::Error> {
        let train = &self.spec.train;
        let batch = train.global_batch_size as u64;
        let order = Order::mixed(train.seed, facts.train_rows, &facts.train_mix, batch)?;
        self.order = Some(order);
        self.facts = Some(facts);
        Ok(())
    }

    /// Rows by what became of them.
    pub fn ledger(&self, steps_ahead: u64) -> Ledger {
        let exceptions = Ledger {
            requeued: self.requeued,
            recomputed: self.recomputed,
            skipped: self.order.as_ref().map_or(0, |order| self.health.rows_skipped(order)),
            duplicates: self.health.record.duplicates,
            ..Ledger::default()
        };
        let Some(order) = &self.order else { return exceptions };
        let steps = self.steps();
        let done = rows_through(order, self.watermark);
        let committed = done.saturating_sub(exceptions.skipped);
        let up_to = match self.phase {
            Phase::Running | Phase::Leaving(_) => Step((self.watermark.0 + steps_ahead).min(steps.0)),
            _ => self.watermark,
        };
        let leased = rows_between(order, self.watermark, up_to);
        let remaining = rows_through(order, steps).saturating_sub(done + leased);
        Ledger { committed, leased, remaining, ..exceptions }
    }

    /// Raises the watermark; never lowers it. Says whether it rose.
    pub fn raise_watermark(&mut self, step: Step) -> bool {
        let step = step.min(self.steps());
        if step <= self.watermark {
            return false;
        }
        self.watermark = step;
        self.advanced = true;
        self.fruitless = 0;
        if step > self.furthest {
            self.furthest = step;
            self.total_losses = 0;
        }
        true
    }

    /// Notes that a step has a record; says whether it had none.
    pub fn note_recorded(&mut self, step: Step) -> bool {
        let fresh = self.recorded.insert(step);
        while let Some(first) = self.recorded.first().copied() {
            if first.0 + RECENT_STEPS >= self.watermark.0 {
                break;
            }
            self.recorded.pop_first();
        }
        fresh
    }

    /// Goes back to an earlier step: what came after it is no longer in the lineage.
    pub fn return_to(&mut self, step: Step) {
        if let Some(order) = &self.order {
            self.recomputed += rows_between(order, step, self.watermark);
        }
        if let Some(over) = &mut self.broken {
            over.steps_lost += self.watermark.0.saturating_sub(step.0);
        }
        self.watermark = step;
        self.health.return_to(step);
        self.recorded.retain(|recorded| *recorded <= step);
        self.evaluations.retain(|evaluation| evaluation.step <= step);
        self.checkpoints.retain(|checkpoint| checkpoint.step <= step);
        self.evaluated = self.evaluated.filter(|evaluated| *evaluated <= step);
        if self.last_step.as_ref().is_some_and(|last| last.step > step) {
            self.last_step = None;
        }
    }

    /// Notes an event; the caller makes it durable.
    pub fn event(&mut self, now: Moment, kind: &str, text: String) -> &mut EventRecord {
        if self.events.len() >= EVENTS_SHOWN {
            self.events.remove(0);
        }
        self.events.push(EventRecord {
            unix_ms: now.unix_ms,
            kind: kind.to_owned(),
            text,
            worker: None,
            step: self.watermark,
            detection_ms: None,
            stall_ms: None,
        });
        self.events.last_mut().expect("one was just pushed")
    }

    /// What is durable of it.
    pub fn record(&self) -> JobRecord {
        JobRecord {
            id: self.id.clone(),
            sequence: self.sequence,
            request_id: self.request_id.clone(),
            spec_json: self.spec_json.to_string(),
            state: self.state(),
            reason: self.reason.clone(),
            failure: self.failure.clone(),
            attempt: self.attempt,
            facts: self.facts.clone(),
            watermark: self.watermark,
            generation: self.generation.as_deref().cloned(),
            evaluated: self.evaluated,
            checkpoint: self.checkpoint,
            requeued: self.requeued,
            recomputed: self.recomputed,
            furthest: self.furthest,
            total_losses: self.total_losses,
            adapter: self.adapter.clone(),
            submitted_unix_ms: self.submitted_unix_ms,
            started_unix_ms: self.started_unix_ms,
            ended_unix_ms: self.ended_unix_ms,
            health: self.health.record.clone(),
            overtaken: self.standing.overtaken,
        }
    }
}
