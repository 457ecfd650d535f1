//! Generations to test with: threads of this process, over every implementation.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod fake;

use std::{
    thread,
    time::{Duration, Instant},
};

use shanty_collective::{
    AbortHandle, Collective, Compression, Error, local,
    tcp::{JoinOptions, Listener, TcpCollective, Token},
};

/// How a generation is made.
pub type Maker = fn(u32) -> Vec<Box<dyn Collective>>;

/// Every implementation, by name.
pub const MAKERS: [(&str, Maker); 5] = [
    ("local", make_local),
    ("tcp", make_tcp),
    ("tcp encrypted", make_tcp_encrypted),
    // Only the sums of rounds are rounded; `rounded.rs` is about those.
    ("tcp rounding", make_tcp_rounding),
    // The fake library without a card: the crate's own half is what is tested.
    ("nccl", make_nccl),
];

/// A test that would hang ends with `Error::Deadline` after this.
pub const HANGS: Duration = Duration::from_secs(30);

fn make_local(world_size: u32) -> Vec<Box<dyn Collective>> {
    boxed(local::group(world_size))
}

fn make_tcp(world_size: u32) -> Vec<Box<dyn Collective>> {
    boxed(tcp_group(world_size))
}

fn make_tcp_encrypted(world_size: u32) -> Vec<Box<dyn Collective>> {
    boxed(tcp_group_with(world_size, true, Compression::Off))
}

fn make_tcp_rounding(world_size: u32) -> Vec<Box<dyn Collective>> {
    boxed(tcp_group_with(world_size, true, Compression::Int8))
}

fn make_nccl(world_size: u32) -> Vec<Box<dyn Collective>> {
    boxed(fake::nccl_members(world_size))
}

/// Members of any kind, which give up what would hang.
pub fn boxed<C: Collective + 'static>(members: Vec<C>) -> Vec<Box<dyn Collective>> {
    let mut members: Vec<_> =
        members.into_iter().map(|member| Box::new(member) as Box<dyn Collective>).collect();
    members.iter_mut().for_each(|member| member.set_call_deadline(Some(HANGS)));
    members
}

/// Listeners on loopback, and their addresses.
pub fn listeners(world_size: u32) -> (Vec<Listener>, Vec<String>) {
    let listeners: Vec<_> = (0..world_size).map(|_| Listener::bind("127.0.0.1:0").unwrap()).collect();
    let members = listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
    (listeners, members)
}

/// What `rank` needs to join `generation`.
pub fn options(members: &[String], rank: u32, generation: u64) -> JoinOptions {
    JoinOptions {
        job: "pirate".to_owned(),
        generation,
        rank,
        members: members.to_vec(),
        token: Token([generation as u8; 32]),
        deadline: HANGS,
        encrypted: false,
        compression: Compression::Off,
    }
}

/// Has all listeners join a generation.
pub fn join_all(listeners: &[Listener], members: &[String], generation: u64) -> Vec<TcpCollective> {
    join_all_with(listeners, members, generation, false, Compression::Off)
}

fn join_all_with(
    listeners: &[Listener],
    members: &[String],
    generation: u64,
    encrypted: bool,
    compression: Compression,
) -> Vec<TcpCollective> {
    thread::scope(|scope| {
        let joins: Vec<_> = (0..)
            .zip(listeners)
            .map(|(rank, listener)| {
                let options = JoinOptions { encrypted, compression, ..options(members, rank, generation) };
                scope.spawn(move || listener.join(&options, AbortHandle::new()).unwrap())
            })
            .collect();
        joins.into_iter().map(|join| join.join().unwrap()).collect()
    })
}

pub fn tcp_group(world_size: u32) -> Vec<TcpCollective> {
    tcp_group_with(world_size, false, Compression::Off)
}

pub fn tcp_group_with(world_size: u32, encrypted: bool, compression: Compression) -> Vec<TcpCollective> {
    let (listeners, members) = listeners(world_size);
    join_all_with(&listeners, &members, 1, encrypted, compression)
}

/// Runs `work` as every member at once; results by rank.
pub fn on_all<T: Send>(
    members: &mut [Box<dyn Collective>],
    work: impl Fn(&mut dyn Collective) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> =
            members.iter_mut().map(|member| scope.spawn(move || work(member.as_mut()))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// As `on_all`, but each member is dropped as soon as its work is done, as by a worker that gives up.
pub fn on_all_once<T: Send>(
    members: Vec<Box<dyn Collective>>,
    work: impl Fn(&mut dyn Collective) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> =
            members.into_iter().map(|mut member| scope.spawn(move || work(member.as_mut()))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Numbers of very different sizes and signs, so that another order of the sum shows in the bits.
pub fn numbers(rank: u32, count: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(u64::from(rank) + 1);
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let fraction = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            fraction * 2f32.powi((state % 41) as i32 - 20)
        })
        .collect()
}

/// Whether an error says that this rank's neighbours or the call went away, as opposed to a test that hung.
pub fn is_break(error: &Error) -> bool {
    matches!(
        error,
        Error::PeerLost { .. } | Error::Aborted { .. } | Error::Broken { .. } | Error::LengthMismatch { .. }
    )
}

pub fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// Waits for a condition, not for a time; fails after `HANGS`.
pub fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < HANGS, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}
