//! Which modules are adapted: PEFT's rules for `target_modules`.
//!
//! A list matches a module whose name equals an item or ends with a dot and the item. A string is a regular
//! expression that must match the whole name, as Python's `re.fullmatch`. `"all-linear"` is every linear module but the
//! output head. As in PEFT, the rules see all modules, not only linear ones, and a match that cannot be adapted is an
//! error; unlike PEFT, an item that matches nothing is told.

use std::collections::BTreeSet;

use fancy_regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    model::{ModelConfig, Module, ModuleKind},
};

/// The shorthand for every linear module but the output head.
pub const ALL_LINEAR: &str = "all-linear";

/// `target_modules`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// `"all-linear"`, or a regular expression.
    Pattern(String),
    /// Names, or the last parts of names.
    Names(Vec<String>),
}

impl TargetModules {
    /// `"all-linear"`.
    pub fn all_linear() -> Self {
        Self::Pattern(ALL_LINEAR.to_owned())
    }

    /// Full names of those of `modules` that match.
    ///
    /// # Errors
    /// The expression is none.
    pub(super) fn matching(&self, modules: &[Module]) -> Result<Vec<String>> {
        let mut matches = Vec::new();
        match self {
            Self::Pattern(pattern) if pattern.eq_ignore_ascii_case(ALL_LINEAR) => {
                let linear = modules.iter().filter(|module| module.kind == ModuleKind::Linear);
                matches.extend(linear.map(|module| module.path.clone()));
            }
            Self::Pattern(pattern) => {
                let regex = full_match(pattern)?;
                for module in modules {
                    if regex.is_match(&module.path).map_err(|error| unusable(pattern, &error))? {
                        matches.push(module.path.clone());
                    }
                }
            }
            Self::Names(names) => {
                let wanted = modules.iter().filter(|module| names.iter().any(|name| module.is_named(name)));
                matches.extend(wanted.map(|module| module.path.clone()));
            }
        }
        Ok(matches)
    }

    /// Finds the modules of `config` that are adapted: those that match, are left by `left`, and are of `kinds`.
    ///
    /// # Errors
    /// Nothing matches, something matches that cannot be adapted, or the expression is none.
    pub(super) fn find_where(
        &self,
        config: &ModelConfig,
        kinds: &[ModuleKind],
        left: &dyn Fn(&Module) -> bool,
    ) -> Result<Matched> {
        let modules = config.modules();
        let names = self.matching(&modules)?;
        if names.is_empty() {
            return Err(self.no_target(&modules, kinds));
        }
        let matches: Vec<&Module> =
            modules.iter().filter(|module| names.contains(&module.path) && left(module)).collect();
        if matches.is_empty() {
            return Err(Error::NothingLeft { pattern: self.to_string(), matched: names.len() });
        }
        let unused = match self {
            Self::Pattern(_) => Vec::new(),
            Self::Names(asked) => {
                let used = |asked: &String| {
                    modules.iter().any(|module| module.is_named(asked) && names.contains(&module.path))
                };
                asked.iter().filter(|asked| !used(asked)).cloned().collect()
            }
        };
        let target = |module: &&Module| match kinds.contains(&module.kind) {
            true => Ok((*module).clone()),
            false => Err(Error::WrongTarget {
                pattern: self.to_string(),
                module: module.path.clone(),
                what: what(module.kind),
            }),
        };
        Ok(Matched { targets: matches.iter().map(target).collect::<Result<_>>()?, unused })
    }

    /// Finds the modules of `config` that are adapted, among its linear layers.
    ///
    /// # Errors
    /// Nothing matches, something matches that cannot be adapted, or the expression is none.
    pub fn find(&self, config: &ModelConfig) -> Result<Matched> {
        self.find_where(config, &[ModuleKind::Linear], &|_| true)
    }

    fn no_target(&self, modules: &[Module], kinds: &[ModuleKind]) -> Error {
        let known: Vec<&Module> = modules.iter().filter(|module| kinds.contains(&module.kind)).collect();
        let mut available: Vec<String> = Vec::new();
        for module in &known {
            if !available.iter().any(|name| name == module.name()) {
                available.push(module.name().to_owned());
            }
        }
        let asked: Vec<&str> = match self {
            Self::Pattern(pattern) => vec![pattern],
            Self::Names(names) => names.iter().map(String::as_str).collect(),
        };
        let known: BTreeSet<&str> =
            known.iter().flat_map(|module| [module.path.as_str(), module.name()]).collect();
        let nearest = asked.iter().find_map(|asked| nearest(asked, &known)).map(|nearest| match self {
            // A suffix works in a list alone.
            Self::Pattern(_) => format!("[\"{nearest}\"]"),
            Self::Names(_) => nearest.to_owned(),
        });
        Error::NoTarget { pattern: self.to_string(), available, nearest }
    }
}

/// What a module is that cannot be adapted.
fn what(kind: ModuleKind) -> &'static str {
    match kind {
        ModuleKind::Linear => "a linear layer",
        ModuleKind::Embedding => "the token embedding, which this method cannot adapt",
        ModuleKind::Head => "the output head, which this method cannot adapt",
        ModuleKind::Norm => "a norm",
        ModuleKind::Other(what) => what,
    }
}

impl std::fmt::Display for TargetModules {
    /// As JSON.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pattern(pattern) => write!(f, "{}", serde_json::Value::from(pattern.as_str())),
            Self::Names(names) => write!(f, "{}", serde_json::Value::from(names.as_slice())),
        }
    }
}

/// What `target_modules` matched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Matched {
    /// The adapted modules, in the order of the forward pass.
    pub targets: Vec<Module>,
    /// Items of a list that matched nothing while others did: perhaps misspelt.
    pub unused: Vec<String>,
}

impl Matched {
    /// Full names of the adapted modules, in the order of the forward pass.
    pub fn modules(&self) -> Vec<String> {
        self.targets.iter().map(|module| module.path.clone()).collect()
    }
}

pub(super) fn full_match(pattern: &str) -> Result<Regex> {
    // Parsed alone first: `a)(b` would become sound inside of the group.
    Regex::new(pattern)
        .and_then(|_| Regex::new(&format!(r"\A(?:{pattern})\z")))
        .map_err(|error| unusable(pattern, &error))
}

pub(super) fn unusable(pattern: &str, error: &fancy_regex::Error) -> Error {
    Error::TargetPattern { pattern: pattern.to_owned(), problem: error.to_string() }
}

/// The known name that takes the fewest edits, if they are few.
fn nearest<'a>(asked: &str, known: &BTreeSet<&'a str>) -> Option<&'a str> {
    let allowed = (asked.chars().count() / 3).max(1);
    known
        .iter()
        .map(|known| (edits(asked, known), *known))
        .min()
        .filter(|(edits, _)| *edits <= allowed)
        .map(|(_, known)| known)
}

/// Levenshtein's distance.
fn edits(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (line, from) in left.chars().enumerate() {
        let mut diagonal = line;
        row[0] = line + 1;
        for (column, to) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}
