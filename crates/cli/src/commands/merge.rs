//! `shanty merge`: a base and an adapter as one model.

use std::path::PathBuf;

use serde_json::{Value, json};
use shanty_peft_core::{
    generate::LoadedAdapter,
    merge::{self, FoldedModel, Form, MergeOptions, MergeReport, TensorReport},
    model::{ModelConfig, resident},
    quant::Nf4Options,
};

use crate::{
    bar::Bar,
    commands::eval::{DataFormat, loss_on},
    error::Error,
    failure::{CommandResult, Exit},
    flags::AdapterFlag,
    format,
    job_file::short,
    model::{Model, ModelOptions},
    ui::Ui,
};

/// Fold an adapter into its base: one model, which needs no adapter
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty merge --model models/tiny --adapter runs/pirate/adapter --out pirate
  shanty merge --model models/tiny --adapter P --form nf4 --eval eval.jsonl --out pirate-4bit
  shanty merge --model pirate --adapter runs/pirate/adapter --unmerge --out back

One weight at a time is in memory, with nf4 one file of weights besides. What rounding or
quantising loses is measured: as a share of each weight, and as a share of what the adapter
changed in it. --check takes the adapter out again and compares with the base. LoRA, DoRA, IA3
and the like can be folded in; prefixes and prompts cannot.")]
pub(crate) struct Args {
    /// The base model's folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The adapter's folder, as shanty or PEFT wrote it
    #[arg(long, value_name = "DIR")]
    adapter: AdapterFlag,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What weights are stored as
    #[arg(long, value_enum, default_value_t)]
    form: FormFlag,
    /// Largest file of weights, MB
    #[arg(long, value_name = "MB", default_value_t = merge::SHARD_BYTES / 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    shard_size: u64,
    /// Take the adapter out of a model that it was folded into
    #[arg(long)]
    unmerge: bool,
    /// Take the adapter out again afterwards and compare with the base
    #[arg(long, conflicts_with = "unmerge")]
    check: bool,
    /// Compare the loss on this data, before and after: JSONL or Parquet
    #[arg(long, value_name = "FILE", conflicts_with = "unmerge")]
    eval: Option<String>,
    /// Fold in an adapter although it was trained on another base
    #[arg(long)]
    force: bool,
    /// Threads to compute with; all cores when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
}

/// What weights are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum FormFlag {
    /// As the base's.
    #[default]
    Stored,
    /// 32 bits.
    F32,
    /// 16 bits, more digits.
    F16,
    /// 16 bits, wider range.
    Bf16,
    /// 4-bit NormalFloat, in the layout of bitsandbytes.
    Nf4,
}

impl FormFlag {
    fn form(self) -> Form {
        match self {
            Self::Stored => Form::Stored,
            Self::F32 => Form::F32,
            Self::F16 => Form::F16,
            Self::Bf16 => Form::Bf16,
            Self::Nf4 => Form::Nf4(Nf4Options::default()),
        }
    }
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let threads = args.threads.map_or(0, usize::from);
    let config = ModelConfig::load(&args.model)?;
    let adapter = LoadedAdapter::open(&args.adapter.folder, &config)?;
    // A merged model is not the base that the adapter was trained on: its hash would say nothing.
    if adapter.base_hash().is_some() && !args.unmerge {
        let hash = resident::content_hash(&args.model, &mut |_| {})?;
        match adapter.check_base(&args.adapter.folder, hash) {
            Err(error) if args.force => ui.warn(error.to_string()),
            checked => checked?,
        }
    }
    let model = FoldedModel::open(&args.model, Some(&adapter), threads)?;
    let options = MergeOptions {
        base: args.model.clone(),
        out: args.out.clone(),
        form: args.form.form(),
        shard_bytes: args.shard_size.saturating_mul(1_000_000),
        take_out: args.unmerge,
    };
    let bar = Bar::new(ui, if args.unmerge { "takes out" } else { "merges" });
    let report = merge::merge(&model, &options, &mut |done, total| bar.at(done, total))?;
    bar.done();
    let checked = if args.check && args.form == FormFlag::Nf4 {
        ui.warn("4 bits keep too little to see the base in them; nothing was checked");
        None
    } else if args.check {
        Some(merge::verify(&model, &args.out)?)
    } else {
        None
    };
    let losses = args.eval.as_deref().map(|data| losses(&args, data, threads, ui)).transpose()?;
    let summary = Summary::of(&report);
    if ui.is_json() {
        let check = checked.map(|tensors| {
            let worst = tensors.iter().map(|tensor| tensor.error).fold(0.0, f64::max);
            json!({ "tensors": tensors.len(), "largest_error": worst })
        });
        let mut found = json!({
            "out": args.out, "shards": report.shards, "bytes": report.bytes, "changed": report.changed().count(),
            "loss_mean": summary.mean, "loss_max": summary.worst.map(|worst| worst.loss), "check": check,
            "tensors": report.tensors.iter().map(as_json).collect::<Vec<_>>(),
        });
        if let Some((before, after)) = losses {
            found["eval_loss_before"] = before.into();
            found["eval_loss_after"] = after.into();
        }
        ui.json(&found)?;
        return Ok(Exit::Done);
    }
    let files = if report.shards == 1 { "1 file".to_owned() } else { format!("{} files", report.shards) };
    let verb = if args.unmerge { "without it" } else { "with it" };
    let changed = report.changed().count();
    ui.line(format!(
        "{}: {} in {files}, {changed} tensors changed by `{}`, {verb}",
        short(&args.out),
        format::bytes(report.bytes),
        args.adapter.name
    ))?;
    if let Some(table) = summary.table(&report, args.form) {
        ui.line(format!("\n{table}"))?;
    }
    if let Some(tensors) = checked {
        let worst = tensors.iter().map(|tensor| tensor.error).fold(0.0, f64::max);
        ui.line(format!(
            "\nchecked: {} tensors without the adapter are the base's, to {worst:.1e}",
            tensors.len()
        ))?;
    }
    if let Some((before, after)) = losses {
        ui.line(format!("\nloss {before:.4} with the adapter on the base, {after:.4} merged"))?;
    }
    Ok(Exit::Done)
}

