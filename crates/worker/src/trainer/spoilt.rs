//! Steps whose loss is no number, or out of all proportion: what the job says is done. Every rank decides by the same
//! bits, so all decide alike and nobody has to be asked.

use std::collections::BTreeSet;

use shanty_config::job::BadStep;
use shanty_proto::v1::{BadStep as BadStepReport, worker_message::Message};
use tracing::warn;

use crate::{
    Error,
    engine::{FlatPart, Row},
    row_log::Entry,
};

use super::{Stop, check::Check, step::Generation};

/// What is bad about a step.
pub(super) enum Fault {
    /// `the loss` or `the gradient` is not a finite number.
    NotFinite(&'static str),
    /// The loss is a spike; in words.
    Spike(String),
}

impl Fault {
    fn in_words(&self) -> String {
        match self {
            Self::NotFinite(what) => format!("{what} is not finite"),
            Self::Spike(text) => text.clone(),
        }
    }
}

/// A step that was passed over.
pub(super) struct Skipped {
    pub(super) reason: String,
    /// Samples of this worker that the reason is about.
    pub(super) samples: Vec<u64>,
}

impl Generation<'_> {
    /// What the sums alone tell of a step before it is applied.
    pub(super) fn fault_of(&self, total: Check) -> Option<Fault> {
        if total.not_finite > 0 {
            return Some(Fault::NotFinite("the loss"));
        }
        let loss = total.loss() / total.tokens.max(1) as f64;
        let factor = self.job.plan.spec.train.loss_spike;
        self.usual_loss.is_spike(loss, factor).then(|| {
            Fault::Spike(format!("loss {loss:.4} is {:.1} times the usual", loss / self.usual_loss.mean))
        })
    }

    /// Does with a bad step what the job says. `rows` were computed in this generation.
    pub(super) fn spoilt(&mut self, step: u64, fault: &Fault, rows: &[Row]) -> Result<Skipped, Stop> {
        let bad_rows = self.rows_at_fault(fault)?;
        let is_bad = |row: &&Row| bad_rows.contains(&row.id);
        let samples: Vec<u64> = rows
            .iter()
            .filter(is_bad)
            .flat_map(|row| row.segments.iter().map(|segment| segment.sample_id))
            .collect::<BTreeSet<u64>>()
            .into_iter()
            .collect();
        let reason = fault.in_words();
        if !bad_rows.is_empty() {
            warn!(step, reason, rows = ?bad_rows, ?samples, "a bad step");
        }
        let train = &self.job.plan.spec.train;
        if train.on_bad_step == BadStep::Stop {
            let error = match fault {
                Fault::NotFinite(what) => Error::NotFinite { what, step, rows: bad_rows },
                Fault::Spike(reason) => Error::LossSpike { step, reason: reason.clone() },
            };
            return Err(error.into());
        }
        if train.rollback_steps > 0 {
            self.job.drop_sum()?;
            self.around.report(Message::BadStep(BadStepReport {
                job_id: self.job.plan.job_id.clone(),
                attempt: self.job.plan.attempt,
                generation: self.formation.generation,
                step,
                reason,
                samples,
            }));
            // All ranks say so, and the coordinator has all of them leave.
            return Err(Stop::Interrupted);
        }
        self.skip(step)?;
        Ok(Skipped { reason, samples })
    }

    /// Passes over a step: it counts as made, and nothing of it is in the adapter.
    pub(super) fn skip(&mut self, step: u64) -> Result<(), Stop> {
        self.job.drop_sum()?;
        let Some(state) = &mut self.job.state else { return Err(crate::engine::missing_state().into()) };
        state.pass_over();
        self.around.control.set_applied(step);
        self.job.row_log.write(&Entry::Skipped {
            attempt: self.job.plan.attempt,
            generation: self.formation.generation,
            step,
            rank: self.formation.rank,
        })?;
        Ok(())
    }

    /// Rows of this worker's sum that a fault comes from; none if it comes from another rank's.
    fn rows_at_fault(&self, fault: &Fault) -> Result<Vec<u64>, Error> {
        match fault {
            Fault::NotFinite("the loss") => Ok(self.job.sum.not_finite().1.to_vec()),
            Fault::NotFinite(_) => {
                let mut own = vec![0.0; self.job.flat_length()];
                self.job.engine.read(FlatPart::Gradient, 0, &mut own)?;
                let is_own = own.iter().any(|value| !value.is_finite());
                Ok(if is_own { self.job.sum.rows().to_vec() } else { Vec::new() })
            }
            // A spike is the whole batch's.
            Fault::Spike(_) => Ok(self.job.sum.rows().to_vec()),
        }
    }
}
