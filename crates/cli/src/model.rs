//! A base with adapters to lay on it, ready to be used.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use shanty_data::{Row, Tokenizer};
use shanty_diagnostic::Diagnose;
use shanty_peft_core::{
    Engine, EngineOptions, batch,
    generate::{Continuation, Listener, LoadedAdapter, Request, SamplingOptions},
    model::ModelConfig,
    plan::Recompute,
    quant::Nf4Options,
};

use crate::{
    error::Error,
    failure::CommandResult,
    flags::{AdapterFlag, ModelFlags, SamplingFlags},
    ui::Ui,
};

/// How the base is kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum BaseQuantization {
    /// 4-bit NormalFloat with double quantisation, as jobs train on it.
    #[default]
    Nf4,
    /// As stored, computed in f32.
    None,
}

impl BaseQuantization {
    pub(crate) fn nf4(self) -> Option<Nf4Options> {
        (self == Self::Nf4).then(Nf4Options::default)
    }
}

/// What to load.
#[derive(Debug, Clone)]
pub(crate) struct ModelOptions {
    pub(crate) base: PathBuf,
    pub(crate) nf4: Option<Nf4Options>,
    pub(crate) adapters: Vec<AdapterFlag>,
    /// Use adapters although they were trained on another base.
    pub(crate) force: bool,
    /// 0: all cores.
    pub(crate) threads: usize,
    /// Longest row that is evaluated; the model's context when none.
    pub(crate) max_length: Option<usize>,
}

impl ModelOptions {
    pub(crate) fn new(flags: &ModelFlags) -> Self {
        Self {
            base: flags.model.clone(),
            nf4: flags.quantization.nf4(),
            adapters: flags.adapters.clone(),
            force: flags.force,
            threads: flags.threads.map_or(0, usize::from),
            max_length: None,
        }
    }
}

/// Which of a model's adapters is used; none is the bare base.
pub(crate) type Choice = Option<usize>;

/// A base, in memory once, and adapters that are laid on it in turn.
pub(crate) struct Model {
    engine: Engine,
    adapters: Vec<(String, LoadedAdapter)>,
    worn: Choice,
}

impl Model {
    /// Loads base and adapters. The first adapter, if there is one, is what is used where nobody says.
    pub(crate) fn load(options: &ModelOptions, ui: &Ui) -> CommandResult<Self> {
        let config = ModelConfig::load(&options.base)?;
        // Adapters are read first: they are small, and wrong folders are told at once.
        let mut adapters: Vec<(String, LoadedAdapter)> = Vec::new();
        for AdapterFlag { name, folder } in &options.adapters {
            if adapters.iter().any(|(other, _)| other == name) || name == BASE {
                return Err(Error::AdapterName { name: name.clone() }.into());
            }
            let loaded = LoadedAdapter::open(folder, &config)?;
            if !loaded.dropped_keys().is_empty() {
                let keys = loaded.dropped_keys().join(", ");
                ui.warn(format!("`{}` has settings that nothing here knows: {keys}", folder.display()));
            }
            adapters.push((name.clone(), loaded));
        }
        let engine = EngineOptions {
            quantization: options.nf4,
            threads: options.threads,
            recompute: Recompute::Layers,
            ..EngineOptions::new(&options.base, options.max_length.unwrap_or(config.max_positions))
        };
        let engine = Engine::load(engine, &mut |_| {})?;
        for (AdapterFlag { folder, .. }, (_, adapter)) in options.adapters.iter().zip(&adapters) {
            let Some(base) = engine.base_hash() else { continue };
            match adapter.check_base(folder, base) {
                Err(error) if options.force => ui.warn(error.diagnostic().message),
                checked => checked?,
            }
        }
        let mut model = Self { engine, adapters, worn: None };
        model.wear(model.first());
        Ok(model)
    }

    /// The longest row that a model was made for.
    pub(crate) fn context(folder: &Path) -> CommandResult<usize> {
        Ok(ModelConfig::load(folder)?.max_positions)
    }

    /// Tokens that the model knows.
    pub(crate) fn vocabulary(&self) -> usize {
        self.engine.config().vocabulary_size
    }

    /// Positions that the model knows.
    pub(crate) fn positions(&self) -> usize {
        self.engine.config().max_positions
    }

    /// The most virtual tokens that an adapter puts in front of a text.
    pub(crate) fn virtual_tokens(&self) -> usize {
        let counts = self.adapters.iter().map(|(_, adapter)| adapter.fit().layout().virtual_tokens().count());
        counts.max().unwrap_or(0)
    }

    /// What is used where nobody says.
    pub(crate) fn first(&self) -> Choice {
        (!self.adapters.is_empty()).then_some(0)
    }

