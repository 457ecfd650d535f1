//! Adapter folders: PEFT's own are read, ours are written as PEFT writes them.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod common;

use std::{collections::BTreeSet, fs, path::Path};

use common::{assert_bits, case, reference, tensors};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use shanty_peft_core::{
    adapter::{
        AdapterFolder, LoraConfig, ParameterEntry, ParameterLayout, TargetModules, config, files,
        layout::ALIGNMENT,
    },
    model::{ModelConfig, Place, Projection},
};

const CASES: [&str; 4] = [
    "adapters/lora_all_linear/llama",
    "adapters/lora_qv/llama",
    "adapters/lora_regex/llama",
    "adapters/rslora/llama",
];

fn model(path: &str) -> ModelConfig {
    ModelConfig::load(&reference(path)).unwrap()
}

fn lora(targets: TargetModules) -> LoraConfig {
    LoraConfig {
        base_model_name_or_path: Some("models/llama".to_owned()),
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.05,
        target_modules: targets,
        ..LoraConfig::default()
    }
}

/// A and B of a module.
fn pair(layout: &ParameterLayout, layer: usize, projection: Projection) -> Option<[&ParameterEntry; 2]> {
    let of = |suffix| layout.find(&projection.module(layer), suffix);
    Some([of("lora_A.weight")?, of("lora_B.weight")?])
}

/// The settings of a folder, which must be LoRA's.
fn config_of(folder: &Path) -> LoraConfig {
    let file = folder.join("adapter_config.json");
    LoraConfig::from_json(&fs::read(&file).unwrap(), &file).unwrap().0
}

fn names(names: &[&str]) -> TargetModules {
    TargetModules::Names(names.iter().map(|name| (*name).to_owned()).collect())
}

#[test]
fn adapters_that_peft_saved_are_read_whole() {
    let adapters = CASES.iter().map(|case| (format!("{case}/adapter"), model("models/llama")));
    let trained = ["training/lora/adapter_initial", "training/lora/adapter_final"]
        .map(|path| (path.to_owned(), model("training/base_nf4")));
    for (path, model) in adapters.chain(trained) {
        let folder = AdapterFolder::open(&reference(&path)).unwrap();
        assert_eq!(folder.dropped_keys(), [""; 0], "{path}");
        let fit = folder.fit(&model).unwrap();
        let (layout, matched) = (fit.layout(), fit.matched());
        assert!(matched.unused.is_empty());
        let mut parameters = vec![f32::NAN; layout.len()];
        folder.read_into(layout, &mut parameters).unwrap();
        let stored = tensors(&reference(&path).join("adapter_model.safetensors"));
        assert_eq!(stored.len(), layout.entries().len(), "{path}");
        for entry in layout.entries() {
            let stored = &stored[&entry.peft_name];
            assert_eq!(stored.shape, entry.shape);
            assert_bits(&parameters[entry.range.clone()], &stored.f32(), &entry.peft_name);
        }
        let count: usize = stored.values().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        assert_eq!(layout.parameters(), count);
    }
}

#[test]
fn targets_are_those_that_peft_adapted() {
    for path in CASES {
        let case = case(path);
        let folder = AdapterFolder::open(&reference(path).join("adapter")).unwrap();
        let fit = folder.fit(&model("models/llama")).unwrap();
        let (layout, matched) = (fit.layout(), fit.matched());
        let expected = case["adapted_modules"].as_array().unwrap();
        let expected: BTreeSet<&str> = expected.iter().map(|name| name.as_str().unwrap()).collect();
        let modules = matched.modules();
        assert_eq!(modules.iter().map(String::as_str).collect::<BTreeSet<_>>(), expected, "{path}");
        assert_eq!(layout.entries().len(), 2 * expected.len());
    }
    let scale = |path: &str| config_of(&reference(path)).scale();
    assert_eq!(scale("adapters/lora_qv/llama/adapter"), 2.0);
    let config = config_of(&reference("adapters/rslora/llama/adapter"));
    assert!(config.use_rslora);
    assert_eq!(config.scale(), (config.lora_alpha / 6.0_f64.sqrt()) as f32);
}

