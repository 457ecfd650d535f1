//! What was killed and resumed is the same, bit by bit, as what ran through.

use std::fs;

use shanty_testkit::{TinyJob, adapter};

use crate::support::{Place, fresh_seed, last_event};

fn job() -> TinyJob {
    TinyJob { steps: 60, every_steps: 10, dropout: 0.2, ..TinyJob::default() }
}

const RESUME: &[&str] = &["resume", "job.toml", "--workers", "2", "--threads", "1", "--output", "json"];

#[test]
fn resumed_after_kill_9_of_everything_is_bit_equal_to_uninterrupted() {
    let undisturbed = Place::new(job()).unwrap();
    let straight = undisturbed.run(2).unwrap();

    let seed = fresh_seed();
    let kill_at = 2 + seed % 50;
    println!("seed {seed}: killed once step {kill_at} is told");
    let place = Place::new(job()).unwrap();
    let mut running = place.start(2).unwrap();
    running.wait_for_step(kill_at).unwrap();
    let killed = running.kill_all().unwrap();
    assert!(killed.events_of("finished").is_empty(), "it was killed before its end");

    let resumed = place.shanty.run(RESUME).unwrap().expect_code(0).unwrap();
    let mut losses = killed.losses();
    losses.extend(resumed.losses());
    let bits = |losses: std::collections::BTreeMap<u64, f64>| -> Vec<(u64, u64)> {
        losses.into_iter().map(|(step, loss)| (step, loss.to_bits())).collect()
    };
    // Steps between the last that was told and the kill are known from neither half where a checkpoint covers them.
    let straight_bits = bits(straight.losses());
    for step in bits(losses) {
        assert!(straight_bits.contains(&step), "step {} has another loss (seed {seed})", step.0);
    }
    assert_eq!(resumed.losses().last_key_value(), straight.losses().last_key_value());
    let (one, other) = (undisturbed.adapter(&straight).unwrap(), place.adapter(&resumed).unwrap());
    assert!(adapter::same_bits(&one, &other).unwrap(), "the adapters differ (seed {seed})");
    assert_eq!(
        last_event(&straight).unwrap()["eval_loss_after"],
        last_event(&resumed).unwrap()["eval_loss_after"]
    );
    place.check_exactly_once().unwrap();
}

#[test]
fn a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used() {
    let place = Place::new(job()).unwrap();
    let mut running = place.start(2).unwrap();
    running
        .wait_for("the third checkpoint", |event| event["event"] == "checkpoint" && event["step"] == 30)
        .unwrap();
    let killed = running.kill_all().unwrap();
    let newest = killed.events_of("checkpoint").pop().unwrap();
    damage(&place, newest["path"].as_str().unwrap());

    let resumed = place.shanty.run(RESUME).unwrap().expect_code(0).unwrap();
    let first = resumed.events_of("step")[0]["step"].as_u64().unwrap();
    let newest_step = newest["step"].as_u64().unwrap();
    assert!(
        first <= newest_step,
        "it went on from step {first} although the checkpoint of {newest_step} is damaged"
    );
    let status = place.shanty.run(&["status", "tiny", "--output", "json"]).unwrap().object().unwrap();
    let events = status["events"].as_array().unwrap();
    let told = events.iter().find(|event| event["kind"] == "checkpoint_damaged").expect("the damage is told");
    assert!(told["text"].as_str().unwrap().contains(newest["path"].as_str().unwrap()), "{told}");
}

/// Flips one byte in the middle of the largest file of a checkpoint.
fn damage(place: &Place, path: &str) {
    let folder = place.store().join(path);
    let files = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let largest = files.max_by_key(|file| fs::metadata(file).unwrap().len()).unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(&largest, bytes).unwrap();
}

#[test]
fn resume_without_a_run_says_how_to_start_one() {
    let place = Place::new(job()).unwrap();
    let error = place.shanty.run(RESUME).unwrap().expect_code(2).unwrap().error().unwrap();
    assert_eq!(error["code"], "SH0903");
    assert!(error["hint"].as_str().unwrap().contains("shanty run job.toml"));
    assert!(!place.path("runs").exists(), "looking for a run leaves nothing behind");
}
