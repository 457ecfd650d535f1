//! The optimizer against transformers' rates, torch's clipping norm, and AdamW in f64.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod common;

use common::{case, expected, relative};
use proptest::prelude::*;
use shanty_peft_core::optim::{AdamW, AdamWOptions, Schedule, Shape, clip_factor, global_norm};

const CASE: &str = "training/lora";

#[test]
fn rates_equal_those_of_the_reference_run() {
    let settings = &case(CASE)["settings"];
    assert_eq!(settings["schedule"], "cosine");
    let schedule = Schedule {
        peak: settings["learning_rate"].as_f64().unwrap(),
        shape: Shape::Cosine,
        warmup_steps: settings["warmup_steps"].as_u64().unwrap(),
        total_steps: settings["steps"].as_u64().unwrap(),
    };
    let expected = expected(CASE)["learning_rate"].f32();
    let rates: Vec<f32> =
        (0..expected.len()).map(|update| schedule.learning_rate(update as u64) as f32).collect();
    assert_eq!(rates.len(), 20);
    // The case allows 1e-6; rates were stored as f32.
    assert!(relative(&rates, &expected) <= 1e-6, "{rates:?} {expected:?}");
}

#[test]
fn the_norm_of_the_first_gradient_is_torchs() {
    let tensors = expected(CASE);
    let gradient: Vec<f32> = tensors
        .iter()
        .filter(|(name, _)| name.starts_with("step0.grad."))
        .flat_map(|(_, t)| t.f32())
        .collect();
    let expected = f64::from(tensors["grad_norm"].f32()[0]);
    // torch sums in f32.
    assert!((global_norm(&gradient) - expected).abs() <= 1e-6 * expected);
}

/// AdamW as its formula stands, one number at a time.
#[derive(Clone)]
struct Plain {
    parameter: f64,
    first: f64,
    second: f64,
}

impl Plain {
    fn update(&mut self, options: &AdamWOptions, t: i32, gradient: f64, rate: f64) {
        let [beta1, beta2] = options.betas;
        self.parameter -= rate * options.weight_decay * self.parameter;
        self.first = beta1 * self.first + (1.0 - beta1) * gradient;
        self.second = beta2 * self.second + (1.0 - beta2) * gradient * gradient;
        let denominator = self.second.sqrt() / (1.0 - beta2.powi(t)).sqrt() + options.epsilon;
        self.parameter -= rate / (1.0 - beta1.powi(t)) * self.first / denominator;
    }
}

/// A repeatable gradient with large, small and zero entries; drawn anew for every update.
fn gradient(update: usize, length: usize) -> Vec<f32> {
    (0..length)
        .map(|i| {
            let wave = ((i * 7919 + update * 104_729) as f32 * 0.618).sin();
            wave * [1.0, 1e-3, 0.0, 30.0][i % 4]
        })
        .collect()
}

#[test]
fn twenty_updates_follow_the_formula_in_f64() {
    let options = AdamWOptions { weight_decay: 0.01, ..AdamWOptions::default() };
    // Ends inside of a task of the parallel loop.
    let length = 3 * 16_384 + 77;
    let mut parameters: Vec<f32> = (0..length).map(|i| (i as f32 * 0.01).cos()).collect();
    let mut plain: Vec<Plain> = parameters
        .iter()
        .map(|parameter| Plain { parameter: f64::from(*parameter), first: 0.0, second: 0.0 })
        .collect();
    let mut optimizer = AdamW::new(options, length);
    let schedule = Schedule { peak: 4e-3, shape: Shape::Cosine, warmup_steps: 4, total_steps: 20 };
    for update in 0..20 {
        let gradients = gradient(update, length);
        let (tokens, rate) = (113.0, schedule.learning_rate(update as u64));
        let norm = global_norm(&gradients) / tokens;
        let clip = clip_factor(norm, 1.0).unwrap();
        assert!(clip < 1.0 || norm <= 1.0);
        let before = gradients.clone();
        optimizer.update(&mut parameters, &gradients, clip / tokens, rate).unwrap();
        assert_eq!(gradients, before);
        for (plain, gradient) in plain.iter_mut().zip(&gradients) {
            plain.update(&options, update as i32 + 1, f64::from(*gradient) * clip / tokens, rate);
        }
    }
    assert_eq!(optimizer.step(), 20);
    let rounded = |of: fn(&Plain) -> f64| plain.iter().map(|plain| of(plain) as f32).collect::<Vec<_>>();
    // Each of 20 updates rounds a handful of times at 6e-8: 20 · 5 · 6e-8 = 6e-6 at worst.
    assert!(relative(&parameters, &rounded(|plain| plain.parameter)) < 6e-6);
    assert!(relative(optimizer.first_moment(), &rounded(|plain| plain.first)) < 6e-6);
    assert!(relative(optimizer.second_moment(), &rounded(|plain| plain.second)) < 6e-6);
}

