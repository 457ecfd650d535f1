//! What a method of adaptation is: [`Method`] and [`MethodOn`].
//!
//! A method is one type in one file. [`Method`] says what does not depend on where it computes: which modules it adapts,
//! which tensors each of them gets (names as PEFT writes them, shapes, start, learning rate), what memory a pass needs for
//! them, and its `adapter_config.json`. [`MethodOn`] gives, for a backend, the [`LinearBranch`] or [`EmbeddingBranch`]
//! that stands beside a module in forward and backward. Everything else (flat buffers, files, checkpoints, reduction,
//! the optimizer) follows from these.
//!
//! A method of this crate is made known to files by one line in [`super::registry`]; a method of another crate
//! by handing its [`super::Registration`] to [`super::AdapterFolder::open_with`].

use std::{fmt::Debug, sync::Arc};

use serde_json::{Map, Value};

use super::{
    branch::{EmbeddingBranch, LinearBranch},
    layout::{ParameterEntry, ParameterLayout},
    targets::Matched,
};
use crate::{
    backend::{Backend, cpu::Cpu, cuda::Cuda},
    batch::VirtualTokens,
    engine::StepKey,
    error::Result,
    model::{ModelConfig, Module},
};

/// How a tensor begins. Every start depends on the job's seed and the tensor's name alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Start {
    /// The same number everywhere.
    Constant(f32),
    /// Even between `-bound` and `bound`.
    Uniform {
        /// The bound.
        bound: f32,
    },
    /// Normal around 0.
    Normal {
        /// The standard deviation.
        deviation: f32,
    },
    /// As the tensor of the base that it stands for.
    Base,
    /// By [`Method::start`].
    Computed,
}

/// The learning rate of a tensor, beside the schedule.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Rate {
    /// The job's.
    #[default]
    Job,
    /// The job's, times a factor (LoRA+).
    Times(f64),
    /// A peak of its own; the schedule shapes it as it shapes the job's.
    Peak(f64),
    /// Not trained: its numbers stay, weight decay included. It gets no gradient.
    Frozen,
}

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// The method's own; [`MethodOn`] knows what it does.
    #[default]
    Branch,
    /// It takes the place of the module's weight (`modules_to_save`).
    Weight,
    /// It takes the place of the module's bias (`bias`, `modules_to_save`).
    Bias,
    /// It takes the place of the embedding's rows of [`Method::trained_tokens`]; of the head's, too, where they are one.
    Rows,
}

/// A tensor that a method adds to a module.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// What follows the module's name in PEFT's files, for example `lora_A.weight`.
    pub suffix: String,
    /// One or two lengths.
    pub shape: Vec<usize>,
    /// How it begins.
    pub start: Start,
    /// How fast it learns.
    pub rate: Rate,
    /// What it is to its module.
    pub role: Role,
    /// What the numbers in memory are more than those in files.
    pub shift: f32,
}

/// A tensor as a file holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedTensor {
    /// Name in PEFT's files.
    pub name: String,
    /// One or two lengths.
    pub shape: Vec<usize>,
    /// Row after row.
    pub values: Vec<f32>,
}

impl Tensor {
    /// A trained tensor of zeros.
    pub fn new(suffix: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            suffix: suffix.into(),
            shape: shape.into(),
            start: Start::Constant(0.0),
            rate: Rate::Job,
            role: Role::Branch,
            shift: 0.0,
        }
    }

    /// Begins otherwise.
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Learns at another rate.
    #[must_use]
    pub fn rate(mut self, rate: Rate) -> Self {
        self.rate = rate;
        self
    }

    /// Takes the place of a tensor of the base.
    #[must_use]
    pub fn role(mut self, role: Role) -> Self {
        self.role = role;
        self
    }
}

/// Memory that a branch needs, in numbers. What is kept is kept for each module; what is worked in is shared by all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// For each token, from forward to backward.
    pub kept: usize,
    /// For each token, in [`super::branch::BranchScratch::wide`]; the columns of what dropout is applied to come here.
    pub wide: usize,
    /// For each token, in [`super::branch::BranchScratch::narrow`].
    pub narrow: usize,
    /// For each token, in [`super::branch::BranchScratch::output`].
    pub output: usize,
    /// Whatever the number of tokens, in each of [`super::branch::BranchScratch::fixed`].
    pub fixed: [usize; 4],
}

impl Needs {
    /// Enough for either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            kept: self.kept.max(other.kept),
            wide: self.wide.max(other.wide),
            narrow: self.narrow.max(other.narrow),
            output: self.output.max(other.output),
            fixed: std::array::from_fn(|at| self.fixed[at].max(other.fixed[at])),
        }
    }
}

/// A step, as the hooks of a method see it. All buffers are of the layout that is trained.
#[derive(Debug)]
pub struct StepHook<'a> {
    /// Where each tensor lies.
    pub layout: &'a ParameterLayout,
    /// The step, from 1.
    pub step: u64,
    /// Steps of the job.
    pub total_steps: u64,
    /// The gradient of the mean loss is the reduced gradient times this; clipping included once it is known.
    pub scale: f64,
}

