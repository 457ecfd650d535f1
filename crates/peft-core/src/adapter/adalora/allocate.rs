//! AdaLoRA's budget: what happens once a step, with the reduced gradient, the same on every rank.
//!
//! State, flat: for every parameter the smoothed importance `|w g|`, then the smoothed uncertainty, both of the layout's
//! length; then for every triplet whether it is kept, in the order of E in the layout; then one number: whether a
//! pattern was ever chosen.

use super::{A, AdaLoraConfig, B, E};
use crate::adapter::{
    layout::{ParameterEntry, ParameterLayout},
    method::{SavedTensor, StepHook},
};

/// The three tensors of a module.
struct Triplet<'a> {
    a: &'a ParameterEntry,
    b: &'a ParameterEntry,
    e: &'a ParameterEntry,
}

fn triplets(layout: &ParameterLayout) -> impl Iterator<Item = Triplet<'_>> {
    layout.modules().iter().filter(|adapted| adapted.branch).filter_map(|adapted| {
        let of = |suffix: &str| layout.tensors(adapted).iter().find(|entry| entry.suffix == suffix);
        Some(Triplet { a: of(A)?, b: of(B)?, e: of(E)? })
    })
}

fn ranks(layout: &ParameterLayout) -> usize {
    triplets(layout).map(|triplet| triplet.e.range.len()).sum()
}

/// Numbers of the state.
pub(super) fn state_length(layout: &ParameterLayout) -> usize {
    2 * layout.len() + ranks(layout) + 1
}

/// Adds the gradient of `weight * mean over all A and B of |P Pᵀ - I|` (Frobenius; P is A, or B transposed) to `gradient`,
/// which times the step's scale is that of the mean loss.
pub(super) fn add_orthogonality(weight: f64, step: &StepHook<'_>, parameters: &[f32], gradient: &mut [f32]) {
    let count = 2 * triplets(step.layout).filter(|triplet| triplet.a.rows() > 0).count();
    if weight == 0.0 || count == 0 {
        return;
    }
    let factor = weight / count as f64 / step.scale;
    for Triplet { a, b, .. } in triplets(step.layout) {
        let (r, input, output) = (a.rows(), a.columns(), b.rows());
        // Rows of A lie one after another; those of B transposed are columns of B.
        let one = |values: &[f32], row: usize, column: usize| f64::from(values[row * input + column]);
        orthogonal(r, input, &parameters[a.range.clone()], one, factor, |row, column, value| {
            gradient[a.range.start + row * input + column] += value as f32;
        });
        let one = |values: &[f32], row: usize, column: usize| f64::from(values[column * r + row]);
        orthogonal(r, output, &parameters[b.range.clone()], one, factor, |row, column, value| {
            gradient[b.range.start + column * r + row] += value as f32;
        });
    }
}

/// Gradient of `factor |P Pᵀ - I|` with P `[r, n]`: `factor 2 (P Pᵀ - I) P / |P Pᵀ - I|`.
fn orthogonal(
    r: usize,
    n: usize,
    values: &[f32],
    at: impl Fn(&[f32], usize, usize) -> f64,
    factor: f64,
    mut add: impl FnMut(usize, usize, f64),
) {
    let mut product = vec![0.0_f64; r * r];
    for row in 0..r {
        for other in 0..=row {
            let sum: f64 = (0..n).map(|column| at(values, row, column) * at(values, other, column)).sum();
            let sum = sum - if row == other { 1.0 } else { 0.0 };
            product[row * r + other] = sum;
            product[other * r + row] = sum;
        }
    }
    let norm = product.iter().map(|value| value * value).sum::<f64>().sqrt();
    if norm == 0.0 {
        return;
    }
    for row in 0..r {
        for column in 0..n {
            let sum: f64 = (0..r).map(|other| product[row * r + other] * at(values, other, column)).sum();
            add(row, column, 2.0 * factor * sum / norm);
        }
    }
}

/// The budget after `step` updates, and whether triplets are pruned to it now.
pub fn budget(config: &AdaLoraConfig, step: u64, initial: usize, target: usize) -> (usize, bool) {
    let (begin, end) = (config.tinit, config.total_step - config.tfinal);
    if step <= begin {
        (initial, false)
    } else if step > end {
        (target, true)
    } else {
        let left = 1.0 - (step - begin) as f64 / (end - begin) as f64;
        let budget = ((initial - target) as f64 * left.powi(3) + target as f64) as usize;
        (budget, step.is_multiple_of(config.delta_t))
    }
}

/// Importance, pruning, and holding pruned triplets at 0, as PEFT's `update_and_allocate(step)` after an update.
pub(super) fn after_step(
    config: &AdaLoraConfig,
    step: &StepHook<'_>,
    parameters: &mut [f32],
    gradient: &[f32],
    state: &mut [f32],
) {
    let layout = step.layout;
    let length = layout.len();
    let (importance, rest) = state.split_at_mut(length);
    let (uncertainty, rest) = rest.split_at_mut(length);
    let (kept, chosen) = rest.split_at_mut(ranks(layout));
    let end = config.total_step - config.tfinal;
    if step.step > end {
        return hold(layout, parameters, kept);
    }
    if step.step < end {
        update_importance(config, step, parameters, gradient, importance, uncertainty);
    }
    let initial = ranks(layout);
    let modules = triplets(layout).count();
    let (budget, prune) = budget(config, step.step, initial, config.target_r * modules);
    if prune || step.step == end {
        prune_to(layout, budget, initial, importance, uncertainty, kept);
        chosen[0] = 1.0;
        hold(layout, parameters, kept);
    }
}

