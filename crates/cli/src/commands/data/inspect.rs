//! `shanty data inspect`: what of each record is trained, how long records are, and what is left out.

use std::path::PathBuf;

use serde::Serialize;
use shanty_coordinator::prepare;
use shanty_data::{
    Format, Looked, PrepareOptions, Prepared, Split, Survey, TemplateUse, Tokenizer, TrainOn, look, survey,
};
use shanty_diagnostic::{Diagnose, Diagnostic};

use super::show::{Piece, pieces, render, render_row};
use crate::{
    base,
    error::Error,
    failure::{CommandResult, Exit, Failure},
    job_file::JobFile,
    prepared::Scratch,
    ui::Ui,
};

/// Show samples with their trained tokens marked, lengths, and what is cut or left out
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty data inspect job.toml
  shanty data inspect job.toml --sample 10 --split eval
  shanty data inspect chats.jsonl --base Qwen/Qwen2.5-0.5B-Instruct
  shanty data inspect s3://bucket/chats/*.jsonl.gz --base models/tiny --format sharegpt
  shanty data inspect job.toml --row 12

What stands between ⟦ and ⟧ is trained; all else is read by the model and not trained.
Data that a job would refuse is shown all the same, and the refusal after it; the exit code is 2 then.")]
pub(crate) struct Args {
    /// A job file, or a data file: a path, a glob or a URL
    #[arg(value_name = "JOB.toml|DATA")]
    what: String,
    /// The base model, for a data file: its folder, or org/name of the hub
    #[arg(long, value_name = "DIR|ORG/NAME")]
    base: Option<PathBuf>,
    /// Override a key of the job file; for a data file, keys below `data`, for example data.max_length=512
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Which part of a job's data to look at
    #[arg(long, value_enum, default_value_t)]
    split: Which,
    /// Records to show, spread evenly over the data; 0 for none
    #[arg(long, value_name = "N", default_value_t = 3, conflicts_with = "row")]
    sample: u64,
    /// Show this packed row in place of records
    #[arg(long, value_name = "ID")]
    row: Option<u64>,
    /// Form of the rows of a data file
    #[arg(long, value_name = "FORM", value_parser = clap::builder::PossibleValuesParser::new(Format::NAMES))]
    format: Option<String>,
    /// Longest row of a data file, tokens
    #[arg(long, value_name = "N")]
    max_length: Option<u32>,
    /// Train on prompts, too
    #[arg(long)]
    train_on_all: bool,
    /// Whether a data file's rows become conversations by the chat template
    #[arg(long, value_enum)]
    chat_template: Option<Template>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
enum Which {
    /// What is trained on.
    #[default]
    Train,
    /// What is held out.
    Eval,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Template {
    /// Conversations do.
    Auto,
    /// All but `text` do.
    Model,
    /// None does.
    None,
}

/// What scripts see.
#[derive(Debug, Serialize)]
struct Report {
    split: Split,
    summary: shanty_data::SplitSummary,
    max_length: u32,
    warnings: Vec<String>,
    refusal: Option<Diagnostic>,
    samples: Vec<Shown>,
}

/// A record as it is shown.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    pub(super) file: PathBuf,
    pub(super) line: u64,
    /// `kept`, `truncated`, `cut`, or why it is left out.
    pub(super) what: String,
    pub(super) tokens: u64,
    pub(super) trained_tokens: u64,
    /// Tokens that a row has room for.
    pub(super) kept_tokens: u64,
    pub(super) pieces: Vec<Piece>,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let options = options(&args, ui)?;
    let tokenizer = Tokenizer::load(&options.model_dir)?;
    if let Some(row) = args.row {
        return show_row(options, &args, row, &tokenizer, ui);
    }
    let split = args.split.split();
    let Survey { summary, warnings, refusal } = survey(&options, split, u64::MAX, &mut |_| {})?;
    let wanted = spread(summary.records, args.sample);
    let samples: Vec<Shown> = look(&options, split, &wanted)?
        .into_iter()
        .map(|looked| shown(looked, &tokenizer, options.max_length))
        .collect::<Result<_, _>>()?;
    let max_length = options.max_length;
    let refusal = refusal.map(|error| error.diagnostic());
    let report = Report { split, summary, max_length, warnings, refusal: refusal.clone(), samples };
    ui.data(&report, |report| {
        render(
            &args.what,
            &report.summary,
            report.max_length,
            &report.samples,
            &tokenizer,
            ui.color_on_stdout(),
        )
    })?;
    for warning in &report.warnings {
        ui.warn(warning);
    }
    match refusal {
        Some(refusal) => Err(Failure::many(vec![refusal])),
        None => Ok(Exit::Done),
    }
}

impl Which {
    fn split(self) -> Split {
        match self {
            Self::Train => Split::Train,
            Self::Eval => Split::Eval,
        }
    }
}

/// What would be prepared.
fn options(args: &Args, ui: &Ui) -> CommandResult<PrepareOptions> {
    let usage =
        |message: &str, hint: &str| Error::Usage { message: message.to_owned(), hint: hint.to_owned() };
    if args.what.ends_with(".toml") {
        let of_file = args.format.is_some()
            || args.max_length.is_some()
            || args.train_on_all
            || args.chat_template.is_some();
        if of_file || args.base.is_some() {
            return Err(usage(
                "a job file says form, length and base itself",
                "override it with `--set data.format=…`",
            )
            .into());
        }
        let mut job = JobFile { job: args.what.clone().into(), set: args.set.clone() }.load(&[], ui)?;
        base::fetch(&mut job, ui)?;
        if args.split == Which::Eval && job.value.data.eval.is_none() {
            return Err(usage("the job has no held-out data", "set `data.eval`").into());
        }
        let spec = base::with_folder(&job.value)?;
        return Ok(prepare::options(&spec, PathBuf::new()));
    }
    if !args.set.is_empty() {
        return Err(usage(
            "`--set` overrides keys of a job file",
            "use `--format`, `--max-length` and the like",
        )
        .into());
    }
    let Some(named) = &args.base else {
        return Err(usage(
            "a data file needs `--base`: its tokenizer and template make the tokens",
            "say `--base DIR` or `--base ORG/NAME`, or give a job file",
        )
        .into());
    };
    let defaults = PrepareOptions::new(base::folder_of(named, ui)?, args.what.clone(), PathBuf::new());
    let format = args.format.as_deref().map(|word| serde_json::from_value(word.into()));
    Ok(PrepareOptions {
        eval: Some(args.what.clone()),
        format: format.transpose().map_err(Error::json)?.unwrap_or_default(),
        max_length: args.max_length.unwrap_or(defaults.max_length),
        train_on: if args.train_on_all { TrainOn::All } else { TrainOn::Answers },
        chat_template: match args.chat_template {
            None | Some(Template::Auto) => TemplateUse::Auto,
            Some(Template::Model) => TemplateUse::Model,
            Some(Template::None) => TemplateUse::None,
        },
        ..defaults
    })
}

/// Numbers of `count` records, spread evenly over all.
fn spread(records: u64, count: u64) -> Vec<u64> {
    let count = count.min(records);
    (0..count)
        .map(|index| (u128::from(records) * u128::from(index) / u128::from(count.max(1))) as u64)
        .collect()
}

fn shown(looked: Looked, tokenizer: &Tokenizer, max_length: u32) -> Result<Shown, shanty_data::Error> {
    let trained_tokens = looked.trained.iter().map(|range| u64::from(range.end - range.start)).sum();
    let tokens = looked.token_ids.len() as u64;
    Ok(Shown {
        pieces: pieces(&looked.token_ids, &looked.trained, tokenizer)?,
        kept_tokens: if looked.what == "truncated" { tokens.min(u64::from(max_length)) } else { tokens },
        file: looked.place.file,
        line: looked.place.line,
        what: looked.what,
        tokens,
        trained_tokens,
    })
}

/// Packs the data and shows one row of it.
fn show_row(
    mut options: PrepareOptions,
    args: &Args,
    id: u64,
    tokenizer: &Tokenizer,
    ui: &Ui,
) -> CommandResult<Exit> {
    let scratch = Scratch::new();
    options.out = scratch.path().to_owned();
    options.require_end_token = false;
    let split = args.split.split();
    if split == Split::Train {
        options.eval = None;
    } else if !args.what.ends_with(".toml") {
        options.eval = Some(args.what.clone());
    }
    shanty_data::prepare(&options, &mut |_| {})?;
    let prepared = Prepared::open(scratch.path())?;
    let row = prepared.row(split, id)?;
    let sources = prepared.samples_of_row(split, id)?;
    let mut samples = Vec::new();
    let mut start = 0;
    for (segment, source) in row.segments.iter().zip(&sources) {
        let end = start + segment.length;
        let ids = &row.token_ids[start as usize..end as usize];
        let inside = |range: &&std::ops::Range<u32>| range.start >= start && range.end <= end;
        let trained: Vec<_> =
            row.trained.iter().filter(inside).map(|range| range.start - start..range.end - start).collect();
        samples.push(Shown {
            file: source.file.clone(),
            line: source.line,
            what: "kept".to_owned(),
            tokens: ids.len() as u64,
            kept_tokens: ids.len() as u64,
            trained_tokens: trained.iter().map(|range| u64::from(range.end - range.start)).sum(),
            pieces: pieces(ids, &trained, tokenizer)?,
        });
        start = end;
    }
    let report =
        serde_json::json!({ "split": split, "row": id, "tokens": row.token_ids.len(), "samples": samples });
    ui.data(&report, |_| {
        render_row(id, row.token_ids.len() as u64, options.max_length, &samples, ui.color_on_stdout())
    })?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_spread_over_all_records() {
        assert_eq!(spread(100, 4), [0, 25, 50, 75]);
        assert_eq!(spread(2, 5), [0, 1]);
        assert_eq!(spread(0, 3), Vec::<u64>::new());
        assert_eq!(spread(u64::MAX, 2), [0, u64::MAX / 2]);
    }
}
