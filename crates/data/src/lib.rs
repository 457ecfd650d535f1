//! Sources, chat templates, masks, tokenisation, packing, and the global order of rows.
//!
//! [`prepare()`] reads JSON Lines or Parquet once, tokenises in parallel, packs samples into rows and writes them to
//! a hashed folder in bounded memory. [`Prepared`] reads rows from it by number. [`order`] says which
//! rows a step trains. [`Tokenizer`] is also what generation uses.

#![expect(clippy::single_range_in_vec_init, reason = "a list of trained ranges often holds one range")]

mod artefact;
mod error;
mod form;
mod format;
pub mod fuzz;
mod mix;
pub mod order;
mod pack;
mod prepare;
mod question;
mod row;
mod sample;
mod source;
mod summary;
mod tokenizer;

pub use crate::{
    artefact::Prepared,
    error::{Error, Place},
    format::{Format, TemplateUse, TrainOn},
    mix::MixPart,
    prepare::{
        Looked, PrepareOptions, Progress, Stage, Survey, TrainData, TrainSource, check_first, look, prepare,
        survey,
    },
    question::{Question, questions},
    row::{Row, SampleSource, Segment, Split},
    summary::{Dropped, Example, LengthBucket, SourceSummary, SplitSummary, Summary},
    tokenizer::{Encoded, Message, Rendered, Tokenizer},
};
