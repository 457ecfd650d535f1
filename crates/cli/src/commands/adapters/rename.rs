//! `shanty adapters rename`: the same numbers for a base whose modules have other names.

use std::path::PathBuf;

use serde_json::json;
use shanty_peft_core::adapter_files::{Renaming, StoredAdapter, rename};

use super::Out;
use crate::{error::Error, failure::CommandResult, job_file::short, ui::Ui};

/// Rename the modules that an adapter is put on, or the base that it names
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty adapters rename old --module model.language_model=model --out new
  shanty adapters rename old --base meta-llama/Llama-3.1-8B --out new

Whole parts of names are replaced (q_proj, layers.0), in tensors and in target_modules.")]
pub(super) struct Args {
    /// The adapter's folder
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    /// Parts of module names and what they become; may be given many times
    #[arg(long = "module", value_name = "OLD=NEW")]
    modules: Vec<String>,
    /// The base that the adapter is said to be for
    #[arg(long, value_name = "NAME")]
    base: Option<String>,
    #[command(flatten)]
    out: Out,
}

pub(super) fn execute(args: Args, ui: &Ui) -> CommandResult<()> {
    let pair = |text: &String| -> Result<(String, String), Error> {
        match text.split_once('=') {
            Some((old, new)) if !old.is_empty() => Ok((old.to_owned(), new.to_owned())),
            _ => Err(Error::Impossible {
                flag: "--module",
                value: text.clone(),
                rule: "must be OLD=NEW".to_owned(),
            }),
        }
    };
    let modules = args.modules.iter().map(pair).collect::<Result<Vec<_>, _>>()?;
    if modules.is_empty() && args.base.is_none() {
        let message = "nothing is to be renamed".to_owned();
        return Err(Error::Usage { message, hint: "give --module OLD=NEW or --base NAME".to_owned() }.into());
    }
    let mut adapter = StoredAdapter::open(&args.adapter)?;
    let renamed = rename(&mut adapter, &Renaming { modules, base: args.base })?;
    adapter.write(&args.out.out)?;
    let total = adapter.tensors.len();
    ui.data(&json!({ "out": args.out.out, "renamed": renamed, "tensors": total }), |_| {
        format!("{} holds {total} tensors, {renamed} of them renamed", short(&args.out.out))
    })
}
