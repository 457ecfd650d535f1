//! Whole bases: loaded, hashed, measured.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod common;

use std::{fs, path::Path};

use common::{assert_bits, copy_folder, expected, reference, tensors};
use safetensors::tensor::Dtype;
use shanty_peft_core::{
    model::{
        BaseSource, MemoryUse, ModelConfig, Projection, ResidentBase, export,
        weights::{ModelFiles, PIECE},
    },
    quant::{
        Nf4Options, Scales,
        bitsandbytes::{self, StoredWeight},
        double, nf4,
    },
};

fn load(folder: &Path, nf4: Option<Nf4Options>) -> ResidentBase {
    ResidentBase::load(folder, nf4, &mut |_| {}).unwrap()
}

fn numbers(base: &ResidentBase, layer: usize, projection: Projection) -> Vec<f32> {
    let weight = base.weights(layer).linear(projection).weight;
    let mut out = vec![f32::NAN; weight.rows() * weight.columns()];
    weight.write_f32(&mut out);
    out
}

#[test]
fn a_dense_base_holds_the_numbers_of_its_file() {
    for model in ["models/llama", "models/llama_tied", "models/llama_rope3"] {
        let base = load(&reference(model), None);
        let stored = tensors(&reference(model).join("model.safetensors"));
        for layer in 0..base.config().layers {
            for projection in Projection::ALL {
                let name = format!("{}.weight", projection.module(layer));
                assert_bits(&numbers(&base, layer, projection), &stored[&name].f32(), &name);
            }
            let weights = base.weights(layer);
            let name = format!("model.layers.{layer}.post_attention_layernorm.weight");
            assert_bits(weights.mlp_norm, &stored[&name].f32(), &name);
            let name = format!("model.layers.{layer}.input_layernorm.weight");
            assert_bits(weights.input_norm, &stored[&name].f32(), &name);
        }
        let head = if base.config().tied_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        for (view, name) in [(base.embedding(), "model.embed_tokens.weight"), (base.head(), head)] {
            let expected = stored[name].f32();
            let mut rows = vec![f32::NAN; view.rows() * view.columns()];
            view.rows_f32(0..view.rows(), &mut rows);
            assert_bits(&rows, &expected, name);
            let mut row = vec![f32::NAN; view.columns()];
            view.gather_row(7, &mut row);
            assert_bits(&row, &expected[7 * view.columns()..8 * view.columns()], name);
            // Kept as stored: no widened copy of a bf16 table.
            assert_eq!(view.as_bf16().is_some(), stored[name].dtype == Dtype::BF16, "{model} {name}");
        }
        assert_bits(base.final_norm(), &stored["model.norm.weight"].f32(), "norm");
        assert!(base.unused_tensors().is_empty());
    }
}

#[test]
fn pre_quantised_bases_load_without_requantising() {
    for case in ["nf4/checkpoint_double", "nf4/checkpoint_plain"] {
        let folder = reference(case).join("model");
        let expected = expected(case);
        // As it is, and widened while loading: the same bits.
        for nf4 in [Some(Nf4Options::default()), None] {
            let base = load(&folder, nf4);
            for projection in Projection::ALL {
                let name = format!("{}.weight", projection.module(0));
                let expected = expected[&format!("dequantised_f32.{name}")].f32();
                assert_bits(&numbers(&base, 0, projection), &expected, &name);
            }
            assert_eq!(base.packed(0).entries().is_empty(), nf4.is_none());
        }
        let base = load(&folder, Some(Nf4Options::default()));
        let stored = tensors(&folder.join("model.safetensors"));
        for (index, projection) in Projection::ALL.iter().enumerate() {
            let codes = &stored[&format!("{}.weight", projection.module(1))].bytes;
            assert_eq!(base.packed(1).view(index).codes(), codes);
        }
    }
}

#[test]
fn what_bitsandbytes_wrote_is_written_again_byte_for_byte() {
    for folder in ["nf4/checkpoint_double/model", "nf4/checkpoint_plain/model", "training/base_nf4"] {
        let base = load(&reference(folder), Some(Nf4Options::default()));
        let stored = tensors(&reference(folder).join("model.safetensors"));
        let mut written = 0;
        for layer in 0..base.config().layers {
            for (index, projection) in Projection::ALL.iter().enumerate() {
                let name = format!("{}.weight", projection.module(layer));
                let files = ModelFiles::open(&reference(folder)).unwrap();
                let dtype = StoredWeight::open(&files, &name, base.config().shape(*projection)).unwrap();
                let dtype = dtype.dtype();
                for tensor in bitsandbytes::to_tensors(&name, &base.packed(layer).view(index), dtype) {
                    let expected = &stored[&tensor.name];
                    assert_eq!(
                        (tensor.dtype, &tensor.shape),
                        (expected.dtype, &expected.shape),
                        "{}",
                        tensor.name
                    );
                    assert_eq!(tensor.bytes, expected.bytes, "{}", tensor.name);
                    written += 1;
                }
            }
        }
        let expected = stored.keys().filter(|name| name.contains("_proj.")).count();
        assert_eq!(written, expected, "{folder}");
    }
}

