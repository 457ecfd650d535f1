//! Workers with the real coordinator, over the wire and with its state on disk.

#![expect(clippy::unwrap_used, reason = "what fails here fails its test")]

mod common;
#[path = "with_coordinator/crew.rs"]
mod crew;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use common::{Crew, deadly, engine::ModelEngines, prove_exactly_once_in};
use shanty_coordinator::{Coordinator, Options, prepare::PrepareLine};
use shanty_data::{PrepareOptions, Summary, order::Order};
use shanty_proto::v1::{
    GetStatusRequest, JobState, JobStatus, ListStepsRequest, SubmitJobRequest,
    job_service_client::JobServiceClient, status_service_client::StatusServiceClient,
};
use shanty_worker::{
    engine::{EngineLoader, PeftEngines},
    failpoint::Failpoints,
};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const SEED: u64 = 3;
const BATCH: usize = 6;

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples").canonicalize().unwrap()
}

/// A job, its prepared data, and a coordinator that serves it.
struct Stage {
    folder: TempDir,
    summary: Summary,
    steps: u64,
    address: SocketAddr,
    stop: CancellationToken,
    serving: JoinHandle<()>,
    job: String,
}

impl Stage {
    async fn set(workers: u32, steps: u64) -> Self {
        Self::set_with(workers, steps, |_| {}).await
    }

    /// With `shard` as the job file has it.
    async fn set_sharing(workers: u32, steps: u64, shard: serde_json::Value) -> Self {
        Self::set_with(workers, steps, |spec| spec["base"]["shard"] = shard).await
    }

