//! A log file that is renamed when it is full: `worker.log`, before it `worker.log.1`, `worker.log.2`, …

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// A file of this size opens quickly in any editor.
const FULL_BYTES: u64 = 16 << 20;
/// How many full files are kept beside the one that is written.
const KEPT: u32 = 4;

/// Appends to a file, and begins a new one when it is full.
#[derive(Debug)]
pub(crate) struct Rotating {
    path: PathBuf,
    file: File,
    written_bytes: u64,
    full_bytes: u64,
    kept: u32,
}

impl Rotating {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::open_with(path, FULL_BYTES, KEPT)
    }

    pub(crate) fn open_with(path: &Path, full_bytes: u64, kept: u32) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let file = append_to(path)?;
        let written_bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, written_bytes, full_bytes, kept })
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.file.flush()?;
        for number in (1..self.kept).rev() {
            let (from, to) = (self.numbered(number), self.numbered(number + 1));
            if from.exists() {
                fs::rename(from, to)?;
            }
        }
        fs::rename(&self.path, self.numbered(1))?;
        self.file = append_to(&self.path)?;
        self.written_bytes = 0;
        Ok(())
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }
}

impl Write for Rotating {
    /// One call is one line: it is never split over two files.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.written_bytes > 0 && self.written_bytes + line.len() as u64 > self.full_bytes {
            // A rename that fails (a full disk, a folder that went away) must not lose the line.
            let _ = self.rotate();
        }
        self.file.write_all(line)?;
        self.written_bytes += line.len() as u64;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Removes the log files of a folder but the `newest`: those of processes that are long gone.
pub fn keep_newest(folder: &Path, newest: usize) {
    let is_log = |path: &Path| path.to_str().is_some_and(|path| path.contains(".jsonl"));
    let mut files: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| is_log(&entry.path()))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort();
    let over = files.len().saturating_sub(newest);
    for (_, file) in files.into_iter().take(over) {
        // Another process may have removed it a moment ago.
        let _ = fs::remove_file(file);
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_logs_of_a_folder_make_room_and_other_files_stay() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| folder.path().join(name);
        for (age, name) in ["w-4.jsonl", "w-3.jsonl.1", "w-2.jsonl", "w-1.jsonl", "notes"].iter().enumerate()
        {
            let file = File::create(at(name)).expect("create");
            let then = std::time::SystemTime::now() - std::time::Duration::from_secs(60 * age as u64);
            file.set_modified(then).expect("set the time");
        }
        keep_newest(folder.path(), 2);
        let left =
            ["w-4.jsonl", "w-3.jsonl.1", "w-2.jsonl", "w-1.jsonl", "notes"].map(|name| at(name).exists());
        assert_eq!(left, [true, true, false, false, true]);
    }

    #[test]
    fn full_files_move_on_and_the_oldest_goes() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("logs/w.log");
        let mut log = Rotating::open_with(&path, 10, 2).expect("open");
        for line in ["one 4567\n", "two 4567\n", "three 67\n", "four 567\n"] {
            log.write_all(line.as_bytes()).expect("write");
        }
        let text = |name: &str| fs::read_to_string(folder.path().join("logs").join(name)).ok();
        assert_eq!(text("w.log").as_deref(), Some("four 567\n"));
        assert_eq!(text("w.log.1").as_deref(), Some("three 67\n"));
        assert_eq!(text("w.log.2").as_deref(), Some("two 4567\n"));
        assert_eq!(text("w.log.3"), None);
    }

    #[test]
    fn a_line_longer_than_a_file_stays_whole_and_a_restart_appends() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("w.log");
        Rotating::open_with(&path, 10, 2).expect("open").write_all(b"far too long a line\n").expect("write");
        Rotating::open_with(&path, 100, 2).expect("open").write_all(b"more\n").expect("write");
        assert_eq!(fs::read_to_string(&path).expect("read"), "far too long a line\nmore\n");
    }
}
