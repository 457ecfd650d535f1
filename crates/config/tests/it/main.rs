//! A job file from text to typed value, and every way in which it can be wrong.

mod layers;
mod properties;
mod reference;
mod rendered;
mod services;
mod wrong_files;

use std::path::{Path, PathBuf};

use shanty_config::{Errors, JobSpec, Loaded, load_job_with};

/// A folder with a model, data and a job file.
pub(crate) struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let bench = Self { folder };
        bench.write("model/config.json", r#"{"model_type": "llama", "max_position_embeddings": 512}"#);
        bench.write("model/tokenizer.json", "{}");
        bench.write("model/model.safetensors", "");
        bench.write("data/a.jsonl", "{\"text\": \"heave away\"}\n");
        bench
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        let folder = path.parent().expect("it lies in a folder");
        std::fs::create_dir_all(folder).expect("create the folder");
        std::fs::write(&path, bytes).expect("write the file");
        path
    }

    /// Loads a job file of this text with no other layer.
    pub(crate) fn load(&self, text: impl AsRef<[u8]>) -> Result<Loaded<JobSpec>, Errors> {
        self.load_with(text, &[], &[])
    }

    pub(crate) fn load_with(
        &self,
        text: impl AsRef<[u8]>,
        environment: &[(&str, &str)],
        flags: &[(&str, &str)],
    ) -> Result<Loaded<JobSpec>, Errors> {
        let path = self.write("job.toml", text);
        load_job_with(&path, owned(environment), &owned(flags))
    }
}

pub(crate) fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// A right job file; line numbers matter to no test that uses it.
pub(crate) const GOOD: &str = r#"
name = "pirate"
[base]
model = "model"
[data]
train = "data/*.jsonl"
max_length = 256
[train]
steps = 10
"#;
