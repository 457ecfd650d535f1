//! What workers say of their devices: told to whoever looks, of no use to the machine.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shanty_proto::{
    WorkerId,
    v1::{self, DeviceFacts},
};

use crate::{machine::JobView, services::wire_view};

/// The newest that each worker said. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts(Arc<Mutex<HashMap<String, DeviceFacts>>>);

impl Facts {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, DeviceFacts>> {
        // A map of whole entries is whole after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What all workers say.
    pub fn all(&self) -> HashMap<String, DeviceFacts> {
        self.lock().clone()
    }

    /// Takes what a worker says; none when it is gone.
    pub fn set(&self, worker: &WorkerId, facts: Option<DeviceFacts>) {
        match facts {
            Some(facts) => drop(self.lock().insert(worker.to_string(), facts)),
            None => drop(self.lock().remove(worker.as_str())),
        }
    }

    /// Adds to members what they say.
    fn dress(&self, members: &mut [v1::Member]) {
        let facts = self.lock();
        for member in members {
            member.facts = facts.get(&member.worker_id).cloned();
        }
    }

    /// A job's status as it travels.
    pub fn status_out(&self, view: &JobView) -> v1::JobStatus {
        let mut status = wire_view::status_out(view);
        self.dress(&mut status.members);
        status
    }

    /// A job's pulse as it travels.
    pub fn pulse_out(&self, view: &JobView, unix_ms: u64) -> v1::Pulse {
        let mut pulse = wire_view::pulse_out(view, unix_ms);
        self.dress(&mut pulse.members);
        pulse
    }
}
