//! Commands that use what was trained, or look at what could be.

use shanty_testkit::{TinyJob, fixtures};

use crate::support::Place;

#[test]
fn plan_says_what_a_job_would_cost_and_leaves_nothing_behind() {
    let place = Place::new(TinyJob::default()).unwrap();
    let before = crate::support::listing(place.folder.path());
    let plan = place.shanty.run(&["plan", "job.toml", "--output", "json"]).unwrap().expect_code(0).unwrap();
    let plan = plan.object().unwrap();
    assert_eq!(plan["matched_modules"].as_array().unwrap().len(), 14);
    // r × (in + out) over q, k, v, o (64, kv 32), gate, up, down (96) in two layers, r = 4.
    let one_layer = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96));
    assert_eq!(plan["trainable_parameters"], 2 * one_layer);
    assert_eq!(plan["steps"], 12);
    assert!(plan["tokens_per_epoch"].as_u64().unwrap() > 0);
    let padding = plan["padding_fraction"].as_f64().unwrap();
    assert!((0.0..1.0).contains(&padding), "{padding}");
    for part in ["base", "adapter", "optimizer", "activations"] {
        assert!(plan["memory"][part].as_u64().is_some_and(|bytes| bytes > 0), "{part}: {}", plan["memory"]);
    }
    assert_eq!(crate::support::listing(place.folder.path()), before);
}

#[test]
fn logits_are_those_of_transformers() {
    let place = Place::new(TinyJob::default()).unwrap();
    let expected = std::fs::read(fixtures::reference("models/llama/expected.safetensors")).unwrap();
    let expected = safetensors::SafeTensors::deserialize(&expected).unwrap();
    let ids = expected.tensor("right.input_ids").unwrap();
    let shape = ids.shape().to_vec();
    let (words, _) = ids.data().as_chunks::<8>();
    let ids: Vec<i64> = words.iter().map(|word| i64::from_le_bytes(*word)).collect();
    let first: Vec<i64> = ids[..shape[1]].iter().copied().take_while(|id| *id != 0).collect();
    let argument = serde_json::json!([first]).to_string();
    place
        .shanty
        .run(&[
            "logits",
            "--model",
            "model",
            "--quantization",
            "none",
            "--ids",
            &argument,
            "--out",
            "logits.safetensors",
        ])
        .unwrap()
        .expect_code(0)
        .unwrap();

    let got = std::fs::read(place.path("logits.safetensors")).unwrap();
    let got = safetensors::SafeTensors::deserialize(&got).unwrap();
    let got = got.tensor("logits").unwrap();
    assert_eq!(got.shape(), [1, first.len(), 288]);
    let numbers = |data: &[u8]| -> Vec<f32> {
        let (words, _) = data.as_chunks::<4>();
        words.iter().map(|word| f32::from_le_bytes(*word)).collect()
    };
    let got = numbers(got.data());
    let expected = numbers(expected.tensor("right.logits").unwrap().data());
    let largest = expected.iter().fold(0f32, |largest, number| largest.max(number.abs()));
    for (position, (got, expected)) in got.iter().zip(&expected).enumerate() {
        // The reference's own tolerance for f32 logits.
        assert!((got - expected).abs() <= 1e-4 * largest, "number {position}: {got}, expected {expected}");
    }
}

#[test]
fn generate_is_repeatable_and_eval_counts_its_tokens() {
    let place = Place::new(TinyJob::default()).unwrap();
    let arguments =
        ["generate", "--model", "model", "--prompt", "haul", "--max-tokens", "6", "--temperature", "0.8"];
    let generate = |seed: &str| {
        let arguments = [&arguments[..], &["--seed", seed]].concat();
        place.shanty.run(&arguments).unwrap().expect_code(0).unwrap().stdout
    };
    assert_eq!(generate("1"), generate("1"));

    let eval =
        place.shanty.run(&["eval", "--model", "model", "--data", "eval.jsonl", "--output", "json"]).unwrap();
    let eval = eval.expect_code(0).unwrap().object().unwrap();
    let (loss, perplexity) = (eval["loss"].as_f64().unwrap(), eval["perplexity"].as_f64().unwrap());
    assert!((perplexity - loss.exp()).abs() <= 1e-6 * perplexity, "{eval}");
    // A random model of 288 words is about as good as guessing.
    assert!((loss - 288f64.ln()).abs() < 1.0, "{eval}");
    assert!(eval["tokens"].as_u64().unwrap() > 20, "{eval}");
}

#[test]
fn bench_step_measures_with_the_promised_keys() {
    let place = Place::new(TinyJob::default()).unwrap();
    let arguments = [
        "bench",
        "step",
        "--device",
        "cpu",
        "--model",
        "model",
        "--batch",
        "2",
        "--length",
        "16",
        "--rank",
        "4",
        "--threads",
        "1",
        "--steps",
        "2",
        "--output",
        "json",
    ];
    let bench = place.shanty.run(&arguments).unwrap().expect_code(0).unwrap().object().unwrap();
    for key in [
        "tokens_per_second",
        "step_seconds",
        "peak_memory_bytes",
        "base_memory_bytes",
        "trainable_parameters",
    ] {
        assert!(bench[key].as_f64().is_some_and(|number| number > 0.0), "{key}: {bench}");
    }
    assert_eq!(bench["device"], "cpu");
}

#[test]
fn doctor_and_completions_work_anywhere() {
    let place = Place::new(TinyJob::default()).unwrap();
    let doctor =
        place.shanty.run(&["doctor", "--output", "json"]).unwrap().expect_code(0).unwrap().object().unwrap();
    let names: Vec<&str> =
        doctor["checks"].as_array().unwrap().iter().filter_map(|check| check["name"].as_str()).collect();
    assert_eq!(names, ["processor", "vectors", "memory", "gpu", "disk"]);
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = place.shanty.run(&["completions", shell]).unwrap().expect_code(0).unwrap().stdout;
        assert!(script.contains("checkpoints"), "{shell}");
    }
}
