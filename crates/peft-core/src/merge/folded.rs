//! A base as it would be with an adapter folded in, tensor by tensor.

use std::path::Path;

use safetensors::tensor::Dtype;

use super::fold::{Folder, Part};
use crate::{
    error::Result,
    generate::LoadedAdapter,
    model::{
        ModelConfig,
        weights::{ModelFiles, Tensor},
    },
    quant::{
        PackedLayer,
        bitsandbytes::{self, OwnedTensor, StoredWeight},
    },
};

/// Parts of a pre-quantised weight, behind its name.
const QUANTISED_PARTS: &[&str] =
    &[".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"];

/// A tensor of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct FoldedTensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it is stored as; of a pre-quantised weight, what it was.
    pub dtype: Dtype,
    /// Whether the adapter changes it.
    pub changed: bool,
    /// Whether it is pre-quantised.
    pub quantised: bool,
}

impl FoldedTensor {
    /// Numbers that it holds.
    pub fn numbers(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A base as it would be with an adapter folded in. One tensor at a time is read.
pub struct FoldedModel<'a> {
    config: ModelConfig,
    files: ModelFiles,
    folder: Option<Folder<'a>>,
}

impl<'a> FoldedModel<'a> {
    /// Opens a base, and the adapter that is folded in.
    ///
    /// # Errors
    /// The base does not hold together, or no weight can hold what the adapter does.
    pub fn open(base: &Path, adapter: Option<&'a LoadedAdapter>, threads: usize) -> Result<Self> {
        let config = ModelConfig::load(base)?;
        let files = ModelFiles::open(base)?;
        let folder = adapter.map(|adapter| Folder::new(adapter, &config, threads)).transpose()?;
        Ok(Self { config, files, folder })
    }

    /// What the model is made of.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether embedding and head, which are one tensor in the base, are two in the folded model.
    pub fn splits_tied_head(&self) -> bool {
        self.config.tied_embeddings && self.folder.as_ref().is_some_and(Folder::splits_tied_head)
    }

    /// All tensors, in the order of their names.
    ///
    /// # Errors
    /// A pre-quantised weight lacks a part.
    pub fn tensors(&self) -> Result<Vec<FoldedTensor>> {
        let is_part = |name: &str| {
            QUANTISED_PARTS.iter().any(|part| {
                name.strip_suffix(part).is_some_and(|weight| bitsandbytes::is_stored(&self.files, weight))
            })
        };
        let names = self.files.names().filter(|name| !is_part(name));
        names.map(|name| self.tensor(name)).collect()
    }

    fn tensor(&self, name: &str) -> Result<FoldedTensor> {
        let changed = self.part(name).is_some();
        let name = name.to_owned();
        if let Some(stored) = self.stored(&name)? {
            let dtype = match stored.dtype() {
                "float32" => Dtype::F32,
                "float16" => Dtype::F16,
                _ => Dtype::BF16,
            };
            let shape = stored.shape();
            return Ok(FoldedTensor {
                name,
                shape: vec![shape.rows, shape.columns],
                dtype,
                changed,
                quantised: true,
            });
        }
        let tensor = self.files.tensor(&name)?;
        let (shape, dtype) = (tensor.shape().to_vec(), tensor.dtype());
        Ok(FoldedTensor { name, shape, dtype, changed, quantised: false })
    }

    /// The pre-quantised weight of that name.
    fn stored(&self, name: &str) -> Result<Option<StoredWeight<'_>>> {
        if !bitsandbytes::is_stored(&self.files, name) {
            return Ok(None);
        }
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let shape = self.config.modules().into_iter().find(|known| known.path == module);
        match shape {
            Some(module) => StoredWeight::open(&self.files, name, module.shape).map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn part(&self, name: &str) -> Option<Part> {
        self.folder.as_ref()?.part(name)
    }

    /// The file's own tensor, to be copied as it is; none where its numbers must be made.
    pub(super) fn raw(&self, tensor: &FoldedTensor) -> Result<Option<Tensor<'_>>> {
        if tensor.changed || tensor.quantised { Ok(None) } else { self.files.tensor(&tensor.name).map(Some) }
    }

    /// The parts of a pre-quantised weight that stays as it is, bit for bit; none where it must be made.
    pub(super) fn stored_parts(&self, tensor: &FoldedTensor) -> Result<Option<Vec<OwnedTensor>>> {
        let Some(stored) = self.stored(&tensor.name)?.filter(|_| !tensor.changed) else { return Ok(None) };
        let part = |part: Tensor<'_>| {
            let mut bytes = vec![0; part.bytes()];
            part.read_bytes(&mut bytes, &mut |_| {})?;
            Ok(OwnedTensor {
                name: part.name().to_owned(),
                dtype: part.dtype(),
                shape: part.shape().to_vec(),
                bytes,
            })
        };
        stored.tensors().map(part).collect::<Result<_>>().map(Some)
    }

    /// The numbers of the base, widened to f32.
    ///
    /// # Errors
    /// Unreadable, or not numbers.
    pub fn base(&self, tensor: &FoldedTensor) -> Result<Vec<f32>> {
        let mut values = vec![0.0; tensor.numbers()];
        match self.stored(&tensor.name)? {
            Some(stored) => {
                let mut packed = PackedLayer::new(&[stored.shape()]);
                stored.read_into(&mut packed, 0, &mut |_, _| {})?;
                packed.view(0).write_f32(0, &mut values);
            }
            None => self.files.tensor(&tensor.name)?.read_f32(&mut values, &mut |_| {})?,
        }
        Ok(values)
    }

    /// The numbers with the adapter folded in.
    ///
    /// # Errors
    /// As [`Self::base`].
    pub fn folded(&self, tensor: &FoldedTensor) -> Result<Vec<f32>> {
        let mut values = self.base(tensor)?;
        self.fold(tensor, &mut values)?;
        Ok(values)
    }

    /// Folds the adapter into numbers of this tensor.
    pub(super) fn fold(&self, tensor: &FoldedTensor, values: &mut [f32]) -> Result<()> {
        match (&self.folder, self.part(&tensor.name)) {
            (Some(folder), Some(part)) => folder.fold(part, values),
            _ => Ok(()),
        }
    }

    /// Takes the adapter out of numbers that it was folded into; none where they do not say what was there before: what it
    /// did is no sum and no product, or one with 0.
    ///
    /// # Errors
    /// Memory is short.
    pub fn unfolded(&self, tensor: &FoldedTensor, folded: &[f32]) -> Result<Option<Vec<f32>>> {
        if self.part(&tensor.name).is_none() {
            return Ok(Some(folded.to_vec()));
        }
        let mut of_zero = vec![0.0; folded.len()];
        self.fold(tensor, &mut of_zero)?;
        let without: Vec<f32> = if of_zero.iter().all(|value| *value == 0.0) {
            let mut of_one = vec![1.0; folded.len()];
            self.fold(tensor, &mut of_one)?;
            folded.iter().zip(&of_one).map(|(value, factor)| value / factor).collect()
        } else {
            folded.iter().zip(&of_zero).map(|(value, added)| value - added).collect()
        };
        // Only where folding it in again gives what was there was it right to take it out so.
        let mut again = without.clone();
        self.fold(tensor, &mut again)?;
        let largest = folded.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let close = |(again, folded): (&f32, &f32)| (again - folded).abs() <= 1e-5 * largest;
        Ok(again.iter().zip(folded).all(close).then_some(without))
    }
}
