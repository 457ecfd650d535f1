//! What a checkpoint holds, in memory.

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::manifest::{Key, MANIFEST, State};

/// A resumable point of training.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// The job.
    pub job: String,
    /// Attempt, step (updates applied), generation.
    pub key: Key,
    /// The adapter's files as PEFT knows them (`adapter_config.json`, `adapter_model.safetensors`), by
    /// name. Names are plain: letters, digits, `.`, `-`, `_`.
    pub files: Vec<(String, Bytes)>,
    /// Master parameters and moments.
    pub optimizer: Optimizer,
    /// Everything else.
    pub state: State,
}

impl Snapshot {
    /// The content of a file by its name.
    pub fn file(&self, name: &str) -> Option<&Bytes> {
        self.files.iter().find(|(other, _)| other == name).map(|(_, content)| content)
    }
}

/// AdamW's state, flat.
///
/// # Shapes
/// All three: `[trainable parameters]`, in the same order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Optimizer {
    /// The f32 master parameters.
    pub parameters: Vec<f32>,
    /// First moments.
    pub exp_avg: Vec<f32>,
    /// Second moments.
    pub exp_avg_sq: Vec<f32>,
}

/// The optimizer's file.
pub(crate) const OPTIMIZER: &str = "optimizer.safetensors";

const NAMES: [&str; 3] = ["parameters", "exp_avg", "exp_avg_sq"];

impl Optimizer {
    /// As the file `optimizer.safetensors`.
    pub(crate) fn to_bytes(&self) -> Result<Bytes, String> {
        let parts = [&self.parameters, &self.exp_avg, &self.exp_avg_sq];
        let lengths = parts.map(Vec::len);
        if lengths != [lengths[0]; 3] {
            let [parameters, first, second] = lengths;
            return Err(format!("{parameters} parameters, {first} first and {second} second moments"));
        }
        let mut tensors = Vec::with_capacity(parts.len());
        for (name, part) in NAMES.into_iter().zip(parts) {
            let view = TensorView::new(Dtype::F32, vec![part.len()], bytemuck::cast_slice(part));
            tensors.push((name, view.map_err(|error| error.to_string())?));
        }
        let bytes = safetensors::serialize(tensors, None).map_err(|error| error.to_string())?;
        Ok(Bytes::from(bytes))
    }

    /// Reads the file `optimizer.safetensors`.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
        let read = |name: &str| {
            let tensor = tensors.tensor(name).map_err(|error| error.to_string())?;
            if tensor.dtype() != Dtype::F32 || tensor.shape().len() != 1 {
                return Err(format!("`{name}` is {:?} {:?}, not flat f32", tensor.dtype(), tensor.shape()));
            }
            // As bytes: those of the file need not be aligned.
            let mut numbers = vec![0.0f32; tensor.shape()[0]];
            bytemuck::cast_slice_mut(&mut numbers).copy_from_slice(tensor.data());
            Ok(numbers)
        };
        let [parameters, exp_avg, exp_avg_sq] = NAMES.map(read);
        let read = Self { parameters: parameters?, exp_avg: exp_avg?, exp_avg_sq: exp_avg_sq? };
        if read.parameters.len() != read.exp_avg.len() || read.parameters.len() != read.exp_avg_sq.len() {
            return Err("parameters and moments differ in length".to_owned());
        }
        Ok(read)
    }
}

/// Whether a file of this name may lie in a checkpoint's folder beside the manifest.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    !name.is_empty() && !name.starts_with('.') && name.bytes().all(plain) && name != MANIFEST
}
