//! Chat templates: Jinja as transformers runs it, and what in the result the assistant wrote.

use std::{ops::Range, path::Path};

use minijinja::{
    AutoEscape, Environment, ErrorKind,
    syntax::SyntaxConfig,
    value::{Kwargs, Value},
};
use serde_json::Value as Json;

use super::{Rendered, python};
use crate::Error;

/// Name of the template in its environment.
const NAME: &str = "chat_template";
/// Instructions that one rendering may take. Long conversations with many tools take some hundred thousand.
const FUEL: u64 = 5_000_000;
/// How deep macros and blocks may nest; minijinja's own limit of 500 may fill the stack of a small thread.
const RECURSION: usize = 100;
/// A noncharacter of Unicode: no text that is meant for interchange holds it.
const MARK: char = '\u{10fffe}';
const OPEN: &str = "\u{10fffe}[";
const CLOSE: &str = "\u{10fffe}]";

/// A conversation on its way into a template.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Said<'a> {
    pub(crate) messages: &'a [Json],
    pub(crate) tools: Option<&'a Json>,
    /// For each message whether it is trained where it is an answer; a missing one is.
    pub(crate) trained: &'a [bool],
}

impl Said<'_> {
    /// Numbers of the answers, from 0 among the messages.
    fn answers(&self) -> impl Iterator<Item = usize> + '_ {
        let role = |message: &Json| message.get("role").and_then(Json::as_str) == Some("assistant");
        self.messages.iter().enumerate().filter(move |(_, message)| role(message)).map(|(index, _)| index)
    }

    fn is_trained(&self, message: usize) -> bool {
        self.trained.get(message).copied().unwrap_or(true)
    }
}

/// A chat template, parsed.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    tokens: Vec<(String, String)>,
    /// Whether the template itself marks what the assistant wrote.
    has_marks: bool,
}

impl ChatTemplate {
    /// Parses a template. `tokens` are given to it by name; `time` is what `strftime_now` shows, if it is to exist.
    pub(crate) fn new(source: &str, tokens: &[(String, String)], time: Option<i64>) -> Result<Self, String> {
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        let syntax = syntax.build().map_err(|source| source.to_string())?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        // A template comes with a model of somebody else's: it must not take for ever, nor all of the stack.
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", |value: &Value, indent: Option<usize>, options: Kwargs| {
            python::tojson(value, indent, options)
        });
        environment.add_filter("__generation", |answer: String| format!("{OPEN}{answer}{CLOSE}"));
        environment.add_function("raise_exception", |reason: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason))
        });
        if let Some(time) = time {
            environment.add_function("strftime_now", move |format: String| python::strftime(time, &format));
        }
        let (source, has_marks) = generation_as_filter(source);
        environment.add_template_owned(NAME, source).map_err(|source| reason_of(&source))?;
        Ok(Self { environment, tokens: tokens.to_vec(), has_marks })
    }

    /// Sets how many instructions a rendering may take.
    pub(crate) fn set_fuel(&mut self, fuel: u64) {
        self.environment.set_fuel(Some(fuel));
    }

    fn run(&self, messages: &[Value], tools: Option<&Value>, prompt: bool) -> Result<String, String> {
        let context = [
            ("messages", Value::from(messages)),
            ("tools", tools.cloned().unwrap_or_else(|| Value::from(()))),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(prompt)),
        ];
        let tokens = self.tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        let context = Value::from_pairs(context.into_iter().chain(tokens));
        let template = self.environment.get_template(NAME).map_err(|source| reason_of(&source))?;
        template.render(context).map_err(|source| reason_of(&source))
    }

    /// A conversation as the model reads it.
    pub(crate) fn render(
        &self,
        model_dir: &Path,
        messages: &[Json],
        tools: Option<&Json>,
        prompt: bool,
    ) -> Result<String, Error> {
        let messages: Vec<Value> = messages.iter().map(python::from_json).collect();
        let tools = tools.map(python::from_json);
        let text = self.run(&messages, tools.as_ref(), prompt).map_err(|reason| Error::Template {
            model_dir: model_dir.to_owned(),
            place: None,
            reason,
        })?;
        Ok(if self.has_marks { text.replace(OPEN, "").replace(CLOSE, "") } else { text })
    }

    /// A conversation as the model reads it, with the bytes that the assistant wrote.
    ///
    /// With `{% generation %}` marks the template says it. Without, an answer is what a rendering up to its message has
    /// more than one that ends in the generation prompt before it, less the white space after a special token.
    pub(crate) fn answers(
        &self,
        model_dir: &Path,
        said: Said<'_>,
        specials: &[String],
    ) -> Result<Rendered, Error> {
        let refused = |reason| Error::Template { model_dir: model_dir.to_owned(), place: None, reason };
        let messages = said.messages;
        if self.has_marks && messages.iter().any(holds_mark) {
            return Err(refused(format!("a message holds U+{:X}, which is no character", u32::from(MARK))));
        }
        let values: Vec<Value> = messages.iter().map(python::from_json).collect();
        let tools = said.tools.map(python::from_json);
        let text = self.run(&values, tools.as_ref(), false).map_err(refused)?;
        if self.has_marks {
            let marked =
                take_marks(&text).ok_or_else(|| refused("generation marks are nested".to_owned()))?;
            return chosen(marked, said);
        }

        let mut answers: Vec<Range<usize>> = Vec::new();
        for index in said.answers().filter(|index| said.is_trained(*index)) {
            let unstable =
                |reason: String| Error::NotPrefixStable { place: None, message: index + 1, reason };
            let before = self.run(&values[..index], tools.as_ref(), true).map_err(|reason| {
                unstable(format!("the template does not render the messages before it alone: {reason}"))
            })?;
            let through = match index + 1 == messages.len() {
                true => text.clone(),
                false => self.run(&values[..=index], tools.as_ref(), false).map_err(|reason| {
                    unstable(format!("the template does not render the messages up to it alone: {reason}"))
                })?,
            };
            if !text.starts_with(&through) || !through.starts_with(&before) {
                let reason = "the template renders what comes before in another way once the message follows";
                return Err(unstable(reason.to_owned()));
            }
            let end = without_space_after_special(&text[..through.len()], before.len(), specials);
            if end > before.len() {
                answers.push(before.len()..end);
            }
        }
        Ok(Rendered { text, answers })
    }
}

