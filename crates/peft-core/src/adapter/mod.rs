//! What is trained.
//!
//! [`config`] is PEFT's `adapter_config.json`, [`targets`] decides which modules are adapted, [`layout`] says where each
//! tensor lies in the one flat buffer that is trained, [`files`] writes and reads the folder as PEFT does.

pub mod layout;
pub mod lora;

pub use layout::{Kind, ParameterEntry, ParameterLayout};
