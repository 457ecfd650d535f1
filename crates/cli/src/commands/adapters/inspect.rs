//! `shanty adapters inspect`: what an adapter is and what it changes.

use std::{collections::BTreeMap, path::PathBuf};

use serde_json::{Value, json};
use shanty_peft_core::adapter_files::{ModuleChange, StoredAdapter, module_changes};

use super::{facts, number};
use crate::{failure::CommandResult, format, job_file::short, ui::Ui};

/// Show an adapter: method, settings, modules, and how far each moves its weight
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty adapters inspect runs/pirate/adapter
  shanty adapters inspect runs/pirate/adapter --output json

|A|, |B| and |change| are Frobenius norms; change is what is added to the weight, scale included.
A change of 0 says that nothing was trained there.")]
pub(super) struct Args {
    /// The adapter's folder
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
}

pub(super) fn execute(args: &Args, ui: &Ui) -> CommandResult<()> {
    let adapter = StoredAdapter::open(&args.adapter)?;
    let changes = module_changes(&adapter)?;
    if ui.is_json() {
        return ui.json(&as_json(&adapter, &changes));
    }
    let setting = |key: &str| adapter.config.get(key).filter(|value| !value.is_null());
    let text = |key: &str| match setting(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    };
    let mut dtypes: Vec<String> =
        adapter.tensors.values().map(|tensor| format!("{:?}", tensor.dtype).to_lowercase()).collect();
    dtypes.sort();
    dtypes.dedup();
    let bytes: usize = adapter
        .tensors
        .values()
        .map(|tensor| tensor.values.len() * if tensor.dtype == safetensors::Dtype::F32 { 4 } else { 2 })
        .sum();
    let mut modules: Vec<String> =
        adapter.tensors.keys().map(|key| key.module.clone()).filter(|module| !module.is_empty()).collect();
    modules.dedup();
    let mut known = vec![
        ("adapter", short(&args.adapter)),
        ("method", adapter.method().to_lowercase()),
        ("base", text("base_model_name_or_path")),
        ("base hash", adapter.base_hash.clone().unwrap_or_else(|| "not recorded".to_owned())),
        ("rank", text("r")),
        ("alpha", text("lora_alpha")),
        ("dropout", text("lora_dropout")),
        ("virtual tokens", text("num_virtual_tokens")),
        ("modules", format::modules(&modules).join("\n")),
    ];
    for key in ["use_rslora", "use_dora", "lora_bias"] {
        if setting(key).and_then(Value::as_bool) == Some(true) {
            known.push((key, "yes".to_owned()));
        }
    }
    let size = format!(
        "{} parameters in {} tensors, {}, {}",
        format::count(adapter.parameters() as u64),
        adapter.tensors.len(),
        dtypes.join(" and "),
        format::bytes(bytes as u64),
    );
    known.push(("size", size));
    if !adapter.foreign_names.is_empty() {
        known.push(("names", format!("not PEFT's, for example `{}`", adapter.foreign_names[0])));
    }
    let indented: Vec<(&str, String)> =
        known.into_iter().map(|(name, value)| (name, value.replace('\n', "\n                "))).collect();
    ui.line(facts(&indented))?;
    if !changes.is_empty() {
        ui.line("")?;
        ui.line(by_kind(&changes))?;
    }
    Ok(())
}

/// One line a kind of module: the mean over layers, and the layer that moves most.
fn by_kind(changes: &[ModuleChange]) -> String {
    let mut kinds: BTreeMap<&str, Vec<&ModuleChange>> = BTreeMap::new();
    for change in changes {
        kinds.entry(change.module.rsplit('.').next().unwrap_or_default()).or_default().push(change);
    }
    let row = |(kind, changes): (&&str, &Vec<&ModuleChange>)| {
        let mean = |of: fn(&ModuleChange) -> f64| {
            number(changes.iter().map(|change| of(change)).sum::<f64>() / changes.len() as f64)
        };
        let first = changes[0];
        let most = changes.iter().max_by(|a, b| a.change_norm.total_cmp(&b.change_norm)).unwrap_or(&first);
        vec![
            (*kind).to_owned(),
            changes.len().to_string(),
            format!("{} x {}", first.shape[0], first.shape[1]),
            first.rank.to_string(),
            number(first.scale),
            mean(|change| change.a_norm),
            mean(|change| change.b_norm),
            mean(|change| change.change_norm),
            format!("{} ({})", layer(&most.module), number(most.change_norm)),
        ]
    };
    let rows: Vec<Vec<String>> = kinds.iter().map(row).collect();
    let header = ["module", "layers", "shape", "rank", "scale", "|A|", "|B|", "|change|", "most in layer"];
    format::table(&header, &rows)
}

/// The number of a module's layer, or the module itself.
fn layer(module: &str) -> &str {
    module.split('.').find(|part| part.parse::<u64>().is_ok()).unwrap_or(module)
}

fn as_json(adapter: &StoredAdapter, changes: &[ModuleChange]) -> Value {
    let changes: Vec<Value> = changes
        .iter()
        .map(|change| {
            json!({
                "module": change.module, "shape": change.shape, "rank": change.rank, "scale": change.scale,
                "a_norm": change.a_norm, "b_norm": change.b_norm, "change_norm": change.change_norm,
            })
        })
        .collect();
    let tensors: Vec<Value> = adapter
        .tensors
        .iter()
        .map(|(key, tensor)| {
            json!({ "name": key.peft(), "shape": tensor.shape, "dtype": format!("{:?}", tensor.dtype) })
        })
        .collect();
    json!({
        "adapter": adapter.folder, "method": adapter.method(), "settings": adapter.config,
        "base_hash": adapter.base_hash, "parameters": adapter.parameters(), "tensors": tensors,
        "modules": changes, "foreign_names": adapter.foreign_names,
    })
}
