//! Prefix tuning, prompt tuning and p-tuning of a job in the words of the numeric crate, which knows no tokenizer.

use shanty_config::job::{JobSpec, Method, PrefixInit, PromptEncoder, PromptTuningInit};
use shanty_data::Tokenizer;
use shanty_peft_core::adapter::{
    PTuningConfig, PrefixStart, PrefixTuningConfig, PromptEncoder as Encoder, PromptStart,
    PromptTuningConfig, SharedMethod, VirtualTokenConfig,
};

use crate::Error;

/// The method of a job; none where it has no virtual tokens.
pub(super) fn method(spec: &JobSpec) -> Result<Option<SharedMethod>, Error> {
    let adapter = &spec.adapter;
    let base = spec.base.model.display().to_string();
    let common = VirtualTokenConfig::new(Some(base.clone()), adapter.num_virtual_tokens);
    Ok(match adapter.method {
        Method::PrefixTuning => {
            let start = match adapter.prefix_init {
                PrefixInit::Text => PrefixStart::Tokens(tokens(spec, &adapter.prefix_init_text)?),
                PrefixInit::Zero => PrefixStart::Zero,
                PrefixInit::Random => PrefixStart::Random,
            };
            let config = PrefixTuningConfig {
                common,
                prefix_projection: adapter.prefix_projection,
                encoder_hidden_size: adapter.encoder_hidden_size,
                start,
                finished: false,
            };
            Some(config.shared())
        }
        Method::PromptTuning => {
            let start = match adapter.prompt_start() {
                PromptTuningInit::Random => PromptStart::Random,
                PromptTuningInit::SampleVocab => PromptStart::SampleVocab,
                PromptTuningInit::Text => {
                    let text = adapter.prompt_tuning_init_text.clone().unwrap_or_default();
                    let token_ids = tokens(spec, &text)?;
                    PromptStart::Text { text, token_ids, tokenizer: Some(base) }
                }
            };
            Some(PromptTuningConfig { common, start, finished: false }.shared())
        }
        Method::PTuning => {
            let config = PTuningConfig {
                common,
                encoder_reparameterization_type: match adapter.encoder_reparameterization_type {
                    PromptEncoder::Mlp => Encoder::Mlp,
                    PromptEncoder::Lstm => Encoder::Lstm,
                },
                encoder_hidden_size: adapter.encoder_hidden_size,
                encoder_num_layers: adapter.encoder_num_layers,
                encoder_dropout: adapter.encoder_dropout,
                finished: false,
            };
            Some(config.shared())
        }
        _ => None,
    })
}

/// A text's tokens by the base's tokenizer, special ones included, as PEFT takes them.
fn tokens(spec: &JobSpec, text: &str) -> Result<Vec<u32>, Error> {
    Tokenizer::load(&spec.base.model)
        .and_then(|tokenizer| tokenizer.encode(text, true))
        .map_err(|error| Error::part(&error))
}
