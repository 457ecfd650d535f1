//! A world of one machine, a store, a few model workers, and faults; all decided by one seed.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use shanty_coordinator::machine::{
    Announcement, Change, Effect, Event, Machine, Message, Moment, Options, Point, Said, StepReport,
    StoredJob, Timings,
    record::{CheckpointRecord, DataFacts, GenerationRecord, JobRecord, JobState, Source, StepRecord},
};
use shanty_data::order::{self, Order};
use shanty_proto::{Generation, JobId, Rank, Step};

use crate::{
    chance::Chance,
    worker::{Doing, State, Worker},
};

/// A step of the world's clock, milliseconds.
const TICK: u64 = 5;
const CREDIT: u64 = 1500;
const BEAT: u64 = 40;

pub fn options() -> Options {
    let milliseconds = Duration::from_millis;
    Options {
        beat_interval: milliseconds(BEAT),
        lost_after: milliseconds(400),
        credit: milliseconds(CREDIT),
        gather: milliseconds(100),
        leave_within: milliseconds(2000),
        join_gather: milliseconds(60),
        steps_ahead: 3,
        retry_worker_after: milliseconds(200),
        worker_tries: 3,
        total_losses: 1000,
        fruitless_generations: 1000,
        hang_least: milliseconds(300),
        retry_pause: milliseconds(50),
        ..Options::default()
    }
}

/// What goes wrong, and how often (once in so many ticks; 0: never).
#[derive(Debug, Clone, Copy)]
pub struct Faults {
    pub kill: u64,
    pub cut_stream: u64,
    pub pause: u64,
    pub break_collective: u64,
    pub restart_coordinator: u64,
    pub kill_all: u64,
    /// A worker is asked to end.
    pub drain: u64,
    /// A trainer makes no progress any more, while its process beats.
    pub hang: u64,
    /// Ticks until faults stop.
    pub until: u64,
}

#[derive(Default)]
struct Disk {
    jobs: BTreeMap<JobId, JobRecord>,
    steps: BTreeMap<u64, StepRecord>,
    pending: VecDeque<Change>,
}

impl Disk {
    fn write(&mut self, change: Change) {
        match change {
            // The machine knows nothing of tokens.
            Change::Token(_) | Change::TokenGone(_) => unreachable!("{change:?}"),
            Change::Job(record) => drop(self.jobs.insert(record.id.clone(), *record)),
            Change::Watermark(job, step) => {
                if let Some(record) = self.jobs.get_mut(&job) {
                    record.watermark = step;
                }
            }
            Change::Step(_, record) => {
                let known = self.steps.get(&record.step.0).map(|known| known.generation);
                if known.is_none_or(|known| record.generation > known) {
                    self.steps.insert(record.step.0, record);
                }
            }
            Change::Truncate(_, step) => self.steps.retain(|known, _| *known <= step.0),
            Change::Evaluation(..)
            | Change::Checkpoint(..)
            | Change::CheckpointsRemoved(..)
            | Change::Event(..) => {}
        }
    }

    fn flush(&mut self) {
        while let Some(change) = self.pending.pop_front() {
            self.write(change);
        }
    }
}

pub struct World {
    pub chance: Chance,
    pub now: u64,
    pub machine: Machine,
    disk: Disk,
    pub workers: Vec<Worker>,
    pub wanted: usize,
    spawned: u64,
    sessions: u64,
    order: Order,
    steps: u64,
    job: JobId,
    /// Workers that share a base.
    parts: u32,
    /// Checkpoints: what a reader finds.
    checkpoints: Vec<(CheckpointRecord, State, bool)>,
    answers: Vec<(u64, Event)>,
    /// Numbers of generations ever announced, with their record.
    announced: BTreeMap<u64, Arc<GenerationRecord>>,
    newest: u64,
    pub finished: Option<State>,
    pub kills: u64,
    pub total_losses: u64,
    pub replays: u64,
    watermark: u64,
    machine_was_restarted: bool,
    trace: bool,
    /// Members that hold the whole sum of a step, so that no break can take it from them.
    summed: BTreeSet<(u64, u64, u64)>,
    /// Rows of a step's sum, by generation and step.
    sums: BTreeMap<(u64, u64), Vec<u64>>,
}

#[path = "play.rs"]
mod play;

