//! Training on a base that this crate quantised itself, from numbers that no quantiser has seen, beside training on the
//! numbers that base stands for.
//!
//! The twin's weights are read off the codes by this file: the 16 levels are written out here, in f64.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor};
use memory::{MemoryBase, Random, Setup, assert_close, lora};
use shanty_peft_core::{
    Engine, NoSink, StepKey,
    adapter::TargetModules,
    batch::{Row, Segment},
    engine::EngineParts,
    model::{BaseSource, Matrix, ModelConfig, ResidentBase, families},
    optim::{AdamW, AdamWOptions, clip_factor, global_norm},
    plan::{PlanRequest, Recompute},
    quant::Nf4Options,
};

/// Quantiles of a normal distribution (Dettmers et al., arXiv 2305.14314, appendix E).
const LEVELS: [f64; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

/// Rows of a matrix are no multiple of a block: blocks run on from one row to the next.
fn text(family: &str) -> String {
    format!(
        r#"{{"model_type": "{family}", "vocab_size": 97, "hidden_size": 72, "intermediate_size": 104,
            "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 10000.0, "sliding_window": 11,
            "tie_word_embeddings": false}}"#
    )
}

/// Writes a base as Hugging Face would, in f32.
fn save(base: &MemoryBase, folder: &Path, text: &str) {
    std::fs::write(folder.join("config.json"), text).unwrap();
    let shape = |name: &str, length: usize| {
        if name.ends_with("norm.weight") || name.ends_with("bias") {
            return vec![length];
        }
        let mut all = base.config.projections().iter().copied();
        let projection = all.find(|p| name.contains(&format!(".{}.", p.name())));
        let columns = projection.map_or(base.config.hidden_size, |p| base.config.shape(p)[1]);
        vec![length / columns, columns]
    };
    let tensors: HashMap<String, Tensor> = base
        .tensors
        .iter()
        .map(|(name, numbers)| {
            let tensor = Tensor::from_slice(numbers, shape(name, numbers.len()), &Device::Cpu).unwrap();
            let less = if base.config.norms_less_one && name.contains("norm") { 1.0 } else { 0.0 };
            (name.clone(), (tensor - less).unwrap())
        })
        .collect();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

/// The numbers that a quantised base stands for, all else as in `fresh`.
fn twin(quantised: &ResidentBase, fresh: &MemoryBase) -> MemoryBase {
    let mut tensors = fresh.tensors.clone();
    for layer in 0..fresh.config.layers {
        let weights = quantised.weights(layer);
        for &projection in fresh.config.projections() {
            let Matrix::Nf4(view) = weights.linear(projection).weight else { panic!("not quantised") };
            let code = |at: usize| {
                let byte = view.codes()[at / 2];
                if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 }
            };
            let number = |at: usize| {
                let scale = f64::from(view.scales().get(at / view.block_size()));
                (LEVELS[usize::from(code(at))] * scale) as f32
            };
            let numbers: Vec<f32> = (0..view.rows() * view.columns()).map(number).collect();
            let name = format!("{}.weight", projection.module(layer));
            let fresh = &fresh.tensors[&name];
            let error: f64 = numbers.iter().zip(fresh).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            let whole: f64 = fresh.iter().map(|b| f64::from(*b).powi(2)).sum();
            let share = (error / whole).sqrt();
            // Four bits of evenly spread numbers: about a tenth is lost. None lost: nothing was quantised.
            assert!((0.02..0.2).contains(&share), "{name} lost {share} of itself");
            tensors.insert(name, numbers);
        }
    }
    MemoryBase { config: fresh.config.clone(), tensors }
}

fn rows(random: &mut Random) -> Vec<Row> {
    let mut ids = |count: usize| (0..count).map(|_| random.below(97)).collect::<Vec<u32>>();
    let packed = vec![Segment { sample_id: 50, length: 9 }, Segment { sample_id: 51, length: 23 }];
    vec![
        Row::whole(0, ids(40)),
        Row { id: 1, token_ids: ids(32), segments: packed, trained: vec![4..9, 15..32] },
        Row { trained: std::iter::once(10..11).collect(), ..Row::whole(2, ids(20)) },
    ]
}

