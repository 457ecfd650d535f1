//! One LoRA adapter out of several, weighted: as PEFT's `add_weighted_adapter`.
//!
//! `linear` sums the factors: A = Σ ±√|w s| Aᵢ, B = Σ √|w s| Bᵢ (all ranks must be one; products of different adapters' factors come
//! along, as in PEFT). `cat` puts the factors side by side, which is exactly the weighted sum of the changes. `svd` is
//! that sum, cut to a rank at its smallest singular values.

use std::{collections::BTreeSet, path::PathBuf};

use serde_json::{Value, json};

use super::{
    keys::Key,
    stored::{StoredAdapter, StoredTensor},
    svd,
};
use crate::{
    error::{Error, Result},
    use_error::UseError,
};

const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";

/// How adapters become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Combination {
    /// Sum of factors.
    Linear,
    /// Factors side by side: ranks add up.
    Cat,
    /// The sum of changes, cut to this rank, or to the largest of the ranks.
    Svd(Option<usize>),
}

/// A module's factors, as f32 matrices.
struct Factors<'a> {
    a: &'a StoredTensor,
    b: &'a StoredTensor,
    rank: usize,
    /// The adapter's weight times its scale.
    weight: f64,
}

/// Combines adapters with a weight for each.
///
/// # Errors
/// Adapters of other methods than plain LoRA, for bases known to differ, of shapes that do not go together, or (`linear`)
/// of several ranks.
pub fn combine(adapters: &[(StoredAdapter, f64)], how: Combination) -> Result<StoredAdapter> {
    let Some((first, _)) = adapters.first() else { return Err(no("there is none")) };
    let mut ranks = Vec::new();
    for (adapter, weight) in adapters {
        check(adapter)?;
        if !weight.is_finite() {
            return Err(no(format!("the weight of `{}` is {weight}", adapter.folder.display())));
        }
        let own = adapter.modules_with(A).into_iter().map(|module| adapter.lora_scale(module));
        let own = own.collect::<Result<Vec<_>>>()?;
        ranks.push(own.into_iter().map(|(rank, _)| rank).max().unwrap_or(0));
        if let (Some(known), Some(other)) = (&first.base_hash, &adapter.base_hash)
            && known != other
        {
            let (a, b) = (first.folder.display(), adapter.folder.display());
            return Err(no(format!("`{a}` and `{b}` were trained on different bases")));
        }
    }
    let largest = ranks.iter().copied().max().unwrap_or(1);
    let rank = match how {
        Combination::Linear if ranks.iter().any(|rank| *rank != largest) => {
            let ranks = ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(no(format!("`linear` needs one rank, there are {ranks}; take `cat` or `svd`")));
        }
        Combination::Linear => largest,
        Combination::Cat => ranks.iter().sum(),
        Combination::Svd(rank) => rank.unwrap_or(largest),
    };
    let modules: BTreeSet<&str> = adapters.iter().flat_map(|(adapter, _)| adapter.modules_with(A)).collect();
    let mut combined = StoredAdapter {
        folder: PathBuf::new(),
        config: first.config.clone(),
        tensors: Default::default(),
        foreign_names: Vec::new(),
        base_hash: adapters.iter().find_map(|(adapter, _)| adapter.base_hash.clone()),
    };
    for module in &modules {
        let factors =
            adapters.iter().filter_map(|(adapter, weight)| of(adapter, module, *weight).transpose());
        let factors = factors.collect::<Result<Vec<_>>>()?;
        let (a, b) = match how {
            Combination::Linear => linear(module, &factors)?,
            Combination::Cat => cat(module, &factors, rank)?,
            Combination::Svd(_) => truncated(module, &factors, rank)?,
        };
        let key = |suffix: &str| Key { module: (*module).to_owned(), suffix: suffix.to_owned() };
        combined.tensors.insert(key(A), a);
        combined.tensors.insert(key(B), b);
    }
    for (key, value) in [
        ("r", json!(rank)),
        ("lora_alpha", json!(rank)),
        ("use_rslora", json!(false)),
        ("rank_pattern", json!({})),
        ("alpha_pattern", json!({})),
        ("target_modules", json!(modules)),
        ("layers_to_transform", Value::Null),
        ("layers_pattern", Value::Null),
        ("exclude_modules", Value::Null),
        ("init_lora_weights", json!(true)),
    ] {
        combined.config.insert(key.to_owned(), value);
    }
    Ok(combined)
}

fn no(reason: impl Into<String>) -> Error {
    UseError::NotCombinable { reason: reason.into() }.into()
}

