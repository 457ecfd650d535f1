//! An adapter's folder as it lies on disk, whatever its method: looked at, compared, renamed, combined.
//!
//! Here settings are JSON and tensors have names; what a method makes of them is [`crate::adapter`]'s business. Names are
//! kept in PEFT's way while at work, in whatever way the file has them ([`keys`]).

pub mod combine;
pub mod compare;
pub mod convert;
pub mod keys;
pub mod stored;
mod svd;

pub use combine::{Combination, combine};
pub use compare::{Difference, ModuleChange, compare, module_changes};
pub use convert::{KeyStyle, Renaming, convert_keys, rename};
pub use stored::{StoredAdapter, StoredTensor};