/// The first update has rate 0: it moves no parameter, and fills the moments with the reference run's first gradient.
#[test]
fn an_update_at_rate_zero_only_fills_the_moments() {
    let tensors = expected(CASE);
    let gradients: Vec<f32> = tensors
        .iter()
        .filter(|(name, _)| name.starts_with("step0.grad."))
        .flat_map(|(_, t)| t.f32())
        .collect();
    let mut parameters = vec![0.25; gradients.len()];
    let mut optimizer =
        AdamW::new(AdamWOptions { weight_decay: 0.01, ..AdamWOptions::default() }, gradients.len());
    optimizer.update(&mut parameters, &gradients, 1.0, 0.0).unwrap();
    assert!(parameters.iter().all(|parameter| *parameter == 0.25));
    let first: Vec<f32> = gradients.iter().map(|gradient| gradient * 0.1).collect();
    assert!(relative(optimizer.first_moment(), &first) < 1e-6);
    let second: Vec<f32> = gradients.iter().map(|gradient| gradient * gradient * 0.001).collect();
    assert!(relative(optimizer.second_moment(), &second) < 1e-6);
}

#[test]
fn gaps_of_zeros_stay_zeros() {
    let mut parameters = vec![0.0; 64];
    let mut optimizer = AdamW::new(AdamWOptions { weight_decay: 0.1, ..AdamWOptions::default() }, 64);
    for _ in 0..5 {
        optimizer.update(&mut parameters, &[0.0; 64], 1.0, 1e-2).unwrap();
    }
    assert!(parameters.iter().all(|parameter| parameter.to_bits() == 0));
}

#[test]
fn a_restored_optimizer_goes_on_with_the_same_bits() {
    let length = 20_000;
    let mut optimizer = AdamW::new(AdamWOptions::default(), length);
    let mut parameters = gradient(99, length);
    for update in 0..3 {
        optimizer.update(&mut parameters, &gradient(update, length), 0.5, 1e-3).unwrap();
    }
    let (first, second) = (optimizer.first_moment().to_vec(), optimizer.second_moment().to_vec());
    let mut restored = AdamW::restore(*optimizer.options(), optimizer.step(), first, second).unwrap();
    let mut again = parameters.clone();
    optimizer.update(&mut parameters, &gradient(3, length), 0.5, 1e-3).unwrap();
    restored.update(&mut again, &gradient(3, length), 0.5, 1e-3).unwrap();
    common::assert_bits(&again, &parameters, "parameters");
    assert_eq!(restored, optimizer);
}

#[test]
fn buffers_of_other_lengths_are_refused_unchanged() {
    let mut optimizer = AdamW::new(AdamWOptions::default(), 8);
    let mut parameters = vec![1.0; 8];
    assert_eq!(optimizer.update(&mut parameters, &[1.0; 7], 1.0, 0.1).unwrap_err().code(), "SH0399");
    assert_eq!(optimizer.update(&mut [1.0; 9], &[1.0; 8], 1.0, 0.1).unwrap_err().code(), "SH0399");
    assert_eq!((optimizer.step(), &parameters), (0, &vec![1.0; 8]));
    assert!(AdamW::restore(AdamWOptions::default(), 1, vec![0.0; 2], vec![0.0; 3]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Clipping leaves a gradient of at most the norm asked for.
    #[test]
    fn a_clipped_gradient_is_no_longer_than_asked(
        gradient in prop::collection::vec(-100.0_f32..100.0, 1..5000), max_norm in 0.01_f64..10.0,
    ) {
        let factor = clip_factor(global_norm(&gradient), max_norm).unwrap();
        let clipped: Vec<f32> = gradient.iter().map(|value| value * factor as f32).collect();
        prop_assert!(global_norm(&clipped) <= max_norm * (1.0 + 1e-6));
    }
}
