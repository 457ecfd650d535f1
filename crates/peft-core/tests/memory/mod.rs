//! What the tests share: reference files, a base in plain memory, comparison by largest difference.

#![allow(dead_code, reason = "each test uses its part")]

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use shanty_peft_core::{
    Engine, Result,
    adapter::{LoraConfig, SharedMethod, TargetModules},
    batch::{Row, Segment},
    engine::EngineParts,
    model::{
        BaseSource, DenseView, EmbeddingView, LayerWeights, LinearWeights, Matrix, ModelConfig, Norm,
        Projection,
    },
    plan::{PlanRequest, Recompute},
};

/// A folder of the reference numbers.
pub fn reference(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/reference").join(path)
}

/// The tensors of a file.
pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All numbers of a tensor as f32.
pub fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// All numbers of a tensor as i64.
pub fn integers(tensor: &Tensor) -> Vec<i64> {
    tensor.to_dtype(DType::I64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Parsed `case.json`.
pub fn case(path: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(reference(path).join("case.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The tolerance of a kind of tensor in a case.
pub fn tolerance(case: &serde_json::Value, name: &str) -> f64 {
    case["tolerance"][name].as_f64().unwrap_or_else(|| panic!("no tolerance for {name}"))
}

/// Fails where `max|got - expected| > tolerance * max|expected|`.
pub fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths differ");
    let largest = expected.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
    let mut worst = 0.0_f64;
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(got.is_finite(), "{what}[{index}] is {got}");
        worst = worst.max(f64::from((got - expected).abs()));
    }
    let relative = worst / f64::from(largest).max(f64::MIN_POSITIVE);
    assert!(
        relative <= tolerance,
        "{what}: differs by {relative:.3e} of the largest, {tolerance:.0e} is allowed"
    );
}

/// A base in plain memory, all f32.
pub struct MemoryBase {
    pub config: ModelConfig,
    pub tensors: HashMap<String, Vec<f32>>,
}

impl MemoryBase {
    /// Reads a folder with one safetensors file, widened to f32.
    pub fn load(folder: &Path) -> Self {
        let config = ModelConfig::load(folder).unwrap();
        let tensors = tensors(&folder.join("model.safetensors"));
        let mut tensors: HashMap<String, Vec<f32>> =
            tensors.into_iter().map(|(name, tensor)| (name, floats(&tensor))).collect();
        for (name, numbers) in &mut tensors {
            if config.norms_less_one && name.contains("norm") {
                numbers.iter_mut().for_each(|number| *number += 1.0);
            }
        }
        Self { config, tensors }
    }

    /// Random numbers for every tensor of a configuration.
    pub fn random(config: ModelConfig, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut tensors = HashMap::new();
        for layer in 0..config.layers {
            for &projection in config.projections() {
                let [rows, columns] = config.shape(projection);
                let bound = 1.7 / (columns as f32).sqrt();
                let name = projection.module(layer);
                tensors.insert(format!("{name}.weight"), random.numbers(rows * columns, bound));
                if config.has_bias(projection) {
                    tensors.insert(format!("{name}.bias"), random.numbers(rows, 0.5));
                }
            }
            for norm in config.norms() {
                let name = format!("{}.weight", config.norm_module(layer, norm));
                tensors.insert(name, random.around_one(config.norm_features(norm)));
            }
        }
        tensors.insert("model.norm.weight".into(), random.around_one(config.hidden_size));
        let table = config.vocabulary_size * config.hidden_size;
        tensors.insert("model.embed_tokens.weight".into(), random.numbers(table, 1.0));
        if !config.tied_embeddings {
            tensors.insert("lm_head.weight".into(), random.numbers(table, 0.3));
        }
        Self { config, tensors }
    }

    pub fn get(&self, name: &str) -> &[f32] {
        self.tensors.get(name).unwrap_or_else(|| panic!("the base has no {name}"))
    }

    fn linear(&self, layer: usize, projection: Projection) -> LinearWeights<'_> {
        let [rows, columns] = self.config.shape(projection);
        let name = projection.module(layer);
        let weight = Matrix::Dense(DenseView::new(self.get(&format!("{name}.weight")), rows, columns));
        LinearWeights { weight, bias: self.tensors.get(&format!("{name}.bias")).map(Vec::as_slice) }
    }
}

impl BaseSource for MemoryBase {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn prefetch(&mut self, _layer: usize) {}

    fn layer(&mut self, layer: usize) -> Result<LayerWeights<'_>> {
        let norm = |norm| self.get(&format!("{}.weight", self.config.norm_module(layer, norm)));
        let some = |wanted| self.config.norms().find(|norm| *norm == wanted).map(norm);
        Ok(LayerWeights {
            input_norm: norm(Norm::AttentionInput),
            query_norm: some(Norm::Query),
            key_norm: some(Norm::Key),
            attention_output_norm: some(Norm::AttentionOutput),
            mlp_norm: norm(Norm::MlpInput),
            mlp_output_norm: some(Norm::MlpOutput),
            linears: LayerWeights::by_projection(&self.config, |projection| self.linear(layer, projection)),
        })
    }

    fn embedding(&self) -> EmbeddingView<'_> {
        EmbeddingView::from_f32(self.get("model.embed_tokens.weight"), self.config.hidden_size)
    }

    fn final_norm(&self) -> &[f32] {
        self.get("model.norm.weight")
    }

    fn head(&self) -> EmbeddingView<'_> {
        if self.config.tied_embeddings {
            return self.embedding();
        }
        EmbeddingView::from_f32(self.get("lm_head.weight"), self.config.hidden_size)
    }
}

