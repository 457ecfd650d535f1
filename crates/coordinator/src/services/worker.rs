//! Workers' sessions and leases.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt};
use shanty_data::Split;
use shanty_proto::{
    Attempt, Generation, WorkerId,
    v1::{self, worker_message::Message as In, worker_service_server::WorkerService, *},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{refuse, wire};
use crate::{
    access::Caller,
    engine::{self, Engine},
    error::{Error, Result},
    hub::Hub,
    leases::{LeaseRequest, Leases},
    machine::{Event, Said},
    store::Store,
};

/// Messages that may wait for a worker; one that does not read them is as good as gone.
const WORKER_QUEUE: usize = 256;
/// How long a stream may stay silent before its first message.
const HELLO_WITHIN: Duration = Duration::from_secs(10);

/// The worker service.
#[derive(Clone)]
pub(crate) struct Workers {
    pub engine: Engine,
    pub store: Store,
    pub hub: Arc<Hub>,
    pub leases: Arc<Leases>,
    pub sessions: Arc<AtomicU64>,
    /// Under which identity a worker's streams are up, and how many.
    pub holders: Arc<Holders>,
    pub shutdown: CancellationToken,
}

/// Workers by the identity that they showed: nobody else may speak for them while they are there.
#[derive(Debug, Default)]
pub(crate) struct Holders(Mutex<HashMap<WorkerId, (Arc<str>, usize)>>);

/// A stream of a worker, for as long as it lives.
struct Held {
    holders: Arc<Holders>,
    worker: WorkerId,
}

impl Holders {
    fn hold(self: &Arc<Self>, worker: &WorkerId, identity: &Arc<str>) -> Result<Held> {
        let mut holders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (holder, streams) = holders.entry(worker.clone()).or_insert_with(|| (Arc::clone(identity), 0));
        if holder != identity {
            let what = format!("worker {worker} is here already, under another token or certificate");
            return Err(Error::NotYours { what });
        }
        *streams += 1;
        Ok(Held { holders: Arc::clone(self), worker: worker.clone() })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut holders = self.holders.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, streams)) = holders.get_mut(&self.worker) {
            *streams -= 1;
            if *streams == 0 {
                holders.remove(&self.worker);
            }
        }
    }
}

/// Whoever the guard let in.
fn caller<T>(request: &Request<T>) -> Result<Caller> {
    // The guard puts one on every request that it lets through: without one, nobody stood at the door.
    request.extensions().get().cloned().ok_or(Error::Unauthenticated { what: "nobody asked who it is" })
}

/// Refuses what is about another job than the caller's.
fn require_job(caller: &Caller, job: Option<&str>) -> Result<()> {
    match (&caller.job, job) {
        (Some(only), Some(job)) if only.as_str() != job => {
            Err(Error::NotYours { what: format!("the token is for job {only}, not for `{job}`") })
        }
        _ => Ok(()),
    }
}

type Outgoing = Pin<Box<dyn Stream<Item = Result<CoordinatorMessage, Status>> + Send>>;

#[tonic::async_trait]
impl WorkerService for Workers {
    type SessionStream = Outgoing;

