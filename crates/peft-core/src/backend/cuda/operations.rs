//! The backend's operations on a card.

use half::bf16;
use rayon::prelude::*;

use super::{
    Aside, Cuda, CudaBatch, DeviceBuffer, DeviceError, DeviceMemory, Numbers, THREADS, any, attention,
    attention::{Backward, Forward, TileLists},
    base::{Table, key, table_key},
    device::{Operand, Product},
    grid, kernel, launch, matrix, target,
};
use crate::{
    backend::{
        AttentionShape, Backend, BatchRoom, LowRank, Ready, SpanStart, Use, View, ViewMut, cuda::Precision,
    },
    batch::PackedBatch,
    engine::GradientSink,
    error::Result,
    model::{EmbeddingView, Matrix},
    optim::{FlatState, FlatUpdate, Outcome},
    random::DropoutKey,
};

/// Numbers copied or added as one task.
const CHUNK: usize = 1 << 16;
/// Threads of a block of norms, which takes a row.
const NORM_THREADS: usize = 128;

impl Backend for Cuda {
    type Buffer = DeviceBuffer;
    type Owned = DeviceMemory;
    type Batch = CudaBatch;
    type Aside = Aside;

    fn allocate(&self, length: usize, purpose: Use) -> Result<DeviceMemory> {
        let numbers = self.numbers(purpose);
        Ok(self.take(numbers.bytes() * length, numbers)?)
    }

