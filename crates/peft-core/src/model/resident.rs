//! A whole base in memory.

use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::tensor::Dtype;

use crate::{
    error::{Error, Origin, Result},
    model::{
        base::{BaseSource, DenseView, EmbeddingView, LayerWeights, LinearWeights, Matrix},
        config::{ModelConfig, Norm, Projection},
        weights::{ModelFiles, Tensor, Witness},
    },
    quant::{
        Nf4Options,
        bitsandbytes::StoredWeight,
        nf4,
        packed::{PackedLayer, PackedShape},
    },
};

pub(crate) mod hashes;
pub(crate) mod plan;

pub use hashes::ContentSum;
pub(crate) use hashes::Hashes;
use plan::{BasePlan, LayerPlan, WeightPlan};

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes read.
    pub done_bytes: u64,
    /// Bytes to be read.
    pub total_bytes: u64,
}

/// What a base takes in memory, by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Linear layers: codes and scales, or f32.
    pub linear_bytes: usize,
    /// The token embedding, bf16 or f32.
    pub embedding_bytes: usize,
    /// The output head; 0 where it is the embedding.
    pub head_bytes: usize,
    /// Norms and biases, f32.
    pub other_bytes: usize,
    /// Of a shared base, the two places that whole layers are gathered in; else 0.
    pub slot_bytes: usize,
}

impl MemoryUse {
    /// Adds what a layer keeps in f32: matrices that are not quantised, biases and norms.
    pub(super) fn add_vectors<'a>(
        &mut self,
        matrices: impl Iterator<Item = &'a Vec<f32>>,
        biases: &'a [Option<Vec<f32>>],
        norms: &'a [Vec<f32>],
    ) {
        let bytes = |numbers: &Vec<f32>| size_of_val(numbers.as_slice());
        self.linear_bytes += matrices.map(bytes).sum::<usize>();
        self.other_bytes += biases.iter().flatten().chain(norms).map(bytes).sum::<usize>();
    }

    /// What [`ResidentBase::load`] would take, from the headers alone.
    ///
    /// # Errors
    /// As [`ResidentBase::load`], but for damaged numbers.
    pub fn plan(folder: &Path, nf4: Option<Nf4Options>) -> Result<Self> {
        Self::plan_for(folder, nf4, false)
    }

    /// As [`MemoryUse::plan`]; on a card that multiplies in bf16, matrices that are not quantised are kept as bf16.
    ///
    /// # Errors
    /// As [`MemoryUse::plan`].
    pub fn plan_for(folder: &Path, nf4: Option<Nf4Options>, half_matrices: bool) -> Result<Self> {
        let config = ModelConfig::load(folder)?;
        let files = ModelFiles::open(folder)?;
        Ok(BasePlan::new(&files, &config, nf4)?.memory(&config, half_matrices))
    }

    /// What [`super::ShardedBase::load`] would take of each of `parts` members, once it is settled and attached.
    ///
    /// # Errors
    /// As [`super::ShardedBase::load`], but for damaged numbers.
    pub fn plan_shared(folder: &Path, nf4: Option<Nf4Options>, parts: usize) -> Result<Self> {
        let config = ModelConfig::load(folder)?;
        let files = ModelFiles::open(folder)?;
        let plan = BasePlan::new(&files, &config, nf4)?;
        plan.check_shard(folder)?;
        Ok(plan.shared_memory(&config, parts))
    }

    /// What the embedding takes where it is not the head as well: beside a card it can stay in host memory.
    pub(crate) fn embedding_apart(&self) -> u64 {
        if self.head_bytes > 0 { self.embedding_bytes as u64 } else { 0 }
    }

    /// All parts.
    pub fn total_bytes(&self) -> usize {
        self.linear_bytes + self.embedding_bytes + self.head_bytes + self.other_bytes + self.slot_bytes
    }
}

/// An embedding or head, kept as stored.
#[derive(Debug)]
pub(crate) enum Table {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Table {
    /// Reads a table as it is stored, or as f32.
    pub(crate) fn read(tensor: &Tensor<'_>, witness: &mut Witness<'_>) -> Result<Self> {
        if tensor.dtype() != Dtype::BF16 {
            let mut numbers = vec![0.0; tensor.elements()];
            tensor.read_f32(&mut numbers, witness)?;
            return Ok(Self::F32(numbers));
        }
        let mut numbers = vec![bf16::ZERO; tensor.elements()];
        tensor.read_bf16(&mut numbers, witness)?;
        Ok(Self::Bf16(numbers))
    }

