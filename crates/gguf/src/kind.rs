//! How ggml stores the numbers of a tensor.

use crate::blocks;

/// How the numbers of a tensor are stored: blocks of so many numbers in so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(non_camel_case_types, reason = "the names that ggml gives them")]
pub enum Kind {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE.
    F16,
    /// 16 bits, the upper half of f32.
    BF16,
    /// 4 bits, a scale for 32.
    Q4_0,
    /// 4 bits, a scale and a minimum for 32.
    Q4_1,
    /// 5 bits, a scale for 32.
    Q5_0,
    /// 5 bits, a scale and a minimum for 32.
    Q5_1,
    /// 8 bits, a scale for 32.
    Q8_0,
    /// 2 bits, 4-bit scales and minima for 16 of 256.
    Q2_K,
    /// 3 bits, 6-bit scales for 16 of 256.
    Q3_K,
    /// 4 bits, 6-bit scales and minima for 32 of 256.
    Q4_K,
    /// 5 bits, 6-bit scales and minima for 32 of 256.
    Q5_K,
    /// 6 bits, 8-bit scales for 16 of 256.
    Q6_K,
}

impl Kind {
    /// All that are read.
    pub const ALL: [Self; 13] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2_K,
        Self::Q3_K,
        Self::Q4_K,
        Self::Q5_K,
        Self::Q6_K,
    ];

    /// Its number in files.
    pub fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2_K => 10,
            Self::Q3_K => 11,
            Self::Q4_K => 12,
            Self::Q5_K => 13,
            Self::Q6_K => 14,
            Self::BF16 => 30,
        }
    }

    /// The kind of a number in a file, if it is read.
    pub fn of(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.number() == number)
    }

    /// Numbers in a block.
    pub fn block_numbers(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bytes of `numbers` numbers; none where they are no whole blocks, or too many.
    pub fn bytes(self, numbers: u64) -> Option<u64> {
        let block = self.block_numbers() as u64;
        numbers.is_multiple_of(block).then_some(())?;
        (numbers / block).checked_mul(self.block_bytes() as u64)
    }

    /// Turns whole blocks into f32.
    ///
    /// # Panics
    /// If `blocks` and `out` do not hold equally many whole blocks: a defect of the caller.
    pub fn write_f32(self, blocks: &[u8], out: &mut [f32]) {
        assert_eq!(
            self.bytes(out.len() as u64),
            Some(blocks.len() as u64),
            "blocks as many as numbers ask for"
        );
        let (bytes, numbers) = (self.block_bytes(), self.block_numbers());
        let pairs = blocks.chunks_exact(bytes).zip(out.chunks_exact_mut(numbers));
        match self {
            Self::F32 => pairs.for_each(|(block, out)| out[0] = blocks::f32(block)),
            Self::F16 => pairs.for_each(|(block, out)| out[0] = blocks::f16(block)),
            Self::BF16 => pairs.for_each(|(block, out)| out[0] = blocks::bf16(block)),
            Self::Q4_0 => pairs.for_each(|(block, out)| blocks::q4_0(block, out)),
            Self::Q4_1 => pairs.for_each(|(block, out)| blocks::q4_1(block, out)),
            Self::Q5_0 => pairs.for_each(|(block, out)| blocks::q5_0(block, out)),
            Self::Q5_1 => pairs.for_each(|(block, out)| blocks::q5_1(block, out)),
            Self::Q8_0 => pairs.for_each(|(block, out)| blocks::q8_0(block, out)),
            Self::Q2_K => pairs.for_each(|(block, out)| blocks::q2_k(block, out)),
            Self::Q3_K => pairs.for_each(|(block, out)| blocks::q3_k(block, out)),
            Self::Q4_K => pairs.for_each(|(block, out)| blocks::q4_k(block, out)),
            Self::Q5_K => pairs.for_each(|(block, out)| blocks::q5_k(block, out)),
            Self::Q6_K => pairs.for_each(|(block, out)| blocks::q6_k(block, out)),
        }
    }
}