/// In f32 and in PEFT's order of operations, so that near ties fall alike.
fn update_importance(
    config: &AdaLoraConfig,
    step: &StepHook<'_>,
    parameters: &[f32],
    gradient: &[f32],
    importance: &mut [f32],
    uncertainty: &mut [f32],
) {
    let (beta1, beta2) = (config.beta1 as f32, config.beta2 as f32);
    let (rest1, rest2) = ((1.0 - config.beta1) as f32, (1.0 - config.beta2) as f32);
    let scale = step.scale as f32;
    for Triplet { a, b, e } in triplets(step.layout) {
        for at in [a, b, e].into_iter().flat_map(|entry| entry.range.clone()) {
            let sensitivity = (parameters[at] * (gradient[at] * scale)).abs();
            importance[at] = beta1 * importance[at] + rest1 * sensitivity;
            let apart = (sensitivity - importance[at]).abs();
            uncertainty[at] = beta2 * uncertainty[at] + rest2 * apart;
        }
    }
}

/// Keeps the `budget` most important triplets: those above the score of rank `initial - budget` from below.
fn prune_to(
    layout: &ParameterLayout,
    budget: usize,
    initial: usize,
    importance: &[f32],
    uncertainty: &[f32],
    kept: &mut [f32],
) {
    let score = |at: usize| importance[at] * uncertainty[at];
    let mut scores = Vec::with_capacity(kept.len());
    for Triplet { a, b, e } in triplets(layout) {
        let (r, input, output) = (a.rows(), a.columns(), b.rows());
        for row in 0..r {
            let a: f32 = (0..input).map(|column| score(a.range.start + row * input + column)).sum();
            let b: f32 = (0..output).map(|column| score(b.range.start + column * r + row)).sum();
            let vectors = a / input as f32 + b / output as f32;
            scores.push(score(e.range.start + row) + vectors);
        }
    }
    let pruned = initial - budget.min(initial);
    if pruned == 0 {
        return kept.fill(1.0);
    }
    let mut sorted = scores.clone();
    sorted.sort_by(f32::total_cmp);
    let threshold = sorted[pruned - 1];
    for (kept, score) in kept.iter_mut().zip(&scores) {
        *kept = if *score <= threshold { 0.0 } else { 1.0 };
    }
}

/// Sets E of pruned triplets to 0.
fn hold(layout: &ParameterLayout, parameters: &mut [f32], kept: &[f32]) {
    let places = triplets(layout).flat_map(|triplet| triplet.e.range.clone());
    for (at, kept) in places.zip(kept) {
        if *kept == 0.0 {
            parameters[at] = 0.0;
        }
    }
}

/// The triplets that are kept, by `module.lora_E` and sorted as PEFT writes them; none where none was ever pruned.
pub(super) fn pattern(layout: &ParameterLayout, state: &[f32]) -> Option<Vec<(String, Vec<bool>)>> {
    if state.len() != state_length(layout) || state[state.len() - 1] == 0.0 {
        return None;
    }
    let mut kept = state[2 * layout.len()..].iter();
    let mut pattern: Vec<(String, Vec<bool>)> = triplets(layout)
        .map(|triplet| {
            let own = kept.by_ref().take(triplet.e.range.len()).map(|kept| *kept != 0.0).collect();
            (format!("{}.{E}", triplet.e.module), own)
        })
        .collect();
    pattern.sort();
    Some(pattern)
}

/// The tensors as they are saved: without what was pruned.
pub(super) fn cut(layout: &ParameterLayout, parameters: &[f32], state: &[f32]) -> Vec<SavedTensor> {
    let pattern = pattern(layout, state);
    let kept_of = |entry: &ParameterEntry| {
        let name = format!("{}.{E}", entry.module);
        pattern.as_ref()?.iter().find(|(own, _)| *own == name).map(|(_, kept)| kept)
    };
    layout
        .entries()
        .iter()
        .map(|entry| {
            let values = &parameters[entry.range.clone()];
            let whole = || SavedTensor {
                name: entry.peft_name.clone(),
                shape: entry.shape.clone(),
                values: values.to_vec(),
            };
            let Some(kept) = kept_of(entry).filter(|_| [A, B, E].contains(&entry.suffix.as_str())) else {
                return whole();
            };
            let left = kept.iter().filter(|kept| **kept).count();
            let (rows, columns) = (entry.rows(), entry.columns());
            let by_column = entry.suffix == B;
            let values = values.iter().enumerate().filter(|(at, _)| {
                let triplet = if by_column { at % columns } else { at / columns };
                kept[triplet]
            });
            let shape = if by_column { vec![rows, left] } else { vec![left, columns] };
            SavedTensor { name: entry.peft_name.clone(), shape, values: values.map(|(_, v)| *v).collect() }
        })
        .collect()
}
