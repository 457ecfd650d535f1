//! `shanty bench`: measures what this machine does.

use std::{path::PathBuf, time::Instant};

use serde_json::json;
use shanty_peft_core::{
    Engine, EngineDevice, EngineOptions, NoSink, StepKey,
    adapter::{LoraConfig, TargetModules},
    backend::cuda::Precision,
    batch::Row,
    model::ModelConfig,
    optim::{AdamW, AdamWOptions, clip_factor, global_norm},
    quant::Nf4Options,
};

use crate::{
    error::Error,
    failure::{CommandResult, Exit},
    format,
    model::BaseQuantization,
    ui::Ui,
};

/// Measure what this machine does
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Step(StepArgs),
}

/// Measure training steps: forward, backward, clipping, AdamW, on random tokens
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty bench step --device cpu
  shanty bench step --model models/tiny --batch 8 --length 256 --rank 16 --threads 2 --output json")]
struct StepArgs {
    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    device: BenchDevice,
    /// How a card computes products
    #[arg(long, value_enum, default_value_t)]
    precision: BenchPrecision,
    /// The base model's folder
    #[arg(long, value_name = "DIR", default_value = "examples/tiny-llama-14m")]
    model: PathBuf,
    /// Rows a step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Rows a forward pass; all of --batch when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    micro_batch: Option<u32>,
    /// Tokens a row
    #[arg(long, value_name = "N", default_value_t = 256)]
    length: usize,
    /// How the base is kept in memory
    #[arg(long, value_enum, default_value_t = BaseQuantization::None)]
    quantization: BaseQuantization,
    /// Rank of the adapter on all linear layers
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    rank: u32,
    /// Threads to compute with
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: u16,
    /// Steps to measure, after one that is not
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: u32,
}

/// Devices that can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum BenchDevice {
    /// The CPU.
    #[default]
    Cpu,
    /// An NVIDIA card.
    Cuda,
}

/// How a card computes products.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum BenchPrecision {
    /// In f32.
    F32,
    /// Operands in TF32, sums in f32.
    Tf32,
    /// Operands of large products in bf16, sums in f32.
    #[default]
    Bf16,
}

impl From<BenchPrecision> for Precision {
    fn from(precision: BenchPrecision) -> Self {
        match precision {
            BenchPrecision::F32 => Self::F32,
            BenchPrecision::Tf32 => Self::Tf32,
            BenchPrecision::Bf16 => Self::Bf16,
        }
    }
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let What::Step(args) = args.what;
    step(&args, ui)
}

fn step(args: &StepArgs, ui: &Ui) -> CommandResult<Exit> {
    let config = ModelConfig::load(&args.model)?;
    if !(2..=config.max_positions).contains(&args.length) {
        let rule = format!("must be from 2 to the model's context of {} tokens", config.max_positions);
        return Err(Error::Impossible { flag: "--length", value: args.length.to_string(), rule }.into());
    }
    let mut bench = Bench::load(args, &config)?;
    bench.step(0)?;
    let mut seconds = Vec::with_capacity(args.steps as usize);
    for number in 1..=u64::from(args.steps) {
        let began = Instant::now();
        bench.step(number)?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    let tokens = u64::from(args.batch) * args.length as u64;
    // On a card, what the engine reserved there; else what the process held.
    let peak = bench.engine.card().map(|(_, peak)| peak).or_else(peak_memory_bytes);
    let result = json!({
        "device": if args.device == BenchDevice::Cuda { "cuda" } else { "cpu" },
        "card": bench.engine.card().map(|(name, _)| name),
        "shape": {
            "model": args.model, "batch": args.batch, "length": args.length, "rank": args.rank,
            "layers": config.layers, "hidden": config.hidden_size, "vocabulary": config.vocabulary_size,
            "quantization": if args.quantization == BaseQuantization::Nf4 { "nf4" } else { "none" },
            "threads": bench.engine.threads(), "micro_batch": bench.engine.micro_batch_rows(),
        },
        "tokens_per_second": tokens as f64 / median,
        "step_seconds": median,
        "steps": args.steps,
        "peak_memory_bytes": peak,
        "base_memory_bytes": bench.engine.plan().base_bytes,
        "trainable_parameters": bench.parameters.len(),
    });
    ui.data(&result, |_| {
        format!(
            "{} tokens/s  {:.1} ms a step (median of {})  peak memory {}  base {}",
            format::count((tokens as f64 / median).round() as u64),
            1000.0 * median,
            args.steps,
            format::bytes(peak.unwrap_or(0)),
            format::bytes(bench.engine.plan().base_bytes),
        )
    })?;
    Ok(Exit::Done)
}

/// A training step without data, network or disk.
struct Bench {
    engine: Engine,
    parameters: Vec<f32>,
    gradient: Vec<f32>,
    optimizer: AdamW,
    rows: Vec<Row>,
}

impl Bench {
    fn load(args: &StepArgs, config: &ModelConfig) -> CommandResult<Self> {
        let options = EngineOptions {
            quantization: (args.quantization == BaseQuantization::Nf4).then(Nf4Options::default),
            lora: Some(LoraConfig {
                base_model_name_or_path: None,
                r: args.rank as usize,
                lora_alpha: 2.0 * f64::from(args.rank),
                lora_dropout: 0.0,
                use_rslora: false,
                target_modules: TargetModules::all_linear(),
            }),
            device: match args.device {
                BenchDevice::Cpu => EngineDevice::Cpu,
                BenchDevice::Cuda => EngineDevice::Cuda { index: 0, precision: args.precision.into() },
            },
            threads: usize::from(args.threads),
            micro_batch_rows: Some(args.micro_batch.unwrap_or(args.batch).min(args.batch) as usize),
            ..EngineOptions::new(&args.model, args.length)
        };
        let engine = Engine::load(options, &mut |_| {})?;
        let parameters = engine.initial_parameters(17);
        Ok(Self {
            gradient: vec![0.0; parameters.len()],
            optimizer: AdamW::new(AdamWOptions::default(), parameters.len()),
            rows: rows(args, config.vocabulary_size),
            parameters,
            engine,
        })
    }

    /// One update as a worker makes it, but for the reduction.
    fn step(&mut self, number: u64) -> CommandResult<()> {
        self.gradient.fill(0.0);
        let key = StepKey { seed: 17, step: number };
        let mut tokens = 0;
        for rows in self.rows.chunks(self.engine.micro_batch_rows()) {
            let sum =
                self.engine.forward_backward(&self.parameters, rows, key, &mut self.gradient, &mut NoSink)?;
            tokens += sum.tokens;
        }
        let scale = 1.0 / tokens.max(1) as f64;
        // Random tokens teach nothing; a step that fails to be finite would be a defect, and is shown as one.
        let factor = clip_factor(scale * global_norm(&self.gradient), 1.0).unwrap_or(f64::NAN);
        self.optimizer.update(&mut self.parameters, &self.gradient, scale * factor, 1e-4)?;
        Ok(())
    }
}

/// Random tokens, the same on every machine. Token 0 is left out: it pads in many vocabularies.
fn rows(args: &StepArgs, vocabulary: usize) -> Vec<Row> {
    let mut state = 17u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        1 + ((state >> 33) as usize % (vocabulary - 1).max(1)) as u32
    };
    (0..u64::from(args.batch)).map(|id| Row::whole(id, (0..args.length).map(|_| next()).collect())).collect()
}

/// The most memory that this process held, as the system counts it.
fn peak_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
