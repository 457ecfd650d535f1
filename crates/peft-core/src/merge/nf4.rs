//! A merged model in 4-bit NormalFloat, in the layout of bitsandbytes.

use std::{collections::HashMap, fs, os::unix::fs::PermissionsExt, path::Path};

use super::{
    FoldedModel, FoldedTensor, MergeOptions, MergeProgress, MergeReport, Written, before_and_after,
    partial_name, report::Distances, shard::unwritable, source,
};
use crate::{
    error::{Error, Origin, Result},
    model::{ModuleKind, export::torch_name},
    quant::{
        Nf4Options, PackedLayer, PackedShape,
        bitsandbytes::{self, OwnedTensor},
        nf4,
    },
};

/// As torch names what the decoder's weights are computed in.
pub(super) fn compute_dtype(model: &FoldedModel<'_>) -> Result<&'static str> {
    let linear = linear_weights(model);
    let first = model.tensors()?.into_iter().find(|tensor| linear.contains(&tensor.name));
    Ok(first.map_or("float32", |tensor| torch_name(tensor.dtype)))
}

fn linear_weights(model: &FoldedModel<'_>) -> Vec<String> {
    let modules = model.config().modules().into_iter().filter(|module| module.kind == ModuleKind::Linear);
    modules.map(|module| format!("{}.weight", module.path)).collect()
}

/// Quantises one matrix; none where a number is infinite or none.
pub(super) fn quantise(values: &[f32], shape: PackedShape) -> Option<PackedLayer> {
    let mut packed = PackedLayer::new(&[shape]);
    let mut scales = vec![0.0; nf4::blocks(values.len(), shape.options.block_size)];
    if !nf4::quantise(values, shape.options.block_size, packed.parts_mut(0).codes, &mut scales) {
        return None;
    }
    packed.set_scales(0, &scales);
    Some(packed)
}

pub(super) fn write(
    model: &FoldedModel<'_>,
    options: &MergeOptions,
    nf4: Nf4Options,
    tensors: &[FoldedTensor],
    report: &mut MergeReport,
    progress: &mut MergeProgress<'_>,
) -> Result<Vec<Written>> {
    if !nf4::is_block_size(nf4.block_size) {
        return Err(Error::BlockSize { block_size: nf4.block_size });
    }
    let linear = linear_weights(model);
    let total = tensors.iter().map(|tensor| tensor.numbers() as u64).sum();
    let mut done = 0;
    let mut written = Vec::new();
    let (mut shard, mut bytes): (Vec<OwnedTensor>, u64) = (Vec::new(), 0);
    for tensor in tensors {
        let new = if linear.contains(&tensor.name) {
            quantised(model, options, nf4, tensor, report)?
        } else {
            vec![as_it_is(model, options, tensor, report)?]
        };
        let size: u64 = new.iter().map(|tensor| tensor.bytes.len() as u64).sum();
        if bytes > 0 && bytes + size > options.shard_bytes {
            written.push(write_shard(&options.out, written.len(), std::mem::take(&mut shard))?);
            bytes = 0;
        }
        bytes += size;
        shard.extend(new);
        done += tensor.numbers() as u64;
        progress(done, total);
    }
    written.push(write_shard(&options.out, written.len(), shard)?);
    Ok(written)
}

fn quantised(
    model: &FoldedModel<'_>,
    options: &MergeOptions,
    nf4: Nf4Options,
    tensor: &FoldedTensor,
    report: &mut MergeReport,
) -> Result<Vec<OwnedTensor>> {
    let [rows, columns] = *tensor.shape else {
        return Err(Error::WrongShape {
            origin: Origin::Base,
            file: options.base.clone(),
            tensor: tensor.name.clone(),
            found: tensor.shape.clone(),
            expected: vec![0, 0],
        });
    };
    if let Some(parts) = model.stored_parts(tensor)? {
        return Ok(parts);
    }
    let (before, after) = before_and_after(model, options, tensor)?;
    let shape = PackedShape { rows, columns, options: nf4 };
    let Some(packed) = quantise(&after, shape) else {
        let (file, tensor) = (options.base.clone(), tensor.name.clone());
        return Err(Error::NonFinite { origin: Origin::Base, file, tensor });
    };
    let view = packed.view(0);
    let mut kept = vec![0.0; after.len()];
    view.write_f32(0, &mut kept);
    let mut distances = Distances::default();
    distances.add(&before, &after, &kept);
    report.tensors.push(distances.report(&tensor.name));
    Ok(bitsandbytes::to_tensors(&tensor.name, &view, torch_name(tensor.dtype)))
}

/// A tensor that stays a float: the base's bytes, or folded and rounded to the base's dtype.
fn as_it_is(
    model: &FoldedModel<'_>,
    options: &MergeOptions,
    tensor: &FoldedTensor,
    report: &mut MergeReport,
) -> Result<OwnedTensor> {
    let bytes = match model.raw(&source(tensor, model))? {
        Some(raw) => {
            let mut bytes = vec![0; raw.bytes()];
            raw.read_bytes(&mut bytes, &mut |_| {})?;
            bytes
        }
        None => {
            let (before, after) = before_and_after(model, options, tensor)?;
            let bytes = super::to_bytes(tensor.dtype, &after);
            let mut distances = Distances::default();
            distances.add(&before, &after, &super::from_bytes(tensor.dtype, &bytes));
            report.tensors.push(distances.report(&tensor.name));
            bytes
        }
    };
    Ok(OwnedTensor { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone(), bytes })
}

fn write_shard(out: &Path, index: usize, tensors: Vec<OwnedTensor>) -> Result<Written> {
    let partial = partial_name(out, index);
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor));
    safetensors::serialize_to_file(views, Some(metadata), &partial)
        .map_err(|error| match error {
            safetensors::SafeTensorError::IoError(source) => source,
            other => std::io::Error::other(other),
        })
        // The library's temporary file is its owner's alone; a model is not.
        .and_then(|()| fs::set_permissions(&partial, fs::Permissions::from_mode(0o644)))
        .map_err(|source| unwritable(&partial, source))?;
    let tensors = tensors.iter().map(|tensor| (tensor.name.clone(), tensor.bytes.len() as u64)).collect();
    Ok(Written { partial, tensors })
}
