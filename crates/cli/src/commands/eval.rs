//! `shanty eval`: how well a base, and adapters on it, predict texts and answer questions.

use serde_json::{Value, json};
use shanty_data::{Format, Question, Tokenizer, questions};
use shanty_peft_core::batch;

use crate::{
    bar::Bar,
    error::Error,
    failure::{CommandResult, Exit},
    flags::ModelFlags,
    format,
    model::{BASE, Choice, Model, ModelOptions, row},
    prepared::rows_of_file,
    score::{self, Scored, Share},
    ui::Ui,
};

/// Evaluate a base model, and adapters on it, on data
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty eval --model models/tiny --data data/eval.jsonl
  shanty eval --model models/tiny --adapter runs/pirate/adapter --data data/eval.jsonl
  shanty eval --model models/tiny --adapter a=A --adapter b=B --with-base --data ask.jsonl

Loss is the mean over trained tokens. Where rows have `choices` beside `prompt` and
`completion`, accuracy is the share of rows whose completion has the highest log likelihood of
its choices: summed over a choice's tokens, given the prompt, without an end token.
--exact-match continues each prompt, the likeliest token every time, and compares the text. With
several adapters, or --with-base, there is a row for each; the base is loaded once.")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// Evaluate the bare base too
    #[arg(long)]
    with_base: bool,
    /// The data: JSONL or Parquet; a path or a glob
    #[arg(long, value_name = "FILE")]
    data: String,
    /// Form of the rows
    #[arg(long, value_enum, default_value_t)]
    format: DataFormat,
    /// Continue each prompt and compare with its completion
    #[arg(long)]
    exact_match: bool,
    /// Longest row, tokens; 2048 or the model's context when absent
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
}

/// Form of the rows.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
pub(crate) enum DataFormat {
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

/// What was found for the base or an adapter.
struct Found {
    name: String,
    loss: f64,
    tokens: u64,
    accuracy: Option<Share>,
    exact: Option<Share>,
}

pub(crate) fn execute(mut args: Args, ui: &Ui) -> CommandResult<Exit> {
    args.model.fetch(ui)?;
    let max_length = length(&args.model.model, args.max_length)?;
    let tokenizer = Tokenizer::load(&args.model.model)?;
    let asked = questions(&args.data)?.unwrap_or_default();
    if args.exact_match && asked.is_empty() {
        let message = format!("`{}` has no rows with `prompt` and `completion` to match", args.data);
        let hint = "--exact-match compares a continued prompt with its completion".to_owned();
        return Err(Error::Usage { message, hint }.into());
    }
    let options = ModelOptions::new(&args.model);
    let (mut model, rows) = loss_on(options, &args.data, args.format, Some(max_length), ui)?;
    let scored = score::prepare(&asked, &tokenizer, max_length.saturating_sub(model.virtual_tokens()))?;
    let base = (args.with_base || model.first().is_none()).then_some(None);
    let choices: Vec<Choice> = base.into_iter().chain(model.all()).collect();
    let work = Work { rows: &rows, scored: &scored, asked: if args.exact_match { &asked } else { &[] } };
    let mut found = Vec::with_capacity(choices.len());
    for choice in choices {
        let one = evaluate(&mut model, choice, &work, &tokenizer, ui)?;
        if ui.is_json() {
            ui.json(&as_json(&one))?;
        }
        found.push(one);
    }
    if !ui.is_json() {
        ui.line(match &*found {
            [one] => line(one),
            _ => table(&found),
        })?;
    }
    Ok(Exit::Done)
}

/// The longest row, checked against the model's context.
fn length(model: &std::path::Path, wanted: Option<usize>) -> CommandResult<usize> {
    let context = Model::context(model)?;
    let length = wanted.unwrap_or_else(|| USUAL_LENGTH.min(context));
    if !(2..=context).contains(&length) {
        let rule = format!("must be from 2 to the model's context of {context} tokens");
        return Err(Error::Impossible { flag: "--max-length", value: length.to_string(), rule }.into());
    }
    Ok(length)
}

/// A model, and the rows of a file for it.
pub(crate) fn loss_on(
    options: ModelOptions,
    data: &str,
    format: DataFormat,
    max_length: Option<usize>,
    ui: &Ui,
) -> CommandResult<(Model, Vec<batch::Row>)> {
    let max_length = length(&options.base, max_length)?;
    let format = match format {
        DataFormat::Auto => Format::Auto,
        DataFormat::Text => Format::Text,
        DataFormat::PromptCompletion => Format::PromptCompletion,
        DataFormat::Messages => Format::Messages,
    };
    let model = Model::load(&ModelOptions { max_length: Some(max_length), ..options.clone() }, ui)?;
    // The same samples for the base and every adapter: with room for the most virtual tokens.
    let rows = rows_of_file(&options.base, data, format, max_length, model.virtual_tokens())?;
    Ok((model, rows.into_iter().map(row).collect()))
}

/// What is evaluated.
struct Work<'a> {
    rows: &'a [batch::Row],
    scored: &'a [Scored],
    asked: &'a [Question],
}

