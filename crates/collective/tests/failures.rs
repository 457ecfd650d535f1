//! What every implementation does when something goes wrong: it says so, everywhere, at once.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use common::{MAKERS, bits, is_break, numbers, on_all, on_all_once, wait_for};
use shanty_collective::{AbortHandle, Collective, Error, Operation, sum};
use shanty_diagnostic::{Diagnose, Kind};

/// Far more than it takes on a busy machine, far less than any deadline.
const AT_ONCE: Duration = Duration::from_secs(5);

fn reduce(member: &mut dyn Collective, count: usize) -> Result<Vec<f32>, Error> {
    let input = numbers(member.rank(), count);
    let mut output = vec![0.0; count];
    member.all_reduce_f32(&input, &mut output)?;
    Ok(output)
}

#[test]
fn an_abort_ends_a_waiting_call_and_all_later_ones() {
    for (name, make) in MAKERS {
        for count in [4, 1 << 18] {
            let mut members = make(3);
            // Rank 2 never calls, so the others wait.
            let absent = members.pop();
            let waiting = Arc::new(AtomicU32::new(0));
            for member in &mut members {
                let waiting = Arc::clone(&waiting);
                member.set_hop_hook(Some(Box::new(move |point| {
                    waiting.fetch_add(u32::from(point.hop == 0), Ordering::SeqCst);
                })));
            }
            let abort = members[0].abort_handle();
            let start = thread::scope(|scope| {
                let calls = scope.spawn(|| {
                    on_all(&mut members, |member| {
                        let first = reduce(member, count).unwrap_err();
                        let input = numbers(member.rank(), count);
                        let second = member.all_reduce_u64(&mut [1]).unwrap_err();
                        (first, second, input)
                    })
                });
                wait_for("both to wait", || waiting.load(Ordering::SeqCst) == 2);
                let start = Instant::now();
                abort.abort("rank 2 is lost");
                abort.abort("a later reason");
                let results = calls.join().unwrap();
                let aborted = Error::Aborted { reason: "rank 2 is lost".to_owned() };
                assert_eq!((&results[0].0, &results[0].1), (&aborted, &aborted), "{name}");
                // Rank 1 was not aborted itself: the break of rank 0 reached it.
                assert!(matches!(results[1].0, Error::PeerLost { .. }), "{name}: {}", results[1].0);
                assert!(matches!(results[1].1, Error::Broken { .. }), "{name}: {}", results[1].1);
                start
            });
            assert!(start.elapsed() < AT_ONCE, "{name}: took {:?}", start.elapsed());
            drop(absent);
        }
    }
}

#[test]
fn an_abort_between_calls_reaches_those_who_wait() {
    for (name, make) in MAKERS {
        let mut members = make(3);
        let busy = members.remove(1);
        busy.abort_handle().abort("told to leave");
        let errors = on_all_once(members, |member| reduce(member, 1 << 17).unwrap_err());
        assert!(errors.iter().all(is_break), "{name}: {errors:?}");
    }
}

#[test]
fn a_dead_peer_is_noticed_by_all() {
    for (name, make) in MAKERS {
        for world_size in [2, 3, 5] {
            for count in [1, 1 << 18] {
                let mut members = make(world_size);
                drop(members.remove(1));
                let start = Instant::now();
                let errors = on_all_once(members, |member| reduce(member, count).unwrap_err());
                assert!(errors.iter().all(is_break), "{name}: {errors:?}");
                assert!(start.elapsed() < AT_ONCE, "{name}: took {:?}", start.elapsed());
            }
        }
    }
}

#[test]
fn a_neighbour_names_the_dead_peer() {
    for (name, make) in MAKERS {
        let mut members = make(2);
        drop(members.remove(1));
        let error = reduce(members[0].as_mut(), 1).unwrap_err();
        assert_eq!((error.code(), error.diagnostic().kind), ("SH0782", Kind::Transient), "{name}");
        assert!(error.to_string().contains("rank 1"), "{name}: {error}");
    }
}

/// Whatever hop a rank dies at: nobody hangs, and whoever has a sum has the whole sum.
#[test]
fn death_at_any_hop_leaves_whole_sums_or_errors() {
    for (name, make) in MAKERS {
        let (world_size, count) = (3, 4 * sum::BLOCK + 5);
        let inputs: Vec<_> = (0..world_size).map(|rank| numbers(rank, count)).collect();
        let slices: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
        let mut expected = vec![0.0; count];
        sum::sum_in_order(&slices, &mut expected);

        let hops = Arc::new(AtomicU32::new(1));
        let mut hop = 0;
        while hop < hops.load(Ordering::SeqCst) {
            let mut members = make(world_size);
            let dying = members[1].abort_handle();
            let seen = Arc::clone(&hops);
            members[1].set_hop_hook(Some(Box::new(move |point| {
                assert_eq!((point.operation, point.sequence.min(1)), (Operation::AllReduceF32, 1));
                seen.store(point.hops, Ordering::SeqCst);
                if point.hop == hop {
                    dying.abort("dies here");
                }
            })));
            let results = on_all_once(members, |member| reduce(member, count));
            assert!(
                matches!(results[1], Err(Error::Aborted { .. })),
                "{name}: hop {hop}: {:?}",
                results[1].is_ok()
            );
            for result in results {
                match result {
                    Ok(sum) => assert!(bits(&sum) == bits(&expected), "{name}: hop {hop}: half a sum"),
                    Err(error) => assert!(is_break(&error), "{name}: hop {hop}: {error}"),
                }
            }
            hop += 1;
        }
        assert_eq!(hop, if name.starts_with("tcp") { 2 * (world_size - 1) } else { 1 }, "{name}: hops seen");
    }
}

