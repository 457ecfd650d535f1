//! Rows of messages, as OpenAI, TRL and transformers have them, and which of their turns are trained.
//!
//! A message may say whether it is trained: `weight` (0 or 1) as OpenAI has it, or `train` (true or false) as axolotl
//! does. Weights between are refused: the loss is the mean over trained tokens, and a token counts or does not.

use serde_json::{Map, Value};

use super::{Conversation, tools, wrong, wrong_value};
use crate::{Error, Place};

/// Keys of a message that say whether it is trained. They are not handed to the template.
const FLAGS: [&str; 2] = ["weight", "train"];

pub(super) fn conversation(
    record: &mut Map<String, Value>,
    place: &impl Fn() -> Place,
) -> Result<Conversation, Error> {
    let turns = list(record, "messages", place)?;
    let tools = tools(record, place)?;
    let mut conversation = Conversation { tools, ..Conversation::default() };
    for (index, turn) in turns.into_iter().enumerate() {
        conversation.push(turn, &|inner| format!("`messages[{index}]{inner}`"), place)?;
    }
    Ok(conversation)
}

/// A column with a list that is not empty.
pub(super) fn list(
    record: &mut Map<String, Value>,
    column: &str,
    place: &impl Fn() -> Place,
) -> Result<Vec<Value>, Error> {
    match record.remove(column) {
        Some(Value::Array(turns)) if turns.is_empty() => {
            let (column, found) = (format!("`{column}`"), "an empty list".to_owned());
            Err(Error::WrongType { place: place(), column, expected: "a list with messages", found })
        }
        Some(Value::Array(turns)) => Ok(turns),
        other => Err(wrong(place, format!("`{column}`"), "a list", &other.unwrap_or_default())),
    }
}

impl Conversation {
    /// Takes a message with `role` and `content`. `at` names a key of it for errors.
    pub(super) fn push(
        &mut self,
        message: Value,
        at: &impl Fn(&str) -> String,
        place: &impl Fn() -> Place,
    ) -> Result<(), Error> {
        let Value::Object(mut message) = message else {
            return Err(wrong(place, at(""), "an object with `role` and `content`", &message));
        };
        let missing = Value::Null;
        let role = message.get("role").unwrap_or(&missing);
        let Some(role) = role.as_str().map(str::to_owned) else {
            return Err(wrong(place, at(".role"), "a string", role));
        };
        let calls_tools = message.get("tool_calls").is_some_and(|calls| !calls.is_null());
        match message.get("content").unwrap_or(&missing) {
            // A list of typed parts is handed to the template, which knows what to make of it.
            Value::String(_) | Value::Array(_) => {}
            Value::Null if calls_tools => {}
            other => return Err(wrong(place, at(".content"), "a string", other)),
        }
        let trained = take_flags(&mut message, &role, at, place)?;
        // Data sets with fixed columns fill what a message lacks with null, which templates take for a value.
        message.retain(|key, value| key == "content" || !value.is_null());
        self.messages.push(Value::Object(message));
        self.trained.push(trained);
        Ok(())
    }
}

/// Takes out of a message whether it is trained. Only the assistant's can be left out or taken in.
pub(super) fn take_flags(
    message: &mut Map<String, Value>,
    role: &str,
    at: &impl Fn(&str) -> String,
    place: &impl Fn() -> Place,
) -> Result<bool, Error> {
    let mut trained = None;
    for flag in FLAGS {
        let Some(value) = message.remove(flag).filter(|value| !value.is_null()) else { continue };
        let column = || at(&format!(".{flag}"));
        let says = match (&value, value.as_f64()) {
            (Value::Bool(says), _) => *says,
            (_, Some(0.0)) => false,
            (_, Some(1.0)) => true,
            _ => return Err(wrong_value(place, column(), "0 or 1 (a token is trained or is not)", &value)),
        };
        if says && role != "assistant" {
            let expected =
                "0: the assistant's messages alone can be chosen (`data.train_on = \"all\"` trains all)";
            return Err(wrong_value(place, column(), expected, &value));
        }
        if trained.is_some_and(|before| before != says) {
            return Err(wrong_value(place, column(), "what `weight` beside it says", &value));
        }
        trained = Some(says);
    }
    Ok(trained.unwrap_or(true))
}
