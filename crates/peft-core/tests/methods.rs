//! Every method: gradients beside differences of the loss under dropout, folders that come back, continuation.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::ops::ControlFlow;

use memory::{MemoryBase, Random, Setup, reference};
use shanty_peft_core::{
    NoSink, StepKey,
    adapter::{
        AdaLoraConfig, AdapterFolder, Bias, Ia3Config, LoraConfig, LoraStart, Rate, Selection, SharedMethod,
        TargetModules, files,
    },
    batch::Row,
    generate::SamplingOptions,
    plan::Recompute,
    quant::Nf4Options,
};

fn names(names: &[&str]) -> TargetModules {
    TargetModules::Names(names.iter().map(|name| (*name).to_owned()).collect())
}

fn all_linear(r: usize, dropout: f32) -> LoraConfig {
    memory::lora(TargetModules::all_linear(), r, 1.5, dropout)
}

/// Name, base, method.
fn methods() -> Vec<(&'static str, &'static str, SharedMethod)> {
    let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let selection = Selection::of(names(&["q_proj", "o_proj", "down_proj"]));
    vec![
        (
            "lora",
            "models/qwen2",
            // PEFT warns of a bias on what has none.
            LoraConfig {
                lora_bias: true,
                ..memory::lora(names(&["q_proj", "k_proj", "v_proj"]), 3, 1.5, 0.3)
            }
            .shared(),
        ),
        ("stacked", "models/phi3", LoraConfig { use_rslora: true, ..all_linear(3, 0.3) }.shared()),
        ("stacked dora", "models/phi3", LoraConfig { use_dora: true, ..all_linear(3, 0.3) }.shared()),
        ("biases", "models/qwen2", LoraConfig { bias: Bias::All, ..all_linear(2, 0.2) }.shared()),
        (
            "dora",
            "models/qwen2",
            LoraConfig { use_dora: true, bias: Bias::LoraOnly, ..all_linear(3, 0.3) }.shared(),
        ),
        (
            "whole modules",
            "models/llama",
            LoraConfig {
                modules_to_save: list(&["embed_tokens", "lm_head", "norm", "input_layernorm", "k_proj"]),
                ..memory::lora(names(&["q_proj", "k_proj", "up_proj"]), 2, 1.0, 0.2)
            }
            .shared(),
        ),
        (
            "norms of Gemma 2",
            "models/gemma2",
            LoraConfig {
                modules_to_save: list(&["pre_feedforward_layernorm", "post_attention_layernorm", "norm"]),
                ..all_linear(2, 0.1)
            }
            .shared(),
        ),
        (
            "norms of heads",
            "models/qwen3",
            LoraConfig {
                modules_to_save: list(&["q_norm", "k_norm"]),
                ..memory::lora(names(&["o_proj"]), 2, 1.0, 0.0)
            }
            .shared(),
        ),
        (
            "embedding and head",
            "models/llama",
            memory::lora(names(&["embed_tokens", "lm_head", "v_proj"]), 3, 1.3, 0.0).shared(),
        ),
        (
            "tokens of a tied base",
            "models/llama_tied",
            LoraConfig { trainable_token_indices: vec![7, 200, 31], ..all_linear(2, 0.2) }.shared(),
        ),
        ("ia3", "models/qwen2", Ia3Config::default().shared()),
        (
            "ia3 that scales what it should not",
            "models/llama",
            Ia3Config {
                target_modules: Some(TargetModules::all_linear()),
                feedforward_modules: Some(names(&["up_proj", "o_proj"])),
                ..Ia3Config::default()
            }
            .shared(),
        ),
        (
            "adalora",
            "models/qwen2",
            AdaLoraConfig {
                total_step: 9,
                init_r: 3,
                target_r: 2,
                lora_dropout: 0.3,
                selection,
                ..Default::default()
            }
            .shared(),
        ),
    ]
}

