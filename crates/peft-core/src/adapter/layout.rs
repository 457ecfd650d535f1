//! Where each tensor lies in the flat buffer.
//!
//! Parameters, gradients and optimizer moments are flat f32 buffers of one layout. Modules come in the order in which the
//! backward pass reaches them (layers in descending order), so that it fills the gradient front to back and the reduction
//! can follow it. Every tensor begins at a multiple of [`ALIGNMENT`]; the gaps are zeros, and stay zeros under AdamW.

use std::ops::Range;

use super::method::{Needs, Rate, Role, Start, Tensor};
use crate::{
    batch::VirtualTokens,
    model::{Module, Place},
    random,
};

/// What every tensor's place is a multiple of, floats.
pub const ALIGNMENT: usize = 64;

/// What every name in PEFT's files begins with, but for those of tensors that stand before the tokens.
pub const PREFIX: &str = "base_model.model.";

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterEntry {
    /// Name in PEFT's files, for example `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub peft_name: String,
    /// The module, for example `model.layers.0.self_attn.q_proj`; empty for tensors that stand before the tokens.
    pub module: String,
    /// Where the module stands.
    pub place: Place,
    /// What follows the module in the name, for example `lora_A.weight`.
    pub suffix: String,
    /// One or two lengths.
    pub shape: Vec<usize>,
    /// Where it lies in the flat buffer, floats.
    pub range: Range<usize>,
    /// How it begins.
    pub start: Start,
    /// How fast it learns.
    pub rate: Rate,
    /// What it is to its module.
    pub role: Role,
    /// What the numbers in memory are more than those in files.
    pub shift: f32,
}

impl ParameterEntry {
    /// Rows; 1 where it has one length only.
    pub fn rows(&self) -> usize {
        if self.shape.len() > 1 { self.shape[0] } else { 1 }
    }

    /// Columns.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// Whether it gets a gradient.
    pub fn is_trained(&self) -> bool {
        self.rate != Rate::Frozen
    }
}

/// A module with tensors in the flat buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptedModule {
    /// The module.
    pub module: Module,
    /// Whether the method adapts it; otherwise tensors of the base are trained, no more.
    pub branch: bool,
    /// What a pass needs for it.
    pub needs: Needs,
    /// Its tensors in [`ParameterLayout::entries`].
    pub entries: Range<usize>,
}

/// Where each tensor lies in the flat buffer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ParameterLayout {
    modules: Vec<AdaptedModule>,
    entries: Vec<ParameterEntry>,
    virtual_tokens: VirtualTokens,
    length: usize,
}

/// What becomes an [`AdaptedModule`].
pub(super) struct Part {
    pub(super) module: Module,
    pub(super) branch: bool,
    pub(super) needs: Needs,
    pub(super) tensors: Vec<Tensor>,
}

impl ParameterLayout {
    /// Lays modules out in the order of the backward pass, then `inputs`, which stand before the tokens.
    pub(super) fn new(mut parts: Vec<Part>, inputs: Vec<Tensor>) -> Self {
        parts.sort_by_key(|part| part.module.backward_order());
        let mut layout = Self::default();
        for Part { module, branch, needs, tensors } in parts {
            let first = layout.entries.len();
            for tensor in tensors {
                let name = format!("{PREFIX}{}.{}", module.path, tensor.suffix);
                layout.push(name, module.path.clone(), module.place, tensor);
            }
            let entries = first..layout.entries.len();
            layout.modules.push(AdaptedModule { module, branch, needs, entries });
        }
        for tensor in inputs {
            layout.push(tensor.suffix.clone(), String::new(), Place::Input, tensor);
        }
        layout
    }

    fn push(&mut self, peft_name: String, module: String, place: Place, tensor: Tensor) {
        let Tensor { suffix, shape, start, rate, role, shift } = tensor;
        let range = self.length..self.length + shape.iter().product::<usize>();
        self.length = range.end.next_multiple_of(ALIGNMENT);
        self.entries.push(ParameterEntry {
            peft_name,
            module,
            place,
            suffix,
            shape,
            range,
            start,
            rate,
            role,
            shift,
        });
    }

