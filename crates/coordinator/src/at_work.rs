//! A coordinator at work, whatever carries its connections: the machine's task, and the services over it.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::AtomicU64},
};

use shanty_proto::JobId;
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    access::Access,
    engine::{self, Engine, Works},
    error::{Error, Result},
    hub::Hub,
    leases::Leases,
    machine::{self, Event, Machine, StoredJob},
    outside::Outside,
    services::{Jobs, Statuses, Tokens, Workers},
    store::Store,
};

/// The machine as it was left: with the jobs that the store knows.
pub(crate) fn restored(
    protocol: machine::Options,
    seed: [u8; 32],
    stored: Vec<StoredJob>,
    started: Instant,
) -> Machine {
    let mut machine = Machine::new(protocol, seed);
    for job in stored {
        machine.restore(engine::now(started), job);
    }
    machine
}

/// What a machine goes to work with.
pub(crate) struct Beginning {
    pub machine: Machine,
    pub store: Store,
    pub outside: Arc<dyn Outside>,
    pub access: Arc<Access>,
    /// Whether connections are encrypted.
    pub encrypted: bool,
    /// When the machine's clock began.
    pub started: Instant,
    /// Ends the work; also given when the work ends by itself.
    pub stop: CancellationToken,
}

impl Beginning {
    /// Opens the data of jobs that were at work and starts the machine's task, which ends with `stop`.
    pub async fn begin(self) -> Result<(Services, JoinHandle<Result<()>>)> {
        let Self { machine, store, outside, access, encrypted, started, stop } = self;
        let (hub, leases) = (Arc::new(Hub::default()), Arc::new(Leases::new(Arc::clone(&outside))));
        let broken = open_data(&machine, &leases).await;
        for job in machine.views(engine::now(started)) {
            hub.set_status(job);
        }
        let works = Works {
            machine,
            store: store.clone(),
            hub: Arc::clone(&hub),
            leases: Arc::clone(&leases),
            outside,
            access: Arc::clone(&access),
            encrypted,
            started,
        };
        let (engine, task) = engine::build(works);
        for (job, error) in broken {
            engine.tell(Event::DataLost { job, error }).await?;
        }
        let running = tokio::spawn({
            let stop = stop.clone();
            async move {
                let outcome = task.run(stop.clone()).await;
                stop.cancel();
                outcome
            }
        });
        Ok((Services { engine, store, hub, leases, access, stop }, running))
    }
}

/// What became of the machine's task.
pub(crate) async fn ended(running: JoinHandle<Result<()>>) -> Result<()> {
    running.await.unwrap_or(Err(Error::Stopping))
}

/// Opens the prepared data of jobs that were at work; those whose data cannot be opened are given back.
async fn open_data(machine: &Machine, leases: &Leases) -> Vec<(JobId, shanty_diagnostic::Diagnostic)> {
    let mut broken = Vec::new();
    for job in machine.unfinished() {
        let (Some(spec), Some(hash)) = (machine.spec(&job), machine.data_hash(&job)) else { continue };
        leases.allow(&job, machine.leasable(&job));
        if let Err(error) = leases.open(&job, &spec, Some(hash)).await {
            broken.push((job, shanty_diagnostic::Diagnose::diagnostic(&error)));
        }
    }
    broken
}

/// What the services work with, and the services.
pub(crate) struct Services {
    engine: Engine,
    store: Store,
    hub: Arc<Hub>,
    leases: Arc<Leases>,
    pub access: Arc<Access>,
    pub stop: CancellationToken,
}

impl Services {
    /// Jobs, in stores below `runs` where they name none.
    pub fn jobs(&self, runs: PathBuf) -> Jobs {
        Jobs { engine: self.engine.clone(), runs }
    }

    pub fn tokens(&self) -> Tokens {
        Tokens { engine: self.engine.clone(), store: self.store.clone(), access: Arc::clone(&self.access) }
    }

    pub fn statuses(&self) -> Statuses {
        Statuses {
            engine: self.engine.clone(),
            store: self.store.clone(),
            hub: Arc::clone(&self.hub),
            shutdown: self.stop.clone(),
        }
    }

    /// Sessions of workers. Their numbers are this service's, so there is one.
    pub fn into_workers(self) -> Workers {
        Workers {
            engine: self.engine,
            store: self.store,
            hub: self.hub,
            leases: self.leases,
            sessions: Arc::new(AtomicU64::new(0)),
            holders: Arc::default(),
            shutdown: self.stop,
        }
    }
}
