//! What a pass leaves in the memory of a step, for comparison with other programs.

use super::{Engine, machine::Machine};
use crate::{batch::Row, error::Result};

impl Engine {
    /// The residual stream ahead of each layer and behind the last one, `[tokens, hidden]` each, of rows that are one
    /// micro-batch; none where layers' inputs do not all stay in the memory of a step.
    ///
    /// # Errors
    /// As [`Engine::forward_backward`].
    pub fn hidden_states(
        &mut self,
        parameters: Option<&[f32]>,
        rows: &[Row],
    ) -> Result<Option<Vec<Vec<f32>>>> {
        self.row_losses(parameters, rows)?;
        let (tokens, hidden, levels) = (self.packed.tokens(), self.config.hidden_size, self.plan.levels);
        if levels.aside > 0 || rows.len() > self.plan.micro_batch_rows {
            return Ok(None);
        }
        let read = |layer| match &self.machine {
            Machine::Cpu(worker) => worker.boundary(levels.boundary_place(layer), tokens, hidden),
            Machine::Cuda(worker) => worker.boundary(levels.boundary_place(layer), tokens, hidden),
        };
        (0..=levels.layers()).map(read).collect::<Result<_>>().map(Some)
    }
}