fn rows() -> Vec<Row> {
    let mut random = Random::new(17);
    let mut ids = |count: u32| (0..count).map(|_| random.below(288)).collect::<Vec<u32>>();
    let mut first = ids(29);
    // Some tokens are trained ones, one of them twice.
    (first[3], first[9], first[12]) = (7, 200, 7);
    let trained = vec![3..9, 11..13];
    vec![Row::whole(0, first), Row { trained, ..Row::whole(1, ids(17)) }, Row::whole(2, ids(5))]
}

const KEY: StepKey = StepKey { seed: 5, step: 3 };

/// The loss moves along random directions as the gradient says, with the same masks: central differences in f32. A step of
/// 4e-3 along a unit direction leaves a third-order error below 1e-3 of the slope and rounding of some 3e-4 / 8e-3.
#[test]
fn the_loss_moves_as_the_gradients_say() {
    for (name, base, method) in methods() {
        let dora = name.ends_with("dora");
        for recompute in [Recompute::Never, Recompute::Layers] {
            let setup = Setup { recompute, ..Setup::new(Some(method.clone())) };
            let mut engine = setup.engine(MemoryBase::load(&reference(base)));
            let layout = engine.layout().clone();
            let mut random = Random::new(23);
            let mut parameters = engine.initial_parameters(4).unwrap();
            for entry in layout.entries() {
                for value in &mut parameters[entry.range.clone()] {
                    *value += random.number(0.15);
                }
            }
            let mut gradient = vec![0.0; layout.len()];
            engine.forward_backward(&parameters, &rows(), KEY, &mut gradient, &mut NoSink).unwrap();
            let mut checked = 0;
            for entry in layout.entries() {
                let own = &gradient[entry.range.clone()];
                if entry.rate == Rate::Frozen {
                    assert!(
                        own.iter().all(|g| *g == 0.0),
                        "{name} {}: frozen, with a gradient",
                        entry.peft_name
                    );
                    continue;
                }
                assert!(own.iter().any(|g| *g != 0.0), "{name} {}: no gradient", entry.peft_name);
                // The length of a row counts as a constant for A and B: their gradient is no slope.
                if dora && (entry.suffix == "lora_A.weight" || entry.suffix == "lora_B.weight") {
                    continue;
                }
                // Half along the gradient, half anywhere: a sparse gradient is met, too.
                let mut direction = random.numbers(own.len(), 1.0);
                let length = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                let (long, own_long) = (length(&direction), length(own));
                for (d, g) in direction.iter_mut().zip(own) {
                    *d = (f64::from(*d) / long * 0.5 + f64::from(*g) / own_long) as f32;
                }
                let mut loss = |step: f32| {
                    let mut moved = parameters.clone();
                    for (value, d) in moved[entry.range.clone()].iter_mut().zip(&direction) {
                        *value += step * d;
                    }
                    let mut unused = vec![0.0; layout.len()];
                    engine.forward_backward(&moved, &rows(), KEY, &mut unused, &mut NoSink).unwrap().loss
                };
                let step = 4e-3;
                let slope = (loss(step) - loss(-step)) / (2.0 * f64::from(step));
                let expected: f64 = own.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
                let apart = (slope - expected).abs();
                assert!(
                    apart < 2e-2 * expected.abs() + 0.05,
                    "{name} {recompute:?} {}: {slope} beside {expected}",
                    entry.peft_name
                );
                checked += 1;
            }
            assert!(checked > 0, "{name}");
        }
    }
}

