//! Equalities that hold bit for bit, or up to the order of sums.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::ops::Range;

use memory::{MemoryBase, Random, Setup, assert_close, bits, lora, reference, rows};
use shanty_peft_core::{
    Engine, EngineOptions, GradientSink, LossSum, NoSink, StepKey,
    adapter::{LoraConfig, ParameterLayout, TargetModules},
    batch::Row,
    generate::SamplingOptions,
    plan::Recompute,
    quant::Nf4Options,
};

const KEY: StepKey = StepKey { seed: 4, step: 2 };

fn base() -> MemoryBase {
    MemoryBase::load(&reference("models/llama"))
}

fn setup() -> Setup {
    let method = lora(TargetModules::all_linear(), 4, 2.0, 0.25).shared();
    Setup { max_length: 96, ..Setup::new(Some(method)) }
}

fn parameters(layout: &ParameterLayout) -> Vec<f32> {
    let mut parameters = vec![0.0; layout.len()];
    for entry in layout.entries() {
        parameters[entry.range.clone()].copy_from_slice(&Random::new(3).numbers(entry.range.len(), 0.2));
    }
    parameters
}

fn step(engine: &mut Engine, rows: &[Row]) -> (LossSum, Vec<f32>) {
    let layout = engine.layout().clone();
    let mut gradient = vec![0.0; layout.len()];
    let sum = engine.forward_backward(&parameters(&layout), rows, KEY, &mut gradient, &mut NoSink).unwrap();
    (sum, gradient)
}

#[test]
fn the_thread_count_does_not_change_a_bit() {
    let one = step(&mut Setup { threads: 1, ..setup() }.engine(base()), &rows());
    for threads in [2, 3] {
        let more = step(&mut Setup { threads, ..setup() }.engine(base()), &rows());
        assert_eq!(one.0.loss.to_bits(), more.0.loss.to_bits());
        assert_eq!(bits(&one.1), bits(&more.1), "{threads} threads");
    }
}

#[test]
fn the_thread_count_does_not_change_a_bit_on_a_real_base() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny-llama-14m");
    let mut random = Random::new(2);
    let rows = [Row::whole(0, (0..200).map(|_| random.below(8192)).collect())];
    let results = [1, 2].map(|threads| {
        let lora = LoraConfig {
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.1,
            target_modules: TargetModules::all_linear(),
            ..LoraConfig::default()
        };
        let options = EngineOptions {
            quantization: Some(Nf4Options::default()),
            adapter: Some(lora.shared()),
            threads,
            micro_batch_rows: Some(1),
            ..EngineOptions::new(&folder, 200)
        };
        let mut engine = Engine::load(options, &mut |_| {}).unwrap();
        let (sum, gradient) = step(&mut engine, &rows);
        (sum.loss.to_bits(), bits(&gradient))
    });
    assert_eq!(results[0], results[1]);
}

#[test]
fn computing_again_does_not_change_a_bit() {
    let kept = step(&mut Setup { recompute: Recompute::Never, ..setup() }.engine(base()), &rows());
    let again = step(&mut Setup { recompute: Recompute::Layers, ..setup() }.engine(base()), &rows());
    assert_eq!(kept.0.loss.to_bits(), again.0.loss.to_bits());
    assert_eq!(bits(&kept.1), bits(&again.1));
}

#[test]
fn a_second_step_of_one_engine_gives_what_the_first_gave() {
    let mut engine = setup().engine(base());
    let first = step(&mut engine, &rows());
    step(&mut engine, &rows()[1..3]);
    let again = step(&mut engine, &rows());
    assert_eq!(bits(&first.1), bits(&again.1));
}

