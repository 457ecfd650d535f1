//! The key that a coordinator leaves for its own user on its own machine.
//!
//! On one machine nobody should have to handle tokens, and yet other users of that machine must stay out. A coordinator
//! therefore leaves a token of role `admin` in a file that its user alone can read, named by host and port; commands of the same
//! user that talk to that port on loopback find it by themselves.

use std::path::{Path, PathBuf};

use crate::{
    error::{Error, Result},
    files,
    secret::Secret,
    token::{self, NewToken},
};

/// A key file that this process wrote, or found and goes on with.
#[derive(Debug)]
pub struct LocalKey {
    path: PathBuf,
    secret: Secret,
}

impl LocalKey {
    /// The key for a port of this machine: the one that an earlier coordinator left there, or a new one. With the same key
    /// workers come back to a coordinator that was killed and started again.
    ///
    /// # Errors
    /// That no folder can be had that is this user's alone, or no file written.
    pub fn for_port(port: u16) -> Result<Self> {
        Self::in_folders(&folders(), port)
    }

    fn in_folders(folders: &[PathBuf], port: u16) -> Result<Self> {
        if let Some(path) = folders.iter().map(|folder| folder.join(name(port))).find(|path| is_ours(path))
            && let Ok(secret) = Secret::read(&path)
            && token::read(secret.expose()).is_some()
        {
            return Ok(Self { path, secret });
        }
        let mut failure = None;
        for folder in folders {
            match Self::write(folder, port) {
                Ok(key) => return Ok(key),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or(Error::Random))
    }

    fn write(folder: &Path, port: u16) -> Result<Self> {
        files::make_private_folder(folder)?;
        let path = folder.join(name(port));
        let secret = NewToken::draw()?.secret;
        files::write_private(&path, secret.expose())?;
        Ok(Self { path, secret })
    }

    /// The token.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the file away: nobody listens on that port any more.
    pub fn remove(&self) {
        // If it stays, it opens nothing.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The key file for a port of this machine, if its coordinator left one for this user.
pub fn find(port: u16) -> Option<PathBuf> {
    folders().into_iter().map(|folder| folder.join(name(port))).find(|path| is_ours(path))
}

fn name(port: u16) -> String {
    // Home folders may be shared by several machines.
    format!("{}-{port}.key", rustix::system::uname().nodename().to_string_lossy())
}

/// Where keys may lie: the user's state folder; where there is no home, a folder of the user's own in the system's one for
/// temporary files.
fn folders() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = variable("XDG_STATE_HOME").or_else(|| variable("HOME").map(|home| home.join(".local/state")));
    let user = rustix::process::getuid().as_raw();
    let temporary = std::env::temp_dir().join(format!("shanty-{user}"));
    state.map(|state| state.join("shanty/local")).into_iter().chain([temporary]).collect()
}

/// Whether a file and its folder are this user's, and closed to everybody else.
fn is_ours(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let user = rustix::process::getuid().as_raw();
    let closed = |path: &Path| {
        std::fs::symlink_metadata(path).is_ok_and(|metadata| {
            !metadata.is_symlink() && metadata.uid() == user && metadata.mode() & 0o077 == 0
        })
    };
    path.parent().is_some_and(closed) && closed(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_that_comes_back_finds_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let folders = [folder.path().join("local")];
        let first = LocalKey::in_folders(&folders, 7461).unwrap();
        let again = LocalKey::in_folders(&folders, 7461).unwrap();
        assert_eq!(first.secret(), again.secret());
        assert_ne!(LocalKey::in_folders(&folders, 7462).unwrap().secret(), first.secret());
        first.remove();
        assert_ne!(LocalKey::in_folders(&folders, 7461).unwrap().secret(), first.secret());
    }

    #[test]
    fn a_key_that_others_could_read_or_have_laid_there_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let folders = [folder.path().join("local")];
        let key = LocalKey::in_folders(&folders, 1).unwrap();
        files::set_mode(key.path(), 0o644).unwrap();
        assert_ne!(LocalKey::in_folders(&folders, 1).unwrap().secret(), key.secret());
        let key = LocalKey::in_folders(&folders, 1).unwrap();
        let elsewhere = folder.path().join("laid");
        files::write_private(&elsewhere, key.secret().expose()).unwrap();
        std::fs::remove_file(key.path()).unwrap();
        std::os::unix::fs::symlink(&elsewhere, key.path()).unwrap();
        assert!(!is_ours(key.path()));
    }

    #[test]
    fn where_the_first_folder_cannot_be_had_the_next_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let folders = [folder.path().join("file/local"), folder.path().join("other")];
        assert!(LocalKey::in_folders(&folders, 1).unwrap().path().starts_with(&folders[1]));
    }
}
