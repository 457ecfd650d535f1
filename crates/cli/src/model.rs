//! A base with perhaps an adapter on it, ready to be used.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use shanty_data::{Row, Tokenizer};
use shanty_peft_core::{
    Engine, EngineOptions, adapter::AdapterFolder, batch, generate::SamplingOptions, model::ModelConfig,
    plan::Recompute, quant::Nf4Options,
};

use crate::failure::CommandResult;

/// How the base is kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum BaseQuantization {
    /// 4-bit NormalFloat with double quantisation, as jobs train on it.
    #[default]
    Nf4,
    /// As stored, computed in f32.
    None,
}

/// What to load.
#[derive(Debug, Clone)]
pub(crate) struct ModelOptions {
    pub(crate) base: PathBuf,
    pub(crate) adapter: Option<PathBuf>,
    pub(crate) quantization: BaseQuantization,
    /// 0: all cores.
    pub(crate) threads: usize,
    /// Longest row that is evaluated; the model's context when none.
    pub(crate) max_length: Option<usize>,
}

/// How a text is continued.
#[derive(Debug, Clone)]
pub(crate) struct Sampling {
    pub(crate) max_tokens: usize,
    /// 0 takes the likeliest token every time.
    pub(crate) temperature: f64,
    pub(crate) top_k: Option<usize>,
    pub(crate) top_p: Option<f64>,
    pub(crate) seed: u64,
}

/// A base with perhaps an adapter on it.
pub(crate) struct Model {
    engine: Engine,
    parameters: Option<Vec<f32>>,
}

impl Model {
    /// Loads base and adapter.
    pub(crate) fn open(options: &ModelOptions) -> CommandResult<Self> {
        let nf4 = (options.quantization == BaseQuantization::Nf4).then(Nf4Options::default);
        Self::load(&options.base, nf4, options.adapter.as_deref(), options.threads, options.max_length)
    }

    /// Loads base and adapter, with the quantisation given.
    pub(crate) fn load(
        folder: &Path,
        nf4: Option<Nf4Options>,
        adapter: Option<&Path>,
        threads: usize,
        max_length: Option<usize>,
    ) -> CommandResult<Self> {
        let context = Self::context(folder)?;
        // The adapter is read first: it is small, and wrong folders are told at once.
        let adapter = adapter.map(AdapterFolder::open).transpose()?;
        let options = EngineOptions {
            quantization: nf4,
            adapter: adapter.as_ref().map(|adapter| adapter.method().clone()),
            threads,
            recompute: Recompute::Layers,
            ..EngineOptions::new(folder, max_length.unwrap_or(context))
        };
        let engine = Engine::load(options, &mut |_| {})?;
        let parameters = match &adapter {
            Some(adapter) => {
                let mut parameters = vec![0.0; engine.layout().len()];
                adapter.read_into(engine.layout(), &mut parameters)?;
                Some(parameters)
            }
            None => None,
        };
        Ok(Self { engine, parameters })
    }

    /// The longest row that a model was made for.
    pub(crate) fn context(folder: &Path) -> CommandResult<usize> {
        Ok(ModelConfig::load(folder)?.max_positions)
    }

    /// Tokens that the model knows.
    pub(crate) fn vocabulary(&self) -> usize {
        self.engine.config().vocabulary_size
    }

    /// Continues a text; `on_token` hears of each new token and says whether to go on.
    pub(crate) fn generate(
        &mut self,
        tokenizer: &Tokenizer,
        prompt: &str,
        sampling: &Sampling,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> CommandResult<Vec<u32>> {
        let ids = tokenizer.encode(prompt, true)?;
        // Some tokenizers end every text with an end token: nothing would follow it.
        let end = ids.iter().rposition(|id| Some(*id) != tokenizer.eos()).map_or(ids.len(), |last| last + 1);
        let options = SamplingOptions {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            repetition_penalty: 1.0,
            seed: sampling.seed,
            max_tokens: sampling.max_tokens,
            stop_ids: tokenizer.stop_ids().to_vec(),
        };
        let mut go_on = |id| if on_token(id) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
        Ok(self.engine.generate(self.parameters.as_deref(), &ids[..end], &options, &mut go_on)?)
    }

    /// Logits of rows of one length, `[batch, tokens, vocabulary]`.
    pub(crate) fn logits(&mut self, rows: &[Vec<u32>]) -> CommandResult<Vec<f32>> {
        Ok(self.engine.logits(self.parameters.as_deref(), rows)?)
    }

    /// Mean loss a trained token, and how many there are.
    pub(crate) fn evaluate(&mut self, rows: Vec<Row>) -> CommandResult<(f64, u64)> {
        let rows: Vec<batch::Row> = rows.into_iter().map(row).collect();
        let sum = match &self.parameters {
            Some(parameters) => self.engine.evaluate(parameters, &rows)?,
            None => self.engine.evaluate_base(&rows)?,
        };
        Ok((sum.mean(), sum.tokens))
    }
}

fn row(row: Row) -> batch::Row {
    let segments = row
        .segments
        .iter()
        .map(|segment| batch::Segment { sample_id: segment.sample_id, length: segment.length });
    batch::Row { id: row.id, segments: segments.collect(), token_ids: row.token_ids, trained: row.trained }
}
