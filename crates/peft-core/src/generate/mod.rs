//! Continuing a prompt, token by token, with a cache of keys and values.

mod session;

use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};

use session::Session;

use crate::{
    adapter::Branches,
    backend::Backend,
    engine::{Engine, Machine, Parts, StepError},
    error::Result,
    plan::PlanRequest,
};

/// How the next token is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Logits are divided by it; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Only the so many likeliest tokens may be drawn.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together have this probability may be drawn.
    pub top_p: Option<f64>,
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
            seed: 0,
            max_tokens: 60,
            stop_ids: Vec::new(),
        }
    }
}

impl SamplingOptions {
    fn sampling(&self) -> Sampling {
        let temperature = self.temperature;
        if temperature <= 0.0 {
            return Sampling::ArgMax;
        }
        match (self.top_k, self.top_p) {
            (None, None) => Sampling::All { temperature },
            (Some(k), None) => Sampling::TopK { k, temperature },
            (None, Some(p)) => Sampling::TopP { p, temperature },
            (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        }
    }
}

impl Engine {
    /// Continues `prompt` with the adapter, or with the bare base without `parameters`, until a stop token, the limit
    /// or the end of the base's context. `on_token` hears of each new token and may end it. Returns all new tokens.
    ///
    /// # Errors
    /// Where the prompt is empty, longer than the base's context or holds an unknown token, memory is short, or
    /// the logits are not numbers.
    pub fn generate(
        &mut self,
        parameters: Option<&[f32]>,
        prompt: &[u32],
        options: &SamplingOptions,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>> {
        let positions = self.config().max_positions.min(prompt.len() + options.max_tokens);
        if prompt.is_empty() || prompt.len() > positions {
            return Err(StepError::ContextTooLong { tokens: prompt.len(), positions }.into());
        }
        self.check_parameters(parameters)?;
        self.check_tokens(0, prompt)?;
        let (machine, parts, request, parameters) = self.take_apart(parameters)?;
        let wanted = Wanted { prompt, positions, options };
        match machine {
            Machine::Cpu(worker) => {
                let (backend, branches, parameters) = worker.lend(parameters)?;
                continue_prompt(backend, parts, request, (branches, parameters), &wanted, on_token)
            }
            Machine::Cuda(worker) => {
                let (backend, branches, parameters) = worker.lend(parameters)?;
                continue_prompt(backend, parts, request, (branches, parameters), &wanted, on_token)
            }
        }
    }

    /// Logits of every token of `ids`, all of one length, with the adapter or of the bare base:
    /// `[batch, tokens, vocabulary]`, row after row.
    ///
    /// # Errors
    /// Where the rows differ in length, exceed the base's context or hold an unknown token, or memory is short.
    pub fn logits(&mut self, parameters: Option<&[f32]>, ids: &[Vec<u32>]) -> Result<Vec<f32>> {
        let Some(tokens) = ids.first().map(Vec::len) else { return Ok(Vec::new()) };
        let positions = self.config().max_positions;
        if tokens > positions {
            return Err(StepError::ContextTooLong { tokens, positions }.into());
        }
        let row_length = tokens * self.config().vocabulary_size;
        let mut out = vec![0.0; ids.len() * row_length];
        if row_length == 0 {
            return Ok(out);
        }
        self.check_parameters(parameters)?;
        for (index, row) in ids.iter().enumerate() {
            if row.len() != tokens {
                let reason = "rows of one call must have one length";
                return Err(StepError::MalformedRow { row: index as u64, reason }.into());
            }
            self.check_tokens(index as u64, row)?;
        }
        let (machine, parts, request, parameters) = self.take_apart(parameters)?;
        match machine {
            Machine::Cpu(worker) => {
                let (backend, branches, parameters) = worker.lend(parameters)?;
                all_logits(backend, parts, request, (branches, parameters), ids, &mut out)?;
            }
            Machine::Cuda(worker) => {
                let (backend, branches, parameters) = worker.lend(parameters)?;
                all_logits(backend, parts, request, (branches, parameters), ids, &mut out)?;
            }
        }
        Ok(out)
    }
}

/// A prompt, and how it is to go on.
struct Wanted<'a> {
    prompt: &'a [u32],
    /// Tokens of prompt and continuation, at most.
    positions: usize,
    options: &'a SamplingOptions,
}

fn continue_prompt<B: Backend>(
    backend: &B,
    mut parts: Parts<'_>,
    request: &PlanRequest,
    adapter: (&Branches<B>, Option<&B::Buffer>),
    wanted: &Wanted<'_>,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    let Wanted { prompt, positions, options } = *wanted;
    let room = positions - prompt.len();
    let mut session = Session::new(backend, &parts, request, prompt.len(), positions, true)?;
    let mut processor = LogitsProcessor::from_sampling(options.seed, options.sampling());
    let mut logits = vec![0.0; parts.config.vocabulary_size];
    let mut tokens = Vec::with_capacity(room);
    session.advance(backend, &mut parts, adapter, prompt, 1, &mut logits)?;
    while tokens.len() < room {
        let token = sample(&mut processor, &logits)?;
        if options.stop_ids.contains(&token) {
            break;
        }
        tokens.push(token);
        if on_token(token).is_break() || tokens.len() == room {
            break;
        }
        session.advance(backend, &mut parts, adapter, &[token], 1, &mut logits)?;
    }
    Ok(tokens)
}

fn all_logits<B: Backend>(
    backend: &B,
    mut parts: Parts<'_>,
    request: &PlanRequest,
    adapter: (&Branches<B>, Option<&B::Buffer>),
    ids: &[Vec<u32>],
    out: &mut [f32],
) -> Result<()> {
    let Some(tokens) = ids.first().map(Vec::len) else { return Ok(()) };
    let mut session = Session::new(backend, &parts, request, tokens, tokens, false)?;
    let row_length = tokens * parts.config.vocabulary_size;
    for (row, out) in ids.iter().zip(out.chunks_exact_mut(row_length)) {
        session.restart();
        session.advance(backend, &mut parts, adapter, row, tokens, out)?;
    }
    Ok(())
}

fn sample(processor: &mut LogitsProcessor, logits: &[f32]) -> Result<u32> {
    let failed = |error: candle_core::Error| StepError::Sampling { reason: error.to_string() };
    if let Some(at) = logits.iter().position(|logit| !logit.is_finite()) {
        let reason = format!("the logit of token {at} is {}", logits[at]);
        return Err(StepError::Sampling { reason }.into());
    }
    let logits = Tensor::from_slice(logits, logits.len(), &Device::Cpu).map_err(failed)?;
    Ok(processor.sample(&logits).map_err(failed)?)
}
