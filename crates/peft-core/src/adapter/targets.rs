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
    adapter::layout::Target,
    error::{Error, Result},
    model::config::{ModelConfig, Projection},
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

    /// Finds the modules of `config` that are adapted.
    ///
    /// # Errors
    /// Nothing matches, something matches that cannot be adapted, or the expression is none.
    pub fn find(&self, config: &ModelConfig) -> Result<Matched> {
        let candidates = candidates(config);
        let matches: Vec<&Candidate> = match self {
            Self::Pattern(pattern) if pattern.eq_ignore_ascii_case(ALL_LINEAR) => {
                candidates.iter().filter(|candidate| candidate.target.is_ok()).collect()
            }
            Self::Pattern(pattern) => {
                let regex = full_match(pattern)?;
                let mut matches = Vec::new();
                for candidate in &candidates {
                    if regex.is_match(&candidate.name).map_err(|error| unusable(pattern, &error))? {
                        matches.push(candidate);
                    }
                }
                matches
            }
            Self::Names(names) => {
                let wanted = |candidate: &&Candidate| names.iter().any(|name| candidate.is_named(name));
                candidates.iter().filter(wanted).collect()
            }
        };
        if matches.is_empty() {
            return Err(self.no_target(config));
        }
        let unused = match self {
            Self::Pattern(_) => Vec::new(),
            Self::Names(names) => {
                let unused =
                    names.iter().filter(|name| !matches.iter().any(|candidate| candidate.is_named(name)));
                unused.cloned().collect()
            }
        };
        let target = |candidate: &&Candidate| {
            candidate.target.map_err(|what| Error::WrongTarget {
                pattern: self.to_string(),
                module: candidate.name.clone(),
                what,
            })
        };
        Ok(Matched { targets: matches.iter().map(target).collect::<Result<_>>()?, unused })
    }

    fn no_target(&self, config: &ModelConfig) -> Error {
        let mut available: Vec<String> = Projection::ALL.iter().map(|item| item.name().to_owned()).collect();
        let asked: Vec<&str> = match self {
            Self::Pattern(pattern) => vec![pattern],
            Self::Names(names) => names.iter().map(String::as_str).collect(),
        };
        let known = candidates(config);
        let known: BTreeSet<&str> = known
            .iter()
            .filter(|candidate| candidate.target.is_ok())
            .flat_map(|candidate| [candidate.name.as_str(), last_part(&candidate.name)])
            .collect();
        let nearest = asked.iter().find_map(|asked| nearest(asked, &known)).map(|nearest| match self {
            // A suffix works in a list alone.
            Self::Pattern(_) => format!("[\"{nearest}\"]"),
            Self::Names(_) => nearest.to_owned(),
        });
        available.dedup();
        Error::NoTarget { pattern: self.to_string(), available, nearest }
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matched {
    /// The adapted modules, in the order of the forward pass.
    pub targets: Vec<Target>,
    /// Items of a list that matched nothing while others did: perhaps misspelt.
    pub unused: Vec<String>,
}

impl Matched {
    /// Full names of the adapted modules, in the order of the forward pass.
    pub fn modules(&self) -> Vec<String> {
        self.targets.iter().map(|target| target.projection.module(target.layer)).collect()
    }

    /// Trained parameters of LoRA of rank `r`.
    pub fn lora_parameters(&self, config: &ModelConfig, r: usize) -> usize {
        self.targets.iter().map(|target| config.shape(target.projection).iter().sum::<usize>() * r).sum()
    }
}

/// A module of the model.
struct Candidate {
    name: String,
    /// What it is adapted as, or what it is instead.
    target: Result<Target, &'static str>,
}

impl Candidate {
    fn is_named(&self, name: &str) -> bool {
        self.name == name || self.name.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
    }
}

/// All modules, named as transformers names them.
fn candidates(config: &ModelConfig) -> Vec<Candidate> {
    const CONTAINER: &str = "a container of modules";
    const NORM: &str = "a norm";
    let other = |name: String, what| Candidate { name, target: Err(what) };
    let mut all = vec![
        other("model".to_owned(), CONTAINER),
        other("model.embed_tokens".to_owned(), "the token embedding; adapting it is not supported yet"),
        other("model.layers".to_owned(), CONTAINER),
    ];
    for layer in 0..config.layers {
        let name = format!("model.layers.{layer}");
        all.push(other(format!("{name}.self_attn"), CONTAINER));
        all.push(other(format!("{name}.mlp"), CONTAINER));
        all.push(other(format!("{name}.mlp.act_fn"), "an activation"));
        all.push(other(format!("{name}.input_layernorm"), NORM));
        all.push(other(format!("{name}.post_attention_layernorm"), NORM));
        all.push(other(name, CONTAINER));
        all.extend(Projection::ALL.iter().map(|projection| Candidate {
            name: projection.module(layer),
            target: Ok(Target { layer, projection: *projection }),
        }));
    }
    all.push(other("model.norm".to_owned(), NORM));
    all.push(other("model.rotary_emb".to_owned(), "the rotary embedding"));
    all.push(other("lm_head".to_owned(), "the output head; adapting it is not supported yet"));
    all
}

fn full_match(pattern: &str) -> Result<Regex> {
    // Parsed alone first: `a)(b` would become sound inside of the group.
    Regex::new(pattern)
        .and_then(|_| Regex::new(&format!(r"\A(?:{pattern})\z")))
        .map_err(|error| unusable(pattern, &error))
}

fn unusable(pattern: &str, error: &fancy_regex::Error) -> Error {
    Error::TargetPattern { pattern: pattern.to_owned(), problem: error.to_string() }
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
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
