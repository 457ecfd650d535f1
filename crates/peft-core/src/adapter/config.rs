//! PEFT's `adapter_config.json` for LoRA.
//!
//! Reading follows PEFT's loader: only `peft_type` is needed, absent keys take PEFT's defaults, unknown keys are dropped
//! (and told). Known keys that would change the numbers in a way that there is not here are errors, never ignored.
//! Writing puts down every key that PEFT 0.21.2 writes, so that it has nothing to warn about.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{
    adapter::{
        layout::ParameterLayout,
        targets::{Matched, TargetModules},
    },
    error::{Error, Origin, Result},
    model::config::ModelConfig,
};

/// The PEFT version whose keys are written.
pub const PEFT_VERSION: &str = "0.21.2";

/// Largest rank that is taken; far above any use.
const LARGEST_RANK: usize = 1 << 16;

/// Keys without effect on the numbers of a trained adapter.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Keys that must be absent, null, false or empty.
const UNSUPPORTED: &[&str] = &[
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_ga_config",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
];

/// Settings of a LoRA adapter, under PEFT's names.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// The base that it was trained on: a folder or a hub id.
    pub base_model_name_or_path: Option<String>,
    /// Rank of the update.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
    pub lora_alpha: f64,
    /// Share of the adapter's inputs set to zero while training.
    pub lora_dropout: f32,
    /// Rank-stabilised scale.
    pub use_rslora: bool,
    /// Which modules are adapted.
    pub target_modules: TargetModules,
}

