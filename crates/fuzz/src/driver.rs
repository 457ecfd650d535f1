//! Fuzzing on a stable toolchain: seeded mutations of the corpus, without feedback from coverage.

use std::{
    fs,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    Target, check,
    mutate::{Random, mutate},
};

/// Inputs are no longer.
const LONGEST: usize = 16 << 10;
/// One input takes no longer: an endless loop otherwise.
const SLOWEST: Duration = Duration::from_secs(5);
/// Inputs that were found interesting and are changed further, at most.
const POOL: usize = 4096;

/// What a run came to.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Inputs that were run.
    pub inputs: u64,
    /// The longest time of one.
    pub slowest: Duration,
}

/// Files of a corpus, sorted by name.
///
/// # Errors
/// The folder or a file cannot be read.
pub fn corpus(folder: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    paths.sort();
    paths.into_iter().map(|path| Ok((path.clone(), fs::read(path)?))).collect()
}

/// Runs `target` for `time`: first its corpus, then changes of it. An input that breaks it is written below `artefacts`.
///
/// # Errors
/// An input broke the target, or files cannot be read or written.
pub fn run(target: &Target, seed: u64, time: Duration, artefacts: &Path) -> Result<Outcome> {
    let mut pool: Vec<Vec<u8>> =
        corpus(&crate::corpus(target))?.into_iter().map(|(_, bytes)| bytes).collect();
    let mut outcome = Outcome { inputs: 0, slowest: Duration::ZERO };
    for input in pool.clone() {
        one(target, &input, artefacts, &mut outcome)?;
    }
    pool.push(Vec::new());
    let mut random = Random::new(seed);
    let begun = Instant::now();
    while begun.elapsed() < time {
        let mut input = pool[random.below(pool.len())].clone();
        mutate(&mut random, &mut input, &pool, target.words, LONGEST);
        one(target, &input, artefacts, &mut outcome)?;
        // Changes pile up: without a view of coverage, some are kept at random.
        if random.below(64) == 0 {
            if pool.len() < POOL {
                pool.push(input);
            } else {
                let place = random.below(pool.len());
                pool[place] = input;
            }
        }
    }
    Ok(outcome)
}

fn one(target: &Target, input: &[u8], artefacts: &Path, outcome: &mut Outcome) -> Result<()> {
    let begun = Instant::now();
    let whole = panic::catch_unwind(AssertUnwindSafe(|| check(target, input))).is_ok();
    let taken = begun.elapsed();
    outcome.inputs += 1;
    outcome.slowest = outcome.slowest.max(taken);
    if whole && taken <= SLOWEST {
        return Ok(());
    }
    let folder = artefacts.join(target.name);
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("broken-{}", outcome.inputs));
    fs::write(&path, input)?;
    let what = if whole { format!("took {taken:?}") } else { "panicked".to_owned() };
    bail!("{} {what} on {}", target.name, path.display());
}