/// Plain LoRA on linear layers, and nothing besides.
fn check(adapter: &StoredAdapter) -> Result<()> {
    let name = adapter.folder.display();
    if adapter.method() != "LORA" {
        return Err(no(format!("`{name}` is of method {}; only LoRA has a sum", adapter.method())));
    }
    if adapter.config.get("use_dora").and_then(Value::as_bool) == Some(true) {
        return Err(no(format!("`{name}` is DoRA, whose magnitudes have no sum")));
    }
    if let Some(other) = adapter.tensors.keys().find(|key| key.suffix != A && key.suffix != B) {
        return Err(no(format!("`{name}` holds `{}`, which has no sum", other.peft())));
    }
    if adapter.tensors.is_empty() {
        return Err(no(format!("`{name}` holds no tensor")));
    }
    Ok(())
}

fn of<'a>(adapter: &'a StoredAdapter, module: &str, weight: f64) -> Result<Option<Factors<'a>>> {
    let (Some(a), Some(b)) = (adapter.tensor(module, A), adapter.tensor(module, B)) else {
        return match adapter.tensor(module, A).or(adapter.tensor(module, B)) {
            Some(_) => Err(no(format!("`{}` has one factor of `{module}` only", adapter.folder.display()))),
            None => Ok(None),
        };
    };
    let (rank, scale) = adapter.lora_scale(module)?;
    if a.shape.len() != 2 || b.shape.len() != 2 || a.shape[0] != rank || b.shape[1] != rank {
        let (name, a, b) = (adapter.folder.display(), &a.shape, &b.shape);
        return Err(no(format!(
            "`{name}` has factors of shapes {a:?} and {b:?} on `{module}`, not of rank {rank}"
        )));
    }
    Ok(Some(Factors { a, b, rank, weight: weight * scale }))
}

/// Inputs and outputs of the module; all factors must agree.
fn size(module: &str, factors: &[Factors<'_>]) -> Result<(usize, usize)> {
    let of = |factors: &Factors<'_>| (factors.a.shape[1], factors.b.shape[0]);
    let Some(first) = factors.first().map(of) else { return Err(no(format!("nothing adapts `{module}`"))) };
    match factors.iter().map(of).find(|other| *other != first) {
        None => Ok(first),
        Some(other) => Err(no(format!("`{module}` is {first:?} in one and {other:?} in another"))),
    }
}

fn linear(module: &str, factors: &[Factors<'_>]) -> Result<(StoredTensor, StoredTensor)> {
    let (input, output) = size(module, factors)?;
    let rank = factors[0].rank;
    if factors.iter().any(|factors| factors.rank != rank) {
        return Err(no(format!("`linear` needs one rank; `{module}` has several")));
    }
    let (mut a, mut b) = (vec![0f32; rank * input], vec![0f32; output * rank]);
    for factors in factors {
        let root = factors.weight.abs().sqrt();
        add(&mut a, &factors.a.values, (root * factors.weight.signum()) as f32);
        add(&mut b, &factors.b.values, root as f32);
    }
    Ok((StoredTensor::f32([rank, input], a), StoredTensor::f32([output, rank], b)))
}

fn add(to: &mut [f32], from: &[f32], weight: f32) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += weight * from);
}

/// Ranks that a module lacks are left 0.
fn cat(module: &str, factors: &[Factors<'_>], rank: usize) -> Result<(StoredTensor, StoredTensor)> {
    let (input, output) = size(module, factors)?;
    let (mut a, mut b) = (vec![0f32; rank * input], vec![0f32; output * rank]);
    let mut first = 0;
    for factors in factors {
        let own = &mut a[first * input..][..factors.rank * input];
        add(own, &factors.a.values, factors.weight as f32);
        for (row, values) in factors.b.values.chunks_exact(factors.rank).enumerate() {
            b[row * rank + first..][..factors.rank].copy_from_slice(values);
        }
        first += factors.rank;
    }
    Ok((StoredTensor::f32([rank, input], a), StoredTensor::f32([output, rank], b)))
}

fn truncated(module: &str, factors: &[Factors<'_>], rank: usize) -> Result<(StoredTensor, StoredTensor)> {
    let (input, output) = size(module, factors)?;
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for factors in factors {
        for column in 0..factors.rank {
            let values = factors.b.values.iter().skip(column).step_by(factors.rank);
            left.push(values.map(|value| f64::from(*value)).collect());
            let row = &factors.a.values[column * input..][..input];
            right.push(row.iter().map(|value| factors.weight * f64::from(*value)).collect());
        }
    }
    let (u, s, v) = svd::of_product(left, right);
    let (mut a, mut b) = (vec![0f32; rank * input], vec![0f32; output * rank]);
    for (index, ((u, s), v)) in u.iter().zip(&s).zip(&v).take(rank).enumerate() {
        a[index * input..][..input].iter_mut().zip(v).for_each(|(to, value)| *to = *value as f32);
        for (row, value) in u.iter().enumerate() {
            b[row * rank + index] = (value * s) as f32;
        }
    }
    Ok((StoredTensor::f32([rank, input], a), StoredTensor::f32([output, rank], b)))
}
