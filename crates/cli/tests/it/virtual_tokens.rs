//! Jobs of prefix, prompt and p-tuning from end to end: plan, run, kill and resume, more workers, generate.

use shanty_testkit::{TinyJob, adapter};

use crate::support::{Place, fresh_seed, last_event};

/// Prefix tuning through a projection, which PEFT cannot resume.
const PROJECTED: &str =
    "method = \"prefix_tuning\"\nnum_virtual_tokens = 6\nprefix_projection = true\nencoder_hidden_size = 24";
/// P-tuning through an LSTM with dropout inside.
const LSTM: &str = "method = \"p_tuning\"\nnum_virtual_tokens = 6\nencoder_reparameterization_type = \"LSTM\"\n\
    encoder_hidden_size = 12\nencoder_dropout = 0.2";
const PREFIX: &str = "method = \"prefix_tuning\"\nnum_virtual_tokens = 6";
const PROMPT: &str =
    "method = \"prompt_tuning\"\nnum_virtual_tokens = 6\nprompt_tuning_init_text = \"Haul away:\"";

const RESUME: &[&str] = &["resume", "job.toml", "--workers", "2", "--threads", "1", "--output", "json"];

fn job(adapter: &'static str, steps: u64) -> TinyJob {
    TinyJob {
        adapter: Some(adapter),
        max_length: 64,
        learning_rate: 2e-2,
        steps,
        every_steps: 6,
        ..TinyJob::default()
    }
}

#[test]
fn plan_counts_what_is_trained_and_leaves_room_for_virtual_tokens() {
    let plan = |adapter| {
        let place = Place::new(job(adapter, 12)).unwrap();
        place
            .shanty
            .run(&["plan", "job.toml", "--output", "json"])
            .unwrap()
            .expect_code(0)
            .unwrap()
            .object()
            .unwrap()
    };
    // Two layers, two key heads of 16 features, 64 features a token.
    assert_eq!(plan(PREFIX)["trainable_parameters"], 6 * 2 * 2 * 32);
    assert_eq!(plan(PROMPT)["trainable_parameters"], 6 * 64);
    assert_eq!(plan(PROJECTED)["trainable_parameters"], 6 * 32 + 24 * 33 + 128 * 25);
    assert_eq!(plan(PROMPT)["virtual_tokens"], 6);
    let plain = Place::new(TinyJob { max_length: 64, ..TinyJob::default() }).unwrap();
    let plain = plain.shanty.run(&["plan", "job.toml", "--output", "json"]).unwrap().object().unwrap();
    let rows = |plan: &serde_json::Value| plan["rows"].as_u64().unwrap();
    assert!(rows(&plan(PROMPT)) > rows(&plain), "six tokens more a sample take more rows");
    assert_eq!(plan(PROMPT)["tokens_per_epoch"], plain["tokens_per_epoch"], "and no token is lost");
}

#[test]
fn every_method_lowers_the_loss_and_can_be_used() {
    for adapter in [PREFIX, PROJECTED, PROMPT, LSTM] {
        let place = Place::new(job(adapter, 24)).unwrap();
        let finished = place.run(1).unwrap();
        let last = last_event(&finished).unwrap();
        let [before, after] = ["eval_loss_before", "eval_loss_after"].map(|key| last[key].as_f64().unwrap());
        assert!(after < before, "{adapter}: {before} before, {after} after");
        let folder = place.adapter(&finished).unwrap();
        let folder = folder.to_str().unwrap();
        let said = place
            .shanty
            .run(&[
                "generate",
                "--model",
                "model",
                "--adapter",
                folder,
                "--prompt",
                "haul",
                "--max-tokens",
                "4",
            ])
            .unwrap();
        said.expect_code(0).unwrap();
        let eval =
            ["eval", "--model", "model", "--adapter", folder, "--data", "eval.jsonl", "--max-length", "64"];
        let found = place.shanty.run(&[&eval[..], &["--output", "json"]].concat()).unwrap();
        let loss = found.expect_code(0).unwrap().object().unwrap()["loss"].as_f64().unwrap();
        // The same samples on the same quantised base as at the end of the run.
        assert!((loss - after).abs() < 1e-4, "{adapter}: eval says {loss}, the run {after}");
        place.check_exactly_once().unwrap();
    }
}

#[test]
fn killed_and_resumed_is_bit_equal_to_uninterrupted() {
    for adapter_of in [PROJECTED, LSTM] {
        let undisturbed = Place::new(job(adapter_of, 30)).unwrap();
        let straight = undisturbed.run(2).unwrap();
        let seed = fresh_seed();
        let kill_at = 2 + seed % 24;
        println!("seed {seed}: killed once step {kill_at} is told");
        let place = Place::new(job(adapter_of, 30)).unwrap();
        let mut running = place.start(2).unwrap();
        running.wait_for_step(kill_at).unwrap();
        let killed = running.kill_all().unwrap();
        assert!(killed.events_of("finished").is_empty(), "it was killed before its end");
        let resumed = place.shanty.run(RESUME).unwrap().expect_code(0).unwrap();
        for (step, loss) in killed.losses().into_iter().chain(resumed.losses()) {
            assert_eq!(loss.to_bits(), straight.losses()[&step].to_bits(), "step {step} (seed {seed})");
        }
        let (one, other) = (undisturbed.adapter(&straight).unwrap(), place.adapter(&resumed).unwrap());
        assert!(adapter::same_bits(&one, &other).unwrap(), "the adapters differ (seed {seed})");
        place.check_exactly_once().unwrap();
    }
}

/// Tolerances as for LoRA: `world_size.rs`.
#[test]
fn one_and_three_workers_train_the_same_virtual_tokens() {
    for adapter_of in [PREFIX, PROJECTED, PROMPT, LSTM] {
        let run = |workers| {
            let place = Place::new(job(adapter_of, 12)).unwrap();
            let finished = place.run(workers).unwrap();
            (place, finished)
        };
        let ((one_place, one), (three_place, three)) = (run(1), run(3));
        for (step, loss) in three.losses() {
            let expected = one.losses()[&step];
            let difference = ((loss - expected) / expected).abs();
            assert!(difference <= 1e-4, "step {step}: {loss} on three workers, {expected} alone");
        }
        let (one, three) = (one_place.adapter(&one).unwrap(), three_place.adapter(&three).unwrap());
        let difference = adapter::largest_difference(&one, &three).unwrap();
        assert!(difference <= 4e-3, "{adapter_of}: weights differ by {difference}");
    }
}
