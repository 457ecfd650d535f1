//! The methods that there are, one line each.

use super::{
    adalora::AdaLoraConfig, config::Keys, ia3::Ia3Config, lora::LoraConfig, method::SharedMethod,
    p_tuning::PTuningConfig, prefix_tuning::PrefixTuningConfig, prompt_tuning::PromptTuningConfig,
};
use crate::error::Result;

/// How a method is known to files.
#[derive(Debug, Clone, Copy)]
pub struct Registration {
    /// PEFT's name, for example `LORA`.
    pub peft_type: &'static str,
    /// Reads its `adapter_config.json`.
    pub read: fn(&Keys<'_>) -> Result<SharedMethod>,
}

/// All methods of this crate.
pub const METHODS: &[&Registration] = &[
    &LoraConfig::REGISTRATION,
    &Ia3Config::REGISTRATION,
    &AdaLoraConfig::REGISTRATION,
    &PrefixTuningConfig::REGISTRATION,
    &PromptTuningConfig::REGISTRATION,
    &PTuningConfig::REGISTRATION,
];
