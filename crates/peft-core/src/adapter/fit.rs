//! A method fitted to a model: which modules, which tensors, and the branches of a backend.

use std::{fmt, sync::Arc};

use super::{
    branch::{EmbeddingBranch, LinearBranch},
    layout::{ParameterEntry, ParameterLayout, Part},
    method::{AnyMethod, MethodOn, Reparameterisation, Role, SharedMethod},
    targets::Matched,
};
use crate::{
    backend::Backend,
    error::Result,
    model::{ModelConfig, ModuleKind, Place, Projection},
};

/// A method fitted to a model.
#[derive(Debug, Clone, Default)]
pub struct Fit {
    method: Option<SharedMethod>,
    layout: ParameterLayout,
    matched: Matched,
    network: Option<Network>,
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
        let layout = ParameterLayout::new(parts, method.input_tensors(model)?);
        let network = method.reparameterisation(model)?.map(|network| Network {
            layout: ParameterLayout::new(Vec::new(), network.tensors()),
            network: Arc::from(network),
        });
        Ok(Self { method: Some(method), layout, matched, network })
    }

    /// The bare base: no method, nothing trained.
    pub fn bare() -> Self {
        Self::default()
    }

    /// The method; none on the bare base.
    pub fn method(&self) -> Option<&SharedMethod> {
        self.method.as_ref()
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
    layers: Vec<Vec<Option<Box<dyn LinearBranch<B>>>>>,
    head: Option<Box<dyn LinearBranch<B>>>,
    embedding: Option<Box<dyn EmbeddingBranch<B>>>,
}

impl<B: Backend> fmt::Debug for Branches<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Branches").field("layers", &self.layers.len()).finish_non_exhaustive()
    }
}

impl<B: Backend> Default for Branches<B> {
    fn default() -> Self {
        Self { layers: Vec::new(), head: None, embedding: None }
    }
}

impl<B: Backend> Branches<B> {
    /// Makes the branches of `layout` on a model of `layers` layers.
    pub fn new<M: MethodOn<B> + ?Sized>(method: Option<&M>, layout: &ParameterLayout, layers: usize) -> Self {
        let none = || Projection::ALL.iter().map(|_| None).collect();
        let mut branches =
            Self { layers: (0..layers).map(|_| none()).collect(), head: None, embedding: None };
        let Some(method) = method else { return branches };
        for adapted in layout.modules().iter().filter(|adapted| adapted.branch) {
            let module = &adapted.module;
            let own = |entry: &&ParameterEntry| entry.role == Role::Branch;
            let tensors: Vec<ParameterEntry> = layout.tensors(adapted).iter().filter(own).cloned().collect();
            match (module.place, module.kind) {
                (Place::Layer(layer), ModuleKind::Linear) => {
                    branches.layers[layer][module.index] = method.linear(module, &tensors);
                }
                (_, ModuleKind::Head) => branches.head = method.linear(module, &tensors),
                (_, ModuleKind::Embedding) => branches.embedding = method.embedding(module, &tensors),
                _ => {}
            }
        }
        branches
    }

    /// The branch beside a linear layer, by its place among the layer's.
    pub fn linear(&self, layer: usize, index: usize) -> Option<&dyn LinearBranch<B>> {
        self.layers.get(layer)?.get(index)?.as_deref()
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
