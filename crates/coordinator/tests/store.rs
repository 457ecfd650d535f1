//! What outlives the coordinator.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

use std::path::Path;

use shanty_coordinator::{
    Error,
    machine::{
        Change,
        record::{
            CheckpointRecord, EvaluationRecord, EventRecord, FailureRecord, GenerationRecord, JobRecord,
            JobState, MemberRecord, RankRows, Source, StartPoint, StepRecord,
        },
    },
    store::{FILE, LogLine, Store},
};
use shanty_diagnostic::{Diagnose, Diagnostic, Kind};
use shanty_proto::{Attempt, Generation, JobId, Rank, Step, WorkerId};

fn job() -> JobId {
    JobId::new("pirate").unwrap()
}

fn record() -> JobRecord {
    let members = ["a", "b"]
        .map(|name| MemberRecord { worker: WorkerId::new(name).unwrap(), address: format!("{name}:1") });
    JobRecord {
        id: job(),
        sequence: 4,
        request_id: "request".to_owned(),
        spec_json: "{\"checkpoint\":{\"keep\":2}}".to_owned(),
        state: JobState::Running,
        reason: "generation 3 of 2 workers".to_owned(),
        failure: Some(FailureRecord::from(Diagnostic::new("SH0601", "x").kind(Kind::Internal).at_line(3))),
        attempt: Attempt(2),
        facts: None,
        watermark: Step(7),
        generation: Some(GenerationRecord {
            generation: Generation(3),
            members: members.to_vec(),
            // Not stored.
            token: [0; 32],
            start: StartPoint {
                applied: Step(5),
                source: Source::Members { donor: Rank(0), receivers: vec![Rank(1)] },
                rows: vec![RankRows { kept: vec![1], compute: vec![2, 3] }, RankRows::default()],
                evaluated: Some(Step(0)),
                checkpoint: None,
                skip: Default::default(),
                usual_loss: Default::default(),
            },
        }),
        evaluated: Some(Step(0)),
        checkpoint: None,
        requeued: 4,
        recomputed: 2,
        furthest: Step(9),
        total_losses: 1,
        adapter: String::new(),
        submitted_unix_ms: 1,
        started_unix_ms: 2,
        ended_unix_ms: 0,
        overtaken: 3,
        health: Default::default(),
    }
}

fn step(number: u64, generation: u64, loss: f64) -> StepRecord {
    StepRecord {
        step: Step(number),
        attempt: Attempt(1),
        generation: Generation(generation),
        loss,
        learning_rate: 1e-3,
        gradient_norm: 0.1,
        tokens: 10,
        tokens_per_second: 5.0,
        workers: 2,
        unix_ms: 3,
        skipped: false,
    }
}

/// Opens the store, lets `act` use it, and closes it without a word, as a crash would.
async fn with_store<T>(
    folder: &Path,
    act: impl AsyncFnOnce(&Store) -> T,
) -> (Vec<shanty_coordinator::machine::StoredJob>, T) {
    let (store, jobs, closing) = Store::open(folder).unwrap();
    let result = act(&store).await;
    drop(store);
    tokio::task::spawn_blocking(move || closing.join()).await.unwrap();
    (jobs, result)
}

#[tokio::test]
async fn what_was_made_durable_is_there_after_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let crashed = tempfile::tempdir().unwrap();
    let (store, jobs, _closing) = Store::open(folder.path()).unwrap();
    assert!(jobs.is_empty());
    store.persist(vec![Change::Job(Box::new(record()))]).await.unwrap();
    store
        .record(vec![Change::Step(job(), step(6, 3, 2.5)), Change::Watermark(job(), Step(8))])
        .await
        .unwrap();
    // What is persisted later makes what was recorded before it durable too.
    store
        .persist(vec![Change::Evaluation(job(), EvaluationRecord { step: Step(0), loss: 6.0, tokens: 4 })])
        .await
        .unwrap();
    // The files as they are while the store is still open: what kill -9 leaves behind.
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), crashed.path().join(entry.file_name())).unwrap();
    }
    let (jobs, ()) = with_store(crashed.path(), async |_| ()).await;
    let [stored] = &jobs[..] else { panic!("{jobs:?}") };
    assert_eq!(stored.record, JobRecord { watermark: Step(8), ..record() });
    assert_eq!(stored.record.failure.as_ref().unwrap().diagnostic().kind, Kind::Internal);
    assert_eq!(stored.steps, [step(6, 3, 2.5)]);
    assert_eq!(stored.evaluations.len(), 1);
}

#[tokio::test]
async fn a_second_coordinator_is_refused_until_the_first_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    with_store(folder.path(), async |_| {
        let error = Store::open(folder.path()).unwrap_err();
        assert!(matches!(error, Error::StateInUse { .. }), "{error}");
        assert_eq!(error.diagnostic().code, "SH0771");
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    })
    .await;
    with_store(folder.path(), async |_| ()).await;
}

#[tokio::test]
async fn a_store_of_a_newer_version_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    with_store(folder.path(), async |_| ()).await;
    let connection = rusqlite::Connection::open(folder.path().join(FILE)).unwrap();
    connection.pragma_update(None, "user_version", 99).unwrap();
    drop(connection);
    let error = Store::open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::StoreVersion { found: 99, known: 2 }), "{error}");
}

