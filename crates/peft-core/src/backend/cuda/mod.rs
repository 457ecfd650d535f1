//! Operations on an NVIDIA card: kernels of our own, compiled for the card when first used, and cuBLAS for products.
//!
//! Activations are f32. Products run in the [`Precision`] asked for: f32 throughout, TF32, or operands rounded to bf16
//! with sums in f32. Nothing here uses atomics on numbers: the same micro-batch gives the same bits.
//!
//! Operations only queue work. A failure is kept; nothing runs after it, and [`Backend::settle`] returns it.

mod base;
pub mod compile;
mod device;
mod error;
mod libraries;

use std::{
    ffi::c_void,
    ptr,
    sync::{Arc, Mutex, PoisonError},
};

pub use device::{DeviceBuffer, DeviceMemory};
pub use error::DeviceError;
use half::bf16;
pub use libraries::{LIBRARIES_VARIABLE, NVRTC_VARIABLE};
use serde::{Deserialize, Serialize};

use self::{
    base::{DeviceBase, key, table_key},
    device::{Device, Numbers, Operand, Product},
};
use super::{AttentionShape, Backend, BatchRoom, Ready, View, ViewMut};
use crate::{
    batch::PackedBatch,
    engine::GradientSink,
    error::Result,
    model::{BaseSource, EmbeddingView, Matrix},
    random::DropoutKey,
};

/// Whether this machine has a card that [`Cuda::new`] can use, and the libraries for it: for `auto`, which asks first.
pub fn is_available() -> bool {
    Device::probe().is_ok()
}

/// How products are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Operands and sums in f32: slow, for comparison with the CPU.
    F32,
    /// Operands rounded to 10 bits of mantissa, sums in f32.
    Tf32,
    /// Operands of large products rounded to bf16, the rest as [`Precision::Tf32`]; sums in f32.
    #[default]
    Bf16,
}

/// Threads of a block.
const THREADS: usize = 256;
/// Products with a side below this are not worth rounding their operands for.
const NARROW: usize = 64;

/// The CUDA backend: one card.
pub struct Cuda {
    device: Arc<Device>,
    base: DeviceBase,
    /// Operands of a product, rounded to bf16.
    rounded: Mutex<[Option<DeviceMemory>; 2]>,
    nothing: DeviceBuffer,
}

/// A micro-batch on the card.
pub struct CudaBatch {
    ids: DeviceMemory,
    positions: DeviceMemory,
    samples: DeviceMemory,
    spans: DeviceMemory,
    predicting: DeviceMemory,
    targets: DeviceMemory,
    /// Sums of `dout * out` by row and head.
    delta: DeviceMemory,
    span_count: usize,
    longest_queries: usize,
    longest_keys: usize,
}

/// A matrix as kernels take it.
#[derive(Clone, Copy)]
#[repr(C)]
struct MatrixArgument {
    address: u64,
    stride: u64,
    rows: u32,
    columns: u32,
}

/// The shape of attention as kernels take it.
#[derive(Clone, Copy)]
#[repr(C)]
struct ShapeArgument {
    heads: u32,
    group: u32,
    scale: f32,
}

fn matrix(view: View<'_, Cuda>) -> MatrixArgument {
    MatrixArgument {
        address: view.data.address + 4 * view.offset as u64,
        stride: view.stride as u64,
        rows: view.rows as u32,
        columns: view.columns as u32,
    }
}

fn target(view: &ViewMut<'_, Cuda>) -> MatrixArgument {
    matrix(view.view())
}

/// Blocks for rows of `columns`: one block a row, more where a row is long and rows are few.
fn grid(rows: usize, columns: usize) -> [usize; 3] {
    [rows, columns.div_ceil(4 * THREADS).clamp(1, 64), 1]
}

macro_rules! launch {
    ($device:expr, $name:literal, $grid:expr, $block:expr, $($argument:expr),+) => {
        launch!($device, $device.function($name), $name, $grid, $block, 0, $($argument),+)
    };
    ($device:expr, $function:expr, $name:literal, $grid:expr, $block:expr, $shared:expr, $($argument:expr),+) => {{
        // SAFETY: the arguments are those of the kernel of this name, in its order. They are temporaries of this one
        // expression, so they live until the kernel is queued, which copies them.
        unsafe {
            $device.launch($function, $name, $grid, $block, $shared, &mut [
                $(ptr::from_ref(&$argument).cast_mut().cast::<c_void>()),+
            ])
        }
    }};
}

