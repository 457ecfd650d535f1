//! Rows of `conversations` with `from` and `value`, as ShareGPT's exports have them.
//!
//! | `from` | role |
//! |---|---|
//! | `human`, `user` | `user` |
//! | `gpt`, `assistant`, `chatgpt`, `model` | `assistant` |
//! | `system` | `system` |
//! | `tool`, `function`, `observation` | `tool` |
//! | `function_call` | `assistant`, with the call that `value` holds as JSON (`name`, `arguments`) |
//!
//! Turns may also have `role` and `content`. Columns `system` and `tools` are read where they are.

use serde_json::{Map, Value, json};

use super::{
    Conversation,
    messages::{list, take_flags},
    optional_string, tools, wrong, wrong_value,
};
use crate::{Error, Place};

pub(super) fn conversation(
    record: &mut Map<String, Value>,
    place: &impl Fn() -> Place,
) -> Result<Conversation, Error> {
    let turns = list(record, "conversations", place)?;
    let system = optional_string(record, "system", place)?.filter(|system| !system.is_empty());
    let tools = tools(record, place)?;
    let mut conversation = Conversation { tools, ..Conversation::default() };
    if let Some(system) = system {
        conversation.messages.push(json!({"role": "system", "content": system}));
        conversation.trained.push(true);
    }
    for (index, turn) in turns.into_iter().enumerate() {
        let at = |inner: &str| format!("`conversations[{index}]{inner}`");
        match turn {
            Value::Object(turn) if turn.contains_key("from") => conversation.turn(turn, &at, place)?,
            turn @ Value::Object(_) if turn.get("role").is_some() => conversation.push(turn, &at, place)?,
            Value::Object(_) => return Err(wrong(place, at(".from"), "a string", &Value::Null)),
            other => return Err(wrong(place, at(""), "an object with `from` and `value`", &other)),
        }
    }
    Ok(conversation)
}

impl Conversation {
    fn turn(
        &mut self,
        mut turn: Map<String, Value>,
        at: &impl Fn(&str) -> String,
        place: &impl Fn() -> Place,
    ) -> Result<(), Error> {
        let from = turn.remove("from").unwrap_or_default();
        let Some(from) = from.as_str() else { return Err(wrong(place, at(".from"), "a string", &from)) };
        let text = match turn.remove("value") {
            Some(Value::String(text)) => text,
            other => return Err(wrong(place, at(".value"), "a string", &other.unwrap_or_default())),
        };
        let message = match from {
            "human" | "user" => json!({"role": "user", "content": text}),
            "gpt" | "assistant" | "chatgpt" | "model" => json!({"role": "assistant", "content": text}),
            "system" => json!({"role": "system", "content": text}),
            "tool" | "function" | "observation" => json!({"role": "tool", "content": text}),
            "function_call" => called(&text, at, place)?,
            unknown => {
                let expected = "one of `human`, `gpt`, `system`, `tool`, `function_call`";
                return Err(wrong_value(place, at(".from"), expected, &unknown.into()));
            }
        };
        let role = message["role"].as_str().unwrap_or_default();
        self.trained.push(take_flags(&mut turn, role, at, place)?);
        self.messages.push(message);
        Ok(())
    }
}

/// A message that calls a tool.
fn called(text: &str, at: &impl Fn(&str) -> String, place: &impl Fn() -> Place) -> Result<Value, Error> {
    let call: Value = serde_json::from_str(text).unwrap_or_default();
    let calls = match call {
        Value::Array(calls) => calls,
        other => vec![other],
    };
    let is_call =
        |call: &Value| call.get("name").is_some_and(Value::is_string) && call.get("arguments").is_some();
    if !calls.iter().all(is_call) {
        let expected = "a call as JSON, with `name` and `arguments`";
        return Err(wrong_value(place, at(".value"), expected, &text.into()));
    }
    let calls: Vec<Value> =
        calls.into_iter().map(|call| json!({"type": "function", "function": call})).collect();
    Ok(json!({"role": "assistant", "content": "", "tool_calls": calls}))
}