    fn allocate_batch(&self, room: BatchRoom) -> Result<CudaBatch> {
        let reserve = |bytes: usize| self.take(bytes * room.tokens, Numbers::F32);
        Ok(CudaBatch {
            ids: reserve(4)?,
            positions: reserve(4)?,
            samples: reserve(8)?,
            spans: reserve(16)?,
            predicting: reserve(4)?,
            targets: reserve(4)?,
            statistics: reserve(8 * room.heads)?,
            tiles: TileLists::allocate(self, room)?,
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
        into.tiles.load(self, &from.spans);
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
        let length = host.len();
        if place.as_ref().is_none_or(|memory| memory.bytes < 4 * length) {
            *place = None;
            *place = Some(self.allocate_parameters(length)?);
        }
        let memory = place.as_mut().ok_or(DeviceError::OutOfMemory { bytes: 6 * length, free: 0 })?;
        let memory = &mut *memory;
        self.with_staging(length, |staging| {
            staging.par_chunks_mut(CHUNK).zip(host.par_chunks(CHUNK)).for_each(|(staging, host)| {
                staging.copy_from_slice(host);
            });
            self.upload(staging, memory);
            // The staging is used again before the copy out of it need be over.
            self.settle()
        })?;
        Ok(memory)
    }

    fn allocate_parameters(&self, length: usize) -> Result<DeviceMemory> {
        let wide = (4 * length).next_multiple_of(256);
        let twin = if self.device.precision == Precision::Bf16 { 2 * length } else { 0 };
        let mut memory = self.take(wide + twin, Numbers::F32)?;
        if twin > 0 {
            memory.buffer.rounded = memory.buffer.address + wide as u64;
        }
        Ok(memory)
    }

    fn in_one_piece<R>(&self, build: impl FnMut() -> Result<R>) -> Result<R> {
        self.in_one_region(build)
    }

    fn allocate_aside(&self, length: usize, purpose: Use) -> Result<Aside> {
        Ok(Aside::new(&self.device, self.numbers(purpose).bytes() * length)?)
    }

    fn put_aside(&self, from: View<'_, Self>, to: &mut Aside) {
        let bytes = from.data.numbers.bytes() * from.rows * from.columns;
        to.put(&self.device, matrix(from).address, bytes);
    }

    fn bring_back(&self, from: &Aside, to: ViewMut<'_, Self>) {
        let bytes = to.data.numbers.bytes() * to.rows * to.columns;
        from.bring(&self.device, target(&to).address, bytes);
    }

    fn await_aside(&self, aside: &Aside) {
        aside.wait(&self.device);
    }

    fn add_losses(&self, losses: View<'_, Self>, state: &mut FlatState<Self>) {
        self.queue_losses(losses, state);
    }

    fn update_flat(&self, update: &FlatUpdate<'_>, state: &mut FlatState<Self>) {
        self.queue_update(update, state);
    }

    fn outcome(&self, state: &mut FlatState<Self>) -> Result<Outcome> {
        self.read_outcome(state)
    }

    fn with_gradient<R>(
        &self,
        host: &mut [f32],
        place: &mut Option<DeviceMemory>,
        _staging: &mut Vec<f32>,
        sink: &mut dyn GradientSink,
        work: impl FnOnce(&mut DeviceBuffer, &mut Ready<'_, Self>) -> Result<R>,
    ) -> Result<R> {
        let memory = self.reserved(host.len(), place)?;
        self.fill(0.0, ViewMut::<Self>::new(&mut *memory, 1, host.len()));
        let mut ranges = Vec::new();
        let result = work(&mut *memory, &mut |range, _| ranges.push(range))?;
        let address = memory.address;
        self.with_staging(host.len(), |staging| {
            self.device.download(address, staging);
            self.settle()?;
            host.par_chunks_mut(CHUNK).zip(staging.par_chunks(CHUNK)).for_each(|(host, new)| {
                host.iter_mut().zip(new).for_each(|(host, new)| *host += new);
            });
            Ok(())
        })?;
        for range in ranges {
            sink.ready(range, host);
        }
        Ok(result)
    }

    fn upload(&self, from: &[f32], into: &mut DeviceBuffer) {
        match into.numbers {
            Numbers::F32 => {
                self.device.upload(from, into.address);
                self.round(into, from.len());
            }
            Numbers::Bf16 => {
                let narrow: Vec<bf16> = from.iter().copied().map(bf16::from_f32).collect();
                self.device.upload(&narrow, into.address);
            }
        }
    }

    fn download(&self, from: View<'_, Self>, into: &mut [f32]) {
        let start = matrix(from).address;
        let (runs, length) = if from.stride == from.columns {
            (1, from.rows * from.columns)
        } else {
            (from.rows, from.columns)
        };
        let mut narrow = Vec::new();
        for (run, into) in into.chunks_exact_mut(length.max(1)).enumerate().take(runs) {
            let address = start + (from.data.numbers.bytes() * run * from.stride) as u64;
            match from.data.numbers {
                Numbers::F32 => self.device.download(address, into),
                Numbers::Bf16 => {
                    narrow.resize(length, bf16::ZERO);
                    self.device.download(address, &mut narrow);
                    into.iter_mut().zip(&narrow).for_each(|(into, from)| *into = from.to_f32());
                }
            }
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
                    let name = kernel!("nf4", scratch.numbers);
                    launch!(self.device, name, [blocks, 1, 1], [THREADS, 1], argument, scratch.address);
                }
                None => self.missing("a quantised matrix"),
            },
        }
        View::new(scratch, rows, columns)
    }

    fn frozen_updated<'a>(
        &'a self,
        matrix: &Matrix<'a>,
        update: &LowRank<'_, Self>,
        scratch: &'a mut DeviceBuffer,
    ) -> (View<'a, Self>, bool) {
        match self.merge(matrix, update, scratch) {
            true => (View::new(scratch, matrix.rows(), matrix.columns()), true),
            false => (self.frozen(matrix, scratch), false),
        }
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
        let Some(Table::Near(memory)) = self.base.tables.get(&table_key(table)) else {
            self.missing("a table");
            return View::new(&self.nothing, rows, columns);
        };
        if memory.numbers == Numbers::F32 || self.device.precision == Precision::Bf16 {
            return View::at(&memory.buffer, first * columns, rows, columns);
        }
        let from = View::<Self>::at(&memory.buffer, first * columns, rows, columns);
        self.copy(from, ViewMut::<Self>::new(&mut *scratch, rows, columns));
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
        let into = c.data.numbers;
        let narrow = [a.data.numbers, b.data.numbers, into].contains(&Numbers::Bf16);
        let plain = |view: View<'_, Self>, transposed| Operand {
            address: matrix(view).address,
            stride: view.stride,
            transposed,
        };
        let (a, b, numbers) = if narrow {
            (self.rounded(0, a, transpose_a), self.rounded(1, b, transpose_b), Numbers::Bf16)
        } else {
            (plain(a, transpose_a), plain(b, transpose_b), Numbers::F32)
        };
        let c = plain(c.view(), false);
        self.device.product(&Product { a, b, c, rows, columns, inner, alpha, beta, numbers, into });
    }

    fn low_rank_backward(
        &self,
        scale: f32,
        dy: View<'_, Self>,
        b: View<'_, Self>,
        p: View<'_, Self>,
        dp: ViewMut<'_, Self>,
        db: ViewMut<'_, Self>,
    ) {
        if !self.low_rank_slopes(scale, dy, b, p, &dp, &db) {
            self.gemm(scale, dy, true, p, false, 1.0, db);
            self.gemm(scale, dy, false, b, false, 0.0, dp);
        }
    }

    fn fill(&self, value: f32, to: ViewMut<'_, Self>) {
        let name = kernel!("fill", to.data.numbers);
        launch!(self.device, name, grid(to.rows, to.columns), [THREADS, 1], target(&to), value);
    }

    fn copy(&self, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let name = kernel!("copy", from.data.numbers, to.data.numbers);
        launch!(self.device, name, grid(to.rows, to.columns), [THREADS, 1], matrix(from), target(&to));
    }

    fn add(&self, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let name = kernel!("add", from.data.numbers, to.data.numbers);
        launch!(self.device, name, grid(to.rows, to.columns), [THREADS, 1], matrix(from), target(&to));
    }

    fn scale(&self, factor: f32, to: ViewMut<'_, Self>) {
        launch!(self.device, "scale", grid(to.rows, to.columns), [THREADS, 1], any(to.view()), factor);
    }

    fn add_bias(&self, bias: View<'_, Self>, to: ViewMut<'_, Self>) {
        let name = kernel!("add_bias", bias.data.numbers, to.data.numbers);
        launch!(self.device, name, grid(to.rows, to.columns), [THREADS, 1], matrix(bias), target(&to));
    }

    fn gather_embedding(&self, batch: &CudaBatch, table: &EmbeddingView<'_>, out: ViewMut<'_, Self>) {
        let Some(memory) = self.base.tables.get(&table_key(table)) else { return self.missing("a table") };
        let (from, numbers) = memory.place();
        let (grid, ids) = (grid(out.rows, out.columns), batch.ids.address);
        let name = kernel!("gather_table", numbers, out.data.numbers);
        launch!(self.device, name, grid, [THREADS, 1], ids, from, target(&out));
    }

    fn gather_predicting(&self, batch: &CudaBatch, first: usize, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        let rows = batch.predicting.address + 4 * first as u64;
        let (grid, numbers) = (grid(out.rows, out.columns), x.data.numbers);
        if self.alike("gather_rows", numbers, &[out.data.numbers]) {
            let name = kernel!("gather_rows", numbers);
            launch!(self.device, name, grid, [THREADS, 1], rows, matrix(x), target(&out));
        }
    }

    fn scatter_predicting(&self, batch: &CudaBatch, first: usize, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        let rows = batch.predicting.address + 4 * first as u64;
        let (grid, numbers) = (grid(x.rows, x.columns), x.data.numbers);
        if self.alike("scatter_rows", numbers, &[out.data.numbers]) {
            let name = kernel!("scatter_rows", numbers);
            launch!(self.device, name, grid, [THREADS, 1], rows, matrix(x), target(&out));
        }
    }

    fn put_virtual(&self, batch: &CudaBatch, at: SpanStart, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let (grid, spans, count) =
            (grid(from.rows, from.columns), batch.spans.address, batch.span_count as u32);
        let keys = u32::from(at == SpanStart::Keys);
        launch!(
            self.device,
            "put_virtual",
            grid,
            [THREADS, 1],
            spans,
            count,
            keys,
            any(from),
            any(to.view())
        );
    }

    fn sum_virtual(&self, batch: &CudaBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let (grid, spans, count) = (grid(to.rows, to.columns), batch.spans.address, batch.span_count as u32);
        launch!(self.device, "sum_virtual", grid, [THREADS, 1], spans, count, any(from), any(to.view()));
    }

    fn rows_to_keys(&self, batch: &CudaBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let (grid, spans, count) =
            (grid(from.rows, from.columns), batch.spans.address, batch.span_count as u32);
        launch!(self.device, "rows_to_keys", grid, [THREADS, 1], spans, count, any(from), any(to.view()));
    }

    fn keys_to_rows(&self, batch: &CudaBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let (grid, spans, count) = (grid(to.rows, to.columns), batch.spans.address, batch.span_count as u32);
        launch!(self.device, "keys_to_rows", grid, [THREADS, 1], spans, count, any(from), any(to.view()));
    }

    fn rms_norm(
        &self,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        epsilon: f32,
        out: ViewMut<'_, Self>,
        reciprocal: ViewMut<'_, Self>,
    ) {
        let numbers = x.data.numbers;
        if !self.alike("rms_norm", numbers, &[out.data.numbers]) {
            return;
        }
        let weight = matrix(weight).address;
        let (grid, block) = ([x.rows, 1, 1], [NORM_THREADS, 1]);
        let (x, out, reciprocal) = (matrix(x), target(&out), target(&reciprocal));
        let name = kernel!("rms_norm", numbers);
        launch!(self.device, name, grid, block, x, weight, epsilon, out, reciprocal);
    }

    fn rms_norm_backward(
        &self,
        dout: View<'_, Self>,
        x: View<'_, Self>,
        weight: View<'_, Self>,
        reciprocal: View<'_, Self>,
        dx: ViewMut<'_, Self>,
    ) {
        let numbers = x.data.numbers;
        if !self.alike("rms_norm_backward", numbers, &[dout.data.numbers, dx.data.numbers]) {
            return;
        }
        let weight = matrix(weight).address;
        let (grid, block) = ([x.rows, 1, 1], [NORM_THREADS, 1]);
        let (dout, x, reciprocal, dx) = (matrix(dout), matrix(x), matrix(reciprocal), target(&dx));
        let name = kernel!("rms_norm_backward", numbers);
        launch!(self.device, name, grid, block, dout, x, weight, reciprocal, dx);
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
        let name = kernel!("rope", x.data.numbers);
        launch!(self.device, name, grid, [THREADS, 1], positions, half, matrix(table), sign, target(&x));
    }

    fn swiglu(&self, gate: View<'_, Self>, up: View<'_, Self>, out: ViewMut<'_, Self>) {
        let (grid, numbers) = (grid(out.rows, out.columns), out.data.numbers);
        if self.alike("swiglu", numbers, &[gate.data.numbers, up.data.numbers]) {
            let name = kernel!("swiglu", numbers);
            launch!(self.device, name, grid, [THREADS, 1], matrix(gate), matrix(up), target(&out));
        }
    }

    fn swiglu_backward(&self, dout: ViewMut<'_, Self>, gate: ViewMut<'_, Self>, up: ViewMut<'_, Self>) {
        let (grid, numbers) = (grid(gate.rows, gate.columns), dout.data.numbers);
        if self.alike("swiglu_backward", numbers, &[gate.data.numbers, up.data.numbers]) {
            let name = kernel!("swiglu_backward", numbers);
            launch!(self.device, name, grid, [THREADS, 1], target(&dout), target(&gate), target(&up));
        }
    }

    fn geglu(&self, gate: View<'_, Self>, up: View<'_, Self>, out: ViewMut<'_, Self>) {
        let (grid, numbers) = (grid(out.rows, out.columns), out.data.numbers);
        if self.alike("geglu", numbers, &[gate.data.numbers, up.data.numbers]) {
            let name = kernel!("geglu", numbers);
            launch!(self.device, name, grid, [THREADS, 1], matrix(gate), matrix(up), target(&out));
        }
    }

    fn geglu_backward(&self, dout: ViewMut<'_, Self>, gate: ViewMut<'_, Self>, up: ViewMut<'_, Self>) {
        let (grid, numbers) = (grid(gate.rows, gate.columns), dout.data.numbers);
        if self.alike("geglu_backward", numbers, &[gate.data.numbers, up.data.numbers]) {
            let name = kernel!("geglu_backward", numbers);
            launch!(self.device, name, grid, [THREADS, 1], target(&dout), target(&gate), target(&up));
        }
    }

    fn soft_cap(&self, cap: f32, x: ViewMut<'_, Self>) {
        launch!(self.device, "soft_cap", grid(x.rows, x.columns), [THREADS, 1], any(x.view()), cap);
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
        attention::forward(self, batch, shape, &Forward { q, k, v, out, log_sum });
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
        let on = Backward { q, k, v, out, log_sum, dout, dq, dk, dv };
        attention::backward(self, batch, shape, &on);
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

    fn scale_columns(
        &self,
        alpha: f32,
        x: View<'_, Self>,
        factors: View<'_, Self>,
        beta: f32,
        out: ViewMut<'_, Self>,
    ) {
        let (grid, x, factors) = (grid(out.rows, out.columns), any(x), any(factors));
        launch!(self.device, "scale_columns", grid, [THREADS, 1], alpha, x, factors, beta, any(out.view()));
    }

    fn column_sum(&self, alpha: f32, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        let (grid, out) = (grid(1, x.columns), any(out.view()));
        launch!(self.device, "column_sum", grid, [THREADS, 1], alpha, any(x), out);
    }

    fn column_dot(&self, x: View<'_, Self>, y: View<'_, Self>, out: ViewMut<'_, Self>) {
        let (grid, out) = (grid(1, x.columns), any(out.view()));
        launch!(self.device, "column_dot", grid, [THREADS, 1], any(x), any(y), out);
    }

    fn row_dot(&self, alpha: f32, x: View<'_, Self>, y: View<'_, Self>, beta: f32, out: ViewMut<'_, Self>) {
        let (grid, block) = ([x.rows, 1, 1], Self::row_threads(x.columns));
        launch!(self.device, "row_dot", grid, block, alpha, any(x), any(y), beta, any(out.view()));
    }

    fn reciprocal_root(&self, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let grid = grid(to.rows, to.columns);
        launch!(self.device, "reciprocal_root", grid, [THREADS, 1], any(from), any(to.view()));
    }

    fn rms_norm_weight_backward(
        &self,
        dout: View<'_, Self>,
        x: View<'_, Self>,
        reciprocal: View<'_, Self>,
        dweight: ViewMut<'_, Self>,
    ) {
        let (grid, to) = (grid(1, x.columns), any(dweight.view()));
        let (dout, x, factors) = (any(dout), any(x), any(reciprocal));
        launch!(self.device, "norm_weight_backward", grid, [THREADS, 1], dout, x, factors, to);
    }

    fn gather_ids(&self, batch: &CudaBatch, table: View<'_, Self>, columns: bool, out: ViewMut<'_, Self>) {
        let (grid, ids, flag) = (grid(out.rows, out.columns), batch.ids.address, u32::from(columns));
        launch!(self.device, "gather_ids", grid, [THREADS, 1], ids, flag, any(table), any(out.view()));
    }

    fn scatter_ids(&self, batch: &CudaBatch, from: View<'_, Self>, columns: bool, table: ViewMut<'_, Self>) {
        let (grid, ids, flag) = (grid(from.rows, from.columns), batch.ids.address, u32::from(columns));
        if self.alike("scatter_ids", Numbers::F32, &[table.data.numbers]) {
            launch!(self.device, "scatter_ids", grid, [THREADS, 1], ids, flag, any(from), target(&table));
        }
    }

    fn set_rows_of(&self, batch: &CudaBatch, id: u32, row: View<'_, Self>, out: ViewMut<'_, Self>) {
        let (grid, ids) = (grid(out.rows, out.columns), batch.ids.address);
        launch!(self.device, "set_rows_of", grid, [THREADS, 1], ids, id, any(row), any(out.view()));
    }

    fn sum_rows_of(&self, batch: &CudaBatch, id: u32, from: View<'_, Self>, row: ViewMut<'_, Self>) {
        let (grid, ids) = (grid(1, from.columns), batch.ids.address);
        launch!(self.device, "sum_rows_of", grid, [THREADS, 1], ids, id, any(from), any(row.view()));
    }

    fn cross_entropy(
        &self,
        batch: &CudaBatch,
        first: usize,
        gradient: bool,
        soft_cap: Option<f32>,
        logits: ViewMut<'_, Self>,
        losses: ViewMut<'_, Self>,
    ) {
        let targets = batch.targets.address + 4 * first as u64;
        let (grid, block) = ([logits.rows, 1, 1], Self::row_threads(logits.columns));
        let (name, flag, cap) =
            (kernel!("cross_entropy", logits.data.numbers), u32::from(gradient), soft_cap.unwrap_or(0.0));
        launch!(self.device, name, grid, block, targets, flag, cap, target(&logits), target(&losses));
    }
}
