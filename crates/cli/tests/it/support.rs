//! What the tests here share.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;
use shanty_testkit::{Finished, Running, Shanty, TinyJob, rows};
use tempfile::TempDir;

/// A folder of its own with a tiny job in it, and the program that runs there.
pub(crate) struct Place {
    pub(crate) folder: TempDir,
    pub(crate) job: TinyJob,
    pub(crate) shanty: Shanty,
}

impl Place {
    /// Writes the job with model and data into a fresh folder.
    pub(crate) fn new(job: TinyJob) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        job.write(folder.path())?;
        let shanty = Shanty::new(env!("CARGO_BIN_EXE_shanty"), folder.path());
        Ok(Self { folder, job, shanty })
    }

    /// Sets a variable for the program and its workers.
    pub(crate) fn environment(mut self, key: &str, value: &str) -> Self {
        self.shanty = self.shanty.environment(key, value);
        self
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.folder.path().join(below)
    }

    /// The folder of the run.
    pub(crate) fn store(&self) -> PathBuf {
        self.path("runs").join(self.job.name)
    }

    /// `shanty run job.toml` on some workers, one thread each, to its end.
    pub(crate) fn run(&self, workers: u32) -> anyhow::Result<Finished> {
        self.start(workers)?.finish()?.expect_code(0)
    }

    /// `shanty run job.toml` on some workers, one thread each.
    pub(crate) fn start(&self, workers: u32) -> anyhow::Result<Running> {
        let workers = workers.to_string();
        self.shanty.start(&["run", "job.toml", "--workers", &workers, "--threads", "1", "--output", "json"])
    }

    /// The finished adapter's folder.
    pub(crate) fn adapter(&self, finished: &Finished) -> anyhow::Result<PathBuf> {
        let last = finished.events().pop().context("nothing was printed")?;
        Ok(self
            .folder
            .path()
            .join(last["adapter"].as_str().with_context(|| format!("no adapter in {last}"))?))
    }

    /// Checks by the workers' own logs that each row was trained exactly once, step by step.
    pub(crate) fn check_exactly_once(&self) -> anyhow::Result<()> {
        let plan = self.shanty.run(&["plan", "job.toml", "--output", "json"])?.expect_code(0)?.object()?;
        let train_rows = plan["rows"].as_u64().context("the plan tells the rows")?;
        let (seed, batch) = (self.job.seed, self.job.global_batch_size as u64);
        rows::check_exactly_once(&self.store(), self.job.steps, |step| {
            shanty_data::order::step_rows(seed, train_rows, batch, step).expect("rows and batch are not 0")
        })
    }
}

/// The last line of a run.
pub(crate) fn last_event(finished: &Finished) -> anyhow::Result<Value> {
    finished.events().pop().context("nothing was printed")
}

/// The loss of the last step.
pub(crate) fn final_loss(finished: &Finished) -> anyhow::Result<f64> {
    finished.losses().last_entry().map(|entry| *entry.get()).context("no step was printed")
}

/// A seed that changes from run to run; whoever uses it prints it.
pub(crate) fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    // One round of splitmix64: neighbouring times give far apart numbers.
    let mixed = (now.as_nanos() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 31)
}

/// Everything below a folder, relative, sorted.
pub(crate) fn listing(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, root: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            found.push(path.strip_prefix(root).unwrap_or(&path).display().to_string());
            if path.is_dir() {
                walk(&path, root, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(folder, folder, &mut found);
    found.sort();
    found
}
