//! Logits, losses and every gradient of LoRA adapters beside those of Hugging Face PEFT.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use memory::{MemoryBase, Setup, assert_close, case, floats, padded_rows, reference, tensors, tolerance};
use shanty_peft_core::{
    NoSink, StepKey,
    adapter::{ParameterLayout, layout::Target},
    model::Projection,
    plan::Recompute,
};

fn check(name: &str, rank_stabilised: bool) {
    let path = format!("adapters/{name}/llama");
    let (case, folder) = (case(&path), reference(&path));
    let base = MemoryBase::load(&reference("models/llama"));
    let settings: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("adapter/adapter_config.json")).unwrap())
            .unwrap();
    let (r, alpha) =
        (settings["r"].as_u64().unwrap() as usize, settings["lora_alpha"].as_f64().unwrap() as f32);
    let scale = if rank_stabilised { alpha / (r as f32).sqrt() } else { alpha / r as f32 };
    let modules: Vec<&str> =
        case["adapted_modules"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
    let targets: Vec<Target> = (0..base.config.layers)
        .flat_map(|layer| Projection::ALL.map(|projection| Target { layer, projection }))
        .filter(|target| modules.contains(&target.projection.module(target.layer).as_str()))
        .collect();
    assert_eq!(targets.len(), modules.len());
    let layout = ParameterLayout::lora(&base.config, &targets, r, scale);

    let saved = tensors(&folder.join("adapter/adapter_model.safetensors"));
    let mut parameters = vec![0.0; layout.len()];
    for entry in layout.entries() {
        parameters[entry.range.clone()].copy_from_slice(&floats(&saved[&entry.peft_name]));
    }
    let expected = tensors(&folder.join("expected.safetensors"));
    let of = |name: &str| &expected[&format!("right.{name}")];
    let rows = padded_rows(of("input_ids"), of("attention_mask"), Some(of("labels")));

    for recompute in [Recompute::Never, Recompute::Layers] {
        let base = MemoryBase::load(&reference("models/llama"));
        let mut engine = Setup { recompute, ..Setup::new(layout.clone()) }.engine(base);
        let (vocabulary, columns) = (engine.config().vocabulary_size, of("input_ids").dims2().unwrap().1);
        for (index, row) in rows.iter().enumerate() {
            let got = engine.logits(Some(&parameters), std::slice::from_ref(&row.token_ids)).unwrap();
            let first = index * columns * vocabulary;
            let wanted = &floats(of("logits"))[first..first + got.len()];
            assert_close(&format!("{name} logits"), &got, wanted, tolerance(&case, "logits"));
        }
        let mut gradient = vec![0.0; layout.len()];
        let key = StepKey { seed: 1, step: 1 };
        let sum = engine.forward_backward(&parameters, &rows, key, &mut gradient, &mut NoSink).unwrap();
        assert_close("loss", &[sum.mean() as f32], &floats(of("loss")), tolerance(&case, "loss"));
        let mut compared = 0;
        for entry in layout.entries() {
            let wanted = floats(of(&format!("grad.{}", entry.peft_name)));
            let got: Vec<f32> =
                gradient[entry.range.clone()].iter().map(|sum_of| sum_of / sum.tokens as f32).collect();
            assert_close(
                &format!("{name} {recompute:?} {}", entry.peft_name),
                &got,
                &wanted,
                tolerance(&case, "grad"),
            );
            compared += 1;
        }
        let listed = expected.keys().filter(|name| name.starts_with("right.grad.")).count();
        assert_eq!(compared, listed, "every gradient of the reference is compared");
    }
}

#[test]
fn lora_on_queries_and_values() {
    check("lora_qv", false);
}

#[test]
fn lora_on_all_linear_layers() {
    check("lora_all_linear", false);
}

#[test]
fn rank_stabilised_lora() {
    check("rslora", true);
}

#[test]
fn lora_on_what_a_regular_expression_names() {
    check("lora_regex", false);
}
