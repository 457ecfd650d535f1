//! Coordinator and workers as services of their own.

use shanty_testkit::{LocalCluster, TinyJob};

use crate::support::Place;

fn cluster(place: &Place, workers: usize) -> LocalCluster {
    let mut cluster = LocalCluster::start(place.shanty.clone(), &place.path("state")).unwrap();
    for _ in 0..workers {
        cluster.add_worker().unwrap();
    }
    cluster
}

#[test]
fn workers_go_on_while_the_coordinator_is_killed_and_started_again() {
    let place =
        Place::new(TinyJob { steps: 400, every_steps: 100, workers: (2, 2), ..TinyJob::default() }).unwrap();
    let mut cluster = cluster(&place, 2);
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    cluster.wait_for_status(&job, "step 20", |status| status["step"].as_u64() >= Some(20)).unwrap();
    let before = cluster.status(&job).unwrap();

    cluster.restart_coordinator().unwrap();
    let after = cluster
        .wait_for_status(&job, "the crew to be back and at work", |status| {
            status["step"].as_u64() > before["step"].as_u64()
                && status["members"].as_array().is_some_and(|members| {
                    members.len() == 2 && members.iter().all(|member| member["pid"].as_u64() > Some(0))
                })
        })
        .unwrap();
    assert_eq!(after["generation"], before["generation"], "the generation went on: {after}");
    let pids = |status: &serde_json::Value| {
        let members = status["members"].as_array().unwrap();
        let mut pids: Vec<u64> = members.iter().filter_map(|member| member["pid"].as_u64()).collect();
        pids.sort_unstable();
        pids
    };
    assert_eq!(pids(&after), pids(&before), "no worker was started anew");

    let over = cluster.wait_for_status(&job, "the end", |status| status["state"] == "succeeded").unwrap();
    assert_eq!(over["step"], 400);
    assert_eq!(over["ledger"]["duplicates"], 0);
    assert_eq!(over["ledger"]["recomputed"], 0, "nothing was trained again: {}", over["ledger"]);
    place.check_exactly_once().unwrap();
}

#[test]
fn a_job_is_submitted_listed_cancelled_and_resumed() {
    let place = Place::new(TinyJob { steps: 100_000, every_steps: 10, ..TinyJob::default() }).unwrap();
    let cluster = cluster(&place, 1);
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    cluster
        .wait_for_status(&job, "a checkpoint", |status| {
            status["checkpoints"].as_array().is_some_and(|list| !list.is_empty())
        })
        .unwrap();
    let jobs = cluster.ask(&["jobs"]).unwrap().expect_code(0).unwrap().events();
    assert_eq!(jobs.len(), 1);
    assert_eq!(jobs[0]["job"], job.as_str());

    cluster.ask(&["cancel", &job]).unwrap().expect_code(0).unwrap();
    let status = cluster.wait_for_status(&job, "the end", |status| status["state"] == "cancelled").unwrap();
    let checkpoints = cluster.ask(&["checkpoints", &job]).unwrap().expect_code(0).unwrap().events();
    assert!(!checkpoints.is_empty(), "checkpoints stay");
    let watched = cluster.ask(&["status", &job, "--watch"]).unwrap();
    assert_eq!(watched.code(), Some(93), "a cancelled job is not to be requeued");

    cluster.ask(&["resume", &job, "--detach"]).unwrap().expect_code(0).unwrap();
    let again = cluster
        .wait_for_status(&job, "steps of the second attempt", |again| {
            again["attempt"] == 2 && again["step"].as_u64() > status["step"].as_u64()
        })
        .unwrap();
    assert_eq!(again["state"], "running");
}

#[test]
fn the_same_request_gives_the_same_job() {
    let place = Place::new(TinyJob::default()).unwrap();
    let cluster = cluster(&place, 0);
    let submit = || {
        let answer =
            cluster.ask(&["submit", "job.toml", "--request-id", "once"]).unwrap().expect_code(0).unwrap();
        answer.object().unwrap()["job"].as_str().unwrap().to_owned()
    };
    assert_eq!(submit(), submit());
    assert_eq!(cluster.ask(&["jobs"]).unwrap().events().len(), 1);
}
