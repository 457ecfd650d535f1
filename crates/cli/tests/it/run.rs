//! `shanty run` from a job file to an adapter.

use std::fs;

use shanty_testkit::TinyJob;

use crate::support::{Place, last_event};

#[test]
fn run_trains_evaluates_and_ends_with_an_adapter() {
    let place = Place::new(TinyJob {
        steps: 24,
        eval_every_steps: 8,
        prompt: Some("haul away"),
        ..TinyJob::default()
    })
    .unwrap();
    let finished = place.run(2).unwrap();

    let steps: Vec<u64> =
        finished.events_of("step").iter().filter_map(|event| event["step"].as_u64()).collect();
    assert_eq!(steps, (1..=24).collect::<Vec<_>>(), "each step is told once, in order");
    for event in finished.events_of("step") {
        for key in ["loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "workers"] {
            assert!(event[key].is_number(), "{key} in {event}");
        }
        assert_eq!(event["workers"], 2);
    }
    let evaluated: Vec<u64> =
        finished.events_of("eval").iter().filter_map(|event| event["step"].as_u64()).collect();
    assert_eq!(evaluated, [0, 8, 16, 24]);
    let kept: Vec<u64> =
        finished.events_of("checkpoint").iter().filter_map(|event| event["step"].as_u64()).collect();
    assert_eq!(kept, [4, 8, 12, 16, 20, 24]);

    let last = last_event(&finished).unwrap();
    assert_eq!(last["event"], "finished");
    assert_eq!(last["state"], "succeeded");
    assert_eq!(last["steps"], 24);
    let (before, after) =
        (last["eval_loss_before"].as_f64().unwrap(), last["eval_loss_after"].as_f64().unwrap());
    assert!(after < before - 0.3, "held-out loss fell from {before} to {after} only");

    let adapter = place.adapter(&finished).unwrap();
    assert!(adapter.starts_with(place.store()), "{} lies in the run folder", adapter.display());
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(adapter.join(file).is_file(), "{file}");
    }
    place.check_exactly_once().unwrap();

    let sample = finished.events_of("sample").pop().expect("a sample is shown");
    assert_eq!(sample["prompt"], "haul away");
    assert!(sample["base"].is_string() && sample["adapter"].is_string());
    let started = finished.events_of("started").pop().expect("what is trained is told first");
    assert_eq!(started["matched_modules"].as_array().unwrap().len(), 14, "7 projections in 2 layers");
}

#[test]
fn a_run_folder_is_never_overwritten_silently() {
    let place = Place::new(TinyJob { steps: 2, ..TinyJob::default() }).unwrap();
    let finished = place.run(1).unwrap();
    let adapter = place.adapter(&finished).unwrap().join("adapter_model.safetensors");
    let before = fs::read(&adapter).unwrap();

    let again = place.start(1).unwrap().finish().unwrap().expect_code(2).unwrap();
    let error = again.error().unwrap();
    assert_eq!(error["code"], "SH0902");
    assert!(error["hint"].as_str().unwrap().contains("shanty resume job.toml"), "{error}");
    assert_eq!(fs::read(&adapter).unwrap(), before);

    let resumed = place.shanty.run(&["resume", "job.toml", "--output", "json"]).unwrap();
    assert_eq!(resumed.code(), Some(2), "a finished job has nothing to resume: {resumed:?}");
    assert_eq!(fs::read(&adapter).unwrap(), before);
}

#[test]
fn interrupting_a_run_stops_it_and_resume_goes_on() {
    let place = Place::new(TinyJob { steps: 4000, every_steps: 5, ..TinyJob::default() }).unwrap();
    let mut running = place.start(2).unwrap();
    running.wait_for("a checkpoint", |event| event["event"] == "checkpoint").unwrap();
    let workers = running.descendants();
    running.interrupt();
    let stopped = running.finish().unwrap().expect_code(130).unwrap();
    assert!(stopped.stderr.contains("shanty resume job.toml"), "{}", stopped.stderr);
    assert!(workers.len() >= 2, "two workers ran");
    shanty_testkit::wait::until("the workers to end", shanty_testkit::process::PATIENCE, || {
        Ok(workers.iter().all(|pid| !shanty_testkit::process::is_alive(*pid)).then_some(()))
    })
    .unwrap();

    let mut resumed = place
        .shanty
        .start(&["resume", "job.toml", "--workers", "2", "--threads", "1", "--output", "json"])
        .unwrap();
    let first = resumed.wait_for("a step", |event| event["event"] == "step").unwrap();
    assert!(first["step"].as_u64().unwrap() > 5, "it goes on from a checkpoint: {first}");
    resumed.kill_all().unwrap();
}

#[test]
fn workers_die_with_the_run_that_started_them() {
    let place = Place::new(TinyJob { steps: 100_000, ..TinyJob::default() }).unwrap();
    let mut running = place.start(2).unwrap();
    running.wait_for_step(1).unwrap();
    let workers = running.descendants();
    assert!(workers.len() >= 2);
    running.kill().unwrap();
    shanty_testkit::wait::until("the workers to end", shanty_testkit::process::PATIENCE, || {
        Ok(workers.iter().all(|pid| !shanty_testkit::process::is_alive(*pid)).then_some(()))
    })
    .unwrap();
}
