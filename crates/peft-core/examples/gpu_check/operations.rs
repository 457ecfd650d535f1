//! Every operation beside the CPU's.

use shanty_peft_core::{
    backend::{
        AttentionShape, Backend, BatchRoom, Use, View, ViewMut,
        cpu::Cpu,
        cuda::{Cuda, Precision},
    },
    batch::{PackedBatch, Row, Segment},
    optim::{AdamWOptions, FlatState, FlatUpdate, Source, groups},
    random::{self, DropoutKey},
};

use crate::{Report, frozen::frozen};

/// The name of the card.
pub(crate) fn card() -> String {
    Cuda::new(0, Precision::F32).unwrap().card().to_owned()
}

/// Numbers of [-1, 1).
pub(crate) fn numbers(name: &str, count: usize) -> Vec<f32> {
    let mut numbers = vec![0.0; count];
    random::fill_uniform(seed(), name, 1.0, &mut numbers);
    numbers
}

/// Fresh at every start.
fn seed() -> u64 {
    static SEED: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *SEED.get_or_init(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = now.as_nanos() as u64;
        println!("seed {seed}");
        seed
    })
}

/// Activations.
pub(crate) fn put<B: Backend>(backend: &B, data: &[f32]) -> B::Owned {
    put_for(Use::Activation, backend, data)
}

/// What is f32 in every precision.
pub(crate) fn exact<B: Backend>(backend: &B, data: &[f32]) -> B::Owned {
    put_for(Use::Exact, backend, data)
}

fn put_for<B: Backend>(purpose: Use, backend: &B, data: &[f32]) -> B::Owned {
    let mut buffer = backend.allocate(data.len(), purpose).unwrap();
    backend.upload(data, &mut buffer);
    buffer
}

/// Memory in which nothing written yet goes unnoticed.
pub(crate) fn poisoned<B: Backend>(backend: &B, count: usize) -> B::Owned {
    put(backend, &vec![f32::NAN; count])
}

fn poisoned_exact<B: Backend>(backend: &B, count: usize) -> B::Owned {
    exact(backend, &vec![f32::NAN; count])
}

pub(crate) fn get<B: Backend>(backend: &B, buffer: &B::Buffer, rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows * columns];
    backend.download(View::<B>::new(buffer, rows, columns), &mut out);
    backend.settle().unwrap();
    out
}

pub(crate) fn packed(lengths: &[usize], vocabulary: u32) -> PackedBatch {
    let rows: Vec<Row> = lengths
        .iter()
        .enumerate()
        .map(|(id, &length)| Row {
            segments: vec![Segment { sample_id: 7 + ((id as u64) << 33), length: length as u32 }],
            ..Row::whole(
                id as u64,
                (0..length as u32).map(|at| (at * 7919 + id as u32) % vocabulary).collect(),
            )
        })
        .collect();
    let mut batch = PackedBatch::default();
    batch.fill(&rows).unwrap();
    batch
}

pub(crate) fn load<B: Backend>(backend: &B, batch: &PackedBatch, heads: usize, widest: usize) -> B::Batch {
    let longest = batch.spans.iter().map(|span| span.keys).max().unwrap_or(1);
    let room = BatchRoom { tokens: batch.tokens(), longest_span: longest, widest, heads };
    let mut loaded = backend.allocate_batch(room).unwrap();
    backend.load_batch(batch, &mut loaded);
    loaded
}

/// An operation with its inputs; run on both backends.
pub(crate) trait Operation {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>>;
}

struct Product {
    sizes: [usize; 3],
    transpose: [bool; 2],
    beta: f32,
}

impl Operation for Product {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>> {
        let [m, n, k] = self.sizes;
        // Rows lie further apart than they are long, and matrices do not begin at the front.
        let gap = 4;
        let view = |rows: usize, columns: usize| (rows, columns, columns + gap);
        let (a_rows, a_columns, a_stride) = if self.transpose[0] { view(k, m) } else { view(m, k) };
        let (b_rows, b_columns, b_stride) = if self.transpose[1] { view(n, k) } else { view(k, n) };
        let a = put(backend, &numbers("a", a_rows * a_stride + 4));
        let b = put(backend, &numbers("b", b_rows * b_stride + 4));
        let mut c =
            if self.beta == 0.0 { poisoned(backend, m * n) } else { put(backend, &numbers("c", m * n)) };
        let a = View::<B> { data: &a, offset: 4, rows: a_rows, columns: a_columns, stride: a_stride };
        let b = View::<B> { data: &b, offset: 4, rows: b_rows, columns: b_columns, stride: b_stride };
        let [ta, tb] = self.transpose;
        backend.run(|| backend.gemm(0.5, a, ta, b, tb, self.beta, ViewMut::<B>::new(&mut c, m, n)));
        vec![get(backend, &c, m, n)]
    }
}

