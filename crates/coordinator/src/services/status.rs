//! What everybody may look at.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::Stream;
use shanty_proto::{
    JobId,
    v1::{status_service_server::StatusService, *},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{
    refuse,
    watch::{self, Pulses},
    wire, wire_view,
};
use crate::{
    engine::Engine,
    error::{Error, Result},
    hub::{Hub, Watch},
    machine::JobView,
    store::{LogFilter, Store},
};

/// Messages that may wait for a watcher; then it gets no more until it reads.
const WATCHER_QUEUE: usize = 16;
/// Steps of an answer that does not say how many.
const STEPS: u32 = 1000;
/// Most steps of an answer.
const MOST_STEPS: u32 = 100_000;
/// Events of an answer.
const EVENTS: u32 = 5000;
/// Log lines of an answer that does not say how many, before those to come.
const LOG_LINES: u32 = 1000;
/// Most log lines of the past.
const MOST_LOG_LINES: u32 = 10_000;
/// Pulses come no faster.
const LEAST_PULSE_MS: u32 = 250;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The status service.
pub(crate) struct Statuses {
    pub engine: Engine,
    pub store: Store,
    pub hub: Arc<Hub>,
    pub shutdown: CancellationToken,
}

impl Statuses {
    async fn view(&self, text: &str) -> Result<JobView> {
        let job = wire::job_id(text)?;
        let look = {
            let job = job.clone();
            self.engine.look(move |machine, now| machine.view(now, &job))
        };
        look.await?.ok_or(Error::NoSuchJob { job })
    }

    fn begin_watch(&self, text: &str) -> Result<(JobId, Watch)> {
        let job = wire::job_id(text)?;
        let watch = self.hub.watch(&job).ok_or_else(|| Error::NoSuchJob { job: job.clone() })?;
        Ok((job, watch))
    }
}

#[tonic::async_trait]
impl StatusService for Statuses {
    type WatchJobStream = Answers<WatchJobResponse>;
    type TailLogsStream = Answers<TailLogsResponse>;

    async fn get_status(
        &self,
        request: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusResponse>, Status> {
        let view = self.view(&request.get_ref().job_id).await.map_err(refuse)?;
        Ok(Response::new(GetStatusResponse { status: Some(self.hub.facts.status_out(&view)) }))
    }

    async fn watch_job(
        &self,
        request: Request<WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let (job, watch) = self.begin_watch(&request.get_ref().job_id).map_err(refuse)?;
        let pulses = request.get_ref().pulse_every_ms.map(|every| {
            Pulses::new(
                self.engine.clone(),
                job,
                watch.facts.clone(),
                Duration::from_millis(every.max(LEAST_PULSE_MS).into()),
            )
        });
        let (sender, receiver) = mpsc::channel(WATCHER_QUEUE);
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                // Its end of the stream is closed when the watcher goes.
                () = watch::follow(watch, pulses, &sender) => {}
                () = shutdown.cancelled() => drop(sender.try_send(Err(refuse(Error::Stopping)))),
                () = sender.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn list_steps(
        &self,
        request: Request<ListStepsRequest>,
    ) -> Result<Response<ListStepsResponse>, Status> {
        let request = request.into_inner();
        let view = self.view(&request.job_id).await.map_err(refuse)?;
        let limit = if request.limit == 0 { STEPS } else { request.limit.min(MOST_STEPS) };
        let range = request.from_step..=request.to_step.unwrap_or(u64::MAX);
        let (steps, one_of) = self.store.steps(view.id, range, limit).await.map_err(refuse)?;
        Ok(Response::new(ListStepsResponse {
            steps: steps.iter().map(wire_view::step_out).collect(),
            one_of,
        }))
    }

    async fn list_events(
        &self,
        request: Request<ListEventsRequest>,
    ) -> Result<Response<ListEventsResponse>, Status> {
        let view = self.view(&request.get_ref().job_id).await.map_err(refuse)?;
        let events = self.store.events(view.id, EVENTS).await.map_err(refuse)?;
        Ok(Response::new(ListEventsResponse { events: events.iter().map(wire_view::event_out).collect() }))
    }

    async fn tail_logs(
        &self,
        request: Request<TailLogsRequest>,
    ) -> Result<Response<Self::TailLogsStream>, Status> {
        let TailLogsRequest { job_id, worker_id, follow, level, text, limit } = request.into_inner();
        let limit = if limit == 0 { LOG_LINES } else { limit.min(MOST_LOG_LINES) };
        let filter = LogFilter::new(worker_id, &level, &text, limit).map_err(refuse)?;
        // Begun before the past is read, so that no line falls between the two; one may come twice.
        let (job, watch) = self.begin_watch(&job_id).map_err(refuse)?;
        let past = self.store.logs(job, filter.clone()).await.map_err(refuse)?;
        let (sender, receiver) = mpsc::channel(WATCHER_QUEUE);
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let lines = past.into_iter().map(wire_view::log_line_out).collect();
            let sent = sender.send(Ok(TailLogsResponse { lines, missed: 0 })).await.is_ok();
            if !(sent && follow) {
                return;
            }
            tokio::select! {
                () = watch::tail(watch, &filter, &sender) => {}
                () = shutdown.cancelled() => {}
                () = sender.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn get_configuration(
        &self,
        request: Request<GetConfigurationRequest>,
    ) -> Result<Response<GetConfigurationResponse>, Status> {
        let job = wire::job_id(&request.get_ref().job_id).map_err(refuse)?;
        let look = {
            let job = job.clone();
            self.engine.look(move |machine, _| machine.configuration(&job))
        };
        let known = look.await.map_err(refuse)?.ok_or_else(|| refuse(Error::NoSuchJob { job }))?;
        Ok(Response::new(wire_view::configuration_out(&known)))
    }
}
