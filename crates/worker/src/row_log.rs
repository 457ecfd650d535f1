//! The rows that this worker trained, as it saw it: `logs/rows-<worker id>.jsonl` below the job's store.
//!
//! One line says that a reduction is entered, with every row in the local sum; one says that the step was applied.
//! The first is flushed to the operating system before anything is sent, so it outlives a killed process. Which rows
//! the final adapter was trained on follows from these files alone, without a word from the coordinator: for each
//! step, the rows that all ranks of the generation that applied it had entered with.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::Error;

/// A line of a row log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Entry {
    /// The worker enters the reduction of a step.
    Entering {
        /// The job's attempt.
        attempt: u32,
        /// The generation.
        generation: u64,
        /// The step.
        step: u64,
        /// The worker's rank.
        rank: u32,
        /// Members of the generation.
        world_size: u32,
        /// All rows in the worker's local sum, in the order they were added.
        rows: Vec<u64>,
    },
    /// The worker applied the step.
    Applied {
        /// The job's attempt.
        attempt: u32,
        /// The generation.
        generation: u64,
        /// The step.
        step: u64,
        /// The worker's rank.
        rank: u32,
    },
    /// The worker passed over the step: nothing of it is in the adapter.
    Skipped {
        /// The job's attempt.
        attempt: u32,
        /// The generation.
        generation: u64,
        /// The step.
        step: u64,
        /// The worker's rank.
        rank: u32,
    },
}

/// How long a worker waits for room on a full disk: less than it may be without progress.
const ROOM_WITHIN: Duration = Duration::from_secs(8);
const LOOK_FOR_ROOM: Duration = Duration::from_millis(50);

/// Appends to a worker's row log.
#[derive(Debug)]
pub(crate) struct RowLog {
    file: File,
    path: PathBuf,
}

impl RowLog {
    /// Opens the log of `worker_id` below `store` for appending.
    pub(crate) fn open(store: &Path, worker_id: &str) -> Result<Self, Error> {
        let folder = store.join("logs");
        let path = folder.join(format!("rows-{worker_id}.jsonl"));
        let open = || {
            std::fs::create_dir_all(&folder)?;
            OpenOptions::new().create(true).append(true).open(&path)
        };
        match open() {
            Ok(file) => Ok(Self { file, path }),
            Err(source) => Err(Error::RowLog { path, source }),
        }
    }

    /// Writes one entry with a single write, past every buffer of this process. Waits a while for room on a full disk: a
    /// worker that fails for it loses its place, and all have the same disk.
    pub(crate) fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        let mut line = serde_json::to_vec(entry).expect("numbers and lists of numbers are always JSON");
        line.push(b'\n');
        let began = Instant::now();
        loop {
            match self.append(&line) {
                Err(error) if error.kind() == ErrorKind::StorageFull && began.elapsed() < ROOM_WITHIN => {
                    std::thread::sleep(LOOK_FOR_ROOM);
                }
                other => return other.map_err(|source| Error::RowLog { path: self.path.clone(), source }),
            }
        }
    }

    /// Writes a line, or nothing of it.
    fn append(&mut self, line: &[u8]) -> std::io::Result<()> {
        let before = self.file.metadata()?.len();
        self.file.write_all(line).inspect_err(|_| {
            // Should that fail, too, the next line is read as a part of this one, and both are lost.
            let _ = self.file.set_len(before);
        })
    }
}

/// Reads a row log back. A last line that a killed process left unfinished is passed over.
///
/// # Errors
/// [`Error::RowLog`] if the file cannot be read.
pub fn read(path: &Path) -> Result<Vec<Entry>, Error> {
    let text =
        std::fs::read_to_string(path).map_err(|source| Error::RowLog { path: path.to_owned(), source })?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_and_a_torn_last_line_does_not_matter() {
        let store = tempfile::tempdir().unwrap();
        let entering =
            Entry::Entering { attempt: 1, generation: 2, step: 3, rank: 1, world_size: 3, rows: vec![9, 4] };
        let applied = Entry::Applied { attempt: 1, generation: 2, step: 3, rank: 1 };
        let mut log = RowLog::open(store.path(), "w1").unwrap();
        log.write(&entering).unwrap();
        drop(log);
        let mut log = RowLog::open(store.path(), "w1").unwrap();
        log.write(&applied).unwrap();
        log.file.write_all(b"{\"event\":\"enter").unwrap();

        let path = store.path().join("logs/rows-w1.jsonl");
        let first = std::fs::read_to_string(&path).unwrap();
        assert!(first.starts_with(
            r#"{"event":"entering","attempt":1,"generation":2,"step":3,"rank":1,"world_size":3,"rows":[9,4]}"#
        ));
        assert_eq!(read(&path).unwrap(), [entering, applied]);
    }
}