/// `training/base_f32` holds the dequantised weights of `training/base_nf4`: widened while loading, ours are the same;
/// quantised again, they fall on the same codes.
#[test]
fn the_nf4_base_of_the_training_runs_is_its_dense_twin() {
    let (stored, twin) = (reference("training/base_nf4"), reference("training/base_f32"));
    let (widened, dense) = (load(&stored, None), load(&twin, None));
    let (stored, again) =
        (load(&stored, Some(Nf4Options::default())), load(&twin, Some(Nf4Options::default())));
    for layer in 0..2 {
        for (index, projection) in Projection::ALL.into_iter().enumerate() {
            let expected = numbers(&dense, layer, projection);
            assert_bits(&numbers(&widened, layer, projection), &expected, "widened");
            assert_bits(&numbers(&stored, layer, projection), &expected, "as stored");
            assert_eq!(stored.packed(layer).view(index).codes(), again.packed(layer).view(index).codes());
        }
    }
}

/// Quantised while it is read, piece by piece, a base equals its tensors quantised whole. The MLP is longer than a piece.
#[test]
fn quantising_while_loading_equals_quantising_whole() {
    let folder = tempfile::tempdir().unwrap();
    let mut all = tensors(&reference("models/llama_tied").join("model.safetensors"));
    let (hidden, intermediate) = (64, 17_011);
    assert!(hidden * intermediate > PIECE);
    for name in ["gate_proj", "up_proj", "down_proj"] {
        let name = format!("model.layers.2.mlp.{name}.weight");
        let shape =
            if name.contains("down") { vec![hidden, intermediate] } else { vec![intermediate, hidden] };
        let values = (0..hidden * intermediate).map(|i| half::bf16::from_f32((i as f32 * 0.731).sin()));
        let bytes = values.flat_map(half::bf16::to_le_bytes).collect();
        all.insert(name.replace("layers.2", "layers.0"), common::Stored { dtype: Dtype::BF16, shape, bytes });
    }
    let views = all.iter().map(|(name, tensor)| {
        let view = safetensors::tensor::TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
        (name, view.unwrap())
    });
    fs::write(folder.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let config = fs::read_to_string(reference("models/llama_tied").join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["intermediate_size"] = intermediate.into();
    config["num_hidden_layers"] = 1.into();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    for options in [Nf4Options::default(), Nf4Options { block_size: 4096, double: false }] {
        let base = load(folder.path(), Some(options));
        for (index, projection) in Projection::ALL.into_iter().enumerate() {
            let values = all[&format!("{}.weight", projection.module(0))].f32();
            let mut codes = vec![0; nf4::code_bytes(values.len())];
            let mut scales = vec![0.0; nf4::blocks(values.len(), options.block_size)];
            assert!(nf4::quantise(&values, options.block_size, &mut codes, &mut scales));
            let view = base.packed(0).view(index);
            assert!(view.codes() == codes);
            match view.scales() {
                Scales::Plain(found) => assert_bits(found, &scales, "scales"),
                Scales::Double { codes, nested, offset, .. } => {
                    let expected = double::quantise(&scales);
                    assert_eq!((nested, offset), (&expected.nested[..], expected.offset));
                    assert!(codes == expected.codes);
                }
            }
        }
        let dense = load(folder.path(), None);
        assert_bits(
            &numbers(&dense, 0, Projection::Down),
            &all["model.layers.0.mlp.down_proj.weight"].f32(),
            "dense",
        );
    }
}

#[test]
fn a_sharded_model_equals_the_single_file_down_to_its_hash() {
    let folder = tempfile::tempdir().unwrap();
    let source = reference("models/llama");
    fs::copy(source.join("config.json"), folder.path().join("config.json")).unwrap();
    shard(&source.join("model.safetensors"), folder.path(), 3);
    for nf4 in [None, Some(Nf4Options::default())] {
        let (single, sharded) = (load(&source, nf4), load(folder.path(), nf4));
        assert_eq!(single.content_hash(), sharded.content_hash());
        for projection in Projection::ALL {
            assert_bits(&numbers(&sharded, 1, projection), &numbers(&single, 1, projection), "shards");
        }
    }
}

/// Spreads the tensors of a file over shards, as transformers names them.
fn shard(file: &Path, folder: &Path, shards: usize) {
    let all = tensors(file);
    let mut weight_map = serde_json::Map::new();
    for shard in 0..shards {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        let own: Vec<_> = all.iter().enumerate().filter(|(index, _)| index % shards == shard).collect();
        let views = own.iter().map(|(_, (name, tensor))| {
            weight_map.insert((*name).clone(), name_of(shard, shards).into());
            let view =
                safetensors::tensor::TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)
                    .unwrap();
            ((*name).clone(), view)
        });
        fs::write(folder.join(&name), safetensors::serialize(views, None).unwrap()).unwrap();
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn name_of(shard: usize, shards: usize) -> String {
    format!("model-{:05}-of-{shards:05}.safetensors", shard + 1)
}

#[test]
fn the_hash_covers_every_number_and_nothing_unread() {
    let source = reference("models/llama_tied");
    let before = load(&source, None).content_hash();
    assert_eq!(before, load(&source, Some(Nf4Options::default())).content_hash());
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&source, folder.path());
    let file = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, &bytes).unwrap();
    assert_ne!(before, load(folder.path(), None).content_hash());
    bytes[last] ^= 1;
    fs::write(&file, &bytes).unwrap();
    assert_eq!(before, load(folder.path(), None).content_hash());
    // The context length changes no number, the norms' epsilon does.
    let config = fs::read_to_string(source.join("config.json")).unwrap();
    let write = |text: String| fs::write(folder.path().join("config.json"), text).unwrap();
    write(config.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 512"));
    assert_eq!(before, load(folder.path(), None).content_hash());
    write(config.replace("1e-06", "1e-05"));
    assert_ne!(before, load(folder.path(), None).content_hash());
}

#[test]
fn memory_is_known_before_loading() {
    for folder in ["models/llama", "models/llama_tied", "nf4/checkpoint_double/model", "training/base_nf4"] {
        for nf4 in [None, Some(Nf4Options::default()), Some(Nf4Options { block_size: 128, double: false })] {
            let folder = reference(folder);
            assert_eq!(
                MemoryUse::plan(&folder, nf4).unwrap(),
                load(&folder, nf4).memory(),
                "{folder:?} {nf4:?}"
            );
        }
    }
}

#[test]
fn progress_ends_at_the_whole() {
    let (mut last, mut total) = (0, 0);
    let folder = reference("models/llama");
    ResidentBase::load(&folder, None, &mut |progress| {
        assert!(progress.done_bytes > last && progress.done_bytes <= progress.total_bytes);
        (last, total) = (progress.done_bytes, progress.total_bytes);
    })
    .unwrap();
    assert_eq!(last, total);
    let stored: usize =
        tensors(&folder.join("model.safetensors")).values().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(total, stored as u64);
}

#[test]
fn both_forms_of_configuration_describe_the_same_decoder() {
    for model in ["llama", "llama_tied", "llama_rope3"] {
        let read = |name: &str| {
            let file = reference("models").join(model).join(name);
            ModelConfig::from_json(&fs::read(&file).unwrap(), &file).unwrap()
        };
        assert_eq!(read("config.json"), read("config_v4.json"), "{model}");
    }
}

#[test]
fn a_tied_model_reports_the_head_it_does_not_read() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&reference("models/llama"), folder.path());
    let config = folder.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true"))
        .unwrap();
    assert_eq!(load(folder.path(), None).unused_tensors(), ["lm_head.weight"]);
    assert!(ModelFiles::open(folder.path()).unwrap().find("lm_head.weight").is_some());
}

