//! The folder of a run, and whether it is free.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{error::Error, failure::CommandResult};

/// The folder of a run. Everything that a run leaves lies below it.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    root: PathBuf,
    state: PathBuf,
    /// The folders that were not there before, outermost first.
    created: Vec<PathBuf>,
}

impl Store {
    /// The run folder `root`, with the coordinator's state in `state` or below it.
    pub(crate) fn new(root: PathBuf, state: Option<PathBuf>) -> Self {
        let state = state.unwrap_or_else(|| root.join("coordinator"));
        Self { root, state, created: Vec::new() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where the coordinator keeps its state.
    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    /// Whether a job was started here before.
    pub(crate) fn is_taken(&self) -> bool {
        holds_something(&self.state) || holds_something(&self.root)
    }

    /// Whether a coordinator kept a job here.
    pub(crate) fn holds_a_job(&self) -> bool {
        holds_something(&self.state)
    }

    /// Makes the folders; remembers which were not there.
    pub(crate) fn create(&mut self) -> CommandResult<()> {
        for folder in [self.root.clone(), self.state.clone()] {
            let mut missing: Vec<PathBuf> =
                folder.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
            missing.retain(|path| !path.as_os_str().is_empty());
            missing.reverse();
            fs::create_dir_all(&folder).map_err(|source| Error::File {
                action: "create",
                path: folder.clone(),
                source,
            })?;
            self.created.extend(missing);
        }
        Ok(())
    }

    /// Takes away what [`create`](Self::create) made and all in it: the run never began.
    pub(crate) fn remove(&self) {
        // What cannot be removed stays; the error that led here matters more.
        let _ = self
            .created
            .iter()
            .find(|folder| **folder == self.root || self.root.starts_with(folder))
            .map(remove);
        let _ = self.created.iter().find(|folder| self.state.starts_with(folder)).map(remove);
    }

    /// Says where the coordinator listens, for `shanty status` and its like.
    pub(crate) fn write_address(&self, address: &str) -> CommandResult<()> {
        let path = self.address_file();
        fs::write(&path, format!("{address}\n"))
            .map_err(|source| Error::File { action: "write", path, source }.into())
    }

    /// Nobody listens any more.
    pub(crate) fn remove_address(&self) {
        // If it stays, whoever reads it is told that nobody answers there.
        let _ = fs::remove_file(self.address_file());
    }

    fn address_file(&self) -> PathBuf {
        self.state.join("address")
    }
}

fn holds_something(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

fn remove(folder: impl AsRef<Path>) -> io::Result<()> {
    fs::remove_dir_all(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_began_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::new(folder.path().join("runs/pirate"), None);
        assert!(!store.is_taken());
        store.create().unwrap();
        store.write_address("http://127.0.0.1:1").unwrap();
        assert!(store.is_taken());
        store.remove();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn folders_that_were_there_stay() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("runs")).unwrap();
        fs::write(folder.path().join("runs/note"), "mine").unwrap();
        let mut store = Store::new(folder.path().join("runs/pirate"), None);
        store.create().unwrap();
        store.remove();
        assert!(folder.path().join("runs/note").exists());
        assert!(!folder.path().join("runs/pirate").exists());
    }
}
