//! `shanty generate`: continues texts with a base, and adapters on it.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::json;
use shanty_data::{Message, Tokenizer};
use shanty_peft_core::generate::{End, Request};

use crate::{
    error::Error,
    failure::{CommandResult, Exit},
    flags::{ModelFlags, SamplingFlags},
    model::{BASE, Choice, Model, ModelOptions, prompt_ids, sampling},
    stream::TextStream,
    ui::{Paint, Ui, paint},
};

/// Continue texts with a base model, and adapters on it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty generate --model models/tiny --adapter runs/pirate/adapter --prompt 'Ahoy'
  shanty generate --model models/tiny --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 7
  shanty generate --model models/tiny --adapter pirate=P --adapter gnome=G --prompt Ahoy
  shanty generate --model models/tiny --adapter pirate=P --adapter gnome=G --prompts ask.jsonl
  echo 'Once upon' | shanty generate --model models/tiny --prompts -

Without --temperature the likeliest token is taken every time. One text streams to stdout; of
several each is shown when it is whole, in the order of the prompts. With several adapters each
prompt is continued by every one of them, unless --use or the prompt itself says which. The base
is loaded once; prompts of one adapter go through it together.

A file of prompts has one on each line, or JSON Lines with `prompt` or `messages`, and perhaps
`adapter`.")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// A text to continue; may be given many times
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// A file of texts to continue; - reads stdin
    #[arg(long = "prompts", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Which adapter continues them; base is the bare base
    #[arg(long = "use", value_name = "NAME")]
    use_adapter: Option<String>,
    /// Take each text as what a user says, in the model's chat template
    #[arg(long)]
    chat: bool,
    /// Texts that go through the model together
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch: u16,
    #[command(flatten)]
    sampling: SamplingFlags,
}

/// A text to be continued by one adapter.
struct Job {
    /// As it was given, for people.
    shown: String,
    request: Request,
    choice: Choice,
}

/// A line of a file of prompts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    adapter: Option<String>,
}

pub(crate) fn execute(mut args: Args, ui: &Ui) -> CommandResult<Exit> {
    args.model.fetch(ui)?;
    args.sampling.check()?;
    let mut lines: Vec<Line> = args.prompts.iter().map(|prompt| plain(prompt)).collect();
    if let Some(file) = &args.file {
        lines.extend(read(file)?);
    }
    if lines.is_empty() {
        let message = "there is no prompt".to_owned();
        return Err(Error::Usage { message, hint: "give --prompt TEXT or --prompts FILE".to_owned() }.into());
    }
    let mut model = Model::load(&ModelOptions::new(&args.model), ui)?;
    let tokenizer = Tokenizer::load(&args.model.model)?;
    let jobs = jobs(&args, &lines, &model, &tokenizer)?;
    match &*jobs {
        [job] if !ui.is_json() => stream(&mut model, &tokenizer, job, ui)?,
        _ => together(&mut model, &tokenizer, &jobs, usize::from(args.batch), ui)?,
    }
    Ok(Exit::Done)
}

fn plain(prompt: &str) -> Line {
    Line { prompt: Some(prompt.to_owned()), messages: None, adapter: None }
}

/// The prompts of a file: JSON Lines by its ending or its first letter, else one text on each line.
fn read(file: &Path) -> Result<Vec<Line>, Error> {
    let unreadable = |source| Error::File { action: "read", path: file.to_owned(), source };
    let text = if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text).map_err(unreadable)?;
        text
    } else {
        std::fs::read_to_string(file).map_err(unreadable)?
    };
    let is_json = file.extension().is_some_and(|ending| ending == "jsonl" || ending == "ndjson")
        || text.trim_start().starts_with('{');
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    if !is_json {
        return Ok(lines.map(|(_, line)| plain(line)).collect());
    }
    lines
        .map(|(index, line)| {
            let wrong = |reason: String| Error::Prompts { file: file.to_owned(), line: index + 1, reason };
            let line: Line = serde_json::from_str(line).map_err(|error| wrong(error.to_string()))?;
            match (&line.prompt, &line.messages) {
                (Some(_), None) | (None, Some(_)) => Ok(line),
                _ => Err(wrong("it needs either `prompt` or `messages`".to_owned())),
            }
        })
        .collect()
}

