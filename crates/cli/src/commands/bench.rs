//! `shanty bench`: measures what this machine does.

use std::{path::PathBuf, time::Duration};

use serde_json::{Value, json};
use shanty_peft_core::{
    EngineDevice,
    backend::cuda::Precision,
    bench::{self, CardBenchOptions, CardOperation, CardStep, Shape, StepBench, StepBenchOptions},
    model::ModelConfig,
    plan::Recompute,
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
    Ops(OpsArgs),
    Load(LoadArgs),
}

/// Measure operations on a card at the shape of an 8B model, beside a copy and a large product in the same run
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty bench ops
  shanty bench ops --output json")]
struct OpsArgs {
    /// Which card, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    card: usize,
}

/// Measure how long a base takes from its folder to being ready
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty bench load --model models/tiny --quantization nf4
  shanty bench load --shape 8b --device cuda --runs 3 --output json")]
struct LoadArgs {
    /// The base model's folder
    #[arg(long, value_name = "DIR", default_value = "examples/tiny-llama-14m", conflicts_with = "shape")]
    model: PathBuf,
    /// A Llama of random weights in bf16 instead, written to a temporary folder first: 1b, 3b, 8b or 70b
    #[arg(long, value_name = "NAME", value_parser = ["1b", "3b", "8b", "70b"])]
    shape: Option<String>,
    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    device: BenchDevice,
    /// How the base is kept in memory
    #[arg(long, value_enum, default_value_t = BaseQuantization::Nf4)]
    quantization: BaseQuantization,
    /// Threads to load with; all when absent
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Loads, one after the other; the median counts
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
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
    #[arg(long, value_name = "DIR", default_value = "examples/tiny-llama-14m", conflicts_with = "shape")]
    model: PathBuf,
    /// A Llama of random weights instead, on a card: 1b, 3b, 8b or 70b
    #[arg(long, value_name = "NAME", value_parser = ["1b", "3b", "8b", "70b"])]
    shape: Option<String>,
    /// With --shape: what a step may take of the card, such as 8 for 8 GiB; all that is free when absent
    #[arg(long, value_name = "GIB", requires = "shape")]
    memory: Option<f64>,
    /// Rows a step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Rows a forward pass; all of --batch when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    micro_batch: Option<u32>,
    /// Tokens a row
    #[arg(long, value_name = "N", default_value_t = 256)]
    length: usize,
    /// With --shape: tokens of each sample that a row is packed of; one sample fills it when absent
    #[arg(long, value_name = "N", requires = "shape", value_parser = clap::value_parser!(u32).range(2..))]
    sample: Option<u32>,
    /// How the base is kept in memory
    #[arg(long, value_enum, default_value_t = BaseQuantization::None)]
    quantization: BaseQuantization,
    /// Rank of the adapter on all linear layers
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    rank: u32,
    /// Threads to compute with
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: u16,
    /// Whether activations are kept or computed again
    #[arg(long, value_enum, default_value_t)]
    recompute: BenchRecompute,
    /// Steps to measure, after two that are not
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: u32,
}

/// What becomes of activations between forward and backward.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum BenchRecompute {
    /// From the memory that is there.
    #[default]
    Auto,
    /// Keep them.
    Never,
    /// Keep layer inputs, compute the rest again.
    Layers,
}

impl From<BenchRecompute> for Recompute {
    fn from(recompute: BenchRecompute) -> Self {
        match recompute {
            BenchRecompute::Auto => Self::Auto,
            BenchRecompute::Never => Self::Never,
            BenchRecompute::Layers => Self::Layers,
        }
    }
}

/// Devices that can be measured.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum BenchDevice {
    /// The CPU.
    #[default]
    Cpu,
    /// The first NVIDIA card, or an error.
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
    match args.what {
        What::Step(args) => match &args.shape {
            Some(name) => card_step(name, &args, ui),
            None => step(&args, ui),
        },
        What::Ops(args) => operations(&args, ui),
        What::Load(args) => load(&args, ui),
    }
}

