//! Looking at data without preparing it: figures, single records, and an early check.

use std::ops::Range;

use super::{
    PrepareOptions, Report, pool,
    split::{Built, SourceFiles, SplitBuilder},
};
use crate::{Error, Place, Split, SplitSummary, Tokenizer};

/// What a split amounts to, also where a job would refuse it.
#[derive(Debug)]
pub struct Survey {
    /// Its figures.
    pub summary: SplitSummary,
    /// What a user should know before training on it.
    pub warnings: Vec<String>,
    /// Why a job would refuse it as a whole.
    pub refusal: Option<Error>,
}

/// A record, as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Looked {
    /// Where it stands.
    pub place: Place,
    /// `kept`; `truncated` or `cut` (into samples) where it is longer than a row; `empty`, `no_answer`, `unweighted` or
    /// `truncated_away` where it is left out.
    pub what: String,
    /// All of its tokens, before anything is cut.
    pub token_ids: Vec<u32>,
    /// Positions that are targets, ascending and disjoint.
    pub trained: Vec<Range<u32>>,
}

/// Figures of a split, of at most so many records of each source. Writes nothing.
///
/// # Errors
/// As [`prepare`](super::prepare) for single records; what is wrong with the split as a whole is in [`Survey::refusal`].
pub fn survey(
    options: &PrepareOptions,
    split: Split,
    records: u64,
    progress: Report<'_>,
) -> Result<Survey, Error> {
    options.check()?;
    let tokenizer = Tokenizer::load_at(&options.model_dir, options.template_time)?;
    let threads = pool(options.threads)?;
    let mut builder = SplitBuilder::new(options, &tokenizer, split, None);
    let saw_all = builder.run(&threads, &sources(options, split)?, records, progress)?;
    let (Built { summary, warnings, .. }, refusal) = builder.survey()?;
    // What only all records can tell is not said of some.
    let refusal = refusal.filter(|_| saw_all);
    let warnings = if saw_all { warnings } else { Vec::new() };
    Ok(Survey { summary, warnings, refusal })
}

/// Looks at the first records of all data, at most so many of each source, as [`prepare`](super::prepare) would: what it
/// refuses in them is refused here, ahead of a job. Writes nothing; gives warnings.
///
/// # Errors
/// As [`prepare`](super::prepare); what only all records can tell (that none has a token to train, or none an end token) only if
/// these were all.
pub fn check_first(options: &PrepareOptions, records: u64) -> Result<Vec<String>, Error> {
    let mut warnings = Vec::new();
    for split in [Split::Train, Split::Eval] {
        if split == Split::Eval && options.eval.is_none() {
            continue;
        }
        let survey = survey(options, split, records, &mut |_| {})?;
        if let Some(refusal) = survey.refusal {
            return Err(refusal);
        }
        warnings.extend(survey.warnings);
    }
    Ok(warnings)
}

/// Some records of a split, by their numbers from 0 over all its sources, ascending.
///
/// # Errors
/// As [`prepare`](super::prepare) for these records.
pub fn look(options: &PrepareOptions, split: Split, records: &[u64]) -> Result<Vec<Looked>, Error> {
    options.check()?;
    let tokenizer = Tokenizer::load_at(&options.model_dir, options.template_time)?;
    SplitBuilder::new(options, &tokenizer, split, None).look(&sources(options, split)?, records)
}

fn sources(options: &PrepareOptions, split: Split) -> Result<Vec<SourceFiles>, Error> {
    match split {
        Split::Train => options.train.0.iter().map(|source| SourceFiles::find(options, source)).collect(),
        Split::Eval => options.eval.iter().map(|path| SourceFiles::find_eval(options, path)).collect(),
    }
}
