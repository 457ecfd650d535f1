//! Adapters folded into weights: PEFT's numbers, the same logits, bounded memory, and out again.
#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use common::{case, copy_folder, expected, reference, relative, tensors};
use shanty_diagnostic::Diagnose;
use shanty_peft_core::{
    Engine, EngineOptions,
    generate::LoadedAdapter,
    merge::{FoldedModel, Form, MergeOptions, MergeReport, SHARD_BYTES, merge, verify},
    model::ModelConfig,
    quant::Nf4Options,
};
use tempfile::TempDir;

/// Bytes in use, and the most that ever were.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// One test at a time: they share the count.
static ALONE: Mutex<()> = Mutex::new(());

// SAFETY: all work is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options(base: &Path, out: &Path, form: Form) -> MergeOptions {
    MergeOptions {
        base: base.to_owned(),
        out: out.to_owned(),
        form,
        shard_bytes: SHARD_BYTES,
        take_out: false,
    }
}

/// Base and adapter of a reference case; the base in bf16 if asked.
struct Scene {
    place: TempDir,
    base: PathBuf,
    adapter: LoadedAdapter,
}

impl Scene {
    fn new(base: &str, adapter: &str, bf16: bool) -> Self {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("base");
        copy_folder(&reference(base), &folder);
        fs::write(folder.join("tokenizer.json"), "{\"a\": \"tokenizer\"}").unwrap();
        let adapter = LoadedAdapter::open(&reference(adapter), &ModelConfig::load(&folder).unwrap()).unwrap();
        if !bf16 {
            return Self { place, base: folder, adapter };
        }
        let narrow = place.path().join("narrow");
        let model = FoldedModel::open(&folder, None, 1).unwrap();
        merge(&model, &options(&folder, &narrow, Form::Bf16), &mut |_, _| {}).unwrap();
        Self { place, base: narrow, adapter }
    }

    fn model(&self) -> FoldedModel<'_> {
        FoldedModel::open(&self.base, Some(&self.adapter), 1).unwrap()
    }

    fn merge(&self, form: Form) -> (PathBuf, MergeReport) {
        let out = self.place.path().join(format!("{form:?}").split(['(', ' ']).next().unwrap_or("out"));
        let report = merge(&self.model(), &options(&self.base, &out, form), &mut |_, _| {}).unwrap();
        (out, report)
    }
}

fn logits(base: &Path, adapter: Option<&LoadedAdapter>, nf4: Option<Nf4Options>) -> Vec<f32> {
    let ids = vec![vec![5, 17, 33, 120, 64, 7, 201, 9], vec![8, 40, 12, 99, 150, 31, 77, 260]];
    let options = EngineOptions { quantization: nf4, threads: 1, ..EngineOptions::new(base, 32) };
    let mut engine = Engine::load(options, &mut |_| {}).unwrap();
    if let Some(adapter) = adapter {
        engine.adapt(adapter.fit().clone());
    }
    engine.logits(adapter.map(LoadedAdapter::parameters), &ids).unwrap()
}

/// All cases of `reference/merge` whose method and family there are.
fn cases() -> Vec<(&'static str, &'static str, &'static str)> {
    let all = [
        ("merge/lora_all_linear_llama", "models/llama", "adapters/lora_all_linear/llama/adapter"),
        ("merge/lora_qv_qwen2", "models/qwen2", "adapters/lora_qv/qwen2/adapter"),
        ("merge/dora_llama", "models/llama", "adapters/dora/llama/adapter"),
        ("merge/dora_qwen2", "models/qwen2", "adapters/dora/qwen2/adapter"),
        ("merge/ia3_llama", "models/llama", "adapters/ia3/llama/adapter"),
        ("merge/ia3_qwen2", "models/qwen2", "adapters/ia3/qwen2/adapter"),
    ];
    let is_there = |(case, base, adapter): &(&str, &str, &str)| {
        let config = ModelConfig::load(&reference(base));
        let opened = config.and_then(|config| LoadedAdapter::open(&reference(adapter), &config));
        match opened {
            Ok(_) => true,
            Err(error) => {
                let code = error.diagnostic().code;
                assert!(["SH0304", "SH0404", "SH0405"].contains(&code.as_str()), "{case}: {error}");
                false
            }
        }
    };
    all.into_iter().filter(is_there).collect()
}

