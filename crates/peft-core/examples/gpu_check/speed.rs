//! Times: operations at the 8B shape, and whole steps on random weights.

use std::time::Instant;

use shanty_peft_core::{
    Engine, EngineDevice, Result, StepKey,
    backend::{
        AttentionShape, Backend, Use, View, ViewMut,
        cuda::{Cuda, Precision},
    },
    batch::Row,
    engine::EngineParts,
    model::BaseSource,
    optim::{AdamWOptions, FlatUpdate, Outcome, groups},
    plan::{PlanRequest, Recompute},
};

use crate::{
    models::{RandomBase, lora},
    operations::{exact, load, numbers, packed, put},
};

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

fn bandwidth(lines: &mut Vec<String>, name: &str, bytes: usize, seconds: f64) {
    let rate = bytes as f64 / seconds / 1e9;
    lines.push(format!("{name:<40} {:9.1} us {rate:8.0} GB/s", seconds * 1e6));
    println!("{}", lines[lines.len() - 1]);
}

fn arithmetic(lines: &mut Vec<String>, name: &str, flops: f64, seconds: f64) {
    let rate = flops / seconds / 1e12;
    lines.push(format!("{name:<40} {:9.1} us {rate:8.1} TFLOP/s", seconds * 1e6));
    println!("{}", lines[lines.len() - 1]);
}

