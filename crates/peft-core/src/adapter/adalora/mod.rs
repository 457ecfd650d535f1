//! AdaLoRA: an update in the form of a singular value decomposition whose rank is pruned while it is trained
//! (Zhang et al., arXiv 2303.10512), as PEFT computes it.
//!
//! `y += s (E (drop(x) Aᵀ)) Bᵀ` with A `[r, in]`, E `[r, 1]`, B `[out, r]`, `s = alpha / (init_r + 1e-5)`: pruning does not
//! change s. With `p = drop(x) Aᵀ`, kept, and `q = E p`:
//! `dB += s dyᵀ q`, `dq = s dy B`, `dE += sum over tokens of dq p`, `dp = E dq`, `dA += dpᵀ drop(x)`, `dx += mask (dp A)`.
//!
//! [`allocate`] holds what happens once a step with the reduced gradient: the orthogonality term, the importance of every
//! triplet, and the budget.

pub mod allocate;

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{
    branch::{BranchScratch, LinearBranch, LinearSite},
    config::{self, Keys},
    layout::{ParameterEntry, ParameterLayout},
    lora::config::{UNSUPPORTED, WITHOUT_EFFECT, default_targets, write_common},
    method::{Method, MethodOn, Needs, SavedTensor, SharedMethod, Start, StepHook, Tensor},
    registry::Registration,
    select::Selection,
    targets::Matched,
};
use crate::{
    backend::{Backend, Product, View, ViewMut},
    error::{Error, Result},
    model::{ModelConfig, Module, ModuleKind},
};

/// What follows the module in the names of its tensors.
const A: &str = "lora_A";
const B: &str = "lora_B";
const E: &str = "lora_E";

/// Settings of AdaLoRA, under PEFT's names.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaLoraConfig {
    /// The base that it was trained on: a folder or a hub id.
    pub base_model_name_or_path: Option<String>,
    /// Average rank that is left in the end.
    pub target_r: usize,
    /// Rank of each update at first.
    pub init_r: usize,
    /// Steps before pruning begins.
    pub tinit: u64,
    /// Steps after pruning has ended.
    pub tfinal: u64,
    /// Steps between two prunings.
    pub delta_t: u64,
    /// Smoothing of the importance.
    pub beta1: f64,
    /// Smoothing of its uncertainty.
    pub beta2: f64,
    /// Weight of the term that keeps A and B orthogonal.
    pub orth_reg_weight: f64,
    /// Steps of the job; must be known before training.
    pub total_step: u64,
    /// The update is scaled by `lora_alpha / init_r`.
    pub lora_alpha: f64,
    /// Share of the adapter's inputs set to zero while training.
    pub lora_dropout: f32,
    /// Which modules.
    pub selection: Selection,
    /// Which triplets are left of each module, by `module.lora_E`, once they were pruned and cut.
    pub rank_pattern: Option<Vec<(String, Vec<bool>)>>,
}

impl Default for AdaLoraConfig {
    /// PEFT's defaults; `total_step` must be set.
    fn default() -> Self {
        Self {
            base_model_name_or_path: None,
            target_r: 8,
            init_r: 12,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: 0,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            selection: Selection::of(default_targets()),
            rank_pattern: None,
        }
    }
}

impl AdaLoraConfig {
    /// How files know it.
    pub const REGISTRATION: Registration =
        Registration { peft_type: "ADALORA", read: |keys| Ok(Arc::new(Self::read(keys)?)) };

    /// Shared, as engines take it.
    pub fn shared(self) -> SharedMethod {
        Arc::new(self)
    }

