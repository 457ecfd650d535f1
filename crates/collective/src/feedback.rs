//! Sums that travel rounded, for links that are slow: how they are rounded, and what is owed for it.
//!
//! A rank that rounds what it sends keeps what it rounded away, and adds it to what it sends the next time: error
//! feedback (Seide et al., "1-bit stochastic gradient descent", 2014; Karimireddy et al., "Error feedback fixes
//! SignSGD", 2019). Over many sums nothing is lost but what is owed at the end. All members get the same bits, but
//! not those of the exact sum.

use crate::error::{Error, Result};

/// Elements that share a scale.
const GROUP: usize = 256;

/// How sums travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Whole, as f32.
    #[default]
    Off,
    /// As bf16: half the bytes.
    Bf16,
    /// As integers of 8 bits with a scale for each 256: a quarter of the bytes.
    Int8,
}

impl Compression {
    /// Its number on the wire.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Off => 0,
            Self::Bf16 => 1,
            Self::Int8 => 2,
        }
    }

    /// Bytes of as many numbers on the wire.
    pub(crate) fn bytes(self, elements: usize) -> usize {
        match self {
            Self::Off => elements * size_of::<f32>(),
            Self::Bf16 => elements * size_of::<u16>(),
            Self::Int8 => elements + elements.div_ceil(GROUP) * size_of::<f32>(),
        }
    }

    /// Rounds `values` into `wire`.
    pub(crate) fn encode(self, values: &[f32], wire: &mut [u8]) {
        debug_assert_eq!(wire.len(), self.bytes(values.len()));
        match self {
            Self::Off => wire.copy_from_slice(bytemuck::cast_slice(values)),
            Self::Bf16 => {
                for (value, bytes) in values.iter().zip(wire.as_chunks_mut::<2>().0) {
                    *bytes = to_bf16(*value).to_le_bytes();
                }
            }
            Self::Int8 => {
                let (scales, codes) = wire.split_at_mut(values.len().div_ceil(GROUP) * size_of::<f32>());
                let groups = values.chunks(GROUP).zip(codes.chunks_mut(GROUP));
                for ((values, codes), scale) in groups.zip(scales.as_chunks_mut::<4>().0) {
                    // Magnitudes are in the order of their bits, and what is not finite is above all others.
                    let largest = values.iter().fold(0, |largest, value| largest.max(value.abs().to_bits()));
                    let is_finite = largest < f32::INFINITY.to_bits();
                    let step = if is_finite { f32::from_bits(largest) / 127.0 } else { f32::NAN };
                    *scale = step.to_le_bytes();
                    // The inverse of a step below 2^-127 is infinite; what is that small is owed as a whole.
                    let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
                    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
                    for (value, code) in values.iter().zip(codes) {
                        // What is added leaves no room for a fraction: the sum's last bits are the nearest integer.
                        *code = (value * inverse + 12_582_912.0).to_bits() as u8;
                    }
                }
            }
        }
    }

    /// What was rounded.
    pub(crate) fn decode(self, wire: &[u8], values: &mut [f32]) {
        debug_assert_eq!(wire.len(), self.bytes(values.len()));
        match self {
            Self::Off => bytemuck::cast_slice_mut(values).copy_from_slice(wire),
            Self::Bf16 => {
                for (value, bytes) in values.iter_mut().zip(wire.as_chunks().0) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            Self::Int8 => {
                let (scales, codes) = wire.split_at(values.len().div_ceil(GROUP) * size_of::<f32>());
                let groups = values.chunks_mut(GROUP).zip(codes.chunks(GROUP));
                for ((values, codes), scale) in groups.zip(scales.as_chunks().0) {
                    let scale = f32::from_le_bytes(*scale);
                    for (value, code) in values.iter_mut().zip(codes) {
                        *value = f32::from(*code as i8) * scale;
                    }
                }
            }
        }
    }
}

/// The upper half of a number's bits, rounded to nearest, ties to even.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // Rounding could turn a NaN into an infinity.
    (if value.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

/// What this member has rounded away from sums, and still owes to them.
///
/// One sum of many calls is a round: [`Self::begin`], the all-reduces of its parts front to back, [`Self::commit`]
/// once it counts. A round that is begun anew, or whose collective broke, leaves what is owed as it was. A crew that
/// changes takes nothing from it: each member's debt is added to what it sends, whoever gets it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Feedback {
    owed: Vec<f32>,
    /// What will be owed when the round that is under way counts.
    next: Vec<f32>,
    /// How far the round is, while there is one.
    at: Option<usize>,
}

impl Feedback {
    /// Continues with what was owed when it was saved.
    pub fn restored(owed: Vec<f32>) -> Self {
        Self { owed, next: Vec::new(), at: None }
    }

    /// What is owed, to be saved with the state that the last committed sum went into. Empty before the first.
    pub fn owed(&self) -> &[f32] {
        &self.owed
    }

