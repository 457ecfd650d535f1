//! PiSSA, OLoRA and LoftQ: starts that are computed from the base once, and what becomes of them in files.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::path::Path;

use memory::{Random, assert_close, reference};
use shanty_peft_core::{
    Engine, EngineOptions, Error, NoSink, StepKey,
    adapter::{AdapterFolder, LoraConfig, LoraStart, TargetModules, files, lora::start, select::Pattern},
    backend::cpu::Cpu,
    batch::Row,
    quant::Nf4Options,
};

const IDS: [u32; 12] = [5, 17, 33, 120, 64, 7, 201, 9, 8, 40, 12, 99];

fn config(start: LoraStart) -> LoraConfig {
    LoraConfig {
        r: 6,
        lora_alpha: 9.0,
        init_lora_weights: start,
        rank_pattern: Pattern(vec![("o_proj".to_owned(), 3)]),
        alpha_pattern: Pattern(vec![("layers.1.mlp.up_proj".to_owned(), 4.0)]),
        target_modules: TargetModules::all_linear(),
        ..LoraConfig::default()
    }
}

fn options(config: LoraConfig, nf4: bool, start: Option<&Path>) -> EngineOptions {
    EngineOptions {
        quantization: nf4.then(Nf4Options::default),
        adapter: Some(config.shared()),
        threads: 2,
        start: start.map(Path::to_owned),
        ..EngineOptions::new(reference("models/llama"), 32)
    }
}

fn load(config: LoraConfig, nf4: bool, start: Option<&Path>) -> Result<Engine, Error> {
    Engine::load(options(config, nf4, start), &mut |_| {})
}

fn difference(left: &[f32], right: &[f32]) -> f64 {
    let squares = left.iter().zip(right).map(|(left, right)| f64::from(left - right).powi(2));
    squares.sum::<f64>().sqrt()
}

#[test]
fn the_factors_are_the_largest_singular_directions() {
    // Known singular values on random orthonormal directions: the error of the best rank r follows from them.
    let (out, input, r) = (40, 56, 5);
    let mut random = Random::new(6);
    let cpu = Cpu::new(2).unwrap();
    let raw = random.numbers(out * input, 1.0);
    let none: [f32; 0] = [];
    let pissa = start::factors(&cpu, LoraStart::Pissa, [out, input], (r, 1.5), &raw, &none).unwrap();
    let rest = start::residual(&raw, [out, input], r, 1.5, &pissa);
    // candle has no singular values; a power iteration on the rest finds what is largest there. It must be no larger than the
    // smallest that was taken, which the columns of B tell: B = U sqrt(S / s).
    let smallest = (0..r)
        .map(|at| (0..out).map(|row| f64::from(pissa.b[row * r + at]).powi(2)).sum::<f64>() * 1.5)
        .fold(f64::INFINITY, f64::min);
    let mut v = random.numbers(input, 1.0);
    let mut largest = 0.0;
    for _ in 0..2000 {
        let u: Vec<f64> = (0..out)
            .map(|row| rest[row * input..][..input].iter().zip(&v).map(|(w, v)| f64::from(w * v)).sum())
            .collect();
        let mut next = vec![0.0_f64; input];
        for (row, u) in u.iter().enumerate() {
            next.iter_mut().zip(&rest[row * input..]).for_each(|(next, w)| *next += u * f64::from(*w));
        }
        let length = next.iter().map(|x| x * x).sum::<f64>().sqrt();
        largest = length.sqrt();
        v = next.iter().map(|x| (x / length) as f32).collect();
    }
    assert!(largest <= smallest * 1.001, "{largest} is left, {smallest} was taken");
    // A = sqrt(S / s) Vᵀ and B are of the same lengths, and orthogonal.
    for (at, other) in (0..r).flat_map(|at| (0..=at).map(move |other| (at, other))) {
        let dot = |x: &mut dyn Iterator<Item = (f32, f32)>| x.map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let a = dot(&mut pissa.a[at * input..][..input]
            .iter()
            .copied()
            .zip(pissa.a[other * input..][..input].to_vec()));
        let b = dot(&mut (0..out).map(|row| (pissa.b[row * r + at], pissa.b[row * r + other])));
        assert!((a - b).abs() < 1e-3 * smallest, "{at} {other}: {a} {b}");
    }
}

#[test]
fn orthonormal_factors_are_those_of_a_qr_decomposition() {
    let (out, input, r) = (20, 30, 4);
    let weight = Random::new(3).numbers(out * input, 1.0);
    let cpu = Cpu::new(1).unwrap();
    let olora = start::factors(&cpu, LoraStart::Olora, [out, input], (r, 2.0), &weight, &[]).unwrap();
    // The first r columns of W are Q R alone: A is upper triangular there, and B A gives them back.
    for row in 0..out {
        for column in 0..r {
            let sum: f32 = (0..r).map(|at| olora.b[row * r + at] * olora.a[at * input + column]).sum();
            assert!((sum - weight[row * input + column]).abs() < 1e-5);
        }
    }
    for at in 1..r {
        assert!((0..at).all(|column| olora.a[at * input + column].abs() < 1e-5));
    }
    let too_much = start::factors(&cpu, LoraStart::Olora, [out, input], (21, 2.0), &weight, &[]);
    assert_eq!(too_much.err().unwrap().code(), "SH0403");
}