impl LoraConfig {
    /// Refuses values that cannot be.
    ///
    /// # Errors
    /// [`Error::AdapterSetting`].
    pub fn check(&self) -> Result<()> {
        let wrong = |key: &str, problem: String| {
            Err(Error::AdapterSetting { file: None, key: key.to_owned(), problem })
        };
        if !(1..=LARGEST_RANK).contains(&self.r) {
            return wrong("r", format!("is {}, not from 1 to {LARGEST_RANK}", self.r));
        }
        if !(self.lora_alpha > 0.0 && self.lora_alpha.is_finite()) {
            return wrong("lora_alpha", format!("is {}, not above 0", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong("lora_dropout", format!("is {}, not from 0 to below 1", self.lora_dropout));
        }
        Ok(())
    }

    /// What the update is multiplied by.
    pub fn scale(&self) -> f32 {
        let r = self.r as f64;
        (self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }

    /// Finds the adapted modules of a model and lays out their tensors.
    ///
    /// # Errors
    /// An impossible setting, or `target_modules` does not fit the model.
    pub fn layout(&self, model: &ModelConfig) -> Result<(ParameterLayout, Matched)> {
        self.check()?;
        let matched = self.target_modules.find(model)?;
        Ok((ParameterLayout::lora(model, &matched.targets, self.r, self.scale()), matched))
    }

    /// Reads the text of an `adapter_config.json`; `file` is named in errors.
    ///
    /// Returns the settings and the keys that were dropped, sorted.
    ///
    /// # Errors
    /// Not JSON, another method, an option that is not there, an impossible value.
    pub fn from_json(text: &[u8], file: &Path) -> Result<(Self, Vec<String>)> {
        let json: Value = serde_json::from_slice(text).map_err(|source| Error::Json {
            origin: Origin::Adapter,
            file: file.to_owned(),
            source,
        })?;
        let keys = Keys { json: json.as_object(), file };
        keys.check_method()?;
        keys.check_options()?;
        let config = Self {
            base_model_name_or_path: keys.text("base_model_name_or_path")?.map(str::to_owned),
            r: keys
                .get("r", "a whole number", Value::as_u64)?
                .map_or(8, |r| usize::try_from(r).unwrap_or(usize::MAX)),
            lora_alpha: keys.get("lora_alpha", "a number", Value::as_f64)?.unwrap_or(8.0),
            lora_dropout: keys.get("lora_dropout", "a number", Value::as_f64)?.unwrap_or(0.0) as f32,
            use_rslora: keys.get("use_rslora", "true or false", Value::as_bool)?.unwrap_or(false),
            target_modules: keys.target_modules()?,
        };
        config.check().map_err(|error| match error {
            Error::AdapterSetting { key, problem, .. } => {
                Error::AdapterSetting { file: Some(file.to_owned()), key, problem }
            }
            other => other,
        })?;
        Ok((config, keys.unknown()))
    }

    /// The text of an `adapter_config.json` as PEFT 0.21.2 writes it; `modules` are the full names of the adapted modules.
    pub fn to_json(&self, modules: &[String]) -> String {
        let mut modules = modules.to_vec();
        modules.sort();
        let mut map = Map::new();
        for key in UNSUPPORTED {
            map.insert((*key).to_owned(), neutral(key));
        }
        let base = self.base_model_name_or_path.as_deref();
        for (key, value) in [
            ("auto_mapping", Value::Null),
            ("base_model_name_or_path", json!(base)),
            ("bias", json!("none")),
            ("inference_mode", json!(true)),
            ("init_lora_weights", json!(true)),
            ("lora_alpha", whole_or_not(self.lora_alpha)),
            ("lora_dropout", shortest(self.lora_dropout)),
            ("megatron_core", json!("megatron.core")),
            ("peft_type", json!("LORA")),
            ("peft_version", json!(PEFT_VERSION)),
            ("qalora_group_size", json!(16)),
            ("r", json!(self.r)),
            ("revision", Value::Null),
            ("target_modules", json!(modules)),
            ("task_type", json!("CAUSAL_LM")),
            ("use_rslora", json!(self.use_rslora)),
        ] {
            map.insert(key.to_owned(), value);
        }
        map.sort_keys();
        // `{:#}` of a JSON value: two spaces of indent, as Python's `indent=2`.
        format!("{:#}", Value::Object(map))
    }
}

/// What PEFT writes where an option of [`UNSUPPORTED`] is not used.
fn neutral(key: &str) -> Value {
    match key {
        "alpha_pattern" | "loftq_config" | "rank_pattern" => json!({}),
        "ensure_weight_tying" | "fan_in_fan_out" | "lora_bias" | "use_dora" | "use_qalora" => json!(false),
        _ => Value::Null,
    }
}

fn is_unused(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// `8`, not `8.0`, as PEFT's users write it.
fn whole_or_not(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

/// 0.05 for the f32 nearest to it, not 0.05000000074505806.
fn shortest(value: f32) -> Value {
    json!(value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
}

/// The keys of an `adapter_config.json`.
struct Keys<'a> {
    json: Option<&'a Map<String, Value>>,
    file: &'a Path,
}

impl<'a> Keys<'a> {
    fn wrong(&self, key: &str, problem: String) -> Error {
        Error::AdapterSetting { file: Some(self.file.to_owned()), key: key.to_owned(), problem }
    }

    fn value(&self, key: &str) -> Option<&'a Value> {
        self.json?.get(key).filter(|value| !value.is_null())
    }

    fn get<T>(&self, key: &str, wanted: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.wrong(key, format!("is {value}, not {wanted}")))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key, "a text", Value::as_str)
    }

    fn check_method(&self) -> Result<()> {
        match self.text("peft_type")? {
            Some("LORA") => Ok(()),
            Some(other) => Err(Error::UnsupportedMethod {
                file: Some(self.file.to_owned()),
                found: other.to_owned(),
                known: vec!["LORA"],
            }),
            None => Err(self.wrong("peft_type", "is missing".to_owned())),
        }
    }

    fn check_options(&self) -> Result<()> {
        let unsupported = |key: &str, value: &Value| Error::UnsupportedOption {
            file: Some(self.file.to_owned()),
            key: key.to_owned(),
            value: value.to_string(),
        };
        for key in UNSUPPORTED {
            if let Some(value) = self.value(key).filter(|value| !is_unused(value)) {
                return Err(unsupported(key, value));
            }
        }
        if let Some(bias) = self.value("bias").filter(|bias| *bias != "none") {
            return Err(unsupported("bias", bias));
        }
        if let Some(task) = self.value("task_type").filter(|task| *task != "CAUSAL_LM") {
            return Err(unsupported("task_type", task));
        }
        // Others (PiSSA, OLoRA, CorDA, LoftQ …) leave a changed base behind, which the file does not hold.
        let start =
            self.value("init_lora_weights").filter(|start| !start.is_boolean() && *start != "gaussian");
        if let Some(start) = start {
            return Err(unsupported("init_lora_weights", start));
        }
        Ok(())
    }

    fn target_modules(&self) -> Result<TargetModules> {
        let targets = self.get("target_modules", "a text or a list of texts", |value| match value {
            Value::String(pattern) => Some(TargetModules::Pattern(pattern.clone())),
            Value::Array(names) => {
                let names = names.iter().map(|name| name.as_str().map(str::to_owned));
                names.collect::<Option<_>>().map(TargetModules::Names)
            }
            _ => None,
        })?;
        // PEFT's default for all families that there are.
        Ok(targets.unwrap_or_else(|| TargetModules::Names(vec!["q_proj".to_owned(), "v_proj".to_owned()])))
    }

    fn unknown(&self) -> Vec<String> {
        const READ: &[&str] = &[
            "base_model_name_or_path",
            "bias",
            "init_lora_weights",
            "lora_alpha",
            "lora_dropout",
            "peft_type",
            "r",
            "target_modules",
            "task_type",
            "use_rslora",
        ];
        let known = |key: &str| [READ, UNSUPPORTED, WITHOUT_EFFECT].iter().any(|keys| keys.contains(&key));
        let keys = self.json.into_iter().flat_map(Map::keys);
        let mut unknown: Vec<String> = keys.filter(|key| !known(key)).cloned().collect();
        unknown.sort();
        unknown
    }
}