    fn read(keys: &Keys<'_>) -> Result<Self> {
        keys.ignore(WITHOUT_EFFECT);
        keys.ignore(&["r", "alpha_pattern", "init_lora_weights", "use_rslora"]);
        keys.refuse(UNSUPPORTED)?;
        keys.refuse(&["use_dora", "lora_bias", "trainable_token_indices"])?;
        if let Some(bias) = keys.value("bias").filter(|bias| *bias != "none") {
            return Err(keys.unsupported("bias", bias));
        }
        let default = Self::default();
        let steps = |key: &str, default: u64| -> Result<u64> {
            Ok(keys.whole(key)?.map_or(default, |steps| steps as u64))
        };
        let pattern = keys.get("rank_pattern", "a map of names to lists of flags", |value| {
            let flags =
                |value: &Value| value.as_array()?.iter().map(Value::as_bool).collect::<Option<Vec<_>>>();
            let map = value.as_object()?;
            map.iter().map(|(name, value)| Some((name.clone(), flags(value)?))).collect::<Option<Vec<_>>>()
        })?;
        let config = Self {
            base_model_name_or_path: keys.text("base_model_name_or_path")?.map(str::to_owned),
            target_r: keys.whole("target_r")?.unwrap_or(default.target_r),
            init_r: keys.whole("init_r")?.unwrap_or(default.init_r),
            tinit: steps("tinit", default.tinit)?,
            tfinal: steps("tfinal", default.tfinal)?,
            delta_t: steps("deltaT", default.delta_t)?,
            beta1: keys.number("beta1")?.unwrap_or(default.beta1),
            beta2: keys.number("beta2")?.unwrap_or(default.beta2),
            orth_reg_weight: keys.number("orth_reg_weight")?.unwrap_or(default.orth_reg_weight),
            total_step: steps("total_step", 0)?,
            lora_alpha: keys.number("lora_alpha")?.unwrap_or(default.lora_alpha),
            lora_dropout: keys.number("lora_dropout")?.map_or(default.lora_dropout, |p| p as f32),
            selection: Selection::read(keys, default_targets())?,
            rank_pattern: pattern.filter(|pattern| !pattern.is_empty()),
        };
        config.check()?;
        Ok(config)
    }

    /// s.
    fn scale(&self) -> f32 {
        let alpha = if self.lora_alpha > 0.0 { self.lora_alpha } else { self.init_r as f64 };
        (alpha / (self.init_r as f64 + 1e-5)) as f32
    }

    /// Triplets of a module: all at first, those that a cut file kept.
    fn rank(&self, module: &str) -> usize {
        let name = format!("{module}.{E}");
        let kept =
            self.rank_pattern.as_ref().and_then(|pattern| pattern.iter().find(|(own, _)| *own == name));
        kept.map_or(self.init_r, |(_, kept)| kept.iter().filter(|kept| **kept).count())
    }
}

impl Method for AdaLoraConfig {
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
        for (key, r) in [("init_r", self.init_r), ("target_r", self.target_r)] {
            if !(1..=super::lora::config::LARGEST_RANK).contains(&r) {
                return wrong(key, format!("is {r}, not from 1 to {}", super::lora::config::LARGEST_RANK));
            }
        }
        if self.target_r > self.init_r {
            return wrong("target_r", format!("is {}, more than init_r ({})", self.target_r, self.init_r));
        }
        for (key, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return wrong(key, format!("is {beta}, not between 0 and 1"));
            }
        }
        if !(self.orth_reg_weight >= 0.0 && self.orth_reg_weight.is_finite()) {
            return wrong("orth_reg_weight", format!("is {}, below 0", self.orth_reg_weight));
        }
        if !self.lora_alpha.is_finite() {
            return wrong("lora_alpha", format!("is {}", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong("lora_dropout", format!("is {}, not from 0 to below 1", self.lora_dropout));
        }
        if self.delta_t == 0 {
            return wrong("deltaT", "is 0".to_owned());
        }
        if self.total_step == 0 {
            return wrong("total_step", "is not known; AdaLoRA plans its budget over all steps".to_owned());
        }
        if self.tinit + self.tfinal >= self.total_step {
            let problem =
                format!("leaves no step to prune in: tinit {} and tfinal {}", self.tinit, self.tfinal);
            return wrong("total_step", format!("is {}, which {problem}", self.total_step));
        }
        self.selection.check()
    }

    fn targets(&self, model: &ModelConfig) -> Result<Matched> {
        self.selection.find(model, &[ModuleKind::Linear])
    }

    /// A and B normal with deviation 0.02, E zero, as PEFT has it.
    fn tensors(&self, module: &Module) -> Vec<Tensor> {
        let ([out, input], r) = (module.shape, self.rank(&module.path));
        let normal = Start::Normal { deviation: 0.02 };
        vec![
            Tensor::new(A, [r, input]).start(normal),
            Tensor::new(B, [out, r]).start(normal),
            Tensor::new(E, [r, 1]),
        ]
    }

    fn other_tensors(&self, model: &ModelConfig) -> Result<Vec<(Module, Vec<Tensor>)>> {
        self.selection.saved(model)
    }

    fn needs(&self, module: &Module) -> Needs {
        let r = self.rank(&module.path);
        let wide = if self.lora_dropout > 0.0 { module.shape[1] } else { 0 };
        Needs { kept: r, wide, narrow: r, output: r, ..Needs::default() }
    }

    fn dropout(&self) -> f32 {
        self.lora_dropout
    }

    fn settings(&self, layout: &ParameterLayout, state: &[f32]) -> Map<String, Value> {
        let mut map = Map::new();
        write_common(&mut map);
        self.selection.write(layout, &mut map);
        let pattern = match allocate::pattern(layout, state) {
            Some(pattern) => Some(pattern),
            None => self.rank_pattern.clone(),
        };
        let pattern = pattern.map(|pattern| {
            Value::Object(pattern.into_iter().map(|(name, kept)| (name, json!(kept))).collect())
        });
        for (key, value) in [
            ("alpha_pattern", json!({})),
            ("beta1", json!(self.beta1)),
            ("beta2", json!(self.beta2)),
            ("bias", json!("none")),
            ("deltaT", json!(self.delta_t)),
            ("init_lora_weights", json!(true)),
            ("init_r", json!(self.init_r)),
            ("lora_alpha", config::whole_or_not(self.lora_alpha)),
            ("lora_bias", json!(false)),
            ("lora_dropout", config::shortest(self.lora_dropout)),
            ("orth_reg_weight", json!(self.orth_reg_weight)),
            ("r", json!(8)),
            ("rank_pattern", json!(pattern)),
            ("target_r", json!(self.target_r)),
            ("tfinal", json!(self.tfinal)),
            ("tinit", json!(self.tinit)),
            ("total_step", json!(self.total_step)),
            ("trainable_token_indices", Value::Null),
            ("use_dora", json!(false)),
            ("use_rslora", json!(false)),
        ] {
            map.insert(key.to_owned(), value);
        }
        map
    }

    fn state(&self, layout: &ParameterLayout) -> Vec<f32> {
        vec![0.0; allocate::state_length(layout)]
    }

    fn has_step_hooks(&self) -> bool {
        true
    }

    fn regularise(&self, step: &StepHook<'_>, parameters: &[f32], gradient: &mut [f32]) {
        allocate::add_orthogonality(self.orth_reg_weight, step, parameters, gradient);
    }

    fn after_step(&self, step: &StepHook<'_>, parameters: &mut [f32], gradient: &[f32], state: &mut [f32]) {
        allocate::after_step(self, step, parameters, gradient, state);
    }

    fn saved(&self, layout: &ParameterLayout, parameters: &[f32], state: &[f32]) -> Result<Vec<SavedTensor>> {
        Ok(allocate::cut(layout, parameters, state))
    }
}

