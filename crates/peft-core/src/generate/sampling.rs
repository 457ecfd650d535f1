//! From logits to the next token: penalty, temperature, top-k, top-p, draw.
//!
//! The order and the meaning of each are those of transformers: tokens seen before are made less likely, logits are divided
//! by the temperature, the k likeliest are kept, and of their probabilities (which add up to 1 again) the likeliest that
//! reach p. [`candle_transformers::generation::LogitsProcessor`] draws among what is left; its own filters are not used,
//! for they measure p against the probabilities before top-k.

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};

use crate::{engine::StepError, error::Result};

/// How the next token is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Logits are divided by it; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Only the so many likeliest tokens may be drawn.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together have this probability may be drawn.
    pub top_p: Option<f64>,
    /// Logits of tokens that are there already are divided by it where positive and multiplied where negative; 1 does
    /// nothing. Keskar et al., arXiv 1909.05858.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
    /// New tokens at most.
    pub max_tokens: usize,
    /// Tokens that end the continuation; they are not part of it.
    pub stop_ids: Vec<u32>,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: None,
            top_p: Some(0.95),
            repetition_penalty: 1.0,
            seed: 0,
            max_tokens: 60,
            stop_ids: Vec::new(),
        }
    }
}

/// Draws the tokens of one continuation. The same options, logits and history give the same tokens.
pub struct Sampler {
    options: SamplingOptions,
    processor: LogitsProcessor,
    /// Whether a token of the vocabulary was seen.
    seen: Vec<bool>,
    scores: Vec<f32>,
    order: Vec<u32>,
}

impl Sampler {
    /// A sampler at its start; `prompt` counts as seen.
    pub fn new(options: &SamplingOptions, vocabulary: usize, prompt: &[u32]) -> Self {
        let sampling = match options.temperature > 0.0 {
            // The temperature is in the scores already.
            true => Sampling::All { temperature: 1.0 },
            false => Sampling::ArgMax,
        };
        let mut sampler = Self {
            options: options.clone(),
            processor: LogitsProcessor::from_sampling(options.seed, sampling),
            seen: vec![false; vocabulary],
            scores: Vec::with_capacity(vocabulary),
            order: Vec::new(),
        };
        prompt.iter().for_each(|token| sampler.see(*token));
        sampler
    }

    fn see(&mut self, token: u32) {
        if let Some(seen) = self.seen.get_mut(token as usize) {
            *seen = true;
        }
    }

    /// Draws the next token, which counts as seen from then on.
    ///
    /// # Errors
    /// [`StepError::Sampling`] where a logit is infinite or not a number.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32> {
        let failed = |error: candle_core::Error| StepError::Sampling { reason: error.to_string() };
        let scores = self.scores(logits)?;
        let scores = Tensor::from_slice(scores, scores.len(), &Device::Cpu).map_err(failed)?;
        let token = self.processor.sample(&scores).map_err(failed)?;
        self.see(token);
        Ok(token)
    }

    /// What each token may be drawn with; 0 for those that are left out.
    ///
    /// # Errors
    /// As [`Sampler::next`].
    pub fn distribution(&mut self, logits: &[f32]) -> Result<Vec<f32>> {
        let greedy = self.options.temperature <= 0.0;
        let scores = self.scores(logits)?;
        if greedy {
            let likeliest = (0..scores.len()).rev().max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
            return Ok((0..scores.len()).map(|id| f32::from(u8::from(Some(id) == likeliest))).collect());
        }
        let mut probabilities = scores.to_vec();
        softmax(&mut probabilities);
        Ok(probabilities)
    }

    /// The logits after penalty, temperature and filters; minus infinity for those that are left out.
    fn scores(&mut self, logits: &[f32]) -> Result<&[f32]> {
        if let Some(at) = logits.iter().position(|logit| !logit.is_finite()) {
            let reason = format!("the logit of token {at} is {}", logits[at]);
            return Err(StepError::Sampling { reason }.into());
        }
        let Self { options, seen, scores, order, .. } = self;
        scores.clear();
        scores.extend_from_slice(logits);
        if options.repetition_penalty != 1.0 {
            for (score, _) in scores.iter_mut().zip(seen.iter()).filter(|(_, seen)| **seen) {
                let penalty = options.repetition_penalty;
                *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
            }
        }
        if options.temperature <= 0.0 {
            return Ok(scores);
        }
        let temperature = options.temperature as f32;
        // A temperature near 0 would make scores infinite: differences from the largest stay below it.
        let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        scores.iter_mut().for_each(|score| *score = (*score - largest) / temperature);
        let filtered =
            options.top_k.is_some_and(|k| k < scores.len()) || options.top_p.is_some_and(|p| p < 1.0);
        if !filtered {
            return Ok(scores);
        }
        order.clear();
        order.extend(0..scores.len() as u32);
        // Of equals the lower id comes first, so that what is left does not hang on the sort.
        order.sort_unstable_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b)));
        let mut kept = options.top_k.map_or(scores.len(), |k| k.clamp(1, scores.len()));
        if let Some(p) = options.top_p.filter(|p| *p < 1.0) {
            let weights = order[..kept].iter().map(|id| f64::from(scores[*id as usize]).exp());
            let total: f64 = weights.clone().sum();
            let mut before = 0.0;
            // The first always stays, and the one that reaches p does.
            kept = weights
                .take_while(|weight| {
                    let stays = before == 0.0 || before < p * total;
                    before += weight;
                    stays
                })
                .count()
                .max(1);
        }
        order[kept..].iter().for_each(|id| scores[*id as usize] = f32::NEG_INFINITY);
        Ok(scores)
    }
}

