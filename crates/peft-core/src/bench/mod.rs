//! `shanty bench`: how fast a whole optimizer step is, what memory it takes, where its time goes; on a card also how fast
//! operations are beside what the card does at best.

mod card;
mod card_operations;
mod load;
mod random_base;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

pub use card::{CardBenchOptions, CardStep, Line, Stepper, largest_context, model_flops, steps};
pub use card_operations::{CardOperation, operations};
pub use load::{LoadBench, load, write_random};
use random_base::noise;
pub use random_base::{RandomBase, Shape};
use serde::Serialize;

use crate::{
    adapter::{LoraConfig, TargetModules},
    backend::{
        Backend, View, ViewMut,
        cpu::{Cpu, Operation, Spent},
    },
    batch::Row,
    engine::{Engine, EngineDevice, EngineOptions, LossSum, NoSink, StepKey},
    error::Result,
    model::{MemoryUse, ModelConfig},
    optim::{AdamW, AdamWOptions, clip_factor, global_norm},
    plan::{MemoryPlan, Recompute},
    quant::Nf4Options,
    random,
};

/// What is measured.
#[derive(Debug, Clone)]
pub struct StepBenchOptions {
    /// The base's folder.
    pub base: PathBuf,
    /// Where to compute.
    pub device: EngineDevice,
    /// 4 bits, or f32.
    pub quantization: Option<Nf4Options>,
    /// Rank on all linear layers.
    pub r: usize,
    /// Dropout on the branches.
    pub dropout: f32,
    /// Rows of a step.
    pub rows: usize,
    /// Rows of a forward pass; all of them when absent.
    pub micro_batch_rows: Option<usize>,
    /// Tokens of a row.
    pub length: usize,
    /// Threads; 0 takes all.
    pub threads: usize,
    /// Keep activations or compute them again.
    pub recompute: Recompute,
    /// Steps that are timed; two more go before.
    pub steps: usize,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct StepBench {
    /// Where it ran: `cpu` or `cuda`.
    pub device: &'static str,
    /// The name of the processor, or of the card.
    pub card: String,
    /// Rows and tokens of a row.
    pub shape: [usize; 2],
    /// Threads that worked.
    pub threads: usize,
    /// Tokens a second, at the median step.
    pub tokens_per_second: f64,
    /// The median step, forward, backward, clipping and AdamW.
    pub step_seconds: f64,
    /// The most memory the process ever held; on a card, the most that the engine reserved there.
    pub peak_memory_bytes: u64,
    /// What the base takes of it.
    pub base_memory_bytes: u64,
    /// The time that the step's products alone would take at the rate measured in this run, by the step's time. Not
    /// measured on a card.
    pub floor_fraction: Option<f64>,
    /// The rate of a large product in this run, billions of multiplications and additions a second. Not measured on a card.
    pub product_gigaflops: Option<f64>,
    /// Trained parameters.
    pub trainable_parameters: usize,
    /// Loss per token of the last step: that the step did its work.
    pub loss: f64,
    /// Planned memory by part.
    pub plan: MemoryPlan,
    /// Time by kind of operation, over all timed steps.
    pub profile: Vec<Spent>,
}

/// Times whole steps on random tokens.
///
/// # Errors
/// Where the base cannot be loaded or a step fails.
pub fn step(options: &StepBenchOptions) -> Result<StepBench> {
    let lora = LoraConfig {
        r: options.r,
        lora_alpha: 2.0 * options.r as f64,
        lora_dropout: options.dropout,
        target_modules: TargetModules::all_linear(),
        ..LoraConfig::default()
    };
    let mut engine = Engine::load(
        EngineOptions {
            base: options.base.clone(),
            quantization: options.quantization,
            adapter: Some(lora.shared()),
            device: options.device,
            threads: options.threads,
            recompute: options.recompute,
            micro_batch_rows: Some(options.micro_batch_rows.unwrap_or(options.rows).min(options.rows)),
            max_length: options.length,
            memory_limit: None,
            start: None,
            shard: None,
            member: false,
        },
        &mut |_| {},
    )?;
    let rows = random_rows(engine.config(), options.rows, options.length);
    let mut parameters = engine.initial_parameters(1)?;
    let mut gradient = vec![0.0; parameters.len()];
    let mut optimizer = AdamW::new(AdamWOptions::default(), parameters.len());
    let mut times = Vec::with_capacity(options.steps);
    let mut loss = f64::NAN;
    for number in 0..options.steps + 2 {
        if number == 2 {
            engine.take_profile();
        }
        let begin = Instant::now();
        gradient.fill(0.0);
        let key = StepKey { seed: 1, step: number as u64 + 1 };
        let mut sum = LossSum::default();
        for rows in rows.chunks(engine.micro_batch_rows()) {
            sum.add(engine.forward_backward(&parameters, rows, key, &mut gradient, &mut NoSink)?);
        }
        let scale = 1.0 / sum.tokens as f64;
        let clip = clip_factor(global_norm(&gradient) * scale, 1.0).unwrap_or(1.0);
        optimizer.update(&mut parameters, &gradient, scale * clip, 1e-4)?;
        if number >= 2 {
            times.push(begin.elapsed());
        }
        loss = sum.mean();
    }
    let profile = engine.take_profile();
    let card = engine.card();
    let peak_memory_bytes = card.as_ref().map_or_else(peak_memory, |(_, peak)| *peak);
    times.sort();
    let median = times.get(times.len() / 2).copied().unwrap_or_default().as_secs_f64();
    let rate = card.is_none().then(|| product_rate(engine.threads())).transpose()?;
    let flops: u64 = profile.iter().map(|spent| spent.flops).sum();
    let floor = |rate: f64| flops as f64 / options.steps.max(1) as f64 / rate / median;
    Ok(StepBench {
        device: if card.is_some() { "cuda" } else { "cpu" },
        card: card.map_or_else(processor, |(name, _)| name.to_owned()),
        shape: [options.rows, options.length],
        threads: engine.threads(),
        tokens_per_second: (options.rows * options.length) as f64 / median,
        step_seconds: median,
        peak_memory_bytes,
        base_memory_bytes: MemoryUse::plan(&options.base, options.quantization)?.total_bytes() as u64,
        floor_fraction: rate.map(floor),
        product_gigaflops: rate.map(|rate| rate / 1e9),
        trainable_parameters: engine.layout().parameters(),
        loss,
        plan: *engine.plan(),
        profile,
    })
}

fn random_rows(config: &ModelConfig, rows: usize, length: usize) -> Vec<Row> {
    let mut numbers = vec![0.0; rows * length];
    random::fill_uniform(1, "bench tokens", 1.0, &mut numbers);
    let token = |number: &f32| ((number + 1.0) / 2.0 * config.vocabulary_size as f32) as u32;
    let last = config.vocabulary_size as u32 - 1;
    let ids: Vec<u32> = numbers.iter().map(|number| token(number).min(last)).collect();
    ids.chunks(length).enumerate().map(|(id, ids)| Row::whole(id as u64, ids.to_vec())).collect()
}

/// Multiplications and additions a second of a large product: the best of several.
fn product_rate(threads: usize) -> Result<f64> {
    const SIDE: usize = 1024;
    let cpu = Cpu::new(threads)?;
    let (a, b) = (vec![0.5; 2 * SIDE * SIDE], vec![0.25; SIDE * SIDE]);
    let mut c = vec![0.0; 2 * SIDE * SIDE];
    let mut best = Duration::MAX;
    for _ in 0..12 {
        let (a, b) = (View::<Cpu>::new(&a, 2 * SIDE, SIDE), View::<Cpu>::new(&b, SIDE, SIDE));
        cpu.gemm(1.0, a, false, b, true, 0.0, ViewMut::<Cpu>::new(&mut c, 2 * SIDE, SIDE));
        let spent = cpu.take_profile();
        let time = spent.iter().find(|spent| spent.operation == Operation::Product).map(|spent| spent.time);
        best = best.min(time.unwrap_or(Duration::MAX));
    }
    Ok((4 * SIDE * SIDE * SIDE) as f64 / best.as_secs_f64())
}

/// The most memory this process ever held; 0 where the system does not say.
pub fn peak_memory() -> u64 {
    proc_line("/proc/self/status", "VmHWM:")
        .and_then(|text| text.trim_end_matches("kB").trim().parse::<u64>().ok())
        .map_or(0, |kibibytes| kibibytes * 1024)
}

fn processor() -> String {
    proc_line("/proc/cpuinfo", "model name")
        .map_or_else(|| "unknown".to_owned(), |text| text.trim_start_matches(':').trim().to_owned())
}

fn proc_line(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)).map(|rest| rest.trim().to_owned())
}
