//! Steps on a card, beside what the card does at best in the same run.

use std::time::Instant;

use serde::Serialize;

use super::{RandomBase, Shape, card_operations::best_product, random_rows};
use crate::{
    adapter::{Fit, LoraConfig, TargetModules},
    backend::cuda::{Cuda, Precision},
    batch::{Row, Segment},
    engine::{Engine, EngineDevice, EngineParts, NoSink, StepKey},
    error::Result,
    model::ModelConfig,
    optim::{AdamWOptions, FlatUpdate, Outcome, Source, groups},
    plan::{self, MemoryPlan, PlanRequest, Recompute, Sizes},
};

/// What is measured on a card.
#[derive(Debug, Clone)]
pub struct CardBenchOptions {
    /// Which card, from 0.
    pub index: usize,
    /// The model.
    pub shape: Shape,
    /// Rank on all linear layers.
    pub r: usize,
    /// Rows of a step.
    pub rows: usize,
    /// Tokens of a row.
    pub length: usize,
    /// Tokens of each sample that a row is packed of; one sample fills it when none.
    pub sample: Option<usize>,
    /// Bytes that a step may take; all that is free when none.
    pub memory_limit: Option<u64>,
    /// Keep activations or compute them again.
    pub recompute: Recompute,
    /// Steps that go before those that are timed. With none, that one step is all: nothing is measured by operation.
    pub warm: usize,
    /// Steps that are timed.
    pub steps: usize,
}

/// What was measured of whole steps: forward, backward, clipping, AdamW.
#[derive(Debug, Clone, Serialize)]
pub struct CardStep {
    /// The card's name.
    pub card: String,
    /// Rows and tokens of a row.
    pub shape: [usize; 2],
    /// Tokens a second, at the median step.
    pub tokens_per_second: f64,
    /// The median step.
    pub step_seconds: f64,
    /// The most bytes that the engine reserved on the card.
    pub peak_memory_bytes: u64,
    /// Bytes of the card in use at the end, as the driver says: context, kernels and other programs included.
    pub device_memory_bytes: u64,
    /// What the base takes.
    pub base_memory_bytes: u64,
    /// Multiplications and additions a second of the model alone: products and attention, nothing computed again.
    pub model_flops_per_second: f64,
    /// The rate of a large product of bf16 in this run, the same unit.
    pub product_flops_per_second: f64,
    /// The time that the model's multiplications would take at that rate, by the step's time.
    pub floor_fraction: f64,
    /// Trained parameters.
    pub trainable_parameters: usize,
    /// Loss per token of the last step: that the step did its work.
    pub loss: f64,
    /// Planned memory by part.
    pub plan: MemoryPlan,
    /// One step by operation, the longest first; the times add up to it.
    pub profile: Vec<Line>,
    /// What of it is attention.
    pub attention_seconds: f64,
    /// What the card needs for the passes of a step when all of it is queued ahead, by the step's time: 1 where the card
    /// never waits for the host.
    pub busy_fraction: f64,
}

/// What an operation took.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// The operation.
    pub operation: String,
    /// Seconds of all its calls.
    pub seconds: f64,
    /// Calls.
    pub calls: u64,
}

/// Steps on a base of random numbers.
pub struct Stepper {
    engine: Engine,
    rows: Vec<Row>,
    number: u64,
}

impl Stepper {
    /// Loads a base of random numbers onto a card, under an adapter at its start.
    ///
    /// # Errors
    /// Where the card cannot be used or a step does not fit it.
    pub fn new(options: &CardBenchOptions) -> Result<Self> {
        let base = RandomBase::new(options.shape, 64)?;
        let device = EngineDevice::Cuda { index: options.index, precision: Precision::Bf16 };
        let parts = EngineParts { adapter: Some(lora(options.r).shared()), request: request(options) };
        let mut engine = Engine::with_base_on(device, Box::new(base), parts)?;
        let rows = random_rows(engine.config(), options.rows, options.length);
        let sample = options.sample.unwrap_or(options.length).clamp(2, options.length.max(2));
        let rows: Vec<Row> = rows.into_iter().map(|row| packed(row, sample)).collect();
        let parameters = engine.initial_parameters(1)?;
        let zeros = vec![0.0; parameters.len()];
        engine.begin(&parameters, &zeros, &zeros)?;
        Ok(Self { engine, rows, number: 0 })
    }

