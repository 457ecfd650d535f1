//! Prefix, prompt and p-tuning: equalities that hold bit for bit or up to the order of sums, and gradients by differences.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::ops::{ControlFlow, Range};

use memory::{MemoryBase, Random, Setup, assert_close, bits, reference, rows};
use shanty_peft_core::{
    Engine, EngineOptions, LossSum, NoSink, StepKey,
    adapter::{
        PTuningConfig, ParameterLayout, PrefixStart, PrefixTuningConfig, PromptEncoder, PromptStart,
        PromptTuningConfig, SharedMethod, VirtualTokenConfig,
    },
    batch::Row,
    engine::StepError,
    generate::SamplingOptions,
    plan::Recompute,
    quant::Nf4Options,
};

const KEY: StepKey = StepKey { seed: 4, step: 2 };
const COUNT: usize = 5;

fn common() -> VirtualTokenConfig {
    VirtualTokenConfig::new(None, COUNT)
}

fn prefix(projection: bool) -> SharedMethod {
    let encoder_hidden_size = projection.then_some(24);
    PrefixTuningConfig {
        common: common(),
        prefix_projection: projection,
        encoder_hidden_size,
        ..PrefixTuningConfig::default()
    }
    .shared()
}

fn p_tuning(encoder: PromptEncoder) -> SharedMethod {
    PTuningConfig {
        common: common(),
        encoder_reparameterization_type: encoder,
        encoder_hidden_size: Some(20),
        encoder_dropout: 0.25,
        ..PTuningConfig::default()
    }
    .shared()
}

/// Every method, with and without a network.
fn methods() -> Vec<(&'static str, SharedMethod)> {
    let prompt = PromptTuningConfig { common: common(), start: PromptStart::Random, finished: false };
    vec![
        ("prefix", prefix(false)),
        ("projected prefix", prefix(true)),
        ("prompt", prompt.shared()),
        ("MLP", p_tuning(PromptEncoder::Mlp)),
        ("LSTM", p_tuning(PromptEncoder::Lstm)),
    ]
}

fn setup(method: &SharedMethod) -> Setup {
    Setup { max_length: 96 + 3 * COUNT, ..Setup::new(Some(method.clone())) }
}

fn base() -> MemoryBase {
    MemoryBase::load(&reference("models/llama"))
}

