//! What is trained.
//!
//! [`method`] is the trait that a method of adaptation implements, [`branch`] what it puts beside a module in a pass;
//! one file is one method ([`lora`], …), and [`registry`] names them all. [`targets`] decides which modules are adapted,
//! [`fit`] fits a method to a model, [`layout`] says where each tensor lies in the one flat buffer that is trained,
//! [`config`] and [`files`] read and write the folder as PEFT does.

pub mod branch;
pub mod config;
pub mod files;
pub mod fit;
pub mod layout;
pub mod lora;
pub mod method;
pub mod registry;
pub mod targets;

pub use branch::{BranchScratch, EmbeddingBranch, EmbeddingSite, LinearBranch, LinearSite, PassDropout};
pub use files::AdapterFolder;
pub use fit::{Branches, Fit};
pub use layout::{ParameterEntry, ParameterLayout};
pub use lora::LoraConfig;
pub use method::{
    AnyMethod, Method, MethodOn, Needs, Rate, Reparameterisation, Role, SharedMethod, Start, StepHook,
    Tensor, VirtualTokens,
};
pub use registry::Registration;
pub use targets::{Matched, TargetModules};
