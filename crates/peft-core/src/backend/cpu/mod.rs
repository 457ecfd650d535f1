//! Operations on slices of host memory: threads, vector code, and products by the `gemm` crate.
//!
//! Each operation splits its work by rows or tiles, never by the number of threads, and sums run in a fixed order: the
//! same micro-batch gives the same bits on any number of threads.

mod attention;
mod batch;
mod cross_entropy;
mod elementwise;
mod gemm;
mod math;
mod profile;
mod vectors;
mod virtual_tokens;

use std::sync::Mutex;

use rayon::{ThreadPool, ThreadPoolBuilder};

use self::gemm::{Factors, Operand};
pub use self::{
    batch::CpuBatch,
    gemm::in_product,
    profile::{NARROW, Operation, Spent},
};
use super::{AttentionShape, Backend, BatchRoom, Product, Ready, SpanStart, Use, View, ViewMut};
use crate::{
    batch::PackedBatch,
    engine::{GradientSink, StepError},
    error::Result,
    model::{EmbeddingView, Matrix},
    optim::{FlatState, FlatUpdate, Outcome},
    random::DropoutKey,
};

/// The CPU backend: a pool of threads of its own.
pub struct Cpu {
    pool: ThreadPool,
    threads: usize,
    profile: profile::Profile,
}

impl Cpu {
    /// A backend of `threads` threads; 0 takes as many as the machine has.
    ///
    /// # Errors
    /// [`StepError::Threads`] when the threads cannot be started.
    pub fn new(threads: usize) -> Result<Self> {
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("shanty-cpu-{index}"))
            .build()
            .map_err(|source| StepError::Threads { threads, reason: source.to_string() })?;
        let threads = pool.current_num_threads();
        Ok(Self { pool, threads, profile: profile::Profile::default() })
    }

    /// Threads in the pool.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Where the time went since the last call, by kind of operation.
    pub fn take_profile(&self) -> Vec<Spent> {
        self.profile.take()
    }

    /// Runs `work` on a thread of the pool, where parallel operations start without a hand-over.
    pub(crate) fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    /// Counts the time of `work`.
    fn measure<R>(&self, operation: Operation, work: impl FnOnce() -> R) -> R {
        self.profile.measure(operation, 0, work)
    }
}

fn operand<'a>(view: View<'a, Cpu>, transposed: bool) -> Operand<'a> {
    let operand = Operand::new(view.data, view.offset, view.rows, view.columns, view.stride);
    if transposed { operand.transposed() } else { operand }
}

impl Backend for Cpu {
    type Buffer = [f32];
    type Owned = Vec<f32>;
    type Batch = CpuBatch;
    type Aside = Vec<f32>;

    fn allocate(&self, length: usize, _purpose: Use) -> Result<Self::Owned> {
        let mut memory = Vec::new();
        memory.try_reserve_exact(length).map_err(|_| StepError::OutOfMemory { bytes: length * 4 })?;
        memory.resize(length, 0.0);
        Ok(memory)
    }

    fn allocate_aside(&self, length: usize, purpose: Use) -> Result<Vec<f32>> {
        self.allocate(length, purpose)
    }

    fn put_aside(&self, from: View<'_, Self>, to: &mut Vec<f32>) {
        let count = from.rows * from.columns;
        to[..count].copy_from_slice(&from.data[from.offset..from.offset + count]);
    }

    fn bring_back(&self, from: &Vec<f32>, to: ViewMut<'_, Self>) {
        let count = to.rows * to.columns;
        to.data[to.offset..to.offset + count].copy_from_slice(&from[..count]);
    }

    fn await_aside(&self, _aside: &Vec<f32>) {}

    fn add_losses(&self, losses: View<'_, Self>, state: &mut FlatState<Self>) {
        let losses = &losses.data[losses.offset..losses.offset + losses.rows];
        state.known_losses.push(losses.iter().map(|loss| f64::from(*loss)).sum());
    }

    fn losses(&self, state: &mut FlatState<Self>) -> Result<Vec<f64>> {
        Ok(std::mem::take(&mut state.known_losses))
    }

    fn update_flat(&self, update: &FlatUpdate<'_>, state: &mut FlatState<Self>) {
        self.pool.install(|| update.apply(state));
    }

    fn outcome(&self, state: &mut FlatState<Self>) -> Result<Outcome> {
        let loss = std::mem::take(&mut state.known_losses).iter().sum();
        Ok(Outcome { loss, ..std::mem::take(&mut state.outcome) })
    }

