//! The same prompt, continued by the base and by the adapter.

use std::path::Path;

use serde_json::json;
use shanty_config::JobSpec;
use shanty_data::Tokenizer;
use shanty_worker::engine::quantization;

use crate::{
    base,
    failure::CommandResult,
    model::{Model, Sampling},
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
pub(crate) fn compare(spec: &JobSpec, adapter: &Path) -> CommandResult<Sample> {
    let spec = &base::with_folder(spec)?;
    let prompt = spec.sample.prompt.clone().unwrap_or_default();
    let tokenizer = Tokenizer::load(&spec.base.model)?;
    let sampling = Sampling {
        max_tokens: spec.sample.max_tokens,
        temperature: 0.8,
        top_k: None,
        top_p: Some(0.95),
        seed: spec.train.seed,
    };
    let continued = |adapter: Option<&Path>| -> CommandResult<String> {
        let mut model = Model::load(&spec.base.model, quantization(spec), adapter, 0, None)?;
        let ids = model.generate(&tokenizer, &prompt, &sampling, &mut |_| true)?;
        Ok(tokenizer.decode(&ids, true)?)
    };
    Ok(Sample { base: continued(None)?, adapter: continued(Some(adapter))?, prompt })
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
