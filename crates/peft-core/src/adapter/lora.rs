//! LoRA: what it adds to a linear layer, what it gets back, and its files.
//!
//! `y += s drop(x) Aᵀ Bᵀ` with A `[r, in]`, B `[out, r]`, s = alpha / r or alpha / sqrt(r), after Hu et al.,
//! arXiv 2106.09685, as PEFT computes it: dropout lies on the branch's input alone.
//!
//! With `p = drop(x) Aᵀ` `[T, r]`, kept from the forward pass:
//! `dB += s dyᵀ p`, `dp = s dy B`, `dA += dpᵀ drop(x)`, `dx += mask (dp A)`.
//! The mask is drawn again in the backward pass; nothing of it is kept.

use std::{path::Path, sync::Arc};

use serde_json::{Map, Value, json};

use super::{
    branch::PassDropout,
    branch::{BranchScratch, LinearBranch, LinearSite},
    config::{self, Keys},
    fit::Fit,
    layout::{ParameterEntry, ParameterLayout},
    method::{Method, MethodOn, Needs, SharedMethod, Start, Tensor},
    registry::Registration,
    targets::{Matched, TargetModules},
};
use crate::{
    backend::{Backend, LowRank, Product, View, ViewMut},
    error::{Error, Result},
    model::{ModelConfig, Module},
};

/// Largest rank that is taken; far above any use.
const LARGEST_RANK: usize = 1 << 16;

/// Keys without effect on the numbers of a trained adapter.
const WITHOUT_EFFECT: &[&str] = &["megatron_core", "qalora_group_size"];

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

impl Default for LoraConfig {
    /// PEFT's defaults.
    fn default() -> Self {
        Self {
            base_model_name_or_path: None,
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: TargetModules::Names(vec!["q_proj".to_owned(), "v_proj".to_owned()]),
        }
    }
}

impl LoraConfig {
    /// How files know it.
    pub const REGISTRATION: Registration =
        Registration { peft_type: "LORA", read: |keys| Ok(Arc::new(Self::read(keys)?)) };

    /// What the update is multiplied by.
    pub fn scale(&self) -> f32 {
        let r = self.r as f64;
        (self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }

    /// Shared, as engines take it.
    pub fn shared(self) -> SharedMethod {
        Arc::new(self)
    }

    /// Finds the adapted modules of a model and lays out their tensors.
    ///
    /// # Errors
    /// An impossible setting, or `target_modules` does not fit the model.
    pub fn fit(&self, model: &ModelConfig) -> Result<Fit> {
        Fit::new(self.clone().shared(), model)
    }

    /// Reads the text of an `adapter_config.json`; `file` is named in errors.
    ///
    /// Returns the settings and the keys that were dropped, sorted.
    ///
    /// # Errors
    /// Not JSON, another method, an option that is not there, an impossible value.
    pub fn from_json(text: &[u8], file: &Path) -> Result<(Self, Vec<String>)> {
        let json = config::parse(text, file)?;
        let keys = Keys::new(&json, file);
        let config = keys.read(Self::read)?;
        Ok((config, keys.unknown()))
    }

    fn read(keys: &Keys<'_>) -> Result<Self> {
        keys.ignore(WITHOUT_EFFECT);
        keys.refuse(UNSUPPORTED)?;
        if let Some(bias) = keys.value("bias").filter(|bias| *bias != "none") {
            return Err(keys.unsupported("bias", bias));
        }
        // Others (PiSSA, OLoRA, CorDA, LoftQ …) leave a changed base behind, which the file does not hold.
        let start =
            keys.value("init_lora_weights").filter(|start| !start.is_boolean() && *start != "gaussian");
        if let Some(start) = start {
            return Err(keys.unsupported("init_lora_weights", start));
        }
        let default = Self::default();
        let config = Self {
            base_model_name_or_path: keys.text("base_model_name_or_path")?.map(str::to_owned),
            r: keys.whole("r")?.unwrap_or(default.r),
            lora_alpha: keys.number("lora_alpha")?.unwrap_or(default.lora_alpha),
            lora_dropout: keys.number("lora_dropout")?.map_or(default.lora_dropout, |p| p as f32),
            use_rslora: keys.flag("use_rslora")?.unwrap_or(default.use_rslora),
            target_modules: keys.modules("target_modules")?.unwrap_or(default.target_modules),
        };
        config.check()?;
        Ok(config)
    }
}

impl Method for LoraConfig {
    fn peft_type(&self) -> &'static str {
        Self::REGISTRATION.peft_type
    }

