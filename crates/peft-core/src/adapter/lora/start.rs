//! Starts of LoRA that are computed from the base's weights: magnitudes (DoRA), and A and B of PiSSA, OLoRA and LoftQ.

use rayon::prelude::*;

use super::{A, B, LoraConfig, LoraStart, MAGNITUDE};
use crate::{
    adapter::method::ModuleStart,
    backend::{Backend, View, ViewMut, cpu::Cpu},
    error::{Error, Result},
    random,
};

impl LoraStart {
    /// Whether A and B are computed from the base's weights as they are on disk.
    pub fn is_computed(self) -> bool {
        matches!(self, Self::Pissa | Self::Olora | Self::Loftq)
    }
}

/// Fills in the magnitudes of DoRA: the length of every row of `W + s B A`.
pub(super) fn fill(config: &LoraConfig, start: &mut ModuleStart<'_>) -> Result<()> {
    let (Some(a), Some(b)) = (start.range(A), start.range(B)) else { return Ok(()) };
    let Some(magnitude) = start.range(MAGNITUDE) else { return Ok(()) };
    let [out, input] = start.module.shape;
    let (r, scale) = config.of_module(&start.module.path);
    let (a, b) = (&start.parameters[a], &start.parameters[b]);
    let lengths: Vec<f32> = (0..out)
        .into_par_iter()
        .map(|row| {
            let mut sum = 0.0_f64;
            for column in 0..input {
                let update: f32 = (0..r).map(|at| b[row * r + at] * a[at * input + column]).sum();
                let value = f64::from(start.weight[row * input + column] + scale * update);
                sum += value * value;
            }
            sum.sqrt() as f32
        })
        .collect();
    start.parameters[magnitude].copy_from_slice(&lengths);
    Ok(())
}

/// A and B of rank r, row after row: `[r, in]` and `[out, r]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// A.
    pub a: Vec<f32>,
    /// B.
    pub b: Vec<f32>,
}

/// Computes A and B of a weight `[out, in]` of the base, with update scale `scale`; `lost` is what 4 bits lose of it
/// (LoftQ alone reads it).
///
/// PiSSA: `W ≈ U S Vᵀ`, `B = U sqrt(S / s)`, `A = sqrt(S / s) Vᵀ`. OLoRA: `W = Q R`, `B` the first r columns of Q, `A` the first
/// r rows of R. LoftQ: `lost ≈ U S Vᵀ`, `B = U sqrt(S)`, `A = sqrt(S) Vᵀ`. All as in PEFT, but that singular vectors are found
/// by iteration in a subspace of `r + 8` directions: the sum `s B A` and the rest `W - s B A` still make W.
///
/// # Errors
/// Where a rank is larger than the weight, or there is no memory.
pub fn factors(
    cpu: &Cpu,
    how: LoraStart,
    [out, input]: [usize; 2],
    (r, scale): (usize, f32),
    weight: &[f32],
    lost: &[f32],
) -> Result<Factors> {
    if r > out.min(input) {
        let problem = format!("is {r}, more than a weight of [{out}, {input}] has directions");
        return Err(Error::AdapterSetting { file: None, key: "r".to_owned(), problem });
    }
    match how {
        LoraStart::Olora => Ok(orthonormal_rows(weight, [out, input], r)),
        LoraStart::Loftq => largest_directions(cpu, lost, [out, input], r, 1.0),
        _ => largest_directions(cpu, weight, [out, input], r, scale),
    }
}

/// `W - s B A`.
pub fn residual(
    weight: &[f32],
    [out, input]: [usize; 2],
    r: usize,
    scale: f32,
    factors: &Factors,
) -> Vec<f32> {
    let mut residual = weight.to_vec();
    debug_assert_eq!(residual.len(), out * input);
    residual.par_chunks_mut(input).enumerate().for_each(|(row, own)| {
        for at in 0..r {
            let factor = scale * factors.b[row * r + at];
            for (value, a) in own.iter_mut().zip(&factors.a[at * input..(at + 1) * input]) {
                *value -= factor * a;
            }
        }
    });
    residual
}

