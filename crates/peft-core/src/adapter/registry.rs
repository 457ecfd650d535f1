//! The methods that there are, one line each.

use super::{config::Keys, lora::LoraConfig, method::SharedMethod};
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
pub const METHODS: &[&Registration] = &[&LoraConfig::REGISTRATION];