#[test]
fn all_linear_is_every_linear_module_but_the_head() {
    let model = model("models/llama");
    for word in ["all-linear", "ALL-LINEAR"] {
        let matched = TargetModules::Pattern(word.to_owned()).find(&model).unwrap();
        assert_eq!(matched.targets.len(), 7 * model.layers);
        assert!(!matched.modules().contains(&"lm_head".to_owned()));
    }
}

/// PEFT: `re.fullmatch` for a string, equal or a dot and the name for a list.
#[test]
fn targets_match_as_in_peft() {
    let model = model("models/llama");
    let count = |targets: TargetModules| targets.find(&model).map(|matched| matched.targets.len());
    assert_eq!(count(names(&["q_proj", "v_proj"])).unwrap(), 4);
    assert_eq!(count(names(&["self_attn.q_proj"])).unwrap(), 2);
    assert_eq!(count(names(&["model.layers.1.mlp.up_proj"])).unwrap(), 1);
    // No suffix of a name's part.
    assert_eq!(count(names(&["proj"])).unwrap_err().code(), "SH0406");
    let pattern = |pattern: &str| count(TargetModules::Pattern(pattern.to_owned()));
    assert_eq!(pattern(r".*_proj").unwrap(), 14);
    assert_eq!(pattern(r".*\.0\..*_proj").unwrap(), 7);
    assert_eq!(pattern(r"model\.layers\.\d+\.self_attn\.(q|k)_proj").unwrap(), 4);
    // Python has look-ahead, and so has this.
    assert_eq!(pattern(r".*\.(?!q_)[a-z]+_proj").unwrap(), 12);
    // The first alternative alone matches a part; a full match takes the second.
    assert_eq!(pattern(r"model|model\.layers\.0\.mlp\.up_proj").unwrap_err().code(), "SH0407");
    assert_eq!(pattern(r"q_proj").unwrap_err().code(), "SH0406");
    assert_eq!(pattern(r".*").unwrap_err().code(), "SH0407");
    assert_eq!(pattern(r"a)(b").unwrap_err().code(), "SH0408");
}

#[test]
fn a_name_that_matches_nothing_is_told() {
    use shanty_diagnostic::Diagnose as _;
    let model = model("models/llama");
    let matched = names(&["q_proj", "value"]).find(&model).unwrap();
    assert_eq!(matched.unused, ["value"]);
    let hint = |targets: TargetModules| targets.find(&model).unwrap_err().diagnostic().hint.unwrap();
    assert!(hint(names(&["q_porj"])).starts_with("did you mean `q_proj`?"), "{}", hint(names(&["q_porj"])));
    let hint_of_pattern = hint(TargetModules::Pattern("v_proj".to_owned()));
    assert!(hint_of_pattern.starts_with("did you mean `[\"v_proj\"]`?"), "{hint_of_pattern}");
    let far = hint(names(&["transformer.wte.weights"]));
    assert!(far.starts_with("the model has: q_proj"), "{far}");
    assert_eq!(names(&[]).find(&model).unwrap_err().code(), "SH0406");
}

#[test]
fn the_configuration_is_written_as_peft_writes_it() {
    let text =
        fs::read_to_string(reference("adapters/lora_all_linear/llama/adapter/adapter_config.json")).unwrap();
    let mut theirs: Value = serde_json::from_str(&text).unwrap();
    let list = theirs["target_modules"].as_array_mut().unwrap();
    list.sort_by_key(|name| name.as_str().unwrap().to_owned());
    let config = LoraConfig { lora_dropout: 0.0, ..lora(TargetModules::all_linear()) };
    let fit = config.fit(&model("models/llama")).unwrap();
    let ours = config::to_json(&config, fit.layout(), &[]);
    // Key for key, value for value, in the same order and with the same spaces.
    assert_eq!(ours, format!("{theirs:#}"));
    assert_eq!(ours.lines().next(), text.lines().next());
    assert_eq!(ours.lines().nth(1), text.lines().nth(1));
    assert!(text.contains("\"lora_dropout\": 0.0") && ours.contains("\"lora_dropout\": 0.0"));
    let other = LoraConfig { lora_dropout: 0.05, lora_alpha: 0.5, ..config };
    let ours = config::to_json(&other, fit.layout(), &[]);
    assert!(ours.contains("\"lora_dropout\": 0.05,") && ours.contains("\"lora_alpha\": 0.5,"), "{ours}");
}

