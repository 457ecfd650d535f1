//! What everybody may look at.

use std::{pin::Pin, sync::Arc};

use futures::Stream;
use shanty_proto::{
    JobId,
    v1::{status_service_server::StatusService, watch_job_response::Update, *},
};
use tokio::sync::{broadcast::error::RecvError, broadcast::error::TryRecvError, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{refuse, wire, wire_view};
use crate::{
    engine::Engine,
    error::{Error, Result},
    hub::{Hub, Watch},
    machine::{JobView, Point, record::JobState},
    store::Store,
};

/// Messages that may wait for a watcher; then it gets no more until it reads.
const WATCHER_QUEUE: usize = 16;
/// Steps of an answer that does not say how many.
const STEPS: u32 = 1000;
/// Most steps of an answer.
const MOST_STEPS: u32 = 100_000;
/// Events of an answer.
const EVENTS: u32 = 5000;
/// Log lines of an answer, before those to come.
const LOG_LINES: u32 = 1000;

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
        Ok(Response::new(GetStatusResponse { status: Some(wire_view::status_out(&view)) }))
    }

    async fn watch_job(
        &self,
        request: Request<WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let (_, watch) = self.begin_watch(&request.get_ref().job_id).map_err(refuse)?;
        let (sender, receiver) = mpsc::channel(WATCHER_QUEUE);
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                // Its end of the stream is closed when the watcher goes.
                () = follow(watch, &sender) => {}
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
        let steps = self.store.steps(view.id, request.from_step, limit).await.map_err(refuse)?;
        Ok(Response::new(ListStepsResponse { steps: steps.iter().map(wire_view::step_out).collect() }))
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
        let TailLogsRequest { job_id, worker_id, follow } = request.into_inner();
        // Begun before the past is read, so that no line falls between the two; one may come twice.
        let (job, watch) = self.begin_watch(&job_id).map_err(refuse)?;
        let past = self.store.logs(job, worker_id.clone(), LOG_LINES).await.map_err(refuse)?;
        let (sender, receiver) = mpsc::channel(WATCHER_QUEUE);
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            let lines = past.into_iter().map(wire_view::log_line_out).collect();
            let sent = sender.send(Ok(TailLogsResponse { lines })).await.is_ok();
            if !(sent && follow) {
                return;
            }
            tokio::select! {
                () = tail(watch, &worker_id, &sender) => {}
                () = shutdown.cancelled() => {}
                () = sender.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// What makes a status worth sending again: state, reason, and who the members are.
fn gist(view: &JobView) -> impl PartialEq + use<> {
    let members: Vec<_> = view
        .members
        .iter()
        .map(|member| (member.worker.clone(), member.rank, member.reason.clone()))
        .collect();
    (view.state, view.reason.clone(), view.attempt, view.generation, members)
}

type Watcher = mpsc::Sender<Result<WatchJobResponse, Status>>;

async fn say(sender: &Watcher, update: Update) -> Option<()> {
    sender.send(Ok(WatchJobResponse { update: Some(update) })).await.ok()
}

fn update(point: &Point) -> Update {
    match point {
        Point::Step(step) => Update::Step(wire_view::step_out(step)),
        Point::Evaluation(evaluation) => Update::Evaluation(wire_view::evaluation_out(evaluation)),
        Point::Checkpoint(checkpoint) => Update::Checkpoint(wire_view::checkpoint_out(checkpoint)),
        Point::Event(event) => Update::Event(wire_view::event_out(event)),
    }
}

/// Sends a job's status and points until it has ended, or the watcher is gone. A watcher that reads slowly misses
/// points (the channel of points overwrites its oldest), never the last status.
async fn follow(watch: Watch, sender: &Watcher) {
    let _ = follow_to_the_end(watch, sender).await;
}

async fn follow_to_the_end(mut watch: Watch, sender: &Watcher) -> Option<()> {
    let mut last = watch.status.borrow_and_update().clone();
    say(sender, Update::Status(wire_view::status_out(&last))).await?;
    while !last.state.is_final() {
        tokio::select! {
            biased;
            point = watch.points.recv() => match point {
                Ok(point) => say(sender, update(&point)).await?,
                // It missed some: it gets where the job is now instead.
                Err(RecvError::Lagged(_)) => {
                    last = watch.status.borrow_and_update().clone();
                    if !last.state.is_final() {
                        say(sender, Update::Status(wire_view::status_out(&last))).await?;
                    }
                }
                Err(RecvError::Closed) => return None,
            },
            changed = watch.status.changed() => {
                changed.ok()?;
                let now = watch.status.borrow_and_update().clone();
                let is_news = gist(&now) != gist(&last);
                last = now;
                if is_news && !last.state.is_final() {
                    say(sender, Update::Status(wire_view::status_out(&last))).await?;
                }
            }
        }
    }
    loop {
        match watch.points.try_recv() {
            Ok(point) => say(sender, update(&point)).await?,
            Err(TryRecvError::Lagged(_)) => {}
            Err(TryRecvError::Empty | TryRecvError::Closed) => break,
        }
    }
    say(sender, Update::Status(wire_view::status_out(&last))).await
}

/// Sends a job's log lines until it has ended, or the watcher is gone.
async fn tail(mut watch: Watch, worker: &str, sender: &mpsc::Sender<Result<TailLogsResponse, Status>>) {
    loop {
        let ended = JobState::is_final(watch.status.borrow_and_update().state);
        let lines = tokio::select! {
            biased;
            lines = watch.logs.recv() => match lines {
                Ok(lines) => lines,
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return,
            },
            // Workers send their last lines after the end; a moment later nobody does.
            () = tokio::time::sleep(std::time::Duration::from_secs(1)), if ended => return,
            changed = watch.status.changed(), if !ended => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        let wanted = lines.iter().filter(|line| worker.is_empty() || line.worker == worker);
        let lines: Vec<LogLine> = wanted.cloned().map(wire_view::log_line_out).collect();
        if !lines.is_empty() && sender.send(Ok(TailLogsResponse { lines })).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use shanty_proto::{Attempt, Generation, Step};

    use super::*;
    use crate::machine::{Event as MachineEvent, Machine, Moment, Options, record::StepRecord};

    fn view() -> JobView {
        let json = r#"{"name": "pirate", "base": {"model": "/b"}, "adapter": {}, "data": {"train": "/d"}}"#;
        let mut machine = Machine::new(Options::default(), [0; 32]);
        let submit = MachineEvent::Submit {
            request: 1,
            request_id: "r".to_owned(),
            spec: Arc::new(serde_json::from_str(json).expect("a job file")),
            spec_json: Arc::from(json),
        };
        machine.apply(Moment::default(), submit);
        machine.views(Moment::default()).remove(0)
    }

    fn step(number: u64) -> Point {
        Point::Step(StepRecord {
            step: Step(number),
            attempt: Attempt(1),
            generation: Generation(1),
            loss: 1.0,
            learning_rate: 1.0,
            gradient_norm: 1.0,
            tokens: 1,
            tokens_per_second: 1.0,
            workers: 1,
            unix_ms: 1,
            skipped: false,
        })
    }

    #[tokio::test]
    async fn a_slow_watcher_misses_points_but_never_the_end() {
        let hub = Hub::default();
        let running = view();
        hub.set_status(running.clone());
        let (sender, mut receiver) = mpsc::channel(1);
        let watch = hub.watch(&running.id).expect("the job is there");
        let following = tokio::spawn(async move { follow(watch, &sender).await });
        for number in 1..=5000 {
            hub.publish(&running.id, step(number));
            // The watcher's task runs, and waits for somebody to read.
            tokio::task::yield_now().await;
        }
        hub.set_status(JobView { state: JobState::Succeeded, step: Step(5000), ..running });
        let (mut steps, mut statuses) = (Vec::new(), Vec::new());
        while let Some(response) = receiver.recv().await {
            match response.expect("no error").update.expect("an update") {
                Update::Step(step) => steps.push(step.step),
                Update::Status(status) => statuses.push((status.state(), status.step)),
                other => panic!("{other:?}"),
            }
        }
        following.await.expect("it ends by itself");
        assert!(steps.len() < 600, "{} steps waited for the watcher", steps.len());
        assert!(steps.is_sorted() && steps.last() == Some(&5000), "the newest are among them");
        assert_eq!(statuses.last(), Some(&(shanty_proto::v1::JobState::Succeeded, 5000)));
    }
}
