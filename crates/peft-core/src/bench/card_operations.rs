//! Operations on a card, beside what the card does at best in the same run.

use std::time::Instant;

use serde::Serialize;

use super::{RandomBase, Shape};
use crate::{
    backend::{
        AttentionShape, Backend, BatchRoom, Use, View, ViewMut,
        cuda::{Cuda, Precision},
    },
    batch::{PackedBatch, Row},
    error::Result,
    model::{BaseSource, Projection},
    random,
};

/// An operation, and its share of what the card does at best.
#[derive(Debug, Clone, Serialize)]
pub struct CardOperation {
    /// The operation.
    pub operation: String,
    /// Seconds of a call, from many queued at once: the median of five.
    pub seconds: f64,
    /// Bytes or operations a second.
    pub rate: f64,
    /// `B/s` or `FLOP/s`.
    pub unit: &'static str,
    /// The rate by that of a copy, or of a large product, in the same run.
    pub share: f64,
}

struct Bench<'a> {
    cuda: &'a Cuda,
    copy: f64,
    product: f64,
    lines: Vec<CardOperation>,
}

/// Operations at the shape of an 8B model, 8192 tokens.
///
/// # Errors
/// Where the card cannot be used or an operation fails.
pub fn operations(index: usize) -> Result<Vec<CardOperation>> {
    let (tokens, hidden, inner, heads, kv_heads) = (8192, 4096, 14336, 32, 8);
    let mut base =
        RandomBase::new(Shape { hidden, intermediate: inner, layers: 1, vocabulary: 1000, heads }, 64)?;
    let mut cuda = Cuda::new(index, Precision::Bf16)?;
    cuda.hold(&mut base, false)?;
    let product = best_product(index)?;
    let cuda = &cuda;
    let mut bench = Bench { cuda, copy: f64::NAN, product, lines: Vec::new() };
    let mut wide = [noise(cuda, tokens * inner)?, noise(cuda, tokens * inner)?, noise(cuda, tokens * inner)?];
    let size = (2 * tokens * inner) as f64;
    let [a, b, c] = &mut wide;
    let view = |buffer| View::<Cuda>::new(buffer, tokens, inner);
    let seconds = bench.time(|| cuda.copy(view(a), ViewMut::<Cuda>::new(&mut *b, tokens, inner)))?;
    bench.copy = 2.0 * size / seconds;
    bench.bytes("copy", 2.0 * size, seconds);
    let gate = base.layer(0)?.linear(Projection::Gate).weight;
    let seconds = bench.time(|| {
        let _ = cuda.frozen(&gate, c);
    })?;
    let weights = (inner * hidden) as f64;
    bench.bytes("NF4 to bf16, 14336 x 4096", weights * (0.5 + 1.0 / 64.0 + 2.0), seconds);
    let seconds =
        bench.time(|| cuda.swiglu(view(a), view(b), ViewMut::<Cuda>::new(&mut *c, tokens, inner)))?;
    bench.bytes("SwiGLU", 3.0 * size, seconds);
    let seconds = bench.time(|| {
        let target = |buffer| ViewMut::<Cuda>::new(buffer, tokens, inner);
        cuda.swiglu_backward(target(&mut *c), target(&mut *a), target(&mut *b));
    })?;
    bench.bytes("SwiGLU backward", 6.0 * size, seconds);
    let row = (2 * tokens * hidden) as f64;
    let narrow = |buffer| View::<Cuda>::new(buffer, tokens, hidden);
    let mut weight = cuda.allocate(hidden, Use::Exact)?;
    cuda.upload(&vec![1.0; hidden], &mut weight);
    let weight = View::<Cuda>::new(&weight, 1, hidden);
    let mut factors = cuda.allocate(tokens, Use::Exact)?;
    let seconds = bench.time(|| {
        let out = ViewMut::<Cuda>::new(&mut *b, tokens, hidden);
        cuda.rms_norm(narrow(a), weight, 1e-5, out, ViewMut::<Cuda>::new(&mut factors, tokens, 1));
    })?;
    bench.bytes("RMSNorm", 2.0 * row, seconds);
    let seconds = bench.time(|| {
        let factors = View::<Cuda>::new(&factors, tokens, 1);
        let out = ViewMut::<Cuda>::new(&mut *c, tokens, hidden);
        cuda.rms_norm_backward(narrow(b), narrow(a), weight, factors, out);
    })?;
    bench.bytes("RMSNorm backward", 4.0 * row, seconds);
    // What gradients were written over again and again is no noise any more.
    (*a, *b) = (noise(cuda, tokens * inner)?, noise(cuda, tokens * inner)?);
    for (name, rows, columns, inner) in
        [("gate", tokens, inner, hidden), ("down", tokens, hidden, inner), ("q", tokens, hidden, hidden)]
    {
        let seconds = bench.time(|| {
            let (a, b) = (View::<Cuda>::new(a, rows, inner), View::<Cuda>::new(b, columns, inner));
            cuda.gemm(1.0, a, false, b, true, 0.0, ViewMut::<Cuda>::new(&mut *c, rows, columns));
        })?;
        bench.flops(
            &format!("product {name}, {rows} x {columns} x {inner}"),
            2.0 * (rows * columns) as f64 * inner as f64,
            seconds,
        );
    }
    attention(&mut bench, cuda, [heads, kv_heads, 128], &[2048; 4])?;
    attention(&mut bench, cuda, [heads, kv_heads, 128], &[4096; 2])?;
    Ok(bench.lines)
}

