//! A coordinator's store whose process is killed in the middle of writing, again and again.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use shanty_coordinator::{
    machine::{
        Change, StoredJob,
        record::{
            EventRecord, GenerationRecord, JobRecord, JobState, MemberRecord, Source, StartPoint, StepRecord,
        },
    },
    store::{FILE, Store},
};
use shanty_proto::{Attempt, Generation, JobId, Step, WorkerId};

/// The folder that the child writes to; without it, it is no child.
const CHILD: &str = "SHANTY_TEST_STORE";
/// How often the writer is killed.
const KILLS: u64 = 60;
/// The child's own test.
const WRITES: &str = "the_child_writes_until_it_is_killed";

fn job() -> JobId {
    JobId::new("pirate").unwrap()
}

/// What is made durable with turn `number`, all of it or nothing: the job in generation `number` at step `number`, that
/// step, and an event that tells the number.
fn turn(number: u64) -> Vec<Change> {
    let generation = GenerationRecord {
        generation: Generation(number),
        members: vec![MemberRecord { worker: WorkerId::new("a").unwrap(), address: "a:1".to_owned() }],
        token: [7; 32],
        start: StartPoint {
            applied: Step(number - 1),
            source: Source::Fresh,
            rows: Vec::new(),
            evaluated: None,
            checkpoint: None,
            skip: Vec::new(),
            usual_loss: (0.0, 0),
        },
    };
    let json = serde_json::json!({
        "id": "pirate", "sequence": 1, "request_id": "r", "spec_json": "{}", "state": JobState::Running,
        "reason": "", "failure": null, "attempt": 1, "facts": null, "watermark": number,
        "generation": generation, "evaluated": null, "checkpoint": null, "requeued": 0, "recomputed": 0,
        "furthest": number, "total_losses": 0, "adapter": "", "submitted_unix_ms": 1, "started_unix_ms": 1,
        "ended_unix_ms": 0,
    });
    let record: JobRecord = serde_json::from_value(json).unwrap();
    let step: StepRecord = serde_json::from_value(serde_json::json!({
        "step": number, "attempt": 1, "generation": number, "loss": 1.0, "learning_rate": 1.0,
        "gradient_norm": 1.0, "tokens": 1, "tokens_per_second": 1.0, "workers": 1, "unix_ms": 1, "skipped": false,
    }))
    .unwrap();
    let event: EventRecord = serde_json::from_value(serde_json::json!({
        "unix_ms": number, "kind": "formed", "text": "x".repeat(500), "worker": null, "step": number,
        "detection_ms": null, "stall_ms": null,
    }))
    .unwrap();
    assert_eq!((record.attempt, step.step), (Attempt(1), Step(number)));
    vec![Change::Job(Box::new(record)), Change::Step(job(), step), Change::Event(job(), event)]
}

/// Goes on from what the store knows, and says each number once it is durable. Never ends by itself.
#[test]
fn the_child_writes_until_it_is_killed() {
    let Some(folder) = std::env::var_os(CHILD) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (store, jobs, _closing) = Store::open(Path::new(&folder)).unwrap();
        let mut number = jobs.first().map_or(0, |job| job.record.watermark.0);
        let mut out = std::io::stdout();
        loop {
            number += 1;
            store.persist(turn(number)).await.unwrap();
            // Past the test harness's capture, and past every buffer.
            writeln!(out, "durable {number}").unwrap();
            out.flush().unwrap();
        }
    });
}

fn check(jobs: &[StoredJob], acknowledged: u64) -> u64 {
    let Some(stored) = jobs.first() else {
        assert_eq!(acknowledged, 0, "the job is gone");
        return 0;
    };
    let number = stored.record.watermark.0;
    assert!(number >= acknowledged, "{acknowledged} was said to be durable, the store knows {number}");
    assert!(number <= acknowledged + 1, "one turn at most is on its way");
    // A turn is there as a whole.
    assert_eq!(stored.record.generation.as_ref().unwrap().generation, Generation(number));
    assert_eq!(stored.record.furthest, Step(number));
    let steps: Vec<u64> = stored.steps.iter().map(|step| step.step.0).collect();
    assert_eq!(steps, (number.saturating_sub(299).max(1)..=number).collect::<Vec<_>>(), "no step is missing");
    assert_eq!(stored.events.last().unwrap().unix_ms, number);
    assert!(stored.events.iter().map(|event| event.unix_ms).is_sorted_by(|one, next| one + 1 == *next));
    number
}

#[test]
fn what_was_said_to_be_durable_outlives_a_kill_at_any_instant() {
    let folder = tempfile::tempdir().unwrap();
    let mut known = 0;
    let mut reopened = Duration::ZERO;
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", WRITES, "--nocapture", "--test-threads=1"])
            .env(CHILD, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let number = |line: &str| line.strip_prefix("durable ")?.parse::<u64>().ok();
        let mut acknowledged = known;
        // Some turns in; then at an instant that differs from kill to kill, most of them within a write.
        let turns = 1 + kill % 7;
        while acknowledged < known + turns {
            let line = lines.next().expect("the child writes for ever").unwrap();
            acknowledged = number(&line).unwrap_or(acknowledged);
        }
        let instant = Instant::now() + Duration::from_micros((kill * 137) % 4000);
        while Instant::now() < instant {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines.map_while(Result::ok) {
            acknowledged = number(&line).unwrap_or(acknowledged);
        }
        let began = Instant::now();
        let (store, jobs, closing) = Store::open(folder.path()).unwrap();
        reopened = reopened.max(began.elapsed());
        known = check(&jobs, acknowledged);
        drop(store);
        closing.join();
        let connection = rusqlite::Connection::open(folder.path().join(FILE)).unwrap();
        let sound: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
        assert_eq!(sound, "ok", "after kill {kill}");
    }
    eprintln!("{KILLS} kills, {known} turns durable, opened again within {reopened:?}");
}
