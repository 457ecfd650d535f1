//! Several jobs on one pool of workers, as real processes.

use std::{collections::BTreeSet, path::PathBuf, time::Instant};

use serde_json::Value;
use shanty_testkit::{LocalCluster, TinyJob};

use crate::support::{Place, fresh_seed};

/// Writes a further job beside the place's own.
fn another(place: &Place, job: &TinyJob) -> PathBuf {
    let path = place.path(&format!("{}.toml", job.name));
    std::fs::write(&path, job.toml()).unwrap();
    path
}

fn cluster(place: &Place, workers: usize) -> LocalCluster {
    let mut cluster = LocalCluster::start(place.shanty.clone(), &place.path("state")).unwrap();
    for _ in 0..workers {
        cluster.add_worker().unwrap();
    }
    cluster
}

fn pids(status: &Value) -> BTreeSet<u64> {
    let members = status["members"].as_array().unwrap();
    members.iter().filter_map(|member| member["pid"].as_u64()).filter(|pid| *pid > 0).collect()
}

fn is_past(step: u64) -> impl Fn(&Value) -> bool {
    move |status| status["step"].as_u64() >= Some(step)
}

fn kinds(status: &Value) -> Vec<&str> {
    status["events"].as_array().unwrap().iter().filter_map(|event| event["kind"].as_str()).collect()
}

#[test]
fn an_urgent_job_gets_the_workers_and_the_other_goes_on_where_it_was() {
    // No checkpoint is due by itself before the end: all that is not lost was written to make room.
    let slow = TinyJob { steps: 400, every_steps: 0, workers: (2, 2), ..TinyJob::default() };
    let place = Place::new(slow).unwrap();
    let urgent = another(&place, &TinyJob { name: "urgent", workers: (1, 1), ..TinyJob::default() });
    let cluster = cluster(&place, 2);
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    let before = cluster.wait_for_status(&job, "step 20", is_past(20)).unwrap();

    let urgent = urgent.to_str().unwrap();
    let answer = cluster.ask(&["submit", urgent, "--priority", "90"]).unwrap().expect_code(0).unwrap();
    let urgent = answer.object().unwrap()["job"].as_str().unwrap().to_owned();
    let waits = cluster
        .wait_for_status(&job, "the job to make room", |status| {
            status["state"] == "queued" || kinds(status).contains(&"gave_way")
        })
        .unwrap();
    assert!(waits["step"].as_u64() >= before["step"].as_u64());
    let jobs = cluster.ask(&["jobs"]).unwrap().expect_code(0).unwrap().events();
    let line = |name: &str| jobs.iter().find(|line| line["job"] == name).unwrap().clone();
    assert_eq!((&line("urgent")["priority"], &line("tiny")["priority"]), (&90.into(), &50.into()));
    if line("tiny")["state"] == "queued" {
        let reason = line("tiny")["reason"].as_str().unwrap().to_owned();
        assert!(reason.starts_with("needs 2 workers, ") && reason.contains("job urgent has 1"), "{reason}");
        assert_eq!(line("tiny")["place"], 1);
    }
    cluster
        .wait_for_status(&urgent, "the urgent job's end", |status| status["state"] == "succeeded")
        .unwrap();
    let over = cluster.wait_for_status(&job, "the end", |status| status["state"] == "succeeded").unwrap();
    assert_eq!(over["step"], 400);
    assert_eq!(over["ledger"]["recomputed"], 0, "no step was lost to the urgent job: {}", over["ledger"]);
    place.check_exactly_once().unwrap();
}

