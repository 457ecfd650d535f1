//! A schedule: hosts, faults, and the end.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use shanty_data::order::Order;
use shanty_proto::v1::{
    GetStatusRequest, JobState, SubmitJobRequest, job_service_client::JobServiceClient,
    status_service_client::StatusServiceClient,
};
use tokio::time::{sleep, timeout};
use turmoil::Sim;

use super::{
    chance::Chance,
    harbour, sailor,
    sea::{Sea, Shared, lock},
    wire::{HARBOUR, channel},
};

/// The simulation's tick.
const TICK: Duration = Duration::from_millis(5);
/// Once nothing strikes any more: fences, loads, reconnections, and at most 14 steps of at most 8 rows of 20 ms.
const CALMS_WITHIN: Duration = Duration::from_secs(60);

/// What goes wrong, and how often (once in so many ticks; 0: never).
#[derive(Debug, Clone, Copy)]
pub(super) struct Faults {
    /// A worker dies; another is started in its place.
    pub(super) crash: u64,
    /// The coordinator dies and is started again.
    pub(super) coordinator: u64,
    /// A worker and the coordinator lose each other's packets for a while.
    pub(super) partition: u64,
    /// Messages between a worker and the coordinator are late.
    pub(super) hold: u64,
    /// A host's clock jumps ahead.
    pub(super) jump: u64,
    /// A row takes seconds (per row, times ten).
    pub(super) stall: u64,
    /// A collective breaks by itself (per look at it, times ten).
    pub(super) tear: u64,
    /// A request comes twice (per request).
    pub(super) twice: u64,
    /// How long.
    pub(super) until: Duration,
}

impl Faults {
    pub(super) const NONE: Self = Self {
        crash: 0,
        coordinator: 0,
        partition: 0,
        hold: 0,
        jump: 0,
        stall: 0,
        tear: 0,
        twice: 0,
        until: Duration::ZERO,
    };
    pub(super) const SOME: Self = Self { until: Duration::from_secs(6), ..Self::NONE };
}

/// What happened.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Log {
    pub(super) schedules: u64,
    pub(super) crashes: u64,
    pub(super) restarts: u64,
    pub(super) partitions: u64,
    pub(super) holds: u64,
    pub(super) generations: u64,
    pub(super) recomputed: u64,
    pub(super) simulated_ms: u64,
    /// Hash of everything that happened, of one schedule.
    pub(super) trace: String,
}

impl Log {
    pub(super) fn add(&mut self, other: &Self) {
        self.schedules += other.schedules;
        self.crashes += other.crashes;
        self.restarts += other.restarts;
        self.partitions += other.partitions;
        self.holds += other.holds;
        self.generations += other.generations;
        self.recomputed += other.recomputed;
        self.simulated_ms += other.simulated_ms;
    }
}

/// Something that comes back.
enum Return {
    Host(String),
    Link(String),
    Messages(String),
}

/// Plays a schedule to its end.
pub(super) fn play(seed: u64, faults: Faults) -> Log {
    let mut chance = Chance::new(seed ^ 0x5ea);
    let rows = 5 + chance.below(20);
    let batch = 1 + chance.below(8);
    let steps = 6 + chance.below(8);
    let max = 1 + chance.below(4);
    let min = 1 + chance.below(max);
    let order = Order::new(5, rows, batch).expect("rows and batch are not 0");
    let sea: Shared = Arc::new(Mutex::new(Sea::new(Chance::new(seed), faults, order, steps)));
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .tick_duration(TICK)
        .simulation_duration(faults.until + CALMS_WITHIN + Duration::from_secs(10))
        .min_message_latency(Duration::ZERO)
        .max_message_latency(Duration::from_millis(15))
        .tcp_capacity(4096)
        .build();
    let of_harbour = Arc::clone(&sea);
    sim.host(HARBOUR, move || harbour::run(Arc::clone(&of_harbour)));
    let crew: Vec<String> =
        (0..max + u64::from(chance.once_in(3))).map(|number| format!("sailor-{number}")).collect();
    for name in &crew {
        let of_sailor = Arc::clone(&sea);
        sim.host(name.as_str(), move || sailor::run(Arc::clone(&of_sailor)));
    }
    sim.client("user", user(spec_json(min, max, steps, batch)));
    let mut storm =
        Storm { chance, faults, crew, returns: Vec::new(), log: Log { schedules: 1, ..Log::default() } };
    let mut ticks = 0u64;
    while !sim.step().unwrap_or_else(|error| panic!("seed {seed}: {error}")) {
        ticks += 1;
        storm.tick(&mut sim, &sea);
        if ticks.is_multiple_of(10) {
            lock(&sea).check_durable();
        }
    }
    let mut sea = lock(&sea);
    sea.check_end();
    let trace = sea.trace.finalize().to_hex().to_string();
    Log {
        generations: sea.generations(),
        recomputed: sea.recomputed(),
        simulated_ms: sim.elapsed().as_millis() as u64,
        trace,
        ..storm.log
    }
}