    /// As the layer loop takes it.
    pub(crate) fn view(&self, columns: usize) -> EmbeddingView<'_> {
        match self {
            Self::F32(data) => EmbeddingView::from_f32(data, columns),
            Self::Bf16(data) => EmbeddingView::from_bf16(data, columns),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::F32(data) => size_of_val(data.as_slice()),
            Self::Bf16(data) => size_of_val(data.as_slice()),
        }
    }
}

/// Norms of a layer by [`Norm::index`]; empty where there is none.
pub(in crate::model) type LayerNorms = [Vec<f32>; Norm::ALL.len()];

/// A projection's weight.
#[derive(Debug)]
enum Weight {
    Dense(Vec<f32>),
    /// Index in the layer's packed buffer.
    Packed(usize),
}

#[derive(Debug)]
struct ResidentLayer {
    /// By [`Norm::index`]; empty where there is none.
    norms: LayerNorms,
    /// In the order of [`ModelConfig::projections`].
    weights: Vec<Weight>,
    /// In the order of [`ModelConfig::projections`].
    biases: Vec<Option<Vec<f32>>>,
    packed: PackedLayer,
}

/// A whole base in memory: linear layers in NF4 or f32, everything else as stored.
#[derive(Debug)]
pub struct ResidentBase {
    config: ModelConfig,
    layers: Vec<ResidentLayer>,
    embedding: Table,
    final_norm: Vec<f32>,
    head: Option<Table>,
    content_hash: blake3::Hash,
    unused: Vec<String>,
}

impl ResidentBase {
    /// Loads a folder in Hugging Face layout.
    ///
    /// With `nf4` the linear layers of the decoder are quantised as they are read; what bitsandbytes quantised
    /// before is kept bit for bit, whatever `nf4` says of blocks and scales. Without it they are widened to f32.
    /// All headers are checked before the first number is read; `progress` is called every few megabytes.
    ///
    /// # Errors
    /// The folder is not a model of a known family, or does not hold together.
    pub fn load(
        folder: &Path,
        nf4: Option<Nf4Options>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        Self::load_over(folder, &[], nf4, progress)
    }

    /// As [`ResidentBase::load`], with tensors of the safetensors `over` in the place of the folder's.
    ///
    /// # Errors
    /// As [`ResidentBase::load`].
    pub fn load_over(
        folder: &Path,
        over: &[PathBuf],
        nf4: Option<Nf4Options>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        let config = ModelConfig::load(folder)?;
        let files = ModelFiles::open_over(folder, over)?;
        let plan = BasePlan::new(&files, &config, nf4)?;
        let unused = plan.unused(&files);
        Ok(Self { unused, ..Self::read(&config, &plan, progress)? })
    }

    /// Reads what was planned; says nothing of tensors that nothing reads.
    ///
    /// # Errors
    /// Unreadable, or damaged numbers.
    pub(crate) fn read(
        config: &ModelConfig,
        plan: &BasePlan<'_>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        let total_bytes = plan.tensors().iter().map(|tensor| tensor.bytes() as u64).sum();
        let mut reader = Reader::new(total_bytes, progress);
        let embedding = reader.table(&plan.embedding)?;
        let less_one = config.norms_less_one;
        let layers = plan.layers.iter().map(|layer| reader.layer(layer, less_one)).collect::<Result<_>>()?;
        let final_norm = reader.norm(&plan.final_norm, less_one)?;
        let head = plan.head.as_ref().map(|head| reader.table(head)).transpose()?;
        let content_hash = reader.hashes.content_hash(config);
        let (config, unused) = (config.clone(), Vec::new());
        Ok(Self { config, layers, embedding, final_norm, head, content_hash, unused })
    }

    /// Hash of what was loaded: every tensor's name, dtype, shape and bytes as stored, in the order of names, and the
    /// settings that change numbers. Sharding, and tensors that nothing reads, do not change it.
    pub fn content_hash(&self) -> blake3::Hash {
        self.content_hash
    }

