//! The same prompt, continued by the base and by the adapter.

use std::path::Path;

use serde_json::json;
use shanty_config::JobSpec;
use shanty_data::Tokenizer;
use shanty_peft_core::generate::{Request, SamplingOptions};
use shanty_worker::engine::quantization;

use crate::{
    base,
    failure::CommandResult,
    flags::AdapterFlag,
    model::{Model, ModelOptions, prompt_ids},
    ui::{Paint, Ui, paint},
};

/// What base and adapter make of one prompt.
#[derive(Debug)]
pub(crate) struct Sample {
    prompt: String,
    base: String,
    adapter: String,
}

/// Continues the job's prompt with the base alone and with the adapter.
pub(crate) fn compare(spec: &JobSpec, adapter: &Path, ui: &Ui) -> CommandResult<Sample> {
    let spec = &base::with_folder(spec)?;
    let prompt = spec.sample.prompt.clone().unwrap_or_default();
    let tokenizer = Tokenizer::load(&spec.base.model)?;
    let adapter = AdapterFlag { name: "adapter".to_owned(), folder: adapter.to_owned() };
    let mut model = Model::load(
        &ModelOptions {
            base: spec.base.model.clone(),
            nf4: quantization(spec),
            adapters: vec![adapter],
            force: false,
            threads: 0,
            max_length: None,
        },
        ui,
    )?;
    let request = Request {
        prompt: prompt_ids(&tokenizer, &prompt, true)?,
        options: SamplingOptions {
            temperature: 0.8,
            top_p: Some(0.95),
            seed: spec.train.seed,
            max_tokens: spec.sample.max_tokens,
            stop_ids: tokenizer.stop_ids().to_vec(),
            ..SamplingOptions::default()
        },
    };
    let mut continued = |choice| -> CommandResult<String> {
        let end = model.generate(choice, request.clone(), &mut |_| true)?;
        Ok(tokenizer.decode(&end.tokens, true)?)
    };
    Ok(Sample { base: continued(None)?, adapter: continued(Some(0))?, prompt })
}

impl Sample {
    /// Prints it: text beside text, or one event.
    pub(crate) fn show(&self, ui: &Ui) -> CommandResult<()> {
        if ui.is_json() {
            return ui.json(&json!({
                "event": "sample", "prompt": self.prompt, "base": self.base, "adapter": self.adapter,
            }));
        }
        let color = ui.color_on_stdout();
        for (who, text) in [("base", &self.base), ("adapter", &self.adapter)] {
            ui.line(paint(color, Paint::Bold, &format!("--- {who}")))?;
            ui.line(format!("{}{text}", paint(color, Paint::Dim, &self.prompt)))?;
        }
        ui.line("---")
    }
}