/// The loss with the adapter beside the base as it was stored, and that of the merged model as it is stored.
fn losses(args: &Args, data: &str, threads: usize, ui: &Ui) -> CommandResult<(f64, f64)> {
    let loss = |base: &PathBuf, adapters: Vec<AdapterFlag>, nf4| -> CommandResult<f64> {
        let options =
            ModelOptions { base: base.clone(), nf4, adapters, force: true, threads, max_length: None };
        let (mut model, rows) = loss_on(options, data, DataFormat::Auto, None, ui)?;
        let choice = model.first();
        let (loss, tokens) = Model::evaluate(&mut model, choice, &rows)?;
        if tokens == 0 {
            let reason = format!("`{data}` has no token to predict");
            return Err(Error::Answer { reason }.into());
        }
        Ok(loss / tokens as f64)
    };
    // What is stored in 4 bits is read as such; all else is widened.
    let nf4 = (args.form == FormFlag::Nf4).then(Nf4Options::default);
    let before = loss(&args.model, vec![args.adapter.clone()], None)?;
    Ok((before, loss(&args.out, Vec::new(), nf4)?))
}

fn as_json(tensor: &TensorReport) -> Value {
    json!({
        "name": tensor.name, "change": tensor.change, "loss": tensor.loss,
        "loss_of_change": tensor.loss_of_change,
    })
}

/// What was lost, drawn together.
struct Summary<'a> {
    mean: f64,
    worst: Option<&'a TensorReport>,
}

impl<'a> Summary<'a> {
    fn of(report: &'a MergeReport) -> Self {
        let count = report.tensors.len().max(1) as f64;
        Self {
            mean: report.tensors.iter().map(|tensor| tensor.loss).sum::<f64>() / count,
            worst: report.tensors.iter().max_by(|a, b| a.loss.total_cmp(&b.loss)),
        }
    }

    /// A line a kind of module: how far it moved and what was lost; none where nothing was.
    fn table(&self, report: &MergeReport, form: FormFlag) -> Option<String> {
        let worst = self.worst.filter(|worst| worst.loss > 0.0)?;
        let mut kinds: Vec<(&str, Vec<&TensorReport>)> = Vec::new();
        for tensor in &report.tensors {
            let module = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
            let kind = module.rsplit('.').next().unwrap_or(module);
            match kinds.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, tensors)) => tensors.push(tensor),
                None => kinds.push((kind, vec![tensor])),
            }
        }
        let percent = |value: f64| format!("{:.2} %", 100.0 * value);
        let rows: Vec<Vec<String>> = kinds
            .iter()
            .map(|(kind, tensors)| {
                let mean = |of: fn(&TensorReport) -> f64| {
                    tensors.iter().map(|tensor| of(tensor)).sum::<f64>() / tensors.len() as f64
                };
                vec![
                    (*kind).to_owned(),
                    tensors.len().to_string(),
                    percent(mean(|tensor| tensor.change)),
                    percent(mean(|tensor| tensor.loss)),
                    percent(mean(|tensor| tensor.loss_of_change)),
                ]
            })
            .collect();
        let table = format::table(&["module", "layers", "changed by", "lost", "lost of the change"], &rows);
        let drowns = report.changed().filter(|tensor| tensor.loss_of_change > 1.0).count();
        let warning = match (form, drowns) {
            (_, 0) => String::new(),
            (_, count) => format!("\nin {count} tensors more is lost than the adapter changed"),
        };
        Some(format!("{table}\nmost is lost in {} ({}){warning}", worst.name, percent(worst.loss)))
    }
}