#[test]
fn jobs_go_on_while_the_coordinator_is_killed_again_and_again() {
    const KILLS: u64 = 5;
    let one = TinyJob { steps: 100_000, every_steps: 1000, workers: (2, 2), ..TinyJob::default() };
    let place = Place::new(one.clone()).unwrap();
    let other = another(&place, &TinyJob { name: "other", seed: 5, ..one });
    let mut cluster = cluster(&place, 4);
    let jobs = [cluster.submit(&place.path("job.toml")).unwrap(), cluster.submit(&other).unwrap()];
    let mut first = Vec::new();
    for job in &jobs {
        first.push(cluster.wait_for_status(job, "step 5", is_past(5)).unwrap());
    }
    let seed = fresh_seed();
    let mut back = Vec::new();
    for kill in 0..KILLS {
        let before: Vec<u64> =
            jobs.iter().map(|job| cluster.status(job).unwrap()["step"].as_u64().unwrap()).collect();
        // At an instant that differs from kill to kill.
        std::thread::sleep(std::time::Duration::from_millis((seed.rotate_left(kill as u32 * 7)) % 200));
        let killed = Instant::now();
        cluster.restart_coordinator().unwrap();
        for (job, step) in jobs.iter().zip(before) {
            cluster.wait_for_status(job, "a further step", is_past(step + 1)).unwrap();
        }
        back.push(killed.elapsed());
    }
    for (job, first) in jobs.iter().zip(&first) {
        let after = cluster
            .wait_for_status(job, "its crew", |status| {
                pids(status).len() == 2 && status["state"] == "running"
            })
            .unwrap();
        assert_eq!(after["generation"], first["generation"], "{job} went on in its generation");
        assert_eq!(pids(&after), pids(first), "no worker of {job} was started anew");
        assert_eq!(after["ledger"]["recomputed"], 0, "nothing of {job} was trained again");
        assert_eq!(after["ledger"]["duplicates"], 0);
    }
    eprintln!("seed {seed}: both jobs committed a further step within {back:?} of each kill -9");
}

#[test]
fn a_second_coordinator_on_the_same_state_is_refused_and_names_the_first() {
    let place = Place::new(TinyJob::default()).unwrap();
    let mut cluster = cluster(&place, 0);
    let state = place.path("state");
    let second = || {
        let arguments = [
            "coordinator",
            "--listen",
            "127.0.0.1:0",
            "--state-dir",
            state.to_str().unwrap(),
            "--output",
            "json",
        ];
        place.shanty.start(&arguments).unwrap()
    };
    let refused = second().finish().unwrap().expect_code(2).unwrap().error().unwrap();
    assert_eq!(refused["code"], "SH0771");
    assert!(refused["message"].as_str().unwrap().contains("(process "), "{refused}");
    // Killed, the first leaves no lock behind.
    cluster.kill_coordinator().unwrap();
    second().wait_for("the second one's address", |event| event["event"] == "listening").unwrap();
}

#[test]
fn a_resumed_run_warns_of_edits_that_it_does_not_obey() {
    let place = Place::new(TinyJob { steps: 60, every_steps: 10, ..TinyJob::default() }).unwrap();
    let mut running = place.start(1).unwrap();
    running.wait_for("a checkpoint", |event| event["event"] == "checkpoint").unwrap();
    running.kill_all().unwrap();
    let arguments = ["resume", "job.toml", "--workers", "1", "--threads", "1", "--output", "json"];
    let edited = [&arguments[..], &["--set", "train.steps=7"]].concat();
    let resumed = place.shanty.run(&edited).unwrap().expect_code(0).unwrap();
    let mut events = resumed.events();
    let told =
        events.iter().find(|event| event["event"] == "ignored_edit").expect("it says what it does not obey");
    assert_eq!(
        (&told["key"], &told["submitted"], &told["now"]),
        (&"train.steps".into(), &"60".into(), &"7".into())
    );
    let over = events.pop().unwrap();
    assert_eq!(over["steps"], 60, "it goes on as it was submitted");
    let status = place.shanty.run(&["status", "tiny", "--output", "json"]).unwrap().object().unwrap();
    assert!(kinds(&status).contains(&"job_file_differs"), "{:?}", kinds(&status));
}

#[test]
fn a_checkpoint_holds_no_step_up() {
    let place =
        Place::new(TinyJob { steps: 60, every_steps: 5, global_batch_size: 24, ..TinyJob::default() })
            .unwrap();
    place.run(1).unwrap();
    let log = std::fs::read_to_string(place.store().join("logs/worker-0.jsonl")).unwrap();
    let (mut held, mut steps) = (Vec::new(), Vec::new());
    for line in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let field = |name: &str| line[name].as_f64().or_else(|| line["fields"][name].as_f64());
        match field("held_seconds") {
            Some(seconds) => held.push(seconds),
            None => steps.extend(field("gradient_norm").and_then(|_| field("seconds"))),
        }
    }
    assert_eq!((held.len(), steps.len()), (12, 60), "of every checkpoint and every step");
    let median = |mut numbers: Vec<f64>| {
        numbers.sort_by(f64::total_cmp);
        numbers[numbers.len() / 2]
    };
    let (held, step) = (median(held), median(steps));
    let share = held / (5.0 * step);
    eprintln!(
        "a checkpoint every 5 steps of {step:.4} s holds them up for {held:.6} s: {:.3} %",
        share * 100.0
    );
    assert!(share <= 0.01, "checkpoints take {:.2} % of the steps' time", share * 100.0);
}