    /// One step.
    ///
    /// # Errors
    /// What fails on the card.
    pub fn step(&mut self) -> Result<Outcome> {
        self.number += 1;
        let tokens =
            self.engine.accumulate(&self.rows, StepKey { seed: 1, step: self.number }, &mut NoSink)?;
        let length = self.engine.layout().len();
        let groups = groups(&AdamWOptions::default(), self.number, 1e-4, &[], length);
        self.engine.update(&FlatUpdate {
            mean: 1.0 / tokens as f64,
            max_norm: 1.0,
            groups: &groups,
            source: Source::Own,
        })
    }

    /// What the card needs for a step's passes when it is held for `seconds` first, while the host queues them.
    ///
    /// # Errors
    /// What fails on the card.
    pub fn ahead(&mut self, seconds: f64) -> Result<f64> {
        self.engine.hold_card(seconds);
        let from = self.engine.card_clock()?;
        let key = StepKey { seed: 1, step: self.number + 1 };
        self.engine.accumulate(&self.rows, key, &mut NoSink)?;
        let to = self.engine.card_clock()?;
        self.engine.clear_sum()?;
        match (from, to) {
            (Some(from), Some(to)) => from.seconds_to(&to),
            _ => Ok(f64::NAN),
        }
    }

    /// One step by operation.
    ///
    /// # Errors
    /// What fails on the card.
    pub fn profile(&mut self) -> Result<Vec<Line>> {
        self.engine.set_profiling(true);
        self.step()?;
        let lines = self.engine.card_profile()?.into_iter();
        self.engine.set_profiling(false);
        Ok(lines.map(|(operation, seconds, calls)| Line { operation, seconds, calls }).collect())
    }
}

/// The row packed of samples of `sample` tokens; what is left over is one more.
fn packed(row: Row, sample: usize) -> Row {
    let total = row.token_ids.len();
    let starts = (0..total).step_by(sample);
    let segments = starts
        .clone()
        .map(|start| Segment {
            sample_id: row.id << 32 | start as u64,
            length: sample.min(total - start) as u32,
        })
        .collect();
    // Nothing predicts the first token of a sample.
    let trained = starts
        .map(|start| start as u32 + 1..(start + sample.min(total - start)) as u32)
        .filter(|range| !range.is_empty())
        .collect();
    Row { segments, trained, ..row }
}

/// Multiplications and additions of a step's forward and backward pass: frozen matrices and head twice (output, input's
/// gradient), attention three and a half times, causal. No gradient of a frozen weight, nothing computed again.
pub fn model_flops(config: &ModelConfig, rows: usize, length: usize) -> f64 {
    let queries = config.attention_heads * config.head_dim;
    let keys = config.key_value_heads * config.head_dim;
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let linear =
        config.layers * hidden * (2 * queries + 2 * keys + 3 * inner) + config.vocabulary_size * hidden;
    let tokens = (rows * length) as f64;
    let attention = 3.5 * 4.0 * (config.layers * queries) as f64 * tokens * length as f64 / 2.0;
    4.0 * linear as f64 * tokens + attention
}

/// Tokens of the longest row of a shape that a step of one row has room for on a card and its host.
///
/// # Errors
/// Where the card cannot be used.
pub fn largest_context(index: usize, shape: Shape, r: usize) -> Result<usize> {
    let free = Cuda::new(index, Precision::Bf16)?.free_bytes();
    let config = ModelConfig::from_json(shape.config_json().as_bytes(), "config.json".as_ref())?;
    let options = CardBenchOptions {
        index,
        shape,
        r,
        rows: 1,
        length: 1,
        sample: None,
        memory_limit: None,
        recompute: Recompute::Auto,
        warm: 0,
        steps: 1,
    };
    let fit = Fit::new(lora(r).shared(), &config)?;
    let request = PlanRequest {
        memory_limit: Some(free / 100 * 96),
        embedding_bytes: (2 * shape.vocabulary * shape.hidden) as u64,
        ..request(&options)
    };
    let sizes = |length| Sizes::of(&config, &fit, length, length, &request);
    Ok(MemoryPlan::largest_context(sizes, &request, 1 << 22))
}

