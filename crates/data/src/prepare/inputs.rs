//! What the prepared folder follows from, with the hashes by which a later run recognises it.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use super::{PrepareOptions, Progress, Report, Stage};
use crate::{
    Error,
    artefact::{InputFile, Inputs},
    source,
};

/// Bytes between two reports of progress.
const CHUNK: usize = 1 << 20;

/// Hashes all data files.
pub(super) fn gather(
    options: &PrepareOptions,
    tokenizer_hash: &str,
    train: &[PathBuf],
    eval: &[PathBuf],
    progress: Report<'_>,
) -> Result<Inputs, Error> {
    let bytes_total = train.iter().chain(eval).map(|path| source::size(path)).sum::<Result<u64, Error>>()?;
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
        train: hash_all(train)?,
        eval: hash_all(eval)?,
    })
}

fn hash(path: &Path, done: &mut dyn FnMut(u64)) -> Result<InputFile, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        let length = file.read(&mut buffer).map_err(failed)?;
        if length == 0 {
            break;
        }
        hasher.update(&buffer[..length]);
        bytes += length as u64;
        done(length as u64);
    }
    Ok(InputFile { path: path.to_owned(), bytes, blake3: hasher.finalize().to_hex().to_string() })
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
