//! `shanty eval`: how well a base, and an adapter on it, predict a text.

use std::path::PathBuf;

use serde_json::json;
use shanty_data::Format;

use crate::{
    error::Error,
    failure::{CommandResult, Exit},
    format,
    model::{BaseQuantization, Model, ModelOptions},
    prepared::rows_of_file,
    ui::Ui,
};

/// Evaluate a base model, and an adapter on it, on data
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty eval --model models/tiny --data data/eval.jsonl
  shanty eval --model models/tiny --adapter runs/pirate/adapter --data data/eval.jsonl --output json")]
pub(crate) struct Args {
    /// The base model's folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The adapter's folder, as shanty or PEFT wrote it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The data: JSONL or Parquet; a path or a glob
    #[arg(long, value_name = "FILE")]
    data: String,
    /// Form of the rows
    #[arg(long, value_enum, default_value_t)]
    format: DataFormat,
    /// Longest row, tokens; 2048 or the model's context when absent
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// How the base is kept in memory
    #[arg(long, value_enum, default_value_t)]
    quantization: BaseQuantization,
    /// Threads to compute with; all cores when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
}

/// Form of the rows.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
enum DataFormat {
    /// Detected from the columns.
    #[default]
    Auto,
    /// `text`: every token counts.
    Text,
    /// `prompt`, `completion`: the completion counts.
    PromptCompletion,
    /// `messages`: what the assistant says counts.
    Messages,
}

/// Longest row where nobody says.
const USUAL_LENGTH: usize = 2048;

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let context = Model::context(&args.model)?;
    let max_length = args.max_length.unwrap_or_else(|| USUAL_LENGTH.min(context));
    if !(2..=context).contains(&max_length) {
        let rule = format!("must be from 2 to the model's context of {context} tokens");
        return Err(Error::Impossible { flag: "--max-length", value: max_length.to_string(), rule }.into());
    }
    let format = match args.format {
        DataFormat::Auto => Format::Auto,
        DataFormat::Text => Format::Text,
        DataFormat::PromptCompletion => Format::PromptCompletion,
        DataFormat::Messages => Format::Messages,
    };
    let mut model = Model::open(&ModelOptions {
        base: args.model.clone(),
        adapter: args.adapter,
        quantization: args.quantization,
        threads: args.threads.map_or(0, usize::from),
        max_length: Some(max_length),
    })?;
    let rows = rows_of_file(&args.model, &args.data, format, max_length)?;
    let (loss, tokens) = model.evaluate(rows)?;
    let result = json!({ "loss": loss, "perplexity": loss.exp(), "tokens": tokens });
    ui.data(&result, |_| {
        format!("loss {loss:.4}  perplexity {:.2}  {} tokens", loss.exp(), format::count(tokens))
    })?;
    Ok(Exit::Done)
}
