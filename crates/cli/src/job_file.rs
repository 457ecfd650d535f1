//! The job file as commands take it: read, laid under flags, checked, with its warnings shown.

use std::path::{Path, PathBuf};

use shanty_config::{JobSpec, Loaded};
use shanty_diagnostic::Diagnostic;

use crate::{
    failure::{CommandResult, Failure},
    ui::Ui,
};

/// A job file and what overrides it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct JobFile {
    /// The job file
    #[arg(value_name = "JOB.toml")]
    pub(crate) job: PathBuf,
    /// Override a key of the job file, for example train.steps=5; may be given many times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

impl JobFile {
    /// Reads the job file below `--set` and below `more`, and checks the files that it names.
    pub(crate) fn load(&self, more: &[(String, String)], ui: &Ui) -> CommandResult<Loaded<JobSpec>> {
        let job = self.load_unseen(more)?;
        shanty_config::check_files(&job).map_err(|errors| all(&errors))?;
        for warning in &job.warnings {
            ui.warning(warning);
        }
        Ok(job)
    }

    /// Reads the job file below `--set` and below `more`. The files that it names may be on other machines.
    pub(crate) fn load_unseen(&self, more: &[(String, String)]) -> CommandResult<Loaded<JobSpec>> {
        let mut overrides = Vec::with_capacity(self.set.len() + more.len());
        for text in &self.set {
            overrides.push(shanty_config::parse_override(text).map_err(|errors| all(&errors))?);
        }
        overrides.extend_from_slice(more);
        shanty_config::load_job(&self.job, &overrides).map_err(|errors| all(&errors))
    }

    /// As the first task of an array has it.
    #[must_use]
    pub(crate) fn first_task(&self) -> Self {
        Self { job: self.job.clone(), set: self.set.iter().map(|set| set.replace("{task}", "0")).collect() }
    }

    /// The command that resumes this job, as the user would type it.
    pub(crate) fn resume_command(&self) -> String {
        self.command("resume")
    }

    /// The command that runs this job, as the user would type it.
    pub(crate) fn run_command(&self) -> String {
        self.command("run")
    }

    fn command(&self, verb: &str) -> String {
        let mut command = format!("shanty {verb} {}", quote(&self.job.display().to_string()));
        for set in &self.set {
            command.push_str(&format!(" --set {}", quote(set)));
        }
        command
    }
}

/// The run folder of a job on this machine.
pub(crate) fn store_of(spec: &JobSpec) -> PathBuf {
    spec.checkpoint.folder(&spec.name)
}

/// A path as it is shortest from here.
pub(crate) fn short(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(&here).unwrap_or(path).display().to_string()
}

/// A word as a shell takes it.
pub(crate) fn quote(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./=:,+@%".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    if word.contains(['\n', '\t']) {
        let escaped =
            word.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n").replace('\t', "\\t");
        return format!("$'{escaped}'");
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// All that is wrong with a file.
pub(crate) fn all(errors: &shanty_config::Errors) -> Failure {
    Failure::many(errors.diagnostics())
}

/// An error found beyond the job file, shown at the key of the job file that it is about.
pub(crate) fn at_key(job: &Loaded<JobSpec>, key: &str, diagnostic: Diagnostic) -> Failure {
    Failure::from(if diagnostic.file.is_some() { diagnostic } else { job.attach(key, diagnostic) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_can_be_pasted_into_a_shell() {
        assert_eq!(quote("runs/pirate"), "runs/pirate");
        assert_eq!(quote("it's me"), r"'it'\''s me'");
        assert_eq!(quote("ROMEO.\nMy"), r"$'ROMEO.\nMy'");
        assert_eq!(quote(""), "''");
        let job = JobFile { job: "my job.toml".into(), set: vec!["train.steps=5".to_owned()] };
        assert_eq!(job.resume_command(), "shanty resume 'my job.toml' --set train.steps=5");
    }
}
