//! Every gradient of a whole decoder of every family beside candle's autograd: random weights, random non-zero A and B,
//! biases, grouped heads, packed rows of unequal trained tokens, dropout on with the same masks.
//!
//! The oracle uses differentiable operations only (`RmsNorm::forward_diff`, `ops::softmax`, `rope_slow`): several of
//! candle's stock operations cut gradients without a word.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{Module, ops, rotary_emb::rope_slow};
use memory::{MemoryBase, Random, Setup, assert_close, floats, lora};
use shanty_peft_core::{
    NoSink, StepKey,
    adapter::TargetModules,
    batch::{Row, Segment},
    model::{Activation, ModelConfig, Norm, Projection},
    plan::Recompute,
    random::{DropoutKey, dropout_scales},
};

/// f32 products of a few hundred terms in another order: 2e-5 of the largest leaves a factor of ten to what is seen.
const TOLERANCE: f64 = 2e-5;

fn config(bias: bool) -> ModelConfig {
    let text = format!(
        r#"{{"model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "hidden_act": "silu", "rope_theta": 10000.0,
            "tie_word_embeddings": false, "attention_bias": {bias}, "mlp_bias": {bias}}}"#
    );
    ModelConfig::from_json(text.as_bytes(), "config.json".as_ref()).unwrap()
}

/// Small windows, so that rows are longer, and caps that bend most scores and logits.
const FAMILIES: [&str; 6] = [
    r#""model_type": "mistral", "sliding_window": 7"#,
    r#""model_type": "qwen2", "use_sliding_window": true, "sliding_window": 40, "max_window_layers": 1"#,
    r#""model_type": "qwen3""#,
    r#""model_type": "qwen3", "attention_bias": true, "tie_word_embeddings": true"#,
    r#""model_type": "gemma", "hidden_act": "gelu""#,
    r#""model_type": "gemma2", "sliding_window": 9, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 5"#,
];

fn family(special: &str) -> ModelConfig {
    let text = format!(
        r#"{{"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512, {special}}}"#
    );
    ModelConfig::from_json(text.as_bytes(), "config.json".as_ref()).unwrap()
}

fn rows(random: &mut Random) -> Vec<Row> {
    let mut row = |id: u64, lengths: &[u32], trained: Vec<std::ops::Range<u32>>| Row {
        id,
        token_ids: (0..lengths.iter().sum()).map(|_| random.below(97)).collect(),
        segments: lengths
            .iter()
            .enumerate()
            .map(|(index, &length)| Segment { sample_id: 10 * id + index as u64, length })
            .collect(),
        trained,
    };
    // One longer than a tile of attention, one packed, one with a single trained token.
    let one = |range| std::iter::once(range).collect();
    vec![row(1, &[150], one(1..150)), row(2, &[9, 1, 20], vec![3..9, 15..28]), row(3, &[5], one(4..5))]
}

/// The decoder in candle; dropout by the engine's own masks, drawn for each token of its sample.
struct Oracle<'a> {
    base: &'a MemoryBase,
    parameters: &'a [(String, Var, Var)],
    scale: f64,
    dropout: f32,
    key: StepKey,
}

