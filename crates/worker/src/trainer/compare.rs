//! Whether all ranks hold the same adapter.

use shanty_proto::v1::{Diverged, MemberPhase, worker_message::Message};
use tracing::error;

use super::{Stop, start, step::Generation};

/// Bytes of an adapter's hash.
const HASH: usize = 32;

impl Generation<'_> {
    /// Compares the adapters of all ranks. If they differ, all ranks say so and wait to be asked to leave: the coordinator
    /// has those in the minority take the others' state.
    pub(super) fn compare(&mut self, applied: u64) -> Result<(), Stop> {
        let world_size = self.formation.members.len();
        if world_size == 1 {
            return Ok(());
        }
        let Some(state) = &self.job.state else { return Ok(()) };
        let own = state.adapter_digest(&*self.job.engine)?;
        let mut all = vec![0u8; HASH * world_size];
        self.around.control.set_phase(MemberPhase::Reducing);
        self.collective
            .all_gather(own.as_bytes(), &mut all)
            .map_err(|error| start::broken(self.around, &self.formation, &error))?;
        let hashes = all.as_chunks::<HASH>().0;
        if hashes.iter().all(|hash| hash == own.as_bytes()) {
            return Ok(());
        }
        let hashes: Vec<String> =
            hashes.iter().map(|hash| blake3::Hash::from_bytes(*hash).to_hex().to_string()).collect();
        error!(step = applied, ?hashes, "the adapters of the ranks differ");
        self.around.report(Message::Diverged(Diverged {
            job_id: self.job.plan.job_id.clone(),
            attempt: self.job.plan.attempt,
            generation: self.formation.generation,
            step: applied,
            hashes,
        }));
        Err(Stop::Interrupted)
    }
}