    /// Tensors of the folder that nothing reads, sorted.
    pub fn unused_tensors(&self) -> &[String] {
        &self.unused
    }

    /// The packed buffer of a layer's quantised matrices.
    pub fn packed(&self, layer: usize) -> &PackedLayer {
        &self.layers[layer].packed
    }

    /// The weights of `layer`; unlike [`BaseSource::layer`] for many readers at once.
    ///
    /// # Panics
    /// If there is no such layer: a defect of the caller.
    pub fn weights(&self, layer: usize) -> LayerWeights<'_> {
        let resident = &self.layers[layer];
        let mut stored = resident.weights.iter().zip(&resident.biases);
        let linear = |projection: Projection| {
            let (weight, bias) = stored.next().expect("a layer is loaded with all its projections");
            let weight = match weight {
                Weight::Dense(data) => {
                    let [rows, columns] = self.config.shape(projection);
                    Matrix::Dense(DenseView::new(data, rows, columns))
                }
                Weight::Packed(index) => Matrix::Nf4(resident.packed.view(*index)),
            };
            LinearWeights { weight, bias: bias.as_deref() }
        };
        LayerWeights::of(&self.config, &resident.norms, linear)
    }

    /// What it takes in memory.
    pub fn memory(&self) -> MemoryUse {
        let mut memory = MemoryUse {
            linear_bytes: 0,
            embedding_bytes: self.embedding.bytes(),
            head_bytes: self.head.as_ref().map_or(0, Table::bytes),
            other_bytes: size_of_val(self.final_norm.as_slice()),
            slot_bytes: 0,
        };
        for layer in &self.layers {
            memory.linear_bytes += layer.packed.memory_bytes();
            let dense = layer.weights.iter().filter_map(|weight| match weight {
                Weight::Dense(data) => Some(data),
                Weight::Packed(_) => None,
            });
            memory.add_vectors(dense, &layer.biases, &layer.norms);
        }
        memory
    }
}

impl BaseSource for ResidentBase {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn prefetch(&mut self, _layer: usize) {}

    fn layer(&mut self, layer: usize) -> Result<LayerWeights<'_>> {
        Ok(self.weights(layer))
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
}

/// The hash of a folder's base, as [`ResidentBase::content_hash`] has it, without keeping the base.
///
/// # Errors
/// As [`ResidentBase::load`], but for numbers that are damaged.
pub fn content_hash(folder: &Path, progress: &mut dyn FnMut(LoadProgress)) -> Result<blake3::Hash> {
    let config = ModelConfig::load(folder)?;
    let files = ModelFiles::open(folder)?;
    let plan = BasePlan::new(&files, &config, None)?;
    let tensors = plan.tensors();
    let total_bytes = tensors.iter().map(|tensor| tensor.bytes() as u64).sum();
    let mut reader = Reader::new(total_bytes, progress);
    for tensor in &tensors {
        tensor.pieces(&mut |bytes| reader.see(tensor, bytes))?;
    }
    Ok(reader.hashes.content_hash(&config))
}

/// Reads tensors once, hashing and counting what passes.
pub(in crate::model) struct Reader<'a> {
    pub(in crate::model) hashes: Hashes,
    done_bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(LoadProgress),
}

impl<'a> Reader<'a> {
    pub(in crate::model) fn new(total_bytes: u64, progress: &'a mut dyn FnMut(LoadProgress)) -> Self {
        Self { hashes: Hashes::default(), done_bytes: 0, total_bytes, progress }
    }

    pub(in crate::model) fn see(&mut self, tensor: &Tensor<'_>, bytes: &[u8]) {
        self.hashes.see(tensor, bytes);
        self.count(bytes.len());
    }

    /// Counts bytes that were read.
    pub(in crate::model) fn count(&mut self, bytes: usize) {
        self.done_bytes += bytes as u64;
        (self.progress)(LoadProgress { done_bytes: self.done_bytes, total_bytes: self.total_bytes });
    }

    pub(in crate::model) fn numbers(&mut self, tensor: &Tensor<'_>) -> Result<Vec<f32>> {
        let mut numbers = vec![0.0; tensor.elements()];
        tensor.read_f32(&mut numbers, &mut |bytes| self.see(tensor, bytes))?;
        Ok(numbers)
    }

