//! Which lines of a log are wanted: the same rule for what is stored and for what comes.

use super::LogLine;
use crate::error::{Error, Result};

/// Levels, the most severe first.
const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

/// Which lines of a job's log are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFilter {
    /// Of this worker; of all, if empty.
    pub worker: String,
    /// Contain this; in small letters.
    pub text: String,
    /// The levels that are wanted; all, if there are none.
    levels: &'static [&'static str],
    /// At most so many of those that are stored, the newest.
    pub limit: u32,
}

impl LogFilter {
    /// All lines.
    pub fn all(limit: u32) -> Self {
        Self { worker: String::new(), text: String::new(), levels: &[], limit }
    }

    /// Lines of a worker, of a level or a more severe one, that contain a text. What is empty asks for nothing.
    ///
    /// # Errors
    /// If there is no such level.
    pub fn new(worker: String, level: &str, text: &str, limit: u32) -> Result<Self> {
        let levels = match LEVELS.iter().position(|known| *known == level) {
            Some(least) => &LEVELS[..=least],
            None if level.is_empty() => &[],
            None => {
                let what = format!("there is no level `{level}`: there are {}", LEVELS.join(", "));
                return Err(Error::bad(what));
            }
        };
        // As the store compares: letters beyond ASCII are their own small ones.
        Ok(Self { worker, text: text.to_ascii_lowercase(), levels, limit })
    }

    /// The levels that are wanted, each between commas; empty for all.
    pub(super) fn levels(&self) -> String {
        if self.levels.is_empty() { String::new() } else { format!(",{},", self.levels.join(",")) }
    }

    /// Whether a line is wanted.
    pub fn lets_through(&self, line: &LogLine) -> bool {
        (self.worker.is_empty() || line.worker == self.worker)
            && (self.levels.is_empty() || self.levels.contains(&line.level.as_str()))
            && (self.text.is_empty() || line.text.to_ascii_lowercase().contains(&self.text))
    }
}
