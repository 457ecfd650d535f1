//! How long a base takes from its folder to being ready, and a folder of random numbers to load.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write as _},
    path::Path,
    time::Instant,
};

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, json};

use super::{Shape, noise, peak_memory};
use crate::{
    engine::{Engine, EngineDevice, EngineOptions},
    error::{Error, Origin, Result},
    quant::Nf4Options,
};

/// What loading took.
#[derive(Debug, Clone, Serialize)]
pub struct LoadBench {
    /// Where the base went: `cpu` or `cuda`.
    pub device: &'static str,
    /// The card, where there is one.
    pub card: Option<String>,
    /// From the folder to an engine that could begin; the median of all runs.
    pub seconds: f64,
    /// Every run, in their order: the first may have read from the disk.
    pub run_seconds: Vec<f64>,
    /// Bytes read from files.
    pub read_bytes: u64,
    /// The bytes by the seconds.
    pub bytes_per_second: f64,
    /// What the base takes where it computes.
    pub base_memory_bytes: u64,
    /// The most memory of the host that the process ever held.
    pub peak_memory_bytes: u64,
    /// The most memory of the card that was reserved.
    pub card_peak_memory_bytes: Option<u64>,
}

/// Times `runs` loads of a folder, one after the other.
///
/// # Errors
/// Where the base cannot be loaded.
pub fn load(
    folder: &Path,
    device: EngineDevice,
    quantization: Option<Nf4Options>,
    threads: usize,
    runs: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<LoadBench> {
    let options = EngineOptions {
        device,
        quantization,
        threads,
        micro_batch_rows: Some(1),
        ..EngineOptions::new(folder, 64)
    };
    let mut run_seconds = Vec::with_capacity(runs);
    let mut bench = LoadBench {
        device: if device == EngineDevice::Cpu { "cpu" } else { "cuda" },
        card: None,
        seconds: f64::NAN,
        run_seconds: Vec::new(),
        read_bytes: 0,
        bytes_per_second: f64::NAN,
        base_memory_bytes: 0,
        peak_memory_bytes: 0,
        card_peak_memory_bytes: None,
    };
    for _ in 0..runs.max(1) {
        let begin = Instant::now();
        let engine = Engine::load(options.clone(), &mut |read| {
            bench.read_bytes = read.done_bytes;
            progress(read.done_bytes, read.total_bytes);
        })?;
        run_seconds.push(begin.elapsed().as_secs_f64());
        bench.base_memory_bytes = engine.plan().base_bytes;
        if let Some((name, peak)) = engine.card() {
            bench.card = Some(name.to_owned());
            bench.card_peak_memory_bytes = Some(peak);
        }
    }
    bench.run_seconds = run_seconds.clone();
    run_seconds.sort_by(f64::total_cmp);
    bench.seconds = run_seconds[run_seconds.len() / 2];
    bench.bytes_per_second = bench.read_bytes as f64 / bench.seconds;
    bench.peak_memory_bytes = peak_memory();
    Ok(bench)
}

/// A tensor to be written: its name and shape.
type Planned = (String, Vec<usize>);

/// Writes a Llama of random bf16 weights to a folder, a file for each layer, in Hugging Face layout but for a tokenizer.
///
/// # Errors
/// Where a file cannot be written.
pub fn write_random(folder: &Path, shape: Shape) -> Result<()> {
    let wrong = |source| Error::Write { origin: Origin::Base, file: folder.to_owned(), source };
    fs::create_dir_all(folder).map_err(wrong)?;
    fs::write(folder.join("config.json"), shape.config_json()).map_err(wrong)?;
    let Shape { hidden, intermediate, layers, vocabulary, heads } = shape;
    let keys = hidden / heads * heads.min(8);
    let tables = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
        ("lm_head.weight".to_owned(), vec![vocabulary, hidden]),
    ];
    let layer = |layer: usize| -> Vec<Planned> {
        let matrices = [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", intermediate, hidden),
            ("mlp.up_proj", intermediate, hidden),
            ("mlp.down_proj", hidden, intermediate),
        ];
        let named = |name: &str| format!("model.layers.{layer}.{name}.weight");
        let matrices = matrices.iter().map(|(name, rows, columns)| (named(name), vec![*rows, *columns]));
        let norms = ["input_layernorm", "post_attention_layernorm"];
        matrices.chain(norms.iter().map(|name| (named(name), vec![hidden]))).collect()
    };
    let files: Vec<Vec<Planned>> = std::iter::once(tables).chain((0..layers).map(layer)).collect();
    let name = |index: usize| format!("model-{:05}-of-{:05}.safetensors", index + 1, files.len());
    let mut places = Map::new();
    for (index, tensors) in files.iter().enumerate() {
        places.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), json!(name(index)))));
    }
    let index = json!({ "metadata": {}, "weight_map": places }).to_string();
    fs::write(folder.join("model.safetensors.index.json"), index).map_err(wrong)?;
    files.par_iter().enumerate().try_for_each(|(index, tensors)| {
        let file = folder.join(name(index));
        write(&file, tensors, index as u64).map_err(|source| Error::Write {
            origin: Origin::Base,
            file: file.clone(),
            source,
        })
    })
}

/// Writes a file of safetensors piece by piece.
fn write(file: &Path, tensors: &[Planned], seed: u64) -> io::Result<()> {
    const PIECE: usize = 1 << 20;
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut out = BufWriter::with_capacity(PIECE, File::create(file)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut piece = vec![0; PIECE];
    let mut left = end;
    let mut number = seed << 32;
    while left > 0 {
        let piece = &mut piece[..left.min(PIECE)];
        noise(number, piece);
        // Of either sign, magnitudes from 2^-7 to 2^-3: no number of bf16 is infinite or none.
        for bits in piece.as_chunks_mut::<2>().0 {
            let number = u16::from_le_bytes(*bits) & 0x81ff | 0x3c00;
            *bits = number.to_le_bytes();
        }
        out.write_all(piece)?;
        left -= piece.len();
        number += 1;
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_folder_loads_and_is_read_whole() {
        let folder = tempfile::tempdir().unwrap();
        let shape = Shape { hidden: 64, intermediate: 96, layers: 2, vocabulary: 50, heads: 4 };
        write_random(folder.path(), shape).unwrap();
        let nf4 = Some(Nf4Options::default());
        let mut last = (0, 0);
        let bench = load(folder.path(), EngineDevice::Cpu, nf4, 1, 2, &mut |done, total| {
            last = (done, total);
        });
        let bench = bench.unwrap();
        let numbers = 2 * 50 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64);
        assert_eq!(bench.read_bytes, 2 * numbers, "every number is read once");
        assert_eq!(last, (bench.read_bytes, bench.read_bytes));
        assert_eq!((bench.device, bench.run_seconds.len()), ("cpu", 2));
        assert_eq!(bench.card_peak_memory_bytes, None);
    }
}
