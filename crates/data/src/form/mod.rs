//! Which form rows have, told from their columns, and what is in a row of it.

mod alpaca;
mod messages;
mod sharegpt;

use serde_json::{Map, Value};

use crate::{Error, Format, Place, TemplateUse, source};

/// Form of the rows, once it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Text,
    PromptCompletion,
    Messages,
    Alpaca,
    ShareGpt,
}

/// What a record holds that is trained on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Content {
    Text(String),
    Pair { prompt: String, completion: String },
    Conversation(Conversation),
}

/// Messages as the chat template takes them.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Option<Value>,
    /// For each message, whether it is a target where it is the assistant's. As long as `messages`.
    pub(crate) trained: Vec<bool>,
}

/// How rows of a form are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) form: Form,
    /// Whether the chat template renders them.
    pub(crate) is_rendered: bool,
}

impl Form {
    const ALL: [Self; 5] = [Self::Text, Self::PromptCompletion, Self::Messages, Self::Alpaca, Self::ShareGpt];

    /// The word that `data.format` has for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::PromptCompletion => "prompt-completion",
            Self::Messages => "messages",
            Self::Alpaca => "alpaca",
            Self::ShareGpt => "sharegpt",
        }
    }

    /// Columns that every record must have.
    fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Text => &["text"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Messages => &["messages"],
            Self::Alpaca => &["instruction", "output"],
            Self::ShareGpt => &["conversations"],
        }
    }

    /// Columns that are read: those that must be there, and those that may.
    pub(crate) fn read_columns(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages", "tools"],
            Self::Alpaca => &["instruction", "input", "output", "system"],
            Self::ShareGpt => &["conversations", "tools", "system"],
            other => other.columns(),
        }
    }

    /// The form that the job file names, or that the columns of the first record are of.
    pub(crate) fn detect(format: Format, columns: &[String], place: Place) -> Result<Self, Error> {
        let has = |column: &str| columns.iter().any(|found| found == column);
        let named = match format {
            Format::Text => Some(Self::Text),
            Format::PromptCompletion => Some(Self::PromptCompletion),
            Format::Messages => Some(Self::Messages),
            Format::Alpaca => Some(Self::Alpaca),
            Format::Sharegpt => Some(Self::ShareGpt),
            Format::Auto => None,
        };
        if let Some(form) = named {
            return match form.columns().iter().find(|column| !has(column)) {
                None => Ok(form),
                Some(column) => {
                    Err(Error::MissingColumn { place, column, form: form.name(), found: columns.to_vec() })
                }
            };
        }
        let is_complete = |form: &Self| form.columns().iter().all(|column| has(column));
        let mut complete: Vec<Self> = Self::ALL.into_iter().filter(is_complete).collect();
        // Stanford's own file has a `text` beside: instruction and output, put together already.
        if complete == [Self::Text, Self::Alpaca] {
            complete.remove(0);
        }
        match &*complete {
            [form] => Ok(*form),
            [] => Err(Error::UnknownForm { place, found: columns.to_vec(), reason: nothing_known(columns) }),
            several => {
                let names = several.iter().map(|form| form.name()).collect::<Vec<_>>().join(" and ");
                let reason = format!("are of several forms: {names}");
                Err(Error::UnknownForm { place, found: columns.to_vec(), reason })
            }
        }
    }

    /// Whether the chat template renders rows of this form.
    pub(crate) fn reading(self, wanted: TemplateUse, has_template: bool) -> Result<Reading, Error> {
        let refused =
            |reason: &str| Err(Error::Impossible { option: "chat_template", reason: reason.to_owned() });
        let is_rendered = match (self, wanted) {
            (Self::Text, TemplateUse::Model) => {
                return refused("rows of the form `text` hold no turns to render");
            }
            (Self::Messages | Self::ShareGpt, TemplateUse::None) => {
                return refused(
                    "only a chat template makes a text of conversations; `none` leaves them without",
                );
            }
            (Self::Text, _) | (_, TemplateUse::None) => false,
            (Self::Messages | Self::ShareGpt, _) | (_, TemplateUse::Model) => true,
            (Self::Alpaca, TemplateUse::Auto) => has_template,
            (Self::PromptCompletion, TemplateUse::Auto) => false,
        };
        Ok(Reading { form: self, is_rendered })
    }
}

impl Reading {
    /// Takes out of a record what is trained on.
    pub(crate) fn content(
        self,
        mut record: Map<String, Value>,
        place: impl Fn() -> Place,
    ) -> Result<Content, Error> {
        let form = self.form;
        if let Some(column) = form.columns().iter().find(|column| !record.contains_key(**column)) {
            let found = record.keys().cloned().collect();
            return Err(Error::MissingColumn { place: place(), column, form: form.name(), found });
        }
        let record = &mut record;
        Ok(match form {
            Form::Text => Content::Text(string(record, "text", &place)?),
            Form::PromptCompletion => pair(record, self.is_rendered, &place)?,
            Form::Messages => Content::Conversation(messages::conversation(record, &place)?),
            Form::Alpaca => alpaca::content(record, self.is_rendered, &place)?,
            Form::ShareGpt => Content::Conversation(sharegpt::conversation(record, &place)?),
        })
    }
}