fn parameters(layout: &ParameterLayout) -> Vec<f32> {
    let mut parameters = vec![0.0; layout.len()];
    for (index, entry) in layout.entries().iter().enumerate() {
        let numbers = Random::new(3 + index as u64).numbers(entry.range.len(), 0.4);
        parameters[entry.range.clone()].copy_from_slice(&numbers);
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
fn neither_threads_nor_computing_again_change_a_bit() {
    for (name, method) in methods() {
        let setup = setup(&method);
        let one = step(&mut Setup { threads: 1, ..setup }.engine(base()), &rows());
        for other in [
            Setup { threads: 3, ..self::setup(&method) },
            Setup { recompute: Recompute::Layers, ..self::setup(&method) },
        ] {
            let more = step(&mut other.engine(base()), &rows());
            assert_eq!(one.0.loss.to_bits(), more.0.loss.to_bits(), "{name}");
            assert_eq!(bits(&one.1), bits(&more.1), "{name}");
        }
    }
}

#[test]
fn micro_batches_add_up_to_the_whole() {
    let rows = rows();
    for (name, method) in methods() {
        let mut engine = setup(&method).engine(base());
        let (whole, expected) = step(&mut engine, &rows);
        for split in [vec![1, 3], vec![1, 1, 1, 1]] {
            let layout = engine.layout().clone();
            let (mut gradient, mut sum, mut rest) = (vec![0.0; layout.len()], LossSum::default(), &rows[..]);
            for count in split {
                let (now, later) = rest.split_at(count);
                let parameters = parameters(&layout);
                sum.add(engine.forward_backward(&parameters, now, KEY, &mut gradient, &mut NoSink).unwrap());
                rest = later;
            }
            assert_eq!(sum.tokens, whole.tokens);
            // The order of f32 sums over tokens and segments differs, nothing else.
            assert_close(name, &[sum.loss as f32], &[whole.loss as f32], 1e-6);
            assert_close(name, &gradient, &expected, 2e-5);
        }
    }
}

#[test]
fn every_segment_of_a_packed_row_has_its_own_virtual_tokens() {
    for (name, method) in methods() {
        let mut engine = setup(&method).engine(base());
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
        assert_eq!(whole.0, apart.0, "{name}");
        assert_eq!(bits(&whole.1), bits(&apart.1), "{name}");
    }
}

#[test]
fn a_packed_neighbour_changes_no_other_loss() {
    for (name, method) in methods() {
        let mut engine = setup(&method).engine(base());
        let row = rows().remove(1);
        let mut losses = |row: &Row| -> Vec<u64> {
            let one = |range: Range<u32>| Row { trained: std::iter::once(range).collect(), ..row.clone() };
            [10..30, 35..71, 80..91].map(|range| step(&mut engine, &[one(range)]).0.loss.to_bits()).to_vec()
        };
        let before = losses(&row);
        let mut changed = row;
        changed.token_ids[30..71].iter_mut().for_each(|token| *token = (*token + 17) % 288);
        let after = losses(&changed);
        assert_eq!((before[0], before[2]), (after[0], after[2]), "{name}: the segments around");
        assert_ne!(before[1], after[1], "{name}: the changed segment");
    }
}

/// Each trained tensor has a gradient, and it is the right one: by differences of the loss, dropout and packing included.
#[test]
fn every_trained_tensor_has_the_gradient_that_differences_show() {
    let rows = rows();
    for (name, method) in methods() {
        let mut engine = setup(&method).engine(base());
        let layout = engine.layout().clone();
        let (_, gradient) = step(&mut engine, &rows);
        for entry in layout.entries() {
            let part = &gradient[entry.range.clone()];
            let steepest = (0..part.len()).max_by(|a, b| part[*a].abs().total_cmp(&part[*b].abs())).unwrap();
            assert!(part[steepest] != 0.0, "{name}: {} has no gradient", entry.peft_name);
            let mut loss = |by: f32| {
                let mut parameters = parameters(&layout);
                parameters[entry.range.start + steepest] += by;
                let mut unused = vec![0.0; layout.len()];
                engine.forward_backward(&parameters, &rows, KEY, &mut unused, &mut NoSink).unwrap().loss
            };
            // The loss is a sum of some 250 f32 of about 6: a step must move it by more than its rounding of 1e-3.
            let by = (0.3 / part[steepest].abs()).min(0.02);
            let slope = (loss(by) - loss(-by)) / (2.0 * f64::from(by));
            assert_close(&format!("{name}: {}", entry.peft_name), &[part[steepest]], &[slope as f32], 0.03);
        }
    }
}

/// The key cache holds the prefix, and a prompt's rows are read once: each token of a continuation is the likeliest of what the whole
/// text so far predicts.
#[test]
fn a_continuation_is_that_of_the_whole_text() {
    for (name, method) in methods() {
        let mut engine = setup(&method).engine(base());
        let parameters = parameters(&engine.layout().clone());
        let vocabulary = engine.config().vocabulary_size;
        let prompt = vec![1, 40, 77, 3];
        let options = SamplingOptions { temperature: 0.0, max_tokens: 12, ..SamplingOptions::default() };
        let mut listen = |_| ControlFlow::Continue(());
        let tokens = engine.generate(Some(&parameters), &prompt, &options, &mut listen).unwrap();
        assert_eq!(tokens.len(), 12);
        let whole = [prompt.clone(), tokens.clone()].concat();
        let logits = engine.logits(Some(&parameters), std::slice::from_ref(&whole)).unwrap();
        let bare = engine.logits(None, std::slice::from_ref(&whole)).unwrap();
        assert_ne!(logits, bare, "{name}: the adapter does something");
        for (index, token) in tokens.iter().enumerate() {
            let row = &logits[(prompt.len() - 1 + index) * vocabulary..][..vocabulary];
            let likeliest = (0..vocabulary).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
            assert_eq!(likeliest as u32, *token, "{name}: token {index}");
        }
        // Two rows of one call begin anew.
        let twice = engine.logits(Some(&parameters), &[whole.clone(), whole]).unwrap();
        assert_eq!(twice[logits.len()..], logits, "{name}");
    }
}

#[test]
fn the_bare_base_is_not_touched() {
    let mut plain = Setup { max_length: 111, ..Setup::new(None) }.engine(base());
    let expected = plain.evaluate_base(&rows()).unwrap();
    for (name, method) in methods() {
        let mut engine = setup(&method).engine(base());
        assert_eq!(engine.evaluate_base(&rows()).unwrap(), expected, "{name}");
        let parameters = parameters(&engine.layout().clone());
        assert_ne!(engine.evaluate(&parameters, &rows()).unwrap().loss, expected.loss, "{name}");
        assert_eq!(engine.evaluate_base(&rows()).unwrap(), expected, "{name}");
    }
}

#[test]
fn rows_without_room_for_their_virtual_tokens_are_refused() {
    for (name, method) in methods() {
        let mut engine = Setup { max_length: 96 + COUNT, ..setup(&method) }.engine(base());
        let layout = engine.layout().clone();
        let mut gradient = vec![0.0; layout.len()];
        let mut run =
            |row: Row| engine.forward_backward(&parameters(&layout), &[row], KEY, &mut gradient, &mut NoSink);
        run(rows().remove(0)).unwrap();
        let error = run(rows().remove(1)).unwrap_err();
        let malformed =
            matches!(error, shanty_peft_core::Error::Step(StepError::MalformedRow { row: 1, .. }));
        assert!(malformed, "{name}: 91 tokens and three times 5 virtual ones are more than 101: {error}");
    }
}

#[test]
fn more_virtual_tokens_than_the_base_has_positions_are_refused() {
    let config = PromptTuningConfig {
        common: VirtualTokenConfig::new(None, 256),
        start: PromptStart::SampleVocab,
        finished: false,
    };
    let options =
        EngineOptions { adapter: Some(config.shared()), ..EngineOptions::new(reference("models/llama"), 32) };
    let error = Engine::load(options, &mut |_| {}).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("num_virtual_tokens") && error.contains("256"), "{error}");
}

/// On a quantised base a text's keys and values are those of that base; training lowers the loss, and a run that is taken up from
/// its parameters goes on with the same bits.
#[test]
fn an_nf4_base_trains_from_a_text_and_goes_on_from_parameters() {
    let start = PrefixStart::Tokens(vec![1, 7, 90, 33]);
    for projection in [false, true] {
        let config = PrefixTuningConfig {
            common: common(),
            prefix_projection: projection,
            encoder_hidden_size: Some(32),
            start: start.clone(),
            finished: false,
        };
        let options = EngineOptions {
            quantization: Some(Nf4Options::default()),
            adapter: Some(config.shared()),
            threads: 2,
            micro_batch_rows: Some(4),
            ..EngineOptions::new(reference("models/llama"), 96 + 3 * COUNT)
        };
        let load = || Engine::load(options.clone(), &mut |_| {}).unwrap();
        let descend = |engine: &mut Engine, parameters: &mut [f32], steps: Range<u64>| {
            let mut losses = Vec::new();
            for step in steps {
                let mut gradient = vec![0.0; parameters.len()];
                let key = StepKey { seed: 4, step };
                let sum =
                    engine.forward_backward(parameters, &rows(), key, &mut gradient, &mut NoSink).unwrap();
                let rate = 0.05 / sum.tokens as f32;
                parameters.iter_mut().zip(&gradient).for_each(|(p, g)| *p -= rate * g);
                losses.push(sum.mean());
            }
            losses
        };
        let mut engine = load();
        let mut whole = engine.initial_parameters(9).unwrap();
        assert_eq!(whole, engine.initial_parameters(9).unwrap());
        let mut half = whole.clone();
        let losses = descend(&mut engine, &mut whole, 1..7);
        assert!(losses[5] < losses[0], "{losses:?}");
        descend(&mut load(), &mut half, 1..4);
        let again = descend(&mut load(), &mut half, 4..7);
        assert_eq!(again, losses[3..]);
        assert_eq!(bits(&half), bits(&whole));
    }
}