fn softmax(scores: &mut [f32]) {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|score| *score = (*score - largest).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|score| *score /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities 0.5, 0.25, 0.125, 0.125.
    fn logits() -> Vec<f32> {
        [0.5f32, 0.25, 0.125, 0.125].map(f32::ln).to_vec()
    }

    fn options() -> SamplingOptions {
        SamplingOptions { temperature: 1.0, top_p: None, ..SamplingOptions::default() }
    }

    #[track_caller]
    fn check(options: SamplingOptions, prompt: &[u32], expected: [f32; 4]) {
        let got = Sampler::new(&options, 4, prompt).distribution(&logits()).unwrap();
        for (got, expected) in got.iter().zip(expected) {
            // A logarithm, an exponential and a division in f32.
            assert!((got - expected).abs() < 1e-6, "{got} for {expected}: {options:?}");
        }
    }

    #[test]
    fn nothing_filtered_is_the_softmax() {
        check(options(), &[], [0.5, 0.25, 0.125, 0.125]);
        check(
            SamplingOptions { top_k: Some(9), top_p: Some(1.0), ..options() },
            &[],
            [0.5, 0.25, 0.125, 0.125],
        );
    }

    #[test]
    fn temperature_raises_probabilities_to_its_reciprocal() {
        // Squares 16, 4, 1, 1 of 22.
        let squares = [16.0 / 22.0, 4.0 / 22.0, 1.0 / 22.0, 1.0 / 22.0];
        check(SamplingOptions { temperature: 0.5, ..options() }, &[], squares);
        // Near 0 all goes to the likeliest, without an overflow.
        check(SamplingOptions { temperature: 1e-30, ..options() }, &[], [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn top_k_keeps_the_likeliest_and_shares_the_rest_out() {
        check(SamplingOptions { top_k: Some(2), ..options() }, &[], [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        // Of two alike the lower id stays.
        check(SamplingOptions { top_k: Some(3), ..options() }, &[], [4.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0, 0.0]);
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it() {
        check(SamplingOptions { top_p: Some(0.4), ..options() }, &[], [1.0, 0.0, 0.0, 0.0]);
        check(SamplingOptions { top_p: Some(0.6), ..options() }, &[], [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        check(SamplingOptions { top_p: Some(0.8), ..options() }, &[], [4.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0, 0.0]);
    }

    #[test]
    fn top_p_is_measured_after_top_k_as_in_transformers() {
        // Of 2/3 and 1/3 the first has more than 0.6; of 0.5 and 0.25 it would not.
        let options = SamplingOptions { top_k: Some(2), top_p: Some(0.6), ..options() };
        check(options, &[], [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn what_was_seen_is_made_less_likely() {
        // All logits are negative: ln 0.5 · 2 = ln 0.25, ln 0.125 · 2 = ln 0.015625.
        let total = 0.25 + 0.25 + 0.125 + 0.015625;
        let expected = [0.25, 0.25, 0.125, 0.015625].map(|weight| weight / total);
        // Seeing a token twice is as seeing it once; an id beyond the vocabulary is nobody's.
        check(SamplingOptions { repetition_penalty: 2.0, ..options() }, &[0, 3, 0, 77], expected);
        // A positive logit is divided.
        let options = SamplingOptions { repetition_penalty: 4.0, ..options() };
        let got = Sampler::new(&options, 2, &[1]).distribution(&[0.0, 4.0]).unwrap();
        assert!((got[1] / got[0] - 1f32.exp()).abs() < 1e-5, "{got:?}");
    }

    #[test]
    fn greedy_takes_the_likeliest_after_the_penalty_and_the_first_of_equals() {
        let options = SamplingOptions { temperature: 0.0, ..options() };
        check(options.clone(), &[], [1.0, 0.0, 0.0, 0.0]);
        let mut sampler = Sampler::new(&options, 4, &[]);
        assert_eq!(sampler.next(&logits()).unwrap(), 0);
        assert_eq!(sampler.next(&[1.0, 3.0, 3.0, 0.0]).unwrap(), 1);
        let mut sampler = Sampler::new(&SamplingOptions { repetition_penalty: 2.5, ..options }, 4, &[]);
        let drawn: Vec<u32> = (0..4).map(|_| sampler.next(&logits()).unwrap()).collect();
        // ln 0.5 · 2.5 = -1.73 lies below ln 0.25 = -1.39, which falls to -3.47 once it is taken.
        assert_eq!(drawn, [0, 1, 0, 0]);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let draw = |seed: u64| -> Vec<u32> {
            let options = SamplingOptions { top_k: Some(3), seed, ..options() };
            let mut sampler = Sampler::new(&options, 4, &[]);
            (0..4000).map(|_| sampler.next(&logits()).unwrap()).collect()
        };
        let drawn = draw(7);
        assert_eq!(drawn, draw(7));
        assert_ne!(drawn, draw(8));
        for (token, share) in [(0, 4.0 / 7.0), (1, 2.0 / 7.0), (2, 1.0 / 7.0), (3, 0.0)] {
            let found = drawn.iter().filter(|other| **other == token).count() as f64 / 4000.0;
            // Five standard deviations of a share of 4,000 draws.
            assert!((found - share).abs() < 5.0 * (0.25f64 / 4000.0).sqrt(), "token {token}: {found}");
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_refused() {
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(Sampler::new(&options(), 2, &[]).next(&[0.0, wrong]).is_err(), "{wrong}");
        }
    }
}