fn operations(lines: &mut Vec<String>) {
    let (tokens, hidden, inner) = (8192, 4096, 14336);
    for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
        let cuda = Cuda::new(0, precision).unwrap();
        let (a, b) = (put(&cuda, &numbers("a", tokens * hidden)), put(&cuda, &numbers("b", inner * hidden)));
        let mut c = cuda.allocate(tokens * inner, Use::Activation).unwrap();
        let (a, b) = (View::<Cuda>::new(&a, tokens, hidden), View::<Cuda>::new(&b, inner, hidden));
        let seconds = time(&cuda, || {
            cuda.gemm(1.0, a, false, b, true, 0.0, ViewMut::<Cuda>::new(&mut c, tokens, inner));
        });
        let flops = 2.0 * (tokens * hidden * inner) as f64;
        arithmetic(lines, &format!("product 8192 x 14336 x 4096 {precision:?}"), flops, seconds);
        let seconds = time(&cuda, || {
            let b = b.row_range(0, 16);
            cuda.gemm(1.0, a, false, b, true, 0.0, ViewMut::<Cuda>::new(&mut c, tokens, 16));
        });
        arithmetic(
            lines,
            &format!("product 8192 x 16 x 4096 {precision:?}"),
            flops / inner as f64 * 16.0,
            seconds,
        );
        if precision == Precision::Tf32 {
            continue;
        }
        let batch = load(&cuda, &packed(&[2048; 4], 1000), 32, 1);
        let shape = AttentionShape::new(32, 8, 128);
        let q = put(&cuda, &numbers("q", tokens * 4096));
        let k = put(&cuda, &numbers("k", tokens * 1024));
        let (q, k) = (View::<Cuda>::new(&q, tokens, 4096), View::<Cuda>::new(&k, tokens, 1024));
        let mut out = cuda.allocate(tokens * 4096, Use::Activation).unwrap();
        let mut log_sum = cuda.allocate(tokens * 32, Use::Exact).unwrap();
        let flops = 4.0 * (4 * 2048 * 2048 / 2) as f64 * 4096.0;
        let seconds = time(&cuda, || {
            let to = ViewMut::<Cuda>::new(&mut out, tokens, 4096);
            cuda.attention(&batch, shape, q, k, k, to, ViewMut::<Cuda>::new(&mut log_sum, tokens, 32));
        });
        arithmetic(lines, &format!("attention 4 x 2048 forward {precision:?}"), flops, seconds);
        let mut dq = cuda.allocate(tokens * 4096, Use::Activation).unwrap();
        let (mut dk, mut dv) = (
            cuda.allocate(tokens * 1024, Use::Activation).unwrap(),
            cuda.allocate(tokens * 1024, Use::Activation).unwrap(),
        );
        let seconds = time(&cuda, || {
            cuda.attention_backward(
                &batch,
                shape,
                q,
                k,
                k,
                View::<Cuda>::new(&out, tokens, 4096),
                View::<Cuda>::new(&log_sum, tokens, 32),
                q,
                ViewMut::<Cuda>::new(&mut dq, tokens, 4096),
                ViewMut::<Cuda>::new(&mut dk, tokens, 1024),
                ViewMut::<Cuda>::new(&mut dv, tokens, 1024),
            );
        });
        arithmetic(lines, &format!("attention 4 x 2048 backward {precision:?}"), 2.5 * flops, seconds);
    }

    let mut cuda = Cuda::new(0, Precision::Bf16).unwrap();
    let mut base = RandomBase::new(4096, 14336, 1, 1000, 32, 64);
    cuda.hold(&mut base, false).unwrap();
    let mut big = cuda.allocate(tokens * inner, Use::Activation).unwrap();
    let mut other = put(&cuda, &numbers("other", tokens * inner));
    let size = 2 * tokens * inner;
    let seconds = time(&cuda, || {
        let from = View::<Cuda>::new(&other, tokens, inner);
        cuda.copy(from, ViewMut::<Cuda>::new(&mut big, tokens, inner));
    });
    bandwidth(lines, "copy", 2 * size, seconds);
    let gate = base.layer(0).unwrap().gate.weight;
    let weights = inner * hidden;
    let seconds = time(&cuda, || {
        cuda.frozen(&gate, &mut big);
    });
    bandwidth(lines, "NF4 to bf16, 14336 x 4096", weights / 2 + weights / 64 + weights * 2, seconds);
    let x = put(&cuda, &numbers("x", tokens * inner));
    let x = View::<Cuda>::new(&x, tokens, inner);
    let seconds = time(&cuda, || {
        cuda.swiglu(
            x,
            View::<Cuda>::new(&other, tokens, inner),
            ViewMut::<Cuda>::new(&mut big, tokens, inner),
        );
    });
    bandwidth(lines, "SwiGLU", 3 * size, seconds);
    let mut dout = put(&cuda, &numbers("dout", tokens * inner));
    let seconds = time(&cuda, || {
        let gate = ViewMut::<Cuda>::new(&mut big, tokens, inner);
        let up = ViewMut::<Cuda>::new(&mut other, tokens, inner);
        cuda.swiglu_backward(ViewMut::<Cuda>::new(&mut dout, tokens, inner), gate, up);
    });
    bandwidth(lines, "SwiGLU backward", 6 * size, seconds);
    let row = 2 * tokens * hidden;
    let x = x.column_range(0, hidden);
    let x = View::<Cuda> { stride: hidden, ..x };
    let weight = exact(&cuda, &vec![1.0; hidden]);
    let weight = View::<Cuda>::new(&weight, 1, hidden);
    let mut reciprocal = cuda.allocate(tokens, Use::Exact).unwrap();
    let seconds = time(&cuda, || {
        let out = ViewMut::<Cuda>::new(&mut big, tokens, hidden);
        cuda.rms_norm(x, weight, 1e-5, out, ViewMut::<Cuda>::new(&mut reciprocal, tokens, 1));
    });
    bandwidth(lines, "RMSNorm", 2 * row, seconds);
    let seconds = time(&cuda, || {
        let factors = View::<Cuda>::new(&reciprocal, tokens, 1);
        let dx = ViewMut::<Cuda>::new(&mut other, tokens, hidden);
        cuda.rms_norm_backward(View::<Cuda>::new(&big, tokens, hidden), x, weight, factors, dx);
    });
    bandwidth(lines, "RMSNorm backward", 4 * row, seconds);
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
    let shapes: [(&str, usize, usize, usize, [bool; 2], f32, bool); 30] = [
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

const GIB: u64 = 1 << 30;

fn steps(lines: &mut Vec<String>) {
    // (name, hidden, intermediate, layers, vocabulary, heads, rows, length, caps)
    let shapes = [
        ("1B", 2048, 8192, 16, 128_256, 32, 8, 2048, [18 * GIB, 17 * GIB / 5]),
        ("8B", 4096, 14336, 32, 128_256, 32, 4, 2048, [36 * GIB, 8 * GIB]),
    ];
    for (name, hidden, inner, layers, vocabulary, heads, rows, length, caps) in shapes {
        for cap in caps {
            let name = format!("step {name} {rows} x {length} under {:.1} GiB", cap as f64 / GIB as f64);
            let base = RandomBase::new(hidden, inner, layers, vocabulary, heads, 64);
            let packed = layers * (hidden * hidden * 5 / 2 + 3 * hidden * inner);
            let request = PlanRequest {
                micro_batch_rows: Some(rows),
                max_length: length,
                recompute: Recompute::Auto,
                memory_limit: Some(cap),
                // Codes, scales of 8 bits and what those are scaled by.
                base_bytes: (packed / 2 + packed / 64 + packed / 64 / 64 + 4 * vocabulary * hidden) as u64,
                embedding_bytes: 0,
                dequantised: true,
                head_widened: false,
                dropout: false,
                threads: 0,
                accelerated: true,
                half_activations: true,
            };
            let device = EngineDevice::Cuda { index: 0, precision: Precision::Bf16 };
            let begin = Instant::now();
            let parts = EngineParts { adapter: Some(lora(16, 0.0).shared()), request };
            let mut engine = match Engine::with_base_on(device, Box::new(base), parts) {
                Ok(engine) => engine,
                Err(error) => {
                    lines.push(format!("{name}: {error}"));
                    continue;
                }
            };
            let loaded = begin.elapsed().as_secs_f64();
            let line = match Stepper::new(&mut engine, rows, length).measure() {
                Ok(line) => format!("{name}: {line}, on the card in {loaded:.1} s"),
                Err(error) => format!("{name}: {error}"),
            };
            println!("{line}");
            lines.push(line);
            if let Err(error) = profile(&mut engine, lines, rows, length) {
                lines.push(format!("{name}: {error}"));
            }
        }
    }
}

/// Whole steps: forward, backward, clipping, AdamW.
struct Stepper<'a> {
    engine: &'a mut Engine,
    rows: Vec<Row>,
    number: u64,
}