    async fn session(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Outgoing>, Status> {
        let caller = caller(&request).map_err(refuse)?;
        let mut incoming = request.into_inner();
        let (outgoing, receiver) = mpsc::channel(WORKER_QUEUE);
        let this = self.clone();
        // The answer's headers must not wait for the first message, or a client that waits for them waits for ever.
        tokio::spawn(async move {
            if let Err(error) = this.serve(&caller, &mut incoming, outgoing.clone()).await {
                // The worker may be gone already.
                let _ = outgoing.try_send(Err(refuse(error)));
            }
        });
        let told = ReceiverStream::new(receiver).map(|told| told.map(CoordinatorMessage::from));
        Ok(Response::new(Box::pin(told)))
    }

    async fn lease_rows(
        &self,
        request: Request<LeaseRowsRequest>,
    ) -> Result<Response<LeaseRowsResponse>, Status> {
        let caller = caller(&request).map_err(refuse)?;
        require_job(&caller, Some(&request.get_ref().job_id)).map_err(refuse)?;
        self.lease(request.into_inner()).await.map(Response::new).map_err(refuse)
    }
}

impl Workers {
    /// Reads a session to its end.
    async fn serve(
        &self,
        caller: &Caller,
        incoming: &mut Streaming<WorkerMessage>,
        outgoing: engine::Outgoing,
    ) -> Result<()> {
        let first = tokio::time::timeout(HELLO_WITHIN, incoming.message()).await;
        let hello = match first {
            Ok(Ok(Some(WorkerMessage { message: Some(In::Hello(hello)) }))) => hello,
            Ok(Ok(Some(_))) => return Err(Error::bad("the first message of a session must be Hello")),
            Ok(Ok(None) | Err(_)) => return Ok(()),
            Err(_) => return Err(Error::bad(format!("no Hello within {} s", HELLO_WITHIN.as_secs()))),
        };
        require_job(caller, hello.attachment.as_ref().map(|attachment| attachment.job_id.as_str()))?;
        let (worker, mut info, attachment) = wire::hello(hello)?;
        info.only.clone_from(&caller.job);
        let _held = self.holders.hold(&worker, &caller.identity)?;
        let session = self.sessions.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::info!(%worker, host = info.host, pid = info.pid, device = info.device, by = &*caller.identity, "worker connected");
        let event = Event::Hello { worker: worker.clone(), session, info, attachment };
        self.engine.begin(session, outgoing.clone(), event).await?;
        let ended = tokio::select! {
            ended = self.read(caller, incoming, &worker, session) => ended,
            // The machine ended the session, or the worker's side of it is closed.
            () = outgoing.closed() => Ok("its stream broke".to_owned()),
            () = self.shutdown.cancelled() => Err(Error::Stopping),
        };
        let reason = match &ended {
            Ok(reason) => reason.clone(),
            Err(error) => error.to_string(),
        };
        tracing::info!(%worker, reason, "worker disconnected");
        // When the coordinator stops, nobody hears it, and nobody has to.
        let _ = self.engine.tell(Event::Down { worker, session, reason }).await;
        ended.map(drop)
    }

    async fn read(
        &self,
        caller: &Caller,
        incoming: &mut Streaming<WorkerMessage>,
        worker: &WorkerId,
        session: u64,
    ) -> Result<String> {
        loop {
            let message = match incoming.message().await {
                Ok(Some(message)) => message,
                Ok(None) => return Ok("its stream ended".to_owned()),
                Err(status) => return Ok(format!("its stream broke ({})", status.message())),
            };
            require_job(caller, message.message.as_ref().and_then(wire::job_of))?;
            let message = match message.message {
                // A kind of message that a newer worker knows.
                None => continue,
                Some(In::Logs(logs)) => {
                    self.log(worker, logs).await?;
                    continue;
                }
                Some(In::Step(report)) => {
                    let mut report = wire::step_report(report)?;
                    report.leased = self.leases.announcement(&report.within.job, report.step).await?;
                    Said::Step(report)
                }
                Some(other) => wire::said(other)?,
            };
            self.engine.tell(Event::Said { worker: worker.clone(), session, message }).await?;
        }
    }

    async fn log(&self, worker: &WorkerId, logs: LogLines) -> Result<()> {
        let (job, lines) = wire::log_lines(logs, worker)?;
        self.hub.log(&job, &lines);
        self.store.log(job, lines).await
    }

    async fn lease(&self, request: LeaseRowsRequest) -> Result<LeaseRowsResponse> {
        let split = match request.split() {
            v1::Split::Train => Split::Train,
            v1::Split::Eval => Split::Eval,
            v1::Split::Unspecified => return Err(Error::bad("a lease of no split")),
        };
        let request = LeaseRequest {
            job: wire::job_id(&request.job_id)?,
            attempt: Attempt(request.attempt),
            generation: Generation(request.generation),
            split,
            step: request.step,
            row_ids: request.row_ids,
        };
        let (announcement, rows) = self.leases.lease(request).await?;
        Ok(LeaseRowsResponse {
            announcement: Some(wire::announcement_out(announcement)),
            rows: rows.into_iter().map(wire::row_out).collect(),
        })
    }
}
