//! The backend's operations on a card.

use super::{
    Cuda, CudaBatch, DeviceBuffer, DeviceMemory, NARROW, THREADS, attention,
    base::{key, table_key},
    device::{Numbers, Operand, Product},
    grid, launch, matrix, target,
};
use crate::{
    backend::{AttentionShape, Backend, BatchRoom, Ready, SpanStart, View, ViewMut, cuda::Precision},
    batch::PackedBatch,
    engine::GradientSink,
    error::Result,
    model::{EmbeddingView, Matrix},
    random::DropoutKey,
};

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

    fn scale(&self, factor: f32, to: ViewMut<'_, Self>) {
        launch!(self.device, "scale", grid(to.rows, to.columns), [THREADS, 1], target(&to), factor);
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
            matrix(from),
            target(&to)
        );
    }

    fn sum_virtual(&self, batch: &CudaBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let (grid, spans, count) = (grid(to.rows, to.columns), batch.spans.address, batch.span_count as u32);
        launch!(self.device, "sum_virtual", grid, [THREADS, 1], spans, count, matrix(from), target(&to));
    }

    fn rows_to_keys(&self, batch: &CudaBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let (grid, spans, count) =
            (grid(from.rows, from.columns), batch.spans.address, batch.span_count as u32);
        launch!(self.device, "rows_to_keys", grid, [THREADS, 1], spans, count, matrix(from), target(&to));
    }

    fn keys_to_rows(&self, batch: &CudaBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let (grid, spans, count) = (grid(to.rows, to.columns), batch.spans.address, batch.span_count as u32);
        launch!(self.device, "keys_to_rows", grid, [THREADS, 1], spans, count, matrix(from), target(&to));
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

    fn geglu(&self, gate: View<'_, Self>, up: View<'_, Self>, out: ViewMut<'_, Self>) {
        let grid = grid(out.rows, out.columns);
        launch!(self.device, "geglu", grid, [THREADS, 1], matrix(gate), matrix(up), target(&out));
    }

    fn geglu_backward(&self, dout: View<'_, Self>, gate: ViewMut<'_, Self>, up: ViewMut<'_, Self>) {
        let grid = grid(gate.rows, gate.columns);
        launch!(self.device, "geglu_backward", grid, [THREADS, 1], matrix(dout), target(&gate), target(&up));
    }

    fn soft_cap(&self, cap: f32, x: ViewMut<'_, Self>) {
        launch!(self.device, "soft_cap", grid(x.rows, x.columns), [THREADS, 1], target(&x), cap);
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
        attention::forward(self, batch, shape, q, k, v, out, log_sum);
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
        attention::backward(self, batch, shape, q, k, v, out, log_sum, dout, dq, dk, dv);
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
        let (grid, x, factors) = (grid(out.rows, out.columns), matrix(x), matrix(factors).address);
        launch!(self.device, "scale_columns", grid, [THREADS, 1], alpha, x, factors, beta, target(&out));
    }

    fn column_sum(&self, alpha: f32, x: View<'_, Self>, out: ViewMut<'_, Self>) {
        let (grid, out) = (grid(1, x.columns), target(&out).address);
        launch!(self.device, "column_sum", grid, [THREADS, 1], alpha, matrix(x), out);
    }

    fn column_dot(&self, x: View<'_, Self>, y: View<'_, Self>, out: ViewMut<'_, Self>) {
        let (grid, out) = (grid(1, x.columns), target(&out).address);
        launch!(self.device, "column_dot", grid, [THREADS, 1], matrix(x), matrix(y), out);
    }

    fn row_dot(&self, alpha: f32, x: View<'_, Self>, y: View<'_, Self>, beta: f32, out: ViewMut<'_, Self>) {
        let (grid, block) = ([x.rows, 1, 1], Self::row_threads(x.columns));
        let half = |view: View<'_, Self>| u32::from(view.data.numbers == Numbers::Bf16);
        let (x_half, y_half, out) = (half(x), half(y), target(&out).address);
        let (x, y) = (matrix(x), matrix(y));
        launch!(self.device, "row_dot", grid, block, alpha, x, x_half, y, y_half, beta, out);
    }

    fn reciprocal_root(&self, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        let grid = grid(to.rows, to.columns);
        launch!(self.device, "reciprocal_root", grid, [THREADS, 1], matrix(from), target(&to));
    }

    fn rms_norm_weight_backward(
        &self,
        dout: View<'_, Self>,
        x: View<'_, Self>,
        reciprocal: View<'_, Self>,
        dweight: ViewMut<'_, Self>,
    ) {
        let (grid, to) = (grid(1, x.columns), target(&dweight).address);
        let (dout, x, factors) = (matrix(dout), matrix(x), matrix(reciprocal));
        launch!(self.device, "norm_weight_backward", grid, [THREADS, 1], dout, x, factors, to);
    }

    fn gather_ids(&self, batch: &CudaBatch, table: View<'_, Self>, columns: bool, out: ViewMut<'_, Self>) {
        let (grid, ids, flag) = (grid(out.rows, out.columns), batch.ids.address, u32::from(columns));
        launch!(self.device, "gather_ids", grid, [THREADS, 1], ids, flag, matrix(table), target(&out));
    }

    fn scatter_ids(&self, batch: &CudaBatch, from: View<'_, Self>, columns: bool, table: ViewMut<'_, Self>) {
        let (grid, ids, flag) = (grid(from.rows, from.columns), batch.ids.address, u32::from(columns));
        launch!(self.device, "scatter_ids", grid, [THREADS, 1], ids, flag, matrix(from), target(&table));
    }

    fn set_rows_of(&self, batch: &CudaBatch, id: u32, row: View<'_, Self>, out: ViewMut<'_, Self>) {
        let (grid, ids, row) = (grid(out.rows, out.columns), batch.ids.address, matrix(row).address);
        launch!(self.device, "set_rows_of", grid, [THREADS, 1], ids, id, row, target(&out));
    }

    fn sum_rows_of(&self, batch: &CudaBatch, id: u32, from: View<'_, Self>, row: ViewMut<'_, Self>) {
        let (grid, ids, row) = (grid(1, from.columns), batch.ids.address, target(&row).address);
        launch!(self.device, "sum_rows_of", grid, [THREADS, 1], ids, id, matrix(from), row);
    }

    fn cross_entropy(
        &self,
        batch: &CudaBatch,
        first: usize,
        gradient: bool,
        soft_cap: Option<f32>,
        logits: ViewMut<'_, Self>,
        losses: ViewMut<'_, Self>,
    ) -> f64 {
        let targets = batch.targets.address + 4 * first as u64;
        let (grid, block) = ([logits.rows, 1, 1], Self::row_threads(logits.columns));
        let (logits, flag, cap) = (target(&logits), u32::from(gradient), soft_cap.unwrap_or(0.0));
        launch!(self.device, "cross_entropy", grid, block, targets, flag, cap, logits, target(&losses));
        let mut host = vec![0.0_f32; losses.rows];
        self.download(losses.view(), &mut host);
        // One after the other, in f64, as on the CPU.
        host.iter().map(|loss| f64::from(*loss)).sum()
    }
}