impl Oracle<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Tensor {
        Tensor::from_slice(self.base.get(name), shape, &Device::Cpu).unwrap()
    }

    fn linear(&self, layer: usize, projection: Projection, segment: &Segment, x: &Tensor) -> Tensor {
        let shape = self.base.config.shape(projection);
        let name = projection.module(layer);
        let weight = self.tensor(&format!("{name}.weight"), &shape);
        let mut y = x.matmul(&weight.t().unwrap()).unwrap();
        if self.base.config.has_bias(projection) {
            y = y.broadcast_add(&self.tensor(&format!("{name}.bias"), &shape[..1])).unwrap();
        }
        let Some((_, a, b)) = self.parameters.iter().find(|(found, ..)| *found == name) else { return y };
        let module = (layer * 7 + projection.index()) as u32;
        let key = DropoutKey { seed: self.key.seed, step: self.key.step, module };
        let mut mask = vec![0.0; segment.length as usize * shape[1]];
        for (token, mask) in mask.chunks_exact_mut(shape[1]).enumerate() {
            dropout_scales(key, segment.sample_id, token as u32, self.dropout, mask);
        }
        let mask = Tensor::from_vec(mask, (segment.length as usize, shape[1]), &Device::Cpu).unwrap();
        let branch = (x * mask).unwrap().matmul(&a.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
        (y + (branch * self.scale).unwrap()).unwrap()
    }

    fn norm(&self, name: &str, x: &Tensor) -> Tensor {
        let weight = self.tensor(name, &[x.dims().last().copied().unwrap()]);
        candle_nn::RmsNorm::new(weight, self.base.config.norm_epsilon).forward_diff(x).unwrap()
    }

    /// `[tokens, vocabulary]` of one segment.
    fn logits(&self, segment: &Segment, ids: &[u32]) -> Tensor {
        let config = &self.base.config;
        let (tokens, dim) = (ids.len(), config.head_dim);
        let table = self.tensor("model.embed_tokens.weight", &[config.vocabulary_size, config.hidden_size]);
        let ids = Tensor::from_slice(ids, tokens, &Device::Cpu).unwrap();
        let mut x = candle_nn::Embedding::new(table.clone(), config.hidden_size).forward(&ids).unwrap();
        if config.embedding_scale.is_some() {
            x = (x * (config.hidden_size as f64).sqrt()).unwrap();
        }
        let frequencies = config.rope.inverse_frequencies(dim);
        let angles: Vec<f32> =
            (0..tokens).flat_map(|t| frequencies.iter().map(move |f| t as f32 * f)).collect();
        let angles = Tensor::from_vec(angles, (tokens, dim / 2), &Device::Cpu).unwrap();
        let (cosines, sines) = (angles.cos().unwrap(), angles.sin().unwrap());
        let unseen = |window: Option<usize>| {
            let all = (0..tokens).flat_map(|query| (0..tokens).map(move |key| (query, key)));
            let of = |(query, key)| match key <= query && window.is_none_or(|window| query - key < window) {
                true => 0.0,
                false => f32::NEG_INFINITY,
            };
            Tensor::from_vec(all.map(of).collect::<Vec<f32>>(), (tokens, tokens), &Device::Cpu).unwrap()
        };
        let group = config.attention_heads / config.key_value_heads;
        let heads = |x: Tensor, heads: usize| {
            x.reshape((1, tokens, heads, dim)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap()
        };
        for layer in 0..config.layers {
            let linear = |projection, x: &Tensor| self.linear(layer, projection, segment, x);
            let norm = |norm, x: Tensor| match config.norms().any(|there| there == norm) {
                true => self
                    .norm(&format!("{}.weight", config.norm_module(layer, norm)), &x.contiguous().unwrap()),
                false => x,
            };
            let normed = norm(Norm::AttentionInput, x.clone());
            let rotate = |x: Tensor| rope_slow(&x, &cosines, &sines).unwrap();
            let q = heads(linear(Projection::Q, &normed), config.attention_heads);
            let k = heads(linear(Projection::K, &normed), config.key_value_heads);
            let (q, k) = (rotate(norm(Norm::Query, q)), rotate(norm(Norm::Key, k)));
            let v = heads(linear(Projection::V, &normed), config.key_value_heads);
            let repeat = |x: Tensor| {
                let shape = (1, config.key_value_heads, group, tokens, dim);
                x.unsqueeze(2)
                    .unwrap()
                    .broadcast_as(shape)
                    .unwrap()
                    .contiguous()
                    .unwrap()
                    .reshape((1, config.attention_heads, tokens, dim))
                    .unwrap()
            };
            let (k, v) = (repeat(k), repeat(v));
            let scores = q.matmul(&k.t().unwrap().contiguous().unwrap()).unwrap();
            let scores = bounded((scores * config.attention_scale).unwrap(), config.attention_soft_cap);
            let scores = scores.broadcast_add(&unseen(config.windows[layer])).unwrap();
            let weights = ops::softmax(&scores, D::Minus1).unwrap();
            let out = weights.matmul(&v).unwrap().transpose(1, 2).unwrap().reshape((tokens, ())).unwrap();
            x = (x + norm(Norm::AttentionOutput, linear(Projection::O, &out))).unwrap();
            let normed = norm(Norm::MlpInput, x.clone());
            let gate = linear(Projection::Gate, &normed);
            let gate = match config.activation {
                Activation::Silu => ops::silu(&gate).unwrap(),
                Activation::GeluTanh => gelu(&gate),
            };
            let activated = (gate * linear(Projection::Up, &normed)).unwrap();
            x = (x + norm(Norm::MlpOutput, linear(Projection::Down, &activated))).unwrap();
        }
        let head = match config.tied_embeddings {
            true => table,
            false => self.tensor("lm_head.weight", &[config.vocabulary_size, config.hidden_size]),
        };
        let logits = self.norm("model.norm.weight", &x).matmul(&head.t().unwrap()).unwrap();
        bounded(logits, config.logits_soft_cap)
    }

    fn loss(&self, rows: &[Row]) -> Tensor {
        let mut sum = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
        for row in rows {
            let mut start = 0;
            for segment in &row.segments {
                let end = start + segment.length;
                let ids = &row.token_ids[start as usize..end as usize];
                let trained: Vec<u32> = row
                    .trained
                    .iter()
                    .flat_map(|range| range.clone())
                    .filter(|t| (start..end).contains(t))
                    .collect();
                if !trained.is_empty() {
                    let logits = self.logits(segment, ids);
                    let predicting: Vec<u32> = trained.iter().map(|t| t - start - 1).collect();
                    let targets: Vec<u32> = trained.iter().map(|t| row.token_ids[*t as usize]).collect();
                    let count = predicting.len();
                    let index = Tensor::from_vec(predicting, count, &Device::Cpu).unwrap();
                    let targets = Tensor::from_vec(targets, count, &Device::Cpu).unwrap();
                    let logits = logits.index_select(&index, 0).unwrap();
                    let mean = candle_nn::loss::cross_entropy(&logits, &targets).unwrap();
                    sum = (sum + (mean * count as f64).unwrap()).unwrap();
                }
                start = end;
            }
        }
        sum
    }
}

fn bounded(x: Tensor, cap: Option<f64>) -> Tensor {
    match cap {
        Some(cap) => ((x / cap).unwrap().tanh().unwrap() * cap).unwrap(),
        None => x,
    }
}

fn gelu(x: &Tensor) -> Tensor {
    let cube = ((x * x).unwrap() * x).unwrap();
    let inner = ((x + (cube * 0.044_715).unwrap()).unwrap() * (2.0 / std::f64::consts::PI).sqrt()).unwrap();
    ((x * (inner.tanh().unwrap() + 1.0).unwrap()).unwrap() * 0.5).unwrap()
}

fn check(bias: bool, targets: TargetModules, dropout: f32, recompute: Recompute) {
    check_config(config(bias), targets, dropout, recompute);
}

fn check_config(config: ModelConfig, targets: TargetModules, dropout: f32, recompute: Recompute) {
    let mut random = Random::new(7);
    let (r, scale) = (5, 0.7_f32);
    let method = lora(targets, r, f64::from(scale), dropout);
    let fit = method.fit(&config).unwrap();
    let layout = fit.layout().clone();
    let mut parameters = vec![0.0; layout.len()];
    for entry in layout.entries() {
        parameters[entry.range.clone()].copy_from_slice(&random.numbers(entry.range.len(), 0.4));
    }
    let rows = rows(&mut random);
    let key = StepKey { seed: 99, step: 3 };

    let variable = |entry: &shanty_peft_core::adapter::ParameterEntry| {
        let (rows, columns) = (entry.rows(), entry.columns());
        let numbers = &parameters[entry.range.clone()];
        Var::from_tensor(&Tensor::from_slice(numbers, (rows, columns), &Device::Cpu).unwrap()).unwrap()
    };
    let pair =
        |module: &str| ["lora_A.weight", "lora_B.weight"].map(|suffix| layout.find(module, suffix).unwrap());
    let modules = fit.matched().modules();
    let variables: Vec<(String, Var, Var)> = modules
        .iter()
        .map(|module| {
            let [a, b] = pair(module).map(variable);
            (module.clone(), a, b)
        })
        .collect();
    let base = MemoryBase::random(config.clone(), 5);
    let oracle = Oracle { base: &base, parameters: &variables, scale: f64::from(scale), dropout, key };
    let expected_loss = oracle.loss(&rows);
    let gradients = expected_loss.backward().unwrap();

    let setup = Setup { recompute, rows: 3, max_length: 160, ..Setup::new(Some(method.shared())) };
    let mut engine = setup.engine(MemoryBase::random(config, 5));
    // A gradient that is there already must be added to, not overwritten.
    let mut gradient = vec![1.0; layout.len()];
    let sum = engine.forward_backward(&parameters, &rows, key, &mut gradient, &mut NoSink).unwrap();
    assert_eq!(sum.tokens, 149 + 19 + 1);
    let expected_loss = floats(&expected_loss);
    assert_close("loss", &[sum.loss as f32], &expected_loss, 1e-5);
    for (module, a, b) in &variables {
        let [a_entry, b_entry] = pair(module);
        for (entry, variable) in [(a_entry, a), (b_entry, b)] {
            let wanted = floats(gradients.get(variable).expect("the oracle reaches every variable"));
            assert!(
                wanted.iter().any(|g| g.abs() > 1e-4),
                "{}: a gradient of zeros proves nothing",
                entry.peft_name
            );
            let got: Vec<f32> = gradient[entry.range.clone()].iter().map(|g| g - 1.0).collect();
            assert_close(&entry.peft_name, &got, &wanted, TOLERANCE);
        }
    }
    assert_eq!(layout.entries().len(), 2 * variables.len());
}

#[test]
fn every_gradient_with_dropout_and_biases() {
    check(true, TargetModules::all_linear(), 0.3, Recompute::Never);
}

#[test]
fn every_gradient_computed_again() {
    check(true, TargetModules::all_linear(), 0.3, Recompute::Layers);
}

#[test]
fn every_gradient_without_dropout() {
    check(false, TargetModules::all_linear(), 0.0, Recompute::Never);
}

#[test]
fn each_projection_alone_in_the_upper_layers() {
    for projection in Projection::ALL {
        for recompute in [Recompute::Never, Recompute::Layers] {
            let targets = [1, 2].map(|layer| projection.module(layer)).to_vec();
            check(false, TargetModules::Names(targets), 0.2, recompute);
        }
    }
}

#[test]
fn every_gradient_of_every_family() {
    for special in FAMILIES {
        let config = family(special);
        for recompute in [Recompute::Never, Recompute::Layers] {
            check_config(config.clone(), TargetModules::all_linear(), 0.2, recompute);
        }
    }
}

#[test]
fn each_projection_alone_behind_the_norms_of_every_family() {
    for special in FAMILIES {
        for projection in Projection::ALL {
            let config = family(special);
            let targets = TargetModules::Names(vec![projection.module(1)]);
            check_config(config, targets, 0.0, Recompute::Layers);
        }
    }
}