/// On a quantised base, with numbers that are not those of the start.
#[test]
fn folders_come_back_and_go_on_as_before() {
    for (name, base, method) in methods() {
        for quantised in [false, true] {
            let load = |method: SharedMethod| {
                let options = shanty_peft_core::EngineOptions {
                    quantization: quantised.then(Nf4Options::default),
                    adapter: Some(method),
                    threads: 2,
                    ..shanty_peft_core::EngineOptions::new(reference(base), 32)
                };
                shanty_peft_core::Engine::load(options, &mut |_| {}).unwrap()
            };
            let mut engine = load(method.clone());
            let mut parameters = engine.initial_parameters(1).unwrap();
            let mut random = Random::new(31);
            for entry in engine.layout().entries() {
                for value in &mut parameters[entry.range.clone()] {
                    *value += random.number(0.1);
                }
            }
            let folder = tempfile::tempdir().unwrap();
            files::write(folder.path(), engine.fit(), &parameters, &method.state(engine.layout())).unwrap();
            let read = AdapterFolder::open(folder.path()).unwrap();
            assert_eq!(read.dropped_keys(), [""; 0], "{name}");
            let mut again = load(read.method().clone());
            let mut back = vec![0.0; again.layout().len()];
            read.read_into(again.layout(), &mut back).unwrap();
            for entry in engine.layout().entries() {
                let same =
                    again.layout().entries().iter().find(|other| other.peft_name == entry.peft_name).unwrap();
                let (here, there) = (&parameters[entry.range.clone()], &back[same.range.clone()]);
                // Norms that are stored less one lose the last bit of a number near 1.
                let rounding = if entry.shift == 0.0 { 0.0 } else { 2e-7 };
                memory::assert_close(&entry.peft_name, there, here, rounding);
            }
            let prompt: Vec<u32> = (5..20).collect();
            let options = SamplingOptions { temperature: 0.0, max_tokens: 6, ..SamplingOptions::default() };
            let mut go_on = |_| ControlFlow::Continue(());
            let here = engine.generate(Some(&parameters), &prompt, &options, &mut go_on).unwrap();
            let there = again.generate(Some(&back), &prompt, &options, &mut go_on).unwrap();
            assert_eq!(here, there, "{name}");
            assert!(!here.is_empty());
            // Token after token with a cache is what all at once gives.
            let mut ids = prompt.clone();
            ids.extend(&here);
            let logits = engine.logits(Some(&parameters), &[ids]).unwrap();
            let vocabulary = engine.config().vocabulary_size;
            for (index, token) in here.iter().enumerate() {
                let row = &logits[(prompt.len() - 1 + index) * vocabulary..][..vocabulary];
                let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
                assert_eq!(best as u32, *token, "{name} {index}");
            }
        }
    }
}

/// A method at its start changes nothing, quantised or not; PEFT's own random start does.
#[test]
fn the_start_is_that_of_the_base() {
    for (name, base, method) in methods() {
        let mut engine = Setup::new(Some(method)).engine(MemoryBase::load(&reference(base)));
        let parameters = engine.initial_parameters(9).unwrap();
        let ids = [(3..18).collect::<Vec<u32>>()];
        let (with, without) =
            (engine.logits(Some(&parameters), &ids).unwrap(), engine.logits(None, &ids).unwrap());
        // DoRA brings each row to the length that it has: one rounding of it.
        memory::assert_close(name, &with, &without, 2e-6);
    }
    let random = LoraConfig { init_lora_weights: LoraStart::Random, ..all_linear(4, 0.0) };
    let mut engine = Setup::new(Some(random.shared())).engine(MemoryBase::load(&reference("models/llama")));
    let parameters = engine.initial_parameters(9).unwrap();
    let ids = [(3..18).collect::<Vec<u32>>()];
    let (with, without) =
        (engine.logits(Some(&parameters), &ids).unwrap(), engine.logits(None, &ids).unwrap());
    assert!(with.iter().zip(&without).any(|(with, without)| (with - without).abs() > 1e-2));
}

#[test]
fn what_is_perhaps_not_meant_is_told() {
    let model = MemoryBase::load(&reference("models/llama")).config;
    let doubts = |config: LoraConfig| config.fit(&model).unwrap().doubts(&model);
    assert_eq!(doubts(all_linear(4, 0.0)), [""; 0]);
    let saved = LoraConfig { modules_to_save: vec!["lm_head".to_owned()], ..all_linear(1, 0.0) };
    let doubts = doubts(saved);
    assert!(doubts.len() == 1 && doubts[0].contains("MB at every step"), "{doubts:?}");
}