/// What a start computes for a module.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PreparedModule {
    /// Suffix, shape and numbers of tensors.
    pub tensors: Vec<(&'static str, Vec<usize>, Vec<f32>)>,
    /// The weight that stands for the base's from now on.
    pub residual: Option<Vec<f32>>,
}

/// A module whose tensors are to begin, as [`Method::start`] sees it.
pub struct ModuleStart<'a> {
    /// The module.
    pub module: &'a Module,
    /// Its tensors.
    pub tensors: &'a [ParameterEntry],
    /// The base's weight, row after row; dequantised where it is kept in 4 bits.
    pub weight: &'a [f32],
    /// The flat parameters.
    pub parameters: &'a mut [f32],
}

impl ModuleStart<'_> {
    /// The place of a tensor in the flat parameters, by its suffix.
    pub fn range(&self, suffix: &str) -> Option<std::ops::Range<usize>> {
        self.tensors.iter().find(|entry| entry.suffix == suffix).map(|entry| entry.range.clone())
    }
}

/// A method of adaptation, without what depends on where it computes.
///
/// Only [`Method::peft_type`], [`Method::targets`] and [`Method::tensors`] must be written; the rest has an answer that fits
/// a method that is the same at every step.
pub trait Method: Debug + Send + Sync {
    /// PEFT's name, for example `LORA`.
    fn peft_type(&self) -> &'static str;

    /// The base that it was trained on, a folder or a hub id, where that is known.
    fn base_model(&self) -> Option<&str> {
        None
    }

    /// Refuses settings that cannot be.
    ///
    /// # Errors
    /// [`crate::Error::AdapterSetting`].
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The modules that get tensors of their own.
    ///
    /// # Errors
    /// Where the settings do not fit the model.
    fn targets(&self, model: &ModelConfig) -> Result<Matched>;

    /// The tensors of an adapted module. Order them as the backward pass fills their gradients.
    fn tensors(&self, module: &Module) -> Vec<Tensor>;

    /// Tensors of other modules, such as biases and whole modules that are trained (`modules_to_save`).
    ///
    /// # Errors
    /// Where the settings do not fit the model.
    fn other_tensors(&self, _model: &ModelConfig) -> Result<Vec<(Module, Vec<Tensor>)>> {
        Ok(Vec::new())
    }

    /// Tensors that stand before the tokens. They are named in PEFT's files by their suffix alone.
    ///
    /// # Errors
    /// Where the settings do not fit the model.
    fn input_tensors(&self, _model: &ModelConfig) -> Result<Vec<Tensor>> {
        Ok(Vec::new())
    }

    /// What stands before the tokens of each sample; its numbers are those of [`Method::input_tensors`].
    fn virtual_tokens(&self) -> VirtualTokens {
        VirtualTokens::None
    }

    /// The base's tokens that the virtual tokens begin as: its embeddings of them, or its keys and values of them as a text.
    /// None where they begin as their tensors say.
    fn start_tokens(&self, _model: &ModelConfig, _seed: u64) -> Option<Vec<u32>> {
        None
    }

    /// A small network that makes the tensors above out of others, which are trained in their place.
    ///
    /// # Errors
    /// Where the settings do not fit the model.
    fn reparameterisation(&self, _model: &ModelConfig) -> Result<Option<Box<dyn Reparameterisation>>> {
        Ok(None)
    }

    /// Fills in the starts that are [`Start::Computed`] of one module; the others are there already.
    ///
    /// # Errors
    /// Where the base's numbers cannot be had, or the start cannot be computed.
    fn start(&self, _start: &mut ModuleStart<'_>) -> Result<()> {
        Ok(())
    }

