//! Templates, and how words are quoted where they end up.

use minijinja::{Environment, UndefinedBehavior, value::Serde};
use serde_json::Value;

use crate::{Error, Result};

/// Fills `template` with `values`. Names that a template asks for and nobody gave are an error.
pub(super) fn fill(name: &'static str, template: &str, values: Value) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.add_filter("sh", |word: &str| quote(word));
    environment.add_filter("yaml", |word: &str| yaml(word));
    environment.add_filter("line", |word: &str| word.replace(['\n', '\r'], " "));
    let mut text = environment.render_str(template, Serde(values)).map_err(|error| Error::Unfit {
        what: name,
        value: "a template".to_owned(),
        rule: error.to_string(),
    })?;
    text.push('\n');
    Ok(text)
}

/// A word as a shell takes it.
pub(crate) fn quote(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./=:,+@%".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A text as a YAML scalar in double quotes: JSON's form is one of YAML's.
pub(super) fn yaml(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            control if control.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(control))),
            other => quoted.push(other),
        }
    }
    quoted.push('"');
    quoted
}

/// A text as lines of a YAML block, each behind `indent` spaces.
pub(super) fn block(text: &str, indent: usize) -> String {
    let line = |line: &str| if line.is_empty() { String::new() } else { " ".repeat(indent) + line };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_words_wherever_they_end_up() {
        assert_eq!(quote("runs/a=b"), "runs/a=b");
        assert_eq!(quote("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(quote(""), "''");
        assert_eq!(yaml("a \"b\"\n\\"), r#""a \"b\"\n\\""#);
        assert_eq!(block("a\n\n b", 2), "  a\n\n   b");
    }

    #[test]
    fn a_name_that_nobody_gave_is_an_error() {
        let error = fill("test", "{{ absent }}", serde_json::json!({})).unwrap_err();
        assert!(error.to_string().contains("undefined"), "{error}");
    }
}
