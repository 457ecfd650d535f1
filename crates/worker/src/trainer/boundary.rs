//! What is due between two steps: evaluation, checkpoint, and the end.

use std::{sync::Arc, time::Instant};

use shanty_checkpoint::Key;
use shanty_proto::v1::{EvaluationReport, Finished, MemberPhase, worker_message::Message};
use tracing::info;

use crate::{Error, adapter_folder, rows::hash_of_rows};

use super::{Stop, check::Check, checkpoint::Ticket, debts, keep, start, step::Generation};

/// The finished adapter's folder below the store.
const ADAPTER: &str = "adapter";

impl Generation<'_> {
    /// Does what is due after the applied step and not done yet in this lineage.
    pub(super) fn boundary(&mut self) -> Result<(), Stop> {
        let applied = self.applied();
        let evaluation = self.job.plan.evaluation_is_due(applied, self.job.evaluated_step);
        let checkpoint = self.job.plan.checkpoint_is_due(applied, self.checkpoint_step);
        let comparison =
            self.compared_step != applied && self.job.plan.comparison_is_due(applied, checkpoint);
        if !evaluation && !checkpoint && !comparison {
            return Ok(());
        }
        self.around.control.wait_for_credit(self.formation.generation, applied)?;
        // Rows of the next steps travel meanwhile.
        let credited = self.around.control.credited_step(self.formation.generation);
        self.pipeline.ask_up_to(credited, &self.job.plan);
        if evaluation {
            self.evaluate(applied)?;
            self.job.evaluated_step = Some(applied);
        }
        if comparison {
            // Ahead of the checkpoint: one rank writes it for all.
            self.compare(applied)?;
            self.compared_step = applied;
        }
        if checkpoint {
            let debts = debts::gather(&mut *self.collective, &self.job.owed)
                .map_err(|error| start::broken(self.around, &self.formation, &error))?;
            if self.formation.rank == 0 {
                self.around.control.set_phase(MemberPhase::Writing);
                self.write_checkpoint(applied, debts)?;
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
                let sum = self.job.engine.evaluate(micro_batch);
                let sum = sum.map_err(|error| self.stop_for(error))?;
                self.around.control.advance();
                loss += sum.loss;
                tokens += sum.tokens;
            }
        }
        drop(parts);
        self.keep_company(false)?;
        let not_finite = u64::from(!f64::is_finite(loss));
        let own = Check::new(tokens, ids.len() as u64, hash_of_rows(ids.iter().copied()), loss, not_finite);
        let mut words = own.to_words();
        self.around.control.set_phase(MemberPhase::Reducing);
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
        self.job.evaluated_loss = Some((applied, loss));
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

    /// Copies the state and has it written off the step path, whether the write before is done or not.
    fn write_checkpoint(&mut self, applied: u64, debts: Vec<(String, Vec<u8>)>) -> Result<(), Stop> {
        let began = Instant::now();
        let generation = self.formation.generation;
        let key = Key { attempt: self.job.plan.attempt, step: applied, generation };
        let Some(draft) = keep::draft(self.around, self.job, key, debts)? else { return Ok(()) };
        let ticket = Ticket {
            job: self.job.plan.job_id.clone(),
            attempt: self.job.plan.attempt,
            control: Arc::clone(&self.around.control),
            reports: self.around.reports.clone(),
            failpoints: self.around.failpoints.clone(),
            place: self.formation.place(applied),
            store: self.job.plan.location.clone(),
            keep: keep::rule(&self.job.plan),
            held: began.elapsed(),
        };
        self.job.checkpoints.begin(ticket, draft)?;
        Ok(())
    }

    /// After the last step: rank 0 writes the adapter once its checkpoint is whole, and says so.
    pub(super) fn finish(&mut self) -> Result<(), Stop> {
        if self.formation.rank != 0 {
            return Ok(());
        }
        let generation = self.formation.generation;
        self.around.control.set_phase(MemberPhase::Writing);
        self.job.checkpoints.wait_or_leave(self.around, generation)?;
        let applied = self.applied();
        self.around.control.wait_for_credit(generation, applied)?;
        let Some(state) = &self.job.state else { return Ok(()) };
        let parameters = state.parameters(&*self.job.engine)?;
        let files = self.job.engine.adapter_files(&parameters, &state.method)?;
        let plan = &self.job.plan;
        let folder = plan.store.join(ADAPTER);
        let control = &self.around.control;
        adapter_folder::write(&folder, &files, || control.holds_credit(generation))?;
        let adapter = if plan.spec.checkpoint.is_remote() {
            adapter_folder::upload(&plan.location, ADAPTER, files, &|| control.holds_credit(generation))?
        } else {
            folder.display().to_string()
        };
        info!(%adapter, "wrote the adapter");
        self.around.report(Message::Finished(Finished {
            job_id: self.job.plan.job_id.clone(),
            attempt: self.job.plan.attempt,
            generation,
            step: applied,
            adapter,
        }));
        Ok(())
    }
}
