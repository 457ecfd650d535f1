//! The weights of a last layer that make a network give what is wanted.
//!
//! With H `[count, hidden]` in front of the layer and the target Y `[count, outputs]`, W `[outputs, hidden]` of least norm with
//! `H Wᵀ = Y` is `Wᵀ = Hᵀ (H Hᵀ + ε)⁻¹ Y`. There are more hidden features than virtual tokens as a rule, and then it is
//! exact but for ε; where there are fewer it is the nearest in the sense of least squares.

/// Share of the mean of the diagonal that is added to it: keeps rows that are nearly alike apart.
const RIDGE: f64 = 1e-9;

/// Writes W, row after row. `shape` is count, hidden, outputs.
pub(super) fn last_layer(inside: &[f32], target: &[f32], shape: [usize; 3], weight: &mut [f32]) {
    let [count, hidden, outputs] = shape;
    let row = |index: usize| &inside[index * hidden..(index + 1) * hidden];
    let mut gram = vec![0.0; count * count];
    for i in 0..count {
        for j in 0..count {
            gram[i * count + j] = row(i).iter().zip(row(j)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        }
    }
    let trace: f64 = (0..count).map(|i| gram[i * count + i]).sum();
    for i in 0..count {
        gram[i * count + i] += RIDGE * trace / count as f64;
    }
    let mut solution: Vec<f64> = target.iter().map(|number| f64::from(*number)).collect();
    cholesky(&mut gram, count);
    substitute(&gram, count, &mut solution, outputs);
    for (output, weights) in weight.chunks_exact_mut(hidden).enumerate() {
        for (feature, weight) in weights.iter_mut().enumerate() {
            let sum: f64 = (0..count)
                .map(|token| f64::from(inside[token * hidden + feature]) * solution[token * outputs + output])
                .sum();
            *weight = sum as f32;
        }
    }
}

/// Replaces the lower half of a positive matrix by L of `L Lᵀ`.
fn cholesky(matrix: &mut [f64], size: usize) {
    for i in 0..size {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| matrix[i * size + k] * matrix[j * size + k]).sum();
            let rest = matrix[i * size + j] - dot;
            matrix[i * size + j] =
                if i == j { rest.max(f64::MIN_POSITIVE).sqrt() } else { rest / matrix[j * size + j] };
        }
    }
}

/// Replaces Y `[size, columns]` by `(L Lᵀ)⁻¹ Y`.
fn substitute(lower: &[f64], size: usize, y: &mut [f64], columns: usize) {
    for row in 0..size {
        for other in 0..row {
            let factor = lower[row * size + other];
            for column in 0..columns {
                y[row * columns + column] -= factor * y[other * columns + column];
            }
        }
        y[row * columns..(row + 1) * columns].iter_mut().for_each(|y| *y /= lower[row * size + row]);
    }
    for row in (0..size).rev() {
        for other in row + 1..size {
            let factor = lower[other * size + row];
            for column in 0..columns {
                y[row * columns + column] -= factor * y[other * columns + column];
            }
        }
        y[row * columns..(row + 1) * columns].iter_mut().for_each(|y| *y /= lower[row * size + row]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::fill_uniform;

    #[test]
    fn the_layer_gives_the_target() {
        let [count, hidden, outputs] = [5, 12, 33];
        let (mut inside, mut target) = (vec![0.0; count * hidden], vec![0.0; count * outputs]);
        fill_uniform(3, "inside", 0.9, &mut inside);
        fill_uniform(3, "target", 2.0, &mut target);
        let mut weight = vec![f32::NAN; outputs * hidden];
        last_layer(&inside, &target, [count, hidden, outputs], &mut weight);
        for token in 0..count {
            for output in 0..outputs {
                let got: f32 =
                    (0..hidden).map(|h| inside[token * hidden + h] * weight[output * hidden + h]).sum();
                // f32 weights and sums of 12 products of size about 1.
                assert!((got - target[token * outputs + output]).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn with_fewer_features_than_tokens_it_stays_finite() {
        let (inside, target) = ([0.5, 0.5, -0.25, 0.5], [1.0, 1.0, -0.5, 1.0]);
        let mut weight = [f32::NAN];
        last_layer(&inside, &target, [4, 1, 1], &mut weight);
        assert!((weight[0] - 2.0).abs() < 1e-3, "{weight:?}");
    }
}