/// Gram and Schmidt, twice, in f64, on the first columns of W: its QR decomposition up to them.
fn orthonormal_rows(weight: &[f32], [out, input]: [usize; 2], r: usize) -> Factors {
    let mut columns: Vec<Vec<f64>> =
        (0..r).map(|column| (0..out).map(|row| f64::from(weight[row * input + column])).collect()).collect();
    orthonormalise(&mut columns);
    let mut a = vec![0.0_f32; r * input];
    a.par_chunks_mut(input).zip(&columns).for_each(|(a, q)| {
        let mut sums = vec![0.0_f64; input];
        for (row, q) in q.iter().enumerate() {
            for (sum, w) in sums.iter_mut().zip(&weight[row * input..(row + 1) * input]) {
                *sum += q * f64::from(*w);
            }
        }
        for (a, sum) in a.iter_mut().zip(sums) {
            *a = sum as f32;
        }
    });
    let mut b = vec![0.0_f32; out * r];
    for (at, q) in columns.iter().enumerate() {
        for (row, q) in q.iter().enumerate() {
            b[row * r + at] = *q as f32;
        }
    }
    Factors { a, b }
}

fn orthonormalise(columns: &mut [Vec<f64>]) {
    for at in 0..columns.len() {
        let (before, rest) = columns.split_at_mut(at);
        let own = &mut rest[0];
        for _ in 0..2 {
            for other in before.iter() {
                let along: f64 = own.iter().zip(other).map(|(x, y)| x * y).sum();
                own.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
        }
        let length = own.iter().map(|x| x * x).sum::<f64>().sqrt();
        if length > 0.0 {
            own.iter_mut().for_each(|x| *x /= length);
        }
    }
}

/// Directions beyond r that speed the iteration up.
const SPARE: usize = 8;
/// Rounds of the iteration at most, and when it may stop: the change of the singular values.
const ROUNDS: usize = 60;
const SETTLED: f64 = 1e-7;

/// The r largest singular directions of `m`: `B = U sqrt(S / s)`, `A = sqrt(S / s) Vᵀ`.
fn largest_directions(
    cpu: &Cpu,
    m: &[f32],
    [out, input]: [usize; 2],
    r: usize,
    scale: f32,
) -> Result<Factors> {
    let p = (r + SPARE).min(out.min(input));
    let mut start = vec![0.0; p * out];
    random::fill_normal(0, "subspace", 1.0, &mut start);
    // Rows of `left` are directions in the space of outputs, rows of `right` in that of inputs.
    let (mut left, mut right) = (start, vec![0.0_f32; p * input]);
    let mut values = vec![0.0_f64; p];
    for round in 0..ROUNDS {
        let m = View::<Cpu>::new(m, out, input);
        orthonormalise_rows(&mut left, p);
        let to = ViewMut::<Cpu>::new(&mut right, p, input);
        cpu.gemm(1.0, View::<Cpu>::new(&left, p, out), false, m, false, 0.0, to);
        // right = left M: its rows' lengths estimate the singular values once directions have settled.
        let mut sorted: Vec<f64> = right.chunks(input).map(length).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let moved = sorted.iter().zip(&values).take(r).map(|(new, old)| (new - old).abs());
        let moved = moved.fold(0.0, f64::max) / sorted[0].max(f64::MIN_POSITIVE);
        values = sorted;
        if round > 0 && moved < SETTLED {
            break;
        }
        orthonormalise_rows(&mut right, p);
        let to = ViewMut::<Cpu>::new(&mut left, p, out);
        cpu.gemm(1.0, View::<Cpu>::new(&right, p, input), false, m, true, 0.0, to);
    }
    orthonormalise_rows(&mut left, p);
    let to = ViewMut::<Cpu>::new(&mut right, p, input);
    cpu.gemm(1.0, View::<Cpu>::new(&left, p, out), false, View::<Cpu>::new(m, out, input), false, 0.0, to);
    // M ≈ leftᵀ right, and right rightᵀ = T diag(S²) Tᵀ: U = leftᵀ T, S Vᵀ = Tᵀ right.
    let mut gram = vec![0.0_f64; p * p];
    for row in 0..p {
        for other in 0..p {
            gram[row * p + other] = dot(&right[row * input..][..input], &right[other * input..][..input]);
        }
    }
    let (squares, vectors) = eigen(gram, p);
    let mut order: Vec<usize> = (0..p).collect();
    order.sort_by(|a, b| squares[*b].total_cmp(&squares[*a]));
    let (mut a, mut b) = (vec![0.0_f32; r * input], vec![0.0_f32; out * r]);
    for (at, &own) in order.iter().take(r).enumerate() {
        let value = squares[own].max(0.0).sqrt();
        let root = (value / f64::from(scale)).sqrt();
        for direction in 0..p {
            let along = vectors[direction * p + own];
            if value > 0.0 {
                let right = &right[direction * input..][..input];
                for (a, x) in a[at * input..][..input].iter_mut().zip(right) {
                    *a += (root / value * along * f64::from(*x)) as f32;
                }
            }
            for (row, x) in left[direction * out..][..out].iter().enumerate() {
                b[row * r + at] += (root * along * f64::from(*x)) as f32;
            }
        }
    }
    Ok(Factors { a, b })
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

fn length(x: &[f32]) -> f64 {
    dot(x, x).sqrt()
}

/// Makes the `p` rows of `rows` orthonormal.
fn orthonormalise_rows(rows: &mut [f32], p: usize) {
    let width = rows.len() / p;
    let mut columns: Vec<Vec<f64>> =
        rows.chunks(width).map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect();
    orthonormalise(&mut columns);
    for (row, column) in rows.chunks_mut(width).zip(&columns) {
        row.iter_mut().zip(column).for_each(|(to, from)| *to = *from as f32);
    }
}

/// Eigenvalues and eigenvectors (by columns) of a symmetric matrix, by Jacobi's rotations.
fn eigen(mut m: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors = vec![0.0_f64; n * n];
    for at in 0..n {
        vectors[at * n + at] = 1.0;
    }
    for _ in 0..50 {
        let off: f64 =
            (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| m[i * n + j].powi(2)).sum();
        let diagonal: f64 = (0..n).map(|i| m[i * n + i].powi(2)).sum();
        if off <= 1e-30 * diagonal {
            break;
        }
        for i in 1..n {
            for j in 0..i {
                rotate(&mut m, &mut vectors, n, i, j);
            }
        }
    }
    ((0..n).map(|at| m[at * n + at]).collect(), vectors)
}

/// One rotation that makes `m[i, j]` 0.
fn rotate(m: &mut [f64], vectors: &mut [f64], n: usize, i: usize, j: usize) {
    let between = m[i * n + j];
    if between == 0.0 {
        return;
    }
    let half = (m[j * n + j] - m[i * n + i]) / (2.0 * between);
    let tangent = half.signum() / (half.abs() + half.hypot(1.0));
    let cosine = 1.0 / tangent.hypot(1.0);
    let sine = tangent * cosine;
    for k in 0..n {
        let (x, y) = (m[k * n + i], m[k * n + j]);
        m[k * n + i] = cosine * x - sine * y;
        m[k * n + j] = sine * x + cosine * y;
    }
    for k in 0..n {
        let (x, y) = (m[i * n + k], m[j * n + k]);
        m[i * n + k] = cosine * x - sine * y;
        m[j * n + k] = sine * x + cosine * y;
        let (x, y) = (vectors[k * n + i], vectors[k * n + j]);
        vectors[k * n + i] = cosine * x - sine * y;
        vectors[k * n + j] = sine * x + cosine * y;
    }
}