    /// PEFT's word for a start whose tensors are computed from the base as it is on disk, once and for all workers, by
    /// [`Method::prepare`]; none where there is no such start.
    fn prepared_start(&self) -> Option<&'static str> {
        None
    }

    /// Computes such a start for a module: `weight` is the base's, row after row, `lost` what 4 bits lose of it (empty where
    /// the base is not quantised).
    ///
    /// # Errors
    /// Where it cannot be computed.
    fn prepare(
        &self,
        _cpu: &Cpu,
        _module: &Module,
        _weight: &[f32],
        _lost: &[f32],
    ) -> Result<PreparedModule> {
        Ok(PreparedModule::default())
    }

    /// Settings and tensors as they are saved for the base on disk, where a start changed the base that is trained on; none where
    /// it did not. `start` is [`super::Fit::start`].
    fn converted(
        &self,
        _layout: &ParameterLayout,
        _parameters: &[f32],
        _start: &[f32],
    ) -> Option<(Map<String, Value>, Vec<SavedTensor>)> {
        None
    }

    /// What a pass needs for a module.
    fn needs(&self, _module: &Module) -> Needs {
        Needs::default()
    }

    /// Folds the branch of an adapted module into its weight `[out, in]`, in place, and says that it did. Only for methods
    /// that know a shorter way than sending the identity through their branch, which is what is done where this says no.
    fn fold(
        &self,
        _module: &Module,
        _tensors: &[ParameterEntry],
        _parameters: &[f32],
        _weight: &mut [f32],
    ) -> bool {
        false
    }

    /// Share of each branch's input set to 0 while training.
    fn dropout(&self) -> f32 {
        0.0
    }

    /// The keys that the method adds to PEFT's `adapter_config.json`; those that every method has are added to them.
    /// `state` is that of [`Method::state`].
    fn settings(&self, _layout: &ParameterLayout, _state: &[f32]) -> Map<String, Value> {
        Map::new()
    }

    /// Tokens whose rows of the embedding are trained, in the order of the tensor of [`Role::Rows`].
    fn trained_tokens(&self) -> &[u32] {
        &[]
    }

    /// The tensors as they are saved, where these are not simply those of the layout; [`SavedTensor`]s are in its order.
    fn saved(
        &self,
        layout: &ParameterLayout,
        parameters: &[f32],
        _state: &[f32],
    ) -> Result<Vec<SavedTensor>> {
        let saved = layout.entries().iter().map(|entry| SavedTensor {
            name: entry.peft_name.clone(),
            shape: entry.shape.clone(),
            values: parameters[entry.range.clone()].iter().map(|value| value - entry.shift).collect(),
        });
        Ok(saved.collect())
    }

    /// As [`Method::settings`], where they depend on the model.
    fn settings_on(
        &self,
        _model: &ModelConfig,
        layout: &ParameterLayout,
        state: &[f32],
    ) -> Map<String, Value> {
        self.settings(layout, state)
    }

    /// Numbers that the method carries from step to step besides its parameters; checkpoints keep them.
    fn state(&self, _layout: &ParameterLayout) -> Vec<f32> {
        Vec::new()
    }

    /// Whether [`Method::regularise`] or [`Method::after_step`] do anything: parameters and gradient then come to the host
    /// once a step, wherever passes run.
    fn has_step_hooks(&self) -> bool {
        false
    }

    /// Adds terms of the loss that depend on the parameters alone to the gradient, which is the **reduced** one, the same
    /// on every rank: call it once a step, before clipping.
    fn regularise(&self, _step: &StepHook<'_>, _parameters: &[f32], _gradient: &mut [f32]) {}

    /// Called after the optimizer's update with the reduced gradient that it used: same bits on every rank.
    fn after_step(
        &self,
        _step: &StepHook<'_>,
        _parameters: &mut [f32],
        _gradient: &[f32],
        _state: &mut [f32],
    ) {
    }
}

/// What a method adds to a pass on a backend.
pub trait MethodOn<B: Backend>: Method {
    /// The branch beside a linear layer or the output head, whose tensors are `tensors` in the order of
    /// [`Method::tensors`] (those of [`Role::Branch`]).
    fn linear(&self, _module: &Module, _tensors: &[ParameterEntry]) -> Option<Box<dyn LinearBranch<B>>> {
        None
    }

    /// The branch beside the token embedding.
    fn embedding(
        &self,
        _module: &Module,
        _tensors: &[ParameterEntry],
    ) -> Option<Box<dyn EmbeddingBranch<B>>> {
        None
    }
}

/// A method on every backend that there is.
pub trait AnyMethod: MethodOn<Cpu> + MethodOn<Cuda> {}

impl<M: MethodOn<Cpu> + MethodOn<Cuda>> AnyMethod for M {}

/// A method that is shared.
pub type SharedMethod = Arc<dyn AnyMethod>;

/// A small network on the host whose output is what passes use, and whose weights are what is trained.
pub trait Reparameterisation: Debug + Send + Sync {
    /// The trained tensors; they stand in no module and are named by their suffix alone.
    fn tensors(&self) -> Vec<Tensor>;

    /// `trained` is of the layout of [`Self::tensors`], `effective` of the method's own tensors. `key` is that of a training
    /// step, for dropout inside of the network; none leaves nothing out.
    ///
    /// # Errors
    /// Where the network cannot compute.
    fn forward(&self, trained: &[f32], key: Option<StepKey>, effective: &mut [f32]) -> Result<()>;

    /// Adds to `trained_gradient` what `effective_gradient` means for the trained tensors.
    ///
    /// # Errors
    /// Where the network cannot compute.
    fn backward(
        &self,
        trained: &[f32],
        key: Option<StepKey>,
        effective_gradient: &[f32],
        trained_gradient: &mut [f32],
    ) -> Result<()>;

    /// Changes `trained`, which holds a start, so that the network gives `effective`, as nearly as it can. False where the
    /// network cannot be made to give anything in particular; `trained` is then as it was.
    ///
    /// # Errors
    /// Where the network cannot compute.
    fn reach(&self, _effective: &[f32], _trained: &mut [f32]) -> Result<bool> {
        Ok(false)
    }
}