/// Steps on random weights, on a card.
fn card_step(name: &str, args: &StepArgs, ui: &Ui) -> CommandResult<Exit> {
    let options = CardBenchOptions {
        index: 0,
        shape: shape(name)?,
        r: args.rank as usize,
        rows: args.batch as usize,
        length: args.length,
        sample: args.sample.map(|tokens| tokens as usize),
        memory_limit: args.memory.map(|gibibytes| (gibibytes * f64::from(1 << 30)) as u64),
        recompute: args.recompute.into(),
        warm: args.steps.min(2) as usize,
        steps: args.steps as usize,
    };
    let bench = bench::steps(&options)?;
    let mut result = serde_json::to_value(&bench).unwrap_or(Value::Null);
    result["device"] = json!("cuda");
    result["shape"] = json!({
        "model": name, "batch": args.batch, "length": args.length, "rank": args.rank, "quantization": "nf4",
    });
    result["layers"] = json!(bench.plan.levels.describe());
    ui.data(&result, |_| card_people(args, &bench))?;
    Ok(Exit::Done)
}

fn card_people(args: &StepArgs, bench: &CardStep) -> String {
    let total: f64 = bench.profile.iter().map(|line| line.seconds).sum();
    let mut lines = vec![
        format!(
            "{} tokens/s  {:.1} ms a step (median of {})  peak memory {} (plan {}, driver {})  base {}",
            format::count(bench.tokens_per_second.round() as u64),
            1000.0 * bench.step_seconds,
            args.steps,
            format::bytes(bench.peak_memory_bytes),
            format::bytes(bench.plan.peak_bytes()),
            format::bytes(bench.device_memory_bytes),
            format::bytes(bench.base_memory_bytes),
        ),
        format!("{}  {}", bench.card, bench.plan.levels.describe()),
        format!(
            "the model at {:.0} TFLOP/s, {:.0} % of the floor; a large product runs at {:.0} TFLOP/s  the card is busy \
             {:.1} % of a step  loss {:.4}",
            bench.model_flops_per_second / 1e12,
            100.0 * bench.floor_fraction,
            bench.product_flops_per_second / 1e12,
            100.0 * bench.busy_fraction,
            bench.loss,
        ),
    ];
    for line in &bench.profile {
        lines.push(format!(
            "  {:<40} {:>8.2} ms  {:>5.1} %  {:>5} calls",
            line.operation,
            1000.0 * line.seconds,
            100.0 * line.seconds / total,
            line.calls,
        ));
    }
    lines.push(format!("  {:<40} {:>8.2} ms", "together", 1000.0 * total));
    lines.join("\n")
}

fn operations(args: &OpsArgs, ui: &Ui) -> CommandResult<Exit> {
    let lines = bench::operations(args.card)?;
    ui.data(&json!({ "operations": lines }), |_| {
        let line = |line: &CardOperation| {
            let (scale, unit) = if line.unit == "B/s" { (1e9, "GB/s") } else { (1e12, "TFLOP/s") };
            format!(
                "{:<40} {:>9.1} us {:>8.0} {unit:<7} {:>6.1} %",
                line.operation,
                1e6 * line.seconds,
                line.rate / scale,
                100.0 * line.share
            )
        };
        lines.iter().map(line).collect::<Vec<_>>().join("\n")
    })?;
    Ok(Exit::Done)
}

fn load(args: &LoadArgs, ui: &Ui) -> CommandResult<Exit> {
    let device = match args.device {
        BenchDevice::Cpu => EngineDevice::Cpu,
        BenchDevice::Cuda => EngineDevice::Cuda { index: 0, precision: Precision::Bf16 },
    };
    let quantization = (args.quantization == BaseQuantization::Nf4).then(Nf4Options::default);
    let temporary = match &args.shape {
        Some(name) => Some(Temporary::write(shape(name)?)?),
        None => None,
    };
    let folder = temporary.as_ref().map_or(args.model.as_path(), |temporary| temporary.0.as_path());
    let runs = args.runs as usize;
    let bench = bench::load(folder, device, quantization, args.threads, runs, &mut |_, _| {})?;
    let result = serde_json::to_value(&bench).unwrap_or(Value::Null);
    ui.data(&result, |_| {
        let card = bench
            .card_peak_memory_bytes
            .map_or_else(String::new, |peak| format!(", {} of the card", format::bytes(peak)));
        let each: Vec<String> = bench.run_seconds.iter().map(|seconds| format!("{seconds:.2}")).collect();
        format!(
            "ready in {:.2} s (runs: {}): {} read at {}/s, {} kept; the process held {} at most{card}",
            bench.seconds,
            each.join(", "),
            format::bytes(bench.read_bytes),
            format::bytes(bench.bytes_per_second as u64),
            format::bytes(bench.base_memory_bytes),
            format::bytes(bench.peak_memory_bytes),
        )
    })?;
    Ok(Exit::Done)
}

/// A folder that goes with this value.
struct Temporary(PathBuf);

