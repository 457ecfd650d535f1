//! Workers that are asked to end, by a user and by their orchestrator: real processes and signals.

use serde_json::Value;
use shanty_testkit::{LocalCluster, TinyJob};

use crate::support::Place;

fn members(status: &Value) -> Vec<String> {
    let members = status["members"].as_array().cloned().unwrap_or_default();
    let is_member = |member: &&Value| member["rank"].is_number() && member["reason"].is_null();
    members
        .iter()
        .filter(is_member)
        .filter_map(|member| member["worker"].as_str().map(str::to_owned))
        .collect()
}

fn newest_recovery(status: &Value) -> Value {
    status["crew"]["recoveries"][0].clone()
}

#[test]
fn drained_and_terminated_workers_lose_nothing_not_even_the_last_one() {
    let job = TinyJob { steps: 1500, every_steps: 0, workers: (1, 2), ..TinyJob::default() };
    let place = Place::new(job).unwrap();
    let mut cluster = LocalCluster::start(place.shanty.clone(), &place.path("state")).unwrap();
    for _ in 0..2 {
        cluster.add_worker().unwrap();
    }
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    let is_at_work = |status: &Value| status["step"].as_u64() >= Some(20) && members(status).len() == 2;
    let status = cluster.wait_for_status(&job, "two at work", is_at_work).unwrap();

    // A user drains one of them; its process ends, the other goes on.
    let drained = members(&status).remove(0);
    let answer = cluster.ask(&["drain", &drained]).unwrap().expect_code(0).unwrap().object().unwrap();
    assert_eq!(
        (answer["worker"].as_str(), answer["job"].as_str()),
        (Some(drained.as_str()), Some(job.as_str()))
    );
    let status = cluster
        .wait_for_status(&job, "one goes on", |status| {
            members(status).len() == 1 && newest_recovery(status)["cause"] == "drained"
        })
        .unwrap();
    assert_ne!(members(&status), [drained]);
    assert_eq!(
        (&status["ledger"]["requeued"], &status["crew"]["losses"]),
        (&Value::from(0), &Value::from(0))
    );

    // SIGTERM of the last one: it leaves a checkpoint, though none is due before the end.
    for number in 0..2 {
        cluster.worker(number).terminate();
    }
    for number in 0..2 {
        cluster.wait_for_end_of(number).unwrap();
    }
    let status = cluster.status(&job).unwrap();
    let step = status["step"].as_u64().unwrap();
    assert!(step < 1500, "it was asked in the middle of the job");
    assert_eq!(status["checkpoints"][0]["step"], step, "{}", status["events"]);

    cluster.add_worker().unwrap();
    let over = cluster.wait_for_status(&job, "the end", |status| status["state"] == "succeeded").unwrap();
    assert_eq!(over["ledger"]["recomputed"], 0, "nothing is trained twice: {}", over["ledger"]);
    assert_eq!(
        (&over["ledger"]["duplicates"], &over["ledger"]["requeued"]),
        (&Value::from(0), &Value::from(0))
    );
    place.check_exactly_once().unwrap();

    let unknown = cluster.ask(&["drain", "w-nobody"]).unwrap();
    assert_eq!(unknown.code(), Some(2), "{:?}", unknown);
}