impl<Back: Backend> MethodOn<Back> for AdaLoraConfig {
    fn linear(&self, module: &Module, tensors: &[ParameterEntry]) -> Option<Box<dyn LinearBranch<Back>>> {
        let [a, b, e] = tensors else { return None };
        if a.rows() == 0 {
            return None;
        }
        Some(Box::new(Svd {
            a: a.range.start,
            b: b.range.start,
            e: e.range.start,
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
pub struct Svd {
    a: usize,
    b: usize,
    e: usize,
    rank: usize,
    input: usize,
    output: usize,
    scale: f32,
    module: u32,
}

impl Svd {
    fn project<Back: Backend>(
        &self,
        site: &LinearSite<'_, Back>,
        x: View<'_, Back>,
        kept: &mut Back::Buffer,
        scratch: &mut BranchScratch<Back>,
    ) {
        let x = site.dropped(self.module, x, &mut scratch.wide);
        let a = View::<Back>::at(site.parameters, self.a, self.rank, self.input);
        site.backend.gemm(1.0, x, false, a, true, 0.0, ViewMut::<Back>::new(kept, x.rows, self.rank));
    }

    /// `q = E p` into `narrow`.
    fn weigh<Back: Backend>(
        &self,
        site: &LinearSite<'_, Back>,
        tokens: usize,
        kept: &Back::Buffer,
        narrow: &mut Back::Buffer,
    ) {
        let e = View::<Back>::at(site.parameters, self.e, 1, self.rank);
        let p = View::<Back>::new(kept, tokens, self.rank);
        site.backend.scale_columns(1.0, p, e, 0.0, ViewMut::<Back>::new(narrow, tokens, self.rank));
    }
}

impl<Back: Backend> LinearBranch<Back> for Svd {
    fn forward(
        &self,
        site: &LinearSite<'_, Back>,
        x: View<'_, Back>,
        accumulate: bool,
        mut y: ViewMut<'_, Back>,
        kept: &mut Back::Buffer,
        scratch: &mut BranchScratch<Back>,
    ) {
        self.project(site, x, kept, scratch);
        self.weigh(site, x.rows, kept, &mut scratch.narrow);
        let branch = Product {
            alpha: self.scale,
            a: View::<Back>::new(&scratch.narrow, x.rows, self.rank),
            transpose_a: false,
            b: View::<Back>::at(site.parameters, self.b, self.output, self.rank),
            transpose_b: true,
        };
        let beta = if accumulate { 1.0 } else { 0.0 };
        site.backend.gemm_pair(site.product(x), branch, beta, y.reborrow());
        site.add_bias(y);
    }

    fn keep_again(
        &self,
        site: &LinearSite<'_, Back>,
        x: View<'_, Back>,
        kept: &mut Back::Buffer,
        scratch: &mut BranchScratch<Back>,
    ) {
        self.project(site, x, kept, scratch);
    }

    fn backward(
        &self,
        site: &LinearSite<'_, Back>,
        x: View<'_, Back>,
        kept: &Back::Buffer,
        dy: View<'_, Back>,
        accumulate: bool,
        dx: Option<ViewMut<'_, Back>>,
        gradient: &mut Back::Buffer,
        scratch: &mut BranchScratch<Back>,
    ) {
        let (backend, tokens, r) = (site.backend, x.rows, self.rank);
        let of = |at, rows, columns| View::<Back>::at(site.parameters, at, rows, columns);
        let (b, e) = (of(self.b, self.output, r), of(self.e, 1, r));
        self.weigh(site, tokens, kept, &mut scratch.narrow);
        let q = View::<Back>::new(&scratch.narrow, tokens, r);
        let db = ViewMut::<Back>::at(&mut *gradient, self.b, self.output, r);
        backend.gemm(self.scale, dy, true, q, false, 1.0, db);
        let dq = ViewMut::<Back>::new(&mut *scratch.narrow, tokens, r);
        backend.gemm(self.scale, dy, false, b, false, 0.0, dq);
        let dq = View::<Back>::new(&scratch.narrow, tokens, r);
        let p = View::<Back>::new(kept, tokens, r);
        backend.column_dot(dq, p, ViewMut::<Back>::at(&mut *gradient, self.e, 1, r));
        backend.scale_columns(1.0, dq, e, 0.0, ViewMut::<Back>::new(&mut *scratch.output, tokens, r));
        let dp = View::<Back>::new(&*scratch.output, tokens, r);
        let dropped = site.dropped(self.module, x, &mut *scratch.wide);
        let da = ViewMut::<Back>::at(gradient, self.a, r, self.input);
        backend.gemm(1.0, dp, true, dropped, false, 1.0, da);
        if let Some(dx) = dx {
            self.widen(site, dy, accumulate, dx, scratch);
        }
    }

    fn input_gradient(
        &self,
        site: &LinearSite<'_, Back>,
        dy: View<'_, Back>,
        accumulate: bool,
        dx: ViewMut<'_, Back>,
        scratch: &mut BranchScratch<Back>,
    ) {
        let (backend, tokens, r) = (site.backend, dy.rows, self.rank);
        let of = |at, rows, columns| View::<Back>::at(site.parameters, at, rows, columns);
        let dq = ViewMut::<Back>::new(&mut *scratch.narrow, tokens, r);
        backend.gemm(self.scale, dy, false, of(self.b, self.output, r), false, 0.0, dq);
        let dq = View::<Back>::new(&scratch.narrow, tokens, r);
        let dp = ViewMut::<Back>::new(&mut *scratch.output, tokens, r);
        backend.scale_columns(1.0, dq, of(self.e, 1, r), 0.0, dp);
        self.widen(site, dy, accumulate, dx, scratch);
    }
}

impl Svd {
    /// `dx = dy W + mask (dp A)`, or `dx += …`, with dp in `scratch.output`.
    fn widen<Back: Backend>(
        &self,
        site: &LinearSite<'_, Back>,
        dy: View<'_, Back>,
        accumulate: bool,
        mut dx: ViewMut<'_, Back>,
        scratch: &mut BranchScratch<Back>,
    ) {
        let (backend, tokens) = (site.backend, dy.rows);
        let a = View::<Back>::at(site.parameters, self.a, self.rank, self.input);
        let dp = View::<Back>::new(&*scratch.output, tokens, self.rank);
        let beta = if accumulate { 1.0 } else { 0.0 };
        let Some(dropout) = site.dropout else {
            let branch = Product { alpha: 1.0, a: dp, transpose_a: false, b: a, transpose_b: false };
            return backend.gemm_pair(site.product_backward(dy), branch, beta, dx);
        };
        site.multiply_backward(dy, beta, dx.reborrow());
        let wide = ViewMut::<Back>::new(&mut *scratch.wide, tokens, self.input);
        backend.gemm(1.0, dp, false, a, false, 0.0, wide);
        let wide = View::<Back>::new(&*scratch.wide, tokens, self.input);
        backend.dropout_backward(site.batch, dropout.key(self.module), dropout.p, wide, dx);
    }
}