fn attention(bench: &mut Bench<'_>, cuda: &Cuda, heads: [usize; 3], lengths: &[usize]) -> Result<()> {
    let [heads, kv_heads, head_dim] = heads;
    let shape = AttentionShape::new(heads, kv_heads, head_dim);
    let rows: Vec<Row> =
        (0..lengths.len()).map(|row| Row::whole(row as u64, vec![0; lengths[row]])).collect();
    let mut packed = PackedBatch::default();
    packed.fill(&rows)?;
    let tokens = packed.tokens();
    let longest = lengths.iter().copied().max().unwrap_or(1);
    let mut batch = cuda.allocate_batch(BatchRoom { tokens, longest_span: longest, widest: 1, heads })?;
    cuda.load_batch(&packed, &mut batch);
    let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
    let (q, k, v) =
        (noise(cuda, tokens * queries)?, noise(cuda, tokens * keys)?, noise(cuda, tokens * keys)?);
    let dout = noise(cuda, tokens * queries)?;
    let mut out = cuda.allocate(tokens * queries, Use::Activation)?;
    let mut log_sum = cuda.allocate(tokens * heads, Use::Exact)?;
    let view = |buffer, columns| View::<Cuda>::new(buffer, tokens, columns);
    let squares: f64 = lengths.iter().map(|length| (length * length) as f64).sum();
    let flops = 4.0 * squares / 2.0 * queries as f64;
    let name = format!("attention, {} x {longest}", lengths.len());
    let seconds = bench.time(|| {
        let (to, log_sum) = (
            ViewMut::<Cuda>::new(&mut out, tokens, queries),
            ViewMut::<Cuda>::new(&mut log_sum, tokens, heads),
        );
        cuda.attention(&batch, shape, view(&q, queries), view(&k, keys), view(&v, keys), to, log_sum);
    })?;
    bench.flops(&name, flops, seconds);
    let mut dq = cuda.allocate(tokens * queries, Use::Activation)?;
    let (mut dk, mut dv) =
        (cuda.allocate(tokens * keys, Use::Activation)?, cuda.allocate(tokens * keys, Use::Activation)?);
    let seconds = bench.time(|| {
        cuda.attention_backward(
            &batch,
            shape,
            view(&q, queries),
            view(&k, keys),
            view(&v, keys),
            view(&out, queries),
            view(&log_sum, heads),
            view(&dout, queries),
            ViewMut::<Cuda>::new(&mut dq, tokens, queries),
            ViewMut::<Cuda>::new(&mut dk, tokens, keys),
            ViewMut::<Cuda>::new(&mut dv, tokens, keys),
        );
    })?;
    bench.flops(&format!("{name} backward"), 2.5 * flops, seconds);
    Ok(())
}

/// Numbers that are not all alike: a card is faster on zeros.
fn noise(cuda: &Cuda, count: usize) -> Result<<Cuda as Backend>::Owned> {
    const PIECE: usize = 1 << 20;
    let mut piece = vec![0.0; PIECE.min(count)];
    random::fill_uniform(1, "bench", 1.0, &mut piece);
    let mut first = cuda.allocate(piece.len(), Use::Activation)?;
    cuda.upload(&piece, &mut first);
    let mut buffer = cuda.allocate(count, Use::Activation)?;
    for start in (0..count).step_by(piece.len()) {
        let length = piece.len().min(count - start);
        cuda.copy(View::<Cuda>::new(&first, 1, length), ViewMut::<Cuda>::at(&mut buffer, start, 1, length));
    }
    cuda.settle()?;
    Ok(buffer)
}

/// The rate of a large product of bf16.
pub(super) fn best_product(index: usize) -> Result<f64> {
    const SIDE: usize = 8192;
    let cuda = Cuda::new(index, Precision::Bf16)?;
    let (a, b) = (noise(&cuda, SIDE * SIDE)?, noise(&cuda, SIDE * SIDE)?);
    let mut c = cuda.allocate(SIDE * SIDE, Use::Activation)?;
    let (a, b) = (View::<Cuda>::new(&a, SIDE, SIDE), View::<Cuda>::new(&b, SIDE, SIDE));
    let seconds =
        time(&cuda, || cuda.gemm(1.0, a, false, b, true, 0.0, ViewMut::<Cuda>::new(&mut c, SIDE, SIDE)))?;
    Ok(2.0 * (SIDE * SIDE) as f64 * SIDE as f64 / seconds)
}

fn time(cuda: &Cuda, mut work: impl FnMut()) -> Result<f64> {
    const CALLS: usize = 20;
    work();
    cuda.settle()?;
    let mut times = Vec::with_capacity(5);
    for _ in 0..5 {
        let begin = Instant::now();
        for _ in 0..CALLS {
            work();
        }
        cuda.settle()?;
        times.push(begin.elapsed().as_secs_f64() / CALLS as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[2])
}

impl Bench<'_> {
    fn time(&self, work: impl FnMut()) -> Result<f64> {
        time(self.cuda, work)
    }

    fn bytes(&mut self, name: &str, bytes: f64, seconds: f64) {
        let rate = bytes / seconds;
        let share = rate / self.copy;
        self.lines.push(CardOperation { operation: name.to_owned(), seconds, rate, unit: "B/s", share });
    }

    fn flops(&mut self, name: &str, flops: f64, seconds: f64) {
        let rate = flops / seconds;
        let share = rate / self.product;
        self.lines.push(CardOperation { operation: name.to_owned(), seconds, rate, unit: "FLOP/s", share });
    }
}
