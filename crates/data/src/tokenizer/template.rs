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
/// A noncharacter of Unicode: no text that is meant for interchange holds it.
const MARK: char = '\u{10fffe}';
const OPEN: &str = "\u{10fffe}[";
const CLOSE: &str = "\u{10fffe}]";

/// A chat template, parsed.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    tokens: Vec<(String, String)>,
    /// Whether the template itself marks what the assistant wrote.
    has_marks: bool,
}

impl ChatTemplate {
    /// Parses a template. `tokens` are given to it by name; `time` is what `strftime_now` shows, if it is to exist.
    pub(super) fn new(source: &str, tokens: &[(String, String)], time: Option<i64>) -> Result<Self, String> {
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        let syntax = syntax.build().map_err(|source| source.to_string())?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
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
    pub(super) fn render(
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
    pub(super) fn answers(
        &self,
        model_dir: &Path,
        messages: &[Json],
        tools: Option<&Json>,
        specials: &[String],
    ) -> Result<Rendered, Error> {
        let refused = |reason| Error::Template { model_dir: model_dir.to_owned(), place: None, reason };
        if self.has_marks && messages.iter().any(holds_mark) {
            return Err(refused(format!("a message holds U+{:X}, which is no character", u32::from(MARK))));
        }
        let values: Vec<Value> = messages.iter().map(python::from_json).collect();
        let tools = tools.map(python::from_json);
        let text = self.run(&values, tools.as_ref(), false).map_err(refused)?;
        if self.has_marks {
            return take_marks(&text).ok_or_else(|| refused("generation marks are nested".to_owned()));
        }

        let mut answers: Vec<Range<usize>> = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            if message.get("role").and_then(Json::as_str) != Some("assistant") {
                continue;
            }
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

/// The end of `text[start..]` without the white space that follows a special token there.
fn without_space_after_special(text: &str, start: usize, specials: &[String]) -> usize {
    let answer = &text[start..];
    let trimmed = answer.trim_end();
    let ends_special = specials.iter().any(|token| trimmed.ends_with(token.as_str()));
    if ends_special { start + trimmed.len() } else { text.len() }
}

/// The text without marks, and what was between them. Nothing if they do not alternate.
fn take_marks(marked: &str) -> Option<Rendered> {
    let mut text = String::with_capacity(marked.len());
    let mut answers = Vec::new();
    let mut pieces = marked.split(OPEN);
    text.push_str(pieces.next()?);
    for piece in pieces {
        let (answer, rest) = piece.split_once(CLOSE)?;
        let start = text.len();
        text.push_str(answer);
        if text.len() > start {
            answers.push(start..text.len());
        }
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
    for (open, close) in [("<|", "|>"), ("<｜", "｜>"), ("<start_of", ">"), ("<end_of", ">")] {
        for (at, _) in template.match_indices(open) {
            let Some(end) = template[at + open.len()..].find(close) else { continue };
            let literal = &template[at..at + open.len() + end + close.len()];
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

fn reason_of(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}
