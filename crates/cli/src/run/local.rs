//! A run from its first message to its last.

use std::{
    path::Path,
    pin::pin,
    time::{Duration, Instant},
};

use serde_json::json;
use shanty_access::Secret;
use shanty_config::{JobSpec, Loaded};
use shanty_proto::v1::{
    self, CreateTokenRequest, JobState, JobStatus, JobSummary, ResumeJobRequest, SubmitJobRequest,
};
use shanty_worker::supervisor::shutdown_on_signals;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    LocalOptions,
    crew::{Crew, CrewOptions},
    ending::{end_of_job, tell_result},
    host::Host,
    store::Store,
};
use crate::{
    client::{Client, wire},
    dashboard,
    error::Error,
    failure::{CommandResult, Exit, Failure},
    job_file::{JobFile, short},
    launched::devices,
    progress::{self, Reporter},
    sample,
    ui::Ui,
    watch::Watcher,
};

/// A run of more days than this loses its workers.
const LONGEST_RUN: Duration = Duration::from_secs(365 * 24 * 3600);

/// Whether a run starts or goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begin {
    Anew,
    Resumed,
}

/// A run on this machine.
pub(crate) struct LocalRun<'a> {
    pub(crate) ui: &'a Ui,
    pub(crate) file: &'a JobFile,
    pub(crate) job: &'a Loaded<JobSpec>,
    pub(crate) options: &'a LocalOptions,
    pub(crate) store: Store,
    pub(crate) begin: Begin,
}

/// How the part of a run ended in which the job was worked on.
enum End {
    Over(Box<JobStatus>),
    Interrupted,
    WorkersGone(String),
}