    pub(in crate::model) fn table(&mut self, tensor: &Tensor<'_>) -> Result<Table> {
        Table::read(tensor, &mut |bytes| self.see(tensor, bytes))
    }

    /// The scale of a norm.
    pub(in crate::model) fn norm(&mut self, tensor: &Tensor<'_>, less_one: bool) -> Result<Vec<f32>> {
        let mut numbers = self.numbers(tensor)?;
        if less_one {
            numbers.iter_mut().for_each(|number| *number += 1.0);
        }
        Ok(numbers)
    }

    fn layer(&mut self, plan: &LayerPlan<'_>, less_one: bool) -> Result<ResidentLayer> {
        let norms = self.norms(plan, less_one)?;
        let shapes: Vec<PackedShape> = plan.weights.iter().filter_map(WeightPlan::packed).collect();
        let mut packed = PackedLayer::new(&shapes);
        let mut next = 0;
        let mut weights = Vec::with_capacity(plan.weights.len());
        for weight in &plan.weights {
            let index = next;
            next += usize::from(weight.packed().is_some());
            weights.push(match weight {
                WeightPlan::Dense(tensor) => Weight::Dense(self.numbers(tensor)?),
                WeightPlan::Quantise(tensor, shape) => {
                    self.quantise(tensor, *shape, &mut packed, index)?;
                    Weight::Packed(index)
                }
                WeightPlan::Stored(stored) => {
                    stored.read_into(&mut packed, index, &mut |tensor, bytes| self.see(tensor, bytes))?;
                    Weight::Packed(index)
                }
                WeightPlan::Widen(stored) => Weight::Dense(self.widened(stored)?),
            });
        }
        let biases = self.biases(plan)?;
        Ok(ResidentLayer { norms, weights, biases, packed })
    }

    /// What is stored in 4 bits, as f32.
    pub(in crate::model) fn widened(&mut self, stored: &StoredWeight<'_>) -> Result<Vec<f32>> {
        let mut alone = PackedLayer::new(&[stored.shape()]);
        stored.read_into(&mut alone, 0, &mut |tensor, bytes| self.see(tensor, bytes))?;
        let view = alone.view(0);
        let mut numbers = vec![0.0; view.rows() * view.columns()];
        view.write_f32(0, &mut numbers);
        Ok(numbers)
    }

    /// The norms of a layer by [`Norm::index`].
    pub(in crate::model) fn norms(&mut self, plan: &LayerPlan<'_>, less_one: bool) -> Result<LayerNorms> {
        let mut norms = LayerNorms::default();
        for (norm, tensor) in &plan.norms {
            norms[norm.index()] = self.norm(tensor, less_one)?;
        }
        Ok(norms)
    }

    /// The biases of a layer.
    pub(in crate::model) fn biases(&mut self, plan: &LayerPlan<'_>) -> Result<Vec<Option<Vec<f32>>>> {
        plan.biases.iter().map(|bias| bias.as_ref().map(|bias| self.numbers(bias)).transpose()).collect()
    }

    /// Quantises a tensor piece by piece into matrix `index` of `packed`.
    fn quantise(
        &mut self,
        tensor: &Tensor<'_>,
        shape: PackedShape,
        packed: &mut PackedLayer,
        index: usize,
    ) -> Result<()> {
        let block_size = shape.options.block_size;
        let mut scales = vec![0.0; nf4::blocks(tensor.elements(), block_size)];
        let mut finite = true;
        let mut done = 0;
        let codes = packed.parts_mut(index).codes;
        tensor.pieces_f32(&mut |bytes| self.see(tensor, bytes), |piece| {
            let codes = &mut codes[done / 2..][..nf4::code_bytes(piece.len())];
            let scales = &mut scales[done / block_size..][..nf4::blocks(piece.len(), block_size)];
            finite &= nf4::quantise(piece, block_size, codes, scales);
            done += piece.len();
        })?;
        if !finite {
            let (file, tensor) = (tensor.file().to_owned(), tensor.name().to_owned());
            return Err(Error::NonFinite { origin: Origin::Base, file, tensor });
        }
        packed.set_scales(index, &scales);
        Ok(())
    }
}