#[test]
fn micro_batches_add_up_to_the_whole() {
    let rows = rows();
    let mut engine = setup().engine(base());
    let (whole, expected) = step(&mut engine, &rows);
    for split in [vec![1, 3], vec![2, 2], vec![1, 1, 1, 1]] {
        let layout = engine.layout().clone();
        let (mut gradient, mut sum, mut rest) = (vec![0.0; layout.len()], LossSum::default(), &rows[..]);
        for count in split {
            let (now, later) = rest.split_at(count);
            let parameters = parameters(&layout);
            sum.add(engine.forward_backward(&parameters, now, KEY, &mut gradient, &mut NoSink).unwrap());
            rest = later;
        }
        assert_eq!(sum.tokens, whole.tokens);
        // The order of f32 sums over tokens differs, nothing else: masks depend on sample and position alone.
        assert_close("loss", &[sum.loss as f32], &[whole.loss as f32], 1e-6);
        assert_close("gradient", &gradient, &expected, 1e-5);
    }
}

#[test]
fn a_packed_neighbour_changes_no_other_loss() {
    let mut engine = setup().engine(base());
    let layout = engine.layout().clone();
    let row = rows().remove(1);
    let losses = |engine: &mut Engine, row: &Row| -> Vec<u64> {
        let one = |range: Range<u32>| Row { trained: std::iter::once(range).collect(), ..row.clone() };
        [10..30, 35..71, 80..91]
            .map(|range| {
                let mut gradient = vec![0.0; layout.len()];
                let rows = [one(range)];
                let sum = engine
                    .forward_backward(&parameters(&layout), &rows, KEY, &mut gradient, &mut NoSink)
                    .unwrap();
                sum.loss.to_bits()
            })
            .to_vec()
    };
    let before = losses(&mut engine, &row);
    let mut changed = row;
    for token in &mut changed.token_ids[30..71] {
        *token = (*token + 17) % 288;
    }
    let after = losses(&mut engine, &changed);
    assert_eq!(before[0], after[0], "the segment before");
    assert_ne!(before[1], after[1], "the changed segment");
    assert_eq!(before[2], after[2], "the segment behind");
}

#[test]
fn a_row_packed_or_alone_has_one_loss() {
    let mut engine = setup().engine(base());
    let packed = rows().remove(1);
    let segments = [(0..30, 10..30), (30..71, 5..41), (71..91, 9..20)];
    let whole = step(&mut engine, std::slice::from_ref(&packed));
    let alone: Vec<Row> = segments
        .into_iter()
        .zip(&packed.segments)
        .map(|((tokens, trained), segment)| Row {
            id: segment.sample_id,
            token_ids: packed.token_ids[tokens].to_vec(),
            segments: vec![*segment],
            trained: std::iter::once(trained).collect(),
        })
        .collect();
    let apart = step(&mut engine, &alone);
    assert_eq!(whole.0, apart.0);
    assert_eq!(bits(&whole.1), bits(&apart.1));
}

