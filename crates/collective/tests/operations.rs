//! What every implementation computes, bit for bit.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;

use common::{MAKERS, Maker, bits, numbers, on_all};
use proptest::prelude::*;
use shanty_collective::sum;

fn ordered_sum(inputs: &[Vec<f32>]) -> Vec<f32> {
    let slices: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    let mut sum = vec![0.0; inputs[0].len()];
    sum::sum_in_order(&slices, &mut sum);
    sum
}

fn check_sum(name: &str, make: Maker, world_size: u32, counts: &[usize]) {
    let mut members = make(world_size);
    for &count in counts {
        let inputs: Vec<_> = (0..world_size).map(|rank| numbers(rank, count)).collect();
        let sums = on_all(&mut members, |member| {
            let before = &inputs[member.rank() as usize];
            let input = before.clone();
            let mut output = vec![f32::NAN; count];
            member.all_reduce_f32(&input, &mut output).unwrap();
            assert!(input == *before, "the input was written");
            output
        });
        let expected = if name == "nccl" { sums[0].clone() } else { ordered_sum(&inputs) };
        for (rank, sum) in sums.iter().enumerate() {
            assert!(bits(sum) == bits(&expected), "{name}: rank {rank} of {world_size}, {count} elements");
        }
        // NCCL's order is its own.
        check_close(&inputs, &expected);
    }
}

/// Whether a sum in any order is as near to the exact one as n - 1 roundings allow.
fn check_close(inputs: &[Vec<f32>], sums: &[f32]) {
    for (index, sum) in sums.iter().enumerate() {
        let parts: Vec<f64> = inputs.iter().map(|input| f64::from(input[index])).collect();
        let exact: f64 = parts.iter().sum();
        // n - 1 additions, each off by at most half a unit in the last place of a partial sum, and no
        // partial sum is larger than the sum of the magnitudes.
        let magnitude: f64 = parts.iter().map(|part| part.abs()).sum();
        let tolerance = (parts.len() - 1) as f64 * magnitude * f64::from(f32::EPSILON) / 2.0;
        assert!((f64::from(*sum) - exact).abs() <= tolerance, "element {index}: {sum} for {exact}");
    }
}

#[test]
fn every_rank_gets_the_bits_of_the_stated_order() {
    let block = sum::BLOCK;
    // Small ones are gathered, large ones go around the ring; the last few straddle blocks and ranks.
    let counts = [0, 1, 3, 1000, block - 1, block, block + 1, 5 * block + 7, 1 << 20];
    for (name, make) in MAKERS {
        for world_size in 1..=5 {
            check_sum(name, make, world_size, &counts);
        }
    }
}

#[test]
fn the_stated_order_is_close_to_the_exact_sum() {
    let inputs: Vec<_> = (0..5).map(|rank| numbers(rank, 1000)).collect();
    check_close(&inputs, &ordered_sum(&inputs));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn any_length_and_any_number_of_ranks(world_size in 1u32..=5, count in 0usize..120_000) {
        for (name, make) in MAKERS {
            check_sum(name, make, world_size, &[count]);
        }
    }
}

#[test]
fn integers_are_summed_exactly_and_wrap() {
    for (name, make) in MAKERS {
        for world_size in 1..=5 {
            for count in [0usize, 1, 5, 20_000] {
                let sums = on_all(&mut make(world_size), |member| {
                    let rank = u64::from(member.rank());
                    let mut values: Vec<u64> =
                        (0..count as u64).map(|index| (index << 32) + rank * rank).collect();
                    values.iter_mut().take(1).for_each(|first| *first = u64::MAX - rank);
                    member.all_reduce_u64(&mut values).unwrap();
                    values
                });
                let ranks = u64::from(world_size);
                let squares: u64 = (0..ranks).map(|rank| rank * rank).sum();
                for sum in sums {
                    assert_eq!(sum.len(), count);
                    for (index, value) in (0..).zip(sum) {
                        let expected = match index {
                            // (2^64 - 1 - r) over all r wraps to -(n + 0 + 1 + … + (n - 1)).
                            0 => (ranks + ranks * (ranks - 1) / 2).wrapping_neg(),
                            _ => (index << 32) * ranks + squares,
                        };
                        assert_eq!(value, expected, "{name}: element {index}, {world_size} ranks");
                    }
                }
            }
        }
    }
}

#[test]
fn gathered_bytes_lie_by_rank() {
    for (name, make) in MAKERS {
        for world_size in 1..=4 {
            for bytes in [0, 1, 3, 200_000] {
                let gathered = on_all(&mut make(world_size), |member| {
                    let input = vec![member.rank() as u8 + 1; bytes];
                    let mut output = vec![0; bytes * world_size as usize];
                    member.all_gather(&input, &mut output).unwrap();
                    output
                });
                let expected: Vec<u8> =
                    (0..world_size).flat_map(|rank| vec![rank as u8 + 1; bytes]).collect();
                assert!(gathered.iter().all(|all| *all == expected), "{name}: {bytes} × {world_size}");
            }
        }
    }
}

#[test]
fn every_root_reaches_everyone() {
    for (name, make) in MAKERS {
        for world_size in 1..=4 {
            let mut members = make(world_size);
            for root in 0..world_size {
                for bytes in [0, 1, 65_536, 1_000_003] {
                    let content =
                        |rank: u32| (0..bytes).map(|i| (i as u32 * 7 + rank) as u8).collect::<Vec<_>>();
                    let received = on_all(&mut members, |member| {
                        let mut buffer = content(member.rank());
                        member.broadcast(root, &mut buffer).unwrap();
                        buffer
                    });
                    let expected = content(root);
                    let all = received.iter().all(|buffer| *buffer == expected);
                    assert!(all, "{name}: root {root} of {world_size}, {bytes} bytes");
                }
            }
        }
    }
}

#[test]
fn operations_follow_one_another_without_pause() {
    for (name, make) in MAKERS {
        let sums = on_all(&mut make(3), |member| {
            let mut total = 0.0;
            for round in 0..100u32 {
                let mut output = [0.0; 2];
                member.all_reduce_f32(&[round as f32, 1.0], &mut output).unwrap();
                let mut count = [1];
                member.all_reduce_u64(&mut count).unwrap();
                let mut root = [member.rank() as u8];
                member.broadcast(round % 3, &mut root).unwrap();
                let mut ranks = [0; 3];
                member.all_gather(&[member.rank() as u8], &mut ranks).unwrap();
                assert_eq!((count[0], u32::from(root[0]), ranks), (3, round % 3, [0, 1, 2]));
                total += output[0] + output[1];
            }
            total
        });
        // 3 × (0 + … + 99) + 100 × 3, all exact in f32.
        assert_eq!(sums, [15_150.0; 3], "{name}");
    }
}
