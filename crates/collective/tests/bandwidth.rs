//! How much of what plain sockets carry the ring carries, and what encryption and rounding cost. Prints; an optimised
//! build also asserts that the ring carries at least 70 %.
//!
//! `cargo test --release -p shanty-collective --test bandwidth -- --nocapture`
//!
//! In an all-reduce of `n` ranks each link carries `2 (n - 1) / n` of the buffer. The yardstick moves the
//! same bytes over the same number of plain sockets at the same time, each with a thread that writes and
//! one that reads, and sums nothing. It does so twice: between buffers of the ring's size, and from and to
//! a single part that stays in the cache, which no gradient does.
//!
//! Where the cores are the limit, as on loopback, and other work shares them, the ratio of processor times
//! says more than that of the clock: the yardstick has twice the threads and gets twice the turns. The bar takes the
//! better of the two, against plain sockets between buffers of the same size.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use common::{tcp_group, tcp_group_with};
use shanty_collective::{Collective, Compression, sum};

/// Unoptimised builds only show that it runs.
const ELEMENTS: usize = if cfg!(debug_assertions) { 1 << 18 } else { 1 << 24 };
const ROUNDS: usize = if cfg!(debug_assertions) { 1 } else { 9 };

/// The least share of what plain sockets carry.
const BAR: f64 = 0.70;

/// As many bytes in a write as the ring puts into a part.
const WRITE_BYTES: usize = sum::BLOCK * size_of::<f32>();

/// A link and what it moves: from where, to where.
struct Plain {
    out: TcpStream,
    into: TcpStream,
    source: Vec<u8>,
    target: Vec<u8>,
}

fn plain_sockets(links: usize, buffer_bytes: usize) -> Vec<Plain> {
    (0..links)
        .map(|_| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            out.set_nodelay(true).unwrap();
            let into = listener.accept().unwrap().0;
            Plain { out, into, source: vec![1; buffer_bytes], target: vec![0; buffer_bytes] }
        })
        .collect()
}

/// Moves `bytes` over each link, going through its buffers again and again.
fn plain(links: &mut [Plain], bytes: usize) {
    let writes = bytes / WRITE_BYTES;
    thread::scope(|scope| {
        for Plain { out, into, source, target } in links {
            scope.spawn(move || {
                source.chunks(WRITE_BYTES).cycle().take(writes).for_each(|part| out.write_all(part).unwrap());
            });
            scope.spawn(move || {
                for index in 0..writes {
                    let start = index * WRITE_BYTES % target.len();
                    into.read_exact(&mut target[start..][..WRITE_BYTES]).unwrap();
                }
            });
        }
    });
}

fn ring(group: &mut [impl Collective], buffers: &mut [(Vec<f32>, Vec<f32>)]) {
    thread::scope(|scope| {
        for (member, (input, output)) in group.iter_mut().zip(buffers) {
            scope.spawn(move || member.all_reduce_f32(input, output).unwrap());
        }
    });
}

/// Clock and processor time of several rounds.
#[derive(Default)]
struct Times {
    clock: Vec<Duration>,
    processor: f64,
}

impl Times {
    fn add(&mut self, work: impl FnOnce()) {
        let (start, processor) = (Instant::now(), processor_seconds());
        work();
        self.clock.push(start.elapsed());
        self.processor += processor_seconds() - processor;
    }

    fn median(&self) -> f64 {
        let mut sorted = self.clock.clone();
        sorted.sort_unstable();
        sorted[sorted.len() / 2].as_secs_f64()
    }
}

/// What this process has used, user and system; 0 where the system does not say.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

