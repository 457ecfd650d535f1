//! What is trained.
//!
//! [`method`] is the trait that a method of adaptation implements, [`branch`] what it puts beside a module in a pass;
//! one file (or folder) is one method ([`lora`], [`ia3`], [`adalora`]), and [`registry`] names them all. [`select`] and [`targets`] decide which modules are adapted,
//! [`fit`] fits a method to a model, [`layout`] says where each tensor lies in the one flat buffer that is trained,
//! [`config`] and [`files`] read and write the folder as PEFT does.

pub mod adalora;
pub mod branch;
pub mod config;
pub mod files;
pub mod fit;
pub mod ia3;
pub mod layout;
pub mod lora;
pub mod method;
pub mod networks;
pub mod p_tuning;
pub mod prefix_tuning;
pub mod prompt_tuning;
pub mod registry;
pub mod select;
pub mod targets;
pub mod virtual_tokens;

pub use adalora::AdaLoraConfig;
pub use branch::{BranchScratch, EmbeddingBranch, EmbeddingSite, LinearBranch, LinearSite, PassDropout};
pub use files::AdapterFolder;
pub use fit::{Branches, Fit};
pub use ia3::Ia3Config;
pub use layout::{ParameterEntry, ParameterLayout};
pub use lora::{Bias, LoraConfig, LoraStart};
pub use method::{
    AnyMethod, Method, MethodOn, ModuleStart, Needs, Rate, Reparameterisation, Role, SavedTensor,
    SharedMethod, Start, StepHook, Tensor,
};
pub use p_tuning::{PTuningConfig, PromptEncoder};
pub use prefix_tuning::{PrefixStart, PrefixTuningConfig};
pub use prompt_tuning::{PromptStart, PromptTuningConfig};
pub use registry::Registration;
pub use select::Selection;
pub use targets::{Matched, TargetModules};
pub use virtual_tokens::VirtualTokenConfig;
