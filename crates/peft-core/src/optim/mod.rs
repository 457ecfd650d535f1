//! From a summed gradient to the next parameters.
//!
//! A step: [`global_norm`] of the reduced sum times 1 / trained tokens, [`clip_factor`] of that, and
//! [`AdamW::update`] with both factors in one scale and the rate of [`Schedule::learning_rate`].

mod adamw;
mod flat;
mod norm;
mod schedule;

pub use adamw::{AdamW, AdamWOptions, Factors, groups};
pub use flat::{FlatState, FlatUpdate, Outcome, Source, SumPiece};
pub(crate) use flat::{LOSSES, SQUARES};
pub use norm::{clip_factor, global_norm};
pub use schedule::{Schedule, Shape};