impl Cuda {
    /// The card of number `index`, with nothing on it.
    ///
    /// # Errors
    /// Where there is no driver, no such card, the card is too old, a library is missing or a kernel does not compile.
    pub fn new(index: usize, precision: Precision) -> Result<Self> {
        let device = Device::open(index, precision)?;
        Ok(Self {
            nothing: DeviceBuffer::new(0, Numbers::F32),
            base: DeviceBase::default(),
            rounded: Mutex::new([None, None]),
            device,
        })
    }

    /// Uploads a base, which must stay where it is on the host for as long as this backend works on it.
    ///
    /// # Errors
    /// Where the card's memory is short, or a layer cannot be had.
    pub fn hold<S: BaseSource + ?Sized>(&mut self, base: &mut S) -> Result<()> {
        self.base = DeviceBase::upload(&self.device, base)?;
        Ok(())
    }

    /// The card's name.
    pub fn card(&self) -> &str {
        &self.device.name
    }

    /// How products are computed.
    pub fn precision(&self) -> Precision {
        self.device.precision
    }

    /// Bytes of the card that are free.
    pub fn free_bytes(&self) -> u64 {
        self.device.memory().0
    }

    /// The most bytes that were reserved; the driver's own are not counted.
    pub fn peak_bytes(&self) -> u64 {
        self.device.memory().1
    }

    /// A matrix without gaps on the host, widened to f32 where it is bf16: for checks.
    ///
    /// # Errors
    /// What failed on the card before.
    pub fn read(&self, view: View<'_, Self>) -> Result<Vec<f32>> {
        let count = view.rows * view.columns;
        let numbers = match view.data.numbers {
            Numbers::F32 => {
                let mut numbers = vec![f32::NAN; count];
                self.download(view, &mut numbers);
                numbers
            }
            Numbers::Bf16 => {
                let mut numbers = vec![bf16::NAN; count];
                self.device.download(view.data.address + 2 * view.offset as u64, &mut numbers);
                numbers.into_iter().map(bf16::to_f32).collect()
            }
        };
        self.settle()?;
        Ok(numbers)
    }

    fn missing(&self, what: &str) {
        let what = format!("{what} that was not uploaded: a defect of the program");
        self.device.note(Err(DeviceError::Unsupported { what }));
    }

    /// The memory of `place`, for `length` numbers; reserved at first.
    fn reserved<'a>(
        &self,
        length: usize,
        place: &'a mut Option<DeviceMemory>,
    ) -> Result<&'a mut DeviceBuffer> {
        if place.as_ref().is_some_and(|memory| memory.bytes < 4 * length) {
            *place = None;
        }
        let memory = match place {
            Some(memory) => memory,
            None => place.insert(self.allocate(length)?),
        };
        Ok(&mut memory.buffer)
    }

    /// Room for `bytes` bytes of a rounded operand.
    fn room(&self, side: usize, bytes: usize) -> u64 {
        let mut rounded = self.rounded.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = rounded[side].as_ref().is_some_and(|memory| memory.bytes >= bytes);
        if !enough {
            rounded[side] = None;
            match self.device.reserve(bytes, Numbers::Bf16) {
                Ok(memory) => rounded[side] = Some(memory),
                Err(error) => self.device.note(Err(error)),
            }
        }
        rounded[side].as_ref().map_or(0, |memory| memory.address)
    }

    /// An operand as bf16: itself, or rounded into room of its own.
    fn rounded(&self, side: usize, view: View<'_, Self>, transposed: bool) -> Operand {
        if view.data.numbers == Numbers::Bf16 {
            let address = view.data.address + 2 * view.offset as u64;
            return Operand { address, stride: view.stride, transposed };
        }
        let address = self.room(side, 2 * view.rows * view.columns);
        let wide =
            view.columns.is_multiple_of(4) && view.stride.is_multiple_of(4) && view.offset.is_multiple_of(4);
        let columns = if wide { view.columns / 4 } else { view.columns };
        let grid = [view.rows, columns.div_ceil(4 * THREADS).clamp(1, 64), 1];
        launch!(self.device, "narrow", grid, [THREADS, 1], matrix(view), address, u32::from(wide));
        Operand { address, stride: view.columns, transposed }
    }

    fn row_threads(columns: usize) -> [usize; 2] {
        [columns.next_multiple_of(32).clamp(32, 1024), 1]
    }

    fn drop_into(
        &self,
        batch: &CudaBatch,
        key: DropoutKey,
        p: f32,
        accumulate: bool,
        x: View<'_, Self>,
        out: &ViewMut<'_, Self>,
    ) {
        let [first, second] = key.philox_key();
        // The same cases as on the CPU: nothing is dropped, or everything.
        let threshold = if p <= 0.0 {
            0
        } else if p >= 1.0 {
            65_536
        } else {
            (p * 65_536.0).round() as u32
        };
        let scale = if p <= 0.0 || p >= 1.0 { 1.0 } else { 1.0_f32 / (1.0 - p) };
        let blocks = x.columns.div_ceil(64) * 8;
        launch!(
            self.device,
            "dropout",
            grid(x.rows, blocks),
            [THREADS, 1],
            batch.samples.address,
            batch.positions.address,
            first,
            second,
            threshold,
            scale,
            u32::from(accumulate),
            matrix(x),
            target(out)
        );
    }
}