/// Base and adapter together compute what the base alone did; training begins elsewhere, and the files fit the old base.
#[test]
fn a_changed_base_with_its_adapter_is_the_base() {
    let mut plain = Engine::load(EngineOptions::new(reference("models/llama"), 32), &mut |_| {}).unwrap();
    let expected = plain.logits(None, &[IDS.to_vec()]).unwrap();
    for start in [LoraStart::Pissa, LoraStart::Olora] {
        for rank_stabilised in [false, true] {
            let place = tempfile::tempdir().unwrap();
            let folder = place.path().join("start");
            let config = LoraConfig { use_rslora: rank_stabilised, ..config(start) };
            assert_eq!(load(config.clone(), false, None).err().unwrap().code(), "SH0423");
            let mut engine = load(config.clone(), false, Some(&folder)).unwrap();
            let mut parameters = engine.initial_parameters(1).unwrap();
            assert!(parameters.iter().any(|value| *value != 0.0));
            // The tiny models are stored in bf16: the rest of a weight is rounded to it once more, 2^-9 of it.
            let with = engine.logits(Some(&parameters), &[IDS.to_vec()]).unwrap();
            assert_close("with the adapter", &with, &expected, 2e-2);
            let without = engine.logits(None, &[IDS.to_vec()]).unwrap();
            assert!(difference(&without, &expected) > 0.1, "the base is another");

            // A second engine reads what the first computed.
            let mut second = load(config.clone(), false, Some(&folder)).unwrap();
            assert_eq!(second.initial_parameters(7).unwrap(), parameters);
            assert_eq!(second.base_hash(), engine.base_hash());
            assert_ne!(second.base_hash(), plain.base_hash());
            let other = LoraConfig { r: 5, ..config.clone() };
            assert_eq!(load(other, false, Some(&folder)).err().unwrap().code(), "SH0424");

            let rows = [Row::whole(0, IDS.to_vec())];
            let mut gradient = vec![0.0; parameters.len()];
            let key = StepKey { seed: 1, step: 1 };
            engine.forward_backward(&parameters, &rows, key, &mut gradient, &mut NoSink).unwrap();
            for (value, gradient) in parameters.iter_mut().zip(&gradient) {
                *value -= 1e-2 * gradient;
            }
            let trained = engine.logits(Some(&parameters), &[IDS.to_vec()]).unwrap();
            assert!(difference(&trained, &with) > 0.1, "it was trained");
            let saved = place.path().join("adapter");
            files::write(&saved, engine.fit(), &parameters, &[]).unwrap();
            let read = AdapterFolder::open(&saved).unwrap();
            let mut converted = Engine::load(
                EngineOptions {
                    adapter: Some(read.method().clone()),
                    ..EngineOptions::new(reference("models/llama"), 32)
                },
                &mut |_| {},
            )
            .unwrap();
            let mut back = vec![0.0; converted.layout().len()];
            read.read_into(converted.layout(), &mut back).unwrap();
            assert_eq!(converted.layout().parameters(), 2 * engine.layout().parameters());
            let got = converted.logits(Some(&back), &[IDS.to_vec()]).unwrap();
            assert_close("converted", &got, &trained, 2e-2);
            let moved = difference(&got, &expected);
            assert!(difference(&got, &trained) < 0.2 * moved, "what was learnt is in the file");

            // A damaged start is found out.
            let file = folder.join("layer-00000.safetensors");
            let mut bytes = std::fs::read(&file).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            std::fs::write(&file, bytes).unwrap();
            assert_eq!(load(config, false, Some(&folder)).err().unwrap().code(), "SH0424");
        }
    }
}

#[test]
fn a_start_from_what_4_bits_lose_brings_the_base_back() {
    let mut plain = Engine::load(EngineOptions::new(reference("models/llama"), 32), &mut |_| {}).unwrap();
    let expected = plain.logits(None, &[IDS.to_vec()]).unwrap();
    let place = tempfile::tempdir().unwrap();
    // The scale is 1, as LoftQ has it; half the rank of the smallest weight brings back a good part.
    let config = LoraConfig {
        r: 24,
        lora_alpha: 24.0,
        rank_pattern: Pattern::default(),
        alpha_pattern: Pattern::default(),
        ..config(LoraStart::Loftq)
    };
    let mut engine = load(config.clone(), true, Some(&place.path().join("start"))).unwrap();
    let parameters = engine.initial_parameters(1).unwrap();
    let with = engine.logits(Some(&parameters), &[IDS.to_vec()]).unwrap();
    let without = engine.logits(None, &[IDS.to_vec()]).unwrap();
    let (with, without) = (difference(&with, &expected), difference(&without, &expected));
    assert!(with < 0.6 * without, "{with} beside {without}");
    // Not on a base that loses nothing, nor on one whose weights are lost already.
    let plain = load(config.clone(), false, Some(&place.path().join("other")));
    assert_eq!(plain.err().unwrap().code(), "SH0403");
    let stored =
        EngineOptions { base: reference("training/base_nf4"), ..options(config, true, Some(place.path())) };
    assert_eq!(Engine::load(stored, &mut |_| {}).err().unwrap().code(), "SH0425");
}
