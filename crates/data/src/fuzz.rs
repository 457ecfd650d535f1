//! What a fuzzer calls: any bytes go in, errors are fine, panics and endless loops are not.

use std::path::Path;

use serde_json::{Value, json};

use crate::{
    Format, Place, TemplateUse,
    form::Form,
    source::{self, Raw},
    tokenizer::template::{ChatTemplate, Said},
};

/// Enough for any sensible template on a short conversation, and over within a few milliseconds.
const FUEL: u64 = 50_000;

/// Reads bytes as JSON Lines, in each form that a record may have.
pub fn jsonl(bytes: &[u8]) {
    for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let place = || Place { file: "fuzz.jsonl".into(), line: index as u64 + 1 };
        let Ok(record) = source::object(Raw::Line(line.to_vec()), place) else { continue };
        let columns: Vec<String> = record.keys().cloned().collect();
        let formats = [
            Format::Auto,
            Format::Text,
            Format::PromptCompletion,
            Format::Messages,
            Format::Alpaca,
            Format::Sharegpt,
        ];
        for format in formats {
            let Ok(form) = Form::detect(format, &columns, place()) else { continue };
            for wanted in [TemplateUse::Auto, TemplateUse::Model, TemplateUse::None] {
                if let Ok(reading) = form.reading(wanted, true) {
                    drop(reading.content(record.clone(), place));
                }
            }
        }
    }
}

/// Parses bytes as a chat template and renders conversations by it. Behind a zero byte may stand the messages as JSON.
pub fn chat_template(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let source = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let given = parts.next().and_then(|rest| serde_json::from_slice::<Vec<Value>>(rest).ok());
    let usual = || {
        vec![
            json!({"role": "system", "content": "s"}),
            json!({"role": "user", "content": "u"}),
            json!({"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}),
            json!({"role": "tool", "content": "t"}),
            json!({"role": "assistant", "content": "b"}),
        ]
    };
    let tokens = [("bos_token".to_owned(), "<s>".to_owned()), ("eos_token".to_owned(), "</s>".to_owned())];
    let Ok(mut template) = ChatTemplate::new(&source, &tokens, Some(1_732_438_061)) else { return };
    template.set_fuel(FUEL);
    let messages = given.unwrap_or_else(usual);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let specials = ["</s>".to_owned()];
    for trained in [vec![], vec![false; messages.len()]] {
        let said = Said { messages: &messages, tools: Some(&tools), trained: &trained };
        if let Ok(rendered) = template.answers(Path::new("fuzz"), said, &specials) {
            // Every range is one of the text.
            assert!(rendered.answers.iter().all(|range| rendered.text.get(range.clone()).is_some()));
        }
    }
    drop(template.render(Path::new("fuzz"), &messages, None, true));
}