fn lora(r: usize) -> LoraConfig {
    LoraConfig {
        r,
        lora_alpha: 2.0 * r as f64,
        target_modules: TargetModules::all_linear(),
        ..LoraConfig::default()
    }
}

fn request(options: &CardBenchOptions) -> PlanRequest {
    PlanRequest {
        micro_batch_rows: Some(options.rows),
        max_length: options.length,
        recompute: options.recompute,
        memory_limit: options.memory_limit,
        base_bytes: options.shape.base_bytes(),
        embedding_bytes: 0,
        dequantised: true,
        head_widened: false,
        dropout: false,
        threads: 0,
        accelerated: true,
        half_activations: true,
        reduced_apart: false,
        host_limit: plan::host_limit(),
    }
}

/// Times whole steps.
///
/// # Errors
/// Where the card cannot be used, a step does not fit it, or fails.
pub fn steps(options: &CardBenchOptions) -> Result<CardStep> {
    let rate = best_product(options.index)?;
    let mut stepper = Stepper::new(options)?;
    let mut times = Vec::with_capacity(options.steps);
    let mut outcome = Outcome::default();
    for number in 0..options.steps + options.warm {
        let begin = Instant::now();
        outcome = stepper.step()?;
        if number >= options.warm {
            times.push(begin.elapsed().as_secs_f64());
        }
    }
    times.sort_by(f64::total_cmp);
    let seconds = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
    // Longer than the host takes to queue a step, since it takes no longer than the step.
    let (ahead, profile) = match options.warm {
        0 => (f64::NAN, Vec::new()),
        _ => (stepper.ahead((1.5 * seconds).min(2.0))?, stepper.profile()?),
    };
    let attention = profile.iter().filter(|line| line.operation.contains("attention"));
    let attention_seconds = attention.map(|line| line.seconds).sum();
    let engine = &stepper.engine;
    let (card, peak) = engine.card().map_or((String::new(), 0), |(name, peak)| (name.to_owned(), peak));
    let (total, free) = crate::backend::cuda::memory_bytes(options.index).unwrap_or((0, 0));
    let sample = options.sample.unwrap_or(options.length).min(options.length);
    // Attention ends at a sample's end: so many samples as fill the rows.
    let samples = (options.rows * options.length) as f64 / sample as f64;
    let flops = samples * model_flops(engine.config(), 1, sample);
    let trained: u64 = stepper.rows.iter().map(Row::trained_tokens).sum();
    Ok(CardStep {
        card,
        shape: [options.rows, options.length],
        tokens_per_second: (options.rows * options.length) as f64 / seconds,
        step_seconds: seconds,
        peak_memory_bytes: peak,
        device_memory_bytes: total.saturating_sub(free),
        base_memory_bytes: options.shape.base_bytes(),
        model_flops_per_second: flops / seconds,
        product_flops_per_second: rate,
        floor_fraction: flops / rate / seconds,
        trainable_parameters: engine.layout().parameters(),
        loss: outcome.loss / trained as f64,
        plan: *engine.plan(),
        profile,
        attention_seconds,
        busy_fraction: ahead / seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::PackedBatch;

    #[test]
    fn a_row_is_packed_of_samples_whose_first_tokens_are_not_trained() {
        let row = packed(Row::whole(3, vec![7; 10]), 4);
        let lengths: Vec<u32> = row.segments.iter().map(|segment| segment.length).collect();
        assert_eq!((lengths, row.trained_tokens()), (vec![4, 4, 2], 7));
        let mut batch = PackedBatch::default();
        batch.fill(&[row]).unwrap();
        assert_eq!((batch.tokens(), batch.spans.len(), batch.predicting.len()), (10, 3, 7));
        let whole = packed(Row::whole(0, vec![7; 10]), 10);
        assert_eq!(whole.trained, Row::whole(0, vec![7; 10]).trained);
    }
}
