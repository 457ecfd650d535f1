//! A method fitted to a model: which modules, which tensors, and the branches of a backend.

use std::{collections::BTreeSet, fmt, sync::Arc};

use super::{
    branch::{EmbeddingBranch, LinearBranch},
    layout::{ParameterEntry, ParameterLayout, Part},
    method::{AnyMethod, MethodOn, Reparameterisation, Role, SharedMethod},
    targets::Matched,
};
use crate::{
    backend::Backend,
    error::Result,
    model::{ModelConfig, ModuleKind, Norm, Place, Projection},
    nn::linear::TrainedParts,
};

/// A method fitted to a model.
#[derive(Debug, Clone, Default)]
pub struct Fit {
    method: Option<SharedMethod>,
    model: Option<ModelConfig>,
    layout: ParameterLayout,
    matched: Matched,
    network: Option<Network>,
    base_hash: Option<blake3::Hash>,
    /// Parameters that a start computed from the base began with, where the base was changed or the start prepared.
    start: Option<Arc<[f32]>>,
}

/// A small network in front of a method's tensors.
#[derive(Debug, Clone)]
pub struct Network {
    /// Where its own tensors lie: what is trained.
    pub layout: ParameterLayout,
    /// The network.
    pub network: Arc<dyn Reparameterisation>,
}

impl Fit {
    /// Finds the modules that `method` adapts, and lays out its tensors.
    ///
    /// # Errors
    /// Where the settings cannot be, or do not fit the model.
    pub fn new(method: SharedMethod, model: &ModelConfig) -> Result<Self> {
        method.check()?;
        let matched = method.targets(model)?;
        let mut parts: Vec<Part> = Vec::new();
        for module in &matched.targets {
            let (tensors, needs) = (method.tensors(module), method.needs(module));
            parts.push(Part { module: module.clone(), branch: true, needs, tensors });
        }
        for (module, tensors) in method.other_tensors(model)? {
            match parts.iter_mut().find(|part| part.module == module) {
                Some(part) => part.tensors.extend(tensors),
                None => parts.push(Part { module, branch: false, needs: Default::default(), tensors }),
            }
        }
        if model.norms_less_one {
            let norms = parts.iter_mut().filter(|part| part.module.kind == ModuleKind::Norm);
            norms.flat_map(|part| &mut part.tensors).for_each(|tensor| tensor.shift = 1.0);
        }
        let inputs = method.input_tensors(model)?;
        let layout = ParameterLayout::new(parts, inputs).with_virtual_tokens(method.virtual_tokens());
        let network = method.reparameterisation(model)?.map(|network| Network {
            layout: ParameterLayout::new(Vec::new(), network.tensors()),
            network: Arc::from(network),
        });
        Ok(Self {
            method: Some(method),
            model: Some(model.clone()),
            layout,
            matched,
            network,
            base_hash: None,
            start: None,
        })
    }

    /// The bare base: no method, nothing trained.
    pub fn bare() -> Self {
        Self::default()
    }

    /// Says which base it is trained on: its files carry the hash, so that another base can be told from it.
    pub fn on_base(&mut self, hash: blake3::Hash) {
        self.base_hash = Some(hash);
    }

    /// Hash of the base that it is trained on, where that is known.
    pub fn base_hash(&self) -> Option<blake3::Hash> {
        self.base_hash
    }

    /// As it is used rather than trained: the tensors themselves, without a network that made them.
    #[must_use]
    pub fn without_network(mut self) -> Self {
        self.network = None;
        self
    }

    /// The method; none on the bare base.
    pub fn method(&self) -> Option<&SharedMethod> {
        self.method.as_ref()
    }

    /// The model that it is fitted to; none on the bare base.
    pub fn model(&self) -> Option<&ModelConfig> {
        self.model.as_ref()
    }

    /// Where each tensor lies that passes read: PEFT's tensors.
    pub fn layout(&self) -> &ParameterLayout {
        &self.layout
    }

