//! A whole run on this machine: a coordinator in this process, workers as children, and someone who watches.

pub(crate) mod crew;
pub(crate) mod ending;
pub(crate) mod host;
pub(crate) mod local;
pub(crate) mod store;

use std::path::PathBuf;

/// How many workers, how strong, and where the coordinator keeps its state.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct LocalOptions {
    /// Worker processes to start; `cluster.workers.max` of the job file when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) workers: Option<u32>,

    /// Threads a worker computes with; the cores divided among the workers when absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) threads: Option<u16>,

    /// Where the coordinator keeps its state; `coordinator` in the run folder when absent
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
}

impl LocalOptions {
    /// Threads of each of `workers` workers.
    pub(crate) fn threads_each(&self, workers: u32) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.threads.map_or_else(|| (cores / workers.max(1) as usize).max(1), usize::from)
    }

    /// What the flags change in the job file.
    pub(crate) fn overrides(&self) -> Vec<(String, String)> {
        let workers = self.workers.map(|workers| ("cluster.workers.max".to_owned(), workers.to_string()));
        workers.into_iter().collect()
    }
}
