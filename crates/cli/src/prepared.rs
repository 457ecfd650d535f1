//! Data prepared for a command's own use, in a folder that goes away with it.

use std::path::{Path, PathBuf};

use shanty_config::{JobSpec, job};
use shanty_data::{Format, PrepareOptions, Prepared, Progress, Row, Split};
use uuid::Uuid;

use crate::failure::CommandResult;

/// A folder that is removed with all in it when this is dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// A name that nobody uses yet, below the system's folder for temporary files.
    pub(crate) fn new() -> Self {
        Self { path: std::env::temp_dir().join(format!("shanty-{}", Uuid::new_v4().simple())) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // It may not have been made, and nobody can be told here.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Tokenises and packs what a job trains on.
pub(crate) fn of_job(
    spec: &JobSpec,
    progress: &mut dyn FnMut(&Progress),
) -> CommandResult<(Scratch, Prepared)> {
    let out = Scratch::new();
    let options = PrepareOptions {
        model_dir: spec.base.model.clone(),
        train: spec.data.train.clone(),
        eval: spec.data.eval.clone(),
        format: format_of(spec.data.format),
        max_length: u32::try_from(spec.data.max_length).unwrap_or(u32::MAX),
        packing: spec.data.packing,
        virtual_tokens: u32::try_from(spec.adapter.virtual_tokens()).unwrap_or(u32::MAX),
        template_time: None,
        out: out.path().to_owned(),
        threads: 0,
    };
    shanty_data::prepare(&options, progress)?;
    let prepared = Prepared::open(out.path())?;
    Ok((out, prepared))
}

/// Tokenises and packs one file; gives its rows, in order.
pub(crate) fn rows_of_file(
    model: &Path,
    data: &str,
    format: Format,
    max_length: usize,
) -> CommandResult<Vec<Row>> {
    let out = Scratch::new();
    let options = PrepareOptions {
        model_dir: model.to_owned(),
        train: data.to_owned(),
        eval: None,
        format,
        max_length: u32::try_from(max_length).unwrap_or(u32::MAX),
        packing: true,
        virtual_tokens: 0,
        template_time: None,
        out: out.path().to_owned(),
        threads: 0,
    };
    shanty_data::prepare(&options, &mut |_| {})?;
    let prepared = Prepared::open(out.path())?;
    let rows = (0..prepared.rows(Split::Train)).map(|id| prepared.row(Split::Train, id));
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The same form in the words of the data crate.
pub(crate) fn format_of(format: job::Format) -> Format {
    match format {
        job::Format::Auto => Format::Auto,
        job::Format::Text => Format::Text,
        job::Format::PromptCompletion => Format::PromptCompletion,
        job::Format::Messages => Format::Messages,
    }
}
