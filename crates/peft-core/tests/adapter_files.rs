//! Adapters as files: looked at, compared, renamed, combined. What PEFT makes of the results is asked in the program's tests.
#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod common;

use std::{fs, path::Path};

use common::{copy_folder, reference, relative, tensors};
use safetensors::tensor::Dtype;
use serde_json::json;
use shanty_diagnostic::Diagnose;
use shanty_peft_core::{
    adapter_files::{
        Combination, KeyStyle, Renaming, StoredAdapter, combine, compare, convert_keys, module_changes,
        rename,
    },
    generate::LoadedAdapter,
    model::ModelConfig,
};

const ALL: &str = "adapters/lora_all_linear/llama/adapter";
const QV: &str = "adapters/lora_qv/llama/adapter";

fn open(path: &str) -> StoredAdapter {
    StoredAdapter::open(&reference(path)).unwrap()
}

/// s B A of a module, in f64.
fn change(adapter: &StoredAdapter, module: &str) -> Option<Vec<f64>> {
    let (a, b) = (adapter.tensor(module, "lora_A.weight")?, adapter.tensor(module, "lora_B.weight")?);
    let (rank, columns, rows) = (a.shape[0], a.shape[1], b.shape[0]);
    let scale = adapter.lora_scale(module).unwrap().1;
    let at = |row: usize, column: usize| -> f64 {
        let products = (0..rank)
            .map(|k| f64::from(b.values[row * rank + k]) * f64::from(a.values[k * columns + column]));
        scale * products.sum::<f64>()
    };
    Some((0..rows * columns).map(|index| at(index / columns, index % columns)).collect())
}

fn modules(adapters: &[&StoredAdapter]) -> Vec<String> {
    let mut all: Vec<String> = adapters
        .iter()
        .flat_map(|adapter| adapter.modules_with("lora_A.weight").into_iter().map(str::to_owned))
        .collect();
    all.sort();
    all.dedup();
    all
}

fn weighted_sum(adapters: &[(StoredAdapter, f64)], module: &str) -> Vec<f64> {
    let mut sum: Vec<f64> = Vec::new();
    for (adapter, weight) in adapters {
        let Some(change) = change(adapter, module) else { continue };
        sum.resize(change.len(), 0.0);
        sum.iter_mut().zip(change).for_each(|(sum, change)| *sum += weight * change);
    }
    sum
}

fn off(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f64, |largest, value| largest.max(value.abs()));
    found.iter().zip(expected).fold(0f64, |most, (a, b)| most.max((a - b).abs())) / largest
}

#[test]
fn cat_is_the_weighted_sum_and_svd_its_best_cut() {
    let adapters = [(open(ALL), 0.7), (open(QV), -1.3)];
    let both = modules(&[&adapters[0].0, &adapters[1].0]);
    let cat = combine(&adapters, Combination::Cat).unwrap();
    let ranks: usize =
        adapters.iter().map(|(adapter, _)| adapter.config["r"].as_u64().unwrap() as usize).sum();
    assert_eq!((&cat.config["r"], &cat.config["lora_alpha"]), (&json!(ranks), &json!(ranks)));
    let full = combine(&adapters, Combination::Svd(Some(ranks))).unwrap();
    let cut = combine(&adapters, Combination::Svd(Some(3))).unwrap();
    for module in &both {
        let expected = weighted_sum(&adapters, module);
        // f32 factors of a product that is summed in f64.
        assert!(off(&change(&cat, module).unwrap(), &expected) < 1e-6, "{module}");
        assert!(off(&change(&full, module).unwrap(), &expected) < 1e-6, "{module}");
        // What the cut leaves out is orthogonal to what it keeps, and smaller than any it keeps.
        let kept = change(&cut, module).unwrap();
        let rest: Vec<f64> = expected.iter().zip(&kept).map(|(all, kept)| all - kept).collect();
        let (inner, sizes) = kept
            .iter()
            .zip(&rest)
            .fold((0.0, (0.0, 0.0)), |(inner, (k, r)), (a, b)| (inner + a * b, (k + a * a, r + b * b)));
        assert!(inner.abs() <= 1e-6 * (sizes.0 + sizes.1), "{module}: {inner}");
        assert!(sizes.1 < sizes.0, "{module}: {sizes:?}");
    }
}

