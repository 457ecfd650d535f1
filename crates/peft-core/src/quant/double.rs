//! Double quantisation: block scales in 8 bits, as bitsandbytes' `compress_statistics`.
//!
//! The mean of all scales is taken off, the rest is quantised in blocks of 256 to the nearest entry of a fixed map.

/// Scales that share a scale of their own.
pub const NESTED_BLOCK: usize = 256;

/// bitsandbytes' signed 8-bit dynamic map (`create_dynamic_map()`), as it stands in its checkpoints.
pub static DYNAMIC_MAP: [f32; 256] = [
    -0.99296874,
    -0.9789063,
    -0.96484375,
    -0.9507812,
    -0.93671876,
    -0.92265624,
    -0.9085938,
    -0.89453125,
    -0.8804687,
    -0.86640626,
    -0.85234374,
    -0.8382813,
    -0.82421875,
    -0.8101562,
    -0.79609376,
    -0.78203124,
    -0.7679688,
    -0.75390625,
    -0.7398437,
    -0.72578126,
    -0.7117188,
    -0.6976563,
    -0.68359375,
    -0.6695312,
    -0.65546876,
    -0.6414063,
    -0.6273438,
    -0.61328125,
    -0.5992187,
    -0.58515626,
    -0.5710938,
    -0.5570313,
    -0.54296875,
    -0.5289062,
    -0.5148437,
    -0.50078124,
    -0.4867187,
    -0.47265625,
    -0.45859373,
    -0.44453126,
    -0.43046874,
    -0.41640624,
    -0.40234375,
    -0.38828123,
    -0.37421876,
    -0.36015624,
    -0.34609374,
    -0.33203125,
    -0.31796873,
    -0.30390626,
    -0.28984374,
    -0.27578127,
    -0.26171875,
    -0.24765624,
    -0.23359375,
    -0.21953125,
    -0.20546874,
    -0.19140625,
    -0.17734376,
    -0.16328125,
    -0.14921875,
    -0.13515624,
    -0.12109375,
    -0.107031256,
    -0.09859375,
    -0.09578126,
    -0.092968754,
    -0.09015625,
    -0.08734375,
    -0.08453125,
    -0.08171876,
    -0.07890625,
    -0.07609375,
    -0.07328125,
    -0.070468746,
    -0.067656256,
    -0.06484375,
    -0.06203125,
    -0.059218753,
    -0.05640625,
    -0.05359375,
    -0.05078125,
    -0.04796875,
    -0.04515625,
    -0.042343747,
    -0.03953125,
    -0.036718752,
    -0.03390625,
    -0.03109375,
    -0.028281251,
    -0.02546875,
    -0.02265625,
    -0.019843752,
    -0.01703125,
    -0.01421875,
    -0.01140625,
    -0.00971875,
    -0.009156249,
    -0.00859375,
    -0.00803125,
    -0.00746875,
    -0.00690625,
    -0.00634375,
    -0.00578125,
    -0.0052187503,
    -0.0046562497,
    -0.00409375,
    -0.0035312497,
    -0.00296875,
    -0.00240625,
    -0.00184375,
    -0.0012812499,
    -0.0009437501,
    -0.00083125,
    -0.00071875006,
    -0.0006062501,
    -0.00049375003,
    -0.00038125002,
    -0.00026875004,
    -0.00015625001,
    -8.875e-05,
    -6.625e-05,
    -4.375e-05,
    -2.1249998e-05,
    -7.75e-06,
    -3.2500002e-06,
    -5.5000004e-07,
    0.0,
    5.5000004e-07,
    3.2500002e-06,
    7.75e-06,
    2.1249998e-05,
    4.375e-05,
    6.625e-05,
    8.875e-05,
    0.00015625001,
    0.00026875004,
    0.00038125002,
    0.00049375003,
    0.0006062501,
    0.00071875006,
    0.00083125,
    0.0009437501,
    0.0012812499,
    0.00184375,
    0.00240625,
    0.00296875,
    0.0035312497,
    0.00409375,
    0.0046562497,
    0.0052187503,
    0.00578125,
    0.00634375,
    0.00690625,
    0.00746875,
    0.00803125,
    0.00859375,
    0.009156249,
    0.00971875,
    0.01140625,
    0.01421875,
    0.01703125,
    0.019843752,
    0.02265625,
    0.02546875,
    0.028281251,
    0.03109375,
    0.03390625,
    0.036718752,
    0.03953125,
    0.042343747,
    0.04515625,
    0.04796875,
    0.05078125,
    0.05359375,
    0.05640625,
    0.059218753,
    0.06203125,
    0.06484375,
    0.067656256,
    0.070468746,
    0.07328125,
    0.07609375,
    0.07890625,
    0.08171876,
    0.08453125,
    0.08734375,
    0.09015625,
    0.092968754,
    0.09578126,
    0.09859375,
    0.107031256,
    0.12109375,
    0.13515624,
    0.14921875,
    0.16328125,
    0.17734376,
    0.19140625,
    0.20546874,
    0.21953125,
    0.23359375,
    0.24765624,
    0.26171875,
    0.27578127,
    0.28984374,
    0.30390626,
    0.31796873,
    0.33203125,
    0.34609374,
    0.36015624,
    0.37421876,
    0.38828123,
    0.40234375,
    0.41640624,
    0.43046874,
    0.44453126,
    0.45859373,
    0.47265625,
    0.4867187,
    0.50078124,
    0.5148437,
    0.5289062,
    0.54296875,
    0.5570313,
    0.5710938,
    0.58515626,
    0.5992187,
    0.61328125,
    0.6273438,
    0.6414063,
    0.65546876,
    0.6695312,
    0.68359375,
    0.6976563,
    0.7117188,
    0.72578126,
    0.7398437,
    0.75390625,
    0.7679688,
    0.78203124,
    0.79609376,
    0.8101562,
    0.82421875,
    0.8382813,
    0.85234374,
    0.86640626,
    0.8804687,
    0.89453125,
    0.9085938,
    0.92265624,
    0.93671876,
    0.9507812,
    0.96484375,
    0.9789063,
    0.99296874,
    1.0,
];

