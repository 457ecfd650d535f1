//! Reads a small text file, and says plainly when that fails.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use crate::{
    document::position_in,
    error::{Error, Errors},
    place::Place,
};

/// Nobody writes a larger one by hand; a larger one is some other file.
const LARGEST_BYTES: u64 = 4 << 20;

/// The text of a file, without a byte order mark.
pub(crate) fn text(path: &Path) -> Result<String, Errors> {
    let mut bytes = Vec::new();
    let length = File::open(path)
        .and_then(|file| file.take(LARGEST_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| unreadable(path, &error))?;
    if length as u64 > LARGEST_BYTES {
        return Err(Error::Unreadable {
            path: path.to_owned(),
            reason: format!("it is larger than {} MiB", LARGEST_BYTES >> 20),
            hint: Some("name the TOML file, not data or a model".to_owned()),
        }
        .into());
    }
    let text = String::from_utf8(bytes).map_err(|error| not_utf8(path, &error))?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    let is_folder = path.is_dir();
    let reason = match error.kind() {
        _ if is_folder => "it is a folder".to_owned(),
        io::ErrorKind::NotFound => "there is no such file".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    };
    let hint = match error.kind() {
        _ if is_folder => Some(format!("name a file in it, such as `{}`", path.join("job.toml").display())),
        io::ErrorKind::NotFound => Some("check the path; it is relative to the current folder".to_owned()),
        io::ErrorKind::PermissionDenied => Some("give this user the right to read it".to_owned()),
        _ => None,
    };
    Error::Unreadable { path: path.to_owned(), reason, hint }
}

fn not_utf8(path: &Path, error: &std::string::FromUtf8Error) -> Error {
    let bytes = error.as_bytes();
    let good = error.utf8_error().valid_up_to();
    let found = match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "it looks like UTF-16".to_owned(),
        _ => format!("byte 0x{:02x} cannot stand here", bytes[good]),
    };
    let before = String::from_utf8_lossy(&bytes[..good]);
    let at = position_in(&before, &(good..good));
    Error::NotUtf8 {
        path: path.to_owned(),
        found,
        place: Place::File { path: path.to_owned(), at: Some(at) },
    }
}