#[test]
fn merged_weights_are_pefts() {
    let _alone = alone();
    let cases = cases();
    assert!(!cases.is_empty());
    for (name, base, adapter) in cases {
        let (case, expected) = (case(name), expected(name));
        let tolerance = case["tolerance"]["f32"].as_f64().unwrap();
        for (bf16, kind) in [(false, "f32."), (true, "bf16.")] {
            let scene = Scene::new(base, adapter, bf16);
            let (out, report) = scene.merge(Form::Stored);
            let merged = tensors(&out.join("model.safetensors"));
            let before = tensors(&scene.base.join("model.safetensors"));
            let changed: Vec<&str> =
                case["changed"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
            for (tensor, found) in &merged {
                let Some(wanted) = expected.get(&format!("{kind}{tensor}")) else {
                    assert_eq!(found.bytes, before[tensor].bytes, "{name}: {tensor} stays");
                    continue;
                };
                assert_eq!((found.dtype, &found.shape), (wanted.dtype, &wanted.shape), "{name}: {tensor}");
                let (found, wanted) = (found.f32(), wanted.f32());
                if bf16 {
                    // One step of bf16 in rare elements, else equal.
                    let different = found.iter().zip(&wanted).filter(|(a, b)| a != b);
                    let far = different.clone().filter(|(a, b)| (*a - *b).abs() > b.abs() * 2f32.powi(-7));
                    assert_eq!(far.count(), 0, "{name}: {tensor}");
                    assert!(different.count() * 100 <= found.len(), "{name}: {tensor} differs often");
                } else {
                    let error = relative(&found, &wanted);
                    assert!(error <= tolerance, "{name}: {tensor} is off by {error:e}");
                }
            }
            let reported: Vec<&str> = report.changed().map(|tensor| tensor.name.as_str()).collect();
            assert!(changed.iter().all(|name| reported.contains(name)), "{name}: {reported:?}");
            if bf16 {
                let loss = report.changed().map(|tensor| tensor.loss).fold(0.0, f64::max);
                assert!(loss > 1e-4 && loss < 2f64.powi(-9), "{name}: bf16 loses {loss:e}");
            } else {
                assert!(report.changed().all(|tensor| tensor.loss == 0.0), "f32 loses nothing");
                let got = logits(&out, None, None);
                let wanted = logits(&scene.base, Some(&scene.adapter), None);
                let error = relative(&got, &wanted);
                assert!(error < 1e-4, "{name}: logits are off by {error:e}");
                assert!(relative(&got, &logits(&scene.base, None, None)) > 1e-3, "{name} changes something");
            }
            let checked = verify(&scene.model(), &out).unwrap();
            // Biases of adapted layers are checked too, changed or not.
            assert!(checked.len() >= expected.keys().filter(|key| key.starts_with(kind)).count());
        }
    }
}

#[test]
fn what_a_method_folds_shortly_is_what_the_identity_gives() {
    let _alone = alone();
    // A folder without the shortcut: a merge in f64 by hand for every target.
    let scene = Scene::new("models/llama", "adapters/lora_all_linear/llama/adapter", false);
    let model = scene.model();
    let stored = tensors(&reference("adapters/lora_all_linear/llama/adapter/adapter_model.safetensors"));
    let config: serde_json::Value = serde_json::from_slice(
        &fs::read(reference("adapters/lora_all_linear/llama/adapter/adapter_config.json")).unwrap(),
    )
    .unwrap();
    let scale = config["lora_alpha"].as_f64().unwrap() / config["r"].as_f64().unwrap();
    let mut compared = 0;
    for tensor in model.tensors().unwrap().iter().filter(|tensor| tensor.changed) {
        let module = tensor.name.strip_suffix(".weight").unwrap();
        let factor = |kind: &str| stored[&format!("base_model.model.{module}.lora_{kind}.weight")].f32();
        let (a, b, base) = (factor("A"), factor("B"), model.base(tensor).unwrap());
        let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
        let rank = a.len() / columns;
        let by_hand: Vec<f32> = (0..rows * columns)
            .map(|at| {
                let (row, column) = (at / columns, at % columns);
                let sum: f64 = (0..rank)
                    .map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * columns + column]))
                    .sum();
                (f64::from(base[at]) + scale * sum) as f32
            })
            .collect();
        let error = relative(&model.folded(tensor).unwrap(), &by_hand);
        assert!(error < 1e-6, "{}: {error:e}", tensor.name);
        compared += 1;
    }
    assert_eq!(compared, 14);
}

