//! `shanty adapters convert`: the same adapter under other names, or in another dtype.

use std::path::PathBuf;

use safetensors::Dtype;
use serde_json::json;
use shanty_peft_core::adapter_files::{KeyStyle, StoredAdapter, convert_keys};

use super::Out;
use crate::{failure::CommandResult, job_file::short, ui::Ui};

/// Write an adapter with other names or another dtype
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty adapters convert downloaded --keys peft --out mine
  shanty adapters convert mine --dtype bf16 --out small
  shanty adapters convert mine --keys named --name default --out in-memory-names

Names are read in every style and written as
  peft   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
  bare   model.layers.0.self_attn.q_proj.lora_A.weight
  named  base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
PEFT loads peft and named; of bare names it ignores all, with no more than a warning.")]
pub(super) struct Args {
    /// The adapter's folder
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    /// How tensors are named
    #[arg(long, value_enum, default_value_t)]
    keys: Style,
    /// The name in `named`
    #[arg(long, value_name = "NAME", default_value = "default")]
    name: String,
    /// What numbers are stored as; as they are when absent
    #[arg(long, value_enum)]
    dtype: Option<Float>,
    #[command(flatten)]
    out: Out,
}

/// How tensors are named.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum Style {
    /// As in PEFT's files.
    #[default]
    Peft,
    /// Without `base_model.model.`.
    Bare,
    /// With the adapter's name, as PEFT holds it in memory.
    Named,
}

/// What numbers are stored as.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Float {
    /// 32 bits.
    F32,
    /// 16 bits, more digits.
    F16,
    /// 16 bits, wider range.
    Bf16,
}

pub(super) fn execute(args: Args, ui: &Ui) -> CommandResult<()> {
    let adapter = StoredAdapter::open(&args.adapter)?;
    let style = match args.keys {
        Style::Peft => KeyStyle::Peft,
        Style::Bare => KeyStyle::Bare,
        Style::Named => KeyStyle::Named(args.name),
    };
    let dtype = args.dtype.map(|dtype| match dtype {
        Float::F32 => Dtype::F32,
        Float::F16 => Dtype::F16,
        Float::Bf16 => Dtype::BF16,
    });
    convert_keys(&adapter, &style, dtype, &args.out.out)?;
    let tensors = adapter.tensors.len();
    ui.data(&json!({ "out": args.out.out, "tensors": tensors }), |_| {
        format!("{} holds {tensors} tensors", short(&args.out.out))
    })
}
