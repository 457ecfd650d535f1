//! `shanty adapters combine`: one adapter out of several.

use std::path::PathBuf;

use serde_json::json;
use shanty_peft_core::adapter_files::{Combination, StoredAdapter, combine};

use super::Out;
use crate::{error::Error, failure::CommandResult, format, job_file::short, ui::Ui};

/// Make one LoRA adapter of several, each with a weight
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty adapters combine pirate gnome --out both
  shanty adapters combine pirate gnome --weights 0.7,0.3 --how svd --rank 16 --out mixed
  shanty adapters combine pirate --weights -1 --out anti-pirate

cat adds the changes up exactly; its rank is the sum of theirs. svd is the same sum, cut to a rank. linear adds up the
factors, as PEFT does: it keeps the rank, but products of different adapters' factors come along.")]
pub(super) struct Args {
    /// The adapters' folders
    #[arg(value_name = "DIR", required = true)]
    adapters: Vec<PathBuf>,
    /// A weight for each; 1 where absent
    #[arg(long, value_name = "W,W,…", value_delimiter = ',', allow_hyphen_values = true)]
    weights: Vec<f64>,
    /// How they become one
    #[arg(long, value_enum, default_value_t)]
    how: How,
    /// Rank of the result, for svd; the largest of theirs when absent
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u16).range(1..))]
    rank: Option<u16>,
    #[command(flatten)]
    out: Out,
}

/// How adapters become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum How {
    /// Factors side by side: the exact sum of the changes.
    #[default]
    Cat,
    /// The sum of the changes, cut to a rank.
    Svd,
    /// Sums of the factors, as PEFT does it.
    Linear,
}

pub(super) fn execute(args: &Args, ui: &Ui) -> CommandResult<()> {
    let count = args.adapters.len();
    let weights = if args.weights.is_empty() { vec![1.0; count] } else { args.weights.clone() };
    if weights.len() != count {
        let rule = format!("must be one weight for each of {count} adapters");
        let value = format!("{} weights", weights.len());
        return Err(Error::Impossible { flag: "--weights", value, rule }.into());
    }
    if args.rank.is_some() && args.how != How::Svd {
        let rule = "goes with `--how svd` only".to_owned();
        return Err(Error::Impossible { flag: "--rank", value: "given".to_owned(), rule }.into());
    }
    let how = match args.how {
        How::Cat => Combination::Cat,
        How::Svd => Combination::Svd(args.rank.map(usize::from)),
        How::Linear => Combination::Linear,
    };
    let adapters = args.adapters.iter().zip(weights);
    let adapters: Vec<(StoredAdapter, f64)> = adapters
        .map(|(folder, weight)| Ok((StoredAdapter::open(folder)?, weight)))
        .collect::<CommandResult<_>>()?;
    let bases: Vec<_> =
        adapters.iter().map(|(adapter, _)| adapter.config.get("base_model_name_or_path")).collect();
    if bases.iter().any(|base| base != &bases[0]) && adapters.iter().any(|(one, _)| one.base_hash.is_none()) {
        ui.warn("the adapters name different bases; their sum makes sense on one base only");
    }
    let combined = combine(&adapters, how)?;
    combined.write(&args.out.out)?;
    let (rank, parameters) = (&combined.config["r"], combined.parameters());
    ui.data(&json!({ "out": args.out.out, "rank": rank, "parameters": parameters }), |_| {
        format!(
            "{} holds {count} adapters in one of rank {rank}, {} parameters",
            short(&args.out.out),
            format::count(parameters as u64)
        )
    })
}