#[test]
fn a_slow_peer_is_waited_for() {
    for (name, make) in MAKERS {
        let results = on_all(&mut make(3), |member| {
            if member.rank() == 1 {
                thread::sleep(Duration::from_millis(50));
            }
            reduce(member, 100_000)
        });
        assert!(results.iter().all(Result::is_ok), "{name}");
        assert!(results.iter().all(|result| *result == results[0]), "{name}");
    }
}

#[test]
fn a_deadline_ends_the_wait_for_a_slow_peer() {
    for (name, make) in MAKERS {
        for count in [1, 1 << 18] {
            let mut members = make(2);
            let limit = Duration::from_millis(50);
            members[0].set_call_deadline(Some(limit));
            let start = Instant::now();
            let error = reduce(members[0].as_mut(), count).unwrap_err();
            assert!(start.elapsed() >= limit, "{name}");
            assert_eq!(error.code(), "SH0786", "{name}: {error}");
            assert!(error.to_string().contains("rank 1"), "{name}: {error}");
            // What rank 0 had sent may have been all that rank 1 needed for this sum, not for the next.
            let late = reduce(members[1].as_mut(), count).and_then(|_| reduce(members[1].as_mut(), count));
            assert!(late.as_ref().is_err_and(is_break), "{name}: {late:?}");
        }
    }
}

#[test]
fn different_lengths_are_an_error_everywhere() {
    for (name, make) in MAKERS {
        for world_size in [2, 3, 4] {
            // Both gathered, one gathered and one around the ring, both around the ring; and nothing.
            for (few, many) in [(0, 1), (3, 4), (0, 1 << 17), (5, 1 << 17), (1 << 17, (1 << 17) + 1)] {
                for odd in [0, world_size - 1] {
                    let errors = on_all_once(make(world_size), |member| {
                        let count = if member.rank() == odd { many } else { few };
                        reduce(member, count).unwrap_err()
                    });
                    let context = format!("{name}: {few} and {many}, rank {odd} of {world_size}: {errors:?}");
                    assert!(errors.iter().all(is_break), "{context}");
                    assert!(errors.iter().any(|error| error.code() == "SH0784"), "{context}");
                }
            }
        }
    }
}

#[test]
fn different_calls_are_an_error_everywhere() {
    for (name, make) in MAKERS {
        type Call = fn(&mut dyn Collective) -> Result<(), Error>;
        let calls: [Call; 3] = [
            |member| member.all_reduce_u64(&mut [1]),
            |member| member.broadcast(0, &mut [0; 8]),
            |member| member.broadcast(1, &mut [0; 8]),
        ];
        for (first, second) in [(0, 1), (1, 2), (2, 0)] {
            let errors = on_all_once(make(2), |member| {
                let call = calls[if member.rank() == 0 { first } else { second }];
                // A root may be done before the other side notices; then its next call fails.
                call(member).and_then(|()| member.all_reduce_u64(&mut [1])).unwrap_err()
            });
            let context = format!("{name}: {first} and {second}: {errors:?}");
            assert!(errors.iter().any(|error| error.code() == "SH0783"), "{context}");
        }
    }
}

#[test]
fn wrong_arguments_are_refused_before_anything_is_sent() {
    for (name, make) in MAKERS {
        let codes = on_all(&mut make(2), |member| {
            let errors = [
                member.all_reduce_f32(&[1.0], &mut [0.0; 2]).unwrap_err(),
                member.all_gather(&[1], &mut [0; 3]).unwrap_err(),
                member.broadcast(2, &mut [0]).unwrap_err(),
            ];
            // The generation goes on.
            member.all_reduce_u64(&mut [1]).unwrap();
            errors.map(|error| error.code())
        });
        assert_eq!(codes, [["SH0787"; 3]; 2], "{name}");
    }
}

#[test]
fn a_hook_is_taken_off_again() {
    for (_, make) in MAKERS {
        let (sender, seen) = mpsc::channel();
        let mut members = make(2);
        members[0].set_hop_hook(Some(Box::new(move |point| sender.send(point).unwrap())));
        on_all(&mut members, |member| member.all_reduce_u64(&mut [1]).unwrap());
        members[0].set_hop_hook(None);
        on_all(&mut members, |member| member.all_reduce_u64(&mut [1]).unwrap());
        let seen: Vec<_> = seen.iter().collect();
        assert_eq!(seen.len(), 1);
        assert_eq!((seen[0].operation, seen[0].hop, seen[0].hops), (Operation::AllReduceU64, 0, 1));
    }
}

#[test]
fn handles_are_shared_between_threads() {
    fn check<T: Clone + Send + Sync>() {}
    check::<AbortHandle>();
}
