//! Compares adapters number by number.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, ensure};
use safetensors::{Dtype, SafeTensors};

/// The tensors of an adapter folder, by name; they must be f32.
pub fn read(folder: &Path) -> anyhow::Result<BTreeMap<String, Vec<f32>>> {
    let path = folder.join("adapter_model.safetensors");
    let bytes = fs::read(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in SafeTensors::deserialize(&bytes)?.iter() {
        ensure!(view.dtype() == Dtype::F32, "`{name}` is {:?}, not f32", view.dtype());
        let (numbers, _) = view.data().as_chunks::<4>();
        tensors.insert(name.to_owned(), numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect());
    }
    ensure!(!tensors.is_empty(), "`{}` holds no tensor", path.display());
    Ok(tensors)
}

/// Largest difference of any two numbers that belong together.
///
/// # Errors
/// If the adapters do not hold the same tensors of the same sizes.
pub fn largest_difference(one: &Path, other: &Path) -> anyhow::Result<f32> {
    let (one, other) = (read(one)?, read(other)?);
    ensure!(one.keys().eq(other.keys()), "the adapters hold different tensors");
    let mut largest = 0f32;
    for (name, values) in &one {
        let others = &other[name];
        ensure!(values.len() == others.len(), "`{name}` has different sizes");
        for (a, b) in values.iter().zip(others) {
            let difference = (a - b).abs();
            ensure!(difference.is_finite(), "`{name}` holds numbers that are not finite");
            largest = largest.max(difference);
        }
    }
    Ok(largest)
}

/// Whether two adapters hold the same bits.
pub fn same_bits(one: &Path, other: &Path) -> anyhow::Result<bool> {
    let bits = |folder: &Path| -> anyhow::Result<BTreeMap<String, Vec<u32>>> {
        let tensors = read(folder)?;
        Ok(tensors
            .into_iter()
            .map(|(name, values)| (name, values.into_iter().map(f32::to_bits).collect()))
            .collect())
    };
    Ok(bits(one)? == bits(other)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::reference;

    #[test]
    fn reference_adapters_differ_from_each_other_and_not_from_themselves() {
        let (initial, last) =
            (reference("training/lora/adapter_initial"), reference("training/lora/adapter_final"));
        assert!(same_bits(&initial, &initial).unwrap());
        assert!(!same_bits(&initial, &last).unwrap());
        assert!(largest_difference(&initial, &last).unwrap() > 0.0);
    }
}
