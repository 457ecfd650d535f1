//! Twenty steps of LoRA, prefix and prompt tuning on an NF4 base beside those of transformers + PEFT + bitsandbytes + torch's AdamW.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::collections::HashMap;

use candle_core::Tensor;
use memory::{assert_close, case, floats, integers, padded_rows, reference, tensors, tolerance};
use shanty_peft_core::{
    Engine, EngineOptions, LossSum, NoSink, StepKey,
    adapter::AdapterFolder,
    batch::{Row, VirtualTokens},
    optim::{AdamW, AdamWOptions, Schedule, Shape, clip_factor, global_norm},
    plan::Recompute,
};

/// Rows of global batch `batch`, micro-batch by micro-batch.
fn micro_batches(
    expected: &HashMap<String, Tensor>,
    batch: usize,
    virtual_tokens: VirtualTokens,
) -> Vec<Vec<Row>> {
    let part = |name: &str, micro: usize| expected[name].get(batch).unwrap().get(micro).unwrap();
    (0..2)
        .map(|micro| {
            let (ids, mask) = (part("data.input_ids", micro), part("data.attention_mask", micro));
            let mut rows = padded_rows(&ids, &mask, Some(&part("data.labels", micro)));
            // Behind virtual rows the first token is predicted, and its label counts.
            if let VirtualTokens::Rows(_) = virtual_tokens {
                let labels = integers(&part("data.labels", micro));
                let columns = labels.len() / rows.len();
                for (row, labels) in rows.iter_mut().zip(labels.chunks_exact(columns)) {
                    let first = columns - row.token_ids.len();
                    let label = if integers(&mask)[row.id as usize * columns] == 0 {
                        labels[first]
                    } else {
                        labels[0]
                    };
                    if label != -100 {
                        row.trained.insert(0, 0..1);
                    }
                }
            }
            rows
        })
        .collect()
}

