//! One of several equal parts of a base, the rest of which other members hold.
//!
//! What is quantised is cut ([`Cut`]) layer by layer; norms, biases, embedding and head, and matrices that are kept in f32, every
//! member has. A layer is put together when it is due: [`LayerGather`] brings the parts of all members into one of two places while the
//! layer before it computes. The layers of a pass and their order are the same at every member, and so are
//! the calls.
//!
//! A base is of use once its members have agreed on it ([`ShardedBase::settle`]): with double quantisation a scale is quantised about
//! the mean of all scales of its matrix, which no member has read alone.

mod load;
mod settle;
mod slots;

use std::sync::Arc;

use crate::{
    error::{Error, Result},
    model::{
        base::{BaseSource, DenseView, EmbeddingView, LayerWeights, LinearWeights, Matrix},
        config::{ModelConfig, Projection},
        resident::{ContentSum, LayerNorms, MemoryUse, Table},
    },
    quant::{AlignedBytes, Cut},
};

use settle::Raw;
use slots::Slots;

/// Which part of a base a member holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardPart {
    /// From 0.
    pub part: usize,
    /// Into how many the base is cut: at least 2.
    pub parts: usize,
}

/// Brings the parts of a layer that other members hold. All members begin the same layers in the same order.
pub trait LayerGather: Send + Sync {
    /// Begins to lay `own` of all members end to end in `place`, and returns at once.
    fn begin(&mut self, layer: usize, own: Arc<AlignedBytes>, place: AlignedBytes);

    /// Waits for a layer that was begun, and gives its place back.
    ///
    /// # Errors
    /// Why it cannot be had; nothing that was begun can be had any more.
    fn finish(&mut self, layer: usize) -> Result<AlignedBytes, String>;
}

/// A projection's weight.
#[derive(Debug)]
enum Weight {
    Dense(Vec<f32>),
    /// Which matrix of the layer's cut.
    Shared(usize),
}

#[derive(Debug)]
struct Layer {
    norms: LayerNorms,
    /// In the order of [`ModelConfig::projections`].
    weights: Vec<Weight>,
    /// In the order of [`ModelConfig::projections`].
    biases: Vec<Option<Vec<f32>>>,
    cut: Arc<Cut>,
    own: Arc<AlignedBytes>,
    /// Of each matrix of the cut with double quantisation: the mean of its scales and which map they go by.
    double: Vec<Option<(f32, usize)>>,
    maps: Vec<[f32; 256]>,
}

/// One part of a base.
pub struct ShardedBase {
    config: ModelConfig,
    part: ShardPart,
    layers: Vec<Layer>,
    embedding: Table,
    final_norm: Vec<f32>,
    head: Option<Table>,
    identity: blake3::Hash,
    /// Hash of settings and tensors, but for their numbers.
    frame: blake3::Hash,
    /// Sums of the numbers that every member has, and that this one alone has.
    common: ContentSum,
    own: ContentSum,
    raw: Option<Raw>,
    slots: Slots,
}

impl ShardedBase {
    /// Which part it is.
    pub fn part(&self) -> ShardPart {
        self.part
    }

    /// What is the same at all members of one base, whatever their part: the hash of its settings, of the names and shapes of all its
    /// tensors, and of the numbers that every member reads. Two bases that differ in shared matrices alone have the same; the hash
    /// that [`ShardedBase::content_hash`] makes of all members' sums tells them apart.
    pub fn identity(&self) -> blake3::Hash {
        self.identity
    }

    /// What it takes in memory once it is settled and attached.
    pub fn planned_memory(&self) -> MemoryUse {
        let mut memory = self.memory();
        memory.linear_bytes -= self.raw.as_ref().map_or(0, Raw::bytes);
        if self.raw.is_some() {
            let doubled = |layer: &&Layer| layer.cut.shapes().iter().any(|shape| shape.options.double);
            let waiting = self.layers.iter().filter(|layer| layer.maps.is_empty()).filter(doubled).count();
            memory.linear_bytes += waiting * size_of::<[f32; 256]>();
        }
        memory.slot_bytes = 2 * self.longest_layer();
        memory
    }

    fn longest_layer(&self) -> usize {
        self.layers.iter().map(|layer| layer.cut.bytes()).max().unwrap_or(0)
    }

    /// What it takes in memory.
    pub fn memory(&self) -> MemoryUse {
        let mut memory = MemoryUse {
            linear_bytes: self.raw.as_ref().map_or(0, Raw::bytes),
            embedding_bytes: self.embedding.bytes(),
            head_bytes: self.head.as_ref().map_or(0, Table::bytes),
            other_bytes: size_of_val(self.final_norm.as_slice()),
            slot_bytes: self.slots.bytes(),
        };
        for layer in &self.layers {
            memory.linear_bytes += layer.own.len() + size_of_val(layer.maps.as_slice());
            let dense = layer.weights.iter().filter_map(|weight| match weight {
                Weight::Dense(data) => Some(data),
                Weight::Shared(_) => None,
            });
            memory.add_vectors(dense, &layer.biases, &layer.norms);
        }
        memory
    }

    /// Has layers gathered by `gather` from now on; whatever was gathered before is forgotten.
    pub fn attach(&mut self, gather: Box<dyn LayerGather>) {
        self.slots.attach(gather, self.longest_layer());
    }

    /// Lets go of the members: no layer can be had until others are attached.
    pub fn detach(&mut self) {
        self.slots.detach();
    }

    /// Layers that were gathered since the base was loaded.
    pub fn gathered_layers(&self) -> u64 {
        self.slots.gathered
    }

    /// Begins to gather a layer.
    pub(crate) fn begin(&mut self, layer: usize) -> Result<()> {
        if self.raw.is_some() {
            let problem = "the members of its group have not agreed on its scales".to_owned();
            return Err(Error::NotGathered { layer, problem });
        }
        let of = &self.layers[layer];
        if of.own.is_empty() {
            return Ok(());
        }
        self.slots.begin(layer, &of.own)
    }
}

impl BaseSource for ShardedBase {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn prefetch(&mut self, layer: usize) {
        // What is wrong with it is said when it is wanted.
        let _ = self.begin(layer);
    }

    fn layer(&mut self, layer: usize) -> Result<LayerWeights<'_>> {
        self.begin(layer)?;
        let of = &self.layers[layer];
        let gathered = match of.own.is_empty() {
            true => &[],
            false => self.slots.finish(layer)?,
        };
        let mut stored = of.weights.iter().zip(&of.biases);
        let linear = |projection: Projection| {
            let (weight, bias) = stored.next().expect("a layer is loaded with all its projections");
            let weight = match weight {
                Weight::Dense(data) => {
                    let [rows, columns] = self.config.shape(projection);
                    Matrix::Dense(DenseView::new(data, rows, columns))
                }
                Weight::Shared(matrix) => {
                    let double = of.double[*matrix].map(|(offset, map)| (offset, &of.maps[map]));
                    Matrix::Pieces(of.cut.view(*matrix, gathered, double))
                }
            };
            LinearWeights { weight, bias: bias.as_deref() }
        };
        Ok(LayerWeights::of(&self.config, &of.norms, linear))
    }

    fn embedding(&self) -> EmbeddingView<'_> {
        self.embedding.view(self.config.hidden_size)
    }

    fn final_norm(&self) -> &[f32] {
        &self.final_norm
    }

    fn head(&self) -> EmbeddingView<'_> {
        self.head.as_ref().unwrap_or(&self.embedding).view(self.config.hidden_size)
    }

    fn sharded(&mut self) -> Option<&mut ShardedBase> {
        Some(self)
    }
}