struct Elementwise {
    rows: usize,
    columns: usize,
}

impl Operation for Elementwise {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>> {
        let Self { rows, columns } = *self;
        let count = rows * columns;
        let x = put(backend, &numbers("x", count));
        let bias = exact(backend, &numbers("bias", columns));
        let mut out = poisoned(backend, count);
        fn whole<B: Backend>(out: &mut B::Buffer, shape: [usize; 2]) -> ViewMut<'_, B> {
            ViewMut::new(out, shape[0], shape[1])
        }
        let shape = [rows, columns];
        backend.fill(0.25, whole::<B>(&mut out, shape));
        let filled = get(backend, &out, rows, columns);
        let mut copied = poisoned(backend, count);
        backend.copy(View::<B>::new(&x, rows, columns), whole::<B>(&mut copied, shape));
        backend.add(View::<B>::new(&x, rows, columns), whole::<B>(&mut out, shape));
        backend.add_bias(View::<B>::new(&bias, 1, columns), whole::<B>(&mut out, shape));

        let scaled: Vec<f32> = numbers("gate", count).iter().map(|x| 8.0 * x).collect();
        let (mut gate, mut up) = (put(backend, &scaled), put(backend, &numbers("up", count)));
        let mut activated = poisoned(backend, count);
        let (g, u) = (View::<B>::new(&gate, rows, columns), View::<B>::new(&up, rows, columns));
        backend.swiglu(g, u, whole::<B>(&mut activated, shape));
        let activated = get(backend, &activated, rows, columns);
        let mut dout = put(backend, &numbers("x", count));
        let mut geglu = poisoned(backend, count);
        let (g, u) = (View::<B>::new(&gate, rows, columns), View::<B>::new(&up, rows, columns));
        backend.geglu(g, u, whole::<B>(&mut geglu, shape));
        let (mut gate_again, mut up_again) = (put(backend, &scaled), put(backend, &numbers("up", count)));
        let mut geglu_again = put(backend, &numbers("x", count));
        backend.geglu_backward(
            whole::<B>(&mut geglu_again, shape),
            whole::<B>(&mut gate_again, shape),
            whole::<B>(&mut up_again, shape),
        );
        backend.swiglu_backward(
            whole::<B>(&mut dout, shape),
            whole::<B>(&mut gate, shape),
            whole::<B>(&mut up, shape),
        );
        let mut capped = put(backend, &scaled);
        backend.scale(1.75, whole::<B>(&mut capped, shape));
        backend.soft_cap(3.0, whole::<B>(&mut capped, shape));
        vec![
            filled,
            get(backend, &copied, rows, columns),
            get(backend, &out, rows, columns),
            activated,
            get(backend, &dout, rows, columns),
            get(backend, &geglu, rows, columns),
            get(backend, &geglu_again, rows, columns),
            get(backend, &gate_again, rows, columns),
            get(backend, &up_again, rows, columns),
            get(backend, &capped, rows, columns),
            get(backend, &gate, rows, columns),
            get(backend, &up, rows, columns),
        ]
    }
}

struct Rows<'a> {
    batch: &'a PackedBatch,
    columns: usize,
    head_dim: usize,
    p: f32,
}

impl Operation for Rows<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>> {
        let (rows, columns) = (self.batch.tokens(), self.columns);
        let batch = load(backend, self.batch, 1, columns);
        let x = put(backend, &numbers("x", rows * columns));
        let dout = put(backend, &numbers("dout", rows * columns));
        let (x, dout) = (View::<B>::new(&x, rows, columns), View::<B>::new(&dout, rows, columns));
        let weight = exact(backend, &numbers("weight", columns));
        let weight = View::<B>::new(&weight, 1, columns);
        let target = |out| ViewMut::<B>::new(out, rows, columns);
        let mut normed = poisoned(backend, rows * columns);
        let mut reciprocal = poisoned_exact(backend, rows);
        backend.rms_norm(x, weight, 1e-5, target(&mut normed), ViewMut::<B>::new(&mut reciprocal, rows, 1));
        let mut dx = put(backend, &numbers("dx", rows * columns));
        let factors = View::<B>::new(&reciprocal, rows, 1);
        backend.rms_norm_backward(dout, x, weight, factors, target(&mut dx));