/// Losses of 20 steps, and what was trained.
fn train(mut engine: Engine) -> (Vec<f32>, Vec<f32>) {
    let layout = engine.layout().clone();
    let mut random = Random::new(8);
    // B is not 0: the base's error reaches every gradient from the first step on.
    let mut parameters = random.numbers(layout.len(), 0.1);
    let rows = rows(&mut random);
    let mut optimizer = AdamW::new(AdamWOptions::default(), layout.len());
    let mut losses = Vec::new();
    for step in 0..20 {
        let mut gradient = vec![0.0; layout.len()];
        let key = StepKey { seed: 3, step: step + 1 };
        let sum = engine.forward_backward(&parameters, &rows, key, &mut gradient, &mut NoSink).unwrap();
        let scale = 1.0 / sum.tokens as f64;
        let clip = clip_factor(global_norm(&gradient) * scale, 1.0).unwrap_or(1.0);
        optimizer.update(&mut parameters, &gradient, scale * clip, 5e-3).unwrap();
        losses.push(sum.mean() as f32);
    }
    (losses, parameters)
}

fn check(family: &str, options: Nf4Options, recompute: Recompute) {
    let folder = tempfile::tempdir().unwrap();
    let text = text(family);
    let config = ModelConfig::from_json(text.as_bytes(), "config.json".as_ref()).unwrap();
    let fresh = MemoryBase::random(config, 21);
    save(&fresh, folder.path(), &text);
    let quantised = ResidentBase::load(folder.path(), Some(options), &mut |_| {}).unwrap();
    let twin = twin(&quantised, &fresh);

    let method = lora(TargetModules::all_linear(), 6, 1.5, 0.1).shared();
    let setup = Setup { recompute, rows: 3, max_length: 40, ..Setup::new(Some(method)) };
    let request = PlanRequest {
        accelerated: false,
        half_activations: false,
        reduced_apart: false,
        host_limit: None,
        embedding_bytes: 0,
        micro_batch_rows: Some(3),
        max_length: 40,
        recompute,
        memory_limit: None,
        base_bytes: 0,
        dequantised: true,
        head_widened: quantised.head().as_f32().is_none(),
        dropout: true,
        threads: 2,
    };
    let parts = EngineParts { adapter: setup.adapter.clone(), request };
    let (losses, trained) = train(Engine::with_base(Box::new(quantised), parts).unwrap());
    let (twin_losses, twin_trained) = train(setup.engine(twin));
    let (fresh_losses, _) = train(setup.engine(fresh));

    // The twin's weights are rounded once from f64, the engine's once from f32: an ulp apart at most, 6e-8. AdamW
    // divides by the gradient's own size, which lets 20 steps carry that on; 2e-6 of a loss is 30 ulp.
    for (step, (loss, twin)) in losses.iter().zip(&twin_losses).enumerate() {
        assert_close(&format!("loss of step {step}"), &[*loss], &[*twin], 2e-6);
    }
    assert_close("what was trained", &trained, &twin_trained, 1e-4);
    assert!(losses[19] < 0.8 * losses[0], "nothing was learnt: {losses:?}");
    let apart = losses.iter().zip(&fresh_losses).any(|(loss, fresh)| (loss - fresh).abs() > 1e-3 * fresh);
    assert!(apart, "the quantised base trains as the one it was made from: it was not quantised");
}

#[test]
fn twenty_steps_on_a_base_quantised_here() {
    check("llama", Nf4Options::default(), Recompute::Never);
}

#[test]
fn twenty_steps_on_a_base_quantised_here_computed_again() {
    check("llama", Nf4Options { double: false, ..Nf4Options::default() }, Recompute::Layers);
}

#[test]
fn every_other_family_trains_in_four_bits() {
    for family in families::names().into_iter().filter(|family| *family != "llama") {
        check(family, Nf4Options::default(), Recompute::Layers);
    }
}
