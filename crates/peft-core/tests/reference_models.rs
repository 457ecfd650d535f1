//! Logits and losses of the base models beside those of Hugging Face transformers.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use memory::{
    MemoryBase, Setup, assert_close, case, floats, integers, padded_rows, reference, tensors, tolerance,
};
use shanty_peft_core::{
    Engine,
    batch::{Row, Segment},
    model::ModelConfig,
};

const MODELS: [&str; 8] = [
    "models/llama",
    "models/llama_tied",
    "models/llama_rope3",
    "models/mistral",
    "models/qwen2",
    "models/qwen3",
    "models/gemma",
    "models/gemma2",
];

fn engine(model: &str) -> Engine {
    let base = MemoryBase::load(&reference(model));
    Setup::new(None).engine(base)
}

#[test]
fn old_and_new_key_names_of_a_config_say_the_same() {
    for model in MODELS {
        let old = reference(model).join("config_v4.json");
        let old = ModelConfig::from_json(&std::fs::read(&old).unwrap(), &old).unwrap();
        assert_eq!(old, ModelConfig::load(&reference(model)).unwrap(), "{model}");
    }
}

#[test]
fn padded_rows_give_the_logits_and_losses_of_transformers() {
    for model in MODELS {
        let (case, expected) = (case(model), tensors(&reference(model).join("expected.safetensors")));
        for side in ["right", "left"] {
            let of = |name: &str| &expected[&format!("{side}.{name}")];
            let rows = padded_rows(of("input_ids"), of("attention_mask"), Some(of("labels")));
            let mut engine = engine(model);
            let vocabulary = engine.config().vocabulary_size;
            let mask = integers(of("attention_mask"));
            let columns = of("input_ids").dims2().unwrap().1;
            for (index, row) in rows.iter().enumerate() {
                let got = engine.logits(None, std::slice::from_ref(&row.token_ids)).unwrap();
                let first = index * columns + mask[index * columns..].iter().position(|&m| m != 0).unwrap();
                let wanted =
                    &floats(of("logits"))[first * vocabulary..(first + row.token_ids.len()) * vocabulary];
                assert_close(
                    &format!("{model} {side} row {index}"),
                    &got,
                    wanted,
                    tolerance(&case, "logits"),
                );
            }
            let sum = engine.evaluate_base(&rows).unwrap();
            let wanted = floats(of("loss"));
            assert_close(
                &format!("{model} {side} loss"),
                &[sum.mean() as f32],
                &wanted,
                tolerance(&case, "loss"),
            );
        }
    }
}

#[test]
fn packed_segments_do_not_see_each_other() {
    for model in MODELS {
        let (case, expected) = (case(model), tensors(&reference(model).join("expected.safetensors")));
        let lengths: Vec<u32> =
            case["packed_lengths"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
        let ids: Vec<u32> = integers(&expected["packed.input_ids"]).into_iter().map(|id| id as u32).collect();
        let labels = integers(&expected["packed.labels"]);
        let starts: Vec<u32> =
            lengths.iter().scan(0, |sum, length| Some(std::mem::replace(sum, *sum + length))).collect();
        let row = Row {
            id: 0,
            segments: lengths
                .iter()
                .enumerate()
                .map(|(i, &length)| Segment { sample_id: i as u64, length })
                .collect(),
            trained: (0..ids.len() as u32)
                .filter(|at| labels[*at as usize] != -100 && !starts.contains(at))
                .map(|at| at..at + 1)
                .collect(),
            token_ids: ids,
        };
        let mut engine = engine(model);
        let sum = engine.evaluate_base(std::slice::from_ref(&row)).unwrap();
        let losses = floats(&expected["packed.token_loss"]);
        assert_eq!(sum.tokens as usize, losses.iter().filter(|loss| **loss != 0.0).count());
        assert_close(
            model,
            &[sum.mean() as f32],
            &floats(&expected["packed.loss"]),
            tolerance(&case, "loss"),
        );
        // Each token's own loss, by training one token at a time.
        for range in &row.trained {
            let one = Row { trained: vec![range.clone()], ..row.clone() };
            let got = engine.evaluate_base(&[one]).unwrap().loss as f32;
            let wanted = losses[range.start as usize - 1];
            assert_close(
                &format!("{model} token {}", range.start),
                &[got],
                &[wanted],
                tolerance(&case, "token_loss"),
            );
        }
    }
}
