//! What the prepared folder follows from, with the hashes by which a later run recognises it.

use std::path::{Path, PathBuf};

use super::{PrepareOptions, Progress, Report, SourceFiles, Stage};
use crate::{
    Error,
    artefact::{InputFile, Inputs, Recipe},
    source,
};

/// Hashes all data files.
pub(super) fn gather(
    options: &PrepareOptions,
    tokenizer_hash: &str,
    train: &[SourceFiles],
    eval: &[SourceFiles],
    progress: Report<'_>,
) -> Result<Inputs, Error> {
    let files = |sources: &[SourceFiles]| sources.iter().flat_map(|source| source.files.clone()).collect();
    let (train, eval): (Vec<PathBuf>, Vec<PathBuf>) = (files(train), files(eval));
    let bytes_total = train.iter().chain(&eval).map(|path| source::size(path)).sum::<Result<u64, Error>>()?;
    let mut report = Progress { stage: Stage::Hashing, bytes_done: 0, bytes_total, samples: 0 };
    let mut hash_all = |paths: &[PathBuf]| {
        paths
            .iter()
            .map(|path| {
                hash(path, &mut |bytes| {
                    report.bytes_done += bytes;
                    progress(&report);
                })
            })
            .collect::<Result<Vec<_>, Error>>()
    };
    Ok(Inputs {
        tokenizer_hash: tokenizer_hash.to_owned(),
        format: options.format,
        max_length: options.max_length,
        packing: options.packing,
        virtual_tokens: options.virtual_tokens,
        template_time: options.template_time,
        recipe: Recipe {
            train_on: options.train_on,
            chat_template: options.chat_template,
            require_end_token: options.require_end_token,
            sources: options.train.0.clone(),
        },
        train: hash_all(&train)?,
        eval: hash_all(&eval)?,
    })
}

fn hash(path: &Path, done: &mut dyn FnMut(u64)) -> Result<InputFile, Error> {
    let source::Identity { bytes, version } = source::identify(path, done)?;
    Ok(InputFile { path: path.to_owned(), bytes, blake3: version })
}

/// Refuses data files that changed while they were read: their hashes would not be those of what was tokenised.
pub(super) fn check_unchanged(inputs: &Inputs) -> Result<(), Error> {
    for input in inputs.train.iter().chain(&inputs.eval) {
        if hash(&input.path, &mut |_| {})? != *input {
            let source = std::io::Error::other("it changed while it was read");
            return Err(Error::Read { path: input.path.clone(), source });
        }
    }
    Ok(())
}
