//! Reads, tokenises, packs and writes, ahead of the first step.

mod inputs;
mod split;

use std::{path::Path, path::PathBuf};

use rayon::{ThreadPool, ThreadPoolBuilder};

use self::split::SplitBuilder;
use crate::{
    Error, Format, Prepared, Split, Summary, Tokenizer,
    artefact::{self, Folder, Inputs, MANIFEST, Manifest, content_hash},
    source,
};

/// What to prepare, and where to.
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    /// The model folder: tokenizer and chat template.
    pub model_dir: PathBuf,
    /// Training data: a path or a glob.
    pub train: String,
    /// Held-out data: a path or a glob.
    pub eval: Option<String>,
    /// Form of the rows.
    pub format: Format,
    /// Longest row, tokens; at least 2.
    pub max_length: u32,
    /// Whether several samples share a row.
    pub packing: bool,
    /// Virtual tokens that an adapter puts in front of every sample; they count towards `max_length`.
    pub virtual_tokens: u32,
    /// The time that chat templates see as now, in seconds since the Unix epoch (UTC). Absent: templates have no clock
    /// (`strftime_now` is undefined, and templates fall back to the date that they carry), so that the
    /// same data gives the same tokens on every day.
    pub template_time: Option<i64>,
    /// The folder to write. Created, reused if it holds the same already, replaced if it holds other prepared data.
    pub out: PathBuf,
    /// Threads for tokenising; 0: one a core.
    pub threads: usize,
}

/// How far [`prepare`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// What it does.
    pub stage: Stage,
    /// Bytes of input behind it, in this stage.
    pub bytes_done: u64,
    /// Bytes of input in this stage.
    pub bytes_total: u64,
    /// Samples made so far, in this stage.
    pub samples: u64,
}

/// What [`prepare`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Hashes the input files, to see whether the folder holds what they give.
    Hashing,
    /// The folder holds what is asked for; it is used as it is. Last.
    Reused,
    /// The folder cannot be used (the text says why); it is made anew.
    Damaged(String),
    /// Tokenises and packs a split.
    Tokenising(Split),
    /// The folder is complete. Last.
    Done,
}

impl Progress {
    fn of(stage: Stage) -> Self {
        Self { stage, bytes_done: 0, bytes_total: 0, samples: 0 }
    }
}

/// What is called with [`Progress`].
pub(crate) type Report<'a> = &'a mut dyn FnMut(&Progress);

/// Prepares data: writes the folder `options.out`, or finds it there already.
///
/// Input is read in batches, tokenised in parallel and written as rows fill; memory does not grow with it. The folder
/// appears when it is complete, by a rename; nothing is left behind after an error.
///
/// # Errors
/// Anything wrong with input, tokenizer or template, with file and line.
pub fn prepare(options: &PrepareOptions, progress: &mut dyn FnMut(&Progress)) -> Result<Summary, Error> {
    if options.max_length < 2u32.saturating_add(options.virtual_tokens) {
        let reason = match options.virtual_tokens {
            0 => "a row needs two tokens: one to predict from, one to predict".to_owned(),
            count => format!(
                "a row needs two tokens besides its {count} virtual ones: one to predict from, one to predict"
            ),
        };
        return Err(Error::Impossible { option: "max_length", reason });
    }
    if !may_write(&options.out)? {
        let reason = "it holds other files, which are not touched".to_owned();
        return Err(Error::NotPrepared { path: options.out.clone(), reason });
    }
    let tokenizer = Tokenizer::load_at(&options.model_dir, options.template_time)?;
    let train = source::expand(&options.train)?;
    let eval = match &options.eval {
        Some(pattern) => source::expand(pattern)?,
        None => Vec::new(),
    };
    let inputs = inputs::gather(options, tokenizer.hash(), &train, &eval, progress)?;
    if let Some(summary) = reusable(&options.out, &inputs, progress) {
        progress(&Progress::of(Stage::Reused));
        return Ok(summary);
    }

    let threads = pool(options.threads)?;
    let folder = Folder::create(&options.out)?;
    let mut files = Vec::new();
    let mut warnings = Vec::new();
    let mut build = |split: Split, paths: &[PathBuf]| {
        let builder = SplitBuilder::new(options, &tokenizer, split, paths)?;
        let built = builder.run(&threads, folder.path(), progress)?;
        files.extend(built.files);
        warnings.extend(built.warnings);
        Ok::<_, Error>(built.summary)
    };
    let train_summary = build(Split::Train, &train)?;
    let eval_summary = if eval.is_empty() { None } else { Some(build(Split::Eval, &eval)?) };
    inputs::check_unchanged(&inputs)?;

    let summary = Summary {
        hash: content_hash(&inputs, &files),
        tokenizer_hash: tokenizer.hash().to_owned(),
        max_length: options.max_length,
        packing: options.packing,
        train: train_summary,
        eval: eval_summary,
        warnings,
    };
    folder.complete(&Manifest::new(inputs, files, summary.clone()))?;
    progress(&Progress::of(Stage::Done));
    Ok(summary)
}

/// Whether `out` is not there yet or holds files of prepared data alone: anything else is somebody's.
fn may_write(out: &Path) -> Result<bool, Error> {
    let failed = |source| Error::Write { path: out.to_owned(), source };
    if !out.exists() {
        return Ok(true);
    }
    if !out.is_dir() {
        return Ok(false);
    }
    for entry in out.read_dir().map_err(failed)? {
        if !artefact::is_ours(&entry.map_err(failed)?.file_name()) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The figures of what `out` holds, if that is whole and of the same inputs.
fn reusable(out: &Path, inputs: &Inputs, progress: Report<'_>) -> Option<Summary> {
    if !out.join(MANIFEST).exists() {
        return None;
    }
    let opened = Prepared::open(out).and_then(|prepared| {
        let is_same = prepared.manifest().inputs == *inputs;
        if is_same {
            prepared.verify()?;
        }
        Ok(is_same.then(|| prepared.summary().clone()))
    });
    opened.unwrap_or_else(|source| {
        progress(&Progress::of(Stage::Damaged(source.to_string())));
        None
    })
}

fn pool(threads: usize) -> Result<ThreadPool, Error> {
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("tokenise-{index}"))
        .build()
        .map_err(|source| Error::Impossible { option: "threads", reason: source.to_string() })
}
