//! What lies outside of the coordinator: the data that is prepared, and the checkpoints that workers write.
//!
//! In production these are files and a child process (`Files`); a simulation brings its own.

use std::{ffi::OsString, pin::Pin, sync::Arc};

use shanty_config::JobSpec;
use shanty_data::{Prepared, Row, Split};
use shanty_diagnostic::Diagnostic;
use shanty_proto::{JobId, Step};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Result},
    find, leases,
    machine::record::{CheckpointRecord, DataFacts},
    prepare,
};

/// Something that takes a while.
pub type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Gets words for people as something goes on.
pub type Progress = Box<dyn FnMut(String) + Send>;

/// The newest checkpoint that can be used, and what is wrong with newer ones.
pub type Found = (Option<CheckpointRecord>, Vec<String>);

/// What lies outside of the coordinator.
pub trait Outside: Send + Sync + 'static {
    /// Prepares a job's data.
    fn prepare(
        &self,
        spec: Arc<JobSpec>,
        stop: CancellationToken,
        progress: Progress,
    ) -> Later<Result<DataFacts, Diagnostic>>;

    /// Opens what was prepared.
    fn open(&self, spec: &JobSpec) -> Later<Result<Box<dyn Rows>>>;

    /// Finds a job's newest good checkpoint; none beyond the step `up_to`.
    fn newest_good(
        &self,
        job: JobId,
        spec: Arc<JobSpec>,
        data_hash: Option<String>,
        up_to: Option<Step>,
    ) -> Later<Result<Found>>;
}

/// A job's prepared rows.
pub trait Rows: Send + Sync + 'static {
    /// What they amount to.
    fn facts(&self) -> DataFacts;

    /// Whether looking one up takes no time, so that it need not be done elsewhere.
    fn are_at_hand(&self) -> bool;

    /// Trained tokens of a row.
    ///
    /// # Errors
    /// If there is no such row, or it cannot be read.
    fn trained_tokens(&self, split: Split, id: u64) -> Result<u32>;

    /// A row.
    ///
    /// # Errors
    /// As [`Self::trained_tokens`].
    fn row(&self, split: Split, id: u64) -> Result<Row>;
}

/// Files, and the child process that prepares them.
pub(crate) struct Files {
    pub prepare_command: Vec<OsString>,
}

impl Outside for Files {
    fn prepare(
        &self,
        spec: Arc<JobSpec>,
        stop: CancellationToken,
        progress: Progress,
    ) -> Later<Result<DataFacts, Diagnostic>> {
        let command = self.prepare_command.clone();
        Box::pin(async move {
            let request = prepare::options(&spec, leases::prepared_folder(&spec));
            prepare::run(&command, &request, &stop, progress).await
        })
    }

    fn open(&self, spec: &JobSpec) -> Later<Result<Box<dyn Rows>>> {
        let folder = leases::prepared_folder(spec);
        Box::pin(async move {
            let opened = tokio::task::spawn_blocking(move || Prepared::open(&folder)).await;
            let prepared = opened.map_err(|_| Error::Stopping)??;
            Ok(Box::new(prepared) as Box<dyn Rows>)
        })
    }

    fn newest_good(
        &self,
        job: JobId,
        spec: Arc<JobSpec>,
        data_hash: Option<String>,
        up_to: Option<Step>,
    ) -> Later<Result<Found>> {
        Box::pin(async move { find::newest_good(&job, &spec, data_hash, up_to).await })
    }
}

impl Rows for Prepared {
    fn facts(&self) -> DataFacts {
        prepare::facts(self.summary())
    }

    fn are_at_hand(&self) -> bool {
        false
    }

    fn trained_tokens(&self, split: Split, id: u64) -> Result<u32> {
        Ok(Prepared::trained_tokens(self, split, id)?)
    }

    fn row(&self, split: Split, id: u64) -> Result<Row> {
        Ok(Prepared::row(self, split, id)?)
    }
}
