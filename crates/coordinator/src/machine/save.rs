//! A checkpoint because a user wants one.

use shanty_proto::{JobId, WorkerId};

use super::{
    Machine,
    effect::{Effect, Message, Refusal, Reply},
    event::Moment,
    job::{Job, Phase},
};

impl Machine {
    /// A user wants a checkpoint of what a job has trained so far. Not durable: a coordinator that is killed forgets it.
    pub(super) fn checkpoint_now(&mut self, now: Moment, request: u64, id: &JobId) {
        let outcome = self.with_job(id, |machine, job| {
            let is_at_work = match &job.phase {
                Phase::Running | Phase::Leaving(_) => true,
                Phase::Forming(_) => job.formed,
                _ => false,
            };
            if !is_at_work {
                let (job, state) = (job.id.clone(), job.state());
                return Err(Refusal::WrongState { job, action: "write a checkpoint of", state });
            }
            let after = job.watermark;
            job.health.save_after = Some(after);
            machine.note(
                now,
                job,
                "checkpoint_asked",
                format!("a user wants one; {after} steps are applied"),
            );
            let members: Vec<WorkerId> = job.crew.staying().map(|member| member.worker.clone()).collect();
            for worker in members {
                machine.ask_to_save(job, &worker);
            }
            Ok(Reply::CheckpointAsked(after))
        });
        let outcome = outcome.unwrap_or_else(|| Err(Refusal::NoSuchJob(id.clone())));
        self.effects.push(Effect::Reply { request, outcome });
    }

    /// Tells a member of the newest generation of the wish, if there is one.
    pub(super) fn ask_to_save(&mut self, job: &Job, worker: &WorkerId) {
        if job.health.save_after.is_some() && matches!(job.phase, Phase::Running) {
            let (attempt, generation) = (job.attempt, job.generation_number());
            self.send(worker, Message::Save { job: job.id.clone(), attempt, generation });
        }
    }
}
