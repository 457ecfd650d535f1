//! The small form of `cargo xtask load`: crews of 8 and of 32 that step together on a coordinator's port. Counts and ratios
//! are looked at; times are for the record, and measured by the large form.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

#[path = "../examples/load/crew.rs"]
#[expect(dead_code, reason = "the example measures with all of it")]
mod crew;
#[path = "../examples/load/stage.rs"]
mod stage;

use std::time::Duration;

use crew::{Log, Plan};
use shanty_access::{Credentials, NewToken, Role};
use shanty_coordinator::Coordinator;
use stage::{ROWS_A_WORKER, Stage};
use tokio_util::sync::CancellationToken;

const STEPS: u64 = 4;

async fn play(workers: usize) -> Vec<Log> {
    let folder = tempfile::tempdir().unwrap();
    let stage = Stage::set(folder.path(), workers).unwrap();
    let token = NewToken::draw().unwrap().secret;
    let mut coordinator = Coordinator::bind(stage::options(folder.path())).await.unwrap();
    coordinator.add_key(&token, "load", Role::Admin);
    let (url, shutdown) = (coordinator.handle().url(), CancellationToken::new());
    let serving = tokio::spawn(Box::pin(coordinator.serve(shutdown.clone())));
    let credentials = Credentials { token: Some(token), ..Credentials::default() };
    let plan = Plan { workers, steps: STEPS, warm_up: 1, step: Duration::from_millis(500) };
    let crew = crew::board(&url, &credentials, &stage, &plan).await.unwrap();
    let logs = crew.work().await.unwrap();
    shutdown.cancel();
    serving.await.unwrap().unwrap();
    logs
}

/// A worker that was refused rows, got others than it asked for, got no credit after a report or was told to leave ends the
/// crew with an error; see `crew.rs`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_worker_is_told_does_not_grow_with_its_crew() {
    let mut bytes = Vec::new();
    for workers in [8, 32] {
        let logs = play(workers).await;
        assert_eq!(logs.len(), workers);
        assert!(
            logs.iter().all(|log| log.turns.len() as u64 == STEPS),
            "each step of each worker was credited"
        );
        let rows: u64 = logs.iter().map(|log| log.rows).sum();
        assert_eq!(rows, STEPS * (workers * ROWS_A_WORKER) as u64, "each row was served once");
        let told: u64 = logs.iter().map(|log| log.message_bytes).sum();
        let answers: u64 = logs.iter().map(|log| log.messages).sum();
        assert!(answers >= STEPS * workers as u64);
        bytes.push(told as f64 / answers as f64);
    }
    // Members are told in Form alone; an answer to a beat is as long in a crew of 32 as in one of 8 (numbers take a byte
    // more at most).
    assert!(bytes[1] <= bytes[0] + 2.0, "bytes an answer: {bytes:?}");
}
