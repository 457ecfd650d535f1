//! `shanty generate`: continues a text with a base, and an adapter on it.

use std::path::PathBuf;

use serde_json::json;
use shanty_data::Tokenizer;

use crate::{
    error::Error,
    failure::{CommandResult, Exit},
    model::{BaseQuantization, Model, ModelOptions, Sampling},
    ui::Ui,
};

/// Continue a text with a base model, and an adapter on it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty generate --model models/tiny --adapter runs/pirate/adapter --prompt 'Ahoy'
  shanty generate --model models/tiny --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 7

Without --temperature the likeliest token is taken every time. The text streams to stdout.")]
pub(crate) struct Args {
    /// The base model's folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The adapter's folder, as shanty or PEFT wrote it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Tokens to add at most
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_tokens: usize,
    /// How freely tokens are drawn; 0 takes the likeliest
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Draw among the K likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw among the likeliest tokens that make up this share
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Seeds the draw: the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 17)]
    seed: u64,
    /// How the base is kept in memory
    #[arg(long, value_enum, default_value_t)]
    quantization: BaseQuantization,
    /// Threads to compute with; all cores when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let sampling = Sampling {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    sampling.check()?;
    let mut model = Model::open(&ModelOptions {
        base: args.model.clone(),
        adapter: args.adapter,
        quantization: args.quantization,
        threads: args.threads.map_or(0, usize::from),
        max_length: None,
    })?;
    let tokenizer = Tokenizer::load(&args.model)?;
    let mut writer = Writer { tokenizer: &tokenizer, ids: Vec::new(), shown: String::new() };
    let mut failed = None;
    model.generate(&tokenizer, &args.prompt, &sampling, &mut |id| {
        let shown = writer.next(id).and_then(|piece| if ui.is_json() { Ok(()) } else { ui.piece(&piece) });
        failed = shown.err();
        failed.is_none()
    })?;
    if let Some(failure) = failed {
        return Err(failure);
    }
    let rest = writer.rest()?;
    if ui.is_json() {
        let text = format!("{}{rest}", writer.shown);
        ui.json(&json!({ "prompt": args.prompt, "text": text, "tokens": writer.ids.len() }))?;
    } else {
        ui.line(rest)?;
    }
    Ok(Exit::Done)
}

/// Turns ids into text as they come. A token may be a part of a letter; text is shown once it is whole.
struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    shown: String,
}

impl Writer<'_> {
    fn next(&mut self, id: u32) -> CommandResult<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, true)?;
        if text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        Ok(self.advance(text))
    }

    fn rest(&mut self) -> CommandResult<String> {
        let text = self.tokenizer.decode(&self.ids, true)?;
        let shown = self.shown.clone();
        let rest = self.advance(text);
        self.shown = shown;
        Ok(rest)
    }

    fn advance(&mut self, text: String) -> String {
        let piece = text.strip_prefix(self.shown.as_str()).unwrap_or_default().to_owned();
        if !piece.is_empty() {
            self.shown = text;
        }
        piece
    }
}

/// Refuses numbers that mean nothing.
impl Sampling {
    fn check(&self) -> Result<(), Error> {
        let impossible = |flag: &'static str, value: String, rule: &str| {
            Err(Error::Impossible { flag, value, rule: rule.to_owned() })
        };
        if self.max_tokens == 0 {
            return impossible("--max-tokens", "0".to_owned(), "must be at least 1");
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return impossible("--temperature", self.temperature.to_string(), "must be at least 0");
        }
        if self.top_k == Some(0) {
            return impossible("--top-k", "0".to_owned(), "must be at least 1");
        }
        match self.top_p {
            Some(share) if !(share > 0.0 && share <= 1.0) => {
                impossible("--top-p", share.to_string(), "must be above 0 and at most 1")
            }
            _ => Ok(()),
        }
    }
}
