//! A small engine whose gradient of a row is a pure function of parameters, row, seed and step, as the real one's is.
//!
//! Row r pulls parameter i towards t(r, i) with a weight of its trained tokens; a mask keyed by (seed, step, sample, i)
//! plays dropout. Sums are f32, so their order shows in the last bits.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use shanty_worker::{
    Error,
    engine::{
        EngineLoader, Facts, GradientSink, HostEngine, LoadRequest, OnHost, Row, StepEngine, StepHooks,
        StepInfo, Sum,
    },
};

pub const PARAMETERS: usize = 37;

/// Loads model engines.
#[derive(Debug, Clone)]
pub struct ModelEngines {
    pub micro_batch_rows: usize,
    /// How long a micro-batch takes.
    pub pause: Duration,
    /// A row whose loss is not a number.
    pub poisoned_row: Option<u64>,
    /// A step whose losses are no numbers.
    pub poisoned_step: Option<u64>,
    /// A step whose losses are a thousand times what they should be.
    pub spiked_step: Option<u64>,
    /// The update of this step gets one bit wrong, as a card's memory may.
    pub wrong_at: Option<u64>,
    /// Counts loads.
    pub loads: Arc<AtomicU64>,
    /// When each micro-batch began.
    pub began: Arc<Mutex<Vec<Instant>>>,
}

impl Default for ModelEngines {
    fn default() -> Self {
        Self {
            micro_batch_rows: 2,
            pause: Duration::ZERO,
            poisoned_row: None,
            poisoned_step: None,
            spiked_step: None,
            wrong_at: None,
            loads: Arc::default(),
            began: Arc::default(),
        }
    }
}

impl EngineLoader for ModelEngines {
    fn load(&self, _: LoadRequest<'_>, progress: &mut dyn FnMut(f64)) -> Result<Box<dyn StepEngine>, Error> {
        progress(1.0);
        self.loads.fetch_add(1, Ordering::SeqCst);
        let facts = Facts {
            base_hash: "model".to_owned(),
            flat_length: PARAMETERS,
            trainable_parameters: PARAMETERS as u64,
            total_parameters: 1000,
            matched_modules: vec!["layer.0".to_owned()],
            computed_start: false,
        };
        Ok(Box::new(OnHost::new(ModelEngine { facts, settings: self.clone() })))
    }
}

struct ModelEngine {
    facts: Facts,
    settings: ModelEngines,
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn uniform(key: u64) -> f32 {
    (mix(key) >> 40) as f32 / (1u64 << 24) as f32
}

fn target(row: &Row, i: usize) -> f32 {
    2.0 * uniform(row.id.wrapping_mul(1009).wrapping_add(i as u64 + 1)) - 1.0
}

fn tokens(row: &Row) -> u64 {
    row.trained.iter().map(|range| u64::from(range.end - range.start)).sum()
}

impl StepHooks for ModelEngine {
    fn after_step(&self, step: StepInfo, parameters: &mut [f32], _: &[f32], _: &mut [f32]) {
        if self.settings.wrong_at == Some(step.step) {
            parameters[3] = f32::from_bits(parameters[3].to_bits() ^ 1);
        }
    }
}

impl HostEngine for ModelEngine {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn initial_parameters(&mut self, seed: u64) -> Result<Vec<f32>, Error> {
        Ok((0..PARAMETERS).map(|i| uniform(seed ^ (i as u64) << 20)).collect())
    }

    fn micro_batch_rows(&self) -> usize {
        self.settings.micro_batch_rows
    }

    fn forward_backward(
        &mut self,
        parameters: &[f32],
        rows: &[Row],
        seed: u64,
        step: u64,
        gradient: &mut [f32],
        sink: &mut dyn GradientSink,
    ) -> Result<Sum, Error> {
        assert!(rows.len() <= self.settings.micro_batch_rows);
        self.settings.began.lock().unwrap().push(Instant::now());
        std::thread::sleep(self.settings.pause);
        let mut sum = Sum::default();
        for (number, row) in rows.iter().enumerate() {
            let weight = tokens(row);
            sum.tokens += weight;
            for (i, parameter) in parameters.iter().enumerate() {
                if i == PARAMETERS / 2 && number + 1 == rows.len() {
                    sink.ready(0..i, gradient);
                }
                let key = seed
                    ^ step.wrapping_mul(31)
                    ^ row.segments[0].sample_id.wrapping_mul(77)
                    ^ (i as u64) << 40;
                let keep = if uniform(key) < 0.1 { 0.0 } else { 1.0 / 0.9 };
                let pull = (parameter - target(row, i)) * keep;
                gradient[i] += pull * weight as f32;
                sum.loss += 0.5 * f64::from(pull * pull) * weight as f64;
            }
            if self.settings.poisoned_row == Some(row.id) {
                sum.loss = f64::NAN;
            }
        }
        sink.ready(PARAMETERS / 2..PARAMETERS, gradient);
        if self.settings.poisoned_step == Some(step) {
            sum.loss = f64::NAN;
        }
        if self.settings.spiked_step == Some(step) {
            sum.loss *= 1000.0;
        }
        Ok(sum)
    }

    fn evaluate(&mut self, parameters: &[f32], rows: &[Row]) -> Result<Sum, Error> {
        let mut sum = Sum::default();
        for row in rows {
            sum.tokens += tokens(row);
            for (i, parameter) in parameters.iter().enumerate() {
                sum.loss += 0.5 * f64::from(parameter - target(row, i)).powi(2) * tokens(row) as f64;
            }
        }
        Ok(sum)
    }

    fn adapter_files(&self, parameters: &[f32], _state: &[f32]) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let bytes = parameters.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(vec![
            ("adapter_config.json".to_owned(), b"{}".to_vec()),
            ("adapter_model.safetensors".to_owned(), bytes),
        ])
    }
}
