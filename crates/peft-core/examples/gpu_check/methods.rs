//! What methods of adaptation do beside LoRA: their operations, and models under them, beside the CPU's.

use std::path::Path;

use shanty_peft_core::{
    Engine, EngineDevice, EngineOptions, NoSink, StepKey,
    adapter::{AdaLoraConfig, Bias, Ia3Config, LoraConfig, Selection, SharedMethod, TargetModules},
    backend::{Backend, Product, Use, View, ViewMut, cuda::Precision},
    batch::PackedBatch,
    plan::Recompute,
    quant::Nf4Options,
};

use crate::{
    Report,
    models::{CARDS, lora, rows},
    operations::{Operation, Sides, exact, get, load, numbers, packed, poisoned, put},
};

/// Sums and scales of rows and columns.
struct Vectors {
    rows: usize,
    columns: usize,
}

impl Operation for Vectors {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>> {
        let Self { rows, columns } = *self;
        let (x, y) =
            (put(backend, &numbers("x", rows * columns)), put(backend, &numbers("y", rows * columns)));
        let (x, y) = (View::<B>::new(&x, rows, columns), View::<B>::new(&y, rows, columns));
        let factors = exact(backend, &numbers("factors", columns));
        let factors = View::<B>::new(&factors, 1, columns);
        let line = |buffer| ViewMut::<B>::new(buffer, 1, columns);
        let whole = |buffer| ViewMut::<B>::new(buffer, rows, columns);
        let mut scaled = poisoned(backend, rows * columns);
        backend.scale_columns(0.5, x, factors, 0.0, whole(&mut scaled));
        let mut added = put(backend, &numbers("added", rows * columns));
        backend.scale_columns(0.5, x, factors, 2.0, whole(&mut added));
        let mut sum = exact(backend, &numbers("sum", columns));
        backend.column_sum(0.25, x, line(&mut sum));
        let mut dot = exact(backend, &numbers("dot", columns));
        backend.column_dot(x, y, line(&mut dot));
        let mut of_rows = exact(backend, &vec![f32::NAN; rows]);
        backend.row_dot(0.5, x, x, 0.0, ViewMut::<B>::new(&mut of_rows, 1, rows));
        let mut of_rows_added = exact(backend, &numbers("rows", rows));
        backend.row_dot(0.5, x, x, 1.5, ViewMut::<B>::new(&mut of_rows_added, 1, rows));
        let positive: Vec<f32> = numbers("positive", columns).iter().map(|x| x.abs() + 0.1).collect();
        let positive = exact(backend, &positive);
        let mut root = exact(backend, &vec![f32::NAN; columns]);
        backend.reciprocal_root(View::<B>::new(&positive, 1, columns), line(&mut root));
        let reciprocal = exact(backend, &numbers("reciprocal", rows));
        let mut dweight = exact(backend, &numbers("dweight", columns));
        backend.rms_norm_weight_backward(x, y, View::<B>::new(&reciprocal, rows, 1), line(&mut dweight));
        vec![
            get(backend, &scaled, rows, columns),
            get(backend, &added, rows, columns),
            get(backend, &sum, 1, columns),
            get(backend, &dot, 1, columns),
            get(backend, &of_rows, 1, rows),
            get(backend, &of_rows_added, 1, rows),
            get(backend, &root, 1, columns),
            get(backend, &dweight, 1, columns),
        ]
    }
}

/// Rows of tables by token.
struct Ids<'a> {
    batch: &'a PackedBatch,
    vocabulary: usize,
    columns: usize,
}

impl Operation for Ids<'_> {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>> {
        let (rows, vocabulary, columns) = (self.batch.tokens(), self.vocabulary, self.columns);
        let batch = load(backend, self.batch, 1, columns);
        let id = self.batch.token_ids[rows / 2];
        let from = put(backend, &numbers("from", rows * columns));
        let from = View::<B>::new(&from, rows, columns);
        let mut all = Vec::new();
        for turned in [false, true] {
            let (height, width) = if turned { (columns, vocabulary) } else { (vocabulary, columns) };
            let table = exact(backend, &numbers("table", vocabulary * columns));
            let mut out = poisoned(backend, rows * columns);
            let view = View::<B>::new(&table, height, width);
            backend.gather_ids(&batch, view, turned, ViewMut::<B>::new(&mut out, rows, columns));
            let mut sums = exact(backend, &numbers("sums", vocabulary * columns));
            backend.scatter_ids(&batch, from, turned, ViewMut::<B>::new(&mut sums, height, width));
            all.extend([get(backend, &out, rows, columns), get(backend, &sums, height, width)]);
        }
        let row = exact(backend, &numbers("row", columns));
        let mut set = put(backend, &numbers("set", rows * columns));
        let row = View::<B>::new(&row, 1, columns);
        backend.set_rows_of(&batch, id, row, ViewMut::<B>::new(&mut set, rows, columns));
        let mut sum = exact(backend, &numbers("sum", columns));
        backend.sum_rows_of(&batch, id, from, ViewMut::<B>::new(&mut sum, 1, columns));
        all.extend([get(backend, &set, rows, columns), get(backend, &sum, 1, columns)]);
        all
    }
}

/// A layer and its branch, and what lies aside between two passes.
struct Pair {
    sizes: [usize; 3],
    rank: usize,
}

