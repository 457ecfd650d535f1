//! Twelve steps of AdaLoRA beside PEFT's: the orthogonality term, importance, budget and masks. Made by
//! `fixtures/adalora_steps.py`.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::{collections::HashMap, path::Path};

use candle_core::Tensor;
use memory::{MemoryBase, Setup, assert_close, floats, integers, reference, tensors};
use shanty_peft_core::{
    NoSink, StepKey,
    adapter::{
        AdaLoraConfig, AdapterFolder, Method, ParameterLayout, Selection, StepHook, TargetModules, files,
    },
    batch::Row,
    optim::{AdamW, AdamWOptions, clip_factor, global_norm},
};

const STEPS: u64 = 12;

fn config() -> AdaLoraConfig {
    let targets = ["q_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec();
    AdaLoraConfig {
        init_r: 4,
        target_r: 2,
        tinit: 2,
        tfinal: 3,
        delta_t: 2,
        orth_reg_weight: 0.3,
        total_step: STEPS,
        lora_alpha: 6.0,
        selection: Selection::of(TargetModules::Names(targets)),
        ..AdaLoraConfig::default()
    }
}

fn fixture() -> HashMap<String, Tensor> {
    tensors(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adalora_steps.safetensors"))
}

fn read(layout: &ParameterLayout, fixture: &HashMap<String, Tensor>, when: &str) -> Vec<f32> {
    let mut parameters = vec![0.0; layout.len()];
    for entry in layout.entries() {
        let stored = floats(&fixture[&format!("{when}.{}", entry.peft_name)]);
        parameters[entry.range.clone()].copy_from_slice(&stored);
    }
    parameters
}

#[test]
fn twelve_steps_prune_the_same_triplets() {
    let (fixture, config) = (fixture(), config());
    let setup = Setup::new(Some(config.clone().shared()));
    let mut engine = setup.engine(MemoryBase::load(&reference("models/llama")));
    let layout = engine.layout().clone();
    let mut parameters = read(&layout, &fixture, "initial");
    let ids = &fixture["ids"];
    let (count, length) = ids.dims2().unwrap();
    let numbers = integers(ids);
    let rows: Vec<Row> = (0..count)
        .map(|row| {
            let ids = numbers[row * length..(row + 1) * length].iter().map(|id| *id as u32);
            Row::whole(row as u64, ids.collect())
        })
        .collect();
    let options = AdamWOptions { weight_decay: 0.01, ..AdamWOptions::default() };
    let mut optimizer = AdamW::new(options, layout.len());
    let mut state = config.state(&layout);
    let norms = floats(&fixture["norms"]);
    for step in 1..=STEPS {
        // What a checkpoint keeps is all that the next step needs.
        let (restored, mut resumed) = (parameters.clone(), state.clone());
        let mut gradient = vec![0.0; layout.len()];
        let key = StepKey { seed: 1, step };
        let sum = engine.forward_backward(&restored, &rows, key, &mut gradient, &mut NoSink).unwrap();
        let hook = |scale| StepHook { layout: &layout, step, total_steps: STEPS, scale };
        let scale = 1.0 / sum.tokens as f64;
        config.regularise(&hook(scale), &parameters, &mut gradient);
        let norm = global_norm(&gradient) * scale;
        assert_close(&format!("norm of step {step}"), &[norm as f32], &[norms[step as usize - 1]], 1e-4);
        let clip = clip_factor(norm, 1.0).unwrap();
        optimizer.update(&mut parameters, &gradient, scale * clip, 5e-3).unwrap();
        config.after_step(&hook(scale * clip), &mut parameters, &gradient, &mut resumed);
        state = resumed;

        let written = config.settings(&layout, &state);
        let pattern = written["rank_pattern"].as_object();
        let expected: Vec<&String> =
            fixture.keys().filter(|name| name.starts_with(&format!("pattern.{step}."))).collect();
        assert_eq!(pattern.map_or(0, serde_json::Map::len), expected.len(), "step {step}");
        for name in expected {
            let module = name.strip_prefix(&format!("pattern.{step}.")).unwrap();
            let kept = pattern.unwrap()[module].as_array().unwrap();
            let kept: Vec<f32> =
                kept.iter().map(|kept| f32::from(u8::from(kept.as_bool().unwrap()))).collect();
            assert_eq!(kept, floats(&fixture[name]), "step {step} {module}");
        }
    }
    // AdamW divides by the gradient's own size: what 1e-6 of a gradient moved is 1e-4 after twelve steps, as in training/.
    let expected = read(&layout, &fixture, "final");
    for entry in layout.entries() {
        let range = entry.range.clone();
        assert_close(&entry.peft_name, &parameters[range.clone()], &expected[range], 1e-3);
    }
    let pruned = layout.entries().iter().filter(|entry| entry.suffix == "lora_E");
    let zeros: usize =
        pruned.map(|entry| parameters[entry.range.clone()].iter().filter(|e| **e == 0.0).count()).sum();
    assert_eq!(zeros, 12, "half of 24 triplets are pruned");

    // The file is cut; what comes back computes the same.
    let folder = tempfile::tempdir().unwrap();
    files::write(folder.path(), engine.fit(), &parameters, &state).unwrap();
    let read = AdapterFolder::open(folder.path()).unwrap();
    let base = MemoryBase::load(&reference("models/llama"));
    let fit = read.fit(&base.config).unwrap();
    assert!(fit.layout().len() < layout.len());
    let mut cut = vec![0.0; fit.layout().len()];
    read.read_into(fit.layout(), &mut cut).unwrap();
    let mut again = Setup::new(Some(read.method().clone())).engine(base);
    let ids: Vec<Vec<u32>> = rows.into_iter().map(|row| row.token_ids).collect();
    let whole = engine.logits(Some(&parameters), &ids).unwrap();
    assert_close("logits", &again.logits(Some(&cut), &ids).unwrap(), &whole, 1e-6);
}