    /// Where each tensor lies that is trained: [`Self::layout`], or the tensors of a network that makes those.
    pub fn trained(&self) -> &ParameterLayout {
        self.network.as_ref().map_or(&self.layout, |network| &network.layout)
    }

    /// The network in front of the tensors, where there is one.
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// What is allowed, and perhaps not meant: few layers are adapted, or whole modules make the adapter large. Sentences for
    /// people; `model` is the one that it is fitted to.
    pub fn doubts(&self, model: &ModelConfig) -> Vec<String> {
        let mut doubts = Vec::new();
        let adapted = self.layout.modules().iter().filter(|adapted| adapted.branch);
        let layers: BTreeSet<usize> = adapted
            .filter_map(|adapted| match adapted.module.place {
                Place::Layer(layer) => Some(layer),
                _ => None,
            })
            .collect();
        if !layers.is_empty() && 2 * layers.len() < model.layers {
            doubts.push(format!("only {} of {} layers are adapted", layers.len(), model.layers));
        }
        let count = |whole: bool| -> usize {
            let entries = self.layout.entries().iter();
            let of = entries.filter(|entry| matches!(entry.role, Role::Weight | Role::Bias) == whole);
            of.map(|entry| entry.range.len()).sum()
        };
        let (whole, rest) = (count(true), count(false));
        if whole > rest {
            let megabytes = |numbers: usize| 4.0 * numbers as f64 / 1e6;
            doubts.push(format!(
                "modules that are trained whole are {:.0} % of what is trained: workers send each other {:.1} MB at every \
                 step, {:.1} MB without them, and every checkpoint holds {:.1} MB",
                100.0 * whole as f64 / (whole + rest) as f64,
                megabytes(whole + rest),
                megabytes(rest),
                3.0 * megabytes(whole + rest),
            ));
        }
        doubts
    }

    /// What a start that was computed from the base put into the flat parameters; 0 where it puts nothing.
    pub fn start(&self) -> Option<&[f32]> {
        self.start.as_deref()
    }

    pub(crate) fn set_start(&mut self, start: Vec<f32>) {
        self.start = Some(start.into());
    }

    /// The modules that are adapted.
    pub fn matched(&self) -> &Matched {
        &self.matched
    }

    /// Share of each branch's input set to 0 while training.
    pub fn dropout(&self) -> f32 {
        self.method.as_ref().map_or(0.0, |method| method.dropout())
    }
}

/// The branches of a fitted method on a backend.
pub struct Branches<B: Backend> {
    layers: Vec<Layer<B>>,
    head: BoxedBranch<B>,
    embedding: Option<Box<dyn EmbeddingBranch<B>>>,
    /// Where tensors lie that take the place of the base's.
    final_norm: Option<usize>,
    head_weight: Option<usize>,
    embedding_weight: Option<usize>,
    /// Tokens whose rows of the embedding are trained, and where these lie.
    rows: Option<(Vec<u32>, usize)>,
}

/// The branch beside a linear layer, where there is one.
type BoxedBranch<B> = Option<Box<dyn LinearBranch<B>>>;

/// What is trained in a layer.
struct Layer<B: Backend> {
    linear: Vec<(BoxedBranch<B>, TrainedParts)>,
    /// By [`Norm::index`].
    norms: [Option<usize>; Norm::ALL.len()],
}

impl<B: Backend> fmt::Debug for Branches<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Branches").field("layers", &self.layers.len()).finish_non_exhaustive()
    }
}

impl<B: Backend> Default for Branches<B> {
    fn default() -> Self {
        Self {
            layers: Vec::new(),
            head: None,
            embedding: None,
            final_norm: None,
            head_weight: None,
            embedding_weight: None,
            rows: None,
        }
    }
}