#[tokio::test]
async fn the_highest_generation_has_the_step_and_what_left_the_lineage_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let (_, steps) = with_store(folder.path(), async |store| {
        let changes = vec![
            Change::Job(Box::new(record())),
            Change::Step(job(), step(1, 1, 3.0)),
            Change::Step(job(), step(2, 2, 2.0)),
            Change::Step(job(), step(2, 1, 9.0)),
            Change::Step(job(), step(2, 3, 1.5)),
            Change::Step(job(), step(3, 3, 1.0)),
            Change::Truncate(job(), Step(2)),
        ];
        store.persist(changes).await.unwrap();
        store.steps(job(), 1, 100).await.unwrap()
    })
    .await;
    assert_eq!(steps.iter().map(|step| step.loss).collect::<Vec<_>>(), [3.0, 1.5]);
}

#[tokio::test]
async fn a_long_history_is_answered_evenly_spaced_and_thinned() {
    let folder = tempfile::tempdir().unwrap();
    with_store(folder.path(), async |store| {
        let changes = (1..=1000).map(|number| Change::Step(job(), step(number, 1, 1.0))).collect();
        store.persist(changes).await.unwrap();
        let steps = store.steps(job(), 1, 10).await.unwrap();
        let numbers: Vec<u64> = steps.iter().map(|step| step.step.0).collect();
        assert_eq!(numbers, [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]);
        let steps = store.steps(job(), 995, 100).await.unwrap();
        assert_eq!(steps.len(), 6);
        let changes = (1001..=41_000).map(|number| Change::Step(job(), step(number, 1, 1.0))).collect();
        store.persist(changes).await.unwrap();
        let steps = store.steps(job(), 1, 100_000).await.unwrap();
        assert!((20_000..40_001).contains(&steps.len()), "{}", steps.len());
        assert_eq!(steps.last().unwrap().step, Step(41_000));
        assert!(
            steps.iter().rev().take(19_000).map(|step| step.step.0).eq((22_001..=41_000).rev()),
            "the newer half is whole"
        );
    })
    .await;
}

#[tokio::test]
async fn evaluations_and_checkpoints_are_bounded_and_removed_ones_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = |step: u64| CheckpointRecord {
        attempt: Attempt(1),
        step: Step(step),
        generation: Generation(1),
        path: format!("checkpoints/{step}"),
        size_bytes: 1,
        seconds: 0.1,
        unix_ms: 1,
        loss: Some(2.0),
    };
    with_store(folder.path(), async |store| {
        let mut changes = vec![Change::Job(Box::new(record()))];
        changes.extend((1..=300).map(|step| Change::Checkpoint(job(), checkpoint(step))));
        changes.push(Change::CheckpointsRemoved(job(), vec!["checkpoints/299".to_owned()]));
        let evaluation = |step| EvaluationRecord { step: Step(step), loss: 1.0, tokens: 1 };
        changes.extend((1..=10_500).map(|step| Change::Evaluation(job(), evaluation(step))));
        store.persist(changes).await.unwrap();
    })
    .await;
    let (jobs, ()) = with_store(folder.path(), async |_| ()).await;
    let steps: Vec<u64> = jobs[0].checkpoints.iter().map(|checkpoint| checkpoint.step.0).collect();
    assert_eq!(steps, (101..=300).filter(|step| *step != 299).collect::<Vec<_>>());
    assert!((5_000..=10_000).contains(&jobs[0].evaluations.len()), "{}", jobs[0].evaluations.len());
    assert_eq!(jobs[0].evaluations.last().unwrap().step, Step(10_500));
}

#[tokio::test]
async fn logs_and_events_keep_their_newest() {
    let folder = tempfile::tempdir().unwrap();
    with_store(folder.path(), async |store| {
        for number in 0..700u64 {
            let lines = (0..10)
                .map(|part| LogLine {
                    unix_ms: number,
                    worker: if part % 2 == 0 { "a" } else { "b" }.to_owned(),
                    level: "info".to_owned(),
                    text: format!("{number}.{part}"),
                })
                .collect();
            store.log(job(), lines).await.unwrap();
        }
        let all = store.logs(job(), String::new(), 100_000).await.unwrap();
        assert!((5000..5300).contains(&all.len()), "{}", all.len());
        assert_eq!(all.last().unwrap().text, "699.9");
        let of_a = store.logs(job(), "a".to_owned(), 3).await.unwrap();
        assert_eq!(
            of_a.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(),
            ["699.4", "699.6", "699.8"]
        );
        let event = EventRecord {
            unix_ms: 1,
            kind: "formed".to_owned(),
            text: "generation 1".to_owned(),
            worker: Some(WorkerId::new("a").unwrap()),
            step: Step(1),
            detection_ms: Some(1.5),
            stall_ms: None,
        };
        store.persist(vec![Change::Event(job(), event.clone())]).await.unwrap();
        assert_eq!(store.events(job(), 10).await.unwrap(), [event]);
    })
    .await;
}