#[test]
fn shards_hold_the_same_and_lie_under_an_index() {
    let _alone = alone();
    let scene = Scene::new("models/llama", "adapters/lora_all_linear/llama/adapter", false);
    let (whole, _) = scene.merge(Form::F32);
    let out = scene.place.path().join("shards");
    let small = MergeOptions { shard_bytes: 40_000, ..options(&scene.base, &out, Form::F32) };
    let report = merge(&scene.model(), &small, &mut |_, _| {}).unwrap();
    assert!(report.shards > 5, "{report:?}");
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("model.safetensors.index.json")).unwrap()).unwrap();
    let whole = tensors(&whole.join("model.safetensors"));
    assert_eq!(index["weight_map"].as_object().unwrap().len(), whole.len());
    let total: usize = whole.values().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], total);
    let mut seen = 0;
    for shard in 1..=report.shards {
        let file = out.join(format!("model-{shard:05}-of-{:05}.safetensors", report.shards));
        let bytes = fs::metadata(&file).unwrap().len();
        let tensors = tensors(&file);
        assert!(bytes < 48_000 || tensors.len() == 1, "shard {shard} of {} tensors: {bytes}", tensors.len());
        for (name, tensor) in tensors {
            assert_eq!(tensor, whole[&name]);
            assert_eq!(index["weight_map"][&name], file.file_name().unwrap().to_str().unwrap());
            seen += 1;
        }
    }
    assert_eq!(seen, whole.len());
    assert_eq!(fs::read_to_string(out.join("tokenizer.json")).unwrap(), "{\"a\": \"tokenizer\"}");
    // Nothing else, and nothing half done.
    let beside = fs::read_dir(&scene.base).unwrap().filter(|entry| {
        entry.as_ref().unwrap().path().extension().is_none_or(|ending| ending != "safetensors")
    });
    let expected = report.shards + 1 + beside.count();
    assert_eq!(fs::read_dir(&out).unwrap().count(), expected);
    assert!(logits(&out, None, None).iter().all(|logit| logit.is_finite()));
}

#[test]
fn one_tensor_at_a_time_is_in_memory() {
    let _alone = alone();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny-llama-14m");
    let place = tempfile::tempdir().unwrap();
    let whole: usize = ModelConfig::load(&base).unwrap().parameters();
    let largest = 8192 * 384;
    for (form, allowed) in [
        // The largest tensor is copied in pieces of 4 MiB; a weight is there as base, folded and bytes.
        (Form::Stored, 4 * largest),
        (Form::F32, 4 * largest + (16 << 20)),
        // The shard that is being filled comes on top: 2 MiB here, and the weight beside it.
        (Form::Nf4(Nf4Options::default()), 4 * largest + (8 << 20)),
    ] {
        let out = place.path().join(format!("{}", allowed + usize::from(form == Form::F32)));
        let model = FoldedModel::open(&base, None, 1).unwrap();
        let options = MergeOptions { shard_bytes: 2 << 20, ..options(&base, &out, form) };
        let before = LIVE.load(Relaxed);
        PEAK.store(before, Relaxed);
        let report = merge(&model, &options, &mut |_, _| {}).unwrap();
        let peak = PEAK.load(Relaxed) - before;
        assert!(report.shards > 3, "{form:?}: {report:?}");
        assert!(peak < allowed, "{form:?}: {peak} bytes, {allowed} are allowed");
        assert!(allowed < 4 * whole, "the bound says something");
    }
}

