//! What an adapter changes, and how two differ.

use std::collections::BTreeSet;

use serde_json::Value;

use super::stored::{StoredAdapter, StoredTensor};
use crate::error::Result;

/// What LoRA changes in one module.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleChange {
    /// The module.
    pub module: String,
    /// Rows and columns of its weight.
    pub shape: [usize; 2],
    /// Rank.
    pub rank: usize,
    /// What B A is multiplied by.
    pub scale: f64,
    /// Frobenius norm of A.
    pub a_norm: f64,
    /// Frobenius norm of B.
    pub b_norm: f64,
    /// Frobenius norm of s B A: how far the weight moves.
    pub change_norm: f64,
}

/// What LoRA changes, module by module; empty for other methods.
///
/// # Errors
/// A setting is not what it should be.
pub fn module_changes(adapter: &StoredAdapter) -> Result<Vec<ModuleChange>> {
    let mut changes = Vec::new();
    for module in adapter.modules_with("lora_A.weight") {
        let Some((a, b)) = factors(adapter, module) else { continue };
        let (rank, scale) = adapter.lora_scale(module)?;
        changes.push(ModuleChange {
            module: module.to_owned(),
            shape: [b.shape[0], a.shape[1]],
            rank,
            scale,
            a_norm: norm(a),
            b_norm: norm(b),
            change_norm: scale.abs() * inner((a, b), (a, b)).max(0.0).sqrt(),
        });
    }
    Ok(changes)
}

/// A setting in which two adapters differ; null where one lacks it.
pub type SettingDifference = (String, Value, Value);

/// How two adapters differ.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Settings that are not the same.
    pub settings: Vec<SettingDifference>,
    /// Tensors that only the first has, under PEFT's names.
    pub only_first: Vec<String>,
    /// Tensors that only the second has.
    pub only_second: Vec<String>,
    /// Tensors of both that are of other shapes: name, shapes.
    pub shapes: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Tensors of both whose numbers differ: name, |a - b| / |b| by Frobenius norm.
    pub numbers: Vec<(String, f64)>,
    /// Tensors of both with the same numbers.
    pub same: usize,
    /// Cosine of the angle between the changes that two LoRA adapters make to the weights, all modules together: 1 for the
    /// same direction, 0 for nothing in common. None where there is no change to compare.
    pub cosine: Option<f64>,
}

impl Difference {
    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        self.settings.is_empty()
            && self.only_first.is_empty()
            && self.only_second.is_empty()
            && self.shapes.is_empty()
            && self.numbers.is_empty()
    }
}

/// Compares two adapters: settings, tensors, and what they do.
///
/// # Errors
/// A setting is not what it should be.
pub fn compare(first: &StoredAdapter, second: &StoredAdapter) -> Result<Difference> {
    let keys: BTreeSet<&String> = first.config.keys().chain(second.config.keys()).collect();
    let setting = |adapter: &StoredAdapter, key: &String| match adapter.config.get(key) {
        // Order means nothing in a list of modules.
        Some(Value::Array(list)) => {
            let mut list = list.clone();
            list.sort_by_key(Value::to_string);
            Value::Array(list)
        }
        Some(value) => value.clone(),
        None => Value::Null,
    };
    let settings = keys
        .into_iter()
        .map(|key| (key.clone(), setting(first, key), setting(second, key)))
        .filter(|(_, a, b)| a != b)
        .collect();
    let only = |own: &StoredAdapter, other: &StoredAdapter| -> Vec<String> {
        let missing = own.tensors.keys().filter(|key| !other.tensors.contains_key(key));
        missing.map(|key| key.peft()).collect()
    };
    let (mut shapes, mut numbers, mut same) = (Vec::new(), Vec::new(), 0);
    for (key, a) in &first.tensors {
        let Some(b) = second.tensors.get(key) else { continue };
        if a.shape != b.shape {
            shapes.push((key.peft(), a.shape.clone(), b.shape.clone()));
        } else if a.values == b.values {
            same += 1;
        } else {
            numbers.push((key.peft(), distance(&a.values, &b.values)));
        }
    }
    Ok(Difference {
        settings,
        only_first: only(first, second),
        only_second: only(second, first),
        shapes,
        numbers,
        same,
        cosine: cosine(first, second)?,
    })
}

/// |a - b| / |b|.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f64 {
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    let length: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
    match (difference == 0.0, length == 0.0) {
        (true, _) => 0.0,
        (false, true) => f64::INFINITY,
        (false, false) => (difference / length).sqrt(),
    }
}

fn cosine(first: &StoredAdapter, second: &StoredAdapter) -> Result<Option<f64>> {
    let (mut product, mut one, mut other) = (0.0, 0.0, 0.0);
    for module in first.modules_with("lora_A.weight") {
        let Some(a) = factors(first, module) else { continue };
        let scale = first.lora_scale(module)?.1;
        one += scale * scale * inner(a, a);
        let Some(b) = factors(second, module) else { continue };
        if a.0.shape[1] == b.0.shape[1] && a.1.shape[0] == b.1.shape[0] {
            product += scale * second.lora_scale(module)?.1 * inner(a, b);
        }
    }
    for module in second.modules_with("lora_A.weight") {
        let Some(b) = factors(second, module) else { continue };
        other += second.lora_scale(module)?.1.powi(2) * inner(b, b);
    }
    let length = (one * other).sqrt();
    Ok((length > 0.0).then(|| product / length))
}

/// A and B of a module, where both are matrices of one rank.
fn factors<'a>(adapter: &'a StoredAdapter, module: &str) -> Option<(&'a StoredTensor, &'a StoredTensor)> {
    let (a, b) = (adapter.tensor(module, "lora_A.weight")?, adapter.tensor(module, "lora_B.weight")?);
    let fits = a.shape.len() == 2 && b.shape.len() == 2 && a.shape[0] == b.shape[1] && a.shape[1] > 0;
    fits.then_some((a, b))
}

fn norm(tensor: &StoredTensor) -> f64 {
    tensor.values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

/// ⟨B₁ A₁, B₂ A₂⟩ = Σᵢⱼ (B₁ᵀ B₂)ᵢⱼ (A₁ A₂ᵀ)ᵢⱼ: no matrix of the weight's size is made.
fn inner(first: (&StoredTensor, &StoredTensor), second: (&StoredTensor, &StoredTensor)) -> f64 {
    let ((a1, b1), (a2, b2)) = (first, second);
    let (r1, r2, input) = (a1.shape[0], a2.shape[0], a1.shape[1]);
    let mut of_b = vec![0.0; r1 * r2];
    for (one, two) in b1.values.chunks_exact(r1.max(1)).zip(b2.values.chunks_exact(r2.max(1))) {
        for (i, one) in one.iter().enumerate() {
            for (j, two) in two.iter().enumerate() {
                of_b[i * r2 + j] += f64::from(*one) * f64::from(*two);
            }
        }
    }
    let mut sum = 0.0;
    for (i, one) in a1.values.chunks_exact(input).enumerate() {
        for (j, two) in a2.values.chunks_exact(input).enumerate() {
            let of_a: f64 = one.iter().zip(two).map(|(one, two)| f64::from(*one) * f64::from(*two)).sum();
            sum += of_a * of_b[i * r2 + j];
        }
    }
    sum
}
