//! How the members of a generation come to sum with each other: links over TCP first, NCCL beside them where it can be.

use shanty_collective::{
    AbortHandle, Collective, Error as Broken,
    nccl::{self, Device, Libraries},
};
use shanty_config::job;
use tracing::{info, warn};

use crate::Error;

use super::{
    Stop, Surroundings,
    formation::{Formation, JOIN_WITHIN},
    job::Job,
    start,
};

/// Joins the generation. All members come to the same choice: the job's wish is the same everywhere, and what they have
/// they tell each other over the links.
pub(super) fn join(
    around: &Surroundings,
    job: &Job,
    formation: &Formation,
    abort: AbortHandle,
) -> Result<Box<dyn Collective>, Stop> {
    let broken = |error: Broken| start::broken(around, formation, &error);
    let cluster = &job.plan.spec.cluster;
    let options = formation.join_options(&job.plan.job_id, cluster);
    let mut links = around.listener.join(&options, abort.clone()).map_err(broken)?;
    // Alone there is nothing to sum.
    if cluster.collective == job::Collective::Tcp || formation.world_size() == 1 {
        return Ok(Box::new(links));
    }
    if cluster.collective == job::Collective::Auto && formation.must_be_secret(cluster) {
        if formation.rank == 0 && job.engine.card().is_some() {
            info!(
                "workers sum their gradients over encrypted TCP: NCCL encrypts nothing; `collective = \"nccl\"` does without"
            );
        }
        return Ok(Box::new(links));
    }
    let device = device(job);
    match nccl::agree(&mut links, device.as_ref(), JOIN_WITHIN).map_err(broken)? {
        Ok(()) => {}
        Err(reason) if cluster.collective == job::Collective::Nccl => {
            return Err(Error::part(&reason).into());
        }
        Err(reason) => {
            if formation.rank == 0 && job.engine.card().is_some() {
                warn!(%reason, "workers sum their gradients over TCP");
            }
            return Ok(Box::new(links));
        }
    }
    let device = device.map_err(broken)?;
    let options = nccl::JoinOptions { generation: formation.generation, deadline: JOIN_WITHIN };
    match nccl::start(links, &device, &options, abort) {
        Ok(collective) => {
            if formation.rank == 0 {
                info!(version = device.nccl_version(), "workers sum their gradients with NCCL");
            }
            Ok(Box::new(collective))
        }
        // What NCCL calls a wrong use stays one however often it is tried.
        Err(error @ Broken::Nccl { is_usage: true, .. }) => Err(Error::part(&error).into()),
        Err(error) => Err(broken(error)),
    }
}

/// The card that the engine computes on, with NCCL; or why there is none.
fn device(job: &Job) -> Result<Device, Broken> {
    match job.engine.card() {
        Some(card) => Device::open(card, &Libraries::of_the_system()),
        None => Err(Broken::Refused { wish: "NCCL", reason: "this worker computes on the CPU".to_owned() }),
    }
}
