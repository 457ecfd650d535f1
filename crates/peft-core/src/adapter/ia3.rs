//! IA3: trained scales of activations (Liu et al., arXiv 2205.05638), as PEFT computes it.
//!
//! A module of attention scales its output, bias included: `y = l (x Wᵀ + b)` with l `[out, 1]`. One of the feed-forward
//! half scales its input: `y = (l x) Wᵀ + b` with l `[1, in]`.
//!
//! Output: with `z = x Wᵀ + b` kept, `dl = sum over tokens of dy z`, `dx = (l dy) W`.
//! Input: with `dv = dy W`, `dl = sum over tokens of dv x`, `dx = l dv`.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{
    branch::{BranchScratch, LinearBranch, LinearSite},
    config::Keys,
    layout::{ParameterEntry, ParameterLayout},
    method::{Method, MethodOn, Needs, SharedMethod, Start, Tensor},
    registry::Registration,
    select::Selection,
    targets::{Matched, TargetModules},
};
use crate::{
    backend::{Backend, View, ViewMut},
    error::{Error, Result},
    model::{ModelConfig, Module, ModuleKind},
};

/// Settings of IA3, under PEFT's names.
#[derive(Debug, Clone, PartialEq)]
pub struct Ia3Config {
    /// The base that it was trained on: a folder or a hub id.
    pub base_model_name_or_path: Option<String>,
    /// Which modules are adapted; PEFT's choice for the family where none is given.
    pub target_modules: Option<TargetModules>,
    /// Which of them scale their input.
    pub feedforward_modules: Option<TargetModules>,
    /// Which are not adapted, although `target_modules` names them.
    pub exclude_modules: Option<TargetModules>,
    /// Modules that are trained whole.
    pub modules_to_save: Vec<String>,
    /// Whether scales begin at 1; normal around 0 otherwise, for tests.
    pub init_ia3_weights: bool,
}

impl Default for Ia3Config {
    fn default() -> Self {
        Self {
            base_model_name_or_path: None,
            target_modules: None,
            feedforward_modules: None,
            exclude_modules: None,
            modules_to_save: Vec::new(),
            init_ia3_weights: true,
        }
    }
}

/// PEFT 0.21.2's choice: `k_proj, v_proj, down_proj` for Llama and Mistral, `q_proj, v_proj, down_proj` for others.
fn family_targets(model: &ModelConfig) -> TargetModules {
    let first = if matches!(model.family, "llama" | "mistral") { "k_proj" } else { "q_proj" };
    TargetModules::Names([first, "v_proj", "down_proj"].map(str::to_owned).to_vec())
}

fn family_feedforward() -> TargetModules {
    TargetModules::Names(vec!["down_proj".to_owned()])
}

impl Ia3Config {
    /// How files know it.
    pub const REGISTRATION: Registration =
        Registration { peft_type: "IA3", read: |keys| Ok(Arc::new(Self::read(keys)?)) };

    /// Shared, as engines take it.
    pub fn shared(self) -> SharedMethod {
        Arc::new(self)
    }

    fn read(keys: &Keys<'_>) -> Result<Self> {
        keys.refuse(&["fan_in_fan_out"])?;
        let config = Self {
            base_model_name_or_path: keys.text("base_model_name_or_path")?.map(str::to_owned),
            target_modules: keys.modules("target_modules")?,
            feedforward_modules: keys.modules("feedforward_modules")?,
            exclude_modules: keys.modules("exclude_modules")?,
            modules_to_save: keys.texts("modules_to_save")?.unwrap_or_default(),
            init_ia3_weights: keys.flag("init_ia3_weights")?.unwrap_or(true),
        };
        config.check()?;
        Ok(config)
    }

    fn selection(&self, model: &ModelConfig) -> Selection {
        Selection {
            exclude_modules: self.exclude_modules.clone(),
            modules_to_save: self.modules_to_save.clone(),
            ..Selection::of(self.target_modules.clone().unwrap_or_else(|| family_targets(model)))
        }
    }

