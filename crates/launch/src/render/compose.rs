//! A compose file: one job on one host, in containers.

use serde_json::json;

use super::{File, Job, template};
use crate::Result;

/// What the user says of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compose {
    /// The container image.
    pub image: String,
    /// How many workers.
    pub workers: u32,
    /// GPUs of each.
    pub gpus: Option<u32>,
    /// User and group of the processes, as numbers: those who own the job's files.
    pub user: String,
    /// Folders that containers see at the same path: the job's, its base's, its store's.
    pub folders: Vec<String>,
}

impl Compose {
    /// The compose file.
    ///
    /// # Errors
    /// None that a job can cause.
    pub fn render(&self, job: &Job) -> Result<File> {
        let name = job.name.to_lowercase().replace('.', "-");
        let file = format!("{name}.compose.yaml");
        let folders: Vec<String> = self.folders.iter().map(|folder| format!("{folder}:{folder}")).collect();
        // Compose takes `$` for a variable of its own.
        let dollars = |text: &str| text.replace('$', "$$");
        let text = template::fill(
            "compose",
            include_str!("../../templates/compose.yaml"),
            json!({
                "name": name,
                "file": file,
                "image": self.image,
                "workers": self.workers,
                "gpus": self.gpus,
                "user": self.user,
                "folders": folders,
                "job": dollars(&job.file.display().to_string()),
                "sets": job.overrides.iter().map(|set| dollars(set)).collect::<Vec<_>>(),
            }),
        )?;
        Ok(File::text(file, text))
    }
}