/// What a test's engine is made of.
pub struct Setup {
    pub adapter: Option<SharedMethod>,
    pub recompute: Recompute,
    pub rows: usize,
    pub max_length: usize,
    pub threads: usize,
}

impl Setup {
    pub fn new(adapter: Option<SharedMethod>) -> Self {
        Self { adapter, recompute: Recompute::Never, rows: 4, max_length: 32, threads: 2 }
    }

    pub fn engine(&self, base: MemoryBase) -> Engine {
        let request = PlanRequest {
            micro_batch_rows: Some(self.rows),
            max_length: self.max_length,
            recompute: self.recompute,
            memory_limit: None,
            base_bytes: 0,
            dequantised: false,
            head_widened: false,
            dropout: false,
            threads: self.threads,
            accelerated: false,
            half_activations: false,
            reduced_apart: false,
            host_limit: None,
            embedding_bytes: 0,
        };
        let parts = EngineParts { adapter: self.adapter.clone(), request };
        Engine::with_base(Box::new(base), parts).unwrap()
    }
}

/// LoRA of rank `r`, scale `scale` and dropout `p` on the modules named.
pub fn lora(modules: TargetModules, r: usize, scale: f64, p: f32) -> LoraConfig {
    LoraConfig {
        r,
        lora_alpha: scale * r as f64,
        lora_dropout: p,
        target_modules: modules,
        ..LoraConfig::default()
    }
}

/// The rows of a padded batch of the reference: padding is cut off, labels become trained ranges.
pub fn padded_rows(ids: &Tensor, mask: &Tensor, labels: Option<&Tensor>) -> Vec<Row> {
    let (rows, columns) = ids.dims2().unwrap();
    let (ids, mask) = (integers(ids), integers(mask));
    let labels = labels.map(integers);
    (0..rows)
        .map(|row| {
            let kept: Vec<usize> =
                (0..columns).map(|column| row * columns + column).filter(|&at| mask[at] != 0).collect();
            let trained = match &labels {
                None => Vec::new(),
                Some(labels) => (1..kept.len() as u32)
                    .filter(|&position| labels[kept[position as usize]] != -100)
                    .map(|position| position..position + 1)
                    .collect(),
            };
            Row {
                id: row as u64,
                token_ids: kept.iter().map(|&at| ids[at] as u32).collect(),
                segments: vec![Segment { sample_id: row as u64, length: kept.len() as u32 }],
                trained,
            }
        })
        .collect()
}

/// Numbers drawn evenly, the same on every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn number(&mut self, bound: f32) -> f32 {
        ((self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * bound
    }

    pub fn numbers(&mut self, count: usize, bound: f32) -> Vec<f32> {
        (0..count).map(|_| self.number(bound)).collect()
    }

    pub fn around_one(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| 1.0 + self.number(0.5)).collect()
    }

    pub fn below(&mut self, limit: u32) -> u32 {
        (self.next() % u64::from(limit)) as u32
    }
}

/// Four rows of the reference vocabulary: whole ones, one of three segments of which parts are trained, one that trains a few tokens.
pub fn rows() -> Vec<Row> {
    let mut random = Random::new(11);
    let mut ids = |count: u32| (0..count).map(|_| random.below(288)).collect::<Vec<u32>>();
    let segments = vec![
        Segment { sample_id: 5, length: 30 },
        Segment { sample_id: 6, length: 41 },
        Segment { sample_id: 7, length: 20 },
    ];
    vec![
        Row::whole(0, ids(96)),
        Row { id: 1, token_ids: ids(91), segments, trained: vec![10..30, 35..71, 80..91] },
        Row::whole(2, ids(17)),
        Row { trained: std::iter::once(60..64).collect(), ..Row::whole(3, ids(64)) },
    ]
}

/// The bits of each number.
pub fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}
