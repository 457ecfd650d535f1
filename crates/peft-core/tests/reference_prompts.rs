//! Prefix, prompt and p-tuning beside Hugging Face PEFT: logits, losses, gradients, starts, files.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::{collections::HashMap, path::Path};

use candle_core::Tensor;
use memory::{
    MemoryBase, Setup, assert_close, case, floats, integers, padded_rows, reference, tensors, tolerance,
};
use serde_json::Value;
use shanty_peft_core::{
    Engine, NoSink, StepKey,
    adapter::{
        AdapterFolder, PTuningConfig, ParameterLayout, PrefixStart, PrefixTuningConfig, PromptStart,
        PromptTuningConfig, SharedMethod, VirtualTokenConfig, files,
    },
    batch::{Row, VirtualTokens},
    plan::Recompute,
};

const KEY: StepKey = StepKey { seed: 1, step: 1 };
const BASES: [&str; 1] = ["llama"];

/// A case of the reference.
struct Scene {
    name: String,
    case: Value,
    expected: HashMap<String, Tensor>,
    base: std::path::PathBuf,
    adapter: AdapterFolder,
}

impl Scene {
    fn load(method: &str, base: &str) -> Self {
        let name = format!("adapters/{method}/{base}");
        Self {
            case: case(&name),
            expected: tensors(&reference(&format!("{name}/expected.safetensors"))),
            base: reference(&format!("models/{base}")),
            adapter: AdapterFolder::open(&reference(&format!("{name}/adapter"))).unwrap(),
            name,
        }
    }

    fn of(&self, name: &str) -> &Tensor {
        &self.expected[name]
    }

    fn engine(&self, adapter: SharedMethod, recompute: Recompute) -> Engine {
        Setup { recompute, ..Setup::new(Some(adapter)) }.engine(MemoryBase::load(&self.base))
    }

    fn parameters(&self, layout: &ParameterLayout) -> Vec<f32> {
        let mut parameters = vec![0.0; layout.len()];
        self.adapter.read_into(layout, &mut parameters).unwrap();
        parameters
    }

    /// The right-padded rows. Behind virtual rows a label on the first token counts, behind virtual keys nothing predicts it.
    fn rows(&self) -> Vec<Row> {
        let [ids, mask, labels] =
            ["input_ids", "attention_mask", "labels"].map(|n| self.of(&format!("right.{n}")));
        let mut rows = padded_rows(ids, mask, Some(labels));
        if let VirtualTokens::Rows(_) = self.adapter.method().virtual_tokens() {
            let (labels, columns) = (integers(labels), ids.dims2().unwrap().1);
            for (index, row) in rows.iter_mut().enumerate().filter(|(i, _)| labels[i * columns] != -100) {
                assert_eq!(labels[index * columns], i64::from(row.token_ids[0]));
                row.trained.insert(0, 0..1);
            }
        }
        rows
    }

    fn tolerance(&self, what: &str) -> f64 {
        tolerance(&self.case, what)
    }

    fn close(&self, what: &str, got: &[f32], wanted: &Tensor, tolerance: &str) {
        assert_close(&format!("{} {what}", self.name), got, &floats(wanted), self.tolerance(tolerance));
    }

    /// Logits of the real tokens of every row.
    fn check_logits(&self, engine: &mut Engine, parameters: &[f32], rows: &[Row]) {
        let ahead = self.adapter.method().virtual_tokens().rows();
        let (vocabulary, columns) =
            (engine.config().vocabulary_size, self.of("right.input_ids").dims2().unwrap().1);
        for (index, row) in rows.iter().enumerate() {
            let got = engine.logits(Some(parameters), std::slice::from_ref(&row.token_ids)).unwrap();
            let first = (index * (columns + ahead) + ahead) * vocabulary;
            let wanted = &floats(self.of("right.logits"))[first..first + got.len()];
            assert_close(&format!("{} logits", self.name), &got, wanted, self.tolerance("logits"));
        }
    }
}

/// Everything of a case that follows from its files.
fn check(method: &str, base: &str) {
    let scene = Scene::load(method, base);
    let rows = scene.rows();
    for recompute in [Recompute::Never, Recompute::Layers] {
        let mut engine = scene.engine(scene.adapter.method().clone(), recompute);
        let layout = engine.layout().clone();
        let parameters = scene.parameters(&layout);
        scene.check_logits(&mut engine, &parameters, &rows);
        let mut gradient = vec![0.0; layout.len()];
        let sum = engine.forward_backward(&parameters, &rows, KEY, &mut gradient, &mut NoSink).unwrap();
        assert_eq!(sum.tokens, scene.case["targets_counted"].as_u64().unwrap());
        scene.close("loss", &[sum.mean() as f32], scene.of("right.loss"), "loss");
        let [entry] = layout.entries() else { panic!("one tensor is trained") };
        let mean: Vec<f32> =
            gradient[entry.range.clone()].iter().map(|sum_of| sum_of / sum.tokens as f32).collect();
        scene.close("gradient", &mean, scene.of(&format!("right.grad.{}", entry.peft_name)), "grad");
    }
}

