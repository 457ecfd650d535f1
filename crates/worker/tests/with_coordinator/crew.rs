//! Members that go, hang, lag and differ, and steps that are bad.

use shanty_proto::v1::{CrewHealth, Event, Ledger};

use super::*;

fn quick() -> ModelEngines {
    ModelEngines { pause: Duration::from_millis(10), ..ModelEngines::default() }
}

fn url(stage: &Stage) -> String {
    format!("http://{}", stage.address)
}

fn events<'a>(status: &'a JobStatus, kind: &str) -> Vec<&'a Event> {
    status.events.iter().filter(|event| event.kind == kind).collect()
}

fn crew_of(status: &JobStatus) -> CrewHealth {
    status.crew.clone().unwrap()
}

fn members(status: &JobStatus) -> usize {
    status.members.iter().filter(|member| member.rank.is_some() && member.reason.is_empty()).count()
}

/// Every row is accounted for, and none twice.
fn check_ledger(stage: &Stage, status: &JobStatus) -> Ledger {
    let ledger = status.ledger.unwrap();
    let order = Order::new(SEED, stage.summary.train.rows, BATCH as u64).unwrap();
    let rows: u64 = (1..=stage.steps).map(|step| order.rows_in_step(step)).sum();
    assert_eq!((ledger.committed + ledger.skipped, ledger.duplicates), (rows, 0), "{ledger:?}");
    ledger
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_finishes_its_step_and_the_job_goes_on() {
    let stage = Stage::set(3, 80).await;
    let mut crew = stage.hire(3, &quick(), &Failpoints::none());
    stage.until("it runs", |status| status.step >= 5 && members(status) == 3).await;
    let end = crew.drain(1).await;
    assert!(end.is_ok(), "{end:?}");
    stage.until("two go on", |status| members(status) == 2 && status.state() == JobState::Running).await;
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    let (ledger, crew) = (check_ledger(&stage, &status), crew_of(&status));
    assert_eq!((ledger.requeued, ledger.recomputed, crew.losses), (0, 0, 0), "{:#?}", status.events);
    let drained = crew.recoveries.iter().find(|one| one.cause == "drained").unwrap();
    assert_eq!((drained.steps_lost, drained.rows_requeued), (0, 0));
    assert_eq!(stage.recorded_steps().await, (1..=80).collect::<Vec<_>>());
    stage.prove_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_worker_leaves_a_checkpoint_and_the_next_goes_on_from_there() {
    let stage = Stage::set_with(1, 60, |spec| spec["checkpoint"]["every_steps"] = 0.into()).await;
    let mut crew = stage.hire(1, &quick(), &Failpoints::none());
    stage.until("it runs", |status| status.step >= 7).await;
    let end = crew.drain(0).await;
    assert!(end.is_ok(), "{end:?}");
    let status = stage.status().await.unwrap();
    let kept: Vec<u64> = status.checkpoints.iter().map(|checkpoint| checkpoint.step).collect();
    assert_eq!(kept, [status.step], "{:#?}", status.events);
    crew.hire_at(&url(&stage), 9, Box::new(quick()), Failpoints::none());
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    assert_eq!(check_ledger(&stage, &status).recomputed, 0, "nothing is trained twice");
    assert_eq!(stage.recorded_steps().await, (1..=60).collect::<Vec<_>>());
    stage.prove_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spare_waits_with_its_base_loaded_and_takes_a_killed_members_place() {
    let stage = Stage::set(2, 150).await;
    let deadly = deadly("mid_backward@step=20,rank=1,generation=1");
    let mut crew = stage.hire(2, &quick(), &deadly);
    stage.until("it runs", |status| status.step >= 2).await;
    crew.hire_at(&url(&stage), 7, Box::new(quick()), Failpoints::none());
    stage.until("a spare", |status| crew_of(status).spares == ["w7"]).await;
    let status = stage.until("it is a member", |status| status.generation >= 2 && members(status) == 2).await;
    assert!(status.members.iter().any(|member| member.worker_id == "w7" && member.rank.is_some()));
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    let lost = crew_of(&status).recoveries.into_iter().find(|one| one.cause == "lost").unwrap();
    assert!(lost.detection_ms.unwrap() < 1000.0 && lost.stall_ms < 3000.0, "{lost:?}");
    check_ledger(&stage, &status);
    stage.prove_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_that_hangs_is_found_by_the_learnt_deadline_and_its_process_ends() {
    let stage = Stage::set(3, 40).await;
    let hang = Failpoints::parse(
        "hang:mid_backward@step=12,rank=1,generation=1",
        std::sync::Arc::new(|_, _| Ok(())),
    );
    let mut crew = stage.hire(3, &quick(), &hang.unwrap());
    let status = stage.until_it_ends().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    let hung = crew_of(&status).recoveries.into_iter().find(|one| one.cause == "hung").unwrap();
    let detection = hung.detection_ms.unwrap();
    // max(10 s, 3 usual steps), and at most a few beats of 50 ms later; the machine may be busy.
    assert!((10_000.0..13_000.0).contains(&detection), "{detection} ms");
    assert_eq!(crew_of(&status).deadline_seconds, Some(10.0));
    assert_eq!(crew_of(&status).losses, 1);
    assert!(events(&status, "member_lost")[0].text.contains("no progress"), "{:#?}", status.events);
    check_ledger(&stage, &status);
    stage.prove_exactly_once();
    // Its thread cannot be ended; its process can.
    let number: usize = events(&status, "member_lost")[0].worker_id[1..].parse().unwrap();
    let end = tokio::time::timeout(Duration::from_secs(60), crew.end_of(number)).await.unwrap();
    assert!(matches!(end, Err(shanty_worker::Error::Hung { .. })), "{end:?}");
    crew.dismiss().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_whose_adapter_differs_is_named_and_takes_the_others() {
    let stage = Stage::set_with(3, 20, |spec| spec["cluster"]["compare_every_steps"] = 4.into()).await;
    let mut crew = Crew::default();
    for number in 0..3 {
        let wrong_at = (number == 1).then_some(6);
        let engines = ModelEngines { wrong_at, ..quick() };
        crew.hire_at(&url(&stage), number, Box::new(engines), Failpoints::none());
    }
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    // Step 5 has a checkpoint and with it a comparison; step 6 goes wrong; step 8 is compared.
    let diverged = events(&status, "diverged");
    assert!(diverged[0].text.contains("after step 8"), "{diverged:#?}");
    assert_eq!(diverged.last().unwrap().worker_id, "w1", "{diverged:#?}");
    assert_eq!(check_ledger(&stage, &status).recomputed, 0, "the majority's state goes on");
    stage.prove_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_differ_go_back_to_the_checkpoint_that_they_agreed_on() {
    let stage = Stage::set_with(2, 20, |spec| spec["cluster"]["compare_every_steps"] = 4.into()).await;
    let mut crew = Crew::default();
    for number in 0..2 {
        let wrong_at = (number == 1).then_some(6);
        let engines = ModelEngines { wrong_at, ..quick() };
        crew.hire_at(&url(&stage), number, Box::new(engines), Failpoints::none());
    }
    let status = stage.until("it went back", |status| status.ledger.unwrap().recomputed > 0).await;
    let order = Order::new(SEED, stage.summary.train.rows, BATCH as u64).unwrap();
    let again: u64 = (6..=8).map(|step| order.rows_in_step(step)).sum();
    // Perhaps more than once by now: the same bit goes wrong in the repeat.
    assert_eq!(status.ledger.unwrap().recomputed % again, 0, "back to step 5: {:#?}", status.events);
    crew.dismiss().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_row_is_passed_over_and_named_where_the_job_wants_it() {
    let stage = Stage::set_with(2, 8, |spec| spec["train"]["on_bad_step"] = "skip".into()).await;
    let engines = ModelEngines { poisoned_row: Some(11), ..quick() };
    let crew = stage.hire(2, &engines, &Failpoints::none());
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    let order = Order::new(SEED, stage.summary.train.rows, BATCH as u64).unwrap();
    let bad: Vec<u64> = (1..=8).filter(|step| order.step_rows(*step).contains(&11)).collect();
    assert!(!bad.is_empty());
    let rows: u64 = bad.iter().map(|step| order.rows_in_step(*step)).sum();
    assert_eq!(check_ledger(&stage, &status).skipped, rows);
    assert_eq!(events(&status, "skipped").len(), bad.len());
    let named = &events(&status, "bad_samples")[0].text;
    assert!(named.contains("samples"), "{named}");
    assert_eq!(stage.recorded_steps().await, (1..=8).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_row_stops_the_job_where_nothing_is_said() {
    let stage = Stage::set(2, 8).await;
    let engines = ModelEngines { poisoned_row: Some(11), ..quick() };
    let crew = stage.hire(2, &engines, &Failpoints::none());
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!((status.state(), status.error_code.as_str()), (JobState::Failed, "SH0602"), "{status:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_step_is_rolled_back_to_a_checkpoint_and_passed_over() {
    let change = |spec: &mut serde_json::Value| {
        spec["train"]["on_bad_step"] = "skip".into();
        spec["train"]["rollback_steps"] = 2.into();
        spec["checkpoint"]["every_steps"] = 3.into();
        spec["checkpoint"]["keep"] = 50.into();
    };
    let stage = Stage::set_with(2, 30, change).await;
    let order = Order::new(SEED, stage.summary.train.rows, BATCH as u64).unwrap();
    let engines = ModelEngines { poisoned_step: Some(9), ..quick() };
    let crew = stage.hire(2, &engines, &Failpoints::none());
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    let ledger = check_ledger(&stage, &status);
    assert_eq!(ledger.skipped, order.rows_in_step(9), "{:#?}", status.events);
    // Step 8 is the last good one; two back is 6, which has a checkpoint, if it was written in time.
    let chosen = events(&status, "checkpoint_chosen").pop().unwrap().text.clone();
    let back = [6, 3].into_iter().find(|step| chosen.contains(&format!("from step {step} ")));
    let back = back.unwrap_or_else(|| panic!("{chosen}"));
    let again: u64 = (back + 1..=8).map(|step| order.rows_in_step(step)).sum();
    assert_eq!(ledger.recomputed, again, "{:#?}", status.events);
    assert!(events(&status, "bad_step")[0].text.contains("step 9 is bad"), "{:#?}", status.events);
    let over = crew_of(&status).recoveries.into_iter().find(|one| one.cause == "bad_step").unwrap();
    assert_eq!(over.steps_lost, 8 - back);
    assert_eq!(stage.recorded_steps().await, (1..=30).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loss_spike_is_a_bad_step() {
    let change = |spec: &mut serde_json::Value| {
        spec["train"]["on_bad_step"] = "skip".into();
        spec["train"]["loss_spike"] = 5.0.into();
        spec["train"]["learning_rate"] = 0.001.into();
    };
    let stage = Stage::set_with(2, 24, change).await;
    let order = Order::new(SEED, stage.summary.train.rows, BATCH as u64).unwrap();
    let engines = ModelEngines { spiked_step: Some(20), ..quick() };
    let crew = stage.hire(2, &engines, &Failpoints::none());
    let status = stage.until_it_ends().await;
    crew.dismiss().await;
    assert_eq!(status.state(), JobState::Succeeded, "{status:#?}");
    assert_eq!(check_ledger(&stage, &status).skipped, order.rows_in_step(20), "{:#?}", status.events);
    assert!(events(&status, "skipped")[0].text.contains("times the usual"), "{:#?}", status.events);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_straggler_is_named_and_a_spare_takes_its_place() {
    let stage = Stage::set_with(2, 400, |spec| spec["cluster"]["replace_stragglers"] = true.into()).await;
    let mut crew = Crew::default();
    for (number, pause) in [(0, 10), (1, 40)] {
        let engines = ModelEngines { pause: Duration::from_millis(pause), ..ModelEngines::default() };
        crew.hire_at(&url(&stage), number, Box::new(engines), Failpoints::none());
    }
    let status = stage.until("it is named", |status| !events(status, "straggler").is_empty()).await;
    assert_eq!(events(&status, "straggler")[0].worker_id, "w1", "{:#?}", status.events);
    crew.hire_at(&url(&stage), 5, Box::new(quick()), Failpoints::none());
    let status = stage
        .until("it is replaced", |status| {
            let has = |worker: &str| {
                let is =
                    |member: &&shanty_proto::v1::Member| member.worker_id == worker && member.rank.is_some();
                status.members.iter().find(is).is_some()
            };
            has("w0") && has("w5") && !has("w1")
        })
        .await;
    assert!(!events(&status, "member_replaced").is_empty());
    crew.dismiss().await;
}
