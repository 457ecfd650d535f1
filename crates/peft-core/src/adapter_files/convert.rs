//! Other names for the same numbers.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::Value;

use super::{keys::Key, stored::StoredAdapter};
use crate::{error::Result, use_error::UseError};

/// How tensors are named in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyStyle {
    /// As PEFT's files: `base_model.model.MODULE.lora_A.weight`.
    Peft,
    /// Without `base_model.model.`.
    Bare,
    /// With the adapter's name, as PEFT holds it in memory: `….lora_A.NAME.weight`.
    Named(String),
}

/// Writes an adapter under names of another style, in another dtype if one is given.
///
/// # Errors
/// There is an adapter already, or the folder cannot be written.
pub fn convert_keys(
    adapter: &StoredAdapter,
    style: &KeyStyle,
    dtype: Option<Dtype>,
    out: &Path,
) -> Result<()> {
    let mut adapter = adapter.clone();
    if let Some(dtype) = dtype {
        adapter.tensors.values_mut().for_each(|tensor| tensor.dtype = dtype);
    }
    adapter.write_named(out, |key| match style {
        KeyStyle::Peft => key.peft(),
        KeyStyle::Bare => key.bare(),
        KeyStyle::Named(name) => key.named(name),
    })
}

/// Other names for modules and base.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Renaming {
    /// Parts of module names and what becomes of them: whole parts between dots, the first place in each name.
    pub modules: Vec<(String, String)>,
    /// The base that the settings name.
    pub base: Option<String>,
}

/// Renames modules in tensors and `target_modules`, and the base. Returns how many tensors changed their name.
///
/// # Errors
/// Nothing has the name, or two tensors would get one name.
pub fn rename(adapter: &mut StoredAdapter, renaming: &Renaming) -> Result<usize> {
    let mut changed = 0;
    for (from, to) in &renaming.modules {
        let file = adapter.folder.clone();
        let tensors = std::mem::take(&mut adapter.tensors);
        let before = changed;
        for (key, tensor) in tensors {
            let module = replaced(&key.module, from, to);
            changed += usize::from(module.is_some());
            let new =
                Key { module: module.unwrap_or_else(|| key.module.clone()), suffix: key.suffix.clone() };
            if adapter.tensors.insert(new.clone(), tensor).is_some() {
                let problem = format!("would become `{}`, which is there already", new.peft());
                return Err(UseError::TensorName { file, tensor: key.peft(), problem }.into());
            }
        }
        if changed == before {
            let problem = format!("does not name a module of the adapter: nothing is called `{from}`");
            let named = adapter.tensors.keys().next().map(Key::peft).unwrap_or_default();
            return Err(UseError::TensorName { file, tensor: named, problem }.into());
        }
        for key in ["target_modules", "modules_to_save", "exclude_modules"] {
            let Some(Value::Array(names)) = adapter.config.get_mut(key) else { continue };
            for name in names {
                if let Some(new) = name.as_str().and_then(|name| replaced(name, from, to)) {
                    *name = Value::from(new);
                }
            }
        }
    }
    if let Some(base) = &renaming.base {
        adapter.config.insert("base_model_name_or_path".to_owned(), Value::from(base.as_str()));
    }
    Ok(changed)
}

/// `name` with the first run of whole parts that is `from` replaced.
fn replaced(name: &str, from: &str, to: &str) -> Option<String> {
    let (parts, from): (Vec<&str>, Vec<&str>) = (name.split('.').collect(), from.split('.').collect());
    let at = parts.windows(from.len()).position(|window| window == from)?;
    let to = to.split('.').filter(|part| !part.is_empty());
    let renamed = parts[..at].iter().copied().chain(to).chain(parts[at + from.len()..].iter().copied());
    Some(renamed.collect::<Vec<_>>().join("."))
}

#[cfg(test)]
mod tests {
    use super::replaced;

    #[test]
    fn whole_parts_are_replaced() {
        let name = "model.language_model.layers.1.self_attn.q_proj";
        let new = |from, to| replaced(name, from, to);
        assert_eq!(new("model.language_model", "model").as_deref(), Some("model.layers.1.self_attn.q_proj"));
        assert_eq!(new("language_model", "").as_deref(), Some("model.layers.1.self_attn.q_proj"));
        assert_eq!(new("q_proj", "query").as_deref(), Some("model.language_model.layers.1.self_attn.query"));
        assert_eq!(
            new("layers.1", "layers.2").as_deref(),
            Some("model.language_model.layers.2.self_attn.q_proj")
        );
        for none in ["proj", "layer", "layers.11", "q_proj.x"] {
            assert_eq!(new(none, "x"), None, "{none}");
        }
    }
}
