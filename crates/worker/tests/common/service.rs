//! The wire side of the coordinator for tests: sessions, beats and leases.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use shanty_data::order::{Order, row_hash};
use shanty_proto::v1::{worker_service_server::WorkerService, *};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

pub use coordinator_message::Message as ToWorker;
pub use worker_message::Message as FromWorker;

pub const SEED: u64 = 5;

/// The job of a test.
#[derive(Debug, Clone)]
pub struct Job {
    pub train_rows: u64,
    pub eval_rows: u64,
    pub batch: u64,
    pub steps: u64,
    pub eval_every: u64,
    pub checkpoint_every: u64,
    pub store: PathBuf,
    pub attempt: u32,
    pub learning_rate: f64,
    /// `[cluster]`
    pub cluster: serde_json::Value,
}

impl Job {
    /// 12 steps of 5 rows over 23 rows: two and a half epochs with short last batches.
    pub fn new(store: PathBuf) -> Self {
        Self {
            train_rows: 23,
            eval_rows: 7,
            batch: 5,
            steps: 12,
            eval_every: 4,
            checkpoint_every: 5,
            store,
            attempt: 1,
            learning_rate: 0.05,
            cluster: serde_json::json!({}),
        }
    }

    pub fn order(&self) -> Order {
        Order::new(SEED, self.train_rows, self.batch).unwrap()
    }

    pub(super) fn assign(&self) -> Assign {
        let spec = serde_json::json!({
            "name": "test", "cluster": self.cluster, "base": {"model": "none"}, "adapter": {}, "data": {"train": "none"},
            "train": {
                "global_batch_size": self.batch, "seed": SEED, "eval_every_steps": self.eval_every,
                "learning_rate": self.learning_rate, "max_grad_norm": 1.0,
            },
            "checkpoint": {"store": self.store, "every_steps": self.checkpoint_every, "keep": 9},
        });
        let spec: shanty_config::JobSpec = serde_json::from_value(spec).unwrap();
        Assign {
            job_id: "test-1".to_owned(),
            attempt: self.attempt,
            spec_json: shanty_config::to_json(&spec),
            data: Some(DataSummary {
                hash: "data".to_owned(),
                train_rows: self.train_rows,
                eval_rows: self.eval_rows,
                steps: self.steps,
                ..DataSummary::default()
            }),
            ..Assign::default()
        }
    }
}

/// A row of either split: 3 to 6 tokens, so that rows weigh differently.
pub fn row(split: Split, id: u64) -> Row {
    let length = 3 + (id % 4) as u32;
    let offset = if split == Split::Eval { 1000 } else { 0 };
    Row {
        id,
        token_ids: (0..length).map(|token| token + id as u32 + offset).collect(),
        segments: vec![Segment { sample_id: id, length }],
        trained: vec![1, length],
    }
}

#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "few of them wait at a time")]
pub enum Event {
    Connected(String),
    Said(String, FromWorker),
    Gone(String),
}

/// What the service and the test share.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) streams:
        HashMap<String, (UnboundedSender<Result<CoordinatorMessage, Status>>, CancellationToken)>,
    pub(super) hellos: HashMap<String, Hello>,
    /// The running generation and its members; reconnecting members of it are attached.
    pub(super) generation: u64,
    pub(super) members: Vec<String>,
    pub(super) credit: Option<u64>,
    pub(super) credit_ms: u32,
    /// While set, streams are refused and rows are not to be had.
    pub(super) away: bool,
    /// Announce one row too many for this step.
    pub(super) lie_at: Option<u64>,
}

#[derive(Clone)]
pub(super) struct Service {
    pub(super) shared: Arc<Mutex<Shared>>,
    pub(super) events: UnboundedSender<Event>,
    pub(super) job: Job,
}

#[tonic::async_trait]
impl WorkerService for Service {
    type SessionStream = UnboundedReceiverStream<Result<CoordinatorMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        if self.shared.lock().unwrap().away {
            return Err(Status::unavailable("away"));
        }
        let mut inbound = request.into_inner();
        let (sender, receiver) = unbounded_channel();
        let service = self.clone();
        tokio::spawn(async move {
            let Some(Ok(WorkerMessage { message: Some(FromWorker::Hello(hello)) })) = inbound.next().await
            else {
                return;
            };
            let worker = hello.worker_id.clone();
            let cut = CancellationToken::new();
            let welcome = {
                let mut shared = service.shared.lock().unwrap();
                let attached = hello.attachment.as_ref().is_some_and(|one| {
                    one.generation == shared.generation && shared.members.contains(&worker)
                });
                shared.hellos.insert(worker.clone(), hello);
                shared.streams.insert(worker.clone(), (sender.clone(), cut.clone()));
                Welcome { beat_interval_ms: 50, credit_ms: shared.credit_ms, attached }
            };
            send(&sender, ToWorker::Welcome(welcome));
            let _ = service.events.send(Event::Connected(worker.clone()));
            loop {
                let message = tokio::select! {
                    message = inbound.next() => message,
                    () = cut.cancelled() => {
                        let _ = sender.send(Err(Status::unavailable("cut")));
                        None
                    }
                };
                let Some(Ok(WorkerMessage { message: Some(message) })) = message else { break };
                if let FromWorker::Beat(beat) = message {
                    let shared = service.shared.lock().unwrap();
                    let ours =
                        beat.attachment.as_ref().is_some_and(|one| one.generation == shared.generation);
                    let credit = shared.credit.filter(|_| ours).map(|up_to_step| Credit {
                        generation: shared.generation,
                        up_to_step,
                        ..Credit::default()
                    });
                    send(&sender, ToWorker::BeatAck(BeatAck { sequence: beat.sequence, credit }));
                    continue;
                }
                let _ = service.events.send(Event::Said(worker.clone(), message));
            }
            service.shared.lock().unwrap().streams.remove(&worker);
            let _ = service.events.send(Event::Gone(worker));
        });
        Ok(Response::new(UnboundedReceiverStream::new(receiver)))
    }

    async fn lease_rows(
        &self,
        request: Request<LeaseRowsRequest>,
    ) -> Result<Response<LeaseRowsResponse>, Status> {
        let request = request.into_inner();
        let lie = {
            let shared = self.shared.lock().unwrap();
            if shared.away {
                return Err(Status::unavailable("away"));
            }
            shared.lie_at == Some(request.step)
        };
        let all = match request.split() {
            Split::Eval => (0..self.job.eval_rows).collect(),
            _ => self.job.order().step_rows(request.step),
        };
        let split = request.split();
        let tokens: u64 = all.iter().map(|id| u64::from(row(split, *id).trained[1]) - 1).sum();
        let announcement = Announcement {
            tokens: tokens + u64::from(lie),
            rows: all.len() as u64,
            row_hash: all.iter().map(|id| row_hash(*id)).fold(0, u64::wrapping_add),
        };
        let rows = request.row_ids.iter().map(|id| row(split, *id)).collect();
        Ok(Response::new(LeaseRowsResponse { announcement: Some(announcement), rows }))
    }
}

pub(super) fn send(sender: &UnboundedSender<Result<CoordinatorMessage, Status>>, message: ToWorker) {
    let _ = sender.send(Ok(CoordinatorMessage { message: Some(message) }));
}
