//! The base model's folder: a path, or a model of the Hugging Face hub that is downloaded first.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use shanty_config::{JobSpec, Loaded};
use shanty_diagnostic::Diagnose;
use shanty_remote::hub::{Hub, Missing, ModelId, Progress};

use crate::{failure::CommandResult, format, job_file::at_key, ui::Ui};

/// Without a terminal, progress is told no more often than this.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// What a job's base would have to be downloaded for; nothing where it is here.
pub(crate) fn missing(job: &Loaded<JobSpec>) -> CommandResult<Option<(ModelId, Missing)>> {
    let Some(model) = ModelId::parse(&job.value.base.model) else { return Ok(None) };
    let missing = Hub::from_env().missing(&model);
    let missing = missing.map_err(|error| at_key(job, "base.model", error.diagnostic()))?;
    Ok(missing.map(|missing| (model, missing)))
}

/// Downloads a job's base if it is of the hub and not here, and pins it to its commit, so that all workers and a later
/// attempt train on the same one.
pub(crate) fn fetch(job: &mut Loaded<JobSpec>, ui: &Ui) -> CommandResult<()> {
    let Some(model) = ModelId::parse(&job.value.base.model) else { return Ok(()) };
    let mut line = Line::new(ui, &model.id);
    let snapshot = Hub::from_env().snapshot(&model, &mut |progress| line.show(progress));
    let snapshot = snapshot.map_err(|error| at_key(job, "base.model", error.diagnostic()))?;
    line.end();
    if let Some(doubt) = &snapshot.doubt {
        ui.warn(format!("{doubt}; goes on with what was downloaded before, commit {}", snapshot.commit));
    }
    job.value.base.model = model.at(&snapshot.commit);
    Ok(())
}

/// Pins a job's base to its commit, for workers elsewhere, and brings its small files here, for the checks.
pub(crate) fn pin(job: &mut Loaded<JobSpec>, ui: &Ui) -> CommandResult<()> {
    let Some(model) = ModelId::parse(&job.value.base.model) else { return Ok(()) };
    let snapshot = Hub::from_env().small_files(&model, &mut |_| {});
    let snapshot = snapshot.map_err(|error| at_key(job, "base.model", error.diagnostic()))?;
    if let Some(doubt) = &snapshot.doubt {
        ui.warn(format!("{doubt}; takes the commit of the last download, {}", snapshot.commit));
    }
    job.value.base.model = model.at(&snapshot.commit);
    Ok(())
}

/// The folder of a base as it is named on the command line; downloaded first if it is of the hub and not here.
pub(crate) fn folder_of(named: &Path, ui: &Ui) -> CommandResult<PathBuf> {
    let reference = shanty_config::model_reference(Path::new(""), named);
    if ModelId::parse(&reference).is_none() { Ok(named.to_owned()) } else { local(&reference, ui) }
}

/// The folder of a base as a resolved job names it.
pub(crate) fn local(reference: &Path, ui: &Ui) -> CommandResult<PathBuf> {
    let Some(model) = ModelId::parse(reference) else { return Ok(reference.to_owned()) };
    let mut line = Line::new(ui, &model.id);
    let snapshot = Hub::from_env().snapshot(&model, &mut |progress| line.show(progress))?;
    line.end();
    if let Some(doubt) = &snapshot.doubt {
        ui.warn(format!("{doubt}; goes on with what was downloaded before, commit {}", snapshot.commit));
    }
    Ok(snapshot.folder)
}

/// The same job with its base's folder in place of the hub's name: what reads files takes this. Of a base that is not here
/// as a whole, the small files are brought, and the folder holds those alone.
pub(crate) fn with_folder(spec: &JobSpec) -> CommandResult<JobSpec> {
    let mut spec = spec.clone();
    spec.base.model = shanty_remote::hub::tokenizer_folder(&spec.base.model)?;
    Ok(spec)
}

/// Shows a download: a bar on a terminal, a line now and then elsewhere, events for scripts.
struct Line<'a> {
    ui: &'a Ui,
    model: &'a str,
    bar: Option<ProgressBar>,
    told: Option<Instant>,
    note: Option<String>,
}

impl<'a> Line<'a> {
    fn new(ui: &'a Ui, model: &'a str) -> Self {
        Self { ui, model, bar: None, told: None, note: None }
    }

    fn show(&mut self, progress: &Progress) {
        if progress.files_total == 0 {
            return;
        }
        if self.note != progress.note {
            self.note.clone_from(&progress.note);
            if let Some(note) = &self.note {
                self.say(note);
            }
        }
        if self.ui.is_live() {
            let bar = self.bar.get_or_insert_with(|| bar(self.model));
            bar.set_length(progress.bytes_total);
            bar.set_position(progress.bytes_done);
            return;
        }
        if self.told.is_some_and(|told| told.elapsed() < PLAIN_INTERVAL) {
            return;
        }
        self.told = Some(Instant::now());
        if self.ui.is_json() {
            // A reader that went away is noticed at the next line that matters.
            drop(self.ui.json(&json!({
                "event": "download", "model": self.model, "bytes_done": progress.bytes_done,
                "bytes_total": progress.bytes_total, "files_done": progress.files_done, "files_total": progress.files_total,
            })));
            return;
        }
        self.ui.note(format!(
            "downloads {}: {} of {}, {} of {} files",
            self.model,
            format::bytes(progress.bytes_done),
            format::bytes(progress.bytes_total),
            progress.files_done,
            progress.files_total,
        ));
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.ui.note(text)),
            None => self.ui.note(text),
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn bar(model: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style =
        "{prefix} {wide_bar} {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.set_prefix(format!("downloads {model}"));
    bar
}