        let positions = rows.max(1);
        let table = exact(backend, &numbers("angles", positions * self.head_dim));
        let table = View::<B>::new(&table, positions, self.head_dim);
        let mut turned = put(backend, &numbers("turned", rows * columns));
        backend.rope(&batch, self.head_dim, table, false, target(&mut turned));
        let mut back = put(backend, &numbers("turned", rows * columns));
        backend.rope(&batch, self.head_dim, table, true, target(&mut back));

        let key = DropoutKey { seed: 3, step: 1 << 33, module: 11 };
        let mut dropped = poisoned(backend, rows * columns);
        backend.dropout(&batch, key, self.p, x, target(&mut dropped));
        let mut added = put(backend, &numbers("added", rows * columns));
        backend.dropout_backward(&batch, key, self.p, dout, target(&mut added));

        let count = self.batch.predicting.len();
        let mut gathered = poisoned(backend, count * columns);
        backend.gather_predicting(&batch, 0, x, ViewMut::<B>::new(&mut gathered, count, columns));
        let mut scattered = put(backend, &vec![0.5; rows * columns]);
        backend.scatter_predicting(&batch, 1, dout.row_range(0, count - 1), target(&mut scattered));
        vec![
            get(backend, &normed, rows, columns),
            get(backend, &reciprocal, rows, 1),
            get(backend, &dx, rows, columns),
            get(backend, &turned, rows, columns),
            get(backend, &back, rows, columns),
            get(backend, &dropped, rows, columns),
            get(backend, &added, rows, columns),
            get(backend, &gathered, count, columns),
            get(backend, &scattered, rows, columns),
        ]
    }
}

struct CrossEntropy<'a> {
    batch: &'a PackedBatch,
    vocabulary: usize,
    soft_cap: Option<f32>,
}

impl Operation for CrossEntropy<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>> {
        let batch = load(backend, self.batch, 1, 1);
        let rows = self.batch.targets.len() - 1;
        let scaled: Vec<f32> = numbers("logits", rows * self.vocabulary).iter().map(|x| 20.0 * x).collect();
        let mut logits = put(backend, &scaled);
        let mut losses = poisoned_exact(backend, rows);
        for (gradient, cap) in [(false, None), (false, Some(6.0)), (true, self.soft_cap)] {
            backend.upload(&scaled, &mut logits);
            let view = ViewMut::<B>::new(&mut logits, rows, self.vocabulary);
            let losses = ViewMut::<B>::new(&mut losses, rows, 1);
            backend.cross_entropy(&batch, 1, gradient, cap, view, losses);
        }
        vec![get(backend, &logits, rows, self.vocabulary), get(backend, &losses, rows, 1)]
    }
}

/// The backward pass of a branch of low rank, through its second matrix.
struct LowRankBackward {
    rows: usize,
    columns: usize,
    rank: usize,
}

impl Operation for LowRankBackward {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>> {
        let Self { rows, columns, rank } = *self;
        let dy = put(backend, &numbers("dy", rows * columns));
        let (b, p) = (put(backend, &numbers("b", columns * rank)), put(backend, &numbers("p", rows * rank)));
        let mut dp = poisoned(backend, rows * rank);
        let mut db = exact(backend, &numbers("db", columns * rank));
        backend.low_rank_backward(
            0.5,
            View::<B>::new(&dy, rows, columns),
            View::<B>::new(&b, columns, rank),
            View::<B>::new(&p, rows, rank),
            ViewMut::<B>::new(&mut dp, rows, rank),
            ViewMut::<B>::new(&mut db, columns, rank),
        );
        vec![get(backend, &dp, rows, rank), get(backend, &db, columns, rank)]
    }
}

struct Attention<'a> {
    batch: &'a PackedBatch,
    shape: AttentionShape,
}

