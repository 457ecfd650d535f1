//! Joining a generation over TCP: who is let in, who is not, and that nobody can hold it up.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use common::{HANGS, join_all, listeners, options};
use shanty_collective::{
    AbortHandle, Collective, Compression, Error,
    tcp::{JoinOptions, Listener, Token},
};

const SHORT: Duration = Duration::from_millis(400);

/// Joins as ranks 0 and 1 with options that `change` differs, and returns what both were told.
fn join_pair(change: impl Fn(&mut JoinOptions) + Sync) -> [Result<(), Error>; 2] {
    let (listeners, members) = listeners(2);
    thread::scope(|scope| {
        let joins = [0, 1].map(|rank| {
            let mut options = options(&members, rank, 3);
            options.deadline = SHORT;
            change(&mut options);
            let listener = &listeners[rank as usize];
            scope.spawn(move || listener.join(&options, AbortHandle::new()).map(drop))
        });
        joins.map(|join| join.join().unwrap())
    })
}

#[test]
fn a_wrong_token_is_turned_away_by_both_sides() {
    for result in join_pair(|options| options.token = Token([options.rank as u8; 32])) {
        let error = result.unwrap_err();
        assert_eq!(error.code(), "SH0781");
        assert!(error.to_string().contains("does not hold the generation's token"), "{error}");
    }
}

#[test]
fn another_job_is_turned_away() {
    for result in join_pair(|options| options.job = format!("job {}", options.rank)) {
        assert_eq!(result.unwrap_err().code(), "SH0781");
    }
}

#[test]
fn ranks_that_disagree_on_encryption_or_compression_are_turned_away_and_told_why() {
    let changes: [fn(&mut JoinOptions); 2] = [
        |options| options.encrypted = options.rank == 1,
        |options| options.compression = [Compression::Bf16, Compression::Int8][options.rank as usize],
    ];
    for change in changes {
        for result in join_pair(change) {
            let error = result.unwrap_err();
            assert_eq!(error.code(), "SH0781");
            assert!(error.to_string().contains("encrypts or compresses otherwise"), "{error}");
        }
    }
}

#[test]
fn a_stale_generation_is_turned_away_and_told_why() {
    let [stale, current] = join_pair(|options| options.generation += u64::from(options.rank));
    let (stale, current) = (stale.unwrap_err(), current.unwrap_err());
    assert!(stale.to_string().contains("it is at generation 4"), "{stale}");
    assert!(current.to_string().contains("in generation 3"), "{current}");
}

#[test]
fn another_world_size_is_turned_away() {
    let results = join_pair(|options| {
        if options.rank == 0 {
            options.members.push("127.0.0.1:1".to_owned());
        }
    });
    assert!(results.iter().all(Result::is_err));
}

#[test]
fn the_right_pair_joins() {
    assert_eq!(join_pair(|_| {}), [Ok(()), Ok(())]);
}

#[test]
fn strangers_do_not_disturb() {
    let (listeners, members) = listeners(3);
    // Some are there before anybody joins: silent, talking nonsense, and gone again.
    let mut strangers: Vec<TcpStream> = Vec::new();
    for member in &members {
        strangers.push(TcpStream::connect(member).unwrap());
        let mut nonsense = TcpStream::connect(member).unwrap();
        nonsense.write_all(&[b'x'; 4096]).unwrap();
        strangers.push(nonsense);
        let mut half = TcpStream::connect(member).unwrap();
        half.write_all(b"shanty/2").unwrap();
        strangers.push(half);
        drop(TcpStream::connect(member).unwrap());
    }
    let start = Instant::now();
    let mut group = join_all(&listeners, &members, 1);
    // One after the other, the two silent ones at each door would take 1.5 s each.
    assert!(start.elapsed() < Duration::from_secs(3), "waited for strangers: {:?}", start.elapsed());
    thread::scope(|scope| {
        for member in &mut group {
            scope.spawn(|| member.all_reduce_u64(&mut [1]).unwrap());
        }
    });
    for mut stranger in strangers {
        stranger.set_read_timeout(Some(HANGS)).unwrap();
        // Closed or reset, without a byte.
        assert!(matches!(stranger.read(&mut [0]), Ok(0) | Err(_)));
    }
}

#[test]
fn a_slow_loris_is_dropped_while_joining_goes_on() {
    let (listeners, members) = listeners(2);
    let abort = AbortHandle::new();
    let options = options(&members, 0, 1);
    thread::scope(|scope| {
        let joining = scope.spawn(|| listeners[0].join(&options, abort.clone()).map(drop));
        let mut loris = TcpStream::connect(&members[0]).unwrap();
        loris.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let start = Instant::now();
        let dropped = loop {
            // A byte now and then, so that it never falls silent.
            let written = loris.write(b"s");
            match loris.read(&mut [0]) {
                Ok(0) => break start.elapsed(),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && written.is_ok() => {}
                Err(_) => break start.elapsed(),
                Ok(_) => panic!("it was answered"),
            }
            assert!(start.elapsed() < HANGS);
        };
        assert!(dropped < Duration::from_secs(4), "dropped after {dropped:?}");
        abort.abort("enough");
        assert!(matches!(joining.join().unwrap(), Err(Error::Aborted { .. })));
    });
}