    /// Begins a sum of so many numbers. Nothing is owed if there were not as many before.
    pub fn begin(&mut self, elements: usize) {
        if self.owed.len() != elements {
            self.owed.clear();
            self.owed.resize(elements, 0.0);
        }
        self.next.resize(elements, 0.0);
        self.at = Some(0);
    }

    /// The sum counts: what was rounded away is owed from now on.
    pub fn commit(&mut self) {
        if self.at.take() == Some(self.owed.len()) {
            std::mem::swap(&mut self.owed, &mut self.next);
        }
    }

    /// Gives the round up.
    pub fn cancel(&mut self) {
        self.at = None;
    }

    /// Whether a round is under way.
    pub(crate) fn is_begun(&self) -> bool {
        self.at.is_some()
    }

    /// The next part of the round: what is owed for it, and where to write what will be.
    pub(crate) fn take(&mut self, elements: usize) -> Result<(&[f32], &mut [f32])> {
        let at = self.at.unwrap_or(0);
        let Some(end) = at.checked_add(elements).filter(|end| *end <= self.owed.len()) else {
            let reason = format!("{elements} more elements after {at} of {}", self.owed.len());
            return Err(Error::Argument { operation: "all_reduce_f32", reason });
        };
        self.at = Some(end);
        Ok((&self.owed[at..end], &mut self.next[at..end]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(compression: Compression, values: &[f32]) -> Vec<f32> {
        let mut wire = vec![0xee; compression.bytes(values.len())];
        compression.encode(values, &mut wire);
        let mut back = vec![f32::NAN; values.len()];
        compression.decode(&wire, &mut back);
        back
    }

    fn numbers(count: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 7919 % 1000) as f32 - 500.0) * 10f32.powi((i / GROUP % 9) as i32 - 4))
            .collect()
    }

    #[test]
    fn rounding_is_as_fine_as_it_says() {
        for count in [0, 1, GROUP - 1, GROUP, GROUP + 1, 5000] {
            let values = numbers(count);
            assert_eq!(rounded(Compression::Off, &values), values);
            for (value, back) in values.iter().zip(rounded(Compression::Bf16, &values)) {
                // 8 bits of mantissa, rounded to nearest.
                assert!((value - back).abs() <= value.abs() / 256.0, "{value} {back}");
            }
            for (group, back) in values.chunks(GROUP).zip(rounded(Compression::Int8, &values).chunks(GROUP)) {
                let largest = group.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                // Half a step, and the rounding of the step and of the products themselves.
                let tolerance = largest / 127.0 / 2.0 * (1.0 + 1e-4);
                for (value, back) in group.iter().zip(back) {
                    assert!((value - back).abs() <= tolerance, "{value} {back}, of {largest}");
                }
            }
        }
    }

    #[test]
    fn bf16_is_what_others_call_bf16() {
        let values = [0.0, -0.0, 1.0, 1.003_906_2, 1.011_718_8, -3.3e38, 3.4e38, 1e-40, f32::NEG_INFINITY];
        for value in values.into_iter().chain(numbers(3000)) {
            assert_eq!(to_bf16(value), half::bf16::from_f32(value).to_bits(), "{value}");
        }
        assert!(half::bf16::from_bits(to_bf16(f32::from_bits(0x7f80_0001))).is_nan());
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for compression in [Compression::Bf16, Compression::Int8] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let back = rounded(compression, &[1.0, bad, 2.0]);
                assert!(!back[1].is_finite(), "{compression:?} {bad}: {back:?}");
            }
        }
    }

    #[test]
    fn the_smallest_numbers_do_not_become_infinite() {
        let values = [1e-44, -1e-44, 0.0];
        assert!(rounded(Compression::Int8, &values).iter().all(|value| value.is_finite()));
    }

    #[test]
    fn a_round_that_does_not_count_leaves_what_is_owed() {
        let mut feedback = Feedback::default();
        let round = |feedback: &mut Feedback, error: f32| {
            feedback.begin(4);
            for _ in 0..2 {
                let (_, next) = feedback.take(2).unwrap();
                next.fill(error);
            }
        };
        round(&mut feedback, 0.5);
        feedback.commit();
        assert_eq!(feedback.owed(), [0.5; 4]);
        round(&mut feedback, 9.0);
        feedback.cancel();
        feedback.commit();
        assert_eq!(feedback.owed(), [0.5; 4], "cancelled");
        feedback.begin(4);
        feedback.take(2).unwrap().1.fill(9.0);
        feedback.commit();
        assert_eq!(feedback.owed(), [0.5; 4], "half a round");
        assert!(feedback.take(5).is_err());
        feedback.begin(3);
        assert_eq!(feedback.owed(), [0.0; 3], "another sum");
        assert_eq!(Feedback::restored(vec![1.0]).owed(), [1.0]);
    }
}
