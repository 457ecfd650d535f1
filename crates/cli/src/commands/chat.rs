//! `shanty chat`: a conversation in the terminal.

use std::{
    io::{self, BufRead, IsTerminal, Write},
    path::{Path, PathBuf},
};

use serde_json::json;
use shanty_data::{Message, Tokenizer};
use shanty_peft_core::generate::{End, Request, SamplingOptions};

use crate::{
    error::Error,
    failure::{CommandResult, Exit},
    flags::{ModelFlags, SamplingFlags},
    model::{Choice, Model, ModelOptions, sampling},
    stream::TextStream,
    ui::{Paint, Ui, paint},
};

/// Talk with a base model, and switch between adapters on it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty chat --model models/tiny --adapter pirate=P --adapter gnome=G
  shanty chat --model models/tiny --system 'Answer in one sentence.' --temperature 0.7 --top-p 0.9

In the conversation:
  /adapter NAME   answer with another adapter, or the bare base; alone it lists them
  /system TEXT    set what the model is told ahead of the conversation, and begin anew
  /reset          begin anew
  /save FILE      write the conversation to a file, as a line of `messages`
  /help, /quit
A line that ends with a backslash goes on in the next. The base is loaded once, whatever the
number of adapters.")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// Which adapter answers at first; the first one when absent
    #[arg(long = "use", value_name = "NAME")]
    use_adapter: Option<String>,
    /// What the model is told ahead of the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingFlags,
}

const HELP: &str = "\
/adapter NAME   answer with another adapter; alone it lists them
/system TEXT    set what the model is told ahead, and begin anew
/reset          begin anew
/save FILE      write the conversation as a line of `messages`
/quit           leave; so does Ctrl-D";

/// A conversation in progress.
struct Chat<'a> {
    model: Model,
    tokenizer: Tokenizer,
    options: SamplingOptions,
    choice: Choice,
    messages: Vec<Message>,
    ui: &'a Ui,
}

/// What to do after a line.
enum Next {
    GoOn,
    Leave,
}

pub(crate) fn execute(mut args: Args, ui: &Ui) -> CommandResult<Exit> {
    args.model.fetch(ui)?;
    args.sampling.check()?;
    let tokenizer = Tokenizer::load(&args.model.model)?;
    // Said before the base is loaded: without a template there is nothing to talk in.
    tokenizer.check_template()?;
    let model = Model::load(&ModelOptions::new(&args.model), ui)?;
    let choice = match &args.use_adapter {
        Some(name) => model.find(name)?,
        None => model.first(),
    };
    let options = sampling(&args.sampling, &tokenizer);
    let mut chat = Chat { model, tokenizer, options, choice, messages: Vec::new(), ui };
    chat.begin(args.system.as_deref());
    let talks = io::stdin().is_terminal() && !ui.is_json();
    if talks {
        ui.note(format!("{} answers; /help says what else there is", chat.model.name(chat.choice)));
    }
    let mut input = io::stdin().lock();
    while let Some(line) = read_line(&mut input, talks, ui)? {
        if let Next::Leave = chat.take(&line)? {
            break;
        }
    }
    Ok(Exit::Done)
}

/// The next line, with those that it goes on in; none at the end of the input.
fn read_line(input: &mut impl BufRead, talks: bool, ui: &Ui) -> CommandResult<Option<String>> {
    let mut whole = String::new();
    loop {
        if talks {
            let mark = if whole.is_empty() { "> " } else { "… " };
            // To stderr: stdout carries the answers alone.
            let mut err = io::stderr().lock();
            drop(
                write!(err, "{}", paint(ui.color_on_stderr(), Paint::Cyan, mark)).and_then(|()| err.flush()),
            );
        }
        let mut line = String::new();
        let read = input.read_line(&mut line).map_err(|source| Error::File {
            action: "read",
            path: PathBuf::from("stdin"),
            source,
        })?;
        if read == 0 {
            return Ok((!whole.is_empty()).then_some(whole));
        }
        let line = line.trim_end_matches(['\n', '\r']);
        match line.strip_suffix('\\') {
            Some(part) => {
                whole.push_str(part);
                whole.push('\n');
            }
            None => {
                whole.push_str(line);
                return Ok(Some(whole));
            }
        }
    }
}

