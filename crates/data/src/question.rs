//! Prompts with the answers that are right, and the answers that there are to choose from.

use serde_json::{Map, Value};

use crate::{
    Error, Place,
    source::{self, Source},
};

const COLUMNS: &[&str] = &["prompt", "completion", "choices"];

/// A prompt, its completion, and what the completion is one of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Where it was read.
    pub place: Place,
    /// The prompt.
    pub prompt: String,
    /// What should follow it.
    pub completion: String,
    /// The completion and others; empty where the record has none.
    pub choices: Vec<String>,
}

/// Reads the records of a path or glob that have `prompt` and `completion`; none where the first record lacks one.
///
/// # Errors
/// Nothing there, unreadable, or a record without the columns of the first, or with values that are no texts.
pub fn questions(pattern: &str) -> Result<Option<Vec<Question>>, Error> {
    let files = source::expand(pattern)?;
    if let Some(first) = files.first() {
        let (_, columns) = source::first_columns(first)?;
        if !["prompt", "completion"].iter().all(|wanted| columns.iter().any(|column| column == wanted)) {
            return Ok(None);
        }
    }
    let mut reader = Source::new(files.clone(), COLUMNS);
    let mut questions = Vec::new();
    while let Some(batch) = reader.next_batch()? {
        for (line, raw) in batch.records {
            let place = Place { file: files[batch.file as usize].clone(), line };
            let mut record = source::object(raw, || place.clone())?;
            let prompt = text(&mut record, "prompt", &place)?;
            let completion = text(&mut record, "completion", &place)?;
            let choices = match record.remove("choices") {
                None | Some(Value::Null) => Vec::new(),
                Some(Value::Array(choices)) => {
                    let texts = choices.into_iter().map(|choice| match choice {
                        Value::String(text) => Ok(text),
                        other => Err(wrong(&place, "choices", "a list of strings", &other)),
                    });
                    texts.collect::<Result<_, _>>()?
                }
                Some(other) => return Err(wrong(&place, "choices", "a list of strings", &other)),
            };
            questions.push(Question { place, prompt, completion, choices });
        }
    }
    Ok(Some(questions))
}

fn text(record: &mut Map<String, Value>, column: &'static str, place: &Place) -> Result<String, Error> {
    match record.remove(column) {
        Some(Value::String(text)) => Ok(text),
        None => {
            let found = record.keys().cloned().collect();
            Err(Error::MissingColumn { place: place.clone(), column, form: "prompt-completion", found })
        }
        Some(other) => Err(wrong(place, column, "a string", &other)),
    }
}

fn wrong(place: &Place, column: &str, expected: &'static str, found: &Value) -> Error {
    let (column, found) = (format!("`{column}`"), source::name(found).to_owned());
    Error::WrongType { place: place.clone(), column, expected, found }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read(lines: &str) -> Result<Option<Vec<Question>>, Error> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.jsonl");
        fs::write(&file, lines).unwrap();
        questions(file.to_str().unwrap())
    }

    #[test]
    fn choices_are_read_where_they_are() {
        let lines = "{\"prompt\": \"a\", \"completion\": \" b\", \"choices\": [\"b\", \"c\"]}\n{\"prompt\": \"d\", \"completion\": \"e\"}\n";
        let found = read(lines).unwrap().unwrap();
        assert_eq!(found[0].choices, ["b", "c"]);
        assert_eq!((found[1].prompt.as_str(), found[1].choices.len(), found[1].place.line), ("d", 0, 2));
        assert_eq!(read("{\"text\": \"a\"}\n").unwrap(), None);
    }

    #[test]
    fn wrong_choices_are_told_with_their_line() {
        for choices in ["3", "[1]", "\"b\"", "{}"] {
            let line = format!("{{\"prompt\": \"a\", \"completion\": \"b\", \"choices\": {choices}}}\n");
            let Err(Error::WrongType { place, column, .. }) = read(&line) else { panic!("{choices}") };
            assert_eq!((place.line, column.as_str()), (1, "`choices`"));
        }
    }
}