    /// Whether a module scales its input.
    fn scales_input(&self, module: &Module) -> bool {
        let feedforward = self.feedforward_modules.clone().unwrap_or_else(family_feedforward);
        feedforward.matching(std::slice::from_ref(module)).is_ok_and(|matches| !matches.is_empty())
    }
}

impl Method for Ia3Config {
    fn peft_type(&self) -> &'static str {
        Self::REGISTRATION.peft_type
    }

    fn base_model(&self) -> Option<&str> {
        self.base_model_name_or_path.as_deref()
    }

    fn check(&self) -> Result<()> {
        // PEFT: what is fed forward must be adapted at all.
        if let (Some(TargetModules::Names(targets)), Some(TargetModules::Names(feedforward))) =
            (&self.target_modules, &self.feedforward_modules)
        {
            let covered = |name: &&String| {
                let ends = |target: &String| *target == **name || target.ends_with(&format!(".{name}"));
                targets.iter().any(ends)
            };
            if let Some(name) = feedforward.iter().find(|name| !covered(name)) {
                let problem = format!("names `{name}`, which `target_modules` does not");
                return Err(Error::AdapterSetting {
                    file: None,
                    key: "feedforward_modules".to_owned(),
                    problem,
                });
            }
        }
        Ok(())
    }

    fn targets(&self, model: &ModelConfig) -> Result<Matched> {
        self.selection(model).find(model, &[ModuleKind::Linear])
    }

    fn tensors(&self, module: &Module) -> Vec<Tensor> {
        let [out, input] = module.shape;
        let shape = if self.scales_input(module) { [1, input] } else { [out, 1] };
        let start =
            if self.init_ia3_weights { Start::Constant(1.0) } else { Start::Normal { deviation: 1.0 } };
        vec![Tensor::new("ia3_l", shape).start(start)]
    }

    fn other_tensors(&self, model: &ModelConfig) -> Result<Vec<(Module, Vec<Tensor>)>> {
        self.selection(model).saved(model)
    }

    fn needs(&self, module: &Module) -> Needs {
        let [out, input] = module.shape;
        if self.scales_input(module) {
            Needs { wide: input, ..Needs::default() }
        } else {
            Needs { kept: out, output: out, ..Needs::default() }
        }
    }

    fn settings(&self, layout: &ParameterLayout, _state: &[f32]) -> Map<String, Value> {
        let mut map = Map::new();
        let mut selection = Selection::of(TargetModules::Names(Vec::new()));
        selection.exclude_modules = self.exclude_modules.clone();
        selection.modules_to_save = self.modules_to_save.clone();
        selection.write(layout, &mut map);
        // IA3 knows no layers of its own.
        map.remove("layers_to_transform");
        map.remove("layers_pattern");
        let adapted = layout.modules().iter().filter(|adapted| adapted.branch);
        let mut feedforward: Vec<&str> = adapted
            .filter(|adapted| self.scales_input(&adapted.module))
            .map(|adapted| adapted.module.path.as_str())
            .collect();
        feedforward.sort_unstable();
        map.insert("feedforward_modules".to_owned(), json!(feedforward));
        map.insert("fan_in_fan_out".to_owned(), json!(false));
        map.insert("init_ia3_weights".to_owned(), json!(self.init_ia3_weights));
        map
    }
}

impl<B: Backend> MethodOn<B> for Ia3Config {
    fn linear(&self, module: &Module, tensors: &[ParameterEntry]) -> Option<Box<dyn LinearBranch<B>>> {
        let [scale] = tensors else { return None };
        let (at, features) = (scale.range.start, scale.range.len());
        if self.scales_input(module) {
            Some(Box::new(InputScale { at, features }))
        } else {
            Some(Box::new(OutputScale { at, features }))
        }
    }
}

/// `y = l (x Wᵀ + b)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OutputScale {
    /// Where l begins in the flat buffers.
    pub at: usize,
    /// out.
    pub features: usize,
}

impl OutputScale {
    fn keep<B: Backend>(&self, site: &LinearSite<'_, B>, x: View<'_, B>, kept: &mut B::Buffer) {
        let mut z = ViewMut::<B>::new(kept, x.rows, self.features);
        site.multiply(x, 0.0, z.reborrow());
        site.add_bias(z);
    }
}