fn is_noise(event: &Event) -> bool {
    matches!(event, Event::Tick | Event::Said { message: Said::Beat { .. }, .. })
}

pub fn spec_json(min: u32, max: u32, steps: u64, batch: usize, parts: u32) -> String {
    let shard = if parts > 1 { serde_json::json!(parts) } else { serde_json::json!("replicate") };
    serde_json::json!({
        "name": "sim",
        "base": { "model": "/base", "shard": shard },
        "adapter": {},
        "data": { "train": "/data.jsonl" },
        "train": { "steps": steps, "global_batch_size": batch, "seed": 5 },
        "checkpoint": { "every_steps": 3, "keep": 100 },
        "cluster": { "workers": { "min": min, "max": max } },
    })
    .to_string()
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let rows = 5 + chance.below(20);
        let batch = 1 + chance.below(8);
        let steps = 6 + chance.below(8);
        let parts = if chance.once_in(2) { 1 + chance.below(3) as u32 } else { 1 };
        let max = if parts > 1 { parts * (1 + chance.below(2) as u32) } else { 1 + chance.below(4) as u32 };
        let min = 1 + chance.below(u64::from(max)) as u32;
        let mut machine = Machine::new(options(), [7; 32]);
        let spec_json = spec_json(min, max, steps, batch as usize, parts);
        let spec = Arc::new(serde_json::from_str(&spec_json).expect("a valid job file"));
        let mut world = Self {
            order: Order::new(5, rows, batch).expect("rows and batch are not 0"),
            wanted: max as usize + usize::from(chance.once_in(3)),
            chance,
            now: 1000,
            steps,
            parts,
            disk: Disk::default(),
            workers: Vec::new(),
            spawned: 0,
            sessions: 0,
            job: JobId::new("sim").expect("a valid id"),
            checkpoints: Vec::new(),
            answers: Vec::new(),
            announced: BTreeMap::new(),
            newest: 0,
            finished: None,
            kills: 0,
            total_losses: 0,
            replays: 0,
            watermark: 0,
            machine_was_restarted: false,
            trace: std::env::var_os("SHANTY_SIMULATION_TRACE").is_some(),
            summed: BTreeSet::new(),
            sums: BTreeMap::new(),
            machine: Machine::new(options(), [0; 32]),
        };
        let submit = Event::Submit {
            request: 1,
            request_id: "r".to_owned(),
            spec,
            spec_json: Arc::from(spec_json.as_str()),
        };
        std::mem::swap(&mut world.machine, &mut machine);
        world.tell(submit);
        world
    }

    fn moment(&self) -> Moment {
        Moment { monotonic: Duration::from_millis(self.now), unix_ms: self.now }
    }

    fn delay(&mut self) -> u64 {
        if self.chance.once_in(20) { self.chance.below(120) } else { self.chance.below(12) }
    }

    pub fn tell(&mut self, event: Event) {
        let now = self.moment();
        if self.trace && !is_noise(&event) {
            eprintln!("{:>6} <- {event:?}", self.now);
        }
        let effects = self.machine.apply(now, event);
        // Persist, then anything else; a record may be lost until something after it is persisted.
        let mut others = Vec::new();
        for effect in effects {
            match effect {
                Effect::Persist(change) => {
                    self.disk.flush();
                    self.disk.write(change);
                }
                other => others.push(other),
            }
        }
        for effect in others {
            self.carry_out(effect);
        }
        self.check_machine();
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Persist(_) => unreachable!("taken out before"),
            Effect::Record(change) => self.disk.pending.push_back(change),
            Effect::Send { worker, session, message } => {
                if self.trace && !matches!(message, Message::BeatAck { .. }) {
                    eprintln!("{:>6} -> {worker} {message:?}", self.now);
                }
                if let Message::Form { generation, .. } = &message {
                    self.check_form(generation);
                }
                let at = self.now + self.delay();
                let receiver = self.workers.iter_mut().find(|other| other.id == worker && other.alive);
                if let Some(receiver) = receiver.filter(|receiver| receiver.session == Some(session)) {
                    let at = receiver.inbox.back().map_or(at, |(last, _)| at.max(*last));
                    receiver.inbox.push_back((at, message));
                }
            }
            Effect::Close { worker, session, .. } => {
                if let Some(worker) =
                    self.workers.iter_mut().find(|other| other.id == worker && other.session == Some(session))
                {
                    worker.session = None;
                    worker.hello_at = self.now + 30;
                    worker.inbox.clear();
                    worker.outbox.clear();
                }
            }
            Effect::Prepare { job, attempt, .. } => {
                let facts = DataFacts {
                    hash: "d".to_owned(),
                    tokenizer_hash: "t".to_owned(),
                    train_rows: self.order.rows(),
                    eval_rows: 0,
                    train_tokens: 100,
                    train_trained_tokens: 50,
                    train_mix: Vec::new(),
                    warnings: Vec::new(),
                };
                self.answers.push((self.now + 20, Event::PrepareEnded { job, attempt, outcome: Ok(facts) }));
            }
            Effect::FindCheckpoint { job, attempt, up_to } => {
                self.total_losses += 1;
                let found = self.checkpoints.iter().filter(|(_, _, good)| *good).map(|(record, _, _)| record);
                let found = found.filter(|record| up_to.is_none_or(|step| record.step <= step));
                let newest =
                    found.max_by_key(|record| (record.step, record.attempt, record.generation)).cloned();
                let event = Event::CheckpointFound { job, attempt, outcome: Ok(newest), damaged: Vec::new() };
                self.answers.push((self.now + 10 + self.chance.below(30), event));
            }
            Effect::Publish(_, Point::Step(record)) => {
                assert_eq!(record.generation.0, self.newest, "a step of an older generation was committed");
            }
            Effect::Publish(..)
            | Effect::StopPrepare { .. }
            | Effect::Reply { .. }
            | Effect::StatusChanged(_) => {}
        }
    }

    /// A generation is announced: its number is new, or it is the newest again, word for word, and it is durable.
    fn check_form(&mut self, generation: &Arc<GenerationRecord>) {
        let number = generation.generation.0;
        match self.announced.get(&number) {
            Some(known) => assert_eq!(known, generation, "generation {number} was reused"),
            None => {
                assert!(number > self.newest, "generation {number} after {}", self.newest);
                self.announced.insert(number, Arc::clone(generation));
            }
        }
        self.newest = self.newest.max(number);
        let durable = self.disk.jobs[&self.job].generation.as_ref().map(|durable| durable.generation);
        assert_eq!(durable, Some(Generation(number)), "announced before it was durable");
        let parts = self.parts as usize;
        assert!(generation.members.len().is_multiple_of(parts), "half a group in generation {number}");
        for (rank, member) in generation.members.iter().enumerate().filter(|_| parts > 1) {
            let known = self.workers.iter().find(|worker| worker.id == member.worker);
            let part = known.filter(|worker| worker.alive).map(|worker| worker.loaded);
            assert!(part.is_none_or(|part| part == Some((rank % parts) as u32)), "part of {}", member.worker);
        }
        if !generation.start.rows.is_empty() {
            let rows = &generation.start.rows;
            let mut dealt: Vec<u64> =
                rows.iter().flat_map(|r| r.kept.iter().chain(&r.compute)).copied().collect();
            let mut expected = self.order.step_rows(generation.start.applied.0 + 1);
            dealt.sort_unstable();
            expected.sort_unstable();
            assert_eq!(dealt, expected, "rows dealt in generation {number}");
        }
    }

    fn check_machine(&mut self) {
        let view = self.machine.view(self.moment(), &self.job).expect("the job is there");
        let through = |step: u64| (1..=step).map(|step| self.order.rows_in_step(step)).sum::<u64>();
        if view.steps.0 > 0 {
            assert_eq!(view.ledger.committed, through(view.step.0));
            let all = view.ledger.committed + view.ledger.leased + view.ledger.remaining;
            assert_eq!(all, through(self.steps), "{:?}", view.ledger);
        }
        if view.step.0 < self.watermark {
            // Only a return to a checkpoint lowers it, and what is trained again is counted.
            let start = &self.announced[&self.newest].start;
            let restarted = self.machine_was_restarted || !matches!(start.source, Source::Members { .. });
            assert!(restarted, "the watermark fell from {} to {}", self.watermark, view.step);
            self.machine_was_restarted = false;
            self.replays += 1;
        }
        self.watermark = view.step.0;
        assert_ne!(view.state, JobState::Failed, "{}", view.reason);
    }
}
