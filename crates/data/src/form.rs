//! Which form rows have, told from their columns, and what is in a row of it.

use serde_json::{Map, Value};

use crate::{Error, Format, Place, source};

/// Form of the rows, once it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Text,
    PromptCompletion,
    Messages,
}

/// What a record holds that is trained on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Content {
    Text(String),
    Pair { prompt: String, completion: String },
    Messages { messages: Vec<Value>, tools: Option<Value> },
}

impl Form {
    const ALL: [Self; 3] = [Self::Text, Self::PromptCompletion, Self::Messages];

    /// The word that `data.format` has for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::PromptCompletion => "prompt-completion",
            Self::Messages => "messages",
        }
    }

    /// Columns that every record must have.
    fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Text => &["text"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Messages => &["messages"],
        }
    }

    /// Columns that are read: those that must be there, and those that may.
    pub(crate) fn read_columns(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages", "tools"],
            other => other.columns(),
        }
    }

    /// The form that the job file names, or that the columns of the first record are of.
    pub(crate) fn detect(format: Format, columns: &[String], place: Place) -> Result<Self, Error> {
        let is_complete =
            |form: &Self| form.columns().iter().all(|column| columns.iter().any(|c| c == column));
        let named = match format {
            Format::Text => Some(Self::Text),
            Format::PromptCompletion => Some(Self::PromptCompletion),
            Format::Messages => Some(Self::Messages),
            Format::Auto => None,
        };
        if let Some(form) = named {
            return match form.columns().iter().find(|column| !columns.iter().any(|c| c == *column)) {
                None => Ok(form),
                Some(column) => {
                    Err(Error::MissingColumn { place, column, form: form.name(), found: columns.to_vec() })
                }
            };
        }
        let complete: Vec<Self> = Self::ALL.into_iter().filter(is_complete).collect();
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

    /// Takes out of a record what is trained on.
    pub(crate) fn content(
        self,
        mut record: Map<String, Value>,
        place: impl Fn() -> Place,
    ) -> Result<Content, Error> {
        if let Some(column) = self.columns().iter().find(|column| !record.contains_key(**column)) {
            let found = record.keys().cloned().collect();
            return Err(Error::MissingColumn { place: place(), column, form: self.name(), found });
        }
        Ok(match self {
            Self::Text => Content::Text(string(&mut record, "text", &place)?),
            Self::PromptCompletion => Content::Pair {
                prompt: string(&mut record, "prompt", &place)?,
                completion: string(&mut record, "completion", &place)?,
            },
            Self::Messages => Content::Messages {
                messages: messages(&mut record, &place)?,
                tools: record.remove("tools").filter(|tools| !tools.is_null()),
            },
        })
    }
}

/// What to say of columns that are of no form; names the near misses.
fn nothing_known(columns: &[String]) -> String {
    let has = |name: &str| columns.iter().any(|column| column == name);
    let near = if has("prompt") {
        ": a `completion` is missing beside `prompt`"
    } else if has("completion") {
        ": a `prompt` is missing beside `completion`"
    } else if has("conversations") || has("conversation") {
        ": rename it to `messages`, with `role` and `content` in each"
    } else if has("instruction") || has("question") {
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

fn messages(record: &mut Map<String, Value>, place: &impl Fn() -> Place) -> Result<Vec<Value>, Error> {
    let messages = match record.remove("messages") {
        Some(Value::Array(messages)) => messages,
        other => return Err(wrong(place, "`messages`".to_owned(), "a list", &other.unwrap_or_default())),
    };
    if messages.is_empty() {
        let column = "`messages`".to_owned();
        let found = "an empty list".to_owned();
        return Err(Error::WrongType { place: place(), column, expected: "a list with messages", found });
    }
    for (index, message) in messages.iter().enumerate() {
        let at = |inner: &str| format!("`messages[{index}]{inner}`");
        let Value::Object(message) = message else {
            return Err(wrong(place, at(""), "an object with `role` and `content`", message));
        };
        let missing = Value::Null;
        let role = message.get("role").unwrap_or(&missing);
        if !role.is_string() {
            return Err(wrong(place, at(".role"), "a string", role));
        }
        let calls_tools = message.get("tool_calls").is_some_and(|calls| !calls.is_null());
        match message.get("content").unwrap_or(&missing) {
            // A list of typed parts is handed to the template, which knows what to make of it.
            Value::String(_) | Value::Array(_) => {}
            Value::Null if calls_tools => {}
            other => return Err(wrong(place, at(".content"), "a string", other)),
        }
    }
    Ok(messages)
}