impl LocalRun<'_> {
    /// Runs the job to its end.
    pub(crate) fn execute(mut self) -> CommandResult<Exit> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|source| Error::Start { what: "the runtime", source })?;
        self.store.create()?;
        let result = runtime.block_on(Box::pin(self.serve()));
        // Threads that prepare data or write to disk are not waited for beyond this.
        runtime.shutdown_timeout(Duration::from_secs(1));
        result
    }

    async fn serve(&self) -> CommandResult<Exit> {
        let began = Instant::now();
        let interrupted = shutdown_on_signals()?;
        let host = match Host::start(self.store.state()).await {
            Ok(host) => host,
            Err(failure) => {
                self.forget_if_new();
                return Err(failure);
            }
        };
        let mut crew = None;
        let result = self.work(&host, &mut crew, &interrupted).await;
        if let Some(crew) = &mut crew {
            self.stop(crew).await;
        }
        self.store.remove_address();
        host.stop().await;
        match result? {
            End::Over(status) => self.conclude(&status, began.elapsed().as_secs_f64()),
            End::Interrupted => {
                self.say(&format!("interrupted; go on with: {}", self.file.resume_command()));
                Ok(Exit::Interrupted)
            }
            End::WorkersGone(reason) => Err(Error::WorkersGone { reason }.into()),
        }
    }

    /// Hands the job to the coordinator, starts workers once its data is ready, and watches until one of the ends.
    async fn work(
        &self,
        host: &Host,
        crew: &mut Option<Crew>,
        interrupted: &CancellationToken,
    ) -> CommandResult<End> {
        self.store.write_address(host.address())?;
        dashboard::tell(self.ui, host.address(), host.key());
        let client = host.connect().await?;
        let (job_id, from) = self.begin(&client).await?;
        let mut watcher = Watcher::new(&client, &job_id);
        if let Some((step, status)) = &from {
            watcher.skip(*step, status);
        }
        let mut state = watcher.state();
        let mut reporter = Reporter::new(self.ui);
        let end = {
            let mut following = pin!(watcher.follow(&mut reporter));
            loop {
                tokio::select! {
                    over = &mut following => break End::Over(Box::new(over?)),
                    () = interrupted.cancelled() => break End::Interrupted,
                    (_, how) = next_end(crew) => {
                        if crew.as_ref().is_none_or(Crew::is_gone) {
                            break End::WorkersGone(format!("the last one {how}"));
                        }
                    }
                    Ok(()) = state.changed(), if crew.is_none() => {
                        let now = *state.borrow_and_update();
                        if matches!(now, JobState::Forming | JobState::Running | JobState::Recovering) {
                            let token = worker_token(&client, &job_id).await?;
                            *crew = Some(Crew::start(&self.crew_options(host.address(), token))?);
                        }
                    }
                }
            }
        };
        reporter.finish()?;
        Ok(end)
    }

    /// Submits the job, or resumes the one in the store; gives its id, and where it goes on from.
    async fn begin(&self, client: &Client) -> CommandResult<(String, Option<(u64, JobStatus)>)> {
        if self.begin == Begin::Anew {
            let spec_json = shanty_config::to_json(&self.job.value);
            let request = SubmitJobRequest { request_id: Uuid::new_v4().to_string(), spec_json };
            let answer = client.jobs().submit_job(request).await.map_err(wire)?.into_inner();
            return Ok((answer.job_id, None));
        }
        let job_id = self.job_in_store(client.list().await?)?.job_id;
        let before = client.job_status(&job_id).await?;
        let spec_json = shanty_config::to_json(&self.job.value);
        let request = ResumeJobRequest { job_id: job_id.clone(), spec_json };
        let answer = client.jobs().resume_job(request).await.map_err(wire)?.into_inner();
        for key in &answer.ignored {
            if self.ui.is_json() {
                self.ui.json(&json!({
                    "event": "ignored_edit", "key": key.key, "submitted": key.submitted, "now": key.now,
                }))?;
            }
            self.ui.warn(format!(
                "`{}` is {} in the job file now; the job goes on with {}, as it was submitted",
                key.key, key.now, key.submitted
            ));
        }
        self.say(&match answer.step {
            0 => format!("attempt {}: no checkpoint yet, it starts anew", answer.attempt),
            step => format!("attempt {}: goes on after step {step}", answer.attempt),
        });
        Ok((job_id, Some((answer.step, before))))
    }

    fn job_in_store(&self, jobs: Vec<JobSummary>) -> CommandResult<JobSummary> {
        let store = self.store.root().to_owned();
        let newest = jobs.into_iter().max_by_key(|job| job.submitted_unix_ms);
        let Some(job) = newest else {
            return Err(Error::NothingToResume { store, run: self.file.run_command() }.into());
        };
        if job.state() == JobState::Succeeded {
            return Err(Error::Finished { store, job: job.job_id }.into());
        }
        Ok(job)
    }

    fn crew_options(&self, coordinator: &str, token: Secret) -> CrewOptions {
        let workers = self.job.value.cluster.workers.max;
        CrewOptions {
            coordinator: coordinator.to_owned(),
            token,
            workers,
            threads: self.options.threads_each(workers),
            devices: devices(self.job.value.cluster.device),
            store: self.store.root().to_owned(),
        }
    }

    /// Ends the workers; an interruption while they do so kills them.
    async fn stop(&self, crew: &mut Crew) {
        let again = shutdown_on_signals();
        let kill = match again {
            Ok(again) => tokio::select! {
                () = crew.stop() => false,
                () = again.cancelled() => true,
            },
            Err(_) => {
                crew.stop().await;
                false
            }
        };
        if kill {
            self.say("interrupted again; the workers are killed");
            crew.kill();
        }
    }

    fn conclude(&self, status: &JobStatus, seconds: f64) -> CommandResult<Exit> {
        let mut status = status.clone();
        let uploaded = self.job.value.checkpoint.is_remote() && !status.adapter.is_empty();
        let url = uploaded.then(|| {
            // The workers were on this machine, and left it here too.
            let local = self.store.root().join("adapter").display().to_string();
            std::mem::replace(&mut status.adapter, local)
        });
        let status = &status;
        let result = end_of_job(status);
        if result.is_err() && status.step == 0 && status.checkpoints.is_empty() {
            self.forget_if_new();
        }
        let spec = &self.job.value;
        if status.state() == JobState::Succeeded {
            self.show_sample(spec, Path::new(&status.adapter))?;
        }
        if self.ui.is_json() {
            let mut finished = progress::finished(status, seconds);
            if let (Some(url), Some(object)) = (url, finished.as_object_mut()) {
                object.insert("adapter_url".to_owned(), url.into());
            }
            self.ui.json(&finished)?;
        } else if status.state() == JobState::Succeeded {
            tell_result(self.ui, spec, status, seconds)?;
        }
        result
    }

    fn show_sample(&self, spec: &JobSpec, adapter: &Path) -> CommandResult<()> {
        if spec.sample.prompt.is_none() {
            return Ok(());
        }
        // The adapter is there, whatever becomes of the sample.
        match sample::compare(spec, adapter, self.ui) {
            Ok(sample) => sample.show(self.ui),
            Err(failure) => {
                let why = first_message(&failure);
                self.ui.warn(format!("no sample is shown: {why}"));
                Ok(())
            }
        }
    }

    /// A run that never began leaves nothing behind, so that the corrected job can be run at once.
    fn forget_if_new(&self) {
        if self.begin == Begin::Anew {
            self.store.remove();
        }
    }

    fn say(&self, text: &str) {
        self.ui.always_note(text);
    }
}

/// A token for the workers of one job: it ends with the job.
async fn worker_token(client: &Client, job_id: &str) -> CommandResult<Secret> {
    let request = CreateTokenRequest {
        role: v1::Role::Worker.into(),
        name: "workers of shanty run".to_owned(),
        job_id: job_id.to_owned(),
        lifetime_seconds: LONGEST_RUN.as_secs(),
    };
    let answer = client.access().create_token(request).await.map_err(wire)?.into_inner();
    Ok(Secret::new(&answer.secret))
}

async fn next_end(crew: &mut Option<Crew>) -> (u32, String) {
    match crew {
        Some(crew) => crew.next_end().await,
        None => std::future::pending().await,
    }
}

fn first_message(failure: &Failure) -> String {
    failure.diagnostics().first().map_or_else(String::new, |first| first.message.clone())
}

/// Refuses a run folder that holds a job already.
pub(crate) fn require_free(store: &Store, spec: &JobSpec, file: &JobFile) -> CommandResult<()> {
    if !store.is_taken() {
        return Ok(());
    }
    Err(Error::StoreTaken {
        store: short(store.root()).into(),
        job: spec.name.clone(),
        resume: file.resume_command(),
    }
    .into())
}