    /// With a job file that is changed by `change`.
    async fn set_with(workers: u32, steps: u64, change: impl FnOnce(&mut serde_json::Value)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (train, eval) = (folder.path().join("train.jsonl"), folder.path().join("eval.jsonl"));
        let line = |number: usize| {
            let words = ["to", "see", "sad", "sights", "moves", "more", "than", "hear", "them", "told"];
            let text: Vec<&str> = (0..6 + number % 9).map(|word| words[(word * (number + 1)) % 10]).collect();
            serde_json::json!({"text": text.join(" ")}).to_string()
        };
        std::fs::write(&train, (0..26).map(line).collect::<Vec<_>>().join("\n")).unwrap();
        std::fs::write(&eval, (50..57).map(line).collect::<Vec<_>>().join("\n")).unwrap();
        let store = folder.path().join("run");
        let options = PrepareOptions {
            eval: Some(eval.display().to_string()),
            max_length: 32,
            packing: false,
            threads: 1,
            ..PrepareOptions::new(
                examples().join("tiny-llama-14m"),
                train.display().to_string(),
                store.join("prepared"),
            )
        };
        let summary = shanty_data::prepare(&options, &mut |_| {}).unwrap();
        let done = serde_json::to_string(&PrepareLine::Done { summary: summary.clone() }).unwrap();
        std::fs::write(folder.path().join("done.json"), done + "\n").unwrap();
        let (address, stop, serving) = serve(folder.path(), SocketAddr::from(([127, 0, 0, 1], 0))).await;

        let mut spec = serde_json::json!({
            "name": "stage", "base": {"model": examples().join("tiny-llama-14m")},
            "adapter": {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
            "data": {"train": train, "eval": options.eval, "max_length": 32, "packing": false},
            "train": {
                "steps": steps, "global_batch_size": BATCH, "seed": SEED, "learning_rate": 0.01, "eval_every_steps": 4,
            },
            "checkpoint": {"store": store, "every_steps": 5, "keep": 2},
            "cluster": {"workers": {"min": workers.min(2), "max": workers}, "device": "cpu"},
        });
        change(&mut spec);
        let spec: shanty_config::JobSpec = serde_json::from_value(spec).unwrap();
        let request =
            SubmitJobRequest { request_id: "request-1".to_owned(), spec_json: shanty_config::to_json(&spec) };
        let mut jobs = JobServiceClient::connect(format!("http://{address}")).await.unwrap();
        let job = jobs.submit_job(request).await.unwrap().into_inner().job_id;
        Self { folder, summary, steps, address, stop, serving, job }
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    fn hire(
        &self,
        workers: usize,
        engines: &(impl EngineLoader + Clone + 'static),
        failpoints: &Failpoints,
    ) -> Crew {
        let mut crew = Crew::default();
        for number in 0..workers {
            let url = format!("http://{}", self.address);
            crew.hire_at(&url, number, Box::new(engines.clone()), failpoints.clone());
        }
        crew
    }

    async fn status(&self) -> Option<JobStatus> {
        let mut client = StatusServiceClient::connect(format!("http://{}", self.address)).await.ok()?;
        client.get_status(GetStatusRequest { job_id: self.job.clone() }).await.ok()?.into_inner().status
    }

    /// Waits until the job satisfies a condition.
    async fn until(&self, what: &str, condition: impl Fn(&JobStatus) -> bool) -> JobStatus {
        let mut last = None;
        for _ in 0..2400 {
            if let Some(status) = self.status().await {
                if condition(&status) {
                    return status;
                }
                last = Some(status);
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("never: {what}; at last: {last:#?}");
    }

    async fn until_it_ends(&self) -> JobStatus {
        let ended = |status: &JobStatus| {
            [JobState::Succeeded, JobState::Failed, JobState::Cancelled].contains(&status.state())
        };
        self.until("the job ends", ended).await
    }

    /// Stops the coordinator and starts another on its state and its port.
    async fn restart(&mut self, pause: Duration) {
        self.stop.cancel();
        (&mut self.serving).await.unwrap();
        tokio::time::sleep(pause).await;
        (self.address, self.stop, self.serving) = serve(self.folder.path(), self.address).await;
    }

    /// The bits of each step's loss.
    async fn losses(&self) -> Vec<u64> {
        let mut client = StatusServiceClient::connect(format!("http://{}", self.address)).await.unwrap();
        let request = ListStepsRequest { job_id: self.job.clone(), from_step: 0, limit: 0 };
        let steps = client.list_steps(request).await.unwrap().into_inner().steps;
        steps.iter().map(|record| record.loss.to_bits()).collect()
    }

    fn adapter(&self) -> Vec<u8> {
        std::fs::read(self.store().join("adapter/adapter_model.safetensors")).unwrap()
    }

    async fn recorded_steps(&self) -> Vec<u64> {
        let mut client = StatusServiceClient::connect(format!("http://{}", self.address)).await.unwrap();
        let request = ListStepsRequest { job_id: self.job.clone(), from_step: 0, limit: 0 };
        let steps = client.list_steps(request).await.unwrap().into_inner().steps;
        steps.iter().map(|record| record.step).collect()
    }

    fn prove_exactly_once(&self) {
        let order = Order::new(SEED, self.summary.train.rows, BATCH as u64).unwrap();
        prove_exactly_once_in(&self.store(), self.steps, &order);
    }
}

async fn serve(folder: &Path, listen: SocketAddr) -> (SocketAddr, CancellationToken, JoinHandle<()>) {
    let script = format!("cat > /dev/null; cat \"{}\"", folder.join("done.json").display());
    let prepare = ["/bin/sh".into(), "-c".into(), script.into()].to_vec();
    let mut options = Options::new(folder.join("state"), folder.join("runs"), prepare);
    options.listen = listen;
    // The tests of the coordinator and of the program ask who it is.
    options.insecure = true;
    options.protocol.beat_interval = Duration::from_millis(50);
    options.protocol.gather = Duration::from_millis(1500);
    let stop = CancellationToken::new();
    let mut bound = Coordinator::bind(options.clone()).await;
    for _ in 0..100 {
        if bound.is_ok() {
            break;
        }
        // The port of the predecessor, or its lock, may be held for a moment.
        tokio::time::sleep(Duration::from_millis(50)).await;
        bound = Coordinator::bind(options.clone()).await;
    }
    let coordinator = bound.unwrap();
    let address = coordinator.handle().address;
    let stopped = stop.clone();
    let serving = tokio::spawn(async move { coordinator.serve(stopped).await.unwrap() });
    (address, stop, serving)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_costs_no_step_and_no_row() {
    let stage = Stage::set(3, 14).await;
    let engines = ModelEngines { pause: Duration::from_millis(5), ..ModelEngines::default() };
    let crew = stage.hire(3, &engines, &deadly("mid_backward@step=6,rank=1,generation=1"));
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    assert!(status.events.iter().any(|event| event.kind == "member_lost"), "{:#?}", status.events);
    assert_eq!(status.ledger.unwrap().duplicates, 0);
    assert_eq!(stage.recorded_steps().await, (1..=14).collect::<Vec<_>>());
    assert_eq!(status.evaluations.iter().map(|one| one.step).collect::<Vec<_>>(), [0, 4, 8, 12, 14]);
    stage.prove_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_comes_late_joins_and_one_that_is_dismissed_is_missed_by_nobody() {
    let stage = Stage::set(3, 120).await;
    let engines = ModelEngines { pause: Duration::from_millis(10), ..ModelEngines::default() };
    let mut crew = stage.hire(2, &engines, &Failpoints::none());
    stage.until("it runs", |status| status.step >= 3).await;
    let leaver = crew.hire_late(&format!("http://{}", stage.address), 2, Box::new(engines.clone()));
    stage
        .until("three members", |status| {
            status.members.iter().filter(|one| one.reason.is_empty()).count() == 3
        })
        .await;
    let joined = stage.status().await.unwrap().step;
    stage.until("three of them made a step", |status| status.step > joined + 1).await;
    leaver.cancel();
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    stage.prove_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_outlive_a_restart_of_the_coordinator() {
    let mut stage = Stage::set(3, 60).await;
    let engines = ModelEngines { pause: Duration::from_millis(15), ..ModelEngines::default() };
    let crew = stage.hire(3, &engines, &Failpoints::none());
    stage.until("it runs", |status| status.step >= 10).await;
    stage.restart(Duration::from_millis(200)).await;
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    assert_eq!(status.generation, 1, "the generation of before went on");
    assert_eq!(engines.loads.load(Ordering::SeqCst), 3, "no base was loaded twice");
    assert_eq!(stage.recorded_steps().await, (1..=60).collect::<Vec<_>>());
    stage.prove_exactly_once();
}

/// Time from one step to the next: of a loop that computes and does nothing else, and of a member that leases its rows,
/// holds credit, notes what it enters, checks what was reduced, reports, beats. In turns, in one run; the computation is a
/// wait, as a host's for its card, so that others on the machine matter little.
#[tokio::test(flavor = "multi_thread")]
async fn being_survivable_costs_little_of_a_step_of_100_milliseconds() {
    /// Micro-batches of a step: 6 rows, 2 at a time.
    const PARTS: usize = 3;
    let part = Duration::from_micros(33_500);
    let (mut bare, mut whole) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        bare.extend(tokio::task::spawn_blocking(move || bare_loop(40, PARTS, part)).await.unwrap());
        let stage = Stage::set(1, 41).await;
        let engines = ModelEngines { pause: part, ..ModelEngines::default() };
        let crew = stage.hire(1, &engines, &Failpoints::none());
        let status = stage.until_it_ends().await;
        crew.dismiss().await;
        assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
        let began: Vec<Instant> = engines.began.lock().unwrap().iter().step_by(PARTS).copied().collect();
        whole.extend(began.windows(2).map(|two| two[1] - two[0]));
    }
    let median = |mut times: Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e3
    };
    let (bare, whole) = (median(bare), median(whole));
    let cost = whole / bare - 1.0;
    println!("a step takes {bare:.2} ms without, {whole:.2} ms with: {:.2} %", cost * 100.0);
    // The bar is 1 % on a quiet machine (docs/reliability.md); on a busy one wake-ups are late.
    assert!(cost < 0.1, "a step takes {bare:.2} ms without, {whole:.2} ms with");
}

fn bare_loop(steps: usize, parts: usize, part: Duration) -> Vec<Duration> {
    let mut times = Vec::new();
    for _ in 0..steps {
        let began = Instant::now();
        (0..parts).for_each(|_| std::thread::sleep(part));
        times.push(began.elapsed());
    }
    times
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_engine_trains_a_real_base_on_two_workers() {
    let stage = Stage::set(2, 6).await;
    let crew = stage.hire(2, &PeftEngines, &Failpoints::none());
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    stage.prove_exactly_once();
    let (first, last) = (&status.evaluations[0], status.evaluations.last().unwrap());
    assert_eq!((first.step, last.step), (0, 6));
    assert!(last.loss < first.loss, "{} {}", first.loss, last.loss);
    let files: BTreeSet<String> = std::fs::read_dir(stage.store().join("adapter"))
        .unwrap()
        .map(|file| file.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(files.into_iter().collect::<Vec<_>>(), ["adapter_config.json", "adapter_model.safetensors"]);
}

/// The same four ranks, the same rows: whether each has the base or two or four share it, losses and adapter are the same bits.
#[tokio::test(flavor = "multi_thread")]
async fn workers_that_share_a_base_train_the_bits_of_those_that_do_not() {
    let mut results = Vec::new();
    for shard in [serde_json::json!("replicate"), 2.into(), 4.into()] {
        let stage = Stage::set_sharing(4, 5, shard).await;
        let crew = stage.hire(4, &PeftEngines, &Failpoints::none());
        let status = stage.until_it_ends().await;
        crew.dismiss().await;
        assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
        stage.prove_exactly_once();
        let evaluations: Vec<u64> = status.evaluations.iter().map(|one| one.loss.to_bits()).collect();
        results.push((stage.losses().await, evaluations, stage.adapter()));
    }
    assert_eq!(results[0].0.len(), 5);
    for (losses, evaluations, adapter) in &results[1..] {
        assert_eq!(*losses, results[0].0, "losses");
        assert_eq!(*evaluations, results[0].1, "evaluations");
        let tensors = |file: &[u8]| {
            let file = safetensors::SafeTensors::deserialize(file).unwrap();
            let tensors: Vec<(String, Vec<u8>)> =
                file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect();
            tensors.into_iter().collect::<BTreeMap<_, _>>()
        };
        assert!(tensors(adapter) == tensors(&results[0].2), "adapter");
        let base = |file: &[u8]| safetensors::SafeTensors::read_metadata(file).unwrap().1.metadata().clone();
        assert_eq!(base(adapter), base(&results[0].2), "the adapter names the same base");
    }
}

/// Loads real engines, and counts them.
#[derive(Clone, Default)]
struct Counted(std::sync::Arc<std::sync::Mutex<Vec<usize>>>);

impl EngineLoader for Counted {
    fn load(
        &self,
        request: shanty_worker::engine::LoadRequest<'_>,
        progress: &mut dyn FnMut(f64),
    ) -> Result<Box<dyn shanty_worker::engine::StepEngine>, shanty_worker::Error> {
        self.0.lock().unwrap().extend(request.part.map(|part| part.part));
        PeftEngines.load(request, progress)
    }
}

/// A member of one of two groups is killed in the middle of a micro-batch. The other group goes on; who comes in its place loads its
/// part, and nobody else loads anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_loses_a_member_gets_the_missing_part_and_nothing_else() {
    let stage = Stage::set_sharing(4, 40, 2.into()).await;
    let engines = Counted::default();
    let mut crew = stage.hire(4, &engines, &deadly("mid_backward@step=3,rank=3,generation=1"));
    let lost = |status: &JobStatus| status.events.iter().any(|event| event.kind == "member_lost");
    let status =
        stage.until("a member is lost and two go on", |status| lost(status) && status.step >= 3).await;
    assert_eq!(status.state(), JobState::Running, "{status:#?}");
    crew.hire_at(&format!("http://{}", stage.address), 9, Box::new(engines.clone()), Failpoints::none());
    let four = |status: &JobStatus| {
        let members = status.members.iter().filter(|one| one.reason.is_empty());
        status.generation >= 3 && members.filter(|one| one.rank.is_some()).count() == 4
    };
    stage.until("four again", four).await;
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    let mut loaded = engines.0.lock().unwrap().clone();
    assert_eq!(loaded.pop(), Some(1), "the part of rank 3");
    loaded.sort_unstable();
    assert_eq!(loaded, [0, 0, 1, 1]);
    assert_eq!(status.ledger.unwrap().duplicates, 0);
    assert_eq!(stage.recorded_steps().await, (1..=40).collect::<Vec<_>>());
    stage.prove_exactly_once();
}

/// Both members that hold part 1 die: one of those that are left takes it on, and keeps adapter and optimizer.
#[tokio::test(flavor = "multi_thread")]
async fn a_survivor_takes_on_the_missing_part_and_keeps_its_state() {
    let stage = Stage::set_sharing(4, 8, 2.into()).await;
    let engines = Counted::default();
    let deadly = deadly("mid_backward@step=3,rank=3,generation=1;mid_backward@step=3,rank=1,generation=1");
    let crew = stage.hire(4, &engines, &deadly);
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    assert_eq!(engines.0.lock().unwrap().len(), 5, "one worker loaded one more part");
    assert_eq!(stage.recorded_steps().await, (1..=8).collect::<Vec<_>>());
    assert_eq!(status.ledger.unwrap().recomputed, 0, "no step was lost");
    stage.prove_exactly_once();
}
