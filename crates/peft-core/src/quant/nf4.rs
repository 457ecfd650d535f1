//! 4-bit NormalFloat (Dettmers et al., "QLoRA", NeurIPS 2023), as bitsandbytes computes it on a CPU.
//!
//! The matrix is flattened row after row and cut into blocks, which may straddle rows. A block's scale is its largest
//! magnitude; a number's code is the index of the nearest entry of [`CODE_BOOK`] to `x * (1 / scale)`, that is the
//! number of [`MIDPOINTS`] strictly below it. Two codes share a byte, the first in the high half; the half that an odd
//! length leaves over, and every code of a block of zeros, is [`ZERO_CODE`]. Back: `CODE_BOOK[code] * scale`, in f32.

use rayon::prelude::*;

use crate::quant::double::{self, NESTED_BLOCK};

/// What a code stands for, before scaling.
pub const CODE_BOOK: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A scaled number's code is the count of these that are strictly below it.
pub const MIDPOINTS: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_43,
    -0.234_607_4,
    -0.137_911_73,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_77,
    0.389_312_54,
    0.501_663_42,
    0.642_786_9,
    0.861_478_42,
];

/// The code of 0.
pub const ZERO_CODE: u8 = 7;

/// Numbers per task; a multiple of every block size.
const CHUNK: usize = 1 << 14;

/// Both numbers of each byte, unscaled.
static PAIRS: [[f32; 2]; 256] = pairs();

const fn pairs() -> [[f32; 2]; 256] {
    let mut table = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = [CODE_BOOK[byte >> 4], CODE_BOOK[byte & 15]];
        byte += 1;
    }
    table
}

/// Bytes that hold the codes of `numbers` numbers.
pub fn code_bytes(numbers: usize) -> usize {
    numbers.div_ceil(2)
}

/// Blocks of `block_size` that `numbers` numbers fill.
pub fn blocks(numbers: usize, block_size: usize) -> usize {
    numbers.div_ceil(block_size)
}

/// Whether bitsandbytes knows the block size.
pub fn is_block_size(block_size: usize) -> bool {
    block_size.is_power_of_two() && (32..=4096).contains(&block_size)
}

/// Quantises `values` into `codes` (`[code_bytes]`) and `scales` (`[blocks]`).
///
/// Returns false where a value is infinite or not a number; the output is then of no use.
///
/// # Panics
/// If the outputs are of other lengths: a defect of the caller.
#[must_use]
pub fn quantise(values: &[f32], block_size: usize, codes: &mut [u8], scales: &mut [f32]) -> bool {
    debug_assert!(is_block_size(block_size));
    assert_eq!(codes.len(), code_bytes(values.len()), "a byte holds two codes");
    assert_eq!(scales.len(), blocks(values.len(), block_size), "a block has one scale");
    values
        .par_chunks(CHUNK)
        .zip(codes.par_chunks_mut(CHUNK / 2))
        .zip(scales.par_chunks_mut(CHUNK / block_size))
        .map(|((values, codes), scales)| {
            let mut finite = true;
            let blocks = values.chunks(block_size).zip(codes.chunks_mut(block_size / 2));
            for ((values, codes), scale) in blocks.zip(scales) {
                *scale = quantise_block(values, codes);
                finite &= scale.is_finite();
            }
            finite
        })
        .reduce(|| true, |left, right| left && right)
}

/// Quantises one block and returns its scale; NaN where a value is not a number.
fn quantise_block(values: &[f32], codes: &mut [u8]) -> f32 {
    // The largest magnitude by bits: order of non-negative floats is that of their bits, and NaN is above all.
    let scale =
        f32::from_bits(values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff)));
    if scale == 0.0 || !scale.is_finite() {
        codes.fill(ZERO_CODE << 4 | ZERO_CODE);
        return scale;
    }
    let inverse = 1.0 / scale;
    let (pairs, rest) = values.as_chunks::<2>();
    for (byte, [first, second]) in codes.iter_mut().zip(pairs) {
        *byte = code(first * inverse) << 4 | code(second * inverse);
    }
    if let ([last], Some(byte)) = (rest, codes.last_mut()) {
        *byte = code(last * inverse) << 4 | ZERO_CODE;
    }
    scale
}

