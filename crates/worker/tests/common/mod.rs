//! What the tests of the step loop share.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod coordinator;
pub mod engine;
mod service;

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
};

use shanty_data::order::Order;
use shanty_worker::{
    Error, WorkerOptions,
    engine::EngineLoader,
    failpoint::Failpoints,
    row_log::{self, Entry},
    run_worker,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use coordinator::{Coordinator, Event, Job, Record};
use engine::ModelEngines;

/// Workers of one process.
#[derive(Default)]
pub struct Crew {
    pub workers: HashMap<String, JoinHandle<Result<(), Error>>>,
    pub shutdown: CancellationToken,
    /// Asks a worker to hand back what it holds and to end.
    pub drains: HashMap<String, CancellationToken>,
}

impl Crew {
    /// Starts worker `w<number>`; lower numbers get lower ranks.
    pub fn hire(
        &mut self,
        coordinator: &Coordinator,
        number: usize,
        engines: &ModelEngines,
        failpoints: Failpoints,
    ) {
        self.hire_at(&coordinator.address, number, Box::new(engines.clone()), failpoints);
    }

    pub fn hire_at(
        &mut self,
        address: &str,
        number: usize,
        engines: Box<dyn EngineLoader>,
        failpoints: Failpoints,
    ) {
        let worker_id = format!("w{number}");
        let options = WorkerOptions {
            credentials: shanty_access::Credentials::default(),
            coordinator: address.to_owned(),
            worker_id: worker_id.clone(),
            device: "cpu".to_owned(),
            threads: 1,
            bind: "127.0.0.1".to_owned(),
            advertise: None,
            memory_limit_bytes: None,
            failpoints,
            drain: CancellationToken::new(),
        };
        self.drains.insert(worker_id.clone(), options.drain.clone());
        let (_, logs) = shanty_worker::logs::forward(&worker_id);
        let shutdown = self.shutdown.clone();
        let worker = tokio::spawn(run_worker(options, engines, logs, shutdown));
        self.workers.insert(worker_id, worker);
    }

    /// One that can be dismissed apart from the others.
    pub fn hire_late(
        &mut self,
        address: &str,
        number: usize,
        engines: Box<dyn EngineLoader>,
    ) -> CancellationToken {
        let all = std::mem::take(&mut self.shutdown);
        self.shutdown = all.child_token();
        self.hire_at(address, number, engines, Failpoints::none());
        std::mem::replace(&mut self.shutdown, all)
    }

    /// Asks a worker to hand back what it holds and to end; waits until it has.
    pub async fn drain(&mut self, number: usize) -> Result<(), Error> {
        self.drains[&format!("w{number}")].cancel();
        self.end_of(number).await
    }

    /// Waits for a worker's end.
    pub async fn end_of(&mut self, number: usize) -> Result<(), Error> {
        self.workers.remove(&format!("w{number}")).unwrap().await.unwrap()
    }

    /// Ends all workers; gives how each ended.
    pub async fn dismiss(self) -> HashMap<String, Result<(), Error>> {
        self.shutdown.cancel();
        let mut ends = HashMap::new();
        for (worker, handle) in self.workers {
            ends.insert(worker, handle.await.unwrap());
        }
        ends
    }
}

/// Failpoints that end the worker as a kill would.
pub fn deadly(text: &str) -> Failpoints {
    Failpoints::parse(text, Arc::new(|_, _| Err(Error::Killed))).unwrap()
}

/// Runs a job with a crew of `world`; all of them have the failpoints of `text`.
pub async fn run(job: Job, world: usize, engines: ModelEngines, text: &str) -> Record {
    run_watched(job, world, engines, text, |_, _| {}).await
}

pub async fn run_watched(
    job: Job,
    world: usize,
    engines: ModelEngines,
    text: &str,
    watch: impl FnMut(&Event, &mut Coordinator),
) -> Record {
    let mut coordinator = Coordinator::start(job).await;
    let mut crew = Crew::default();
    for number in 0..world {
        crew.hire(&coordinator, number, &engines, deadly(text));
    }
    coordinator.drive(world, watch).await;
    crew.dismiss().await;
    coordinator.record.clone()
}

/// The finished adapter.
pub fn adapter(store: &Path) -> Vec<f32> {
    let bytes = std::fs::read(store.join("adapter/adapter_model.safetensors")).unwrap();
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// Proves from the workers' own logs that each step was applied with exactly its rows: in the last generation that
/// applied it, every rank entered the reduction once, and their rows together are the step's, each once. (A member may
/// apply a step alone and be lost with it; the others, who never saw its sum, make the step again.) And no worker
/// applies a step twice.
pub fn prove_exactly_once(job: &Job) {
    prove_exactly_once_in(&job.store, job.steps, &job.order());
}

pub fn prove_exactly_once_in(store: &Path, steps: u64, order: &Order) {
    let mut entries = Vec::new();
    let mut applied_in: BTreeMap<u64, u64> = BTreeMap::new();
    for file in std::fs::read_dir(store.join("logs")).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "jsonl") {
            continue;
        }
        let own = row_log::read(&path).unwrap();
        let mut last = 0;
        for entry in &own {
            if let Entry::Applied { generation, step, .. } = entry {
                assert!(*step > last, "{} applied step {step} after step {last}", path.display());
                last = *step;
                let newest = applied_in.entry(*step).or_default();
                *newest = (*newest).max(*generation);
            }
        }
        entries.extend(own);
    }
    assert_eq!(applied_in.keys().copied().collect::<Vec<_>>(), (1..=steps).collect::<Vec<_>>());
    for (step, generation) in applied_in {
        let mut rows: Vec<u64> = Vec::new();
        let (mut ranks, mut members) = (Vec::new(), 0);
        for entry in &entries {
            if let Entry::Entering { generation: of, step: at, rank, world_size, rows: own, .. } = entry
                && (*of, *at) == (generation, step)
            {
                rows.extend(own);
                ranks.push(*rank);
                members = *world_size;
            }
        }
        ranks.sort_unstable();
        assert_eq!(ranks, (0..members).collect::<Vec<_>>(), "ranks of step {step}");
        rows.sort_unstable();
        let mut expected = order.step_rows(step);
        expected.sort_unstable();
        assert_eq!(rows, expected, "rows of step {step}");
    }
}

/// Losses of two runs agree. f32 sums of 37 numbers over a handful of rows, in another order: a few units in the
/// last place (1e-7), carried through 12 steps of AdamW, whose division by the root of the second moment may enlarge
/// them. 1e-5 relative leaves an order of magnitude.
pub fn assert_same_losses(left: &Record, right: &Record) {
    assert_eq!(left.losses.len(), right.losses.len());
    for ((step, left), (_, right)) in left.losses.iter().zip(&right.losses) {
        assert!((left - right).abs() <= 1e-5 * right.abs(), "loss of step {step}: {left} and {right}");
    }
    for ((step, left), (_, right)) in left.evaluations.iter().zip(&right.evaluations) {
        assert!((left - right).abs() <= 1e-5 * right.abs(), "evaluation of step {step}: {left} and {right}");
    }
}