#[test]
fn a_saved_nf4_base_is_the_one_that_transformers_saved() {
    let target = tempfile::tempdir().unwrap();
    // What was pre-quantised comes out with every tensor unchanged.
    let source = reference("nf4/checkpoint_double/model");
    export::save_nf4(&source, target.path(), Nf4Options::default()).unwrap();
    let saved = tensors(&target.path().join("model.safetensors"));
    assert!(saved == tensors(&source.join("model.safetensors")));
    let config = |folder: &Path| -> serde_json::Value {
        serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
    };
    assert_eq!(config(target.path()), config(&source));
    // What was dense loads as it would have been quantised while loading.
    for options in [Nf4Options::default(), Nf4Options { block_size: 128, double: false }] {
        let target = tempfile::tempdir().unwrap();
        let source = reference("models/llama_tied");
        export::save_nf4(&source, target.path(), options).unwrap();
        let settings = &config(target.path())["quantization_config"];
        assert_eq!(settings["bnb_4bit_use_double_quant"], options.double);
        let (saved, direct) =
            (load(target.path(), Some(Nf4Options::default())), load(&source, Some(options)));
        assert!(saved.config().stored_nf4 && saved.unused_tensors().is_empty());
        for projection in Projection::ALL {
            assert_bits(&numbers(&saved, 1, projection), &numbers(&direct, 1, projection), "saved");
        }
        assert_eq!(saved.memory(), direct.memory());
    }
}