fn check(method: &str, base: &str, recompute: Recompute) {
    let folder = format!("training/{method}");
    let (case, expected) = (case(&folder), tensors(&reference(&format!("{folder}/expected.safetensors"))));
    let initial = AdapterFolder::open(&reference(&format!("{folder}/adapter_initial"))).unwrap();
    let virtual_tokens = initial.method().virtual_tokens();
    let options = EngineOptions {
        adapter: Some(initial.method().clone()),
        threads: 2,
        recompute,
        micro_batch_rows: Some(2),
        ..EngineOptions::new(reference(base), 16 + virtual_tokens.count())
    };
    let mut engine = Engine::load(options, &mut |_| {}).unwrap();
    let layout = engine.layout().clone();
    let mut parameters = vec![0.0; layout.len()];
    initial.read_into(&layout, &mut parameters).unwrap();

    let setting = |name: &str| case["settings"][name].as_f64().unwrap();
    let steps = setting("steps") as u64;
    let schedule = Schedule {
        peak: setting("learning_rate"),
        shape: Shape::Cosine,
        warmup_steps: setting("warmup_steps") as u64,
        total_steps: steps,
    };
    let options =
        AdamWOptions { betas: [0.9, 0.999], epsilon: setting("eps"), weight_decay: setting("weight_decay") };
    let mut optimizer = AdamW::new(options, layout.len());
    let (mut losses, mut norms, mut rates, mut tokens) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut micro_losses = Vec::new();
    for step in 0..steps {
        let mut gradient = vec![0.0; layout.len()];
        let mut sum = LossSum::default();
        for rows in micro_batches(&expected, step as usize % 3, virtual_tokens) {
            let key = StepKey { seed: 1, step: step + 1 };
            let part = engine.forward_backward(&parameters, &rows, key, &mut gradient, &mut NoSink).unwrap();
            micro_losses.push(part.loss as f32);
            sum.add(part);
        }
        if step == 0 {
            for entry in layout.entries() {
                let got: Vec<f32> =
                    gradient[entry.range.clone()].iter().map(|g| g / sum.tokens as f32).collect();
                let wanted = floats(&expected[&format!("step0.grad.{}", entry.peft_name)]);
                assert_close(&entry.peft_name, &got, &wanted, tolerance(&case, "step0.grad"));
            }
        }
        let scale = 1.0 / sum.tokens as f64;
        let norm = global_norm(&gradient) * scale;
        let rate = schedule.learning_rate(step);
        let clip = clip_factor(norm, setting("max_grad_norm")).unwrap_or(1.0);
        optimizer.update(&mut parameters, &gradient, scale * clip, rate).unwrap();
        losses.push(sum.mean() as f32);
        norms.push(norm as f32);
        rates.push(rate as f32);
        tokens.push(sum.tokens as i64);
    }
    let each = |what: &str, got: &[f32], tolerance: f64| {
        for (step, (got, wanted)) in got.iter().zip(floats(&expected[what])).enumerate() {
            assert_close(&format!("{what} of step {step}"), &[*got], &[wanted], tolerance);
        }
    };
    each("loss", &losses, tolerance(&case, "loss"));
    each("micro_loss_sum", &micro_losses, tolerance(&case, "loss"));
    each("grad_norm", &norms, tolerance(&case, "grad_norm"));
    assert_close(
        "learning_rate",
        &rates,
        &floats(&expected["learning_rate"]),
        tolerance(&case, "learning_rate"),
    );
    assert_eq!(tokens, integers(&expected["tokens"]));

    let adapter = tensors(&reference(&format!("{folder}/adapter_final/adapter_model.safetensors")));
    for entry in layout.entries() {
        let compare = |what: &str, got: &[f32], wanted: &Tensor| {
            let name = format!("{what} {}", entry.peft_name);
            assert_close(&name, &got[entry.range.clone()], &floats(wanted), tolerance(&case, what));
        };
        compare("final adapter", &parameters, &adapter[&entry.peft_name]);
        let moment = |name: &str| &expected[&format!("{name}.{}", entry.peft_name)];
        compare("final.exp_avg", optimizer.first_moment(), moment("final.exp_avg"));
        compare("final.exp_avg_sq", optimizer.second_moment(), moment("final.exp_avg_sq"));
    }
    let rows = padded_rows(&expected["final.input_ids"], &expected["final.attention_mask"], None);
    let vocabulary = engine.config().vocabulary_size;
    let mask = integers(&expected["final.attention_mask"]);
    for (index, row) in rows.iter().enumerate() {
        let got = engine.logits(Some(&parameters), std::slice::from_ref(&row.token_ids)).unwrap();
        let columns = mask.len() / rows.len();
        let ahead = virtual_tokens.rows();
        let padding = mask[index * columns..].iter().position(|&m| m != 0).unwrap();
        let first = index * (columns + ahead) + ahead + padding;
        let wanted = &floats(&expected["final.logits"])[first * vocabulary..first * vocabulary + got.len()];
        assert_close("final.logits", &got, wanted, tolerance(&case, "final.logits"));
    }
}

#[test]
fn twenty_steps_on_a_base_that_bitsandbytes_quantised() {
    check("lora", "training/base_nf4", Recompute::Never);
}

#[test]
fn twenty_steps_of_prefix_tuning() {
    check("prefix", "training/base_nf4", Recompute::Never);
}

#[test]
fn twenty_steps_of_prompt_tuning() {
    check("prompt", "training/base_nf4", Recompute::Never);
}

/// Prefix tuning with layers computed again is what PEFT refuses.
#[test]
fn twenty_steps_of_prefix_and_prompt_tuning_with_recompute() {
    check("prefix", "training/base_f32", Recompute::Layers);
    check("prompt", "training/base_f32", Recompute::Layers);
}

/// `base_f32` holds the numbers that `base_nf4` stands for.
#[test]
fn twenty_steps_on_the_same_numbers_in_f32_with_recompute() {
    check("lora", "training/base_f32", Recompute::Layers);
}