    fn allocate_batch(&self, room: BatchRoom) -> Result<CpuBatch> {
        let lane = (2 * attention::TILE * room.longest_span).max(room.widest);
        let lanes = (0..self.threads)
            .map(|_| self.allocate(lane, Use::Exact).map(Mutex::new))
            .collect::<Result<_>>()?;
        Ok(CpuBatch { packed: PackedBatch::with_capacity(room.tokens), lanes })
    }

    fn load_batch(&self, from: &PackedBatch, into: &mut CpuBatch) {
        into.packed.clone_from_batch(from);
    }

    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.install(work)
    }

    fn settle(&self) -> Result<()> {
        Ok(())
    }

    fn lend<'a>(&self, host: &'a [f32], _place: &'a mut Option<Vec<f32>>) -> Result<&'a [f32]> {
        Ok(host)
    }

    fn with_gradient<R>(
        &self,
        host: &mut [f32],
        _place: &mut Option<Vec<f32>>,
        _staging: &mut Vec<f32>,
        sink: &mut dyn GradientSink,
        work: impl FnOnce(&mut [f32], &mut Ready<'_, Self>) -> Result<R>,
    ) -> Result<R> {
        work(host, &mut |range, gradient| sink.ready(range, gradient))
    }

    fn upload(&self, from: &[f32], into: &mut [f32]) {
        into[..from.len()].copy_from_slice(from);
    }

    fn download(&self, from: View<'_, Self>, into: &mut [f32]) {
        for (row, into) in into.chunks_exact_mut(from.columns).enumerate().take(from.rows) {
            into.copy_from_slice(row_of(from, row));
        }
    }

    fn frozen<'a>(&'a self, matrix: &Matrix<'a>, scratch: &'a mut [f32]) -> View<'a, Self> {
        let (rows, columns) = (matrix.rows(), matrix.columns());
        if let Some(data) = matrix.as_f32() {
            return View::new(data, rows, columns);
        }
        let scratch = &mut scratch[..rows * columns];
        self.measure(Operation::Dequantise, || self.install(|| matrix.write_f32(scratch)));
        View::new(scratch, rows, columns)
    }

    fn frozen_vector<'a>(&'a self, vector: &'a [f32]) -> View<'a, Self> {
        View::new(vector, 1, vector.len())
    }

    fn frozen_rows<'a>(
        &'a self,
        table: &EmbeddingView<'a>,
        first: usize,
        rows: usize,
        scratch: &'a mut [f32],
    ) -> View<'a, Self> {
        let columns = table.columns();
        if let Some(data) = table.as_f32() {
            return View::at(data, first * columns, rows, columns);
        }
        let scratch = &mut scratch[..rows * columns];
        self.measure(Operation::Dequantise, || self.install(|| table.rows_f32(first..first + rows, scratch)));
        View::new(scratch, rows, columns)
    }

    fn gemm(
        &self,
        alpha: f32,
        a: View<'_, Self>,
        transpose_a: bool,
        b: View<'_, Self>,
        transpose_b: bool,
        beta: f32,
        c: ViewMut<'_, Self>,
    ) {
        let factors = Factors { alpha, a: operand(a, transpose_a), b: operand(b, transpose_b) };
        self.sum_of_products(&[factors], beta, c);
    }

    fn gemm_pair(
        &self,
        first: Product<'_, Self>,
        second: Product<'_, Self>,
        beta: f32,
        c: ViewMut<'_, Self>,
    ) {
        let factors = [first, second].map(|Product { alpha, a, transpose_a, b, transpose_b }| Factors {
            alpha,
            a: operand(a, transpose_a),
            b: operand(b, transpose_b),
        });
        self.sum_of_products(&factors, beta, c);
    }

    fn fill(&self, value: f32, to: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || self.rows(to, |_, to| to.fill(value)));
    }

    fn copy(&self, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || self.rows(to, |row, to| to.copy_from_slice(row_of(from, row))));
    }

    fn add(&self, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || self.rows(to, |row, to| math::add(row_of(from, row), to)));
    }

    fn scale(&self, factor: f32, to: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || self.rows(to, |_, to| math::scale(to, factor)));
    }

    fn add_bias(&self, bias: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || self.rows(to, |_, to| math::add(row_of(bias, 0), to)));
    }

    fn gather_embedding(&self, batch: &CpuBatch, table: &EmbeddingView<'_>, out: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || {
            self.rows(out, |row, out| table.gather_row(batch.packed.token_ids[row] as usize, out))
        });
    }

    fn gather_predicting(&self, batch: &CpuBatch, first: usize, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        self.rows(out, |row, out| {
            out.copy_from_slice(row_of(x, batch.packed.predicting[first + row] as usize));
        });
    }

    fn scatter_predicting(&self, batch: &CpuBatch, first: usize, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        for row in 0..x.rows {
            let start = out.offset + batch.packed.predicting[first + row] as usize * out.stride;
            out.data[start..start + out.columns].copy_from_slice(row_of(x, row));
        }
    }

    fn put_virtual(&self, batch: &CpuBatch, at: SpanStart, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || self.put_virtual_rows(batch, at, from, to));
    }

    fn sum_virtual(&self, batch: &CpuBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || self.sum_virtual_rows(batch, from, to));
    }

    fn rows_to_keys(&self, batch: &CpuBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || self.copy_rows_to_keys(batch, from, to));
    }

    fn keys_to_rows(&self, batch: &CpuBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || self.copy_keys_to_rows(batch, from, to));
    }

    fn rms_norm(
        &self,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        epsilon: f32,
        out: ViewMut<'_, Self>,
        reciprocal: ViewMut<'_, Self>,
    ) {
        self.measure(Operation::Norm, || self.rms_norm_rows(x, weight, epsilon, out, reciprocal));
    }

    fn rms_norm_backward(
        &self,
        dout: View<'_, Self>,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        reciprocal: View<'_, Self>,
        dx: ViewMut<'_, Self>,
    ) {
        self.measure(Operation::Norm, || self.rms_norm_backward_rows(dout, x, weight, reciprocal, dx));
    }

    fn rope(
        &self,
        batch: &CpuBatch,
        head_dim: usize,
        table: View<'_, Self>,
        backward: bool,
        x: ViewMut<'_, Self>,
    ) {
        self.measure(Operation::Rope, || {
            self.rope_rows(&batch.packed.positions, head_dim, table, backward, x)
        });
    }

    fn swiglu(&self, gate: View<'_, Self>, up: View<'_, Self>, out: ViewMut<'_, Self>) {
        self.measure(Operation::Swiglu, || {
            self.rows(out, |row, out| math::swiglu(row_of(gate, row), row_of(up, row), out))
        });
    }

    fn swiglu_backward(&self, dout: ViewMut<'_, Self>, gate: ViewMut<'_, Self>, up: ViewMut<'_, Self>) {
        self.measure(Operation::Swiglu, || self.row_triples(dout, gate, up, math::swiglu_backward));
    }

    fn geglu(&self, gate: View<'_, Self>, up: View<'_, Self>, out: ViewMut<'_, Self>) {
        self.measure(Operation::Swiglu, || {
            self.rows(out, |row, out| math::geglu(row_of(gate, row), row_of(up, row), out))
        });
    }

    fn geglu_backward(&self, dout: ViewMut<'_, Self>, gate: ViewMut<'_, Self>, up: ViewMut<'_, Self>) {
        self.measure(Operation::Swiglu, || self.row_triples(dout, gate, up, math::geglu_backward));
    }

    fn soft_cap(&self, cap: f32, x: ViewMut<'_, Self>) {
        self.measure(Operation::CrossEntropy, || self.rows(x, |_, x| math::soft_cap(x, cap)));
    }

    fn attention(
        &self,
        batch: &CpuBatch,
        shape: AttentionShape,
        q: View<'_, Self>,
        k: View<'_, Self>,
        v: View<'_, Self>,
        out: ViewMut<'_, Self>,
        log_sum: ViewMut<'_, Self>,
    ) {
        self.measure(Operation::Attention, || attention::forward(self, batch, shape, q, k, v, out, log_sum));
    }

    fn attention_backward(
        &self,
        batch: &CpuBatch,
        shape: AttentionShape,
        q: View<'_, Self>,
        k: View<'_, Self>,
        v: View<'_, Self>,
        out: View<'_, Self>,
        log_sum: View<'_, Self>,
        dout: View<'_, Self>,
        dq: ViewMut<'_, Self>,
        dk: ViewMut<'_, Self>,
        dv: ViewMut<'_, Self>,
    ) {
        let known = attention::Known { q, k, v, out, log_sum, dout };
        self.measure(Operation::AttentionBackward, || {
            attention::backward(self, batch, shape, &known, attention::Gradients { dq, dk, dv })
        });
    }

    fn dropout(&self, batch: &CpuBatch, key: DropoutKey, p: f32, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        self.measure(Operation::Dropout, || self.dropout_rows(batch, key, p, x, out));
    }

    fn dropout_backward(
        &self,
        batch: &CpuBatch,
        key: DropoutKey,
        p: f32,
        dout: View<'_, Self>,
        dx: ViewMut<'_, Self>,
    ) {
        self.measure(Operation::Dropout, || self.dropout_backward_rows(batch, key, p, dout, dx));
    }

    fn scale_columns(
        &self,
        alpha: f32,
        x: View<'_, Self>,
        factors: View<'_, Self>,
        beta: f32,
        out: ViewMut<'_, Self>,
    ) {
        self.measure(Operation::Move, || vectors::scale_columns(self, alpha, x, factors, beta, out));
    }

    fn column_sum(&self, alpha: f32, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || vectors::column_sum(self, alpha, x, out));
    }

    fn column_dot(&self, x: View<'_, Self>, y: View<'_, Self>, out: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || vectors::column_dot(self, x, y, out));
    }

    fn row_dot(&self, alpha: f32, x: View<'_, Self>, y: View<'_, Self>, beta: f32, out: ViewMut<'_, Self>) {
        self.measure(Operation::Move, || vectors::row_dot(self, alpha, x, y, beta, out));
    }

    fn reciprocal_root(&self, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.rows(to, |row, to| {
            for (to, from) in to.iter_mut().zip(row_of(from, row)) {
                *to = 1.0 / from.sqrt();
            }
        });
    }

    fn rms_norm_weight_backward(
        &self,
        dout: View<'_, Self>,
        x: View<'_, Self>,
        reciprocal: View<'_, Self>,
        dweight: ViewMut<'_, Self>,
    ) {
        self.measure(Operation::Norm, || vectors::norm_weight_gradient(self, dout, x, reciprocal, dweight));
    }

    fn gather_ids(&self, batch: &CpuBatch, table: View<'_, Self>, columns: bool, out: ViewMut<'_, Self>) {
        let ids = &batch.packed.token_ids;
        self.measure(Operation::Move, || {
            self.rows(out, |row, out| {
                let id = ids[row] as usize;
                if !columns {
                    return out.copy_from_slice(row_of(table, id));
                }
                for (at, out) in out.iter_mut().enumerate() {
                    *out = table.data[table.offset + at * table.stride + id];
                }
            });
        });
    }

    fn scatter_ids(&self, batch: &CpuBatch, from: View<'_, Self>, columns: bool, table: ViewMut<'_, Self>) {
        let ids = &batch.packed.token_ids[..from.rows];
        self.measure(Operation::Move, || vectors::scatter(ids, from, columns, table));
    }

    fn set_rows_of(&self, batch: &CpuBatch, id: u32, row: View<'_, Self>, out: ViewMut<'_, Self>) {
        let ids = &batch.packed.token_ids;
        self.rows(out, |at, out| {
            if ids[at] == id {
                out.copy_from_slice(row_of(row, 0));
            }
        });
    }

    fn sum_rows_of(&self, batch: &CpuBatch, id: u32, from: View<'_, Self>, row: ViewMut<'_, Self>) {
        let out = &mut row.data[row.offset..row.offset + row.columns];
        for (at, _) in batch.packed.token_ids[..from.rows].iter().enumerate().filter(|(_, own)| **own == id) {
            math::add(row_of(from, at), out);
        }
    }

    fn cross_entropy(
        &self,
        batch: &CpuBatch,
        first: usize,
        gradient: bool,
        soft_cap: Option<f32>,
        logits: ViewMut<'_, Self>,
        losses: ViewMut<'_, Self>,
    ) {
        self.measure(Operation::CrossEntropy, || {
            cross_entropy::rows(self, &batch.packed.targets[first..], gradient, soft_cap, logits, losses);
        });
    }
}

/// Row `row` of a matrix.
#[inline]
fn row_of<'a>(view: View<'a, Cpu>, row: usize) -> &'a [f32] {
    let start = view.offset + row * view.stride;
    &view.data[start..start + view.columns]
}
