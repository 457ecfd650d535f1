//! What is due between two steps: evaluation, checkpoint, and the end.

use std::sync::Arc;

use shanty_checkpoint::{Key, Snapshot};
use shanty_proto::v1::{EvaluationReport, Finished, MemberPhase, worker_message::Message};
use tracing::info;

use crate::{Error, adapter_folder, rows::hash_of_rows};

use super::{
    Stop,
    check::Check,
    checkpoint::Ticket,
    start,
    state::METHOD_STATE,
    step::{Generation, missing_state},
};

/// The finished adapter's folder below the store.
const ADAPTER: &str = "adapter";

impl Generation<'_> {
    /// Does what is due after the applied step and not done yet in this lineage.
    pub(super) fn boundary(&mut self) -> Result<(), Stop> {
        let applied = self.applied();
        let evaluation = self.job.plan.evaluation_is_due(applied, self.evaluated_step);
        let checkpoint = self.job.plan.checkpoint_is_due(applied, self.checkpoint_step);
        if !evaluation && !checkpoint {
            return Ok(());
        }
        self.around.control.wait_for_credit(self.formation.generation, applied)?;
        // Rows of the next steps travel meanwhile.
        let credited = self.around.control.credited_step(self.formation.generation);
        self.pipeline.ask_up_to(credited, &self.job.plan);
        if evaluation {
            self.evaluate(applied)?;
            self.evaluated_step = Some(applied);
        }
        if checkpoint {
            if self.formation.rank == 0 {
                self.write_checkpoint(applied)?;
            }
            self.checkpoint_step = Some(applied);
        }
        Ok(())
    }

    /// The mean loss of the evaluation rows: sliced like a step, reduced once, without an update.
    fn evaluate(&mut self, applied: u64) -> Result<(), Stop> {
        self.around.control.set_phase(MemberPhase::Evaluating);
        let ids = self.job.plan.evaluation_rows_of_rank(self.formation.world_size(), self.formation.rank);
        let micro_batch_rows = usize::try_from(self.job.micro_batch_rows.max(1)).unwrap_or(usize::MAX);
        let (mut loss, mut tokens, mut announcement) = (0.0, 0, None);
        let mut parts = self.pipeline.evaluation(applied, &ids);
        while let Some(part) = parts.next() {
            let part = part??;
            announcement = Some(part.announcement);
            for micro_batch in part.rows.chunks(micro_batch_rows) {
                self.round(true)?;
                let Some(state) = &self.job.state else { return Err(missing_state().into()) };
                let sum = self.job.engine.evaluate(&state.parameters, micro_batch);
                let sum = sum.map_err(|error| self.stop_for(error))?;
                loss += sum.loss;
                tokens += sum.tokens;
            }
        }
        drop(parts);
        self.keep_company(false)?;
        let not_finite = u64::from(!f64::is_finite(loss));
        let own = Check::new(tokens, ids.len() as u64, hash_of_rows(ids.iter().copied()), loss, not_finite);
        let mut words = own.to_words();
        self.collective
            .all_reduce_u64(&mut words)
            .map_err(|error| start::broken(self.around, &self.formation, &error))?;
        let total = Check::from_words(words);
        if let Some(announcement) = announcement {
            total.compare(applied, &announcement)?;
        }
        if total.not_finite > 0 {
            let rows = if not_finite > 0 { ids } else { Vec::new() };
            return Err(Error::NotFinite { what: "the evaluation loss", step: applied, rows }.into());
        }
        let loss = total.loss() / total.tokens.max(1) as f64;
        info!(step = applied, loss, tokens = total.tokens, "evaluated");
        // Every rank tells: one of them may be lost right here, and the state moves on.
        self.around.report(Message::Evaluation(EvaluationReport {
            job_id: self.job.plan.job_id.clone(),
            attempt: self.job.plan.attempt,
            generation: self.formation.generation,
            step: applied,
            loss,
            tokens: total.tokens,
        }));
        Ok(())
    }

    /// Copies the state and has it written off the step path. Waits for the write before, if it is not done.
    fn write_checkpoint(&mut self, applied: u64) -> Result<(), Stop> {
        self.job.checkpoints.wait_or_leave(self.around, self.formation.generation)?;
        let Some(state) = &self.job.state else { return Ok(()) };
        let mut files = self.job.engine.adapter_files(&state.parameters, &state.method)?;
        if !state.method.is_empty() {
            let bytes = state.method.iter().flat_map(|value| value.to_le_bytes());
            files.push((METHOD_STATE.to_owned(), bytes.collect()));
        }
        let plan = &self.job.plan;
        let snapshot = Snapshot {
            job: plan.job_id.clone(),
            key: Key { attempt: plan.attempt, step: applied, generation: self.formation.generation },
            files: files.into_iter().map(|(name, content)| (name, content.into())).collect(),
            optimizer: state.to_checkpoint(),
            state: shanty_checkpoint::State {
                epoch: plan.epoch_after(applied),
                world_size: self.formation.world_size(),
                threads: u32::try_from(self.around.threads).unwrap_or(u32::MAX),
                micro_batch_rows: u32::try_from(self.job.micro_batch_rows).unwrap_or(u32::MAX),
                global_batch_size: plan.spec.train.global_batch_size as u64,
                seed: plan.spec.train.seed,
                evaluated_step: self.evaluated_step,
                base_hash: self.job.engine.facts().base_hash.clone(),
                tokenizer_hash: plan.data.tokenizer_hash.clone(),
                data_hash: plan.data.hash.clone(),
                adapter_hash: self.job.adapter_hash.to_string(),
                shanty_version: env!("CARGO_PKG_VERSION").to_owned(),
            },
        };
        let ticket = Ticket {
            control: Arc::clone(&self.around.control),
            reports: self.around.reports.clone(),
            failpoints: self.around.failpoints.clone(),
            place: self.formation.place(applied),
            store: plan.store.clone(),
            keep: plan.spec.checkpoint.keep,
        };
        self.job.checkpoints.begin(ticket, snapshot)?;
        Ok(())
    }

    /// After the last step: rank 0 writes the adapter once its checkpoint is whole, and says so.
    pub(super) fn finish(&mut self) -> Result<(), Stop> {
        if self.formation.rank != 0 {
            return Ok(());
        }
        let generation = self.formation.generation;
        self.job.checkpoints.wait_or_leave(self.around, generation)?;
        let applied = self.applied();
        self.around.control.wait_for_credit(generation, applied)?;
        let Some(state) = &self.job.state else { return Ok(()) };
        let files = self.job.engine.adapter_files(&state.parameters, &state.method)?;
        let folder = self.job.plan.store.join(ADAPTER);
        adapter_folder::write(&folder, &files, || self.around.control.holds_credit(generation))?;
        info!(adapter = %folder.display(), "wrote the adapter");
        self.around.report(Message::Finished(Finished {
            job_id: self.job.plan.job_id.clone(),
            attempt: self.job.plan.attempt,
            generation,
            step: applied,
            adapter: folder.display().to_string(),
        }));
        Ok(())
    }
}