impl Temporary {
    fn write(shape: Shape) -> CommandResult<Self> {
        let folder = std::env::temp_dir().join(format!("shanty-bench-{}", std::process::id()));
        let this = Self(folder);
        bench::write_random(&this.0, shape)?;
        Ok(this)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // What cannot be removed is left where temporary files lie.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A Llama by name.
fn shape(name: &str) -> CommandResult<Shape> {
    let unknown = || Error::Impossible {
        flag: "--shape",
        value: name.to_owned(),
        rule: "must be 1b, 3b, 8b or 70b".to_owned(),
    };
    Ok(Shape::named(name).ok_or_else(unknown)?)
}

fn step(args: &StepArgs, ui: &Ui) -> CommandResult<Exit> {
    let config = ModelConfig::load(&args.model)?;
    if !(2..=config.max_positions).contains(&args.length) {
        let rule = format!("must be from 2 to the model's context of {} tokens", config.max_positions);
        return Err(Error::Impossible { flag: "--length", value: args.length.to_string(), rule }.into());
    }
    let options = StepBenchOptions {
        base: args.model.clone(),
        device: match args.device {
            BenchDevice::Cpu => EngineDevice::Cpu,
            BenchDevice::Cuda => EngineDevice::Cuda { index: 0, precision: args.precision.into() },
        },
        quantization: (args.quantization == BaseQuantization::Nf4).then(Nf4Options::default),
        r: args.rank as usize,
        dropout: 0.0,
        rows: args.batch as usize,
        micro_batch_rows: args.micro_batch.map(|rows| rows as usize),
        length: args.length,
        threads: usize::from(args.threads),
        recompute: args.recompute.into(),
        steps: args.steps as usize,
    };
    let bench = bench::step(&options)?;
    let total: Duration = bench.profile.iter().map(|spent| spent.time).sum();
    let profile: Vec<Value> = bench
        .profile
        .iter()
        .filter(|spent| !spent.time.is_zero())
        .map(|spent| {
            json!({
                "operation": spent.operation,
                "seconds": spent.time.as_secs_f64() / f64::from(args.steps),
                "share": spent.time.as_secs_f64() / total.as_secs_f64(),
            })
        })
        .collect();
    let result = json!({
        "device": bench.device,
        "card": bench.card,
        "shape": {
            "model": args.model, "batch": args.batch, "length": args.length, "rank": args.rank,
            "layers": config.layers, "hidden": config.hidden_size, "vocabulary": config.vocabulary_size,
            "quantization": if args.quantization == BaseQuantization::Nf4 { "nf4" } else { "none" },
            "threads": bench.threads, "micro_batch": bench.plan.micro_batch_rows,
        },
        "tokens_per_second": bench.tokens_per_second,
        "step_seconds": bench.step_seconds,
        "steps": args.steps,
        "peak_memory_bytes": bench.peak_memory_bytes,
        "device_memory_bytes": null,
        "base_memory_bytes": bench.base_memory_bytes,
        "floor_fraction": bench.floor_fraction,
        "product_gigaflops": bench.product_gigaflops,
        "trainable_parameters": bench.trainable_parameters,
        "profile": profile,
    });
    ui.data(&result, |_| people(args, &bench, total))?;
    Ok(Exit::Done)
}

fn people(args: &StepArgs, bench: &StepBench, total: Duration) -> String {
    let mut lines = vec![
        format!(
            "{} tokens/s  {:.1} ms a step (median of {})  peak memory {}  base {}",
            format::count(bench.tokens_per_second.round() as u64),
            1000.0 * bench.step_seconds,
            args.steps,
            format::bytes(bench.peak_memory_bytes),
            format::bytes(bench.base_memory_bytes),
        ),
        bench.card.clone(),
    ];
    if let (Some(rate), Some(floor)) = (bench.product_gigaflops, bench.floor_fraction) {
        lines.push(format!(
            "{} threads  a large product runs at {rate:.0} GFLOP/s; products alone would take {:.0} % of the step",
            bench.threads,
            100.0 * floor,
        ));
    }
    for spent in bench.profile.iter().filter(|spent| !spent.time.is_zero()) {
        lines.push(format!(
            "  {:<20} {:>8.1} ms  {:>5.1} %",
            format!("{:?}", spent.operation),
            1000.0 * spent.time.as_secs_f64() / f64::from(args.steps),
            100.0 * spent.time.as_secs_f64() / total.as_secs_f64(),
        ));
    }
    lines.join("\n")
}