#[test]
fn a_member_that_is_late_is_waited_for() {
    let (mut listeners, members) = listeners(2);
    let late = listeners.pop().unwrap();
    let (early_options, late_options) = (options(&members, 0, 9), options(&members, 1, 9));
    thread::scope(|scope| {
        let early = scope.spawn(|| listeners[0].join(&early_options, AbortHandle::new()));
        thread::sleep(Duration::from_millis(150));
        let late = late.join(&late_options, AbortHandle::new()).unwrap();
        let early = early.join().unwrap().unwrap();
        assert_eq!((early.rank(), early.world_size(), late.rank()), (0, 2, 1));
    });
}

#[test]
fn a_member_that_is_a_generation_behind_catches_up() {
    let (listeners, members) = listeners(2);
    let [ahead, behind, now] =
        [(0, 5), (1, 4), (1, 5)].map(|(rank, generation)| options(&members, rank, generation));
    let abort = AbortHandle::new();
    thread::scope(|scope| {
        let ahead = scope.spawn(|| listeners[0].join(&ahead, AbortHandle::new()).map(drop));
        let stale = scope.spawn(|| listeners[1].join(&behind, abort.clone()).map(drop));
        thread::sleep(Duration::from_millis(100));
        abort.abort("generation 4 is over");
        assert!(matches!(stale.join().unwrap(), Err(Error::Aborted { .. })));
        let caught_up = listeners[1].join(&now, AbortHandle::new()).map(drop);
        assert_eq!((ahead.join().unwrap(), caught_up), (Ok(()), Ok(())));
    });
}

#[test]
fn generations_follow_on_the_same_listeners() {
    let (listeners, members) = listeners(3);
    for generation in 1..=5 {
        let group = join_all(&listeners, &members, generation);
        assert_eq!(group.len(), 3);
        // Dropped without ceremony; the next one must not see what is left.
    }
    let survivors = &members[..2];
    let group = join_all(&listeners[..2], survivors, 6);
    assert_eq!(group[0].world_size(), 2);
}

#[test]
fn a_member_that_never_comes_is_named() {
    let (listeners, members) = listeners(3);
    // Rank 2 listens but does not join; rank 0 waits for it, rank 1 cannot reach it.
    let errors: Vec<Error> = thread::scope(|scope| {
        let joins: Vec<_> = [0u32, 1]
            .into_iter()
            .map(|rank| {
                let mut options = options(&members, rank, 1);
                options.deadline = SHORT;
                let listener = &listeners[rank as usize];
                scope.spawn(move || listener.join(&options, AbortHandle::new()).map(drop).unwrap_err())
            })
            .collect();
        joins.into_iter().map(|join| join.join().unwrap()).collect()
    });
    for error in errors {
        assert_eq!(error.code(), "SH0781");
        assert!(error.to_string().contains(&format!("rank 2 ({})", members[2])), "{error}");
    }
}

#[test]
fn an_abort_ends_joining_at_once() {
    let (listeners, members) = listeners(2);
    let abort = AbortHandle::new();
    let options = options(&members, 0, 1);
    thread::scope(|scope| {
        let joining = scope.spawn(|| listeners[0].join(&options, abort.clone()).map(drop));
        thread::sleep(Duration::from_millis(30));
        let start = Instant::now();
        abort.abort("told to leave");
        let error = joining.join().unwrap().unwrap_err();
        assert_eq!(error, Error::Aborted { reason: "told to leave".to_owned() });
        assert!(start.elapsed() < Duration::from_millis(1000), "took {:?}", start.elapsed());
    });
    let again = listeners[0].join(&options, abort);
    assert!(matches!(again, Err(Error::Aborted { .. })));
}

#[test]
fn wrong_options_and_addresses_have_codes() {
    let (listeners, members) = listeners(1);
    let wrong_rank = listeners[0].join(&options(&members, 1, 1), AbortHandle::new()).map(drop).unwrap_err();
    assert_eq!(wrong_rank.code(), "SH0787");
    let taken = Listener::bind(&members[0]).map(drop).unwrap_err();
    assert_eq!(taken.code(), "SH0780");
    assert!(taken.to_string().contains(&members[0]), "{taken}");
    assert_eq!(Listener::bind("no port").map(drop).unwrap_err().code(), "SH0780");

    let mut nowhere = options(&[members[0].clone(), "nowhere".to_owned()], 0, 1);
    nowhere.deadline = SHORT;
    let error = listeners[0].join(&nowhere, AbortHandle::new()).map(drop).unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
}

#[test]
fn a_world_of_one_needs_no_connection() {
    let (listeners, members) = listeners(1);
    let mut alone = listeners[0].join(&options(&members, 0, 1), AbortHandle::new()).unwrap();
    let mut sum = [0.0; 2];
    alone.all_reduce_f32(&[1.5, -0.0], &mut sum).unwrap();
    assert_eq!(sum.map(f32::to_bits), [1.5f32, -0.0].map(f32::to_bits));
    alone.abort_handle().abort("over");
    assert!(matches!(alone.all_reduce_u64(&mut [1]), Err(Error::Aborted { .. })));
}

#[test]
fn the_token_is_not_shown() {
    let text = format!("{:?}", options(&["a:1".to_owned()], 0, 77));
    assert!(!text.contains("77, 77"), "{text}");
}
