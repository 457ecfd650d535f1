//! What all hosts of a simulation share: chance, the model of the collective, checkpoints, and what must always hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shanty_coordinator::{
    machine::record::{CheckpointRecord, JobState},
    store::Database,
};
use shanty_data::order::Order;
use shanty_proto::{Attempt, Generation, Step};

use super::{chance::Chance, storm::Faults};

/// Adapter and optimizer: which rows each applied step was made of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) steps: Vec<Vec<u64>>,
}

impl State {
    pub(super) fn applied(&self) -> u64 {
        self.steps.len() as u64
    }
}

/// The collective of one generation.
#[derive(Debug, Default)]
struct Group {
    world: u32,
    /// Updates in the state that it begins with.
    begins_at: u64,
    /// State of each rank as it came.
    joined: BTreeMap<u32, State>,
    /// Ranks that died or left.
    gone: BTreeSet<u32>,
    /// Rows with which each rank entered the reduction of a step.
    entered: BTreeMap<u64, BTreeMap<u32, Vec<u64>>>,
}

/// What became of a call of the collective.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Call<T> {
    Done(T),
    Waits,
    Broke,
}

/// The shared world.
pub(super) struct Sea {
    pub(super) chance: Chance,
    pub(super) faults: Faults,
    /// Whether faults still happen.
    pub(super) stormy: bool,
    pub(super) order: Order,
    pub(super) steps: u64,
    pub(super) database: Database,
    groups: BTreeMap<u64, Group>,
    checkpoints: Vec<(CheckpointRecord, State)>,
    pub(super) finished: Option<State>,
    /// Workers that were started.
    pub(super) workers: u64,
    /// What happened, in order.
    pub(super) trace: blake3::Hasher,
    watermark: u64,
    recomputed: u64,
    generation: u64,
}

/// A handle on it. All hosts run on one thread; the lock is never waited for.
pub(super) type Shared = Arc<Mutex<Sea>>;

