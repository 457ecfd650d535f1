//! The modules of a decoder by name, as transformers names them: what adapters are put on.

use std::cmp::Reverse;

use super::config::{ModelConfig, Norm, Projection};

/// Where a module stands in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// Ahead of the first layer: the token embedding and whatever stands before the tokens. Reached last by the backward pass.
    Input,
    /// In a layer, from 0.
    Layer(usize),
    /// Behind the last layer: the last norm and the output head. Reached first by the backward pass.
    Head,
}

/// What a module is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModuleKind {
    /// A linear layer of a decoder layer.
    Linear,
    /// The token embedding.
    Embedding,
    /// The output head.
    Head,
    /// A norm.
    Norm,
    /// Something without weights, or a container: what it is, for people.
    Other(&'static str),
}

/// A module of the model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Module {
    /// Full name, for example `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Where it stands.
    pub place: Place,
    /// What it is.
    pub kind: ModuleKind,
    /// Its place among the modules of its kind in a layer; [`Projection::index`] for a linear one,
    /// [`Norm::index`] for a norm.
    pub index: usize,
    /// Shape of its weight: `[out, in]`, `[vocabulary, hidden]`, or `[1, features]` of a norm.
    pub shape: [usize; 2],
    /// Whether it has a bias.
    pub bias: bool,
}

impl Module {
    /// Last part of the name, for example `q_proj`.
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }

    /// Whether `name` is its name or the end of it, from a dot on: PEFT's rule.
    pub fn is_named(&self, name: &str) -> bool {
        self.path == name || self.path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
    }

    /// What its random masks are told apart by.
    pub fn number(&self) -> u32 {
        match self.place {
            Place::Layer(layer) => (layer * Projection::ALL.len() + self.index) as u32,
            Place::Head => u32::MAX,
            Place::Input => u32::MAX - 1,
        }
    }

    /// Sorts modules into the order in which the backward pass reaches them.
    pub fn backward_order(&self) -> impl Ord + use<> {
        let place = match self.place {
            Place::Head => (0, Reverse(0)),
            Place::Layer(layer) => (1, Reverse(layer)),
            Place::Input => (2, Reverse(0)),
        };
        (place, Reverse(self.index))
    }
}

impl ModelConfig {
    /// All modules, in the order of the forward pass, containers included: PEFT's rules see them all.
    pub fn modules(&self) -> Vec<Module> {
        let hidden = self.hidden_size;
        let module =
            |path: String, place, kind, index, shape, bias| Module { path, place, kind, index, shape, bias };
        let other =
            |path: String, place, what| module(path, place, ModuleKind::Other(what), 0, [0, 0], false);
        let norm = |path: String, place, index, features| {
            module(path, place, ModuleKind::Norm, index, [1, features], false)
        };
        let table = [self.vocabulary_size, hidden];
        let mut all = vec![
            other("model".to_owned(), Place::Input, CONTAINER),
            module("model.embed_tokens".to_owned(), Place::Input, ModuleKind::Embedding, 0, table, false),
            other("model.layers".to_owned(), Place::Input, CONTAINER),
        ];
        for layer in 0..self.layers {
            let (name, place) = (format!("model.layers.{layer}"), Place::Layer(layer));
            all.push(other(name.clone(), place, CONTAINER));
            all.push(other(format!("{name}.self_attn"), place, CONTAINER));
            all.push(other(format!("{name}.mlp"), place, CONTAINER));
            all.push(other(format!("{name}.mlp.act_fn"), place, "an activation"));
            all.extend(self.norms().map(|kind: Norm| {
                norm(self.norm_module(layer, kind), place, kind.index(), self.norm_features(kind))
            }));
            all.extend(Projection::ALL.iter().map(|&projection| {
                let (shape, bias) = (self.shape(projection), self.has_bias(projection));
                module(projection.module(layer), place, ModuleKind::Linear, projection.index(), shape, bias)
            }));
        }
        all.push(norm("model.norm".to_owned(), Place::Head, 1, hidden));
        all.push(other("model.rotary_emb".to_owned(), Place::Input, "the rotary embedding"));
        all.push(module("lm_head".to_owned(), Place::Head, ModuleKind::Head, 0, table, false));
        all
    }
}

const CONTAINER: &str = "a container of modules";