fn evaluate(
    model: &mut Model,
    choice: Choice,
    work: &Work<'_>,
    tokenizer: &Tokenizer,
    ui: &Ui,
) -> CommandResult<Found> {
    let name = model.name(choice).to_owned();
    let bar = Bar::new(ui, "predicts");
    let (mut loss, mut tokens) = (0.0, 0);
    for (index, rows) in work.rows.chunks(16).enumerate() {
        let (more, count) = model.evaluate(choice, rows)?;
        loss += more;
        tokens += count;
        bar.at((16 * index + rows.len()) as u64, work.rows.len() as u64);
    }
    bar.done();
    let mut accuracy = None;
    if !work.scored.is_empty() {
        let bar = Bar::new(ui, "chooses ");
        accuracy = Some(score::accuracy(model, choice, work.scored, &bar)?);
        bar.done();
    }
    let mut exact = None;
    if !work.asked.is_empty() {
        let bar = Bar::new(ui, "answers ");
        exact = Some(score::exact_match(model, choice, work.asked, tokenizer, &bar)?);
        bar.done();
    }
    Ok(Found { name, loss: loss / tokens as f64, tokens, accuracy, exact })
}

fn as_json(found: &Found) -> Value {
    let adapter = (found.name != BASE).then_some(&found.name);
    let mut json = json!({
        "adapter": adapter, "loss": found.loss, "perplexity": found.loss.exp(), "tokens": found.tokens,
    });
    if let Some(share) = found.accuracy {
        json["accuracy"] = share.value().into();
        json["chance"] = share.chance.into();
        json["rows"] = share.rows.into();
    }
    if let Some(share) = found.exact {
        json["exact_match"] = share.value().into();
        json["rows"] = share.rows.into();
    }
    json
}

fn percent(share: &Share) -> String {
    format!("{:.1} %", 100.0 * share.value())
}

fn line(found: &Found) -> String {
    let tokens = format::count(found.tokens);
    let mut text = format!("loss {:.4}  perplexity {:.2}  {tokens} tokens", found.loss, found.loss.exp());
    if let Some(share) = &found.accuracy {
        let (right, rows) = (format::count(share.right), format::count(share.rows));
        let chance = 100.0 * share.chance;
        text.push_str(&format!(
            "\naccuracy {} ({right} of {rows} rows; chance {chance:.1} %)",
            percent(share)
        ));
    }
    if let Some(share) = &found.exact {
        let (right, rows) = (format::count(share.right), format::count(share.rows));
        text.push_str(&format!("\nexact match {} ({right} of {rows} rows)", percent(share)));
    }
    text
}

fn table(found: &[Found]) -> String {
    let (accuracy, exact) =
        (found.iter().any(|one| one.accuracy.is_some()), found.iter().any(|one| one.exact.is_some()));
    let mut header = vec!["adapter", "loss", "perplexity", "tokens"];
    header.extend(accuracy.then_some("accuracy"));
    header.extend(exact.then_some("exact match"));
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|one| {
            let mut cells = vec![
                one.name.clone(),
                format!("{:.4}", one.loss),
                format!("{:.2}", one.loss.exp()),
                format::count(one.tokens),
            ];
            cells.extend(accuracy.then(|| one.accuracy.as_ref().map_or_else(String::new, percent)));
            cells.extend(exact.then(|| one.exact.as_ref().map_or_else(String::new, percent)));
            cells
        })
        .collect();
    format::table(&header, &rows)
}