#[test]
fn a_merge_into_4_bits_is_what_bitsandbytes_stores_and_says_what_it_lost() {
    let _alone = alone();
    let scene = Scene::new("models/llama", "adapters/lora_all_linear/llama/adapter", false);
    let nf4 = Nf4Options::default();
    let (exact, _) = scene.merge(Form::F32);
    let (out, report) = scene.merge(Form::Nf4(nf4));
    // Reading it gives what quantising the exact merge gives.
    assert_eq!(logits(&out, None, Some(nf4)), logits(&exact, None, Some(nf4)));
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["bnb_4bit_quant_type"], "nf4");
    assert_eq!(report.tensors.len(), 14);
    for tensor in &report.tensors {
        // NF4's own error on normal numbers is about 9 % of their size.
        assert!((0.05..0.15).contains(&tensor.loss), "{tensor:?}");
        assert!(tensor.change > 0.0 && tensor.loss_of_change > 0.0);
    }
    // What is in 4 bits and does not change stays bit for bit.
    let model = FoldedModel::open(&out, None, 1).unwrap();
    let same = scene.place.path().join("same");
    merge(&model, &options(&out, &same, Form::Nf4(nf4)), &mut |_, _| {}).unwrap();
    let file = "model.safetensors";
    assert_eq!(tensors(&same.join(file)), tensors(&out.join(file)));
    // Out of the 4-bit base again: dequantised floats.
    let model = FoldedModel::open(&out, None, 1).unwrap();
    let wide = scene.place.path().join("wide");
    merge(&model, &options(&out, &wide, Form::F32), &mut |_, _| {}).unwrap();
    let error = relative(&logits(&wide, None, None), &logits(&out, None, Some(nf4)));
    assert!(error < 1e-5, "{error:e}");
    assert_eq!(verify(&scene.model(), &out).unwrap_err().diagnostic().code, "SH0450");
}

#[test]
fn an_adapter_comes_out_again() {
    let _alone = alone();
    let scene = Scene::new("models/llama", "adapters/lora_all_linear/llama/adapter", false);
    let (merged, _) = scene.merge(Form::F32);
    let model = FoldedModel::open(&merged, Some(&scene.adapter), 1).unwrap();
    let out = scene.place.path().join("again");
    let take_out = MergeOptions { take_out: true, ..options(&merged, &out, Form::Stored) };
    merge(&model, &take_out, &mut |_, _| {}).unwrap();
    let (found, base) =
        (tensors(&out.join("model.safetensors")), tensors(&scene.base.join("model.safetensors")));
    for (name, tensor) in &base {
        let error = relative(&found[name].f32(), &tensor.f32());
        assert!(error < 1e-6, "{name}: {error:e}");
    }
    // A number that was changed afterwards is found.
    let file = merged.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let offset = json["model.layers.0.mlp.up_proj.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[header + offset + 2] ^= 0x40;
    fs::write(&file, bytes).unwrap();
    let error = verify(&scene.model(), &merged).unwrap_err();
    assert_eq!(error.diagnostic().code, "SH0455", "{error}");
}

#[test]
fn a_model_is_not_written_over() {
    let _alone = alone();
    let scene = Scene::new("models/llama", "adapters/lora_all_linear/llama/adapter", false);
    let (out, _) = scene.merge(Form::F32);
    let before = fs::read(out.join("model.safetensors")).unwrap();
    for taken in [&out, &scene.base] {
        let again = merge(&scene.model(), &options(&scene.base, taken, Form::Bf16), &mut |_, _| {});
        assert_eq!(again.unwrap_err().diagnostic().code, "SH0456");
    }
    assert_eq!(fs::read(out.join("model.safetensors")).unwrap(), before);
}