fn spec_json(min: u64, max: u64, steps: u64, batch: u64) -> String {
    serde_json::json!({
        "name": "sim",
        "base": { "model": "/base" },
        "adapter": {},
        "data": { "train": "/data.jsonl" },
        "train": { "steps": steps, "global_batch_size": batch, "seed": 5 },
        "checkpoint": { "store": "/store", "every_steps": 3, "keep": 100 },
        "cluster": { "workers": { "min": min, "max": max } },
    })
    .to_string()
}

/// Submits the job, twice, and looks until it has ended.
async fn user(spec_json: String) -> turmoil::Result {
    let channel = channel();
    let (mut jobs, mut statuses) =
        (JobServiceClient::new(channel.clone()), StatusServiceClient::new(channel));
    let mut taken = 0;
    while taken < 2 {
        let submit = SubmitJobRequest {
            request_id: "once".to_owned(),
            spec_json: spec_json.clone(),
            ..Default::default()
        };
        match timeout(Duration::from_secs(1), jobs.submit_job(submit)).await {
            Ok(Ok(answer)) => {
                assert_eq!(answer.into_inner().job_id, "sim", "the same request is the same job");
                taken += 1;
            }
            Ok(Err(_)) | Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
    loop {
        sleep(Duration::from_millis(100)).await;
        let ask = GetStatusRequest { job_id: "sim".to_owned(), ..Default::default() };
        let Ok(Ok(answer)) = timeout(Duration::from_secs(1), statuses.get_status(ask)).await else {
            continue;
        };
        let status = answer.into_inner().status.unwrap_or_default();
        assert_eq!(status.ledger.unwrap_or_default().duplicates, 0);
        match status.state() {
            JobState::Succeeded => return Ok(()),
            JobState::Failed | JobState::Cancelled => return Err(status.reason.into()),
            _ => {}
        }
    }
}

struct Storm {
    chance: Chance,
    faults: Faults,
    crew: Vec<String>,
    returns: Vec<(Duration, Return)>,
    log: Log,
}

impl Storm {
    fn tick(&mut self, sim: &mut Sim<'_>, sea: &Shared) {
        let now = sim.elapsed();
        let (due, later) = std::mem::take(&mut self.returns).into_iter().partition(|(at, _)| *at <= now);
        self.returns = later;
        let due: Vec<(Duration, Return)> = due;
        due.into_iter().for_each(|(_, back)| undo(sim, sea, back));
        if now >= self.faults.until {
            lock(sea).stormy = false;
            std::mem::take(&mut self.returns).into_iter().for_each(|(_, back)| undo(sim, sea, back));
            return;
        }
        self.strike(sim, sea, now);
    }

    fn strike(&mut self, sim: &mut Sim<'_>, sea: &Shared, now: Duration) {
        let number = self.chance.below(self.crew.len() as u64) as usize;
        let victim = self.crew[number].clone();
        if self.chance.once_in(self.faults.crash) && sim.is_host_running(victim.as_str()) {
            lock(sea).note("crash", &[number as u64]);
            sim.crash(victim.as_str());
            self.log.crashes += 1;
            self.later(now, 5, 800, Return::Host(victim.clone()));
        }
        if self.chance.once_in(self.faults.coordinator) && sim.is_host_running(HARBOUR) {
            lock(sea).note("crash of the coordinator", &[]);
            sim.crash(HARBOUR);
            self.log.restarts += 1;
            self.later(now, 5, 1500, Return::Host(HARBOUR.to_owned()));
        }
        if self.chance.once_in(self.faults.partition) {
            lock(sea).note("partition", &[number as u64]);
            sim.partition(victim.as_str(), HARBOUR);
            self.log.partitions += 1;
            self.later(now, 20, 3000, Return::Link(victim.clone()));
        }
        if self.chance.once_in(self.faults.hold) {
            lock(sea).note("hold", &[number as u64]);
            sim.hold(victim.as_str(), HARBOUR);
            self.log.holds += 1;
            self.later(now, 20, 1500, Return::Messages(victim));
        }
    }

    fn later(&mut self, now: Duration, from: u64, to: u64, back: Return) {
        self.returns.push((now + self.chance.milliseconds(from, to), back));
    }
}

fn undo(sim: &mut Sim<'_>, sea: &Shared, back: Return) {
    match back {
        Return::Host(name) => {
            lock(sea).note("start", &[]);
            sim.bounce(name.as_str());
        }
        Return::Link(name) => sim.repair(name.as_str(), HARBOUR),
        Return::Messages(name) => sim.release(name.as_str(), HARBOUR),
    }
}