#[inline(always)]
fn code(scaled: f32) -> u8 {
    MIDPOINTS.iter().map(|midpoint| u8::from(scaled > *midpoint)).sum()
}

/// Block scales, plain or quantised again.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// One f32 a block.
    Plain(&'a [f32]),
    /// One byte a block: `map[byte] * nested[block / 256] + offset`.
    Double {
        /// One a block.
        codes: &'a [u8],
        /// One per [`NESTED_BLOCK`] blocks.
        nested: &'a [f32],
        /// Mean of all scales.
        offset: f32,
        /// What a byte stands for.
        map: &'a [f32; 256],
    },
}

impl Scales<'_> {
    /// The scale of a block.
    #[inline]
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[block],
            Self::Double { codes, nested, offset, map } => {
                double::restore(codes[block], nested[block / NESTED_BLOCK], *offset, map)
            }
        }
    }

    /// How many blocks have a scale.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len(),
            Self::Double { codes, .. } => codes.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A matrix in NF4, row-major `[rows, columns]`.
#[derive(Debug, Clone, Copy)]
pub struct Nf4View<'a> {
    rows: usize,
    columns: usize,
    block_size: usize,
    codes: &'a [u8],
    scales: Scales<'a>,
}

impl<'a> Nf4View<'a> {
    /// A view of codes and scales.
    ///
    /// # Panics
    /// If their lengths do not fit the shape: a defect of the caller; files are checked where they are read.
    pub fn new(rows: usize, columns: usize, block_size: usize, codes: &'a [u8], scales: Scales<'a>) -> Self {
        assert!(is_block_size(block_size), "block sizes are checked where they are read");
        assert_eq!(codes.len(), code_bytes(rows * columns), "a byte holds two codes");
        assert_eq!(scales.len(), blocks(rows * columns, block_size), "a block has one scale");
        Self { rows, columns, block_size, codes, scales }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Numbers that share a scale.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Two codes a byte.
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// One scale a block.
    pub fn scales(&self) -> Scales<'a> {
        self.scales
    }

    /// Writes the numbers from flat index `start` on as f32, as many as `out` holds.
    ///
    /// Bit-equal to bitsandbytes' dequantisation to f32.
    ///
    /// # Panics
    /// If there are not that many: a defect of the caller.
    pub fn write_f32(&self, start: usize, out: &mut [f32]) {
        assert!(start + out.len() <= self.rows * self.columns, "the range lies within the matrix");
        // Tasks begin at blocks, so that a block's scale is restored once.
        let head = start.next_multiple_of(self.block_size).min(start + out.len()) - start;
        let (head, body) = out.split_at_mut(head);
        self.write_in_block(start, head);
        let start = start + head.len();
        body.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, out)| {
            let start = start + chunk * CHUNK;
            for (block, out) in out.chunks_mut(self.block_size).enumerate() {
                self.write_block(start / self.block_size + block, out);
            }
        });
    }

    /// Writes the first numbers of a block.
    #[inline]
    fn write_block(&self, block: usize, out: &mut [f32]) {
        let scale = self.scales.get(block);
        let codes = &self.codes[block * self.block_size / 2..];
        let (pairs, rest) = out.as_chunks_mut::<2>();
        let (whole, tail) = codes.split_at(pairs.len());
        for (pair, byte) in pairs.iter_mut().zip(whole) {
            let [first, second] = PAIRS[usize::from(*byte)];
            *pair = [first * scale, second * scale];
        }
        if let ([last], Some(byte)) = (rest, tail.first()) {
            *last = PAIRS[usize::from(*byte)][0] * scale;
        }
    }

    /// Writes numbers from the inside of one block.
    fn write_in_block(&self, start: usize, out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        let scale = self.scales.get(start / self.block_size);
        for (index, value) in (start..).zip(out) {
            *value = PAIRS[usize::from(self.codes[index / 2])][index % 2] * scale;
        }
    }
}