/// Scales that were quantised again.
#[derive(Debug, Clone, PartialEq)]
pub struct DoubleScales {
    /// One byte a block.
    pub codes: Vec<u8>,
    /// One per [`NESTED_BLOCK`] blocks.
    pub nested: Vec<f32>,
    /// Mean of all scales.
    pub offset: f32,
}

/// The mean of block scales, summed in f64 and rounded once; bitsandbytes sums in f32, so its offset may differ in the
/// last places.
pub fn mean(scales: &[f32]) -> f32 {
    mean_of(sum(0.0, scales), scales.len())
}

/// Goes on summing scales, in their order: the sum of a matrix's first scales, then of its next, is that of all, bit for bit.
pub fn sum(so_far: f64, scales: &[f32]) -> f64 {
    scales.iter().fold(so_far, |sum, scale| sum + f64::from(*scale))
}

/// The mean of so many scales, whose sum is known.
pub fn mean_of(sum: f64, count: usize) -> f32 {
    (sum / count.max(1) as f64) as f32
}

/// Quantises block scales, none of which is infinite or not a number.
pub fn quantise(scales: &[f32]) -> DoubleScales {
    quantise_about(scales, mean(scales))
}

/// Quantises some of a matrix's scales, from a multiple of [`NESTED_BLOCK`] on, about the mean of all of them.
pub fn quantise_about(scales: &[f32], offset: f32) -> DoubleScales {
    let mut codes = Vec::with_capacity(scales.len());
    let mut nested = Vec::with_capacity(scales.len().div_ceil(NESTED_BLOCK));
    for block in scales.chunks(NESTED_BLOCK) {
        let largest = block.iter().fold(0.0_f32, |largest, scale| largest.max((scale - offset).abs()));
        let inverse = if largest == 0.0 { 0.0 } else { 1.0 / largest };
        codes.extend(block.iter().map(|scale| nearest((scale - offset) * inverse)));
        nested.push(largest);
    }
    DoubleScales { codes, nested, offset }
}

/// The scale that a byte stands for.
#[inline]
pub fn restore(code: u8, nested: f32, offset: f32, map: &[f32; 256]) -> f32 {
    map[usize::from(code)] * nested + offset
}

/// Index of the entry of [`DYNAMIC_MAP`] nearest to `value`; the lower one where two are equally near.
fn nearest(value: f32) -> u8 {
    let above = DYNAMIC_MAP.partition_point(|entry| *entry < value);
    let index = match above {
        0 => 0,
        256 => 255,
        above if value - DYNAMIC_MAP[above - 1] <= DYNAMIC_MAP[above] - value => above - 1,
        above => above,
    };
    index as u8
}
