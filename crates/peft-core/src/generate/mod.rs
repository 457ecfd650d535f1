//! Continuing prompts, token by token, with a cache of keys and values.
//!
//! Several prompts go on together: each is read alone, then all take a step at once. They share one adapter; who wants
//! several groups the prompts by adapter and lays one after the other on the base ([`Engine::adapt`]), which stays as it is.

mod loaded;
mod sampling;
mod session;

use std::ops::ControlFlow;

pub use loaded::LoadedAdapter;
pub use sampling::{Sampler, SamplingOptions};
pub(crate) use session::{Room, Session};

use crate::{
    adapter::Branches,
    backend::Backend,
    engine::{Engine, Machine, Parts, StepError},
    error::Result,
    plan::PlanRequest,
};

/// A prompt and how it is to go on.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Its tokens.
    pub prompt: Vec<u32>,
    /// How it goes on.
    pub options: SamplingOptions,
}

/// Why a continuation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// One of the stop tokens was drawn: this one.
    Stop(u32),
    /// [`SamplingOptions::max_tokens`] is reached.
    Limit,
    /// The base's context is full.
    Context,
    /// Whoever listened has heard enough.
    Asked,
}

/// What became of a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuation {
    /// The new tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub end: End,
}

/// Hears of each new token, with the number of its request, and may end that continuation.
pub type Listener<'a> = dyn FnMut(usize, u32) -> ControlFlow<()> + 'a;

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
        let request = Request { prompt: prompt.to_vec(), options: options.clone() };
        let mut ends = self.continue_all(parameters, &[request], &mut |_, token| on_token(token))?;
        Ok(ends.pop().map_or_else(Vec::new, |end| end.tokens))
    }

    /// Continues several prompts at once with the adapter, or with the bare base without `parameters`.
    ///
    /// A request's tokens depend on its own prompt, options and seed. How many others go with it may change the last
    /// bit of a logit, as a product of other sizes rounds otherwise.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub fn continue_all(
        &mut self,
        parameters: Option<&[f32]>,
        requests: &[Request],
        on_token: &mut Listener<'_>,
    ) -> Result<Vec<Continuation>> {
        let context = self.context(parameters.is_some());
        for (index, Request { prompt, .. }) in requests.iter().enumerate() {
            if prompt.is_empty() || prompt.len() > context {
                return Err(StepError::ContextTooLong { tokens: prompt.len(), positions: context }.into());
            }
            self.check_tokens(index as u64, prompt)?;
        }
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        self.check_parameters(parameters)?;
        let (machine, parts, request, parameters) = self.take_apart(parameters)?;
        match machine {
            Machine::Cpu(worker) => {
                let (backend, branches, parameters) = worker.lend(parameters)?;
                continue_all(backend, parts, request, (branches, parameters), requests, on_token)
            }
            Machine::Cuda(worker) => {
                let (backend, branches, parameters) = worker.lend(parameters)?;
                continue_all(backend, parts, request, (branches, parameters), requests, on_token)
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
        let positions = self.context(parameters.is_some());
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

impl Engine {
    /// Tokens that the base's context has room for, behind the adapter's virtual tokens.
    fn context(&self, adapted: bool) -> usize {
        let ahead = if adapted { self.fit.layout().virtual_tokens().count() } else { 0 };
        self.config().max_positions.saturating_sub(ahead)
    }
}

/// What the adapter does beside each module, and its numbers; none on the bare base.
type Worn<'a, B> = (&'a Branches<B>, Option<&'a <B as Backend>::Buffer>);

/// A request on its way.
struct Row<'a> {
    sampler: Sampler,
    options: &'a SamplingOptions,
    tokens: Vec<u32>,
    /// New tokens that its context has room for.
    room: usize,
    end: Option<End>,
}

impl Row<'_> {
    /// Takes the next token; none where the continuation has ended.
    fn take(&mut self, logits: &[f32], listen: impl FnOnce(u32) -> ControlFlow<()>) -> Result<Option<u32>> {
        let token = self.sampler.next(logits)?;
        if self.options.stop_ids.contains(&token) {
            self.end = Some(End::Stop(token));
            return Ok(None);
        }
        self.tokens.push(token);
        let asked = listen(token).is_break();
        self.end = match self.tokens.len() {
            _ if asked => Some(End::Asked),
            length if length >= self.options.max_tokens => Some(End::Limit),
            length if length >= self.room => Some(End::Context),
            _ => None,
        };
        Ok(if self.end.is_none() { Some(token) } else { None })
    }
}

fn continue_all<B: Backend>(
    backend: &B,
    mut parts: Parts<'_>,
    request: &PlanRequest,
    adapter: Worn<'_, B>,
    requests: &[Request],
    on_token: &mut Listener<'_>,
) -> Result<Vec<Continuation>> {
    let vocabulary = parts.config.vocabulary_size;
    let ahead = adapter.1.map_or(0, |_| parts.layout.virtual_tokens().count());
    let context = parts.config.max_positions.saturating_sub(ahead);
    let longest = requests.iter().map(|request| request.prompt.len()).max().unwrap_or(1);
    let positions = requests.iter().map(|request| request.prompt.len() + request.options.max_tokens);
    let positions = positions.max().unwrap_or(1).min(context);
    let room = Room { rows: requests.len(), positions, tokens: longest.max(requests.len()), cached: true };
    let mut session = Session::new(backend, &parts, request, room)?;
    let mut rows: Vec<Row<'_>> = requests
        .iter()
        .map(|Request { prompt, options }| Row {
            sampler: Sampler::new(options, vocabulary, prompt),
            options,
            tokens: Vec::new(),
            room: context - prompt.len(),
            end: match () {
                () if options.max_tokens == 0 => Some(End::Limit),
                () if prompt.len() == context => Some(End::Context),
                () => None,
            },
        })
        .collect();
    let mut logits = vec![0.0; requests.len() * vocabulary];
    // The token that each row goes on from.
    let mut going: Vec<(usize, [u32; 1])> = Vec::with_capacity(requests.len());
    for (index, (row, Request { prompt, .. })) in rows.iter_mut().zip(requests).enumerate() {
        if row.end.is_some() {
            continue;
        }
        let logits = &mut logits[..vocabulary];
        session.advance(backend, &mut parts, adapter, &[(index, prompt)], 1, logits)?;
        if let Some(token) = row.take(logits, |token| on_token(index, token))? {
            going.push((index, [token]));
        }
    }
    while !going.is_empty() {
        let pieces: Vec<_> = going.iter().map(|(index, token)| (*index, &token[..])).collect();
        let logits = &mut logits[..pieces.len() * vocabulary];
        session.advance(backend, &mut parts, adapter, &pieces, pieces.len(), logits)?;
        let mut next = Vec::with_capacity(going.len());
        for ((index, _), logits) in going.iter().zip(logits.chunks_exact(vocabulary)) {
            if let Some(token) = rows[*index].take(logits, |token| on_token(*index, token))? {
                next.push((*index, [token]));
            }
        }
        going = next;
    }
    let ended = |row: Row<'_>| Continuation { tokens: row.tokens, end: row.end.unwrap_or(End::Limit) };
    Ok(rows.into_iter().map(ended).collect())
}

fn all_logits<B: Backend>(
    backend: &B,
    mut parts: Parts<'_>,
    request: &PlanRequest,
    adapter: Worn<'_, B>,
    ids: &[Vec<u32>],
    out: &mut [f32],
) -> Result<()> {
    let Some(tokens) = ids.first().map(Vec::len) else { return Ok(()) };
    let room = Room { rows: 1, positions: tokens, tokens, cached: false };
    let mut session = Session::new(backend, &parts, request, room)?;
    let row_length = tokens * parts.config.vocabulary_size;
    for (row, out) in ids.iter().zip(out.chunks_exact_mut(row_length)) {
        session.restart();
        session.advance(backend, &mut parts, adapter, &[(0, row)], tokens, out)?;
    }
    Ok(())
}
