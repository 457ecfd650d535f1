//! Settings of LoRA under PEFT's names.

use serde_json::{Map, Value, json};

use crate::{
    adapter::{
        config::{self, Keys},
        layout::ParameterLayout,
        select::{Pattern, Selection},
        targets::TargetModules,
    },
    error::{Error, Result},
};

/// Largest rank that is taken; far above any use.
pub(in crate::adapter) const LARGEST_RANK: usize = 1 << 16;

/// Keys without effect on the numbers of a trained adapter.
pub(in crate::adapter) const WITHOUT_EFFECT: &[&str] =
    &["megatron_core", "qalora_group_size", "loftq_config"];

/// Keys that must be absent, null, false or empty.
pub(in crate::adapter) const UNSUPPORTED: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Which biases of the base are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// All that the base has.
    All,
    /// Those of adapted modules.
    LoraOnly,
}

impl Bias {
    /// PEFT's word.
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }

    /// The bias of PEFT's word.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::None, Self::All, Self::LoraOnly].into_iter().find(|bias| bias.word() == word)
    }
}

/// How A and B begin (`init_lora_weights`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoraStart {
    /// A uniform in ±1/sqrt(in), B zero: the update begins at 0.
    #[default]
    Default,
    /// A normal with deviation 1/r, B zero.
    Gaussian,
    /// Both random: the update does not begin at 0. For tests.
    Random,
    /// The r largest singular directions of the weight; the base keeps the rest (PiSSA, arXiv 2404.02948).
    Pissa,
    /// Orthonormal, from a QR decomposition of the weight; the base keeps the rest (OLoRA, arXiv 2406.01775).
    Olora,
    /// The r largest singular directions of what 4 bits lose of the weight (LoftQ, arXiv 2310.08659, one round).
    Loftq,
}

impl LoraStart {
    /// Whether the base that is trained on is another than the one on disk.
    pub fn changes_base(self) -> bool {
        matches!(self, Self::Pissa | Self::Olora)
    }
}

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
    /// Rank-stabilised scale (arXiv 2312.03732).
    pub use_rslora: bool,
    /// Weight-decomposed LoRA (DoRA, arXiv 2402.09353): magnitudes of the rows are trained besides.
    pub use_dora: bool,
    /// Which biases of the base are trained.
    pub bias: Bias,
    /// Whether B has a bias of its own.
    pub lora_bias: bool,
    /// How A and B begin.
    pub init_lora_weights: LoraStart,
    /// Which modules are adapted.
    pub target_modules: TargetModules,
    /// Which are not, although `target_modules` names them.
    pub exclude_modules: Option<TargetModules>,
    /// Only modules of these layers.
    pub layers_to_transform: Option<Vec<usize>>,
    /// What the list of layers is called.
    pub layers_pattern: Vec<String>,
    /// Ranks of some modules.
    pub rank_pattern: Pattern<usize>,
    /// `lora_alpha` of some modules.
    pub alpha_pattern: Pattern<f64>,
    /// Modules that are trained whole.
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding are trained.
    pub trainable_token_indices: Vec<u32>,
    /// B learns at so many times the rate of A (LoRA+, arXiv 2402.12354); not part of PEFT's file.
    pub loraplus_lr_ratio: Option<f64>,
    /// Peak learning rate of embedding LoRA under LoRA+; not part of PEFT's file.
    pub loraplus_lr_embedding: f64,
}

impl Default for LoraConfig {
    /// PEFT's defaults.
    fn default() -> Self {
        Self {
            base_model_name_or_path: None,
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            bias: Bias::None,
            lora_bias: false,
            init_lora_weights: LoraStart::Default,
            target_modules: default_targets(),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Pattern::default(),
            alpha_pattern: Pattern::default(),
            modules_to_save: Vec::new(),
            trainable_token_indices: Vec::new(),
            loraplus_lr_ratio: None,
            loraplus_lr_embedding: 1e-6,
        }
    }
}

/// What PEFT adapts by LoRA and AdaLoRA in all families that there are, where nothing is said.
pub(in crate::adapter) fn default_targets() -> TargetModules {
    TargetModules::Names(vec!["q_proj".to_owned(), "v_proj".to_owned()])
}