impl<'a> Stepper<'a> {
    fn new(engine: &'a mut Engine, rows: usize, length: usize) -> Self {
        let vocabulary = engine.config().vocabulary_size;
        let row = |row: usize| {
            let ids = numbers(&format!("row {row}"), length);
            let ids = ids.iter().map(|x| ((x + 1.0) / 2.0 * (vocabulary - 1) as f32) as u32);
            Row::whole(row as u64, ids.collect())
        };
        Self { rows: (0..rows).map(row).collect(), engine, number: 0 }
    }

    fn step(&mut self) -> Result<Outcome> {
        self.number += 1;
        let tokens = self.engine.accumulate(&self.rows, StepKey { seed: 1, step: self.number })?;
        let length = self.engine.layout().len();
        let groups = groups(&AdamWOptions::default(), self.number, 1e-4, &[], length);
        self.engine.update(&FlatUpdate { mean: 1.0 / tokens as f64, max_norm: 1.0, groups: &groups })
    }

    fn measure(&mut self) -> Result<String> {
        let parameters = self.engine.initial_parameters(1)?;
        let zeros = vec![0.0; parameters.len()];
        self.engine.begin(&parameters, &zeros, &zeros)?;
        self.step()?;
        self.step()?;
        let mut failed = None;
        let mut loss = 0.0;
        let seconds = median(7, || match self.step() {
            Ok(outcome) => loss = outcome.loss,
            Err(error) => failed = Some(error),
        });
        if let Some(error) = failed {
            return Err(error);
        }
        let tokens: usize = self.rows.iter().map(|row| row.token_ids.len()).sum();
        let trained: u64 = self.rows.iter().map(Row::trained_tokens).sum();
        let plan = self.engine.plan();
        let peak = self.engine.card().map_or(0, |(_, peak)| peak) as f64 / GIB as f64;
        Ok(format!(
            "{:.0} tok/s, {seconds:.4} s, peak {peak:.2} GiB, plan {:.2} GiB, {:.2} on the host, loss {:.4}; {}",
            tokens as f64 / seconds,
            plan.peak_bytes() as f64 / GIB as f64,
            plan.aside_bytes as f64 / GIB as f64,
            loss / trained as f64,
            plan.levels.describe(),
        ))
    }
}

/// Where one step goes.
fn profile(engine: &mut Engine, lines: &mut Vec<String>, rows: usize, length: usize) -> Result<()> {
    engine.set_profiling(true);
    Stepper::new(engine, rows, length).step()?;
    let all = engine.card_profile()?;
    engine.set_profiling(false);
    let total: f64 = all.iter().map(|(_, seconds, _)| seconds).sum();
    lines.push(format!("  one step by operation, {:.1} ms together:", total * 1e3));
    for (name, seconds, calls) in &all {
        if *seconds > total / 400.0 {
            lines.push(format!(
                "  {name:<40} {:8.2} ms {:5.1} % {calls:5} calls",
                seconds * 1e3,
                100.0 * seconds / total
            ));
        }
    }
    Ok(())
}