fn pair(
    record: &mut Map<String, Value>,
    is_rendered: bool,
    place: &impl Fn() -> Place,
) -> Result<Content, Error> {
    let prompt = string(record, "prompt", place)?;
    let completion = string(record, "completion", place)?;
    Ok(if is_rendered {
        Content::Conversation(Conversation::exchange(None, prompt, completion))
    } else {
        Content::Pair { prompt, completion }
    })
}

impl Conversation {
    /// A question and its answer.
    fn exchange(system: Option<String>, question: String, answer: String) -> Self {
        let message = |role: &str, content: String| serde_json::json!({"role": role, "content": content});
        let mut messages: Vec<Value> = system.map(|text| message("system", text)).into_iter().collect();
        messages.push(message("user", question));
        messages.push(message("assistant", answer));
        Self { trained: vec![true; messages.len()], messages, tools: None }
    }
}

/// What to say of columns that are of no form; names the near misses.
fn nothing_known(columns: &[String]) -> String {
    let has = |name: &str| columns.iter().any(|column| column == name);
    let near = if has("prompt") {
        ": a `completion` is missing beside `prompt`"
    } else if has("completion") {
        ": a `prompt` is missing beside `completion`"
    } else if has("conversation") {
        ": rename it to `conversations` (`from`, `value`) or `messages` (`role`, `content`)"
    } else if has("instruction") {
        ": an `output` is missing beside `instruction`"
    } else if has("question") {
        ": rename them to `prompt` and `completion`"
    } else if has("chosen") {
        ": preference pairs are not trained"
    } else {
        ""
    };
    format!("are of no form{near}")
}

fn wrong(place: &impl Fn() -> Place, column: String, expected: &'static str, found: &Value) -> Error {
    Error::WrongType { place: place(), column, expected, found: source::name(found).to_owned() }
}

/// A wrong value that is small enough to be shown.
fn wrong_value(place: &impl Fn() -> Place, column: String, expected: &'static str, found: &Value) -> Error {
    let shown = found.to_string();
    let found =
        if shown.chars().count() <= 40 { format!("`{shown}`") } else { source::name(found).to_owned() };
    Error::WrongType { place: place(), column, expected, found }
}

fn string(
    record: &mut Map<String, Value>,
    column: &str,
    place: &impl Fn() -> Place,
) -> Result<String, Error> {
    match record.remove(column) {
        Some(Value::String(text)) => Ok(text),
        other => Err(wrong(place, format!("`{column}`"), "a string", &other.unwrap_or_default())),
    }
}

/// A string that may be absent or null.
fn optional_string(
    record: &mut Map<String, Value>,
    column: &str,
    place: &impl Fn() -> Place,
) -> Result<Option<String>, Error> {
    match record.remove(column) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(place, format!("`{column}`"), "a string", &other)),
    }
}

/// The column `tools`: a list, or a list written as JSON, as data sets with fixed columns keep it.
fn tools(record: &mut Map<String, Value>, place: &impl Fn() -> Place) -> Result<Option<Value>, Error> {
    const EXPECTED: &str = "a list of tools, or one written as JSON";
    let column = || "`tools`".to_owned();
    match record.remove("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(list @ Value::Array(_)) => Ok(Some(list)),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) => match serde_json::from_str(&text) {
            Ok(list @ Value::Array(_)) => Ok(Some(list)),
            Ok(Value::Null) => Ok(None),
            Ok(other) => Err(wrong(place, column(), EXPECTED, &other)),
            Err(_) => Err(wrong(place, column(), EXPECTED, &Value::String(text))),
        },
        Some(other) => Err(wrong(place, column(), EXPECTED, &other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(columns: &[&str]) -> Result<Form, Error> {
        let columns: Vec<String> = columns.iter().map(|column| (*column).to_owned()).collect();
        Form::detect(Format::Auto, &columns, Place { file: "f".into(), line: 1 })
    }

    #[test]
    fn forms_are_told_from_columns() {
        assert_eq!(detect(&["instruction", "input", "output"]).unwrap(), Form::Alpaca);
        assert_eq!(detect(&["instruction", "input", "output", "text"]).unwrap(), Form::Alpaca);
        assert_eq!(detect(&["id", "conversations"]).unwrap(), Form::ShareGpt);
        assert_eq!(detect(&["messages", "tools"]).unwrap(), Form::Messages);
        assert!(detect(&["messages", "conversations"]).is_err());
        assert!(detect(&["instruction"]).unwrap_err().to_string().contains("an `output` is missing"));
    }

    #[test]
    fn template_is_used_where_it_is_wanted_and_makes_sense() {
        let reading = |form: Form, wanted, has| form.reading(wanted, has).map(|reading| reading.is_rendered);
        assert!(reading(Form::Alpaca, TemplateUse::Auto, true).unwrap());
        assert!(!reading(Form::Alpaca, TemplateUse::Auto, false).unwrap());
        assert!(!reading(Form::Alpaca, TemplateUse::None, true).unwrap());
        assert!(!reading(Form::PromptCompletion, TemplateUse::Auto, true).unwrap());
        assert!(reading(Form::PromptCompletion, TemplateUse::Model, true).unwrap());
        assert!(reading(Form::Messages, TemplateUse::None, true).is_err());
        assert!(reading(Form::Text, TemplateUse::Model, true).is_err());
    }
}