#[test]
fn written_adapters_come_back_bit_for_bit() {
    let model = model("models/llama_tied");
    for targets in [TargetModules::all_linear(), names(&["o_proj", "down_proj"])] {
        let config = lora(targets);
        let fit = config.fit(&model).unwrap();
        let layout = fit.layout();
        let mut parameters = vec![f32::NAN; layout.len()];
        layout.initialise(3, &mut parameters);
        for (index, value) in parameters.iter_mut().enumerate() {
            *value += (index as f32 * 0.7).sin();
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/adapter");
        files::write(&path, &fit, &parameters, &[]).unwrap();
        // Twice: a file that is there is replaced.
        files::write(&path, &fit, &parameters, &[]).unwrap();
        let left: BTreeSet<_> =
            fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["adapter_config.json".into(), "adapter_model.safetensors".into()].into());
        let folder = AdapterFolder::open(&path).unwrap();
        assert_eq!(folder.dropped_keys(), [""; 0]);
        assert_eq!(config_of(&path).r, config.r);
        let again = folder.fit(&model).unwrap();
        assert_eq!(again.layout(), layout);
        let mut back = vec![f32::NAN; layout.len()];
        folder.read_into(again.layout(), &mut back).unwrap();
        for entry in layout.entries() {
            assert_bits(&back[entry.range.clone()], &parameters[entry.range.clone()], &entry.peft_name);
        }
        let bytes = fs::read(path.join("adapter_model.safetensors")).unwrap();
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    }
}

/// Rewrites a folder's tensors under other names and dtypes.
fn rewrite(folder: &Path, dtype: Dtype, rename: impl Fn(&str) -> String) {
    let file = folder.join("adapter_model.safetensors");
    let stored: Vec<(String, Vec<usize>, Vec<u8>)> = tensors(&file)
        .into_iter()
        .map(|(name, tensor)| {
            let bytes = tensor.f32().into_iter().flat_map(|value| match dtype {
                Dtype::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
                Dtype::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
                _ => value.to_le_bytes().to_vec(),
            });
            (rename(&name), tensor.shape, bytes.collect())
        })
        .collect();
    let views = stored
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn names_with_the_adapters_name_and_half_precision_are_read() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let folder = tempfile::tempdir().unwrap();
        common::copy_folder(&reference("adapters/lora_qv/llama/adapter"), folder.path());
        let before = tensors(&folder.path().join("adapter_model.safetensors"));
        rewrite(folder.path(), dtype, |name| name.replace(".weight", ".default.weight"));
        let adapter = AdapterFolder::open(folder.path()).unwrap();
        let fit = adapter.fit(&model("models/llama")).unwrap();
        let layout = fit.layout();
        let mut parameters = vec![f32::NAN; layout.len()];
        adapter.read_into(layout, &mut parameters).unwrap();
        for entry in layout.entries() {
            let expected: Vec<f32> = before[&entry.peft_name]
                .f32()
                .into_iter()
                .map(|value| match dtype {
                    Dtype::BF16 => half::bf16::from_f32(value).to_f32(),
                    Dtype::F16 => half::f16::from_f32(value).to_f32(),
                    _ => value,
                })
                .collect();
            assert_bits(&parameters[entry.range.clone()], &expected, &entry.peft_name);
        }
    }
}

