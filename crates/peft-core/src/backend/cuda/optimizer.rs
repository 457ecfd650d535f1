//! Clipping and AdamW on the card: a few launches, and one small copy to the host when the step is asked for its outcome.

use super::{Cuda, DeviceError, Numbers, THREADS, launch, matrix};
use crate::{
    backend::{Backend, View},
    error::Result,
    optim::{Factors, FlatState, FlatUpdate, LOSSES, Outcome, SQUARES, Source},
};

/// Numbers of f64 in front of losses and partial sums: norm and factor.
const REPORT: usize = 2;

/// A group as the kernel takes it.
#[derive(Clone, Copy)]
#[repr(C)]
struct GroupArgument {
    end: u64,
    factors: [f32; 7],
    skip: u32,
}

// SAFETY: plain numbers without gaps.
unsafe impl bytemuck::Zeroable for GroupArgument {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for GroupArgument {}

impl Cuda {
    pub(super) fn queue_losses(&self, losses: View<'_, Self>, state: &mut FlatState<Self>) {
        if state.queued_losses == LOSSES {
            match self.read_losses(state) {
                Ok(losses) => state.known_losses = losses,
                // What failed is told again where the caller asks.
                Err(_) => return,
            }
        }
        let total = state.sums.address + 8 * (REPORT + state.queued_losses) as u64;
        let (from, count) = (matrix(losses).address, losses.rows as u32);
        launch!(self.device, "sum_losses", [1, 1, 1], [1024, 1], from, count, total);
        state.queued_losses += 1;
    }

    pub(super) fn read_losses(&self, state: &mut FlatState<Self>) -> Result<Vec<f64>> {
        let mut losses = std::mem::take(&mut state.known_losses);
        let count = std::mem::take(&mut state.queued_losses);
        if count > 0 {
            let mut queued = [f64::NAN; LOSSES];
            let address = state.sums.address + 8 * REPORT as u64;
            self.device.download(address, &mut queued[..count]);
            self.device.upload(&[0.0_f64; LOSSES][..count], address);
            losses.extend_from_slice(&queued[..count]);
        }
        self.settle()?;
        Ok(losses)
    }

    pub(super) fn queue_update(&self, update: &FlatUpdate<'_>, state: &mut FlatState<Self>) {
        let (length, count) = (state.length as u64, state.length.div_ceil(SQUARES));
        let (report, partial) = (state.sums.address, state.sums.address + 8 * (REPORT + LOSSES) as u64);
        let gradient = match (update.source, &state.reduced) {
            (Source::Reduced, Some(reduced)) => reduced.address,
            (Source::Reduced, None) => return self.missing("a sum over all members"),
            (Source::Own, _) => state.gradient.address,
        };
        launch!(self.device, "square_sums", [count, 1, 1], [256, 1], gradient, length, partial);
        let (mean, max_norm, partials) = (update.mean, update.max_norm, count as u32);
        launch!(self.device, "clip", [1, 1, 1], [1024, 1], partial, partials, mean, max_norm, report);
        let groups: Vec<GroupArgument> = update
            .groups
            .iter()
            .map(|(end, factors)| GroupArgument {
                end: *end as u64,
                factors: factors.as_ref().map_or([0.0; 7], Factors::as_array),
                skip: u32::from(factors.is_none()),
            })
            .collect();
        let bytes = size_of_val(groups.as_slice());
        if state.groups.as_ref().is_none_or(|memory| memory.bytes < bytes) {
            match self.take(bytes, Numbers::F32) {
                Ok(memory) => state.groups = Some(memory),
                Err(error) => return self.device.note(Err(error)),
            }
        }
        let Some(place) = &state.groups else { return };
        self.device.upload(&groups, place.address);
        let blocks = state.length.div_ceil(4 * THREADS).clamp(1, 132 * 16);
        launch!(
            self.device,
            "adamw",
            [blocks, 1, 1],
            [THREADS, 1],
            state.parameters.address,
            gradient,
            state.first.address,
            state.second.address,
            length,
            place.address,
            groups.len() as u32,
            report,
            state.parameters.rounded
        );
    }

    pub(super) fn read_outcome(&self, state: &mut FlatState<Self>) -> Result<Outcome> {
        let mut report = [f64::NAN; REPORT];
        self.device.download(state.sums.address, &mut report);
        let loss = self.read_losses(state)?.iter().sum();
        let [norm, factor] = report;
        if norm.is_finite() != factor.is_finite() {
            let reason = "norm and factor disagree".to_owned();
            return Err(DeviceError::Call { operation: "clip", reason }.into());
        }
        Ok(Outcome { norm, loss })
    }
}
