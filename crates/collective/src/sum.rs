//! The order of sums.
//!
//! A buffer is cut into blocks of [`BLOCK`] elements. Block `b` belongs to *segment* `b % world_size`. The
//! sum of a segment `s` starts with rank `s` and goes once around the ring: `s, s + 1, …, s - 1`, rounded
//! to f32 at each addition. So the order depends on the world size and the element's index alone, and the
//! ring can add while it passes blocks on.

use std::ops::Range;

/// Elements in a block: 64 KiB of f32.
pub const BLOCK: usize = 16 * 1024;

/// Sums `inputs` (by rank) into `output` in the order above.
///
/// # Shapes
/// Every input and `output`: `[n]`.
pub fn sum_in_order(inputs: &[&[f32]], output: &mut [f32]) {
    debug_assert!(inputs.iter().all(|input| input.len() == output.len()));
    let world_size = inputs.len();
    let elements = output.len();
    for (block, sum) in output.chunks_mut(BLOCK).enumerate() {
        let range = block_range(block, elements);
        let first = block % world_size;
        sum.copy_from_slice(&inputs[first][range.clone()]);
        for step in 1..world_size {
            let input = &inputs[(first + step) % world_size][range.clone()];
            for (sum, input) in sum.iter_mut().zip(input) {
                *sum += input;
            }
        }
    }
}

/// One step of it: `sum[i] = so_far[i] + input[i]`.
pub(crate) fn add(sum: &mut [f32], so_far: &[f32], input: &[f32]) {
    for ((sum, so_far), input) in sum.iter_mut().zip(so_far).zip(input) {
        *sum = so_far + input;
    }
}

/// How many blocks of a buffer of `elements` belong to `segment`.
pub(crate) fn blocks_of(segment: usize, elements: usize, world_size: usize) -> usize {
    elements.div_ceil(BLOCK).saturating_sub(segment).div_ceil(world_size)
}

/// The elements of a block.
pub(crate) fn block_range(block: usize, elements: usize) -> Range<usize> {
    let start = (block * BLOCK).min(elements);
    start..(start + BLOCK).min(elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_share_out_every_block_once() {
        for world_size in 1..6 {
            for elements in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 3] {
                let shared: usize =
                    (0..world_size).map(|segment| blocks_of(segment, elements, world_size)).sum();
                assert_eq!(shared, elements.div_ceil(BLOCK), "{world_size} ranks, {elements} elements");
            }
        }
    }

    #[test]
    fn order_depends_on_the_block_not_on_the_length() {
        // 1e8 + 1 rounds to 1e8 in f32, so the place where the sum starts shows in the result.
        let long = 2 * BLOCK;
        let inputs = [vec![1e8f32; long], vec![1.0; long], vec![-1e8; long]];
        let slices: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
        let mut sum = vec![0.0; long];
        sum_in_order(&slices, &mut sum);
        assert_eq!(sum[0], 0.0, "(1e8 + 1) - 1e8");
        assert_eq!(sum[BLOCK], 0.0, "(1 - 1e8) + 1e8");

        let short: Vec<&[f32]> = slices.iter().map(|input| &input[..5]).collect();
        let mut few = vec![9.0; 5];
        sum_in_order(&short, &mut few);
        assert_eq!(few, sum[..5]);
    }

    #[test]
    fn a_lone_negative_zero_keeps_its_sign() {
        let mut sum = [1.0];
        sum_in_order(&[&[-0.0]], &mut sum);
        assert_eq!(sum[0].to_bits(), (-0.0f32).to_bits());
    }
}
