//! The networks of prompts and prefixes beside torch's, and beside differences.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::path::{Path, PathBuf};

use memory::{Random, assert_close, floats, tensors};
use shanty_peft_core::{
    StepKey,
    adapter::{Reparameterisation, networks::PromptNetwork},
};

const KEY: StepKey = StepKey { seed: 3, step: 5 };

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Where each tensor begins in the flat buffer, and the buffer's length; tensors lie at multiples of 64.
fn places(network: &PromptNetwork) -> (Vec<usize>, usize) {
    let mut next = 0;
    let mut starts = Vec::new();
    for tensor in network.tensors() {
        starts.push(next);
        next = (next + tensor.shape.iter().product::<usize>()).next_multiple_of(64);
    }
    (starts, next)
}

/// `fixtures/p_tuning_lstm.py` made the numbers with PEFT. The tolerance is that of sums of some ten f32 products
/// through twenty gates.
#[test]
fn the_lstm_of_p_tuning_gives_torchs_output_and_gradients() {
    let expected = tensors(&fixture("p_tuning_lstm.safetensors"));
    let network = PromptNetwork::lstm(5, 12, 7, 2, 0.0);
    let (starts, length) = places(&network);
    let mut flat = vec![0.0; length];
    for (tensor, start) in network.tensors().iter().zip(&starts) {
        let numbers = floats(&expected[&tensor.suffix]);
        assert_eq!(expected[&tensor.suffix].dims(), tensor.shape, "{}", tensor.suffix);
        flat[*start..start + numbers.len()].copy_from_slice(&numbers);
    }
    let mut output = vec![f32::NAN; 60];
    network.forward(&flat, Some(KEY), &mut output).unwrap();
    assert_close("output", &output, &floats(&expected["output"]), 2e-6);

    let before = Random::new(4).numbers(length, 1.0);
    let mut gradient = before.clone();
    network.backward(&flat, Some(KEY), &floats(&expected["output_gradient"]), &mut gradient).unwrap();
    for (tensor, start) in network.tensors().iter().zip(&starts) {
        let wanted = floats(&expected[&format!("grad.{}", tensor.suffix)]);
        let added: Vec<f32> = (0..wanted.len()).map(|at| gradient[start + at] - before[start + at]).collect();
        // The difference from a random number of up to 1 loses some of the seven digits.
        let largest = wanted.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        let tolerance = 2e-6 + f64::from(2e-7 / largest);
        assert_close(&tensor.suffix, &added, &wanted, tolerance);
    }
    assert_eq!(network.tensors().len() * 2 + 2, expected.len(), "every tensor is compared");
}

#[test]
fn dropout_inside_the_lstm_is_a_function_of_seed_and_step_and_off_elsewhere() {
    let network = PromptNetwork::lstm(4, 6, 5, 2, 0.5);
    let (_, length) = places(&network);
    let flat = Random::new(1).numbers(length, 0.5);
    let run = |key| {
        let mut output = vec![0.0; 24];
        network.forward(&flat, key, &mut output).unwrap();
        output
    };
    assert_eq!(run(Some(KEY)), run(Some(KEY)));
    assert_ne!(run(Some(KEY)), run(Some(StepKey { step: 6, ..KEY })));
    assert_ne!(run(Some(KEY)), run(Some(StepKey { seed: 4, ..KEY })));
    assert_ne!(run(Some(KEY)), run(None));
    let dry = PromptNetwork::lstm(4, 6, 5, 2, 0.0);
    let mut output = vec![0.0; 24];
    dry.forward(&flat, Some(KEY), &mut output).unwrap();
    assert_eq!(output, run(None));
}

/// The gradient with dropout, by differences: forward and backward draw the same masks.
#[test]
fn gradients_with_dropout_agree_with_differences() {
    let network = PromptNetwork::lstm(4, 6, 5, 2, 0.5);
    let (starts, length) = places(&network);
    let mut random = Random::new(7);
    let flat = random.numbers(length, 0.5);
    let weight = random.numbers(24, 1.0);
    let value = |flat: &[f32]| {
        let mut output = vec![0.0; 24];
        network.forward(flat, Some(KEY), &mut output).unwrap();
        output.iter().zip(&weight).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum::<f64>()
    };
    let mut gradient = vec![0.0; length];
    network.backward(&flat, Some(KEY), &weight, &mut gradient).unwrap();
    for (tensor, start) in network.tensors().iter().zip(starts) {
        for at in [0, tensor.shape.iter().product::<usize>() - 1] {
            let moved = |by: f32| {
                let mut flat = flat.clone();
                flat[start + at] += by;
                value(&flat)
            };
            // Steps of 1e-2 in f32: an error of 1e-4 from curvature, 1e-5 from rounding.
            let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            let got = f64::from(gradient[start + at]);
            assert!((slope - got).abs() < 1e-3, "{}[{at}]: {got}, by differences {slope}", tensor.suffix);
        }
    }
}