impl Operation for Attention<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let keys = self.batch.spans.iter().map(|span| span.key_start + span.keys).max().unwrap();
        let (rows, q_columns, k_columns) = (self.batch.tokens(), heads * head_dim, kv_heads * head_dim);
        let batch = load(backend, self.batch, heads, 1);
        let make = |name: &str, rows: usize, columns: usize| {
            let scaled: Vec<f32> = numbers(name, rows * columns).iter().map(|x| 2.0 * x).collect();
            put(backend, &scaled)
        };
        let (q, dout) = (make("q", rows, q_columns), make("dout", rows, q_columns));
        let (k, v) = (make("k", keys, k_columns), make("v", keys, k_columns));
        let (mut out, mut log_sum) =
            (poisoned(backend, rows * q_columns), poisoned_exact(backend, rows * heads));
        let q = View::<B>::new(&q, rows, q_columns);
        let (k, v) = (View::<B>::new(&k, keys, k_columns), View::<B>::new(&v, keys, k_columns));
        let to = ViewMut::<B>::new(&mut out, rows, q_columns);
        backend.attention(&batch, self.shape, q, k, v, to, ViewMut::<B>::new(&mut log_sum, rows, heads));
        let mut all = vec![get(backend, &out, rows, q_columns), get(backend, &log_sum, rows, heads)];
        let (mut dq, mut dk, mut dv) = (
            poisoned(backend, rows * q_columns),
            poisoned(backend, keys * k_columns),
            poisoned(backend, keys * k_columns),
        );
        backend.attention_backward(
            &batch,
            self.shape,
            q,
            k,
            v,
            View::<B>::new(&out, rows, q_columns),
            View::<B>::new(&log_sum, rows, heads),
            View::<B>::new(&dout, rows, q_columns),
            ViewMut::<B>::new(&mut dq, rows, q_columns),
            ViewMut::<B>::new(&mut dk, keys, k_columns),
            ViewMut::<B>::new(&mut dv, keys, k_columns),
        );
        all.push(get(backend, &dq, rows, q_columns));
        all.push(get(backend, &dk, keys, k_columns));
        all.push(get(backend, &dv, keys, k_columns));
        all
    }
}

/// Three updates of flat buffers in two groups, the second one clipped, and one of a gradient that is not finite.
struct Update {
    length: usize,
}

impl Operation for Update {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>> {
        let length = self.length;
        let mut state = FlatState::new(backend, length).unwrap();
        backend.upload(&numbers("parameters", length), &mut state.parameters);
        let options = AdamWOptions { weight_decay: 0.1, ..AdamWOptions::default() };
        let mut norms = Vec::new();
        for (step, max_norm) in [(1, 0.0), (2, 0.5), (3, 1e9), (4, 1.0)] {
            let mut gradient = numbers(&format!("gradient {step}"), length);
            if step == 4 {
                gradient[length / 2] = f32::INFINITY;
            }
            backend.upload(&gradient, &mut state.gradient);
            let losses = exact(backend, &numbers("losses", 1000));
            backend.add_losses(View::<B>::new(&losses, 1000, 1), &mut state);
            let groups = groups(
                &options,
                step,
                1e-2,
                &[(length / 3..length / 2, 3.0), (length / 2..length / 2 + 1, 0.0)],
                length,
            );
            backend.run(|| {
                backend.update_flat(
                    &FlatUpdate { mean: 1.0 / 64.0, max_norm, groups: &groups, source: Source::Own },
                    &mut state,
                );
            });
            // Every other time the losses are asked for first, each micro-batch's by itself.
            backend.add_losses(View::<B>::new(&losses, 500, 1), &mut state);
            let each = if step % 2 == 0 { backend.losses(&mut state).unwrap() } else { Vec::new() };
            let outcome = backend.outcome(&mut state).unwrap();
            norms.extend([outcome.norm.min(1e30) as f32, outcome.loss as f32]);
            norms.extend(each.iter().map(|loss| *loss as f32));
        }
        let all = [&state.parameters, &state.first, &state.second];
        let mut all: Vec<_> = all.map(|buffer| get(backend, buffer, 1, length)).into();
        all.push(norms);
        all
    }
}

/// The CPU and the card in each precision, with what its products may be off by.
pub(crate) struct Sides {
    pub(crate) cpu: Cpu,
    cards: [(Cuda, f64); 3],
}

impl Sides {
    pub(crate) fn compare(
        &self,
        report: &mut Report,
        name: &str,
        operation: &impl Operation,
        products: bool,
    ) {
        let expected = operation.run(&self.cpu);
        for (cuda, tolerance) in &self.cards {
            // But for products TF32 is f32; bf16 is another kind of number everywhere.
            if !products && cuda.precision() == Precision::Tf32 {
                continue;
            }
            let got = operation.run(cuda);
            for (part, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let name = format!("{name} [{part}] {:?}", cuda.precision());
                report.compare(name, got, expected, *tolerance);
            }
        }
    }
}