#[test]
fn combined_adapters_open_like_any_other() {
    let adapters = [(open(ALL), 0.5), (open(QV), 0.5)];
    let place = tempfile::tempdir().unwrap();
    let config = ModelConfig::load(&reference("models/llama")).unwrap();
    for (name, how) in [("cat", Combination::Cat), ("svd", Combination::Svd(None))] {
        let folder = place.path().join(name);
        combine(&adapters, how).unwrap().write(&folder).unwrap();
        let loaded = LoadedAdapter::open(&folder, &config).unwrap();
        assert!(loaded.dropped_keys().is_empty());
        let again = combine(&adapters, how).unwrap().write(&folder).unwrap_err();
        assert_eq!(again.diagnostic().code, "SH0456", "nothing is written over");
    }
    // One adapter, weight 1: what it was.
    let same = combine(&[(open(ALL), 1.0)], Combination::Linear).unwrap();
    for module in modules(&[&same]) {
        assert!(off(&change(&same, &module).unwrap(), &change(&open(ALL), &module).unwrap()) < 1e-6);
    }
}

#[test]
fn what_has_no_sum_is_refused() {
    let mut other_base = open(QV);
    other_base.base_hash = Some("b".to_owned());
    let mut this_base = open(ALL);
    this_base.base_hash = Some("a".to_owned());
    let mut rank = open(QV);
    rank.config.insert("r".to_owned(), json!(3));
    let mut halves = open(QV);
    halves.tensors.pop_first();
    let infinite = open(QV);
    for (adapters, how) in [
        (vec![(open("adapters/ia3/llama/adapter"), 1.0)], Combination::Cat),
        (vec![(open("adapters/dora/llama/adapter"), 1.0)], Combination::Cat),
        (vec![(open("adapters/prefix/llama/adapter"), 1.0)], Combination::Cat),
        (vec![(open("adapters/lora_modules_to_save/llama/adapter"), 1.0)], Combination::Svd(None)),
        (vec![(this_base, 1.0), (other_base, 1.0)], Combination::Cat),
        (vec![(rank, 1.0)], Combination::Cat),
        (vec![(halves, 1.0)], Combination::Cat),
        (vec![(infinite, f64::NAN)], Combination::Cat),
        (Vec::new(), Combination::Cat),
    ] {
        let error = combine(&adapters, how).expect_err("they have no sum");
        assert_eq!(error.diagnostic().code, "SH0452", "{error}");
    }
}

#[test]
fn names_of_every_style_are_read_and_written() {
    let place = tempfile::tempdir().unwrap();
    let adapter = open(ALL);
    for (name, style, example) in [
        ("bare", KeyStyle::Bare, "model.layers.0.mlp.down_proj.lora_A.weight"),
        (
            "named",
            KeyStyle::Named("pirate".to_owned()),
            "base_model.model.model.layers.0.mlp.down_proj.lora_A.pirate.weight",
        ),
        ("peft", KeyStyle::Peft, "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
    ] {
        let folder = place.path().join(name);
        convert_keys(&adapter, &style, None, &folder).unwrap();
        let file = tensors(&folder.join("adapter_model.safetensors"));
        assert!(file.contains_key(example), "{name}: {:?}", file.keys().next());
        let read = StoredAdapter::open(&folder).unwrap();
        assert_eq!(read.tensors, adapter.tensors);
        assert_eq!(read.foreign_names.is_empty(), name == "peft");
    }
    let small = place.path().join("small");
    convert_keys(&adapter, &KeyStyle::Peft, Some(Dtype::BF16), &small).unwrap();
    let read = StoredAdapter::open(&small).unwrap();
    for (key, tensor) in &read.tensors {
        assert_eq!(tensor.dtype, Dtype::BF16);
        assert!(relative(&tensor.values, &adapter.tensors[key].values) < 2f64.powi(-8));
    }
    // The same tensor under two names.
    let file = small.join("adapter_model.safetensors");
    let stored = tensors(&file);
    let (name, tensor) = stored.iter().next().unwrap();
    let twin = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.");
    let view =
        || safetensors::tensor::TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes).unwrap();
    let bytes = safetensors::serialize([(name.as_str(), view()), (twin.as_str(), view())], None).unwrap();
    fs::write(&file, bytes).unwrap();
    assert_eq!(StoredAdapter::open(&small).unwrap_err().diagnostic().code, "SH0454");
}

