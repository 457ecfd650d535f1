//! What users do with jobs.

use std::{path::PathBuf, sync::Arc};

use shanty_access::Role;
use shanty_config::JobSpec;
use shanty_proto::v1::{job_service_server::JobService, *};
use tonic::{Request, Response, Status};

use super::{refuse, wire, wire_view};
use crate::{
    access::Caller,
    engine::Engine,
    error::{Error, Result},
    find,
    machine::{Event, Reply},
};

/// The job service.
pub(crate) struct Jobs {
    pub engine: Engine,
    /// Where a job's store lies that names none.
    pub runs: PathBuf,
}

impl Jobs {
    fn spec(&self, json: &str, caller: Option<&Caller>) -> Result<(JobSpec, Arc<str>)> {
        let mut spec: JobSpec = serde_json::from_str(json)
            .map_err(|error| Error::bad(format!("the job file is not understood: {error}")))?;
        // Only who may do everything may say for whom: else anybody could pass for a user who has no workers yet.
        if let Some(caller) = caller.filter(|caller| caller.role != Role::Admin) {
            spec.cluster.owner = Some(caller.identity.to_string());
        }
        if spec.cluster.priority > 100 {
            return Err(Error::bad(format!("a priority of {}: it is from 0 to 100", spec.cluster.priority)));
        }
        let store = spec.checkpoint.store.get_or_insert_with(|| self.runs.join(&spec.name)).clone();
        if spec.checkpoint.is_remote() {
            let folder = spec.checkpoint.run_folder.get_or_insert_with(|| self.runs.join(&spec.name));
            if !folder.is_absolute() {
                let what = format!("the job's run folder `{}` is not absolute", folder.display());
                return Err(Error::bad(what));
            }
        }
        if !store.is_absolute() && !spec.checkpoint.is_remote() {
            let what = format!(
                "the job's store `{}` is not absolute: whose folder would it be below?",
                store.display()
            );
            return Err(Error::bad(what));
        }
        let workers = spec.cluster.workers;
        if workers.min == 0 || workers.max < workers.min {
            let what =
                format!("workers from {} to {}: at least 1, and no fewer at most", workers.min, workers.max);
            return Err(Error::bad(what));
        }
        if spec.train.global_batch_size == 0 || spec.train.steps == Some(0) || spec.train.epochs == 0 {
            return Err(Error::bad("a job without rows or steps"));
        }
        let json = serde_json::to_string(&spec).map_err(Error::bad)?;
        Ok((spec, Arc::from(json)))
    }

    async fn submit(&self, request: SubmitJobRequest, caller: Option<&Caller>) -> Result<SubmitJobResponse> {
        let (spec, spec_json) = self.spec(&request.spec_json, caller)?;
        let (spec, request_id) = (Arc::new(spec), request.request_id);
        let make = move |request| Event::Submit { request, request_id, spec, spec_json };
        match self.engine.ask(make).await? {
            Reply::Submitted(job) => Ok(SubmitJobResponse { job_id: job.into() }),
            other => Err(Error::bad(format!("an answer to something else: {other:?}"))),
        }
    }

    async fn list(&self) -> Result<ListJobsResponse> {
        let views = self.engine.look(|machine, now| machine.views(now)).await?;
        Ok(ListJobsResponse { jobs: views.iter().map(wire_view::summary_out).collect() })
    }

    async fn cancel(&self, request: CancelJobRequest) -> Result<CancelJobResponse> {
        let job = wire::job_id(&request.job_id)?;
        match self.engine.ask(move |request| Event::Cancel { request, job }).await? {
            Reply::Cancelled(state) => Ok(CancelJobResponse { state: wire_view::state_out(state).into() }),
            other => Err(Error::bad(format!("an answer to something else: {other:?}"))),
        }
    }

    async fn resume(&self, request: ResumeJobRequest) -> Result<ResumeJobResponse> {
        let job = wire::job_id(&request.job_id)?;
        let now = match request.spec_json.as_str() {
            "" => None,
            json => Some(serde_json::from_str(json).map_err(Error::bad)?),
        };
        let make = move |request| Event::Resume { request, job, job_file: now };
        match self.engine.ask(make).await? {
            Reply::Resumed { attempt, step, ignored } => {
                let ignored = ignored.into_iter().map(|key| IgnoredKey {
                    key: key.key,
                    submitted: key.submitted,
                    now: key.now,
                });
                Ok(ResumeJobResponse { attempt: attempt.0, step: step.0, ignored: ignored.collect() })
            }
            other => Err(Error::bad(format!("an answer to something else: {other:?}"))),
        }
    }

    async fn drain(&self, request: DrainWorkerRequest) -> Result<DrainWorkerResponse> {
        let worker = shanty_proto::WorkerId::new(request.worker_id).map_err(Error::bad)?;
        match self.engine.ask(move |request| Event::Drain { request, worker }).await? {
            Reply::Draining(job) => {
                Ok(DrainWorkerResponse { job_id: job.map(String::from).unwrap_or_default() })
            }
            other => Err(Error::bad(format!("an answer to something else: {other:?}"))),
        }
    }

    async fn checkpoints(&self, request: ListCheckpointsRequest) -> Result<ListCheckpointsResponse> {
        let job = wire::job_id(&request.job_id)?;
        let known = self.engine.look({
            let job = job.clone();
            move |machine, _| machine.spec(&job)
        });
        let spec = known.await?.ok_or(Error::NoSuchJob { job })?;
        let checkpoints = find::list(&spec).await?;
        Ok(ListCheckpointsResponse {
            checkpoints: checkpoints.iter().map(wire_view::checkpoint_out).collect(),
        })
    }
}

#[tonic::async_trait]
impl JobService for Jobs {
    async fn submit_job(
        &self,
        request: Request<SubmitJobRequest>,
    ) -> Result<Response<SubmitJobResponse>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        self.submit(request.into_inner(), caller.as_ref()).await.map(Response::new).map_err(refuse)
    }

    async fn list_jobs(&self, _: Request<ListJobsRequest>) -> Result<Response<ListJobsResponse>, Status> {
        self.list().await.map(Response::new).map_err(refuse)
    }

    async fn cancel_job(
        &self,
        request: Request<CancelJobRequest>,
    ) -> Result<Response<CancelJobResponse>, Status> {
        self.cancel(request.into_inner()).await.map(Response::new).map_err(refuse)
    }

    async fn resume_job(
        &self,
        request: Request<ResumeJobRequest>,
    ) -> Result<Response<ResumeJobResponse>, Status> {
        self.resume(request.into_inner()).await.map(Response::new).map_err(refuse)
    }

    async fn list_checkpoints(
        &self,
        request: Request<ListCheckpointsRequest>,
    ) -> Result<Response<ListCheckpointsResponse>, Status> {
        self.checkpoints(request.into_inner()).await.map(Response::new).map_err(refuse)
    }

    async fn drain_worker(
        &self,
        request: Request<DrainWorkerRequest>,
    ) -> Result<Response<DrainWorkerResponse>, Status> {
        self.drain(request.into_inner()).await.map(Response::new).map_err(refuse)
    }
}
