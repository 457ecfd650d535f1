//! A file that was read, and where each of its values came from.

use std::path::{Path, PathBuf};

use shanty_diagnostic::Diagnostic;

use crate::{document::Document, place::Place};

/// A file that was read, checked and resolved.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// What it says, all layers together.
    pub value: T,
    /// What is allowed and yet looks wrong; to be shown, not to stop at.
    pub warnings: Vec<Diagnostic>,
    pub(crate) sources: Sources,
}

impl<T> Loaded<T> {
    /// The file, as it was named; empty where there was none.
    pub fn path(&self) -> &Path {
        &self.sources.path
    }

    /// Where the value of a dotted key came from: a flag, a variable, or a place in the file.
    /// An absent key is shown at the header of its table. Indices work: `adapter.target_modules[1]`.
    pub fn locate(&self, key: &str) -> Place {
        self.sources.locate(key)
    }

    /// Whether any layer names this key.
    pub fn names(&self, key: &str) -> bool {
        self.sources.names(key)
    }

    /// An error found elsewhere, at the place of the key that it is about.
    #[must_use]
    pub fn attach(&self, key: &str, diagnostic: Diagnostic) -> Diagnostic {
        self.locate(key).attach(diagnostic)
    }
}

/// Where the values of a file came from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sources {
    pub(crate) path: PathBuf,
    pub(crate) document: Option<Document>,
    pub(crate) environment: Vec<(String, Place)>,
    pub(crate) flags: Vec<(String, Place)>,
}

impl Sources {
    pub(crate) fn locate(&self, key: &str) -> Place {
        let over = |layer: &[(String, Place)]| {
            layer.iter().rev().find(|(named, _)| covers(named, key)).map(|(_, place)| place.clone())
        };
        if let Some(place) = over(&self.flags).or_else(|| over(&self.environment)) {
            return place;
        }
        match &self.document {
            Some(document) => Place::File {
                path: self.path.clone(),
                at: document.nearest_span(key).map(|span| document.position(&span)),
            },
            None => Place::Elsewhere,
        }
    }

    /// [`Sources::locate`] for a value that may be built in: [`Place::Elsewhere`] where no layer names the key.
    pub(crate) fn locate_named(&self, key: &str) -> Place {
        if self.names(key) { self.locate(key) } else { Place::Elsewhere }
    }

    pub(crate) fn names(&self, key: &str) -> bool {
        let over = |layer: &[(String, Place)]| layer.iter().any(|(named, _)| covers(named, key));
        let in_file = self.document.as_ref().is_some_and(|document| document.item(key).is_some());
        in_file || over(&self.environment) || over(&self.flags)
    }
}

/// Whether a layer's entry gives the value of a key: it names it, or an element of it is asked for.
fn covers(named: &str, key: &str) -> bool {
    key.strip_prefix(named).is_some_and(|rest| rest.is_empty() || rest.starts_with(['[', '.']))
}