impl LoraConfig {
    /// Which modules, as all tuners have it.
    pub fn selection(&self) -> Selection {
        Selection {
            target_modules: self.target_modules.clone(),
            exclude_modules: self.exclude_modules.clone(),
            layers_to_transform: self.layers_to_transform.clone(),
            layers_pattern: self.layers_pattern.clone(),
            modules_to_save: self.modules_to_save.clone(),
        }
    }

    /// What the update is multiplied by, patterns aside.
    pub fn scale(&self) -> f32 {
        self.scale_of(self.r, self.lora_alpha)
    }

    fn scale_of(&self, r: usize, alpha: f64) -> f32 {
        let r = r as f64;
        (alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }

    /// Rank and scale of a module. Patterns were checked.
    pub(super) fn of_module(&self, module: &str) -> (usize, f32) {
        let r = self.rank_pattern.of(module).ok().flatten().unwrap_or(self.r);
        let alpha = self.alpha_pattern.of(module).ok().flatten().unwrap_or(self.lora_alpha);
        (r, self.scale_of(r, alpha))
    }

    pub(super) fn read(keys: &Keys<'_>) -> Result<Self> {
        keys.ignore(WITHOUT_EFFECT);
        keys.refuse(UNSUPPORTED)?;
        let default = Self::default();
        let selection = Selection::read(keys, default.target_modules)?;
        let config = Self {
            base_model_name_or_path: keys.text("base_model_name_or_path")?.map(str::to_owned),
            r: keys.whole("r")?.unwrap_or(default.r),
            lora_alpha: keys.number("lora_alpha")?.unwrap_or(default.lora_alpha),
            lora_dropout: keys.number("lora_dropout")?.map_or(default.lora_dropout, |p| p as f32),
            use_rslora: keys.flag("use_rslora")?.unwrap_or(default.use_rslora),
            use_dora: keys.flag("use_dora")?.unwrap_or(default.use_dora),
            bias: read_bias(keys)?,
            lora_bias: keys.flag("lora_bias")?.unwrap_or(default.lora_bias),
            init_lora_weights: read_start(keys)?,
            target_modules: selection.target_modules,
            exclude_modules: selection.exclude_modules,
            layers_to_transform: selection.layers_to_transform,
            layers_pattern: selection.layers_pattern,
            rank_pattern: Pattern::read(keys, "rank_pattern", "a map of names to whole numbers", |value| {
                value.as_u64().and_then(|rank| usize::try_from(rank).ok())
            })?,
            alpha_pattern: Pattern::read(keys, "alpha_pattern", "a map of names to numbers", Value::as_f64)?,
            modules_to_save: selection.modules_to_save,
            trainable_token_indices: read_tokens(keys)?,
            ..default_rest()
        };
        config.check_settings()?;
        Ok(config)
    }

    pub(super) fn check_settings(&self) -> Result<()> {
        let wrong = |key: &str, problem: String| {
            Err(Error::AdapterSetting { file: None, key: key.to_owned(), problem })
        };
        let ranks = self.rank_pattern.0.iter().map(|(_, r)| ("rank_pattern", *r));
        for (key, r) in std::iter::once(("r", self.r)).chain(ranks) {
            if !(1..=LARGEST_RANK).contains(&r) {
                return wrong(key, format!("is {r}, not from 1 to {LARGEST_RANK}"));
            }
        }
        let alphas = self.alpha_pattern.0.iter().map(|(_, alpha)| ("alpha_pattern", *alpha));
        for (key, alpha) in std::iter::once(("lora_alpha", self.lora_alpha)).chain(alphas) {
            if !(alpha > 0.0 && alpha.is_finite()) {
                return wrong(key, format!("is {alpha}, not above 0"));
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong("lora_dropout", format!("is {}, not from 0 to below 1", self.lora_dropout));
        }
        if self.use_dora && self.lora_bias {
            return wrong("lora_bias", "does not go together with `use_dora`".to_owned());
        }
        if let Some(ratio) = self.loraplus_lr_ratio.filter(|ratio| !(*ratio > 0.0 && ratio.is_finite())) {
            return wrong("loraplus_lr_ratio", format!("is {ratio}, not above 0"));
        }
        self.rank_pattern.check()?;
        self.alpha_pattern.check()?;
        self.selection().check()
    }

    pub(super) fn write(&self, layout: &ParameterLayout) -> Map<String, Value> {
        let mut map = Map::new();
        write_common(&mut map);
        self.selection().write(layout, &mut map);
        let ranks: Map<String, Value> =
            self.rank_pattern.0.iter().map(|(key, rank)| (key.clone(), json!(rank))).collect();
        let alphas: Map<String, Value> = self
            .alpha_pattern
            .0
            .iter()
            .map(|(key, alpha)| (key.clone(), config::whole_or_not(*alpha)))
            .collect();
        let start = match self.init_lora_weights {
            LoraStart::Random => json!(false),
            LoraStart::Gaussian => json!("gaussian"),
            // Others have no meaning for who loads the adapter: it is written for the base as it is.
            _ => json!(true),
        };
        let tokens = if self.trainable_token_indices.is_empty() {
            Value::Null
        } else {
            json!(self.trainable_token_indices)
        };
        for (key, value) in [
            ("alpha_pattern", Value::Object(alphas)),
            ("bias", json!(self.bias.word())),
            ("init_lora_weights", start),
            ("lora_alpha", config::whole_or_not(self.lora_alpha)),
            ("lora_bias", json!(self.lora_bias)),
            ("lora_dropout", config::shortest(self.lora_dropout)),
            ("r", json!(self.r)),
            ("rank_pattern", Value::Object(ranks)),
            ("trainable_token_indices", tokens),
            ("use_dora", json!(self.use_dora)),
            ("use_rslora", json!(self.use_rslora)),
        ] {
            map.insert(key.to_owned(), value);
        }
        map
    }
}

/// The keys that are not part of a file.
fn default_rest() -> LoraConfig {
    LoraConfig::default()
}

/// What PEFT writes where an option is not used.
pub(in crate::adapter) fn write_common(map: &mut Map<String, Value>) {
    for key in UNSUPPORTED {
        let neutral = match *key {
            "ensure_weight_tying" | "fan_in_fan_out" | "use_qalora" => json!(false),
            _ => Value::Null,
        };
        map.insert((*key).to_owned(), neutral);
    }
    map.insert("loftq_config".to_owned(), json!({}));
    map.insert("megatron_core".to_owned(), json!("megatron.core"));
    map.insert("qalora_group_size".to_owned(), json!(16));
}

fn read_bias(keys: &Keys<'_>) -> Result<Bias> {
    let bias = keys.get("bias", "none, all or lora_only", |value| Bias::from_word(value.as_str()?))?;
    Ok(bias.unwrap_or_default())
}

/// Others than these (PiSSA, OLoRA, CorDA …) leave a changed base behind, which a PEFT folder does not hold.
fn read_start(keys: &Keys<'_>) -> Result<LoraStart> {
    match keys.value("init_lora_weights") {
        None | Some(Value::Bool(true)) => Ok(LoraStart::Default),
        Some(Value::Bool(false)) => Ok(LoraStart::Random),
        Some(value) if *value == "gaussian" => Ok(LoraStart::Gaussian),
        // A and B are whole, and the base is the quantised one.
        Some(value) if *value == "loftq" => Ok(LoraStart::Default),
        Some(value) => Err(keys.unsupported("init_lora_weights", value)),
    }
}

fn read_tokens(keys: &Keys<'_>) -> Result<Vec<u32>> {
    let list = |value: &Value| -> Option<Vec<u32>> {
        let list = value.as_array()?;
        list.iter().map(|token| token.as_u64().and_then(|token| u32::try_from(token).ok())).collect()
    };
    let tokens =
        keys.get("trainable_token_indices", "a list of tokens of `embed_tokens`", |value| match value {
            Value::Object(map) if map.len() == 1 => map.get("embed_tokens").and_then(list),
            Value::Object(_) => None,
            other => list(other),
        })?;
    Ok(tokens.unwrap_or_default())
}