pub(super) fn lock(sea: &Shared) -> MutexGuard<'_, Sea> {
    sea.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sea {
    pub(super) fn new(chance: Chance, faults: Faults, order: Order, steps: u64) -> Self {
        Self {
            chance,
            faults,
            stormy: true,
            order,
            steps,
            database: Database::in_memory().expect("a database in memory"),
            groups: BTreeMap::new(),
            checkpoints: Vec::new(),
            finished: None,
            workers: 0,
            trace: blake3::Hasher::new(),
            watermark: 0,
            recomputed: 0,
            generation: 0,
        }
    }

    /// Whether a fault happens now that happens once in `times`.
    pub(super) fn strikes(&mut self, times: u64) -> bool {
        self.stormy && self.chance.once_in(times)
    }

    pub(super) fn note(&mut self, what: &str, numbers: &[u64]) {
        if std::env::var_os("SHANTY_SIMULATION_TRACE").is_some() {
            eprintln!("{:>9.3} {what} {numbers:?}", turmoil::sim_elapsed().unwrap_or_default().as_secs_f64());
        }
        self.trace.update(what.as_bytes());
        numbers.iter().for_each(|number| drop(self.trace.update(&number.to_le_bytes())));
    }

    // ---- the collective ----

    /// A member connects with the state that it has.
    pub(super) fn join(&mut self, generation: u64, rank: u32, world: u32, begins_at: u64, state: State) {
        let newest = self.groups.keys().next_back().copied().unwrap_or(0);
        assert!(
            generation >= newest || self.groups.contains_key(&generation),
            "generation {generation} is joined for the first time after {newest}"
        );
        let group = self.groups.entry(generation).or_default();
        assert!(
            group.world == 0 || (group.world, group.begins_at) == (world, begins_at),
            "two announcements"
        );
        (group.world, group.begins_at) = (world, begins_at);
        group.joined.insert(rank, state);
        self.note("join", &[generation, rank.into(), begins_at]);
    }

    /// The states of all members, once all are there.
    pub(super) fn joined(&mut self, generation: u64) -> Call<BTreeMap<u32, State>> {
        let group = &self.groups[&generation];
        if group.joined.len() as u32 == group.world {
            return Call::Done(group.joined.clone());
        }
        self.waits_for(generation)
    }

    /// A member is dead or takes no further part.
    pub(super) fn gone(&mut self, generation: u64, rank: u32) {
        if let Some(group) = self.groups.get_mut(&generation) {
            group.gone.insert(rank);
        }
    }

    /// A member enters the reduction of a step.
    pub(super) fn enter(&mut self, generation: u64, step: u64, rank: u32, rows: Vec<u64>) {
        let group = self.groups.get_mut(&generation).expect("it was joined");
        group.entered.entry(step).or_default().insert(rank, rows);
    }

    /// The rows of all ranks, once all have entered.
    pub(super) fn sum(&mut self, generation: u64, step: u64) -> Call<Vec<u64>> {
        let group = &self.groups[&generation];
        let entered = &group.entered[&step];
        if entered.len() as u32 == group.world {
            // The sum is somewhere; who gets hold of it when a neighbour dies is another matter.
            if !group.gone.is_empty() && self.chance.once_in(3) {
                return Call::Broke;
            }
            let entered = &self.groups[&generation].entered[&step];
            let rows = entered.values().flatten().copied().collect();
            return if self.chance.once_in(2) { Call::Done(rows) } else { Call::Waits };
        }
        self.waits_for(generation)
    }

    /// A collective that lacks a member fails sooner or later; now and then one fails by itself.
    fn waits_for<T>(&mut self, generation: u64) -> Call<T> {
        let lacks = !self.groups[&generation].gone.is_empty();
        let tear = self.faults.tear * 10;
        if (lacks && self.chance.once_in(60)) || self.strikes(tear) { Call::Broke } else { Call::Waits }
    }

    // ---- what must always hold ----

    /// A member applied a step.
    pub(super) fn applied(&mut self, generation: u64, rank: u32, step: u64, rows: &[u64]) {
        self.note("applied", &[generation, rank.into(), step]);
        let mut expected = self.order.step_rows(step);
        expected.sort_unstable();
        assert_eq!(rows, expected, "rows of step {step} in generation {generation}");
        for (later, group) in self.groups.range(generation + 1..) {
            // One that was cut off while it held a whole sum may still apply that one step; no more.
            assert!(
                step <= group.begins_at + 1,
                "generation {generation} applied step {step}; {later} had begun after {}",
                group.begins_at
            );
        }
    }

    pub(super) fn keep_checkpoint(
        &mut self,
        generation: u64,
        attempt: u32,
        state: &State,
    ) -> CheckpointRecord {
        let step = state.applied();
        let json = serde_json::json!({
            "attempt": attempt, "step": step, "generation": generation,
            "path": format!("checkpoints/{step:08}-a{attempt}-g{generation}"),
            "size_bytes": 1, "seconds": 0.0, "unix_ms": 0,
        });
        let record: CheckpointRecord = serde_json::from_value(json).expect("a checkpoint's record");
        debug_assert_eq!((record.attempt, record.generation), (Attempt(attempt), Generation(generation)));
        if !self.checkpoints.iter().any(|(known, _)| known.path == record.path) {
            self.checkpoints.push((record.clone(), state.clone()));
        }
        record
    }

    pub(super) fn newest_checkpoint(&self, up_to: Option<Step>) -> Option<CheckpointRecord> {
        let records = self.checkpoints.iter().map(|(record, _)| record);
        let records = records.filter(|record| up_to.is_none_or(|up_to| record.step <= up_to));
        records.max_by_key(|record| (record.step, record.attempt, record.generation)).cloned()
    }

    pub(super) fn read_checkpoint(&self, path: &str) -> State {
        let found = self.checkpoints.iter().find(|(record, _)| record.path == path);
        found.expect("the coordinator found it before").1.clone()
    }

    /// Looks at what is durable: generations are new each time, the watermark falls only where what is trained again counts.
    pub(super) fn check_durable(&mut self) {
        let jobs = self.database.jobs().expect("the database can be read");
        let Some(job) = jobs.first() else { return };
        let record = &job.record;
        assert_ne!(record.state, JobState::Failed, "{}", record.reason);
        let generation = record.generation.as_ref().map_or(0, |generation| generation.generation.0);
        assert!(generation >= self.generation, "generation {generation} after {}", self.generation);
        let watermark = record.watermark.0;
        if watermark < self.watermark {
            let again =
                (watermark + 1..=self.watermark).map(|step| self.order.rows_in_step(step)).sum::<u64>();
            assert!(
                record.recomputed >= self.recomputed + again,
                "the watermark fell from {} to {watermark}, {} rows are counted as trained again",
                self.watermark,
                record.recomputed - self.recomputed
            );
        }
        for group in self.groups.keys() {
            assert!(*group <= generation, "generation {group} was joined and is not durable");
        }
        (self.generation, self.watermark, self.recomputed) = (generation, watermark, record.recomputed);
    }

    /// After the end: every row of every step exactly once in the lineage of the finished adapter.
    pub(super) fn check_end(&mut self) {
        self.check_durable();
        let jobs = self.database.jobs().expect("the database can be read");
        let record = &jobs.first().expect("the job").record;
        assert_eq!((record.state, record.watermark), (JobState::Succeeded, Step(self.steps)));
        let finished = self.finished.as_ref().expect("somebody wrote the adapter");
        assert_eq!(finished.applied(), self.steps);
        for (step, rows) in (1..).zip(&finished.steps) {
            let mut expected = self.order.step_rows(step);
            expected.sort_unstable();
            assert_eq!(*rows, expected, "rows of step {step} in the finished adapter");
        }
    }

    pub(super) fn recomputed(&self) -> u64 {
        self.recomputed
    }

    pub(super) fn generations(&self) -> u64 {
        self.groups.len() as u64
    }
}
