//! Flags that several commands share.

use std::path::{Path, PathBuf};

use crate::{base, error::Error, failure::CommandResult, model::BaseQuantization, ui::Ui};

/// Which model, and what is laid on it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelFlags {
    /// The base model's folder, or org/name of the Hugging Face hub
    #[arg(long, value_name = "DIR|ORG/NAME")]
    pub(crate) model: PathBuf,
    /// An adapter's folder, as shanty or PEFT wrote it; several may be given, each with a name
    #[arg(long = "adapter", value_name = "[NAME=]DIR")]
    pub(crate) adapters: Vec<AdapterFlag>,
    /// Use an adapter although it was trained on another base
    #[arg(long)]
    pub(crate) force: bool,
    /// How the base is kept in memory
    #[arg(long, value_enum, default_value_t)]
    pub(crate) quantization: BaseQuantization,
    /// Threads to compute with; all cores when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) threads: Option<u16>,
}

impl ModelFlags {
    /// Downloads the base, if it is of the hub and not here; from then on the flag names its folder.
    pub(crate) fn fetch(&mut self, ui: &Ui) -> CommandResult<()> {
        self.model = base::folder_of(&self.model, ui)?;
        Ok(())
    }
}

/// `NAME=DIR`, or a folder that is named after itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AdapterFlag {
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
}

impl std::str::FromStr for AdapterFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |name: &str| {
            !name.is_empty() && name.chars().all(|letter| letter.is_alphanumeric() || "-_.".contains(letter))
        };
        match text.split_once('=') {
            Some((name, folder)) if plain(name) && !folder.is_empty() => {
                Ok(Self { name: name.to_owned(), folder: folder.into() })
            }
            _ if text.is_empty() => Err("it is empty".to_owned()),
            _ => Ok(Self { name: name_of(Path::new(text)), folder: text.into() }),
        }
    }
}

/// `pirate` for `runs/pirate/adapter`, and for `adapters/pirate`.
fn name_of(folder: &Path) -> String {
    let part = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let own = part(folder);
    let above = folder.parent().and_then(part);
    match (own.as_deref(), above) {
        (Some("adapter"), Some(above)) => above,
        (Some(own), _) => own.to_owned(),
        (None, _) => "adapter".to_owned(),
    }
}

/// How tokens are drawn.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SamplingFlags {
    /// Tokens to add at most
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) max_tokens: usize,
    /// How freely tokens are drawn; 0 takes the likeliest
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Draw among the K likeliest tokens
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Draw among the likeliest tokens that make up this share
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f64>,
    /// Make tokens that are there already less likely; 1 does nothing, 1.1 to 1.3 is usual
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    pub(crate) repetition_penalty: f32,
    /// Seeds the draw: the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 17)]
    pub(crate) seed: u64,
}

impl SamplingFlags {
    /// Refuses numbers that mean nothing.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let impossible = |flag: &'static str, value: String, rule: &str| {
            Err(Error::Impossible { flag, value, rule: rule.to_owned() })
        };
        if self.max_tokens == 0 {
            return impossible("--max-tokens", "0".to_owned(), "must be at least 1");
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return impossible("--temperature", self.temperature.to_string(), "must be at least 0");
        }
        if self.top_k == Some(0) {
            return impossible("--top-k", "0".to_owned(), "must be at least 1");
        }
        if let Some(share) = self.top_p.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
            return impossible("--top-p", share.to_string(), "must be above 0 and at most 1");
        }
        let penalty = self.repetition_penalty;
        if !(penalty.is_finite() && penalty > 0.0) {
            return impossible("--repetition-penalty", penalty.to_string(), "must be above 0");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_names() {
        for (text, name, folder) in [
            ("pirate=runs/1/adapter", "pirate", "runs/1/adapter"),
            ("runs/pirate/adapter", "pirate", "runs/pirate/adapter"),
            ("adapters/gnome/", "gnome", "adapters/gnome/"),
            ("adapter", "adapter", "adapter"),
            ("/", "adapter", "/"),
            // A folder with a sign of equality in its path is a folder.
            ("runs/lr=3/adapter", "lr=3", "runs/lr=3/adapter"),
        ] {
            let flag: AdapterFlag = text.parse().unwrap();
            assert_eq!((flag.name.as_str(), flag.folder.as_path()), (name, Path::new(folder)), "{text}");
        }
        assert!("".parse::<AdapterFlag>().is_err());
    }
}
