//! Rows of instruction, input and output, as Stanford's Alpaca has them.
//!
//! With a chat template a row is a question (instruction, an empty line, input) and its answer. Without, it is Stanford's
//! text (`train.py` of `tatsu-lab/stanford_alpaca`, `PROMPT_DICT`), whose answer follows `### Response:` at once:
//!
//! ```text
//! Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.
//!
//! ### Instruction:
//! …
//!
//! ### Input:
//! …
//!
//! ### Response:
//! ```

use serde_json::{Map, Value};

use super::{Content, Conversation, optional_string, string};
use crate::{Error, Place};

const WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further \
                          context. Write a response that appropriately completes the request.";
const WITHOUT_INPUT: &str = "Below is an instruction that describes a task. Write a response that appropriately \
                             completes the request.";

pub(super) fn content(
    record: &mut Map<String, Value>,
    is_rendered: bool,
    place: &impl Fn() -> Place,
) -> Result<Content, Error> {
    let instruction = string(record, "instruction", place)?;
    let input = optional_string(record, "input", place)?.filter(|input| !input.is_empty());
    let output = string(record, "output", place)?;
    let system = optional_string(record, "system", place)?.filter(|system| !system.is_empty());
    if !is_rendered {
        return Ok(Content::Pair {
            prompt: prompt(system.as_deref(), &instruction, input.as_deref()),
            completion: output,
        });
    }
    let question = match input {
        Some(input) => format!("{instruction}\n\n{input}"),
        None => instruction,
    };
    Ok(Content::Conversation(Conversation::exchange(system, question, output)))
}

/// Stanford's text. A system text of the row's own stands in place of the first sentence.
fn prompt(system: Option<&str>, instruction: &str, input: Option<&str>) -> String {
    let head = system.unwrap_or(if input.is_some() { WITH_INPUT } else { WITHOUT_INPUT });
    let input = input.map(|input| format!("### Input:\n{input}\n\n")).unwrap_or_default();
    format!("{head}\n\n### Instruction:\n{instruction}\n\n{input}### Response:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_that_of_stanford() {
        // PROMPT_DICT["prompt_input"] and ["prompt_no_input"], formatted.
        assert_eq!(
            prompt(None, "Add.", Some("1 2")),
            "Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n\
             ### Response:"
        );
        assert_eq!(
            prompt(None, "Sing.", None),
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\nSing.\n\n### Response:"
        );
    }
}
