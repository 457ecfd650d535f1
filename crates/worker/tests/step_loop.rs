//! The step loop with real sessions and TCP collectives, a model engine, and a coordinator that follows a script.

#![expect(clippy::unwrap_used, reason = "what fails here fails its test")]

mod common;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use common::{
    Crew, adapter, assert_same_losses,
    coordinator::{Coordinator, Event, FromWorker, Job},
    deadly,
    engine::ModelEngines,
    prove_exactly_once, run, run_watched,
};
use serde_json::{Value, json};
use shanty_worker::{
    Error,
    failpoint::{Failpoints, Point},
};
use tempfile::{TempDir, tempdir};

fn store() -> (TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    let path = folder.path().join("run");
    (folder, path)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_two_and_three_workers_train_the_same() {
    let (_one, store_of_one) = store();
    let alone = run(Job::new(store_of_one.clone()), 1, ModelEngines::default(), "").await;
    assert_eq!(alone.losses.len(), 12);
    assert_eq!(alone.evaluations.keys().copied().collect::<Vec<_>>(), [0, 4, 8, 12]);
    // One that still waits for its turn on the disk gives way to a newer one; the last is always written.
    assert!(alone.checkpoints.iter().all(|step| [5, 10, 12].contains(step)), "{:?}", alone.checkpoints);
    assert_eq!(alone.checkpoints.last(), Some(&12));
    assert!(alone.losses[&12] < alone.losses[&1]);
    let parameters = adapter(&store_of_one);
    for world in [2, 3] {
        let (_folder, store) = store();
        let job = Job::new(store.clone());
        let crew = run(job.clone(), world, ModelEngines::default(), "").await;
        assert_same_losses(&crew, &alone);
        prove_exactly_once(&job);
        for (one, other) in adapter(&store).iter().zip(&parameters) {
            // As for the losses; parameters are of the order of 1.
            assert!((one - other).abs() < 1e-4, "{one} {other}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn encrypted_links_change_no_bit() {
    let [plain, encrypted] = [json!({ "encryption": "off" }), json!({ "encryption": "on" })];
    let mut adapters = Vec::new();
    for cluster in [plain, encrypted] {
        let (_folder, path) = store();
        let job = Job { cluster, ..Job::new(path.clone()) };
        run(job.clone(), 3, ModelEngines::default(), "").await;
        prove_exactly_once(&job);
        adapters.push(adapter(&path));
    }
    assert_eq!(adapters[0], adapters[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rounded_gradients_train_nearly_the_same_also_past_a_lost_worker() {
    let (_one, path) = store();
    let exact = run(Job::new(path), 3, ModelEngines::default(), "").await;
    for compression in ["bf16", "int8"] {
        for text in ["", "ring_hop_2@step=6,rank=1,generation=1"] {
            let (_folder, path) = store();
            let job = Job { cluster: json!({ "compression": compression }), ..Job::new(path) };
            let rounded = run(job.clone(), 3, ModelEngines::default(), text).await;
            prove_exactly_once(&job);
            // 37 parameters share a scale: a step of it is 2/127 of the largest gradient, and AdamW divides by their size.
            for (step, loss) in &rounded.losses {
                let exact = exact.losses[step];
                assert!((loss - exact).abs() <= 0.02 * exact, "{compression} {text} {step}: {loss} {exact}");
            }
            assert_ne!(rounded.losses, exact.losses, "{compression}: nothing was rounded");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nccl_between_workers_on_the_cpu_is_refused_aloud() {
    let (_folder, path) = store();
    let job = Job { cluster: json!({ "collective": "nccl" }), ..Job::new(path) };
    let record = run(job, 2, ModelEngines::default(), "").await;
    assert_eq!(record.failures[0].code, "SH0726");
    assert!(record.failures[0].message.contains("this worker computes on the CPU"), "{:?}", record.failures);
    assert!(record.losses.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_smaller_than_the_crew_leaves_some_with_zeros() {
    let (_folder, path) = store();
    let job = Job { batch: 2, ..Job::new(path) };
    let record = run(job.clone(), 3, ModelEngines::default(), "").await;
    assert_eq!(record.losses.len(), 12);
    assert!(record.finished.is_some());
    prove_exactly_once(&job);
}

#[tokio::test(flavor = "multi_thread")]
async fn micro_batches_of_any_size_give_the_same_step() {
    let (_one, path) = store();
    let reference =
        run(Job::new(path), 2, ModelEngines { micro_batch_rows: 1, ..ModelEngines::default() }, "").await;
    let (_two, path) = store();
    let wide =
        run(Job::new(path), 2, ModelEngines { micro_batch_rows: 8, ..ModelEngines::default() }, "").await;
    assert_same_losses(&wide, &reference);

    // Workers that can take micro-batches of unequal size agree on one.
    let (_three, path) = store();
    let mut coordinator = Coordinator::start(Job::new(path)).await;
    let mut crew = Crew::default();
    for (number, micro_batch_rows) in [(0, 3), (1, 1)] {
        let engines = ModelEngines { micro_batch_rows, ..ModelEngines::default() };
        crew.hire(&coordinator, number, &engines, Failpoints::none());
    }
    coordinator.drive(2, |_, _| {}).await;
    crew.dismiss().await;
    assert_eq!(coordinator.record.losses, reference.losses);
}

/// Kills a worker of three at one place, and compares with the run that nobody disturbed.
async fn survives(text: &str) -> TempDir {
    let (_one, path) = store();
    let undisturbed = run(Job::new(path), 3, ModelEngines::default(), "").await;
    let (folder, path) = store();
    let job = Job::new(path);
    let record = run(job.clone(), 3, ModelEngines::default(), text).await;
    assert_eq!(record.generations.len(), 2, "{text}: nobody was killed");
    assert_eq!(record.generations[1].1.len(), 2);
    assert!(record.finished.is_some(), "{text}: {:?}", record.failures);
    assert_same_losses(&record, &undisturbed);
    prove_exactly_once(&job);
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_while_it_computes_loses_no_row() {
    survives("mid_backward@step=5,rank=1,generation=1").await;
    survives("mid_backward@step=1,rank=0,generation=1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_around_the_reduction_loses_no_row() {
    survives("entering_reduction@step=5,rank=1,generation=1").await;
    survives("after_reduction@step=5,rank=2,generation=1").await;
    survives("after_update@step=5,rank=0,generation=1").await;
    survives("after_update@step=12,rank=1,generation=1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_at_any_hop_of_the_ring_loses_no_row() {
    // Three ranks: two hops of the gradient, which is small and travels whole, and two of the integers.
    for hop in 0..4 {
        survives(&format!("ring_hop_{hop}@step=6,rank=1,generation=1")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_killed_before_its_manifest_leaves_no_checkpoint_and_after_it_leaves_one() {
    let manifest = "run/checkpoints/00000005-a1-g1/manifest.json";
    let before = survives("before_manifest@step=5,rank=0,generation=1").await;
    assert!(!before.path().join(manifest).exists());
    let after = survives("after_manifest@step=5,rank=0,generation=1").await;
    assert!(after.path().join(manifest).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_micro_batches_are_kept_and_only_the_lost_rows_are_computed_again() {
    let (_one, path) = store();
    let job = Job { batch: 12, train_rows: 36, ..Job::new(path) };
    let slow =
        ModelEngines { micro_batch_rows: 1, pause: Duration::from_millis(3), ..ModelEngines::default() };
    let undisturbed = run(job, 3, slow.clone(), "").await;
    let (_two, path) = store();
    let job = Job { batch: 12, train_rows: 36, ..Job::new(path) };
    let record = run(job.clone(), 3, slow, "entering_reduction@step=4,rank=2,generation=1").await;
    assert_same_losses(&record, &undisturbed);
    prove_exactly_once(&job);

    let kept: Vec<u64> =
        record.lefts.iter().filter_map(|left| left.kept.clone()).flat_map(|kept| kept.row_ids).collect();
    assert!(!kept.is_empty());
    let rows = &record.generations[1].2.rows;
    assert_eq!(rows.iter().map(|rows| rows.kept.len()).sum::<usize>(), kept.len());
    assert!(record.requeued.iter().all(|row| !kept.contains(row)));
    assert_eq!(record.requeued.len() + kept.len(), 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_missed_the_last_hop_receives_the_step_from_the_others() {
    let mut behind = 0;
    for hop in 0..4 {
        let (_folder, path) = store();
        let job = Job::new(path);
        let mut coordinator = Coordinator::start(job.clone()).await;
        let mut crew = Crew::default();
        let engines = ModelEngines::default();
        for number in 0..2 {
            crew.hire(&coordinator, number, &engines, Failpoints::none());
        }
        // Its collective breaks; it lives on.
        let breaks = Failpoints::parse(
            &format!("ring_hop_{hop}@step=6,rank=2,generation=1"),
            Arc::new(|point, _| match point {
                Point::RingHop(_) => {
                    // Whoever can finish without this worker has done so meanwhile.
                    std::thread::sleep(Duration::from_millis(50));
                    Err(Error::TrainerGone)
                }
                _ => Ok(()),
            }),
        );
        crew.hire(&coordinator, 2, &engines, breaks.unwrap());
        coordinator.drive(3, |_, _| {}).await;
        crew.dismiss().await;
        let record = &coordinator.record;
        assert!(record.finished.is_some(), "{:?}", record.failures);
        prove_exactly_once(&job);
        let applied: Vec<u64> = record.lefts.iter().map(|left| left.applied_step).collect();
        if applied.iter().max() != applied.iter().min() {
            assert_eq!(applied.iter().max().unwrap() - applied.iter().min().unwrap(), 1);
            behind += 1;
        }
    }
    assert!(behind > 0, "no hop left a worker behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_gets_the_state_and_a_donor_lost_meanwhile_is_replaced() {
    for text in ["", "during_state_transfer@generation=2,rank=0"] {
        let (_folder, path) = store();
        let job = Job::new(path);
        let mut coordinator = Coordinator::start(job.clone()).await;
        let slow = ModelEngines { pause: Duration::from_millis(10), ..ModelEngines::default() };
        let mut crew = Crew::default();
        for number in 0..2 {
            crew.hire(&coordinator, number, &slow, deadly(text));
        }
        let mut hired = false;
        coordinator
            .drive(2, |event, coordinator| match event {
                Event::Said(_, FromWorker::Step(report)) if report.step == 3 && !hired => {
                    hired = true;
                    crew.hire(coordinator, 2, &slow, Failpoints::none());
                }
                Event::Said(worker, FromWorker::BaseReady(_)) if worker == "w2" => {
                    coordinator.part("a worker joins");
                    coordinator.ready("w2");
                }
                _ => {}
            })
            .await;
        let ends = crew.dismiss().await;
        let record = &coordinator.record;
        assert!(record.finished.is_some(), "{:?}", record.failures);
        assert!(record.generations.iter().any(|(_, members, _)| members.contains(&"w2".to_owned())));
        assert_eq!(record.generations.len(), if text.is_empty() { 2 } else { 3 });
        assert_eq!(matches!(ends["w0"], Err(Error::Killed)), !text.is_empty());
        prove_exactly_once(&job);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_credit_workers_stop_at_a_boundary_and_go_on_when_it_is_back() {
    let (_folder, path) = store();
    let job = Job { steps: 30, eval_every: 0, checkpoint_every: 0, ..Job::new(path) };
    let mut coordinator = Coordinator::start(job.clone()).await;
    coordinator.set_credit_ms(150);
    coordinator.steps_ahead = 100;
    let slow = ModelEngines { pause: Duration::from_millis(8), ..ModelEngines::default() };
    let mut crew = Crew::default();
    for number in 0..2 {
        crew.hire(&coordinator, number, &slow, Failpoints::none());
    }
    let (mut withheld, mut highest) = (false, 0);
    coordinator
        .drive(2, |event, coordinator| {
            if let Event::Said(_, FromWorker::Step(report)) = event {
                highest = highest.max(report.step);
                if report.step == 4 && !withheld {
                    withheld = true;
                    coordinator.withhold_credit(true);
                    coordinator.halt = true;
                }
            }
        })
        .await;
    // Out of credit after 150 ms at the latest: about nine steps of 16 ms and more.
    let silent_for = coordinator.until_silent(Duration::from_millis(400)).await;
    assert!(silent_for.is_some(), "workers went on without credit");
    let stopped_at = *coordinator.record.losses.keys().last().unwrap();
    assert!((4..30).contains(&stopped_at), "{stopped_at}");
    coordinator.halt = false;
    coordinator.withhold_credit(false);
    coordinator.drive(2, |_, _| {}).await;
    crew.dismiss().await;
    assert_eq!(coordinator.record.losses.len(), 30);
    assert_eq!(coordinator.record.generations.len(), 1);
    prove_exactly_once(&job);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_go_on_while_the_coordinator_is_away_and_tell_everything_when_it_is_back() {
    let (_folder, path) = store();
    let job = Job { steps: 40, ..Job::new(path) };
    let mut coordinator = Coordinator::start(job.clone()).await;
    coordinator.patient = true;
    coordinator.steps_ahead = 6;
    let engines = ModelEngines { pause: Duration::from_millis(5), ..ModelEngines::default() };
    let mut crew = Crew::default();
    for number in 0..3 {
        crew.hire(&coordinator, number, &engines, Failpoints::none());
    }
    let mut away = 0;
    coordinator
        .drive(3, |event, coordinator| match event {
            Event::Said(_, FromWorker::Step(report)) if report.step == 10 && away == 0 => {
                away = 1;
                coordinator.go_away();
                coordinator.come_back_after(Duration::from_millis(300));
            }
            Event::Connected(_) if away > 0 => away += 1,
            _ => {}
        })
        .await;
    crew.dismiss().await;
    let record = &coordinator.record;
    assert_eq!(away, 4, "all three came back");
    assert_eq!(record.losses.keys().copied().collect::<Vec<_>>(), (1..=40).collect::<Vec<_>>());
    assert_eq!(record.generations.len(), 1, "nobody was told to leave");
    assert_eq!(engines.loads.load(std::sync::atomic::Ordering::SeqCst), 3);
    prove_exactly_once(&job);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_run_has_the_bits_of_an_uninterrupted_one() {
    resumes(json!({})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_run_goes_on_with_what_its_workers_owe_to_rounded_sums() {
    resumes(json!({ "compression": "int8" })).await;
}

async fn resumes(cluster: Value) {
    let job = |path: &Path| Job { cluster: cluster.clone(), ..Job::new(path.to_owned()) };
    let (_one, path) = store();
    let whole = run(job(&path), 2, ModelEngines::default(), "").await;
    let expected = adapter(&path);

    let (_two, path) = store();
    let slow = ModelEngines { pause: Duration::from_millis(10), ..ModelEngines::default() };
    let halted = run_watched(job(&path), 2, slow, "", |event, coordinator| {
        if let Event::Said(_, FromWorker::Step(report)) = event {
            coordinator.halt |= report.step >= 7 && coordinator.record.checkpoints.contains(&5);
        }
    })
    .await;
    assert!(halted.finished.is_none());

    let mut coordinator = Coordinator::start(Job { attempt: 2, ..job(&path) }).await;
    coordinator.resume_from = Some((5, "checkpoints/00000005-a1-g1".to_owned()));
    // Room for larger micro-batches than before: the plan of the checkpoint is used all the same.
    let engines = ModelEngines { micro_batch_rows: 4, ..ModelEngines::default() };
    let mut crew = Crew::default();
    for number in 0..2 {
        crew.hire(&coordinator, number, &engines, Failpoints::none());
    }
    coordinator.drive(2, |_, _| {}).await;
    crew.dismiss().await;
    let resumed = &coordinator.record;
    assert_eq!(resumed.losses.keys().copied().collect::<Vec<_>>(), (6..=12).collect::<Vec<_>>());
    for (step, loss) in &resumed.losses {
        assert_eq!(loss.to_bits(), whole.losses[step].to_bits(), "step {step}");
    }
    assert_eq!(adapter(&path), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sum_that_was_not_announced_stops_the_job() {
    let (_folder, path) = store();
    let record = run_watched(Job::new(path), 2, ModelEngines::default(), "", |event, coordinator| {
        if let Event::Connected(_) = event {
            coordinator.lie_at(3);
        }
    })
    .await;
    assert_eq!(record.failures[0].code, "SH0601");
    assert!(record.failures[0].message.starts_with("step 3 reduced 5 rows"), "{:?}", record.failures);
    assert!(!record.losses.contains_key(&3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loss_that_is_not_a_number_names_step_and_rows() {
    let (_folder, path) = store();
    let job = Job::new(path);
    let poisoned = job.order().step_rows(2)[3];
    let engines =
        ModelEngines { poisoned_row: Some(poisoned), micro_batch_rows: 1, ..ModelEngines::default() };
    let record = run(job, 1, engines, "").await;
    assert_eq!(record.failures[0].code, "SH0602");
    assert_eq!(record.failures[0].message, format!("the loss of step 2 is not finite in row {poisoned}"));
    assert!(!record.losses.contains_key(&2));
}
