//! Singular values of a product of thin factors.
//!
//! A combination of adapters is `B A` with B `[out, R]` and A `[R, in]`, R small. With `B = Q S` and `Aᵀ = P T` (columns of Q
//! and P orthonormal, S and T `[R, R]`), the singular values of `B A` are those of `S Tᵀ`, which is small: no
//! `[out, in]` matrix is ever made. f64 throughout.

/// A matrix by columns.
pub(super) type Columns = Vec<Vec<f64>>;

/// `U`, `s`, `V` with `U diag(s) Vᵀ` the product of the columns of `left` and the rows that are the columns of `right`:
/// `Σ left[i] right[i]ᵀ`. Largest first; as many as `left` has columns.
pub(super) fn of_product(left: Columns, right: Columns) -> (Columns, Vec<f64>, Columns) {
    let count = left.len();
    let (q, s) = orthonormal(left);
    let (p, t) = orthonormal(right);
    // core[i][j] = Σ_k s[k][i] t[k][j], by columns j.
    let mut core: Columns = (0..count)
        .map(|j| (0..count).map(|i| (0..count).map(|k| s[k][i] * t[k][j]).sum()).collect())
        .collect();
    let rotation = jacobi(&mut core);
    let mut order: Vec<usize> = (0..count).collect();
    let lengths: Vec<f64> = core.iter().map(|column| dot(column, column).sqrt()).collect();
    order.sort_by(|a, b| lengths[*b].total_cmp(&lengths[*a]));
    let unit = |index: &usize| -> Vec<f64> {
        let length = lengths[*index];
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        combine(&q, &core[*index], scale)
    };
    let u = order.iter().map(unit).collect();
    let v = order.iter().map(|index| combine(&p, &rotation[*index], 1.0)).collect();
    (u, order.iter().map(|index| lengths[*index]).collect(), v)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `scale Σ columns[i] weights[i]`.
fn combine(columns: &Columns, weights: &[f64], scale: f64) -> Vec<f64> {
    let mut out = vec![0.0; columns.first().map_or(0, Vec::len)];
    for (column, weight) in columns.iter().zip(weights) {
        out.iter_mut().zip(column).for_each(|(out, value)| *out += scale * weight * value);
    }
    out
}

/// Columns that are orthonormal (or zero), and for each column of the input its coordinates in them.
fn orthonormal(mut columns: Columns) -> (Columns, Columns) {
    let count = columns.len();
    let mut coordinates = vec![vec![0.0; count]; count];
    for at in 0..count {
        let before = dot(&columns[at], &columns[at]).sqrt();
        let (done, rest) = columns.split_at_mut(at);
        let column = &mut rest[0];
        // Twice is enough (Kahan): what rounding left of the others goes too.
        for _ in 0..2 {
            for (index, other) in done.iter().enumerate() {
                let part = dot(other, column);
                coordinates[at][index] += part;
                column.iter_mut().zip(other).for_each(|(value, other)| *value -= part * other);
            }
        }
        let length = dot(column, column).sqrt();
        if length > before * 1e-13 {
            coordinates[at][at] = length;
            column.iter_mut().for_each(|value| *value /= length);
        } else {
            column.fill(0.0);
        }
    }
    (columns, coordinates)
}

/// Turns columns pairwise until all are orthogonal (one-sided Jacobi, Hestenes 1958); gives the turn, by columns.
fn jacobi(columns: &mut Columns) -> Columns {
    const SWEEPS: usize = 60;
    let count = columns.len();
    let mut turn: Columns =
        (0..count).map(|j| (0..count).map(|i| if i == j { 1.0 } else { 0.0 }).collect()).collect();
    for _ in 0..SWEEPS {
        let mut turned = false;
        for i in 0..count {
            for j in i + 1..count {
                let (a, b) = (dot(&columns[i], &columns[i]), dot(&columns[j], &columns[j]));
                let c = dot(&columns[i], &columns[j]);
                if c == 0.0 || c.abs() <= 1e-15 * (a * b).sqrt() {
                    continue;
                }
                turned = true;
                let zeta = (b - a) / (2.0 * c);
                let tangent = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cosine = 1.0 / (1.0 + tangent * tangent).sqrt();
                let sine = cosine * tangent;
                rotate(columns, i, j, cosine, sine);
                rotate(&mut turn, i, j, cosine, sine);
            }
        }
        if !turned {
            break;
        }
    }
    turn
}

fn rotate(columns: &mut Columns, i: usize, j: usize, cosine: f64, sine: f64) {
    let (first, rest) = columns.split_at_mut(j);
    for (a, b) in first[i].iter_mut().zip(&mut rest[0]) {
        (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(u: &Columns, s: &[f64], v: &Columns) -> Vec<Vec<f64>> {
        let (rows, columns) = (u[0].len(), v[0].len());
        (0..rows)
            .map(|i| (0..columns).map(|j| (0..s.len()).map(|k| u[k][i] * s[k] * v[k][j]).sum()).collect())
            .collect()
    }

    #[test]
    fn a_product_comes_back_from_its_singular_values() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as f64 / (1u64 << 31) as f64 - 0.5
        };
        let mut left: Columns = (0..5).map(|_| (0..12).map(|_| next()).collect()).collect();
        let right: Columns = (0..5).map(|_| (0..9).map(|_| next()).collect()).collect();
        // One column hangs on others: a singular value of 0.
        left[4] = left[0].iter().zip(&left[1]).map(|(a, b)| a - 2.0 * b).collect();
        let ones = vec![1.0; 5];
        let expected = product(&left, &ones, &right);
        let (u, s, v) = of_product(left, right);
        assert!(s.is_sorted_by(|a, b| a >= b) && s[4] >= 0.0, "{s:?}");
        for (got, expected) in product(&u, &s, &v).iter().flatten().zip(expected.iter().flatten()) {
            assert!((got - expected).abs() < 1e-13, "{got} {expected}");
        }
        for (i, a) in v.iter().enumerate() {
            for (j, b) in v.iter().enumerate() {
                let wanted = f64::from(u8::from(i == j));
                assert!((dot(a, b) - wanted).abs() < 1e-12, "v {i} {j}");
                if s[i.max(j)] > 1e-12 {
                    assert!((dot(&u[i], &u[j]) - wanted).abs() < 1e-12, "u {i} {j}");
                }
            }
        }
    }

    #[test]
    fn known_singular_values() {
        // diag(3, 2) as 3 e1 e1ᵀ + 2 e2 e2ᵀ, told in the other order.
        let (u, s, v) =
            of_product(vec![vec![0.0, 2.0], vec![3.0, 0.0]], vec![vec![0.0, 1.0], vec![1.0, 0.0]]);
        assert_eq!(s, [3.0, 2.0]);
        assert_eq!((u[0][0] * v[0][0], u[1][1] * v[1][1]), (1.0, 1.0));
    }
}
