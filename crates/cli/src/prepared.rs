//! Data prepared for a command's own use, in a folder that goes away with it.

use std::path::{Path, PathBuf};

use shanty_config::JobSpec;
use shanty_coordinator::prepare;
use shanty_data::{Format, PrepareOptions, Prepared, Progress, Row, Split};
use uuid::Uuid;

use crate::{base, failure::CommandResult};

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
    let options = prepare::options(&base::with_folder(spec)?, out.path().to_owned());
    shanty_data::prepare(&options, progress)?;
    let prepared = Prepared::open(out.path())?;
    Ok((out, prepared))
}

/// Tokenises and packs one file, with room for so many virtual tokens in front of every sample; gives its rows, in order.
pub(crate) fn rows_of_file(
    model: &Path,
    data: &str,
    format: Format,
    max_length: usize,
    virtual_tokens: usize,
) -> CommandResult<Vec<Row>> {
    let out = Scratch::new();
    let options = PrepareOptions {
        format,
        max_length: u32::try_from(max_length).unwrap_or(u32::MAX),
        virtual_tokens: u32::try_from(virtual_tokens).unwrap_or(u32::MAX),
        require_end_token: false,
        ..PrepareOptions::new(model, data, out.path())
    };
    shanty_data::prepare(&options, &mut |_| {})?;
    let prepared = Prepared::open(out.path())?;
    let rows = (0..prepared.rows(Split::Train)).map(|id| prepared.row(Split::Train, id));
    Ok(rows.collect::<Result<_, _>>()?)
}
