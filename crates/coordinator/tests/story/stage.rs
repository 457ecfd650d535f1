//! A stage for stories: one machine, a clock that is set by hand, and short words for what workers say.

use std::{sync::Arc, time::Duration};

use shanty_coordinator::machine::{
    Announcement, Attachment, Change, Effect, Event, JobView, KeptSum, Machine, MemberPhase, Message, Moment,
    Options, Point, Refusal, Reply, Said, StepReport, StoredJob, Timings, Within, WorkerInfo,
    record::{CheckpointRecord, DataFacts, GenerationRecord, JobRecord, JobState},
};
use shanty_data::order::{self, Order};
use shanty_diagnostic::Diagnostic;
use shanty_proto::{Attempt, Generation, JobId, Rank, Step, WorkerId};

/// Rows of the training data on stage.
pub const ROWS: u64 = 20;
/// Rows of a step.
pub const BATCH: u64 = 6;

pub struct Stage {
    pub machine: Machine,
    pub now: u64,
    pub effects: Vec<Effect>,
    pub attempt: u32,
    sessions: std::collections::BTreeMap<String, u64>,
    /// The part of a base that each was asked to load last.
    parts: std::collections::BTreeMap<String, u32>,
    next_session: u64,
}

pub fn job() -> JobId {
    JobId::new("pirate").unwrap()
}

