//! The folder of the finished adapter: all of it, or none.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
    time::Duration,
};

use bytes::Bytes;
use shanty_checkpoint::Blocking;
use shanty_diagnostic::{Diagnose, Kind};

use crate::{Error, engine::AdapterFiles};

/// Writes `files` to a folder beside `folder` and moves it there, in place of an earlier one, if `may_move` says so.
pub(crate) fn write(
    folder: &Path,
    files: &[(String, Vec<u8>)],
    may_move: impl FnOnce() -> bool,
) -> Result<(), Error> {
    let partial = folder.with_extension(format!("{}.partial", std::process::id()));
    let written = fill(&partial, files).and_then(|()| {
        if !may_move() {
            return Err(io::Error::other("the credit of this worker ran out"));
        }
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        fs::rename(&partial, folder)
    });
    written.map_err(|source| {
        // What is left of it must not be taken for an adapter.
        let _ = fs::remove_dir_all(&partial);
        Error::WriteAdapter { path: folder.to_owned(), source }
    })
}

/// How often an upload is tried, and the pause after the first try.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// Puts `files` into the folder `name` of an object store, in place of an earlier one; gives its URL.
pub(crate) fn upload(
    store: &str,
    name: &str,
    files: AdapterFiles,
    may_go_on: &(dyn Fn() -> bool + Sync),
) -> Result<String, Error> {
    let mut files: Vec<(String, Bytes)> =
        files.into_iter().map(|(name, content)| (name, content.into())).collect();
    // Whoever reads an adapter needs its settings: they come last, and go first.
    files.sort_by_key(|(name, _)| name != "adapter_config.json");
    let part = |error: shanty_checkpoint::Error| Error::part(&error);
    let store = Blocking::open(store).map_err(part)?;
    let mut pause = PAUSE;
    for _ in 1..TRIES {
        match store.put_folder(name, &files, may_go_on) {
            Err(error) if error.diagnostic().kind == Kind::Transient && may_go_on() => {
                tracing::warn!(%error, "the adapter is uploaded again");
            }
            other => return other.map_err(part),
        }
        std::thread::sleep(pause);
        pause *= 2;
    }
    store.put_folder(name, &files, may_go_on).map_err(part)
}

fn fill(partial: &Path, files: &[(String, Vec<u8>)]) -> io::Result<()> {
    if partial.exists() {
        fs::remove_dir_all(partial)?;
    }
    fs::create_dir_all(partial)?;
    for (name, content) in files {
        let mut file = File::create_new(partial.join(name))?;
        file.write_all(content)?;
        file.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_adapter_is_replaced_as_a_whole() {
        let store = tempfile::tempdir().unwrap();
        let folder = store.path().join("adapter");
        write(&folder, &[("a".to_owned(), vec![1]), ("b".to_owned(), vec![2])], || true).unwrap();
        write(&folder, &[("a".to_owned(), vec![3])], || true).unwrap();
        assert_eq!(fs::read(folder.join("a")).unwrap(), [3]);
        assert!(!folder.join("b").exists());
        assert_eq!(fs::read_dir(store.path()).unwrap().count(), 1);
    }

    #[test]
    fn without_leave_nothing_is_left_behind() {
        let store = tempfile::tempdir().unwrap();
        let folder = store.path().join("adapter");
        let error = write(&folder, &[("a".to_owned(), vec![1])], || false).unwrap_err();
        assert!(error.to_string().contains("credit"), "{error}");
        assert_eq!(fs::read_dir(store.path()).unwrap().count(), 0);
    }
}