#[test]
fn ring_against_plain_sockets() {
    for ranks in [2, 4] {
        let mut group = tcp_group(ranks as u32);
        let mut buffers: Vec<_> =
            (0..ranks).map(|rank| (vec![rank as f32 + 1.0; ELEMENTS], vec![0.0; ELEMENTS])).collect();
        let buffer_bytes = ELEMENTS * size_of::<f32>();
        let link_bytes = buffer_bytes / ranks * 2 * (ranks - 1);
        let mut links = [plain_sockets(ranks, buffer_bytes), plain_sockets(ranks, WRITE_BYTES)];
        // The first round warms buffers and windows. Taken in turn: the machine is not ours alone.
        let mut times = [Times::default(), Times::default(), Times::default()];
        for round in 0..=ROUNDS {
            if round == 1 {
                times = Default::default();
            }
            times[0].add(|| ring(&mut group, &mut buffers));
            times[1].add(|| plain(&mut links[0], link_bytes));
            times[2].add(|| plain(&mut links[1], link_bytes));
        }
        let expected = (ranks * (ranks + 1) / 2) as f32;
        assert!(buffers.iter().all(|(_, output)| output.iter().all(|sum| *sum == expected)));

        let rate = |times: &Times| link_bytes as f64 / times.median() / 1e9;
        println!("{ranks} ranks, {} MiB: ring {:.2} GB/s a link", buffer_bytes >> 20, rate(&times[0]));
        for (name, plain) in [("between buffers", &times[1]), ("within the cache", &times[2])] {
            println!(
                "  plain sockets {name}: {:.2} GB/s a link; ratio {:.2} by the clock, {:.2} by processor time",
                rate(plain),
                plain.median() / times[0].median(),
                plain.processor / times[0].processor
            );
        }
        let by_clock = times[1].median() / times[0].median();
        let share = by_clock.max(times[1].processor / times[0].processor);
        assert!(cfg!(debug_assertions) || share >= BAR, "{ranks} ranks: {share:.2} of plain sockets");
    }
}

/// In turns with the plain ring, so that other work on the machine meets all alike.
#[test]
fn encryption_and_rounding_against_the_plain_ring() {
    const WAYS: [(&str, bool, Compression); 4] = [
        ("plain", false, Compression::Off),
        ("encrypted", true, Compression::Off),
        ("bf16", false, Compression::Bf16),
        ("int8", false, Compression::Int8),
    ];
    let mut groups = WAYS.map(|(_, encrypted, compression)| tcp_group_with(2, encrypted, compression));
    let mut buffers: Vec<_> = (0..2).map(|_| (vec![1.0; ELEMENTS], vec![0.0; ELEMENTS])).collect();
    let mut times = [(); WAYS.len()].map(|()| Times::default());
    for round in 0..=ROUNDS {
        for (group, times) in groups.iter_mut().zip(&mut times) {
            group.iter_mut().for_each(|member| {
                if let Some(feedback) = member.feedback() {
                    feedback.begin(ELEMENTS);
                }
            });
            let mut time = Times::default();
            time.add(|| ring(group, &mut buffers));
            // The first round warms buffers.
            if round > 0 {
                times.clock.append(&mut time.clock);
                times.processor += time.processor;
            }
            assert!(buffers.iter().all(|(_, output)| output.iter().all(|sum| *sum == 2.0)));
        }
    }
    let bytes = size_of_val(&*buffers[0].0) as f64;
    for ((name, ..), time) in WAYS.iter().zip(&times) {
        println!(
            "2 ranks, {name}: {:.2} GB/s of gradient; {:.2} of the plain ring's time, {:.2} of its processor time",
            bytes / time.median() / 1e9,
            time.median() / times[0].median(),
            time.processor / times[0].processor
        );
    }
}

#[test]
fn latency_of_a_step_s_check() {
    // Five integers: what ends every training step.
    let rounds = if cfg!(debug_assertions) { 200 } else { 5000 };
    for ranks in [2u32, 4] {
        let mut group = tcp_group(ranks);
        let start = Instant::now();
        thread::scope(|scope| {
            for member in &mut group {
                scope.spawn(move || {
                    for _ in 0..rounds {
                        let mut values = [1; 5];
                        member.all_reduce_u64(&mut values).unwrap();
                        assert_eq!(values, [u64::from(ranks); 5]);
                    }
                });
            }
        });
        println!("{ranks} ranks: {:.1} µs a check", start.elapsed().as_secs_f64() * 1e6 / f64::from(rounds));
    }
}