#[test]
fn prefix_tuning() {
    BASES.iter().for_each(|base| check("prefix", base));
}

#[test]
fn prefix_tuning_trained_through_a_projection() {
    BASES.iter().for_each(|base| check("prefix_projected", base));
}

#[test]
fn prompt_tuning_from_random_rows() {
    BASES.iter().for_each(|base| check("prompt_random", base));
}

#[test]
fn prompt_tuning_from_a_text() {
    BASES.iter().for_each(|base| check("prompt_text", base));
}

#[test]
fn p_tuning() {
    BASES.iter().for_each(|base| check("p_tuning", base));
}

/// Trains through the network whose tensors the reference gives: its result, and the gradient of each of its tensors.
fn check_network(method: &str, base: &str) {
    let scene = Scene::load(method, base);
    let settings: Value = serde_json::from_str(
        &std::fs::read_to_string(reference(&format!("{}/adapter/adapter_config.json", scene.name))).unwrap(),
    )
    .unwrap();
    let whole = |key: &str| settings[key].as_u64().unwrap() as usize;
    let common = VirtualTokenConfig::new(None, whole("num_virtual_tokens"));
    let encoder_hidden_size = Some(whole("encoder_hidden_size"));
    let trained = match method {
        "p_tuning" => PTuningConfig { common, encoder_hidden_size, ..PTuningConfig::default() }.shared(),
        _ => PrefixTuningConfig {
            common,
            prefix_projection: true,
            encoder_hidden_size,
            ..PrefixTuningConfig::default()
        }
        .shared(),
    };
    let rows = scene.rows();
    for recompute in [Recompute::Never, Recompute::Layers] {
        let mut engine = scene.engine(trained.clone(), recompute);
        let layout = engine.layout().clone();
        let mut parameters = vec![0.0; layout.len()];
        for entry in layout.entries() {
            let numbers = floats(scene.of(&format!("encoder.{}", entry.peft_name)));
            parameters[entry.range.clone()].copy_from_slice(&numbers);
        }
        scene.check_logits(&mut engine, &parameters, &rows);
        let mut gradient = vec![0.0; layout.len()];
        let sum = engine.forward_backward(&parameters, &rows, KEY, &mut gradient, &mut NoSink).unwrap();
        scene.close("loss", &[sum.mean() as f32], scene.of("right.loss"), "loss");
        for entry in layout.entries() {
            let mean: Vec<f32> =
                gradient[entry.range.clone()].iter().map(|sum_of| sum_of / sum.tokens as f32).collect();
            let wanted = scene.of(&format!("encoder.grad.{}", entry.peft_name));
            scene.close(&entry.peft_name, &mean, wanted, "encoder.grad");
        }
        let listed = scene.expected.keys().filter(|name| name.starts_with("encoder.grad.")).count();
        assert_eq!(layout.entries().len(), listed, "every tensor of the network is compared");
        check_export(&scene, &engine, &parameters);
    }
}

/// What is written is what PEFT wrote: the network's result.
fn check_export(scene: &Scene, engine: &Engine, parameters: &[f32]) {
    let folder = tempfile::tempdir().unwrap();
    files::write(folder.path(), engine.fit(), parameters, &[]).unwrap();
    let ours = tensors(&folder.path().join(files::TENSORS_FILE));
    let theirs = tensors(&reference(&format!("{}/adapter/{}", scene.name, files::TENSORS_FILE)));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    let (ours, theirs) = (&ours["prompt_embeddings"], &theirs["prompt_embeddings"]);
    assert_eq!(ours.dims(), theirs.dims());
    // Two small products of f32 in another order than torch's.
    assert_close("prompt_embeddings", &floats(ours), &floats(theirs), 1e-5);
    let reopened = AdapterFolder::open(folder.path()).unwrap();
    assert!(reopened.dropped_keys().is_empty(), "{:?}", reopened.dropped_keys());
}

#[test]
fn the_projection_of_a_prefix_and_its_gradients() {
    BASES.iter().for_each(|base| check_network("prefix_projected", base));
}

#[test]
fn the_mlp_of_p_tuning_and_its_gradients() {
    BASES.iter().for_each(|base| check_network("p_tuning", base));
}