    /// All adapters, in the order in which they were given.
    pub(crate) fn all(&self) -> impl Iterator<Item = Choice> + use<> {
        (0..self.adapters.len()).map(Some)
    }

    /// The name of what is used.
    pub(crate) fn name(&self, choice: Choice) -> &str {
        choice.map_or(BASE, |index| &self.adapters[index].0)
    }

    /// An adapter by its name; `base` is the bare base.
    pub(crate) fn find(&self, name: &str) -> Result<Choice, Error> {
        if name == BASE {
            return Ok(None);
        }
        let found = self.adapters.iter().position(|(other, _)| other == name);
        found.map(Some).ok_or_else(|| Error::UnknownAdapter {
            name: name.to_owned(),
            known: self.adapters.iter().map(|(name, _)| name.clone()).collect(),
        })
    }

    /// Lays an adapter on the base, which stays where it is.
    fn wear(&mut self, choice: Choice) {
        if let Some(index) = choice.filter(|_| choice != self.worn) {
            self.engine.adapt(self.adapters[index].1.fit().clone());
            self.worn = choice;
        }
    }

    /// Continues prompts together; `listen` hears of each new token.
    pub(crate) fn continue_all(
        &mut self,
        choice: Choice,
        requests: &[Request],
        listen: &mut Listener<'_>,
    ) -> CommandResult<Vec<Continuation>> {
        self.wear(choice);
        let parameters = choice.map(|index| self.adapters[index].1.parameters());
        Ok(self.engine.continue_all(parameters, requests, listen)?)
    }

    /// Continues one prompt; `on_token` hears of each new token and says whether to go on.
    pub(crate) fn generate(
        &mut self,
        choice: Choice,
        request: Request,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> CommandResult<Continuation> {
        let mut listen = |_: usize, id: u32| match on_token(id) {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        };
        let mut ends = self.continue_all(choice, &[request], &mut listen)?;
        ends.pop().ok_or_else(|| Error::Answer { reason: "a prompt had no continuation".to_owned() }.into())
    }

    /// Logits of rows of one length, `[batch, tokens, vocabulary]`.
    pub(crate) fn logits(&mut self, choice: Choice, rows: &[Vec<u32>]) -> CommandResult<Vec<f32>> {
        self.wear(choice);
        let parameters = choice.map(|index| self.adapters[index].1.parameters());
        Ok(self.engine.logits(parameters, rows)?)
    }

    /// Summed loss of each row.
    pub(crate) fn row_losses(&mut self, choice: Choice, rows: &[batch::Row]) -> CommandResult<Vec<f64>> {
        self.wear(choice);
        let parameters = choice.map(|index| self.adapters[index].1.parameters());
        let sums = self.engine.row_losses(parameters, rows)?;
        Ok(sums.into_iter().map(|sum| sum.loss).collect())
    }

    /// Summed loss of all trained tokens, and how many there are.
    pub(crate) fn evaluate(&mut self, choice: Choice, rows: &[batch::Row]) -> CommandResult<(f64, u64)> {
        self.wear(choice);
        let sum = match choice {
            Some(index) => self.engine.evaluate(self.adapters[index].1.parameters(), rows)?,
            None => self.engine.evaluate_base(rows)?,
        };
        Ok((sum.loss, sum.tokens))
    }
}

/// What the bare base is called.
pub(crate) const BASE: &str = "base";

/// A prompt's tokens. Some tokenizers end every text with an end token: nothing would follow it.
pub(crate) fn prompt_ids(tokenizer: &Tokenizer, text: &str, add_special: bool) -> CommandResult<Vec<u32>> {
    let mut ids = tokenizer.encode(text, add_special)?;
    if add_special {
        let end = ids.iter().rposition(|id| Some(*id) != tokenizer.eos()).map_or(ids.len(), |last| last + 1);
        ids.truncate(end);
    }
    Ok(ids)
}

/// How a prompt goes on.
pub(crate) fn sampling(flags: &SamplingFlags, tokenizer: &Tokenizer) -> SamplingOptions {
    SamplingOptions {
        temperature: flags.temperature,
        top_k: flags.top_k,
        top_p: flags.top_p,
        repetition_penalty: flags.repetition_penalty,
        seed: flags.seed,
        max_tokens: flags.max_tokens,
        stop_ids: tokenizer.stop_ids().to_vec(),
    }
}

/// A row in the words of the numeric crate.
pub(crate) fn row(row: Row) -> batch::Row {
    let segments = row
        .segments
        .iter()
        .map(|segment| batch::Segment { sample_id: segment.sample_id, length: segment.length });
    batch::Row { id: row.id, segments: segments.collect(), token_ids: row.token_ids, trained: row.trained }
}