impl<B: Backend> LinearBranch<B> for OutputScale {
    fn forward(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        accumulate: bool,
        y: ViewMut<'_, B>,
        kept: &mut B::Buffer,
        _scratch: &mut BranchScratch<B>,
    ) {
        self.keep(site, x, kept);
        let scale = View::<B>::at(site.parameters, self.at, 1, self.features);
        let beta = if accumulate { 1.0 } else { 0.0 };
        site.backend.scale_columns(1.0, View::<B>::new(kept, x.rows, self.features), scale, beta, y);
    }

    fn keep_again(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        kept: &mut B::Buffer,
        _scratch: &mut BranchScratch<B>,
    ) {
        self.keep(site, x, kept);
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
        let z = View::<B>::new(kept, x.rows, self.features);
        site.backend.column_dot(dy, z, ViewMut::<B>::at(gradient, self.at, 1, self.features));
        if let Some(dx) = dx {
            self.input_gradient(site, dy, accumulate, dx, scratch);
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
        let scale = View::<B>::at(site.parameters, self.at, 1, self.features);
        let dz = ViewMut::<B>::new(&mut *scratch.output, dy.rows, self.features);
        site.backend.scale_columns(1.0, dy, scale, 0.0, dz);
        let beta = if accumulate { 1.0 } else { 0.0 };
        site.multiply_backward(View::<B>::new(&scratch.output, dy.rows, self.features), beta, dx);
    }
}

/// `y = (l x) Wᵀ + b`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InputScale {
    /// Where l begins in the flat buffers.
    pub at: usize,
    /// in.
    pub features: usize,
}

impl<B: Backend> LinearBranch<B> for InputScale {
    fn forward(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        accumulate: bool,
        mut y: ViewMut<'_, B>,
        _kept: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        let scale = View::<B>::at(site.parameters, self.at, 1, self.features);
        let scaled = ViewMut::<B>::new(&mut *scratch.wide, x.rows, self.features);
        site.backend.scale_columns(1.0, x, scale, 0.0, scaled);
        let beta = if accumulate { 1.0 } else { 0.0 };
        site.multiply(View::<B>::new(&scratch.wide, x.rows, self.features), beta, y.reborrow());
        site.add_bias(y);
    }

    fn backward(
        &self,
        site: &LinearSite<'_, B>,
        x: View<'_, B>,
        _kept: &B::Buffer,
        dy: View<'_, B>,
        accumulate: bool,
        dx: Option<ViewMut<'_, B>>,
        gradient: &mut B::Buffer,
        scratch: &mut BranchScratch<B>,
    ) {
        let scaled = ViewMut::<B>::new(&mut *scratch.wide, x.rows, self.features);
        site.multiply_backward(dy, 0.0, scaled);
        let dscaled = View::<B>::new(&scratch.wide, x.rows, self.features);
        site.backend.column_dot(dscaled, x, ViewMut::<B>::at(gradient, self.at, 1, self.features));
        let Some(dx) = dx else { return };
        let scale = View::<B>::at(site.parameters, self.at, 1, self.features);
        let beta = if accumulate { 1.0 } else { 0.0 };
        site.backend.scale_columns(1.0, dscaled, scale, beta, dx);
    }

    fn input_gradient(
        &self,
        site: &LinearSite<'_, B>,
        dy: View<'_, B>,
        accumulate: bool,
        dx: ViewMut<'_, B>,
        scratch: &mut BranchScratch<B>,
    ) {
        let scaled = ViewMut::<B>::new(&mut *scratch.wide, dy.rows, self.features);
        site.multiply_backward(dy, 0.0, scaled);
        let dscaled = View::<B>::new(&scratch.wide, dy.rows, self.features);
        let scale = View::<B>::at(site.parameters, self.at, 1, self.features);
        let beta = if accumulate { 1.0 } else { 0.0 };
        site.backend.scale_columns(1.0, dscaled, scale, beta, dx);
    }
}
