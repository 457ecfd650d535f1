//! Text that is never shown.

use std::{fmt, io::Read, path::Path};

use crate::{
    error::{Error, Result},
    files,
};

/// A secret text. It has no `Display`, and its `Debug` says nothing, so that no log and no error can show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes a text; white space around it does not count.
    pub fn new(text: &str) -> Self {
        Self(text.trim().to_owned())
    }

    /// Reads a file that its owner alone can read; `-` is standard input.
    ///
    /// # Errors
    /// [`Error::File`], and [`Error::TooOpen`] if others may read it.
    pub fn read(path: &Path) -> Result<Self> {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map_err(|source| Error::File {
                action: "read",
                path: path.to_owned(),
                source,
            })?;
            return Ok(Self::new(&text));
        }
        files::require_private(path)?;
        files::read_text(path).map(|text| Self::new(&text))
    }

    /// The text itself, for those who send or hash it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_shows_a_secret() {
        let secret = Secret::new(" hush \n");
        assert_eq!(secret.expose(), "hush");
        assert!(!format!("{secret:?} {:#?}", Some(&secret)).contains("hush"));
    }

    #[test]
    fn a_file_that_others_can_read_is_no_place_for_a_secret() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        files::write_private(&path, "hush\n").unwrap();
        assert_eq!(Secret::read(&path).unwrap().expose(), "hush");
        files::set_mode(&path, 0o640).unwrap();
        let error = Secret::read(&path).unwrap_err();
        assert!(matches!(error, Error::TooOpen { mode: 0o640, .. }), "{error:?}");
    }
}