impl Chat<'_> {
    /// Begins anew, with what the model is told ahead.
    fn begin(&mut self, system: Option<&str>) {
        self.messages.clear();
        if let Some(system) = system.filter(|text| !text.is_empty()) {
            self.messages.push(Message { role: "system".to_owned(), content: system.to_owned() });
        }
    }

    fn take(&mut self, line: &str) -> CommandResult<Next> {
        let line = line.trim();
        let Some(command) = line.strip_prefix('/') else {
            if !line.is_empty() {
                self.answer(line)?;
            }
            return Ok(Next::GoOn);
        };
        let (word, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match word {
            "quit" | "exit" | "q" => return Ok(Next::Leave),
            "help" | "?" => self.ui.note(HELP),
            "reset" => {
                let system = self.system();
                self.begin(system.as_deref());
                self.ui.note("the conversation begins anew");
            }
            "system" => {
                self.begin(Some(rest));
                self.ui.note("the conversation begins anew");
            }
            "adapter" | "adapters" => self.switch(rest),
            "save" => self.save(rest),
            _ => self.ui.warn(format!("there is no /{word}; /help says what there is")),
        }
        Ok(Next::GoOn)
    }

    fn system(&self) -> Option<String> {
        let first = self.messages.first().filter(|first| first.role == "system");
        first.map(|first| first.content.clone())
    }

    fn switch(&mut self, name: &str) {
        if name.is_empty() {
            let listed: Vec<String> = self
                .model
                .all()
                .chain([None])
                .map(|choice| {
                    let mark = if choice == self.choice { "*" } else { " " };
                    format!("{mark} {}", self.model.name(choice))
                })
                .collect();
            return self.ui.note(listed.join("\n"));
        }
        match self.model.find(name) {
            Ok(choice) => {
                self.choice = choice;
                self.ui.note(format!("{name} answers from now on"));
            }
            Err(error) => self.ui.warn(error.to_string()),
        }
    }

    /// Writes the conversation; an old file is not written over.
    fn save(&self, file: &str) {
        if file.is_empty() {
            return self.ui.warn("say where to: /save FILE");
        }
        let line = format!("{}\n", json!({ "messages": self.messages }));
        let mut options = std::fs::OpenOptions::new();
        let written = options.write(true).create_new(true).open(Path::new(file));
        match written.and_then(|mut out| out.write_all(line.as_bytes())) {
            Ok(()) => self.ui.note(format!("{file} holds {} messages", self.messages.len())),
            Err(error) => self.ui.warn(format!("failed to write `{file}`: {error}")),
        }
    }

    /// The prompt's tokens. Where conversation and answer do not fit the context, the oldest turns are left out.
    fn prompt(&mut self) -> CommandResult<Vec<u32>> {
        let room = self.model.positions();
        let mut left_out = 0;
        loop {
            let rendered = self.tokenizer.render(&self.messages, true)?;
            let ids = self.tokenizer.encode(&rendered, false)?;
            let oldest = usize::from(self.system().is_some());
            if ids.len() + self.options.max_tokens.min(room / 4) <= room || self.messages.len() <= oldest + 1
            {
                if left_out > 0 {
                    self.ui.note(format!(
                        "the context of {room} tokens is full: the oldest {left_out} messages are left out"
                    ));
                }
                return Ok(ids);
            }
            // A question goes with its answer: what is left begins with a question.
            let turn = 2.min(self.messages.len() - oldest - 1);
            self.messages.drain(oldest..oldest + turn);
            left_out += turn;
        }
    }

    fn answer(&mut self, text: &str) -> CommandResult<()> {
        self.messages.push(Message { role: "user".to_owned(), content: text.to_owned() });
        let prompt = self.prompt()?;
        let request = Request { prompt, options: self.options.clone() };
        let mut stream = TextStream::new(&self.tokenizer);
        let (ui, mut failed) = (self.ui, None);
        let end = self.model.generate(self.choice, request, &mut |id| {
            let shown =
                stream.push(id).and_then(|piece| if ui.is_json() { Ok(()) } else { ui.piece(&piece) });
            failed = shown.err();
            failed.is_none()
        })?;
        if let Some(failure) = failed {
            return Err(failure);
        }
        let (rest, finished) = stream.finish()?;
        if ui.is_json() {
            let adapter = self.choice.map(|_| self.model.name(self.choice));
            ui.json(&json!({ "adapter": adapter, "text": finished.text, "tokens": finished.tokens }))?;
        } else {
            ui.line(rest)?;
        }
        if end.end == End::Context {
            ui.note("the context is full; /reset begins anew");
        }
        self.messages.push(Message { role: "assistant".to_owned(), content: finished.text });
        Ok(())
    }
}
