//! Row kernels that the compiler turns into vector code.
//!
//! Each kernel is plain safe Rust, compiled twice: for any processor, and for processors with AVX2. The choice is
//! made when it runs. No kernel uses fused multiply-add, so both give the same bits. Sums run in 16
//! lanes that are added in a fixed order.

/// Compiles a function for AVX2 as well, and picks when it runs.
macro_rules! vectorized {
    ($(#[$meta:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        pub(super) fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn portable($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    portable($($argument),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2, as was just asked.
                    return unsafe { avx2($($argument),*) };
                }
            }
            portable($($argument),*)
        }
    };
}

vectorized! {
    /// What each feature of one token is multiplied by; see [`crate::random::dropout_scales_with`].
    fn dropout_mask(key: [u32; 2], sample_id: u64, token_in_sample: u32, p: f32, out: &mut [f32]) {
        crate::random::dropout_scales_with(key, sample_id, token_in_sample, p, out);
    }
}

/// Lanes of a sum.
const LANES: usize = 16;

/// `e^x` within 2 units in the last place; 0 below -87.3, about 3.4e38 above 88.7, NaN for NaN.
///
/// Range reduction by `ln 2` in two parts, then the polynomial of the Cephes library.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const SHIFTER: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
    const LOWEST: f32 = -87.336_54;
    const HIGHEST: f32 = 88.376_26;
    // Comparisons, not min and max: those would swallow NaN.
    let clamped = if x < LOWEST { LOWEST } else { x };
    let clamped = if clamped > HIGHEST { HIGHEST } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + SHIFTER;
    let whole = shifted - SHIFTER;
    let rest = clamped - whole * 0.693_359_4 - whole * -2.121_944_4e-4;
    let mut polynomial = 1.987_569_2e-4;
    polynomial = polynomial * rest + 1.398_2e-3;
    polynomial = polynomial * rest + 8.333_452e-3;
    polynomial = polynomial * rest + 4.166_579_6e-2;
    polynomial = polynomial * rest + 1.666_666_5e-1;
    polynomial = polynomial * rest + 0.5;
    let series = polynomial * rest * rest + rest + 1.0;
    let exponent = shifted.to_bits().wrapping_add(127) << 23;
    let result = series * f32::from_bits(exponent);
    if x < LOWEST { 0.0 } else { result }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The hyperbolic tangent within 3 units in the last place; NaN for NaN.
///
/// Near 0 the polynomial of the Cephes library, else `1 - 2 / (e^2|x| + 1)`.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let mut polynomial = -5.704_988_7e-3;
    polynomial = polynomial * square + 2.063_909e-2;
    polynomial = polynomial * square - 5.373_971_6e-2;
    polynomial = polynomial * square + 1.333_144_2e-1;
    polynomial = polynomial * square - 3.333_328e-1;
    let near = polynomial * square * x + x;
    let far = 1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0);
    if x.abs() < 0.625 { near } else { far.copysign(x) }
}

/// sqrt(2 / pi), and the weight of the cube, in gelu's approximation.
const GELU_FACTOR: f32 = 0.797_884_6;
const GELU_CUBE: f32 = 0.044_715;

/// Adds up the lanes, in a fixed order.
#[inline(always)]
fn total(lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    let mut lanes = lanes;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

vectorized! {
/// Sum of `a[i] b[i]`.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] += a * b;
    }
    total(lanes)
}
}

vectorized! {
/// Sum of `a[i] b[i] c[i]`.
fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let (c_chunks, c_rest) = c.as_chunks::<LANES>();
    for ((a, b), c) in a_chunks.iter().zip(b_chunks).zip(c_chunks) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i] * c[i];
        }
    }
    for (i, ((a, b), c)) in a_rest.iter().zip(b_rest).zip(c_rest).enumerate() {
        lanes[i] += a * b * c;
    }
    total(lanes)
}
}

vectorized! {
/// Largest number; NaN if any is NaN.
fn maximum(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut poison = [0.0_f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
            poison[i] += chunk[i] * 0.0;
        }
    }
    for (i, &value) in rest.iter().enumerate() {
        lanes[i] = if value > lanes[i] { value } else { lanes[i] };
        poison[i] += value * 0.0;
    }
    let largest = lanes.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    // Infinity makes the poison NaN as well: a softmax over it has no value either.
    largest + total(poison)
}
}

vectorized! {
/// `x[i] = e^(x[i] - shift)`; returns their sum.
fn exp_and_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            let value = exp(chunk[i] - shift);
            chunk[i] = value;
            lanes[i] += value;
        }
    }
    for (i, value) in rest.iter_mut().enumerate() {
        *value = exp(*value - shift);
        lanes[i] += *value;
    }
    total(lanes)
}
}

vectorized! {
/// Sum of `e^(x[i] - shift)`.
fn sum_of_exp(x: &[f32], shift: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += exp(chunk[i] - shift);
        }
    }
    for (i, &value) in rest.iter().enumerate() {
        lanes[i] += exp(value - shift);
    }
    total(lanes)
}
}

vectorized! {
/// `x[i] *= factor`.
fn scale(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|value| *value *= factor);
}
}

vectorized! {
/// `to[i] += from[i]`.
fn add(from: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}
}

vectorized! {
/// `to[i] *= from[i]`.
fn multiply(from: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to *= from);
}
}

vectorized! {
/// `to[i] += a[i] b[i]`.
fn add_product(a: &[f32], b: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(a).zip(b).for_each(|((to, a), b)| *to += a * b);
}
}

vectorized! {
/// `out[i] = x[i] factor weight[i]`.
fn scale_by(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}
}

