//! The coordinator for a simulation: its machine, engine, store and services as they are, over connections that the
//! simulation makes, with data and checkpoints that it makes up.

use std::{
    io,
    sync::{Arc, atomic::AtomicU64},
};

use futures::Stream;
use shanty_proto::v1::{
    job_service_server::JobServiceServer, status_service_server::StatusServiceServer,
    worker_service_server::WorkerServiceServer,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::{
    access::{Access, Limits, guard::Guard},
    engine::{self, Works},
    error::{Error, Result},
    hub::Hub,
    leases::Leases,
    machine::{self, Event, Machine},
    outside::Outside,
    server::open_data,
    services::{Jobs, Statuses, Workers},
    store::{Database, Store},
};

/// What a simulated coordinator stands in.
pub struct Surroundings {
    /// What outlives it.
    pub database: Database,
    /// Data and checkpoints.
    pub outside: Arc<dyn Outside>,
    /// Time-outs and bounds of the step protocol.
    pub protocol: machine::Options,
    /// The secret of the machine.
    pub seed: [u8; 32],
}

/// Serves `incoming` connections until `shutdown`, as [`Coordinator::serve`](crate::Coordinator::serve) does.
///
/// # Errors
/// [`Error::Serve`], or what made the store fail.
pub async fn serve<I, C>(surroundings: Surroundings, incoming: I, shutdown: CancellationToken) -> Result<()>
where
    I: Stream<Item = io::Result<C>>,
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    C::ConnectInfo: Clone + Send + Sync + 'static,
{
    let Surroundings { database, outside, protocol, seed } = surroundings;
    let started = Instant::now();
    let mut machine = Machine::new(protocol, seed);
    for job in database.jobs()? {
        machine.restore(engine::now(started), job);
    }
    let (hub, leases) = (Arc::new(Hub::default()), Arc::new(Leases::new(Arc::clone(&outside))));
    let broken = open_data(&machine, &leases).await;
    for job in machine.views(engine::now(started)) {
        hub.set_status(job);
    }
    let store = Store::inline(&database);
    // Who may do what is no matter of schedules: everybody is let in.
    let access = Arc::new(Access::new(true, &Limits::default()));
    let works = Works {
        machine,
        store: store.clone(),
        hub: Arc::clone(&hub),
        leases: Arc::clone(&leases),
        outside,
        access: Arc::clone(&access),
        encrypted: false,
        started,
    };
    let (engine, task) = engine::build(works);
    for (job, error) in broken {
        engine.tell(Event::DataLost { job, error }).await?;
    }
    let stop = shutdown.child_token();
    let machine_task = tokio::spawn({
        let stop = stop.clone();
        async move {
            let outcome = task.run(stop.clone()).await;
            stop.cancel();
            outcome
        }
    });
    let jobs = Jobs { engine: engine.clone(), runs: "/runs".into() };
    let statuses = Statuses {
        engine: engine.clone(),
        store: store.clone(),
        hub: Arc::clone(&hub),
        shutdown: stop.clone(),
    };
    let workers = Workers {
        engine,
        store,
        hub,
        leases,
        sessions: Arc::new(AtomicU64::new(0)),
        holders: Arc::default(),
        shutdown: stop.clone(),
    };
    let served = tonic::transport::Server::builder()
        .layer(Guard { access })
        .add_service(JobServiceServer::new(jobs))
        .add_service(StatusServiceServer::new(statuses))
        .add_service(WorkerServiceServer::new(workers))
        .serve_with_incoming_shutdown(incoming, stop.cancelled())
        .await
        .map_err(Error::Serve);
    stop.cancel();
    machine_task.await.unwrap_or(Err(Error::Stopping)).and(served)
}