    fn base_model(&self) -> Option<&str> {
        self.base_model_name_or_path.as_deref()
    }

    fn check(&self) -> Result<()> {
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

    fn targets(&self, model: &ModelConfig) -> Result<Matched> {
        self.target_modules.find(model)
    }

    /// A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5), B zero: the start that PEFT takes.
    fn tensors(&self, module: &Module) -> Vec<Tensor> {
        let [out, input] = module.shape;
        let bound = 1.0 / (input as f32).sqrt();
        vec![
            Tensor::new("lora_A.weight", [self.r, input]).start(Start::Uniform { bound }),
            Tensor::new("lora_B.weight", [out, self.r]),
        ]
    }

    fn needs(&self, module: &Module) -> Needs {
        let wide = if self.lora_dropout > 0.0 { module.shape[1] } else { 0 };
        Needs { kept: self.r, wide, narrow: self.r, ..Needs::default() }
    }

    fn dropout(&self) -> f32 {
        self.lora_dropout
    }

    fn settings(&self, layout: &ParameterLayout, _state: &[f32]) -> Map<String, Value> {
        let mut map = Map::new();
        for key in UNSUPPORTED {
            map.insert((*key).to_owned(), neutral(key));
        }
        for (key, value) in [
            ("bias", json!("none")),
            ("init_lora_weights", json!(true)),
            ("lora_alpha", config::whole_or_not(self.lora_alpha)),
            ("lora_dropout", config::shortest(self.lora_dropout)),
            ("megatron_core", json!("megatron.core")),
            ("qalora_group_size", json!(16)),
            ("r", json!(self.r)),
            ("target_modules", config::adapted_modules(layout)),
            ("use_rslora", json!(self.use_rslora)),
        ] {
            map.insert(key.to_owned(), value);
        }
        map
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

impl<B: Backend> MethodOn<B> for LoraConfig {
    fn linear(&self, module: &Module, tensors: &[ParameterEntry]) -> Option<Box<dyn LinearBranch<B>>> {
        let [a, b] = tensors else { return None };
        Some(Box::new(Lora {
            a: a.range.start,
            b: b.range.start,
            rank: a.rows(),
            input: a.columns(),
            output: b.rows(),
            scale: self.scale(),
            module: module.number(),
        }))
    }
}

/// The branch beside one linear layer: where its tensors lie, and its shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lora {
    /// Where A `[r, in]` begins in the flat buffers.
    pub a: usize,
    /// Where B `[out, r]` begins.
    pub b: usize,
    /// r.
    pub rank: usize,
    /// in.
    pub input: usize,
    /// out.
    pub output: usize,
    /// s.
    pub scale: f32,
    /// What its mask is told apart by.
    pub module: u32,
}

impl Lora {
    /// A.
    pub fn a<'b, B: Backend>(&self, parameters: &'b B::Buffer) -> View<'b, B> {
        View::at(parameters, self.a, self.rank, self.input)
    }

    /// B.
    pub fn b<'b, B: Backend>(&self, parameters: &'b B::Buffer) -> View<'b, B> {
        View::at(parameters, self.b, self.output, self.rank)
    }

    /// `drop(x) Aᵀ` into `projected` `[T, r]`.
    fn project<B: Backend>(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        wide: &mut B::Buffer,
        projected: &mut B::Buffer,
    ) {
        let x = site.dropped(self.module, x, wide);
        let projected = ViewMut::<B>::new(projected, x.rows, self.rank);
        site.backend.gemm(1.0, x, false, self.a(site.parameters), true, 0.0, projected);
    }
}

