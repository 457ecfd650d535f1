//! `shanty export`: models and adapters for llama.cpp, the history of a job for other programs.

use std::path::PathBuf;

use serde_json::json;
use shanty_peft_core::{
    adapter_files::StoredAdapter,
    generate::LoadedAdapter,
    gguf_export::{self, Encoding},
    merge::FoldedModel,
    model::{ModelConfig, resident},
};

use crate::{
    bar::Bar,
    commands::export_history::{TensorBoard, Wandb},
    failure::{CommandResult, Exit},
    flags::AdapterFlag,
    format,
    job_file::short,
    ui::Ui,
};

/// Write models, adapters and histories in the formats of other programs
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    format: Format,
}

#[derive(Debug, clap::Subcommand)]
enum Format {
    Gguf(Gguf),
    #[command(name = "tensorboard")]
    TensorBoard(TensorBoard),
    Wandb(Wandb),
}

/// Write a GGUF file for llama.cpp: a model with its adapter folded in, or the adapter alone
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty export gguf --model models/tiny --adapter P --type q8_0 --out pirate.gguf
  shanty export gguf --model models/tiny --type f16 --out tiny.gguf
  shanty export gguf --model models/tiny --adapter P --adapter-only --out pirate-lora.gguf

llama.cpp lays an adapter alone on the model's own GGUF: llama-cli -m tiny.gguf --lora
pirate-lora.gguf With q4_0 the output head gets 8 bits. Norms and biases are always f32.")]
struct Gguf {
    /// The base model's folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The adapter's folder, as shanty or PEFT wrote it
    #[arg(long, value_name = "DIR")]
    adapter: Option<AdapterFlag>,
    /// Write the adapter alone
    #[arg(long, requires = "adapter")]
    adapter_only: bool,
    /// What matrices are stored as; of an adapter alone f32 or f16
    #[arg(long = "type", value_enum, default_value_t)]
    encoding: EncodingFlag,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Use the adapter although it was trained on another base
    #[arg(long)]
    force: bool,
    /// Threads to compute with; all cores when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
}

/// What matrices are stored as.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum EncodingFlag {
    /// 32 bits.
    F32,
    /// 16 bits.
    #[default]
    F16,
    /// 8.5 bits.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4.5 bits.
    #[value(name = "q4_0")]
    Q4_0,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    match args.format {
        Format::Gguf(args) => gguf(args, ui),
        Format::TensorBoard(args) => args.execute(ui),
        Format::Wandb(args) => args.execute(ui),
    }
}

fn gguf(args: Gguf, ui: &Ui) -> CommandResult<Exit> {
    let encoding = match args.encoding {
        EncodingFlag::F32 => Encoding::F32,
        EncodingFlag::F16 => Encoding::F16,
        EncodingFlag::Q8_0 => Encoding::Q8_0,
        EncodingFlag::Q4_0 => Encoding::Q4_0,
    };
    let config = ModelConfig::load(&args.model)?;
    let loaded = args.adapter.as_ref().map(|flag| LoadedAdapter::open(&flag.folder, &config)).transpose()?;
    if let (Some(flag), Some(adapter)) = (&args.adapter, &loaded)
        && adapter.base_hash().is_some()
    {
        let hash = resident::content_hash(&args.model, &mut |_| {})?;
        match adapter.check_base(&flag.folder, hash) {
            Err(error) if args.force => ui.warn(error.to_string()),
            checked => checked?,
        }
    }
    let report = match &args.adapter {
        Some(flag) if args.adapter_only => {
            gguf_export::adapter(&StoredAdapter::open(&flag.folder)?, &config, &args.out, encoding)?
        }
        _ => {
            let model = FoldedModel::open(&args.model, loaded.as_ref(), args.threads.map_or(0, usize::from))?;
            let bar = Bar::new(ui, "exports");
            let progress = &mut |done, total| bar.at(done, total);
            let report = gguf_export::model(&model, &args.model, &args.out, encoding, progress)?;
            bar.done();
            report
        }
    };
    if !report.widened.is_empty() {
        let names = report.widened.join(", ");
        ui.warn(format!("rows of these are no multiple of 32; they are stored as f16: {names}"));
    }
    let found = json!({
        "out": args.out, "bytes": report.bytes, "tensors": report.tensors, "widened": report.widened,
    });
    ui.data(&found, |_| {
        format!("{} holds {} tensors, {}", short(&args.out), report.tensors, format::bytes(report.bytes))
    })?;
    Ok(Exit::Done)
}