#[test]
fn modules_are_renamed_everywhere() {
    let mut adapter = open(QV);
    let renaming = Renaming {
        modules: vec![("model.layers".to_owned(), "model.language_model.layers".to_owned())],
        base: Some("another".to_owned()),
    };
    let tensors = adapter.tensors.len();
    assert_eq!(rename(&mut adapter, &renaming).unwrap(), tensors);
    assert!(adapter.tensors.keys().all(|key| key.module.starts_with("model.language_model.layers.")));
    assert_eq!(adapter.config["base_model_name_or_path"], "another");
    let back = Renaming { modules: vec![("language_model".to_owned(), String::new())], base: None };
    rename(&mut adapter, &back).unwrap();
    assert_eq!(adapter.tensors, open(QV).tensors);
    let targets = Renaming { modules: vec![("q_proj".to_owned(), "query".to_owned())], base: None };
    rename(&mut adapter, &targets).unwrap();
    let names = adapter.config["target_modules"].to_string();
    assert!(names.contains("query") && !names.contains("q_proj"), "{names}");
    for wrong in [("absent", "x"), ("query", "v_proj")] {
        let renaming = Renaming { modules: vec![(wrong.0.to_owned(), wrong.1.to_owned())], base: None };
        let error = rename(&mut adapter.clone(), &renaming).unwrap_err();
        assert_eq!(error.diagnostic().code, "SH0454", "{error}");
    }
}

#[test]
fn differences_are_told_and_changes_measured() {
    let (all, qv) = (open(ALL), open(QV));
    let none = compare(&all, &all).unwrap();
    assert!(none.is_none() && none.same == all.tensors.len());
    assert!((none.cosine.unwrap() - 1.0).abs() < 1e-12);
    let mut against = all.clone();
    for (key, tensor) in &mut against.tensors {
        if key.suffix == "lora_B.weight" {
            tensor.values.iter_mut().for_each(|value| *value = -*value);
        }
    }
    against.config.insert("lora_dropout".to_owned(), json!(0.5));
    let difference = compare(&against, &all).unwrap();
    assert!((difference.cosine.unwrap() + 1.0).abs() < 1e-12, "the other way");
    assert_eq!(difference.numbers.len(), all.tensors.len() / 2);
    assert!(difference.numbers.iter().all(|(_, relative)| (relative - 2.0).abs() < 1e-6));
    assert_eq!(difference.settings.len(), 1);
    let other = compare(&all, &qv).unwrap();
    assert!(!other.only_first.is_empty() && other.only_second.is_empty());

    for measured in module_changes(&all).unwrap() {
        let change = change(&all, &measured.module).unwrap();
        let norm = change.iter().map(|value| value * value).sum::<f64>().sqrt();
        assert!((measured.change_norm - norm).abs() < 1e-9 * norm, "{measured:?}");
        assert_eq!(measured.shape[0] * measured.shape[1], change.len());
    }
    assert!(module_changes(&open("adapters/ia3/llama/adapter")).unwrap().is_empty());
}

#[test]
fn ranks_and_alphas_of_single_modules_count() {
    let adapter = open("adapters/lora_patterns/llama/adapter");
    let r = adapter.config["r"].as_u64().unwrap() as usize;
    let mut ranks: Vec<usize> = Vec::new();
    for module in adapter.modules_with("lora_A.weight") {
        let (rank, _) = adapter.lora_scale(module).unwrap();
        assert_eq!(rank, adapter.tensor(module, "lora_A.weight").unwrap().shape[0], "{module}");
        ranks.push(rank);
    }
    assert!(ranks.iter().any(|rank| *rank != r), "{ranks:?}");
}

#[test]
fn folders_that_are_no_adapter_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let code = |folder: &Path| StoredAdapter::open(folder).unwrap_err().diagnostic().code;
    assert_eq!(code(place.path()), "SH0401");
    let copy = |name: &str| {
        let folder = place.path().join(name);
        copy_folder(&reference(QV), &folder);
        folder
    };
    let text = copy("text");
    fs::write(text.join("adapter_config.json"), "[1]").unwrap();
    assert_eq!(code(&text), "SH0402");
    let cut = copy("cut");
    let bytes = fs::read(cut.join("adapter_model.safetensors")).unwrap();
    fs::write(cut.join("adapter_model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(code(&cut), "SH0410");
    let mut hostile = bytes;
    hostile[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(cut.join("adapter_model.safetensors"), hostile).unwrap();
    assert_eq!(code(&cut), "SH0410");
    let pickle = copy("pickle");
    fs::rename(pickle.join("adapter_model.safetensors"), pickle.join("adapter_model.bin")).unwrap();
    assert_eq!(code(&pickle), "SH0417");
}