pub(crate) fn check(report: &mut Report) -> Sides {
    // Rounding to f32, TF32 (2^-11 a factor) and bf16 (2^-9 a factor); relative errors of sums are of that order.
    let card = |precision, tolerance| (Cuda::new(0, precision).unwrap(), tolerance);
    let cards = [card(Precision::F32, 1e-5), card(Precision::Tf32, 2e-3), card(Precision::Bf16, 1e-2)];
    let sides = Sides { cpu: Cpu::new(0).unwrap(), cards };
    for (sizes, beta) in
        [([8192, 1024, 4096], 0.0), ([1023, 130, 513], 0.5), ([2048, 16, 4096], 1.0), ([16, 4096, 2048], 1.0)]
    {
        for transpose in [[false, true], [false, false], [true, false]] {
            let name = format!("gemm {sizes:?} {transpose:?} beta {beta}");
            sides.compare(report, &name, &Product { sizes, transpose, beta }, true);
        }
    }
    sides.compare(report, "elementwise 1000 x 14336", &Elementwise { rows: 1000, columns: 14336 }, false);
    sides.compare(report, "elementwise 33 x 77", &Elementwise { rows: 33, columns: 77 }, false);
    let batch = packed(&[700, 1, 131, 300, 61], 1000);
    for (columns, head_dim, p) in [(4096, 128, 0.1), (72, 24, 0.5), (200, 8, 0.0), (64, 64, 1.0)] {
        let rows = Rows { batch: &batch, columns, head_dim, p };
        sides.compare(report, &format!("rows {columns} head {head_dim} p {p}"), &rows, false);
    }
    for vocabulary in [128_256, 1000] {
        let batch = packed(&[100, 33], vocabulary as u32);
        for soft_cap in [None, Some(5.0)] {
            let operation = CrossEntropy { batch: &batch, vocabulary, soft_cap };
            let name = format!("cross-entropy {vocabulary}, cap {soft_cap:?}");
            sides.compare(report, &name, &operation, false);
        }
    }
    for (rows, columns, rank) in
        [(8192, 4096, 16), (1000, 520, 8), (77, 72, 16), (300, 14_336, 32), (65, 64, 5)]
    {
        let name = format!("low rank backward {rows} x {columns}, rank {rank}");
        sides.compare(report, &name, &LowRankBackward { rows, columns, rank }, true);
    }
    for (lengths, heads, kv_heads, head_dim) in [
        (&[2048][..], 32, 8, 128),
        (&[513, 1, 64, 129, 300], 8, 2, 64),
        (&[63, 65, 7], 4, 4, 8),
        (&[200, 70], 4, 1, 96),
        (&[150, 33], 2, 1, 256),
    ] {
        let batch = packed(lengths, 1000);
        let shape = AttentionShape::new(heads, kv_heads, head_dim);
        let name = format!("attention {lengths:?} heads {heads}/{kv_heads} of {head_dim}");
        sides.compare(report, &name, &Attention { batch: &batch, shape }, true);
    }
    // Windows, capped scores, and keys that stand ahead of every span.
    for (head_dim, window, soft_cap, ahead) in [
        (128, Some(100), None, 0),
        (64, None, Some(20.0), 0),
        (256, Some(64), Some(50.0), 0),
        (128, None, None, 30),
        (40, Some(33), Some(5.0), 7),
    ] {
        let mut batch = packed(&[300, 1, 129], 1000);
        for (number, span) in batch.spans.iter_mut().enumerate() {
            span.key_start += number * ahead;
            span.keys += ahead;
        }
        let shape = AttentionShape { window, soft_cap, ..AttentionShape::new(4, 2, head_dim) };
        let name =
            format!("attention of {head_dim}, window {window:?}, cap {soft_cap:?}, {ahead} keys ahead");
        sides.compare(report, &name, &Attention { batch: &batch, shape }, true);
    }
    // With a cache: one query, and several, at the end of more keys.
    for queries in [1, 37] {
        let mut batch = packed(&[queries], 1000);
        batch.spans[0].keys = 301;
        let shape = AttentionShape::new(8, 2, 64);
        let name = format!("attention of {queries} queries to 301 keys");
        sides.compare(report, &name, &Attention { batch: &batch, shape }, true);
    }
    for length in [64, 1_000_003] {
        sides.compare(report, &format!("update of {length}"), &Update { length }, false);
    }
    frozen(report, &sides.cpu);
    sides
}
