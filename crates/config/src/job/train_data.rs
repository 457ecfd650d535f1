//! Where training data comes from.

use serde::{Deserialize, Serialize};

use super::TrainSource;
use crate::shape::{Describe, Shape};

/// Training data: one source, or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TrainData {
    /// A path, a glob, or a URL.
    One(String),
    /// Several, perhaps mixed by weight.
    Many(Vec<TrainSource>),
}

impl TrainData {
    /// The sources; one without form and weight where there is but a path.
    pub fn sources(&self) -> Vec<TrainSource> {
        match self {
            Self::One(path) => vec![TrainSource { path: path.clone(), format: None, weight: None }],
            Self::Many(sources) => sources.clone(),
        }
    }

    /// The paths, each with the dotted key that names it.
    pub fn paths(&self) -> Vec<(String, &str)> {
        match self {
            Self::One(path) => vec![("data.train".to_owned(), path)],
            Self::Many(sources) => {
                let key = |index| format!("data.train[{index}].path");
                sources.iter().enumerate().map(|(index, source)| (key(index), source.path.as_str())).collect()
            }
        }
    }

    /// Changes every path.
    pub(crate) fn map_paths(&mut self, change: impl Fn(&str) -> String) {
        match self {
            Self::One(path) => *path = change(path),
            Self::Many(sources) => sources.iter_mut().for_each(|source| source.path = change(&source.path)),
        }
    }
}

impl Describe for TrainData {
    fn shape() -> Shape {
        match TrainSource::shape() {
            Shape::Table(table) => Shape::TextOrTables(table),
            other => other,
        }
    }
}