/// LoRA+: the second factor learns faster, the embedding at a rate of its own, and what is frozen stays.
#[test]
fn parts_learn_at_rates_of_their_own() {
    use shanty_peft_core::optim::{AdamW, AdamWOptions};
    let method = LoraConfig {
        loraplus_lr_ratio: Some(16.0),
        loraplus_lr_embedding: 1e-6,
        ..memory::lora(names(&["q_proj", "embed_tokens"]), 2, 1.0, 0.0)
    };
    let base = MemoryBase::load(&reference("models/llama"));
    let layout = method.fit(&base.config).unwrap().layout().clone();
    let options = AdamWOptions { weight_decay: 0.1, ..AdamWOptions::default() };
    let mut optimizer = AdamW::new(options, layout.len());
    let mut parameters = vec![1.0; layout.len()];
    let rates = layout.rates(1e-3);
    optimizer.update_by(&mut parameters, &vec![1.0; layout.len()], 1.0, 1e-3, &rates).unwrap();
    for entry in layout.entries() {
        let rate = match entry.suffix.as_str() {
            "lora_A.weight" => 1e-3,
            "lora_B.weight" => 1.6e-2,
            _ => 1e-6,
        };
        // The first step of AdamW is as long as the rate; decay takes a tenth of that besides.
        let expected = 1.0 - rate - 0.1 * rate;
        let got = f64::from(parameters[entry.range.start]);
        assert!((got - expected).abs() < 1e-7, "{}: {got} {expected}", entry.peft_name);
    }
    let mut still = vec![1.0; layout.len()];
    let whole = std::iter::once((0..layout.len(), 0.0)).collect::<Vec<_>>();
    optimizer.update_by(&mut still, &vec![1.0; layout.len()], 1.0, 1e-3, &whole).unwrap();
    assert!(still.iter().all(|value| *value == 1.0));
}

/// PEFT opens every method's folder without a warning and gives the same logits.
///
/// Needs a Python with peft, transformers and torch: `SHANTY_PYTHON`, else `python3`. Without one the test is skipped
/// aloud; where `SHANTY_REQUIRE_PYTHON` is set, as in continuous integration, it fails.
#[test]
fn peft_opens_every_folder() {
    const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/tests/it/open_in_peft.py");
    let python = std::env::var("SHANTY_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let imports =
        std::process::Command::new(&python).args(["-c", "import peft, torch, transformers"]).output();
    if !imports.is_ok_and(|output| output.status.success()) {
        assert!(std::env::var_os("SHANTY_REQUIRE_PYTHON").is_none(), "`{python}` cannot import peft");
        eprintln!("SKIPPED: `{python}` cannot import peft, torch and transformers; nothing was compared");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let ids: Vec<Vec<u32>> = vec![vec![5, 17, 7, 120, 64, 7, 201, 9], vec![8, 40, 12, 99, 150, 31, 77, 260]];
    let mut cases = Vec::new();
    for (name, base, method) in methods() {
        let mut engine = Setup::new(Some(method.clone())).engine(MemoryBase::load(&reference(base)));
        let mut parameters = engine.initial_parameters(1).unwrap();
        let mut random = Random::new(3);
        for entry in engine.layout().entries() {
            for value in &mut parameters[entry.range.clone()] {
                *value += random.number(0.2);
            }
        }
        let folder = place.path().join(name.replace(' ', "_"));
        files::write(&folder, engine.fit(), &parameters, &method.state(engine.layout())).unwrap();
        let logits = engine.logits(Some(&parameters), &ids).unwrap();
        let shape = (ids.len(), ids[0].len(), engine.config().vocabulary_size);
        let logits = candle_core::Tensor::from_vec(logits, shape, &candle_core::Device::Cpu).unwrap();
        let file = folder.join("logits.safetensors");
        candle_core::safetensors::save(&std::collections::HashMap::from([("logits", logits)]), &file)
            .unwrap();
        cases.push(serde_json::json!({"model": reference(base), "adapter": folder, "logits": file}));
    }
    let list = place.path().join("cases.json");
    std::fs::write(&list, serde_json::to_vec(&cases).unwrap()).unwrap();
    let output = std::process::Command::new(python)
        .arg(SCRIPT)
        .arg("--cases")
        .arg(&list)
        .args(["--ids", &serde_json::to_string(&ids).unwrap(), "--tolerance", "1e-4"])
        .output()
        .unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    assert_eq!(said.lines().count(), cases.len(), "{said}");
}