pub fn worker(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

pub fn spec(name: &str, min: u32, max: u32, steps: u64) -> serde_json::Value {
    serde_json::json!({
        "name": name,
        "base": { "model": "/base" },
        "adapter": {},
        "data": { "train": "/train.jsonl" },
        "train": { "steps": steps, "global_batch_size": BATCH, "seed": 3 },
        "checkpoint": { "store": format!("/runs/{name}"), "every_steps": 5 },
        "cluster": { "workers": { "min": min, "max": max } },
    })
}

pub fn order() -> Order {
    Order::new(3, ROWS, BATCH).unwrap()
}

pub fn announcement(step: u64) -> Announcement {
    let rows = order().step_rows(step);
    let row_hash = rows.iter().fold(0u64, |sum, row| sum.wrapping_add(order::row_hash(*row)));
    Announcement { tokens: rows.len() as u64 * 7, rows: rows.len() as u64, row_hash }
}

impl Stage {
    pub fn empty() -> Self {
        Self {
            machine: Machine::new(Options::default(), [1; 32]),
            now: 10_000,
            effects: Vec::new(),
            attempt: 1,
            sessions: Default::default(),
            parts: Default::default(),
            next_session: 0,
        }
    }

    /// A job of `steps` steps whose data is prepared.
    pub fn with_job(min: u32, max: u32, steps: u64) -> Self {
        let mut stage = Self::empty();
        stage.submit("request", &spec("pirate", min, max, steps)).unwrap();
        stage.prepared("pirate");
        stage
    }

    /// A job whose workers share a base in so many parts.
    pub fn shared(parts: u32, min: u32, max: u32, steps: u64) -> Self {
        let mut stage = Self::empty();
        let mut spec = spec("pirate", min, max, steps);
        spec["base"]["shard"] = parts.into();
        stage.submit("request", &spec).unwrap();
        stage.prepared("pirate");
        stage
    }

    /// The part of a base that the last event asked a worker to load.
    pub fn asked_for_part(&self, name: &str) -> Option<u32> {
        self.told(name).into_iter().find_map(|message| match message {
            Message::Assign { part, .. } => part,
            _ => None,
        })
    }

    /// A job in its first generation, with these workers by rank.
    pub fn running(min: u32, max: u32, steps: u64, workers: &[&str]) -> Self {
        let mut stage = Self::with_job(min, max, steps);
        for name in workers {
            stage.hello(name, None);
        }
        for name in workers {
            stage.ready(name);
        }
        if workers.len() < max as usize {
            stage.pass(4000, workers);
        }
        assert_eq!(stage.view().state, JobState::Running, "{}", stage.view().reason);
        for (rank, name) in workers.iter().enumerate() {
            stage.beat(name, 1, rank as u32, 0);
        }
        stage
    }

    pub fn moment(&self) -> Moment {
        Moment { monotonic: Duration::from_millis(self.now), unix_ms: 1_000_000 + self.now }
    }

    pub fn tell(&mut self, event: Event) -> &[Effect] {
        self.effects = self.machine.apply(self.moment(), event);
        for effect in &self.effects {
            if let Effect::Send { worker, message: Message::Assign { part: Some(part), .. }, .. } = effect {
                self.parts.insert(worker.to_string(), *part);
            }
        }
        &self.effects
    }

    /// Lets time pass, while these workers beat (without a generation, which no credit follows from).
    pub fn pass(&mut self, milliseconds: u64, beating: &[&str]) {
        let until = self.now + milliseconds;
        while self.now < until {
            self.now = (self.now + 250).min(until);
            for name in beating {
                self.beat_alone(name);
            }
            let effects = self.machine.apply(self.moment(), Event::Tick);
            if !effects.is_empty() {
                self.effects = effects;
            }
        }
    }

    pub fn submit(&mut self, request_id: &str, spec: &serde_json::Value) -> Result<Reply, Refusal> {
        let event = Event::Submit {
            request: 9,
            request_id: request_id.to_owned(),
            spec: Arc::new(serde_json::from_value(spec.clone()).unwrap()),
            spec_json: Arc::from(spec.to_string()),
        };
        self.tell(event);
        self.reply()
    }

    pub fn reply(&self) -> Result<Reply, Refusal> {
        let reply = self.effects.iter().find_map(|effect| match effect {
            Effect::Reply { outcome, .. } => Some(outcome.clone()),
            _ => None,
        });
        reply.expect("a reply")
    }

    pub fn prepared(&mut self, name: &str) {
        let facts = DataFacts {
            hash: "data".to_owned(),
            tokenizer_hash: "tokenizer".to_owned(),
            train_rows: ROWS,
            eval_rows: 2,
            train_tokens: 1000,
            train_trained_tokens: 140,
            train_mix: Vec::new(),
            warnings: Vec::new(),
        };
        let job = JobId::new(name).unwrap();
        self.tell(Event::PrepareEnded { job, attempt: Attempt(self.attempt), outcome: Ok(facts) });
    }

    pub fn hello(&mut self, name: &str, attachment: Option<Attachment>) {
        self.next_session += 1;
        self.sessions.insert(name.to_owned(), self.next_session);
        let info = WorkerInfo {
            host: "host".to_owned(),
            address: format!("{name}:1"),
            part: self.parts.get(name).copied(),
            ..WorkerInfo::default()
        };
        let session = self.next_session;
        self.tell(Event::Hello { worker: worker(name), session, info, attachment });
    }

    pub fn say(&mut self, name: &str, message: Said) {
        let session = self.sessions[name];
        self.tell(Event::Said { worker: worker(name), session, message });
    }

    pub fn ready(&mut self, name: &str) {
        self.ready_with(name, self.parts.get(name).copied());
    }

    pub fn ready_with(&mut self, name: &str, part: Option<u32>) {
        let (job, attempt) = (job(), Attempt(self.attempt));
        let base_hash = "base".to_owned();
        let (seconds, trainable_parameters) = (1.0, 5);
        self.say(name, Said::BaseReady { job, attempt, base_hash, seconds, trainable_parameters, part });
    }

    /// A worker has loaded the base of a job other than the pirate's.
    pub fn ready_for(&mut self, name: &str, job: &str) {
        let (job, attempt) = (JobId::new(job).unwrap(), Attempt(1));
        let base_hash = "base".to_owned();
        let (seconds, trainable_parameters, part) = (1.0, 5, None);
        self.say(name, Said::BaseReady { job, attempt, base_hash, seconds, trainable_parameters, part });
    }

    pub fn view_of(&self, job: &str) -> JobView {
        self.machine.view(self.moment(), &JobId::new(job).unwrap()).unwrap()
    }

    pub fn attachment(&self, generation: u64, rank: u32, applied: u64) -> Attachment {
        Attachment {
            job: job(),
            attempt: Attempt(self.attempt),
            generation: Generation(generation),
            rank: Rank(rank),
            applied: Step(applied),
        }
    }

    pub fn within(&self, generation: u64) -> Within {
        Within { job: job(), attempt: Attempt(self.attempt), generation: Generation(generation) }
    }

    /// A beat within a generation; gives the credit that it was acknowledged with.
    pub fn beat(&mut self, name: &str, generation: u64, rank: u32, applied: u64) -> Option<u64> {
        let attachment = Some(self.attachment(generation, rank, applied));
        self.say(
            name,
            Said::Beat { sequence: 5, phase: MemberPhase::Computing, attachment, progress: self.now },
        );
        let credit = self.effects.iter().find_map(|effect| match effect {
            Effect::Send { message: Message::BeatAck { sequence: 5, credit }, .. } => Some(*credit),
            _ => None,
        });
        credit.expect("an acknowledgement").map(|given| given.up_to.0)
    }

    /// A beat of a member before its first step, in some phase.
    pub fn beat_in(&mut self, name: &str, rank: u32, phase: MemberPhase) {
        let attachment = Some(self.attachment(1, rank, 0));
        self.say(name, Said::Beat { sequence: 5, phase, attachment, progress: self.now });
    }

    pub fn beat_alone(&mut self, name: &str) {
        let session = self.sessions[name];
        let message = Said::Beat { sequence: 6, phase: MemberPhase::Idle, attachment: None, progress: 0 };
        self.machine.apply(self.moment(), Event::Said { worker: worker(name), session, message });
    }

    pub fn report(&mut self, name: &str, generation: u64, rank: u32, step: u64) {
        let leased = announcement(step);
        self.report_as(name, generation, rank, step, leased);
    }

    pub fn report_as(&mut self, name: &str, generation: u64, rank: u32, step: u64, reduced: Announcement) {
        let report = StepReport {
            within: self.within(generation),
            step: Step(step),
            rank: Rank(rank),
            loss: 2.0,
            reduced,
            leased: announcement(step),
            gradient_norm: 1.0,
            learning_rate: 1e-3,
            seconds: 0.5,
            timings: Timings::default(),
            skipped: None,
            bad_samples: Vec::new(),
        };
        self.say(name, Said::Step(report));
    }

    /// Leaves a generation without ever having held its state.
    pub fn left_empty_handed(&mut self, name: &str, generation: u64) {
        let within = self.within(generation);
        self.say(
            name,
            Said::Left { within, applied: Step(0), holds_state: false, hash: String::new(), kept: None },
        );
    }

    pub fn left(&mut self, name: &str, generation: u64, applied: u64, kept: &[u64]) {
        let kept = (!kept.is_empty()).then(|| KeptSum { step: Step(applied + 1), rows: kept.to_vec() });
        let (within, hash) = (self.within(generation), format!("state {applied}"));
        let applied = Step(applied);
        self.say(name, Said::Left { within, applied, holds_state: true, hash, kept });
    }

    pub fn down(&mut self, name: &str) {
        let session = self.sessions[name];
        self.tell(Event::Down { worker: worker(name), session, reason: "its stream broke".to_owned() });
    }

    pub fn found(&mut self, step: u64) {
        let checkpoint = (step > 0).then(|| CheckpointRecord {
            attempt: Attempt(1),
            step: Step(step),
            generation: Generation(1),
            path: format!("checkpoints/{step}"),
            size_bytes: 1,
            seconds: 0.1,
            unix_ms: 1,
            loss: None,
        });
        let (job, attempt) = (job(), Attempt(self.attempt));
        self.tell(Event::CheckpointFound { job, attempt, outcome: Ok(checkpoint), damaged: Vec::new() });
    }

    pub fn fails(&mut self, name: &str, error: Diagnostic) {
        let (job, attempt) = (job(), Attempt(self.attempt));
        self.say(name, Said::Failure { job, attempt, error });
    }

    pub fn view(&self) -> JobView {
        self.machine.view(self.moment(), &job()).unwrap()
    }

    /// What a worker was told by the last event.
    pub fn told(&self, name: &str) -> Vec<Message> {
        let to = worker(name);
        let message = |effect: &Effect| match effect {
            Effect::Send { worker, message, .. } if *worker == to => Some(message.clone()),
            _ => None,
        };
        self.effects.iter().filter_map(message).collect()
    }

    /// The generation that the last event announced to a worker.
    pub fn formed(&self, name: &str) -> Option<(u32, Arc<GenerationRecord>)> {
        self.told(name).into_iter().find_map(|message| match message {
            Message::Form { rank, generation, .. } => Some((rank.0, generation)),
            _ => None,
        })
    }

    pub fn was_told_to_leave(&self, name: &str) -> bool {
        self.told(name).iter().any(|message| matches!(message, Message::Leave { .. }))
    }

    pub fn looks_for_checkpoint(&self) -> bool {
        self.effects.iter().any(|effect| matches!(effect, Effect::FindCheckpoint { .. }))
    }

    /// The record that the last event made durable.
    pub fn saved(&self) -> Option<JobRecord> {
        self.effects.iter().find_map(|effect| match effect {
            Effect::Persist(Change::Job(record)) => Some((**record).clone()),
            _ => None,
        })
    }

    pub fn published(&self, kind: &str) -> Option<shanty_coordinator::machine::record::EventRecord> {
        self.effects.iter().find_map(|effect| match effect {
            Effect::Publish(_, Point::Event(event)) if event.kind == kind => Some(event.clone()),
            _ => None,
        })
    }

    /// A new machine that knows what this one made durable last.
    pub fn restarted(&self, record: JobRecord) -> Self {
        let mut stage = Self::empty();
        stage.now = 500;
        stage.attempt = record.attempt.0;
        stage.next_session = 100;
        let stored = StoredJob {
            record,
            steps: Vec::new(),
            evaluations: Vec::new(),
            checkpoints: Vec::new(),
            events: Vec::new(),
        };
        stage.machine.restore(stage.moment(), stored);
        stage
    }
}