impl Operation for Pair {
    fn run<B: Backend>(&self, backend: &B) -> Vec<Vec<f32>> {
        let ([rows, columns, inner], rank) = (self.sizes, self.rank);
        let (a, b) =
            (put(backend, &numbers("a", rows * inner)), put(backend, &numbers("b", columns * inner)));
        let (p, q) = (put(backend, &numbers("p", rows * rank)), put(backend, &numbers("q", columns * rank)));
        let mut c = put(backend, &numbers("c", rows * columns));
        let product = |alpha, a, b| Product { alpha, a, transpose_a: false, b, transpose_b: true };
        let first = product(1.0, View::<B>::new(&a, rows, inner), View::<B>::new(&b, columns, inner));
        let second = product(0.5, View::<B>::new(&p, rows, rank), View::<B>::new(&q, columns, rank));
        backend.run(|| backend.gemm_pair(first, second, 0.5, ViewMut::<B>::new(&mut c, rows, columns)));
        let mut aside = backend.allocate_aside(rows * columns, Use::Activation).unwrap();
        backend.put_aside(View::<B>::new(&c, rows, columns), &mut aside);
        backend.await_aside(&aside);
        let mut back = poisoned(backend, rows * columns);
        backend.bring_back(&aside, ViewMut::<B>::new(&mut back, rows, columns));
        backend.await_aside(&aside);
        vec![get(backend, &c, rows, columns), get(backend, &back, rows, columns)]
    }
}

fn methods() -> Vec<(&'static str, SharedMethod)> {
    let names = |all: &[&str]| all.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let few = Selection::of(TargetModules::Names(names(&["q_proj", "o_proj", "down_proj"])));
    let ada = AdaLoraConfig { init_r: 6, target_r: 4, total_step: 100, selection: few, ..Default::default() };
    let whole = names(&["lm_head", "embed_tokens", "norm"]);
    vec![
        ("dora", LoraConfig { use_dora: true, ..lora(8, 0.0) }.shared()),
        ("dora with dropout", LoraConfig { use_dora: true, ..lora(8, 0.1) }.shared()),
        ("biases", LoraConfig { lora_bias: true, bias: Bias::All, ..lora(8, 0.0) }.shared()),
        ("whole modules", LoraConfig { modules_to_save: whole, ..lora(4, 0.0) }.shared()),
        ("tokens", LoraConfig { trainable_token_indices: vec![3, 17, 40], ..lora(4, 0.0) }.shared()),
        ("ia3", Ia3Config::default().shared()),
        ("adalora", ada.shared()),
    ]
}

/// Operations, then logits, losses and gradients, as those of LoRA in `models`.
pub(crate) fn check(report: &mut Report, sides: &Sides, repository: &Path) {
    for (rows, columns) in [(8192, 4096), (333, 77), (1, 8)] {
        sides.compare(report, &format!("vectors {rows} x {columns}"), &Vectors { rows, columns }, false);
    }
    let batch = packed(&[700, 1, 131], 1000);
    for columns in [16, 200] {
        let ids = Ids { batch: &batch, vocabulary: 1000, columns };
        sides.compare(report, &format!("rows by token, {columns} columns"), &ids, false);
    }
    let pair = Pair { sizes: [512, 1024, 768], rank: 16 };
    sides.compare(report, "a layer, its branch, and aside", &pair, true);
    for (name, method) in methods() {
        let run = |device| {
            let options = EngineOptions {
                quantization: Some(Nf4Options::default()),
                adapter: Some(method.clone()),
                device,
                recompute: Recompute::Layers,
                micro_batch_rows: Some(8),
                ..EngineOptions::new(repository.join("examples/tiny-llama-14m"), 64)
            };
            let mut engine = Engine::load(options, &mut |_| {}).unwrap();
            // From where the method begins, some of it computed from the base, by a little.
            let mut parameters = engine.initial_parameters(3).unwrap();
            let noise = numbers("adapter", parameters.len());
            parameters.iter_mut().zip(noise).for_each(|(x, noise)| *x += 0.05 * noise);
            let rows = rows(engine.config().vocabulary_size);
            let mut gradient = vec![0.0; parameters.len()];
            let key = StepKey { seed: 5, step: 2 };
            let sum = engine.forward_backward(&parameters, &rows, key, &mut gradient, &mut NoSink).unwrap();
            let ids = vec![rows[0].token_ids[..29].to_vec()];
            (engine.logits(Some(&parameters), &ids).unwrap(), vec![sum.loss as f32], gradient, parameters)
        };
        let expected = run(EngineDevice::Cpu);
        for (device, tolerance) in CARDS {
            let got = run(device);
            let EngineDevice::Cuda { precision, .. } = device else { continue };
            let tolerance = if precision == Precision::F32 { tolerance } else { tolerance / 4.0 };
            let name = format!("{name} {precision:?}");
            report.compare(format!("{name} start"), &got.3, &expected.3, 1e-6);
            report.compare(format!("{name} logits"), &got.0, &expected.0, tolerance);
            report.compare(format!("{name} loss"), &got.1, &expected.1, tolerance);
            report.compare(format!("{name} gradient"), &got.2, &expected.2, tolerance);
        }
    }
}
