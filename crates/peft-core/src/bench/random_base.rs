//! A base of random numbers, for measuring: no file is read.

use half::bf16;
use rayon::prelude::*;

use crate::{
    error::Result,
    model::{BaseSource, EmbeddingView, LayerWeights, LinearWeights, Matrix, ModelConfig, Projection},
    quant::{
        Nf4Options, double,
        packed::{PackedLayer, PackedShape, ScalesMut},
    },
    random,
};

/// Sizes of a Llama.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Features of the residual stream.
    pub hidden: usize,
    /// Features inside the feed-forward half.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Vocabulary.
    pub vocabulary: usize,
    /// Query heads; eight key heads, or as many where there are fewer.
    pub heads: usize,
}

impl Shape {
    /// Llama 3's shapes by name: `1b`, `3b`, `8b`, `70b`.
    pub fn named(name: &str) -> Option<Self> {
        let [hidden, intermediate, layers, heads] = match name {
            "1b" => [2048, 8192, 16, 32],
            "3b" => [3072, 8192, 28, 24],
            "8b" => [4096, 14336, 32, 32],
            "70b" => [8192, 28672, 80, 64],
            _ => return None,
        };
        Some(Self { hidden, intermediate, layers, vocabulary: 128_256, heads })
    }

    /// What a `config.json` says of it.
    pub(super) fn config_json(&self) -> String {
        let Self { hidden, intermediate, layers, vocabulary, heads } = *self;
        let kv_heads = heads.min(8);
        format!(
            r#"{{"model_type": "llama", "vocab_size": {vocabulary}, "hidden_size": {hidden},
            "intermediate_size": {intermediate}, "num_hidden_layers": {layers}, "num_attention_heads": {heads},
            "num_key_value_heads": {kv_heads}, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
            "hidden_act": "silu"}}"#
        )
    }

    /// Bytes of a base of this shape: NF4 with double quantisation, embedding and head in bf16.
    pub fn base_bytes(&self) -> u64 {
        let kv = self.hidden / self.heads * self.heads.min(8);
        let linear = self.layers
            * (2 * self.hidden * self.hidden + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate);
        let tables = 4 * self.vocabulary * self.hidden;
        // Codes, scales of 8 bits, and what those are scaled by.
        (linear / 2 + linear / 64 + linear / 64 / 64 + tables + 8 * self.layers * self.hidden) as u64
    }
}

/// A Llama of random numbers in NF4, with embedding and head in bf16.
pub struct RandomBase {
    config: ModelConfig,
    layers: Vec<PackedLayer>,
    norm: Vec<f32>,
    embedding: Vec<bf16>,
    head: Vec<bf16>,
}

impl RandomBase {
    /// A base of a shape, in blocks of `block_size`.
    ///
    /// # Errors
    /// When the shape is none of a Llama.
    pub fn new(shape: Shape, block_size: usize) -> Result<Self> {
        let Shape { hidden, layers, vocabulary, .. } = shape;
        let config = shape.config_json();
        let config = ModelConfig::from_json(config.as_bytes(), "config.json".as_ref())?;
        let options = Nf4Options { block_size, double: true };
        let shapes: Vec<PackedShape> = Projection::ALL
            .iter()
            .map(|&projection| {
                let [rows, columns] = config.shape(projection);
                PackedShape { rows, columns, options }
            })
            .collect();
        let layers = (0..layers)
            .into_par_iter()
            .map(|layer| {
                let mut packed = PackedLayer::new(&shapes);
                for (index, shape) in shapes.iter().enumerate() {
                    let parts = packed.parts_mut(index);
                    noise((layer * 7 + index) as u64, parts.codes);
                    let ScalesMut::Double { codes, nested } = parts.scales else { continue };
                    noise((layer * 7 + index + 1000) as u64, codes);
                    let width = (3.0 / shape.columns as f32).sqrt();
                    nested.fill(0.3 * width);
                    packed.set_double(index, width, &double::DYNAMIC_MAP);
                }
                packed
            })
            .collect();
        let table = |name: &str, bound: f32| -> Vec<bf16> {
            let mut numbers = vec![0.0; vocabulary * hidden];
            random::fill_uniform(5, name, bound, &mut numbers);
            numbers.par_iter().map(|number| bf16::from_f32(*number)).collect()
        };
        Ok(Self {
            norm: vec![1.0; hidden],
            embedding: table("embedding", 1.0),
            head: table("head", (3.0 / hidden as f32).sqrt()),
            config,
            layers,
        })
    }
}

/// Random bytes, quickly.
pub(super) fn noise(seed: u64, out: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for chunk in out.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let length = chunk.len();
        chunk.copy_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes()[..length]);
    }
}

impl BaseSource for RandomBase {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn prefetch(&mut self, _layer: usize) {}

    fn layer(&mut self, layer: usize) -> Result<LayerWeights<'_>> {
        let linear = |projection: Projection| LinearWeights {
            weight: Matrix::Nf4(self.layers[layer].view(projection.index())),
            bias: None,
        };
        Ok(LayerWeights {
            input_norm: &self.norm,
            query_norm: None,
            key_norm: None,
            attention_output_norm: None,
            mlp_norm: &self.norm,
            mlp_output_norm: None,
            linears: LayerWeights::by_projection(&self.config, linear),
        })
    }

    fn embedding(&self) -> EmbeddingView<'_> {
        EmbeddingView::from_bf16(&self.embedding, self.config.hidden_size)
    }

    fn final_norm(&self) -> &[f32] {
        &self.norm
    }

    fn head(&self) -> EmbeddingView<'_> {
        EmbeddingView::from_bf16(&self.head, self.config.hidden_size)
    }
}
