//! What is trained.
//!
//! [`config`] is PEFT's `adapter_config.json`, [`targets`] decides which modules are adapted, [`layout`] says where each
//! tensor lies in the one flat buffer that is trained, [`files`] writes and reads the folder as PEFT does.

pub mod config;
pub mod files;
pub mod layout;
pub mod lora;
pub mod targets;

pub use config::LoraConfig;
pub use files::AdapterFolder;
pub use layout::{Kind, ParameterEntry, ParameterLayout, Target};
pub use targets::{Matched, TargetModules};