/// PEFT's rule: a four-key file is enough, an unknown key is dropped, absent keys take defaults.
#[test]
fn sparse_and_foreign_configurations_are_read_by_pefts_rule() {
    let read = |text: &str| LoraConfig::from_json(text.as_bytes(), Path::new("adapter_config.json"));
    let (config, dropped) =
        read(r#"{"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"],"zeta":1,"beta":2}"#)
            .unwrap();
    assert_eq!((config.r, config.lora_alpha, config.lora_dropout), (4, 8.0, 0.0));
    assert_eq!(dropped, ["beta", "zeta"]);
    let (config, dropped) = read(r#"{"peft_type":"LORA"}"#).unwrap();
    assert_eq!((config.r, config.lora_alpha, config.use_rslora), (8, 8.0, false));
    assert_eq!(config.target_modules, names(&["q_proj", "v_proj"]));
    assert!(dropped.is_empty());
}

#[test]
fn the_layout_follows_the_backward_pass() {
    let model = model("models/llama_tied");
    let fit = lora(TargetModules::all_linear()).fit(&model).unwrap();
    let layout = fit.layout();
    check_layout(layout, &model);
    let layer = |place| match place {
        Place::Layer(layer) => layer,
        other => panic!("{other:?} is no layer"),
    };
    let layers: Vec<usize> = layout.entries().iter().map(|entry| layer(entry.place)).collect();
    assert!(layers.is_sorted_by(|earlier, later| earlier >= later));
    assert_eq!(layout.entries()[0].module, Projection::Down.module(model.layers - 1));
    assert_eq!(layout.layer_range(model.layers - 1).start, 0);
    assert_eq!(layout.layer_range(0).end, layout.len());
    for layer in 1..model.layers {
        assert_eq!(layout.layer_range(layer).end, layout.layer_range(layer - 1).start);
    }
}

fn check_layout(layout: &ParameterLayout, model: &ModelConfig) {
    let mut end = 0;
    for entry in layout.entries() {
        assert_eq!(entry.range.start % ALIGNMENT, 0);
        assert_eq!(entry.range.start, end);
        assert_eq!(entry.range.len(), entry.shape[0] * entry.shape[1]);
        end = entry.range.end.next_multiple_of(ALIGNMENT);
    }
    assert_eq!(end, layout.len());
    for layer in 0..model.layers {
        for projection in Projection::ALL {
            if let Some([a, b]) = pair(layout, layer, projection) {
                let [out, input] = model.shape(projection);
                assert_eq!((a.shape[1], b.shape[0], a.shape[0]), (input, out, b.shape[1]));
                assert_eq!(a.place, Place::Layer(layer));
                assert_eq!((&a.module, &b.module), (&projection.module(layer), &projection.module(layer)));
            }
        }
    }
}

#[test]
fn initialisation_is_pefts_and_depends_on_the_seed_alone() {
    let model = model("models/llama");
    let of = |targets| lora(targets).fit(&model).unwrap().layout().clone();
    let (all, some) = (of(TargetModules::all_linear()), of(names(&["q_proj"])));
    let start = |layout: &ParameterLayout, seed| {
        let mut parameters = vec![f32::NAN; layout.len()];
        layout.initialise(seed, &mut parameters);
        parameters
    };
    let (first, subset, other) = (start(&all, 1), start(&some, 1), start(&all, 2));
    for layer in 0..2 {
        let [a, b] = pair(&all, layer, Projection::Q).unwrap();
        let values = &first[a.range.clone()];
        let bound = 1.0 / (a.shape[1] as f32).sqrt();
        let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        // 256 uniform draws: the largest lies above 0.95 of the bound but for a chance of 0.95^256 = 2e-6; the seed is fixed.
        assert!(largest <= bound && largest > 0.95 * bound, "{largest} {bound}");
        assert!(first[b.range.clone()].iter().all(|value| *value == 0.0));
        let [same, _] = pair(&some, layer, Projection::Q).unwrap();
        assert_eq!(&subset[same.range.clone()], values);
        assert_ne!(&other[a.range.clone()], values);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_choice_of_modules_survives_the_files(
        chosen in prop::collection::btree_set(0_usize..14, 1..14), r in 1_usize..9, seed in any::<u64>(),
    ) {
        let model = model("models/llama");
        let modules: Vec<String> =
            chosen.iter().map(|index| Projection::ALL[index % 7].module(index / 7)).collect();
        let config = LoraConfig { r, ..lora(TargetModules::Names(modules)) };
        let fit = config.fit(&model).unwrap();
        let layout = fit.layout();
        check_layout(layout, &model);
        prop_assert_eq!(fit.matched().targets.len(), chosen.len());
        let mut parameters = vec![0.0; layout.len()];
        layout.initialise(seed, &mut parameters);
        let folder = tempfile::tempdir().unwrap();
        files::write(folder.path(), &fit, &parameters, &[]).unwrap();
        let read = AdapterFolder::open(folder.path()).unwrap();
        let again = read.fit(&model).unwrap();
        let mut back = vec![f32::NAN; layout.len()];
        read.read_into(again.layout(), &mut back).unwrap();
        prop_assert_eq!(again.layout(), layout);
        prop_assert_eq!(back, parameters);
    }
}