#[test]
fn the_sink_hears_of_every_part_once_front_to_back() {
    struct Heard {
        ranges: Vec<Range<usize>>,
        copy: Vec<f32>,
    }
    impl GradientSink for Heard {
        fn ready(&mut self, range: Range<usize>, gradient: &[f32]) {
            self.copy[range.clone()].copy_from_slice(&gradient[range.clone()]);
            self.ranges.push(range);
        }
    }
    let mut engine = setup().engine(base());
    let layout = engine.layout().clone();
    let mut sink = Heard { ranges: Vec::new(), copy: vec![0.0; layout.len()] };
    let mut gradient = vec![0.0; layout.len()];
    engine.forward_backward(&parameters(&layout), &rows(), KEY, &mut gradient, &mut sink).unwrap();
    assert_eq!(sink.ranges.first().unwrap().start, 0);
    assert_eq!(sink.ranges.last().unwrap().end, layout.len());
    assert!(sink.ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
    assert_eq!(bits(&sink.copy), bits(&gradient), "what was said to be final was final");

    // Rows without a trained token: all of the gradient is final at once, and unchanged.
    let nothing = Row { trained: Vec::new(), ..rows().remove(2) };
    let mut sink = Heard { ranges: Vec::new(), copy: vec![0.0; layout.len()] };
    let sum =
        engine.forward_backward(&parameters(&layout), &[nothing], KEY, &mut gradient, &mut sink).unwrap();
    assert_eq!(sum, LossSum { loss: 0.0, tokens: 0 });
    assert_eq!((sink.ranges.len(), &sink.ranges[0]), (1, &(0..layout.len())));
}

#[test]
fn dropout_changes_with_the_step_and_is_off_in_evaluation() {
    let mut engine = setup().engine(base());
    let layout = engine.layout().clone();
    let parameters = parameters(&layout);
    let mut loss = |key: StepKey| {
        let mut gradient = vec![0.0; layout.len()];
        engine.forward_backward(&parameters, &rows(), key, &mut gradient, &mut NoSink).unwrap().loss
    };
    assert_eq!(loss(KEY), loss(KEY));
    assert_ne!(loss(KEY), loss(StepKey { step: 3, ..KEY }));
    assert_ne!(loss(KEY), loss(StepKey { seed: 5, ..KEY }));
    let dry = engine.evaluate(&parameters, &rows()).unwrap();
    let method = lora(TargetModules::all_linear(), 4, 2.0, 0.0).shared();
    let mut without = Setup { adapter: Some(method), ..setup() }.engine(base());
    assert_eq!(dry.loss.to_bits(), step(&mut without, &rows()).0.loss.to_bits());
}

#[test]
fn generation_with_a_cache_follows_the_logits_without() {
    let mut engine = setup().engine(base());
    let parameters = parameters(engine.layout());
    let prompt: Vec<u32> = rows()[0].token_ids[..70].to_vec();
    let options = SamplingOptions { temperature: 0.0, max_tokens: 12, ..SamplingOptions::default() };
    let mut heard = Vec::new();
    let tokens = engine
        .generate(Some(&parameters), &prompt, &options, &mut |token| {
            heard.push(token);
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((tokens.len(), &tokens), (12, &heard));
    let mut all = prompt.clone();
    all.extend(&tokens);
    let vocabulary = engine.config().vocabulary_size;
    let logits = engine.logits(Some(&parameters), std::slice::from_ref(&all)).unwrap();
    for (index, token) in tokens.iter().enumerate() {
        let row = &logits[(prompt.len() + index - 1) * vocabulary..][..vocabulary];
        let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert!(row[*token as usize] >= best - 1e-4, "token {index} is the likeliest");
    }
    let again = SamplingOptions { temperature: 1.0, seed: 3, max_tokens: 8, ..SamplingOptions::default() };
    let mut draw = || {
        engine
            .generate(Some(&parameters), &prompt, &again, &mut |_| std::ops::ControlFlow::Continue(()))
            .unwrap()
    };
    assert_eq!(draw(), draw(), "one seed, one continuation");
}

#[test]
fn what_does_not_fit_is_refused_with_a_code() {
    use shanty_diagnostic::Diagnose;
    let mut engine = setup().engine(base());
    let parameters = parameters(engine.layout());
    let code = |result: shanty_peft_core::Result<LossSum>| result.unwrap_err().diagnostic().code;
    let unknown = Row::whole(1, vec![1, 2, 288]);
    assert_eq!(code(engine.evaluate(&parameters, &[unknown])), "SH0652");
    let long = Row::whole(1, vec![1; 97]);
    assert_eq!(code(engine.evaluate(&parameters, &[long])), "SH0650");
    assert_eq!(code(engine.evaluate(&parameters[1..], &rows())), "SH0653");
    let mut gradient = vec![0.0; parameters.len()];
    let five = [rows(), vec![Row::whole(9, vec![1, 2])]].concat();
    assert_eq!(code(engine.forward_backward(&parameters, &five, KEY, &mut gradient, &mut NoSink)), "SH0651");
    assert!(gradient.iter().all(|g| *g == 0.0), "nothing was added");
}
