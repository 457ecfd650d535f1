//! JSON Lines: one JSON object on each line.

use std::{
    io::{BufRead, Read},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::{Raw, input::Text};
use crate::{Error, Place};

/// A batch ends after so many records, or after this many bytes.
const BATCH_RECORDS: usize = 2048;
const BATCH_BYTES: usize = 4 << 20;
/// No line is longer: a file without line breaks must not fill the memory.
const LINE_BYTES: u64 = 64 << 20;

/// Reads a file line by line.
pub(super) struct Reader {
    path: PathBuf,
    input: Text,
    line: u64,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self { path: path.to_owned(), input: Text::open(path)?, line: 0 })
    }

    /// Bytes of the file, as it is stored, that are behind the reader.
    pub(super) fn bytes_done(&self) -> u64 {
        self.input.bytes_read()
    }

    /// The next lines that are not blank; none at the end.
    pub(super) fn next_records(&mut self) -> Result<Vec<(u64, Raw)>, Error> {
        let mut records = Vec::new();
        let mut bytes = 0;
        while records.len() < BATCH_RECORDS && bytes < BATCH_BYTES {
            let Some(line) = self.next_line()? else { break };
            bytes += line.len();
            if !line.trim_ascii().is_empty() {
                records.push((self.line, Raw::Line(line)));
            }
        }
        Ok(records)
    }

    fn next_line(&mut self) -> Result<Option<Vec<u8>>, Error> {
        let mut line = Vec::new();
        let length = self
            .input
            .input()
            .take(LINE_BYTES)
            .read_until(b'\n', &mut line)
            .map_err(|source| Error::read(&self.path, source))?;
        if length == 0 {
            return Ok(None);
        }
        self.line += 1;
        if length as u64 == LINE_BYTES && line.last() != Some(&b'\n') {
            return Err(Error::InvalidJson {
                place: Place { file: self.path.clone(), line: self.line },
                column: 1,
                reason: format!("the line is longer than {} MiB", LINE_BYTES >> 20),
            });
        }
        // A byte order mark is no part of the first line.
        if self.line == 1 && line.starts_with(b"\xef\xbb\xbf") {
            line.drain(..3);
        }
        while matches!(line.last(), Some(b'\n' | b'\r')) {
            line.pop();
        }
        Ok(Some(line))
    }
}

/// The object on a line.
pub(super) fn parse(line: &[u8], place: impl Fn() -> Place) -> Result<Map<String, Value>, Error> {
    let text = std::str::from_utf8(line).map_err(|source| {
        let good = String::from_utf8_lossy(&line[..source.valid_up_to()]);
        Error::InvalidUtf8 { place: place(), column: good.chars().count() + 1 }
    })?;
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => {
            let column = text.chars().take_while(|character| character.is_whitespace()).count() + 1;
            let reason = match other {
                Value::Array(_) => {
                    "it is an array; JSON Lines have one object on each line, without `[` around them"
                        .to_owned()
                }
                other => format!("it is {}", name(&other)),
            };
            Err(Error::InvalidJson { place: place(), column, reason })
        }
        Err(source) => {
            // serde_json counts bytes, and its column is that of the last byte that it read.
            let last = source.column().saturating_sub(1).min(text.len());
            let end = (0..=last).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            let message = source.to_string();
            let reason = message.split(" at line ").next().unwrap_or(&message).to_owned();
            Err(Error::InvalidJson { place: place(), column: text[..end].chars().count() + 1, reason })
        }
    }
}

/// What a JSON value is, with its article.
pub(crate) fn name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
