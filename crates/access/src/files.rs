//! Files of secrets: written for their owner alone, whole or not at all.

use std::{
    fs::{self, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use crate::error::{Error, Result};

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { action, path, source }
}

/// Reads a text.
///
/// # Errors
/// [`Error::File`]
pub fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(failed("read", path))
}

/// Writes a file that its owner alone can read (mode 0600). It is there with all of the text, or as it was before.
///
/// # Errors
/// [`Error::File`]
pub fn write_private(path: &Path, text: &str) -> Result<()> {
    write(path, text, 0o600)
}

/// Writes a file that everybody can read. It is there with all of the text, or as it was before.
///
/// # Errors
/// [`Error::File`]
pub fn write_public(path: &Path, text: &str) -> Result<()> {
    write(path, text, 0o644)
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let beside = path.with_file_name(name);
    let all = || -> io::Result<()> {
        // What an earlier, killed process left must not lend its mode.
        if let Err(error) = fs::remove_file(&beside)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => fs::File::open(folder)?.sync_all(),
            _ => Ok(()),
        }
    };
    all().map_err(failed("write", path))
}

/// Makes a folder, with what is above it, that its owner alone can enter.
///
/// # Errors
/// [`Error::File`]
pub fn make_private_folder(path: &Path) -> Result<()> {
    let make = || -> io::Result<()> {
        fs::create_dir_all(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o700))
    };
    make().map_err(failed("create", path))
}

/// Sets a file's mode.
///
/// # Errors
/// [`Error::File`]
pub fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("change", path))
}

/// Refuses a file that others than its owner may read or write.
///
/// Files of root are let through if only their group may read them: that is how orchestrators mount secrets.
///
/// # Errors
/// [`Error::TooOpen`], [`Error::File`]
pub fn require_private(path: &Path) -> Result<()> {
    let metadata = fs::metadata(path).map_err(failed("read", path))?;
    let mode = metadata.mode() & 0o777;
    let forbidden = if metadata.uid() == 0 && !rustix::process::getuid().is_root() { 0o027 } else { 0o077 };
    if metadata.is_file() && mode & forbidden != 0 {
        return Err(Error::TooOpen { path: path.to_owned(), mode });
    }
    Ok(())
}