impl Lora {
    /// `dp = s dy B` `[T, r]`, into `narrow`.
    fn narrow<'b, B: Backend>(
        &self,
        site: &LinearSite<'_, B>,
        dy: View<'_, B>,
        narrow: &'b mut B::Buffer,
    ) -> View<'b, B> {
        let b = self.b::<B>(site.parameters);
        let dp = ViewMut::<B>::new(&mut *narrow, dy.rows, self.rank);
        site.backend.gemm(self.scale, dy, false, b, false, 0.0, dp);
        View::<B>::new(narrow, dy.rows, self.rank)
    }

    /// `dx = dy W + mask (dp A)`, or `dx += …`, with dp in `scratch.narrow`.
    fn widen<B: Backend>(
        &self,
        site: &LinearSite<'_, B>,
        dy: View<'_, B>,
        accumulate: bool,
        mut dx: ViewMut<'_, B>,
        scratch: &mut BranchScratch<B>,
    ) {
        let (backend, tokens) = (site.backend, dy.rows);
        let a = self.a::<B>(site.parameters);
        let dp = View::<B>::new(&*scratch.narrow, tokens, self.rank);
        let beta = if accumulate { 1.0 } else { 0.0 };
        if site.merged {
            return site.multiply_backward(dy, beta, dx);
        }
        let Some(dropout) = site.dropout else {
            let branch = Product { alpha: 1.0, a: dp, transpose_a: false, b: a, transpose_b: false };
            backend.gemm_pair(site.product_backward(dy), branch, beta, dx);
            return;
        };
        site.multiply_backward(dy, beta, dx.reborrow());
        let wide = ViewMut::<B>::new(&mut *scratch.wide, tokens, self.input);
        backend.gemm(1.0, dp, false, a, false, 0.0, wide);
        let wide = View::<B>::new(&*scratch.wide, tokens, self.input);
        backend.dropout_backward(site.batch, dropout.key(self.module), dropout.p, wide, dx);
    }
}

impl<B: Backend> LinearBranch<B> for Lora {
    fn update<'b>(&self, parameters: &'b B::Buffer, dropout: Option<PassDropout>) -> Option<LowRank<'b, B>> {
        let (a, b) = (self.a::<B>(parameters), self.b::<B>(parameters));
        dropout.is_none().then_some(LowRank { scale: self.scale, a, b })
    }

    fn forward(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        accumulate: bool,
        mut y: ViewMut<'_, B>,
        kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        self.project(site, x, &mut scratch.wide, kept);
        let beta = if accumulate { 1.0 } else { 0.0 };
        if site.merged {
            site.multiply(x, beta, y.reborrow());
            return site.add_bias(y);
        }
        let branch = Product {
            alpha: self.scale,
            a: View::<B>::new(kept, x.rows, self.rank),
            transpose_a: false,
            b: self.b(site.parameters),
            transpose_b: true,
        };
        site.backend.gemm_pair(site.product(x), branch, beta, y.reborrow());
        site.add_bias(y);
    }

    fn keep_again(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        self.project(site, x, &mut scratch.wide, kept);
    }

    fn backward(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        kept: &B::Buffer,
        dy: View<'_, B>,
        accumulate: bool,
        dx: Option<ViewMut<'_, B>>,
        gradient: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        let (backend, tokens) = (site.backend, x.rows);
        let projected = View::<B>::new(kept, tokens, self.rank);
        let db = ViewMut::<B>::at(&mut *gradient, self.b, self.output, self.rank);
        backend.gemm(self.scale, dy, true, projected, false, 1.0, db);

        let dp = self.narrow(site, dy, &mut scratch.narrow);
        let dropped = site.dropped(self.module, x, &mut *scratch.wide);
        let da = ViewMut::<B>::at(gradient, self.a, self.rank, self.input);
        backend.gemm(1.0, dp, true, dropped, false, 1.0, da);
        if let Some(dx) = dx {
            self.widen(site, dy, accumulate, dx, scratch);
        }
    }

    fn input_gradient(
        &self,
        site: &LinearSite<'_, B>,
        dy: View<'_, B>,
        accumulate: bool,
        dx: ViewMut<'_, B>,
        scratch: &mut BranchScratch<B>,
    ) {
        if !site.merged {
            self.narrow(site, dy, &mut scratch.narrow);
        }
        self.widen(site, dy, accumulate, dx, scratch);
    }
}