/// Keys and values of `adapter_config.json` as PEFT wrote it, but for the base's name.
#[test]
fn settings_are_written_as_peft_writes_them() {
    for method in ["prefix", "prefix_projected", "prompt_random", "prompt_text", "p_tuning"] {
        for base in BASES {
            let scene = Scene::load(method, base);
            let engine = scene.engine(scene.adapter.method().clone(), Recompute::Never);
            let parameters = scene.parameters(engine.layout());
            let folder = tempfile::tempdir().unwrap();
            files::write(folder.path(), engine.fit(), &parameters, &[]).unwrap();
            let read = |folder: &Path| -> Value {
                serde_json::from_str(&std::fs::read_to_string(folder.join(files::CONFIG_FILE)).unwrap())
                    .unwrap()
            };
            assert_eq!(
                read(folder.path()),
                read(&reference(&format!("{}/adapter", scene.name))),
                "{}",
                scene.name
            );
            let theirs = tensors(&reference(&format!("{}/adapter/{}", scene.name, files::TENSORS_FILE)));
            let ours = tensors(&folder.path().join(files::TENSORS_FILE));
            assert_eq!(floats(&ours["prompt_embeddings"]), floats(&theirs["prompt_embeddings"]));
        }
    }
}

/// `init.prompt_embeddings` and `text_init` of the case: exact.
#[test]
fn a_prompt_begins_as_the_embeddings_of_its_text() {
    for base in BASES {
        let scene = Scene::load("prompt_text", base);
        for init in scene.case["text_init"].as_array().unwrap() {
            let ids = |key: &str| -> Vec<u32> { serde_json::from_value(init[key].clone()).unwrap() };
            let count = init["virtual_tokens"].as_u64().unwrap() as usize;
            let start =
                PromptStart::Text { text: String::new(), token_ids: ids("text_ids"), tokenizer: None };
            let config =
                PromptTuningConfig { common: VirtualTokenConfig::new(None, count), start, finished: false };
            let mut engine = scene.engine(config.shared(), Recompute::Never);
            let parameters = engine.initial_parameters(7).unwrap();
            let model = MemoryBase::load(&scene.base);
            let hidden = model.config.hidden_size;
            let table = shanty_peft_core::model::BaseSource::embedding(&model);
            for (row, id) in ids("token_ids").into_iter().enumerate() {
                let mut wanted = vec![0.0; hidden];
                table.gather_row(id as usize, &mut wanted);
                assert_eq!(parameters[row * hidden..(row + 1) * hidden], wanted);
            }
            let stated = scene.of("init.prompt_embeddings");
            if stated.dims() == [count, hidden] {
                assert_eq!(parameters[..count * hidden], floats(stated));
            }
        }
    }
}

#[test]
fn a_prompt_of_the_vocabulary_is_drawn_by_the_seed() {
    let scene = Scene::load("prompt_random", "llama");
    let config = PromptTuningConfig {
        common: VirtualTokenConfig::new(None, 40),
        start: PromptStart::SampleVocab,
        finished: false,
    };
    let mut engine = scene.engine(config.shared(), Recompute::Never);
    let [first, again, other] = [7, 7, 8].map(|seed| engine.initial_parameters(seed).unwrap());
    assert_eq!(first, again);
    assert_ne!(first, other);
    let model = MemoryBase::load(&scene.base);
    let table = shanty_peft_core::model::BaseSource::embedding(&model);
    let hidden = model.config.hidden_size;
    let mut row = vec![0.0; hidden];
    let mut is_of_the_vocabulary = |prompt: &[f32]| {
        (0..table.rows()).any(|id| {
            table.gather_row(id, &mut row);
            row == prompt
        })
    };
    assert!(first[..40 * hidden].chunks_exact(hidden).all(&mut is_of_the_vocabulary));
}

/// A prefix that begins as a text's keys and values: the text's continuation is as likely as behind the text itself.
#[test]
fn a_prefix_begins_as_the_keys_and_values_of_its_text() {
    let scene = Scene::load("prefix", "llama");
    let text: Vec<u32> = vec![1, 40, 77, 120, 5, 200];
    let tail: Vec<u32> = vec![9, 31, 250, 14, 3];
    for projection in [false, true] {
        let config = PrefixTuningConfig {
            common: VirtualTokenConfig::new(None, text.len()),
            prefix_projection: projection,
            encoder_hidden_size: projection.then_some(48),
            start: PrefixStart::Tokens(text.clone()),
            finished: false,
        };
        let mut engine = scene.engine(config.shared(), Recompute::Never);
        let parameters = engine.initial_parameters(3).unwrap();
        let vocabulary = engine.config().vocabulary_size;
        let behind_prefix = engine.logits(Some(&parameters), std::slice::from_ref(&tail)).unwrap();
        let whole = [text.clone(), tail.clone()].concat();
        let behind_text = engine.logits(None, &[whole]).unwrap();
        // The same numbers by another road: the projection's last layer is solved in f64 and rounded.
        let tolerance = if projection { 1e-4 } else { 1e-5 };
        assert_close("logits", &behind_prefix, &behind_text[text.len() * vocabulary..], tolerance);
    }
}