/// Of the ranges between marks those of answers that are trained; empty ranges go.
fn chosen(marked: Rendered, said: Said<'_>) -> Result<Rendered, Error> {
    let Rendered { text, mut answers } = marked;
    let left_out = said.answers().find(|index| !said.is_trained(*index));
    if let Some(left_out) = left_out {
        let numbers: Vec<usize> = said.answers().collect();
        if numbers.len() != answers.len() {
            let reason = format!(
                "it has a weight of 0, and the template marks {} answers where there are {}",
                answers.len(),
                numbers.len()
            );
            return Err(Error::NotPrefixStable { place: None, message: left_out + 1, reason });
        }
        let mut numbers = numbers.into_iter();
        answers.retain(|_| numbers.next().is_some_and(|index| said.is_trained(index)));
    }
    answers.retain(|answer| !answer.is_empty());
    Ok(Rendered { text, answers })
}

/// The end of `text[start..]` without the white space that follows a special token there.
fn without_space_after_special(text: &str, start: usize, specials: &[String]) -> usize {
    let answer = &text[start..];
    let trimmed = answer.trim_end();
    let ends_special = specials.iter().any(|token| trimmed.ends_with(token.as_str()));
    if ends_special { start + trimmed.len() } else { text.len() }
}

/// The text without marks, and what was between them, also where that is empty. Nothing if they do not alternate.
fn take_marks(marked: &str) -> Option<Rendered> {
    let mut text = String::with_capacity(marked.len());
    let mut answers = Vec::new();
    let mut pieces = marked.split(OPEN);
    text.push_str(pieces.next()?);
    for piece in pieces {
        let (answer, rest) = piece.split_once(CLOSE)?;
        let start = text.len();
        text.push_str(answer);
        answers.push(start..text.len());
        text.push_str(rest);
    }
    (!text.contains(MARK)).then_some(Rendered { text, answers })
}

fn holds_mark(value: &Json) -> bool {
    match value {
        Json::String(text) => text.contains(MARK),
        Json::Array(values) => values.iter().any(holds_mark),
        Json::Object(map) => map.values().any(holds_mark),
        _ => false,
    }
}

/// Turns `{% generation %}` blocks, which only transformers knows, into filter blocks, which trim white space alike.
fn generation_as_filter(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut found = false;
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let inside = at + 2;
        out.push_str(&rest[..inside]);
        rest = &rest[inside..];
        let tag = rest.find("%}").map_or("", |end| &rest[..end]);
        let word = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let replacement = match word {
            "generation" => "filter __generation",
            "endgeneration" => "endfilter",
            _ => continue,
        };
        found = true;
        out.push_str(&tag.replacen(word, replacement, 1));
        rest = &rest[tag.len()..];
    }
    out.push_str(rest);
    (out, found)
}

/// What in a template looks like a control token: `<|…|>`, `<｜…｜>`, Gemma's turns.
pub(super) fn token_literals(template: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for (open, close) in
        [("<|", "|>"), ("<｜", "｜>"), ("<start_of", ">"), ("<end_of", ">"), ("<s", ">"), ("</s", ">")]
    {
        for (at, _) in template.match_indices(open) {
            let Some(end) = template[at + open.len()..].find(close) else { continue };
            let literal = &template[at..at + open.len() + end + close.len()];
            // `<system>` and the like are text that a template may well write.
            if open.ends_with('s') && literal.len() > open.len() + close.len() {
                continue;
            }
            // Templates build some tokens from parts: those hold quotes, braces or spaces.
            let whole = !literal.contains(|character: char| {
                character.is_whitespace() || matches!(character, '\'' | '"' | '{' | '}' | '+' | '~')
            });
            if whole && !found.iter().any(|known| known == literal) {
                found.push(literal.to_owned());
            }
        }
    }
    found
}

/// What in a rendered text looks like a control token: `<|`, letters, digits or `_`, `|>`.
pub(super) fn built_tokens(text: &str) -> impl Iterator<Item = &str> {
    const LONGEST: usize = 48;
    text.match_indices("<|").filter_map(|(at, open)| {
        let rest = &text[at + open.len()..];
        let name = rest.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_')?;
        let is_token = (1..=LONGEST).contains(&name) && rest[name..].starts_with("|>");
        is_token.then(|| &text[at..at + open.len() + name + 2])
    })
}

fn reason_of(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}
