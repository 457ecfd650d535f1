//! Which tensors a base is loaded from, all checked before the first is read.

use std::{collections::BTreeSet, path::Path};

use safetensors::tensor::Dtype;

use crate::{
    error::{Error, Result},
    model::{
        config::{ModelConfig, Norm},
        resident::MemoryUse,
        weights::{ModelFiles, Tensor},
    },
    quant::{
        Cut, Nf4Options,
        bitsandbytes::{self, StoredWeight},
        nf4,
        packed::{PackedLayer, PackedShape},
    },
};

/// Where a projection's weight comes from and how it is kept.
pub(crate) enum WeightPlan<'a> {
    /// Read as f32 and kept so.
    Dense(Tensor<'a>),
    /// Read as f32 and quantised.
    Quantise(Tensor<'a>, PackedShape),
    /// Pre-quantised, kept as it is.
    Stored(StoredWeight<'a>),
    /// Pre-quantised, widened to f32.
    Widen(StoredWeight<'a>),
}

impl WeightPlan<'_> {
    /// What it takes in the layer's packed buffer.
    pub(crate) fn packed(&self) -> Option<PackedShape> {
        match self {
            Self::Dense(_) | Self::Widen(_) => None,
            Self::Quantise(_, shape) => Some(*shape),
            Self::Stored(stored) => Some(stored.shape()),
        }
    }
}

/// One decoder layer.
pub(crate) struct LayerPlan<'a> {
    /// In the order of [`Norm::ALL`].
    pub(crate) norms: Vec<(Norm, Tensor<'a>)>,
    /// In the order of [`ModelConfig::projections`].
    pub(crate) weights: Vec<WeightPlan<'a>>,
    /// In the order of [`ModelConfig::projections`].
    pub(crate) biases: Vec<Option<Tensor<'a>>>,
}

/// A whole base.
pub(crate) struct BasePlan<'a> {
    pub(crate) layers: Vec<LayerPlan<'a>>,
    pub(crate) embedding: Tensor<'a>,
    pub(crate) final_norm: Tensor<'a>,
    pub(crate) head: Option<Tensor<'a>>,
}

impl<'a> BasePlan<'a> {
    /// Finds all tensors that `config` calls for and checks shapes and dtypes.
    pub(crate) fn new(files: &'a ModelFiles, config: &ModelConfig, nf4: Option<Nf4Options>) -> Result<Self> {
        if let Some(options) = nf4
            && !nf4::is_block_size(options.block_size)
        {
            return Err(Error::BlockSize { block_size: options.block_size });
        }
        let float = |name: &str, shape: &[usize]| {
            let tensor = files.tensor(name)?;
            tensor.expect_shape(shape)?;
            tensor.expect_float()?;
            Ok(tensor)
        };
        let table = |name: &str| float(name, &[config.vocabulary_size, config.hidden_size]);
        let layers = (0..config.layers)
            .map(|layer| {
                let weights = config.projections().iter().map(|projection| {
                    let name = format!("{}.weight", projection.module(layer));
                    let shape = config.shape(*projection);
                    if bitsandbytes::is_stored(files, &name) {
                        let stored = StoredWeight::open(files, &name, shape)?;
                        return Ok(if nf4.is_some() {
                            WeightPlan::Stored(stored)
                        } else {
                            WeightPlan::Widen(stored)
                        });
                    }
                    let tensor = float(&name, &shape)?;
                    Ok(match nf4 {
                        // What a pre-quantised folder left dense was left so on purpose.
                        Some(options) if !config.stored_nf4 => WeightPlan::Quantise(
                            tensor,
                            PackedShape { rows: shape[0], columns: shape[1], options },
                        ),
                        _ => WeightPlan::Dense(tensor),
                    })
                });
                let biases = config.projections().iter().map(|projection| {
                    let name = format!("{}.bias", projection.module(layer));
                    let wanted = config.has_bias(*projection);
                    wanted.then(|| float(&name, &[config.shape(*projection)[0]])).transpose()
                });
                let norms = config.norms().map(|norm| {
                    let name = format!("{}.weight", config.norm_module(layer, norm));
                    Ok((norm, float(&name, &[config.norm_features(norm)])?))
                });
                Ok(LayerPlan {
                    norms: norms.collect::<Result<_>>()?,
                    weights: weights.collect::<Result<_>>()?,
                    biases: biases.collect::<Result<_>>()?,
                })
            })
            .collect::<Result<_>>()?;
        let head = (!config.tied_embeddings).then(|| table("lm_head.weight")).transpose()?;
        Ok(Self {
            layers,
            embedding: table("model.embed_tokens.weight")?,
            final_norm: float("model.norm.weight", &[config.hidden_size])?,
            head,
        })
    }

    /// All tensors that will be read.
    pub(crate) fn tensors(&self) -> Vec<Tensor<'a>> {
        let mut tensors = vec![self.embedding, self.final_norm];
        tensors.extend(self.head);
        for layer in &self.layers {
            tensors.extend(layer.norms.iter().map(|(_, tensor)| *tensor));
            tensors.extend(layer.biases.iter().flatten());
            for weight in &layer.weights {
                match weight {
                    WeightPlan::Dense(tensor) | WeightPlan::Quantise(tensor, _) => tensors.push(*tensor),
                    WeightPlan::Stored(stored) | WeightPlan::Widen(stored) => {
                        tensors.extend(stored.tensors())
                    }
                }
            }
        }
        tensors
    }

    /// Tensors of the folder that nothing reads, sorted.
    pub(crate) fn unused(&self, files: &ModelFiles) -> Vec<String> {
        let tensors = self.tensors();
        let used: BTreeSet<&str> = tensors.iter().map(Tensor::name).collect();
        files.names().filter(|name| !used.contains(name)).map(str::to_owned).collect()
    }

    /// Refuses a base that cannot be read in parts: one without a matrix in 4 bits, or whose numbers lie in a GGUF file.
    pub(crate) fn check_shard(&self, folder: &Path) -> Result<()> {
        let base = || folder.to_owned();
        if folder.is_file() {
            return Err(Error::ShardOfGguf { file: base() });
        }
        let mut weights = self.layers.iter().flat_map(|layer| &layer.weights);
        match weights.any(|weight| weight.packed().is_some()) {
            true => Ok(()),
            false => Err(Error::ShardNeedsNf4 { folder: base() }),
        }
    }

    /// What each of `parts` members that share the base will take of it in memory.
    pub(crate) fn shared_memory(&self, config: &ModelConfig, parts: usize) -> MemoryUse {
        let mut memory = self.memory(config, false);
        let mut longest = 0;
        for layer in &self.layers {
            let packed: Vec<_> = layer.weights.iter().filter_map(WeightPlan::packed).collect();
            let cut = Cut::new(&packed, parts);
            longest = longest.max(cut.bytes());
            let maps = usize::from(packed.iter().any(|shape| shape.options.double));
            memory.linear_bytes -= PackedLayer::bytes_for(&packed);
            memory.linear_bytes += cut.part_bytes() + maps * size_of::<[f32; 256]>();
        }
        memory.slot_bytes = 2 * longest;
        memory
    }

    /// What the base will take in memory, its matrices that are not quantised as f32 or, with `half_matrices`, as bf16.
    pub(crate) fn memory(&self, config: &ModelConfig, half_matrices: bool) -> MemoryUse {
        let number = if half_matrices { 2 } else { 4 };
        let table =
            |tensor: &Tensor<'_>| tensor.elements() * if tensor.dtype() == Dtype::BF16 { 2 } else { 4 };
        let mut memory = MemoryUse {
            linear_bytes: 0,
            embedding_bytes: table(&self.embedding),
            head_bytes: self.head.as_ref().map_or(0, table),
            other_bytes: 4 * self.final_norm.elements(),
            slot_bytes: 0,
        };
        for layer in &self.layers {
            let packed: Vec<_> = layer.weights.iter().filter_map(WeightPlan::packed).collect();
            memory.linear_bytes += PackedLayer::bytes_for(&packed);
            for (projection, weight) in config.projections().iter().zip(&layer.weights) {
                if weight.packed().is_none() {
                    let [out, input] = config.shape(*projection);
                    memory.linear_bytes += number * out * input;
                }
            }
            let biases: usize = layer.biases.iter().flatten().map(Tensor::elements).sum();
            let norms: usize = layer.norms.iter().map(|(_, tensor)| tensor.elements()).sum();
            memory.other_bytes += 4 * (norms + biases);
        }
        memory
    }
}
