//! Jobs of every method that adapts modules: two workers train, all is killed, and what is resumed ends with the same bits.

use shanty_testkit::{TinyJob, adapter};

use crate::support::{Place, final_loss};

const RESUME: &[&str] = &["resume", "job.toml", "--workers", "2", "--threads", "1", "--output", "json"];

fn killed_and_resumed_is_bit_equal(adapter: &'static str) {
    let job = || TinyJob { adapter: Some(adapter), ..TinyJob::default() };
    let undisturbed = Place::new(job()).unwrap();
    let straight = undisturbed.run(2).unwrap();
    let first = straight.losses().first_entry().map(|entry| *entry.get()).unwrap();
    assert!(final_loss(&straight).unwrap() < first, "{adapter}: the loss fell");

    let place = Place::new(job()).unwrap();
    let mut running = place.start(2).unwrap();
    running
        .wait_for("the second checkpoint", |event| event["event"] == "checkpoint" && event["step"] == 8)
        .unwrap();
    let killed = running.kill_all().unwrap();
    let resumed = place.shanty.run(RESUME).unwrap().expect_code(0).unwrap();
    // All steps may have been made before the kill struck.
    let mut losses = killed.losses();
    losses.extend(resumed.losses());
    assert_eq!(losses.last_key_value(), straight.losses().last_key_value(), "{adapter}");
    let (one, other) = (undisturbed.adapter(&straight).unwrap(), place.adapter(&resumed).unwrap());
    assert!(adapter::same_bits(&one, &other).unwrap(), "{adapter}: the adapters differ");
}

#[test]
fn adalora_resumes_in_the_middle_of_pruning() {
    killed_and_resumed_is_bit_equal(
        "method = \"adalora\"\ninit_r = 6\ntarget_r = 3\ntinit = 2\ntfinal = 2\nlora_dropout = 0.1",
    );
}

#[test]
fn a_start_from_the_base_is_computed_once() {
    killed_and_resumed_is_bit_equal(
        "r = 4\nlora_alpha = 4\ninit_lora_weights = \"pissa\"\nlora_dropout = 0.1",
    );
}

#[test]
fn magnitudes_whole_modules_and_a_faster_factor() {
    killed_and_resumed_is_bit_equal(
        "method = \"dora\"\nr = 4\nlora_alpha = 8\nmodules_to_save = [\"lm_head\", \"norm\"]\nloraplus_lr_ratio = 4",
    );
}

#[test]
fn scales_alone() {
    killed_and_resumed_is_bit_equal("method = \"ia3\"");
}

#[test]
fn plan_tells_what_whole_modules_cost() {
    let adapter = "r = 1\ntarget_modules = [\"layers.0.self_attn.q_proj\"]\nmodules_to_save = [\"lm_head\"]";
    let place = Place::new(TinyJob { adapter: Some(adapter), ..TinyJob::default() }).unwrap();
    let plan = place.shanty.run(&["plan", "job.toml", "--output", "json"]).unwrap().object().unwrap();
    let warnings: Vec<&str> =
        plan["warnings"].as_array().unwrap().iter().map(|warning| warning.as_str().unwrap()).collect();
    assert!(warnings.iter().any(|warning| warning.contains("workers send each other")), "{warnings:?}");
}

#[test]
fn what_is_wrong_is_shown_at_its_key() {
    for (adapter, code, key) in [
        ("target_modules = [\"q_proj\"]\nexclude_modules = [\"q_proj\"]", "SH0420", "target_modules"),
        ("modules_to_save = [\"wte\"]", "SH0422", "modules_to_save"),
        ("r = 4\ntrainable_token_indices = [999999]", "SH0403", "trainable_token_indices"),
        ("method = \"dora\"\ntarget_modules = [\"lm_head\"]", "SH0403", "adapter"),
    ] {
        let place = Place::new(TinyJob { adapter: Some(adapter), ..TinyJob::default() }).unwrap();
        let refused = place.shanty.run(&["plan", "job.toml"]).unwrap().expect_code(2).unwrap();
        let shown = refused.stderr;
        assert!(shown.contains(code) && shown.contains(key), "{adapter}: {shown}");
    }
}