impl<B: Backend> Branches<B> {
    /// Makes the branches of `layout` on a model of `layers` layers.
    pub fn new<M: MethodOn<B> + ?Sized>(method: Option<&M>, layout: &ParameterLayout, layers: usize) -> Self {
        let layer = || Layer {
            linear: Projection::ALL.iter().map(|_| (None, TrainedParts::default())).collect(),
            norms: [None; Norm::ALL.len()],
        };
        let mut branches = Self { layers: (0..layers).map(|_| layer()).collect(), ..Self::default() };
        let Some(method) = method else { return branches };
        for adapted in layout.modules() {
            let (module, tensors) = (&adapted.module, layout.tensors(adapted));
            let at = |role| tensors.iter().find(|entry| entry.role == role).map(|entry| entry.range.start);
            let own = |entry: &&ParameterEntry| matches!(entry.role, Role::Branch | Role::Rows);
            let own: Vec<ParameterEntry> = tensors.iter().filter(own).cloned().collect();
            match (module.place, module.kind) {
                (Place::Layer(layer), ModuleKind::Linear) => {
                    let branch = if adapted.branch { method.linear(module, &own) } else { None };
                    let trained = TrainedParts { weight: at(Role::Weight), bias: at(Role::Bias) };
                    branches.layers[layer].linear[module.index] = (branch, trained);
                }
                (Place::Layer(layer), ModuleKind::Norm) => {
                    branches.layers[layer].norms[module.index] = at(Role::Weight);
                }
                (_, ModuleKind::Norm) => branches.final_norm = at(Role::Weight),
                (_, ModuleKind::Head) => {
                    branches.head = if adapted.branch { method.linear(module, &own) } else { None };
                    branches.head_weight = at(Role::Weight);
                }
                (_, ModuleKind::Embedding) => {
                    branches.embedding = if own.is_empty() { None } else { method.embedding(module, &own) };
                    branches.embedding_weight = at(Role::Weight);
                    branches.rows = at(Role::Rows).map(|at| (method.trained_tokens().to_vec(), at));
                }
                _ => {}
            }
        }
        branches
    }

    /// The branch beside a linear layer, by its place among the layer's.
    pub fn linear(&self, layer: usize, index: usize) -> Option<&dyn LinearBranch<B>> {
        self.layers.get(layer)?.linear.get(index)?.0.as_deref()
    }

    /// Where weight and bias of a linear layer lie, where they are trained themselves.
    pub fn trained_parts(&self, layer: usize, index: usize) -> TrainedParts {
        let parts = self.layers.get(layer).and_then(|layer| layer.linear.get(index));
        parts.map_or(TrainedParts::default(), |(_, parts)| *parts)
    }

    /// Where the weight of a norm lies, where it is trained.
    pub fn norm(&self, layer: usize, norm: Norm) -> Option<usize> {
        self.layers.get(layer)?.norms[norm.index()]
    }

    /// Where the weight of the last norm lies, where it is trained.
    pub fn final_norm(&self) -> Option<usize> {
        self.final_norm
    }

    /// Where the output head lies, where it is trained itself.
    pub fn head_weight(&self) -> Option<usize> {
        self.head_weight
    }

    /// Where the embedding lies, where it is trained itself.
    pub fn embedding_weight(&self) -> Option<usize> {
        self.embedding_weight
    }

    /// Tokens whose rows of the embedding are trained, and where these lie.
    pub fn rows(&self) -> Option<(&[u32], usize)> {
        self.rows.as_ref().map(|(tokens, at)| (tokens.as_slice(), *at))
    }

    /// The branch beside the output head.
    pub fn head(&self) -> Option<&dyn LinearBranch<B>> {
        self.head.as_deref()
    }

    /// The branch beside the token embedding.
    pub fn embedding(&self) -> Option<&dyn EmbeddingBranch<B>> {
        self.embedding.as_deref()
    }
}

impl Fit {
    /// The branches on a backend.
    pub fn branches<B: Backend>(&self, layers: usize) -> Branches<B>
    where
        dyn AnyMethod: MethodOn<B>,
    {
        Branches::new(self.method.as_deref(), &self.layout, layers)
    }
}