    pub(super) fn with_virtual_tokens(self, virtual_tokens: VirtualTokens) -> Self {
        Self { virtual_tokens, ..self }
    }

    /// What stands in front of every sample.
    pub fn virtual_tokens(&self) -> VirtualTokens {
        self.virtual_tokens
    }

    /// The tensor that holds the virtual tokens, a row each; none where there are none.
    pub fn virtual_tensor(&self) -> Option<&ParameterEntry> {
        let is_own = |entry: &&ParameterEntry| entry.place == Place::Input && entry.module.is_empty();
        self.entries.iter().find(is_own).filter(|_| self.virtual_tokens.count() > 0)
    }

    /// All tensors, in the order in which they lie.
    pub fn entries(&self) -> &[ParameterEntry] {
        &self.entries
    }

    /// The modules that have tensors, in the same order.
    pub fn modules(&self) -> &[AdaptedModule] {
        &self.modules
    }

    /// The tensors of a module.
    pub fn tensors(&self, module: &AdaptedModule) -> &[ParameterEntry] {
        &self.entries[module.entries.clone()]
    }

    /// A tensor by the full name of its module and what follows in the name.
    pub fn find(&self, module: &str, suffix: &str) -> Option<&ParameterEntry> {
        self.entries.iter().find(|entry| entry.module == module && entry.suffix == suffix)
    }

    /// The part of the buffer that holds the tensors of a place, gaps included; empty where there is none.
    pub fn range(&self, place: Place) -> Range<usize> {
        let mut own = self.entries.iter().enumerate().filter(|(_, entry)| entry.place == place);
        let Some((first, entry)) = own.next() else { return 0..0 };
        let last = own.next_back().map_or(first, |(index, _)| index);
        let end = self.entries.get(last + 1).map_or(self.length, |next| next.range.start);
        entry.range.start..end
    }

    /// The part of the buffer that holds a layer's tensors, gaps included; empty where none is adapted.
    pub fn layer_range(&self, layer: usize) -> Range<usize> {
        self.range(Place::Layer(layer))
    }

    /// The lowest place that the backward pass must reach; none where nothing is trained.
    pub fn lowest(&self) -> Option<Place> {
        let depth = |place: Place| match place {
            Place::Input => 0,
            Place::Layer(layer) => 1 + layer,
            Place::Head => usize::MAX,
        };
        self.entries.iter().map(|entry| entry.place).min_by_key(|place| depth(*place))
    }

    /// Length of the flat buffer, floats, gaps included.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Trained parameters, without gaps.
    pub fn parameters(&self) -> usize {
        let trained = self.entries.iter().filter(|entry| entry.is_trained());
        trained.map(|entry| entry.range.len()).sum()
    }

    /// What pass memory is needed over all modules; [`Needs::kept`] is the largest of any.
    pub fn needs(&self) -> Needs {
        self.modules.iter().fold(Needs::default(), |needs, module| needs.or(module.needs))
    }

    /// Writes every start that follows from `seed` and the tensor's name alone; others are left 0: those that are as in the
    /// base, or computed. `parameters` is of [`Self::len`].
    pub fn initialise(&self, seed: u64, parameters: &mut [f32]) {
        parameters.fill(0.0);
        for entry in &self.entries {
            let out = &mut parameters[entry.range.clone()];
            match entry.start {
                Start::Constant(value) => out.fill(value),
                Start::Uniform { bound } => random::fill_uniform(seed, &entry.peft_name, bound, out),
                Start::Normal { deviation } => random::fill_normal(seed, &entry.peft_name, deviation, out),
                Start::Base | Start::Computed => {}
            }
        }
    }

    /// Factor of the learning rate for parts of the buffer, where it is not 1; `peak` is the job's peak.
    pub fn rates(&self, peak: f64) -> Vec<(Range<usize>, f64)> {
        let factor = |rate| match rate {
            Rate::Job => 1.0,
            Rate::Times(factor) => factor,
            Rate::Peak(own) => own / peak,
            Rate::Frozen => 0.0,
        };
        let own = self.entries.iter().filter(|entry| entry.rate != Rate::Job);
        own.map(|entry| (entry.range.clone(), factor(entry.rate))).collect()
    }
}