vectorized! {
/// `dx[i] += factor weight[i] dout[i] - slope x[i]`: the last pass of RMS norm's gradient.
fn add_norm_gradient(dout: &[f32], weight: &[f32], x: &[f32], factor: f32, slope: f32, dx: &mut [f32]) {
    for (((dx, dout), weight), x) in dx.iter_mut().zip(dout).zip(weight).zip(x) {
        *dx += factor * weight * dout - slope * x;
    }
}
}

vectorized! {
/// Turns the pairs `(first[i], second[i])` by angles given as cosines and sines; `sign` -1 turns back.
fn rotate(first: &mut [f32], second: &mut [f32], cosines: &[f32], sines: &[f32], sign: f32) {
    for (((first, second), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
        let (a, b, sine) = (*first, *second, sine * sign);
        *first = a * cosine - b * sine;
        *second = b * cosine + a * sine;
    }
}
}

vectorized! {
/// `out[i] = silu(gate[i]) up[i]`.
fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate * sigmoid(gate) * up;
    }
}
}

vectorized! {
/// Replaces `gate` and `up` by their gradients, and `dout` by the product.
fn swiglu_backward(dout: &mut [f32], gate: &mut [f32], up: &mut [f32]) {
    for ((out, gate), up) in dout.iter_mut().zip(gate).zip(up) {
        let dout = *out;
        let sigmoid = sigmoid(*gate);
        let silu = *gate * sigmoid;
        let slope = sigmoid * (1.0 + *gate * (1.0 - sigmoid));
        *out = silu * *up;
        *gate = dout * *up * slope;
        *up = dout * silu;
    }
}
}

vectorized! {
/// `out[i] = gelu(gate[i]) up[i]`, gelu as `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³)))`.
fn geglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
        let bend = tanh(GELU_FACTOR * (gate + GELU_CUBE * gate * gate * gate));
        *out = 0.5 * gate * (1.0 + bend) * up;
    }
}
}

vectorized! {
/// Replaces `gate` and `up` by their gradients, and `dout` by the product.
fn geglu_backward(dout: &mut [f32], gate: &mut [f32], up: &mut [f32]) {
    for ((out, gate), up) in dout.iter_mut().zip(gate).zip(up) {
        let (x, dout) = (*gate, *out);
        let bend = tanh(GELU_FACTOR * (x + GELU_CUBE * x * x * x));
        let inner = GELU_FACTOR * (1.0 + 3.0 * GELU_CUBE * x * x);
        let slope = 0.5 * (1.0 + bend) + 0.5 * x * (1.0 - bend * bend) * inner;
        *out = 0.5 * x * (1.0 + bend) * *up;
        *gate = dout * *up * slope;
        *up = dout * (0.5 * x * (1.0 + bend));
    }
}
}

vectorized! {
/// `x[i] = cap tanh(x[i] / cap)`.
fn soft_cap(x: &mut [f32], cap: f32) {
    x.iter_mut().for_each(|value| *value = cap * tanh(*value / cap));
}
}

vectorized! {
/// Of capped logits: `x[i] = e^(x[i] - shift) factor (1 - (x[i] / cap)²)`.
fn capped_cross_entropy_gradient(x: &mut [f32], shift: f32, factor: f32, cap: f32) {
    x.iter_mut().for_each(|value| {
        let bend = *value / cap;
        *value = exp(*value - shift) * factor * (1.0 - bend * bend);
    });
}
}

vectorized! {
/// Of capped scores `s`: `p[i] = e^(s[i] - shift)`, `d[i] = p[i] (d[i] - mean) factor (1 - (s[i] / cap)²)`.
fn capped_softmax_gradient(s: &mut [f32], shift: f32, mean: f32, factor: f32, cap: f32, d: &mut [f32]) {
    for (d, s) in d.iter_mut().zip(s) {
        let bend = *s / cap;
        *s = exp(*s - shift);
        *d = *s * (*d - mean) * factor * (1.0 - bend * bend);
    }
}
}

vectorized! {
/// `d[i] = p[i] (d[i] - mean) scale`: the gradient of a softmax row.
fn softmax_gradient(p: &[f32], mean: f32, factor: f32, d: &mut [f32]) {
    for (d, p) in d.iter_mut().zip(p) {
        *d = p * (*d - mean) * factor;
    }
}
}

vectorized! {
/// `x[i] = e^(x[i] - shift)`.
fn exp_shifted(x: &mut [f32], shift: f32) {
    x.iter_mut().for_each(|value| *value = exp(*value - shift));
}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 units in the last place of f32, about 2.4e-7, is what the polynomial and its last product can lose.
    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        let mut worst = 0.0_f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.4e-7, "worst relative error {worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(1000.0) > 1e38);
    }

    /// Rounding of the polynomial near 0, of `e^2x`, the quotient and the difference elsewhere: at 6e-8 each, 2e-7 holds.
    #[test]
    fn tanh_is_right_near_nothing_and_far_out() {
        let mut worst = 0.0_f64;
        for i in (-200_000..200_000).filter(|i| *i != 0) {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).tanh();
            worst = worst.max((f64::from(tanh(x)) - exact).abs() / exact.abs());
        }
        assert!(worst < 3e-7, "worst relative error {worst}");
        assert_eq!((tanh(0.0), tanh(100.0), tanh(-100.0)), (0.0, 1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn a_maximum_does_not_hide_nan() {
        let mut x = vec![0.5_f32; 40];
        x[3] = 2.0;
        assert_eq!(maximum(&x), 2.0);
        x[37] = f32::NAN;
        assert!(maximum(&x).is_nan());
    }

    #[test]
    fn dot_takes_the_rest_into_account() {
        let x: Vec<f32> = (1..=37).map(|i| i as f32).collect();
        assert_eq!(dot(&x, &x), (1..=37).map(|i| (i * i) as f32).sum::<f32>());
    }
}
