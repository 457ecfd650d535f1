//! Times: operations at the 8B shape, and whole steps on random weights.

use std::time::Instant;

use shanty_peft_core::{
    backend::{
        Backend, Use, View, ViewMut,
        cuda::{Cuda, Precision},
    },
    bench::{self, CardBenchOptions, CardStep, Shape},
    plan::Recompute,
};

use crate::operations::{numbers, put};

const GIB: u64 = 1 << 30;

/// The median of several runs, seconds.
fn median(runs: usize, mut work: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..runs)
        .map(|_| {
            let begin = Instant::now();
            work();
            begin.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[runs / 2]
}

/// Seconds of one call, from many queued at once.
fn time(cuda: &Cuda, mut work: impl FnMut()) -> f64 {
    const CALLS: usize = 20;
    work();
    cuda.settle().unwrap();
    median(5, || {
        for _ in 0..CALLS {
            work();
        }
        cuda.settle().unwrap();
    }) / CALLS as f64
}

pub(crate) fn measure() -> Vec<String> {
    let mut lines = Vec::new();
    operations(&mut lines);
    products(&mut lines);
    steps(&mut lines);
    lines
}

/// Whole steps alone.
pub(crate) fn measure_steps() -> Vec<String> {
    let mut lines = Vec::new();
    steps(&mut lines);
    lines
}

fn arithmetic(lines: &mut Vec<String>, name: &str, flops: f64, seconds: f64) {
    let rate = flops / seconds / 1e12;
    lines.push(format!("{name:<40} {:9.1} us {rate:8.1} TFLOP/s", seconds * 1e6));
    println!("{}", lines[lines.len() - 1]);
}

fn operations(lines: &mut Vec<String>) {
    for line in bench::operations(0).unwrap() {
        let (scale, unit) = if line.unit == "B/s" { (1e9, "GB/s") } else { (1e12, "TFLOP/s") };
        lines.push(format!(
            "{:<40} {:9.1} us {:8.0} {unit} {:5.1} %",
            line.operation,
            line.seconds * 1e6,
            line.rate / scale,
            100.0 * line.share
        ));
        println!("{}", lines[lines.len() - 1]);
    }
}

/// Products as layers make them, frozen and of rank 16, with and without a branch folded into the inner side.
fn products(lines: &mut Vec<String>) {
    let cuda = Cuda::new(0, Precision::Bf16).unwrap();
    // The largest operand is the head.
    const PIECE: usize = 1 << 22;
    let pieces = (128_256_usize * 4096).div_ceil(PIECE);
    let noise = put(&cuda, &numbers("noise", PIECE));
    let fill = || {
        let mut buffer = cuda.allocate(pieces * PIECE, Use::Activation).unwrap();
        for piece in 0..pieces {
            let to = ViewMut::<Cuda>::at(&mut buffer, piece * PIECE, 1, PIECE);
            cuda.copy(View::<Cuda>::new(&noise, 1, PIECE), to);
        }
        buffer
    };
    let (a_buffer, b_buffer, mut c) = (fill(), fill(), fill());
    let mut exact = cuda.allocate(28672 * 64, Use::Exact).unwrap();
    // rows, columns, inner, transposes, whether the target is f32 and added to.
    type Case = (&'static str, usize, usize, usize, [bool; 2], f32, bool);
    let shapes: [Case; 30] = [
        ("q k v", 8192, 6144, 4096, [false, true], 0.0, false),
        ("q k v folded", 8192, 6144, 4160, [false, true], 0.0, false),
        ("q", 8192, 4096, 4096, [false, true], 0.0, false),
        ("q folded", 8192, 4096, 4160, [false, true], 0.0, false),
        ("o, added", 8192, 4096, 4096, [false, true], 1.0, false),
        ("k", 8192, 1024, 4096, [false, true], 0.0, false),
        ("gate", 8192, 14336, 4096, [false, true], 0.0, false),
        ("gate up", 8192, 28672, 4096, [false, true], 0.0, false),
        ("gate up folded", 8192, 28672, 4160, [false, true], 0.0, false),
        ("down, added", 8192, 4096, 14336, [false, true], 1.0, false),
        ("down folded, added", 8192, 4096, 14400, [false, true], 1.0, false),
        ("down backward", 8192, 14336, 4096, [false, false], 0.0, false),
        ("down backward folded", 8192, 14336, 4160, [false, false], 0.0, false),
        ("gate backward", 8192, 4096, 14336, [false, false], 0.0, false),
        ("up backward, added", 8192, 4096, 14336, [false, false], 1.0, false),
        ("gate up backward", 8192, 4096, 28672, [false, false], 0.0, false),
        ("gate up backward folded", 8192, 4096, 28736, [false, false], 0.0, false),
        ("q k v backward", 8192, 4096, 6144, [false, false], 0.0, false),
        ("q k v backward folded", 8192, 4096, 6208, [false, false], 0.0, false),
        ("k backward, added", 8192, 4096, 1024, [false, false], 1.0, false),
        ("head, 1024 rows", 1024, 128_256, 4096, [false, true], 0.0, false),
        ("x A, r 16", 8192, 16, 4096, [false, true], 0.0, false),
        ("x A, r 48", 8192, 48, 4096, [false, true], 0.0, false),
        ("h A, r 16", 8192, 16, 14336, [false, true], 0.0, false),
        ("p B, added, 14336", 8192, 14336, 16, [false, true], 1.0, false),
        ("dy B, 14336", 8192, 16, 14336, [false, false], 0.0, false),
        ("dp A, added, 4096", 8192, 4096, 16, [false, false], 1.0, false),
        ("dB, 14336", 14336, 16, 8192, [true, false], 1.0, true),
        ("dA, 4096", 16, 4096, 8192, [true, false], 1.0, true),
        ("dA, r 48", 48, 4096, 8192, [true, false], 1.0, true),
    ];
    for (name, m, n, k, [ta, tb], beta, wide) in shapes {
        let a = if ta { View::<Cuda>::new(&a_buffer, k, m) } else { View::<Cuda>::new(&a_buffer, m, k) };
        let b = if tb { View::<Cuda>::new(&b_buffer, n, k) } else { View::<Cuda>::new(&b_buffer, k, n) };
        let seconds = time(&cuda, || {
            let c = if wide { &mut exact } else { &mut c };
            cuda.gemm(0.001, a, ta, b, tb, beta, ViewMut::<Cuda>::new(c, m, n));
        });
        arithmetic(lines, &format!("{name} {m}x{n}x{k}"), 2.0 * m as f64 * n as f64 * k as f64, seconds);
    }
}

/// Steps: shape, rows, tokens of a row, tokens of a sample, cap, steps.
type Case = (&'static str, usize, usize, Option<usize>, u64, usize);

/// The bars' shapes, then what depends on a batch's form: packed samples, a short batch, a long row.
const CASES: [Case; 9] = [
    ("1b", 8, 2048, None, 18 * GIB, 7),
    ("1b", 8, 2048, None, 17 * GIB / 5, 7),
    ("8b", 4, 2048, None, 36 * GIB, 7),
    ("8b", 4, 2048, None, 8 * GIB, 7),
    ("8b", 1, 8192, None, 36 * GIB, 5),
    ("8b", 1, 8192, Some(256), 36 * GIB, 5),
    ("8b", 1, 8192, Some(67), 36 * GIB, 5),
    ("1b", 1, 2048, None, 18 * GIB, 31),
    ("8b", 1, 32768, None, 24 * GIB, 3),
];

fn steps(lines: &mut Vec<String>) {
    let mut aside = Vec::new();
    for case in CASES {
        if let Some(step) = step(lines, case) {
            let (_, rows, length, ..) = case;
            aside.push((rows * length) as f64 / (step.step_seconds - step.attention_seconds));
        } else {
            aside.push(f64::NAN);
        }
    }
    for (at, name) in [(5, "256"), (6, "67")] {
        lines.push(format!(
            "packed samples of {name} tokens beside one of 8192, attention aside: {:.1} % of its tokens a second",
            100.0 * aside[at] / aside[4]
        ));
        println!("{}", lines[lines.len() - 1]);
    }
}

/// The longest row that the card and the host have room for, and one step of it.
pub(crate) fn longest() -> Vec<String> {
    let mut lines = Vec::new();
    let shape = Shape::named("8b").unwrap();
    let length = match bench::largest_context(0, shape, 16) {
        Ok(length) => length,
        Err(error) => return vec![format!("the longest row of 8B: {error}")],
    };
    lines.push(format!("the longest row of 8B that is planned for: {length} tokens"));
    println!("{}", lines[0]);
    step(&mut lines, ("8b", 1, length, None, u64::MAX, 1));
    lines
}

fn step(lines: &mut Vec<String>, case: Case) -> Option<CardStep> {
    let (name, rows, length, sample, cap, steps) = case;
    let options = CardBenchOptions {
        index: 0,
        shape: Shape::named(name).unwrap(),
        r: 16,
        rows,
        length,
        sample,
        memory_limit: (cap < u64::MAX).then_some(cap),
        recompute: Recompute::Auto,
        // A step of the longest row is made once: the warm one is what is timed.
        warm: if steps == 1 { 0 } else { 2 },
        steps,
    };
    let packed = sample.map_or_else(String::new, |sample| format!(" of samples of {sample}"));
    let under =
        if cap < u64::MAX { format!(" under {:.1} GiB", cap as f64 / GIB as f64) } else { String::new() };
    let name = format!("step {name} {rows} x {length}{packed}{under}");
    let step = match bench::steps(&options) {
        Ok(step) => step,
        Err(error) => {
            lines.push(format!("{name}: {error}"));
            println!("{}", lines[lines.len() - 1]);
            return None;
        }
    };
    let gib = |bytes: u64| bytes as f64 / GIB as f64;
    lines.push(format!(
        "{name}: {:.0} tok/s, {:.4} s, peak {:.2} GiB, plan {:.2} GiB, driver {:.2} GiB, {:.2} on the host, {:.0} TFLOP/s of the \
         model, {:.0} % of the floor at {:.0} TFLOP/s, card busy {:.1} %, attention {:.1} ms, loss {:.4}; {}",
        step.tokens_per_second,
        step.step_seconds,
        gib(step.peak_memory_bytes),
        gib(step.plan.peak_bytes()),
        gib(step.device_memory_bytes),
        gib(step.plan.aside_bytes),
        step.model_flops_per_second / 1e12,
        100.0 * step.floor_fraction,
        step.product_flops_per_second / 1e12,
        100.0 * step.busy_fraction,
        1e3 * step.attention_seconds,
        step.loss,
        step.plan.levels.describe(),
    ));
    println!("{}", lines[lines.len() - 1]);
    let total: f64 = step.profile.iter().map(|line| line.seconds).sum();
    lines.push(format!("  one step by operation, {:.1} ms together:", total * 1e3));
    for line in step.profile.iter().filter(|line| line.seconds > total / 400.0) {
        lines.push(format!(
            "  {:<40} {:8.2} ms {:5.1} % {:5} calls",
            line.operation,
            line.seconds * 1e3,
            100.0 * line.seconds / total,
            line.calls
        ));
    }
    Some(step)
}