impl Backend for Cuda {
    type Buffer = DeviceBuffer;
    type Owned = DeviceMemory;
    type Batch = CudaBatch;

    fn allocate(&self, length: usize) -> Result<DeviceMemory> {
        Ok(self.device.reserve(4 * length, Numbers::F32)?)
    }

    fn allocate_batch(&self, room: BatchRoom) -> Result<CudaBatch> {
        let reserve = |bytes: usize| self.device.reserve(bytes * room.tokens, Numbers::F32);
        Ok(CudaBatch {
            ids: reserve(4)?,
            positions: reserve(4)?,
            samples: reserve(8)?,
            spans: reserve(16)?,
            predicting: reserve(4)?,
            targets: reserve(4)?,
            delta: reserve(4 * room.heads)?,
            span_count: 0,
            longest_queries: 0,
            longest_keys: 0,
        })
    }

    fn load_batch(&self, from: &PackedBatch, into: &mut CudaBatch) {
        let device = &self.device;
        device.upload(&from.token_ids, into.ids.address);
        device.upload(&from.positions, into.positions.address);
        device.upload(&from.sample_ids, into.samples.address);
        device.upload(&from.predicting, into.predicting.address);
        device.upload(&from.targets, into.targets.address);
        let spans: Vec<[u32; 4]> = from
            .spans
            .iter()
            .map(|span| {
                [span.query_start, span.queries, span.key_start, span.keys].map(|number| number as u32)
            })
            .collect();
        device.upload(&spans, into.spans.address);
        into.span_count = spans.len();
        into.longest_queries = from.spans.iter().map(|span| span.queries).max().unwrap_or(0);
        into.longest_keys = from.spans.iter().map(|span| span.keys).max().unwrap_or(0);
    }

    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }

    fn settle(&self) -> Result<()> {
        Ok(self.device.settle()?)
    }

    fn lend<'a>(&self, host: &'a [f32], place: &'a mut Option<DeviceMemory>) -> Result<&'a DeviceBuffer> {
        let memory = self.reserved(host.len(), place)?;
        self.device.upload(host, memory.address);
        Ok(memory)
    }

    fn with_gradient<R>(
        &self,
        host: &mut [f32],
        place: &mut Option<DeviceMemory>,
        staging: &mut Vec<f32>,
        sink: &mut dyn GradientSink,
        work: impl FnOnce(&mut DeviceBuffer, &mut Ready<'_, Self>) -> Result<R>,
    ) -> Result<R> {
        let memory = self.reserved(host.len(), place)?;
        self.fill(0.0, ViewMut::<Self>::new(&mut *memory, 1, host.len()));
        let mut ranges = Vec::new();
        let result = work(&mut *memory, &mut |range, _| ranges.push(range))?;
        staging.resize(host.len(), 0.0);
        self.device.download(memory.address, staging);
        self.settle()?;
        for (host, new) in host.iter_mut().zip(&*staging) {
            *host += new;
        }
        for range in ranges {
            sink.ready(range, host);
        }
        Ok(result)
    }

    fn upload(&self, from: &[f32], into: &mut DeviceBuffer) {
        self.device.upload(from, into.address);
    }

    fn download(&self, from: View<'_, Self>, into: &mut [f32]) {
        let start = matrix(from).address;
        if from.stride == from.columns {
            return self.device.download(start, &mut into[..from.rows * from.columns]);
        }
        for (row, into) in into.chunks_exact_mut(from.columns).enumerate().take(from.rows) {
            self.device.download(start + 4 * (row * from.stride) as u64, into);
        }
    }

    fn frozen<'a>(&'a self, matrix: &Matrix<'a>, scratch: &'a mut DeviceBuffer) -> View<'a, Self> {
        let (rows, columns) = (matrix.rows(), matrix.columns());
        match matrix {
            Matrix::Dense(view) => match self.base.dense.get(&key(view.data())) {
                Some(memory) => return View::new(&memory.buffer, rows, columns),
                None => self.missing("a matrix"),
            },
            Matrix::Nf4(view) => match self.base.packed.get(&key(view.codes())) {
                Some(packed) => {
                    let argument = packed.argument;
                    let blocks = (argument.numbers as usize / 8).div_ceil(THREADS).clamp(1, 132 * 32);
                    if self.device.precision == Precision::Bf16 {
                        launch!(
                            self.device,
                            "nf4_bf16",
                            [blocks, 1, 1],
                            [THREADS, 1],
                            argument,
                            scratch.address
                        );
                        return View::new(scratch.as_bf16(), rows, columns);
                    }
                    launch!(self.device, "nf4_f32", [blocks, 1, 1], [THREADS, 1], argument, scratch.address);
                }
                None => self.missing("a quantised matrix"),
            },
        }
        View::new(scratch, rows, columns)
    }

    fn frozen_vector<'a>(&'a self, vector: &'a [f32]) -> View<'a, Self> {
        match self.base.vectors.get(&key(vector)) {
            Some(memory) => View::new(&memory.buffer, 1, vector.len()),
            None => {
                self.missing("a vector");
                View::new(&self.nothing, 1, vector.len())
            }
        }
    }

    fn frozen_rows<'a>(
        &'a self,
        table: &EmbeddingView<'a>,
        first: usize,
        rows: usize,
        scratch: &'a mut DeviceBuffer,
    ) -> View<'a, Self> {
        let columns = table.columns();
        let Some(memory) = self.base.tables.get(&table_key(table)) else {
            self.missing("a table");
            return View::new(&self.nothing, rows, columns);
        };
        if memory.numbers == Numbers::F32 || self.device.precision == Precision::Bf16 {
            return View::at(&memory.buffer, first * columns, rows, columns);
        }
        let count = (rows * columns) as u64;
        let blocks = (rows * columns).div_ceil(THREADS).clamp(1, 132 * 32);
        let from = memory.address + 2 * (first * columns) as u64;
        launch!(self.device, "widen", [blocks, 1, 1], [THREADS, 1], from, scratch.address, count);
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
        let (rows, inner) = if transpose_a { (a.columns, a.rows) } else { (a.rows, a.columns) };
        let (b_inner, columns) = if transpose_b { (b.columns, b.rows) } else { (b.rows, b.columns) };
        assert!(
            rows == c.rows && columns == c.columns && inner == b_inner,
            "a product's operands and target do not fit each other"
        );
        if rows == 0 || columns == 0 {
            return;
        }
        let stored = a.data.numbers == Numbers::Bf16 || b.data.numbers == Numbers::Bf16;
        let large = rows.min(columns).min(inner) >= NARROW && self.device.precision == Precision::Bf16;
        let plain = |view: View<'_, Self>, transposed| Operand {
            address: matrix(view).address,
            stride: view.stride,
            transposed,
        };
        let (a, b, numbers) = if stored || large {
            (self.rounded(0, a, transpose_a), self.rounded(1, b, transpose_b), Numbers::Bf16)
        } else {
            (plain(a, transpose_a), plain(b, transpose_b), Numbers::F32)
        };
        let c = plain(c.view(), false);
        self.device.product(&Product { a, b, c, rows, columns, inner, alpha, beta, numbers });
    }

    fn fill(&self, value: f32, to: ViewMut<'_, Self>) {
        launch!(self.device, "fill", grid(to.rows, to.columns), [THREADS, 1], target(&to), value);
    }

    fn copy(&self, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        launch!(self.device, "copy", grid(to.rows, to.columns), [THREADS, 1], matrix(from), target(&to));
    }

    fn add(&self, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        launch!(self.device, "add", grid(to.rows, to.columns), [THREADS, 1], matrix(from), target(&to));
    }

    fn add_bias(&self, bias: View<'_, Self>, to: ViewMut<'_, Self>) {
        launch!(self.device, "add_bias", grid(to.rows, to.columns), [THREADS, 1], matrix(bias), target(&to));
    }

    fn gather_embedding(&self, batch: &CudaBatch, table: &EmbeddingView<'_>, out: ViewMut<'_, Self>) {
        let Some(memory) = self.base.tables.get(&table_key(table)) else { return self.missing("a table") };
        let (grid, ids, from) = (grid(out.rows, out.columns), batch.ids.address, memory.address);
        match memory.numbers {
            Numbers::F32 => launch!(self.device, "gather_f32", grid, [THREADS, 1], ids, from, target(&out)),
            Numbers::Bf16 => launch!(self.device, "gather_bf16", grid, [THREADS, 1], ids, from, target(&out)),
        }
    }

    fn gather_predicting(&self, batch: &CudaBatch, first: usize, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        let rows = batch.predicting.address + 4 * first as u64;
        let grid = grid(out.rows, out.columns);
        launch!(self.device, "gather_rows", grid, [THREADS, 1], rows, matrix(x), target(&out));
    }

    fn scatter_predicting(&self, batch: &CudaBatch, first: usize, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        let rows = batch.predicting.address + 4 * first as u64;
        launch!(
            self.device,
            "scatter_rows",
            grid(x.rows, x.columns),
            [THREADS, 1],
            rows,
            matrix(x),
            target(&out)
        );
    }

    fn rms_norm(
        &self,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        epsilon: f32,
        out: ViewMut<'_, Self>,
        reciprocal: ViewMut<'_, Self>,
    ) {
        let weight = matrix(weight).address;
        let (grid, block) = ([x.rows, 1, 1], Self::row_threads(x.columns));
        let (x, out, reciprocal) = (matrix(x), target(&out), target(&reciprocal));
        launch!(self.device, "rms_norm", grid, block, x, weight, epsilon, out, reciprocal);
    }

    fn rms_norm_backward(
        &self,
        dout: View<'_, Self>,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        reciprocal: View<'_, Self>,
        dx: ViewMut<'_, Self>,
    ) {
        let weight = matrix(weight).address;
        let (grid, block) = ([x.rows, 1, 1], Self::row_threads(x.columns));
        let (dout, x, reciprocal, dx) = (matrix(dout), matrix(x), matrix(reciprocal), target(&dx));
        launch!(self.device, "rms_norm_backward", grid, block, dout, x, weight, reciprocal, dx);
    }

    fn rope(
        &self,
        batch: &CudaBatch,
        head_dim: usize,
        table: View<'_, Self>,
        backward: bool,
        x: ViewMut<'_, Self>,
    ) {
        let sign = if backward { -1.0_f32 } else { 1.0 };
        let (grid, half) = (grid(x.rows, x.columns / 2), (head_dim / 2) as u32);
        let positions = batch.positions.address;
        launch!(self.device, "rope", grid, [THREADS, 1], positions, half, matrix(table), sign, target(&x));
    }

    fn swiglu(&self, gate: View<'_, Self>, up: View<'_, Self>, out: ViewMut<'_, Self>) {
        let grid = grid(out.rows, out.columns);
        launch!(self.device, "swiglu", grid, [THREADS, 1], matrix(gate), matrix(up), target(&out));
    }

    fn swiglu_backward(&self, dout: View<'_, Self>, gate: ViewMut<'_, Self>, up: ViewMut<'_, Self>) {
        let grid = grid(gate.rows, gate.columns);
        launch!(self.device, "swiglu_backward", grid, [THREADS, 1], matrix(dout), target(&gate), target(&up));
    }

    fn attention(
        &self,
        batch: &CudaBatch,
        shape: AttentionShape,
        q: View<'_, Self>,
        k: View<'_, Self>,
        v: View<'_, Self>,
        out: ViewMut<'_, Self>,
        log_sum: ViewMut<'_, Self>,
    ) {
        let kernels = match self.device.attention(shape.head_dim) {
            Ok(kernels) => kernels,
            Err(error) => return self.device.note(Err(error)),
        };
        let (tiles, argument) = (kernels.tiles, shape_argument(shape));
        let grid = [batch.longest_queries.div_ceil(tiles.rows()), shape.heads, batch.span_count];
        launch!(
            self.device,
            kernels.forward,
            "attention_forward",
            grid,
            [32 * tiles.warps, 1],
            tiles.forward_bytes(shape.head_dim),
            batch.spans.address,
            argument,
            matrix(q),
            matrix(k),
            matrix(v),
            target(&out),
            target(&log_sum)
        );
    }

    fn attention_backward(
        &self,
        batch: &CudaBatch,
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
        let kernels = match self.device.attention(shape.head_dim) {
            Ok(kernels) => kernels,
            Err(error) => return self.device.note(Err(error)),
        };
        let (tiles, argument) = (kernels.tiles, shape_argument(shape));
        let delta = matrix(View::new(&batch.delta.buffer, q.rows, shape.heads));
        let (out, dout, log_sum) = (matrix(out), matrix(dout), matrix(log_sum));
        let delta_grid = [q.rows, shape.heads.div_ceil(8), 1];
        launch!(self.device, kernels.delta, "attention_delta", delta_grid, [32, 8], 0, dout, out, delta);
        let (q, k, v) = (matrix(q), matrix(k), matrix(v));
        let (threads, shared) = ([32 * tiles.warps, 1], tiles.backward_bytes(shape.head_dim));
        let spans = batch.spans.address;
        let grid = [batch.longest_queries.div_ceil(tiles.rows()), shape.heads, batch.span_count];
        launch!(
            self.device,
            kernels.dq,
            "attention_dq",
            grid,
            threads,
            shared,
            spans,
            argument,
            q,
            k,
            v,
            log_sum,
            delta,
            dout,
            target(&dq)
        );
        let grid = [batch.longest_keys.div_ceil(tiles.rows()), shape.kv_heads, batch.span_count];
        launch!(
            self.device,
            kernels.dkv,
            "attention_dkv",
            grid,
            threads,
            shared,
            spans,
            argument,
            q,
            k,
            v,
            log_sum,
            delta,
            dout,
            target(&dk),
            target(&dv)
        );
    }

    fn dropout(&self, batch: &CudaBatch, key: DropoutKey, p: f32, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        self.drop_into(batch, key, p, false, x, &out);
    }

    fn dropout_backward(
        &self,
        batch: &CudaBatch,
        key: DropoutKey,
        p: f32,
        dout: View<'_, Self>,
        dx: ViewMut<'_, Self>,
    ) {
        self.drop_into(batch, key, p, true, dout, &dx);
    }

    fn cross_entropy(
        &self,
        batch: &CudaBatch,
        first: usize,
        gradient: bool,
        logits: ViewMut<'_, Self>,
        losses: ViewMut<'_, Self>,
    ) -> f64 {
        let targets = batch.targets.address + 4 * first as u64;
        let (grid, block) = ([logits.rows, 1, 1], Self::row_threads(logits.columns));
        let (logits, flag) = (target(&logits), u32::from(gradient));
        launch!(self.device, "cross_entropy", grid, block, targets, flag, logits, target(&losses));
        let mut host = vec![0.0_f32; losses.rows];
        self.download(losses.view(), &mut host);
        // One after the other, in f64, as on the CPU.
        host.iter().map(|loss| f64::from(*loss)).sum()
    }
}

fn shape_argument(shape: AttentionShape) -> ShapeArgument {
    ShapeArgument {
        heads: shape.heads as u32,
        group: (shape.heads / shape.kv_heads) as u32,
        scale: shape.scale,
    }
}
