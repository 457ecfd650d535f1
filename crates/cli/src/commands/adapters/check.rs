//! `shanty adapters check`: whether an adapter belongs to a base.

use std::path::PathBuf;

use serde_json::json;
use shanty_diagnostic::Diagnose;
use shanty_peft_core::{
    generate::LoadedAdapter,
    model::{ModelConfig, resident},
};

use super::facts;
use crate::{failure::CommandResult, format, job_file::short, ui::Ui};

/// Check an adapter against a base: settings, names and shapes of tensors, and the hash of the base
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty adapters check runs/pirate/adapter --model models/tiny
  shanty adapters check downloaded --model models/tiny --force

Adapters that shanty trained carry the hash of their base; another base is refused, unless
--force. Of others the hash is not known: that their tensors fit is all that can be said.")]
pub(super) struct Args {
    /// The adapter's folder
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    /// The base model's folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Warn of another base, rather than refuse it
    #[arg(long)]
    force: bool,
}

pub(super) fn execute(args: &Args, ui: &Ui) -> CommandResult<()> {
    let config = ModelConfig::load(&args.model)?;
    let adapter = LoadedAdapter::open(&args.adapter, &config)?;
    let hash = resident::content_hash(&args.model, &mut |_| {})?;
    let same = match (adapter.base_hash(), adapter.check_base(&args.adapter, hash)) {
        (None, _) => None,
        (Some(_), Ok(())) => Some(true),
        (Some(_), Err(error)) if args.force => {
            ui.warn(error.diagnostic().message);
            Some(false)
        }
        (Some(_), Err(error)) => return Err(error.into()),
    };
    let layout = adapter.fit().layout();
    let modules = adapter.fit().matched().modules();
    let method = adapter.fit().method().map_or("none", |method| method.peft_type());
    let found = json!({
        "adapter": args.adapter, "model": args.model, "method": method, "parameters": layout.parameters(),
        "modules": modules, "base_hash": hash.to_hex().to_string(), "same_base": same,
        "unknown_settings": adapter.dropped_keys(),
    });
    ui.data(&found, |_| {
        let verdict = match same {
            Some(true) => "the one it was trained on",
            Some(false) => "not the one it was trained on",
            None => "not known: the adapter carries no hash",
        };
        facts(&[
            ("adapter", short(&args.adapter)),
            ("method", method.to_lowercase()),
            ("tensors", format!("{} of {} fit", layout.entries().len(), layout.entries().len())),
            ("size", format!("{} parameters", format::count(layout.parameters() as u64))),
            ("base", format!("{verdict} ({})", &hash.to_hex()[..16])),
            (
                "settings",
                match adapter.dropped_keys() {
                    [] => "all known".to_owned(),
                    keys => format!("nothing here knows {}", keys.join(", ")),
                },
            ),
        ])
    })
}