/// What is to be continued by whom.
fn jobs(args: &Args, lines: &[Line], model: &Model, tokenizer: &Tokenizer) -> CommandResult<Vec<Job>> {
    let options = sampling(&args.sampling, tokenizer);
    let everywhere: Vec<Choice> = match &args.use_adapter {
        Some(name) => vec![model.find(name)?],
        None if model.first().is_none() => vec![None],
        None => model.all().collect(),
    };
    let mut jobs = Vec::new();
    for line in lines {
        let own = line.adapter.as_deref().map(|name| model.find(name)).transpose()?;
        let user = |text: &str| vec![Message { role: "user".to_owned(), content: text.to_owned() }];
        let messages = match (&line.messages, &line.prompt) {
            (Some(messages), _) => Some(messages.clone()),
            (None, Some(prompt)) if args.chat => Some(user(prompt)),
            _ => None,
        };
        let shown = match (&line.prompt, &messages) {
            (Some(prompt), _) => prompt.clone(),
            (None, Some(messages)) => messages.last().map(|last| last.content.clone()).unwrap_or_default(),
            (None, None) => String::new(),
        };
        let prompt = match &messages {
            Some(messages) => prompt_ids(tokenizer, &tokenizer.render(messages, true)?, false)?,
            None => prompt_ids(tokenizer, &shown, true)?,
        };
        for choice in own.map_or_else(|| everywhere.clone(), |own| vec![own]) {
            // The text of a chat is not continued: the answer begins anew.
            let shown = shown.clone();
            let request = Request { prompt: prompt.clone(), options: options.clone() };
            jobs.push(Job { shown, request, choice });
        }
    }
    Ok(jobs)
}

/// One text, shown as it comes.
fn stream(model: &mut Model, tokenizer: &Tokenizer, job: &Job, ui: &Ui) -> CommandResult<()> {
    let mut text = TextStream::new(tokenizer);
    let mut failed = None;
    let end = model.generate(job.choice, job.request.clone(), &mut |id| {
        let shown = text.push(id).and_then(|piece| ui.piece(&piece));
        failed = shown.err();
        failed.is_none()
    })?;
    if let Some(failure) = failed {
        return Err(failure);
    }
    ui.line(text.finish()?.0)?;
    if end.end == End::Context {
        ui.note(format!("the model's context of {} tokens is full", model.positions()));
    }
    Ok(())
}

/// Several texts, grouped by adapter, shown in their order as soon as all before them are there.
fn together(
    model: &mut Model,
    tokenizer: &Tokenizer,
    jobs: &[Job],
    batch: usize,
    ui: &Ui,
) -> CommandResult<()> {
    let mut done: Vec<Option<(String, usize, End)>> = jobs.iter().map(|_| None).collect();
    let mut shown = 0;
    while shown < jobs.len() {
        // The next that is not there yet says which adapter's turn it is.
        let choice = jobs[shown].choice;
        let waiting =
            (shown..jobs.len()).filter(|index| done[*index].is_none() && jobs[*index].choice == choice);
        let group: Vec<usize> = waiting.take(batch).collect();
        let requests: Vec<Request> = group.iter().map(|index| jobs[*index].request.clone()).collect();
        let ends = model.continue_all(choice, &requests, &mut |_, _| std::ops::ControlFlow::Continue(()))?;
        for (index, end) in group.into_iter().zip(ends) {
            let text = tokenizer.decode(&end.tokens, true)?;
            done[index] = Some((text, end.tokens.len(), end.end));
        }
        while let Some(Some((text, tokens, end))) = done.get(shown) {
            show(model, &jobs[shown], (text, *tokens, *end), ui)?;
            shown += 1;
        }
    }
    Ok(())
}

fn show(model: &Model, job: &Job, (text, tokens, end): (&str, usize, End), ui: &Ui) -> CommandResult<()> {
    let adapter = model.name(job.choice);
    if ui.is_json() {
        let end = match end {
            End::Stop(_) => "stop",
            End::Limit => "limit",
            End::Context => "context",
            End::Asked => "asked",
        };
        let adapter = (adapter != BASE).then_some(adapter);
        return ui.json(&json!({
            "prompt": job.shown, "adapter": adapter, "text": text, "tokens": tokens, "end": end,
        }));
    }
    let color = ui.color_on_stdout();
    ui.line(paint(color, Paint::Bold, &format!("--- {adapter}")))?;
    ui.line(format!("{}{text}", paint(color, Paint::Dim, &job.shown)))
}
