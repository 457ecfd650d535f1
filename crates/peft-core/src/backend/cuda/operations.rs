//! The backend's operations on a card.

use half::bf16;

use super::{
    Aside, Cuda, CudaBatch, DeviceBuffer, DeviceMemory, Numbers, THREADS, any, attention,
    attention::{Backward, Forward},
    base::{Table, key, table_key},
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
        self.batch(room)
    }

    fn load_batch(&self, from: &PackedBatch, into: &mut CudaBatch) {
        self.load(from, into);
    }

    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }

    fn settle(&self) -> Result<()> {
        Ok(self.device.settle()?)
    }

    fn lend<'a>(&self, host: &'a [f32], place: &'a mut Option<DeviceMemory>) -> Result<&'a DeviceBuffer> {
        self.lend_parameters(host, place)
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

    fn losses(&self, state: &mut FlatState<Self>) -> Result<Vec<f64>> {
        self.read_losses(state)
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
        self.gather_gradient(host, place, sink, work)
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
        self.download_rows(from, into);
    }

    fn frozen<'a>(&'a self, matrix: &Matrix<'a>, scratch: &'a mut DeviceBuffer) -> View<'a, Self> {
        self.dequantised(matrix, scratch)
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
        self.multiply(alpha, [(a, transpose_a), (b, transpose_b)], beta, c);
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
        self.put_virtual_tokens(batch, at, from, to);
    }

    fn sum_virtual(&self, batch: &CudaBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.over_spans("sum_virtual", batch, (to.rows, to.columns), from, to);
    }

    fn rows_to_keys(&self, batch: &CudaBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.over_spans("rows_to_keys", batch, (from.rows, from.columns), from, to);
    }

    fn keys_to_rows(&self, batch: &CudaBatch, from: View<'_, Self>, to: ViewMut<'_, Self>) {
        self.over_spans("keys_to_rows", batch, (to.rows, to.columns), from, to);
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
