//! The coordinator for a simulation: its machine, engine, store and services as they are, over connections that the
//! simulation makes, with data and checkpoints that it makes up.

use std::{io, sync::Arc};

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
    at_work::{self, Beginning},
    error::{Error, Result},
    machine,
    outside::Outside,
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
    let beginning = Beginning {
        machine: at_work::restored(protocol, seed, database.jobs()?, started),
        store: Store::inline(&database),
        outside,
        // Who may do what is no matter of schedules: everybody is let in.
        access: Arc::new(Access::new(true, &Limits::default())),
        encrypted: false,
        started,
        stop: shutdown.child_token(),
    };
    let (services, machine_task) = beginning.begin().await?;
    let (access, stop) = (Arc::clone(&services.access), services.stop.clone());
    let served = tonic::transport::Server::builder()
        .layer(Guard { access })
        .add_service(JobServiceServer::new(services.jobs("/runs".into())))
        .add_service(StatusServiceServer::new(services.statuses()))
        .add_service(WorkerServiceServer::new(services.into_workers()))
        .serve_with_incoming_shutdown(incoming, stop.cancelled())
        .await
        .map_err(Error::Serve);
    stop.cancel();
    at_work::ended(machine_task).await.and(served)
}
