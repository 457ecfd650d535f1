//! Sums that travel rounded: how near they are, what is owed for it, and that a break takes nothing.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;

use std::thread;

use common::{HANGS, bits, is_break, numbers, tcp_group_with};
use shanty_collective::{Collective, Compression, Error, Feedback, sum, tcp::TcpCollective};

const WAYS: [Compression; 2] = [Compression::Bf16, Compression::Int8];

fn group(world_size: u32, compression: Compression) -> Vec<TcpCollective> {
    let mut members = tcp_group_with(world_size, false, compression);
    members.iter_mut().for_each(|member| member.set_call_deadline(Some(HANGS)));
    members
}

/// What `work` gives at every member at once, by rank.
fn on_all<T: Send>(members: &mut [TcpCollective], work: impl Fn(&mut TcpCollective) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = members.iter_mut().map(|member| scope.spawn(move || work(member))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A round over `input` in parts of `part` elements.
fn round(member: &mut TcpCollective, input: &[f32], part: usize) -> Result<Vec<f32>, Error> {
    let mut output = vec![f32::NAN; input.len()];
    member.feedback().unwrap().begin(input.len());
    for (input, output) in input.chunks(part).zip(output.chunks_mut(part)) {
        member.all_reduce_f32(input, output)?;
    }
    member.feedback().unwrap().commit();
    Ok(output)
}

fn exact(inputs: &[Vec<f32>]) -> Vec<f64> {
    (0..inputs[0].len()).map(|index| inputs.iter().map(|input| f64::from(input[index])).sum()).collect()
}

#[test]
fn every_rank_gets_the_same_bits_and_the_loss_is_owed_to_the_last_bit() {
    let count = 3 * sum::BLOCK + 777;
    for compression in WAYS {
        for world_size in [2, 3, 4] {
            let mut members = group(world_size, compression);
            let inputs: Vec<_> = (0..world_size).map(|rank| numbers(rank, count)).collect();
            let sums = on_all(&mut members, |member| {
                round(member, &inputs[member.rank() as usize], 2 * sum::BLOCK).unwrap()
            });
            assert!(sums.iter().all(|sum| bits(sum) == bits(&sums[0])), "{compression:?} {world_size}");

            // What was sent and what all owe is the sum: only f32 additions are lost, n a rank at most.
            let owed: Vec<_> =
                members.iter_mut().map(|member| member.feedback().unwrap().owed().to_vec()).collect();
            let exact = exact(&inputs);
            for index in 0..count {
                let owed: f64 = owed.iter().map(|owed| f64::from(owed[index])).sum();
                let magnitude: f64 = inputs.iter().map(|input| f64::from(input[index].abs())).sum::<f64>()
                    + owed.abs()
                    + f64::from(sums[0][index].abs());
                let tolerance = 4.0 * f64::from(world_size) * magnitude * f64::from(f32::EPSILON);
                let whole = f64::from(sums[0][index]) + owed;
                assert!((whole - exact[index]).abs() <= tolerance, "{index}: {whole} {}", exact[index]);
            }
        }
    }
}

#[test]
fn over_many_rounds_the_mean_is_exact_but_for_one_rounding() {
    // A number that neither way can hold, beside one that sets the scale.
    let (rounds, count) = (64, 300);
    for compression in WAYS {
        let mut members = group(2, compression);
        let totals = on_all(&mut members, |member| {
            let mut input = vec![0.001_234_5; count];
            input[7] = 1.0;
            let mut total = vec![0.0f64; count];
            for _ in 0..rounds {
                for (total, sum) in total.iter_mut().zip(round(member, &input, count).unwrap()) {
                    *total += f64::from(sum);
                }
            }
            total
        });
        // Owed by two ranks at the end: half a step of the scale each, 2/127; for bf16 far less.
        let tolerance = 2.0 * (2.0 / 127.0);
        let expected = f64::from(rounds) * 2.0 * 0.001_234_5;
        assert!(expected > 5.0 * tolerance, "a sum without feedback would be 0 and fail");
        for (index, total) in totals[0].iter().enumerate().filter(|(index, _)| *index != 7) {
            assert!((total - expected).abs() <= tolerance, "{compression:?} {index}: {total} for {expected}");
        }
    }
}

#[test]
fn sums_outside_of_a_round_are_exact() {
    for compression in WAYS {
        let inputs: Vec<_> = (0..2).map(|rank| numbers(rank, 100_000)).collect();
        let slices: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
        let mut expected = vec![0.0; 100_000];
        sum::sum_in_order(&slices, &mut expected);
        let sums = on_all(&mut group(2, compression), |member| {
            let mut output = vec![0.0; 100_000];
            member.all_reduce_f32(&inputs[member.rank() as usize], &mut output).unwrap();
            output
        });
        assert!(sums.iter().all(|sum| bits(sum) == bits(&expected)));
    }
}

#[test]
fn a_break_in_the_middle_takes_nothing_of_what_is_owed() {
    let count = 4 * sum::BLOCK;
    let mut members = group(2, Compression::Int8);
    on_all(&mut members, |member| round(member, &numbers(member.rank(), count), count).unwrap());
    let before: Vec<_> =
        members.iter_mut().map(|member| member.feedback().unwrap().owed().to_vec()).collect();
    assert!(before[0].iter().any(|owed| *owed != 0.0));
    let abort = members[1].abort_handle();
    let errors = on_all(&mut members, |member| {
        if member.rank() == 1 {
            member.feedback().unwrap().begin(count);
            let (input, mut output) = (numbers(1, count / 2), vec![0.0; count / 2]);
            member.all_reduce_f32(&input, &mut output).unwrap();
            abort.abort("lost");
            return member.all_reduce_f32(&input, &mut output).unwrap_err();
        }
        round(member, &numbers(0, count), count / 2).unwrap_err()
    });
    assert!(errors.iter().all(is_break), "{errors:?}");

    // The next generation takes the debts over and computes what it would have without the break.
    let kept: Vec<_> = members.iter_mut().map(|member| member.set_feedback(None).unwrap()).collect();
    assert!(kept.iter().zip(&before).all(|(kept, before)| kept.owed() == before));
    let again = |feedback: Vec<Feedback>| {
        let mut members = group(2, Compression::Int8);
        for (member, feedback) in members.iter_mut().zip(feedback) {
            member.set_feedback(Some(feedback));
        }
        on_all(&mut members, |member| round(member, &numbers(member.rank(), count), count).unwrap())
    };
    let undisturbed = again(before.into_iter().map(Feedback::restored).collect());
    assert!(bits(&again(kept)[0]) == bits(&undisturbed[0]));
}

#[test]
fn what_is_not_finite_is_seen_by_all() {
    for compression in WAYS {
        let sums = on_all(&mut group(3, compression), |member| {
            let mut input = vec![1.0; 2000];
            if member.rank() == 2 {
                input[1500] = f32::NAN;
            }
            round(member, &input, 2000).unwrap()
        });
        assert!(sums.iter().all(|sum| !sum[1500].is_finite()), "{compression:?}");
    }
}

#[test]
fn members_that_begin_no_round_together_hear_of_it() {
    let errors = on_all(&mut group(2, Compression::Bf16), |member| {
        if member.rank() == 0 {
            member.feedback().unwrap().begin(100_000);
        }
        let (input, mut output) = (vec![1.0; 100_000], vec![0.0; 100_000]);
        let first = member.all_reduce_f32(&input, &mut output);
        first.and_then(|()| member.all_reduce_u64(&mut [1])).unwrap_err()
    });
    assert!(errors.iter().any(|error| error.code() == "SH0783"), "{errors:?}");
}
