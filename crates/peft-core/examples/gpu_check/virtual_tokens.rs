//! Prefix, prompt and p-tuning: their operations and models on the card beside the CPU's.

use std::path::Path;

use shanty_peft_core::{
    Engine, EngineDevice, EngineOptions, NoSink, StepKey,
    adapter::{PTuningConfig, PrefixTuningConfig, PromptTuningConfig, SharedMethod, VirtualTokenConfig},
    backend::{
        Backend, BatchRoom, SpanStart, Use, View, ViewMut,
        cpu::Cpu,
        cuda::{Cuda, Precision},
    },
    batch::{PackedBatch, Row, Segment, VirtualTokens},
    plan::Recompute,
    quant::Nf4Options,
};

use crate::{Report, operations::numbers};

const COUNT: usize = 5;

/// Rows of several samples, of odd lengths.
fn rows(vocabulary: usize) -> Vec<Row> {
    let lengths: [&[u32]; 3] = [&[49], &[23, 7, 9], &[5, 31]];
    let ids = numbers("ids", 1000);
    let mut ids = ids.iter().map(|x| ((x + 1.0) / 2.0 * vocabulary as f32) as u32 % vocabulary as u32);
    let row = |(id, lengths): (usize, &&[u32])| {
        let total: u32 = lengths.iter().sum();
        let segment = |&length: &u32| Segment { sample_id: u64::from(length), length };
        let mut start = 0;
        let trained = lengths.iter().map(|length| {
            start += length;
            start - length + 1..start
        });
        Row {
            id: id as u64,
            trained: trained.collect(),
            token_ids: ids.by_ref().take(total as usize).collect(),
            segments: lengths.iter().map(segment).collect(),
        }
    };
    lengths.iter().enumerate().map(row).collect()
}

/// What each operation writes.
fn operations<B: Backend>(backend: &B, columns: usize) -> Vec<Vec<f32>> {
    let put = |data: &[f32]| {
        let mut buffer = backend.allocate(data.len(), Use::Activation).unwrap();
        backend.upload(data, &mut buffer);
        buffer
    };
    let get = |buffer: &B::Buffer, rows: usize| {
        let mut out = vec![f32::NAN; rows * columns];
        backend.download(View::<B>::new(buffer, rows, columns), &mut out);
        backend.settle().unwrap();
        out
    };
    let mut all = Vec::new();
    for virtual_tokens in [VirtualTokens::Keys(COUNT), VirtualTokens::Rows(COUNT)] {
        let mut packed = PackedBatch::default();
        packed.fill_behind(virtual_tokens, &rows(100)).unwrap();
        let (tokens, keys) = (packed.tokens(), packed.keys());
        let room = BatchRoom { tokens, longest_span: 64, widest: columns, heads: 1 };
        let mut batch = backend.allocate_batch(room).unwrap();
        backend.load_batch(&packed, &mut batch);
        let (front, own) = (put(&numbers("front", COUNT * columns)), put(&numbers("own", tokens * columns)));
        let (front, own) = (View::<B>::new(&front, COUNT, columns), View::<B>::new(&own, tokens, columns));
        let mut joined = put(&vec![f32::NAN; keys * columns]);
        let at = if virtual_tokens.keys() > 0 { SpanStart::Keys } else { SpanStart::Queries };
        backend.rows_to_keys(&batch, own, ViewMut::<B>::new(&mut joined, keys, columns));
        backend.put_virtual(&batch, at, front, ViewMut::<B>::new(&mut joined, keys, columns));
        let mut sum = put(&numbers("sum", COUNT * columns));
        let mut back = put(&vec![f32::NAN; tokens * columns]);
        let view = View::<B>::new(&joined, keys, columns);
        backend.sum_virtual(&batch, view, ViewMut::<B>::new(&mut sum, COUNT, columns));
        backend.keys_to_rows(&batch, view, ViewMut::<B>::new(&mut back, tokens, columns));
        all.extend([get(&joined, keys), get(&sum, COUNT), get(&back, tokens)]);
    }
    all
}

fn methods() -> Vec<(&'static str, SharedMethod)> {
    let common = VirtualTokenConfig::new(None, COUNT);
    let prefix = PrefixTuningConfig { common: common.clone(), ..PrefixTuningConfig::default() };
    let prompt = PromptTuningConfig { common: common.clone(), ..PromptTuningConfig::default() };
    let p_tuning = PTuningConfig { common, encoder_hidden_size: Some(24), ..PTuningConfig::default() };
    vec![("prefix", prefix.shared()), ("prompt", prompt.shared()), ("p-tuning", p_tuning.shared())]
}

/// Logits, losses and gradients, as those of LoRA in `models`.
pub(crate) fn check(report: &mut Report, repository: &Path) {
    let cpu = Cpu::new(0).unwrap();
    for (precision, tolerance) in [(Precision::F32, 1e-6), (Precision::Bf16, 1e-2)] {
        let cuda = Cuda::new(0, precision).unwrap();
        for columns in [4096, 72] {
            let (expected, got) = (operations(&cpu, columns), operations(&cuda, columns));
            for (part, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let name = format!("virtual tokens of {columns} columns [{part}] {precision:?}");
                report.compare(name, got, expected, tolerance);
            }
        }
    }
    let cards = [(Precision::F32, 2e-5), (Precision::Tf32, 3e-2), (Precision::Bf16, 1.2e-1)];
    for base in ["crates/testkit/fixtures/reference/models/llama", "examples/tiny-llama-14m"] {
        for (name, method) in methods() {
            for recompute in [Recompute::Never, Recompute::Layers] {
                let run = |device| {
                    let options = EngineOptions {
                        quantization: Some(Nf4Options::default()),
                        adapter: Some(method.clone()),
                        device,
                        recompute,
                        micro_batch_rows: Some(4),
                        ..EngineOptions::new(repository.join(base), 64)
                    };
                    let mut engine = Engine::load(options, &mut |_| {}).unwrap();
                    let length = engine.layout().len();
                    let parameters: Vec<f32> = numbers("adapter", length).iter().map(|x| 0.3 * x).collect();
                    let rows = rows(engine.config().vocabulary_size);
                    let mut gradient = vec![0.0; length];
                    let key = StepKey { seed: 5, step: 2 };
                    let sum =
                        engine.forward_backward(&parameters, &rows, key, &mut gradient, &mut NoSink).unwrap();
                    let ids = vec![rows[0].token_ids[..29].to_vec()];
                    (engine.logits(Some(&parameters), &ids).unwrap(), vec![sum.loss as f32], gradient)
                };
                let expected = run(EngineDevice::Cpu);
                for (precision, tolerance) in cards {
                    let got = run(EngineDevice::Cuda { index: 0, precision });
                    let name = format!("{name} on {} {recompute:?} {precision:?}", &base[base.len() - 5..]);
                    report.compare(format!("{name} logits"), &got.0, &expected.0, tolerance);
                    report.compare(format!("{name} loss"), &got.1, &expected.1, tolerance);
                    report.compare(format!("{name} gradient"), &got.2, &expected.2, tolerance);
                }
            }
        }
    }
}
