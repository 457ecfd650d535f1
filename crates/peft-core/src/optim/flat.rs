//! Parameters, gradient and moments where a backend computes, so that a step moves none of them.

use super::{
    adamw::{self, Factors},
    clip_factor, global_norm,
};
use crate::{
    backend::{Backend, Use, cpu::Cpu},
    error::Result,
};

/// Sums a piece of the gradient over members: from its first slice into its second, both in host memory.
pub type SumPiece<'a, E> = dyn FnMut(&[f32], &mut [f32]) -> std::result::Result<(), E> + 'a;

/// Numbers that one partial sum of squares of a backend is made of, at least.
pub(crate) const SQUARES: usize = 4096;
/// Losses of micro-batches that a backend keeps before the host reads them.
pub(crate) const LOSSES: usize = 64;

/// Parameters, gradient and moments where a backend computes, all of one length.
pub struct FlatState<B: Backend> {
    /// Numbers in each.
    pub length: usize,
    /// What is trained.
    pub parameters: B::Owned,
    /// The sum of gradients since the last update.
    pub gradient: B::Owned,
    /// AdamW's first moment.
    pub first: B::Owned,
    /// AdamW's second moment.
    pub second: B::Owned,
    /// The sum of several members' gradients, where it is made in a place of its own; reserved at first.
    pub reduced: Option<B::Owned>,
    /// Whether the gradient may be other than 0.
    pub(crate) touched: bool,
    /// Room for sums.
    pub(crate) sums: B::Owned,
    /// Losses of micro-batches that lie in `sums`.
    pub(crate) queued_losses: usize,
    /// Losses of micro-batches that the host knows, older than those.
    pub(crate) known_losses: Vec<f64>,
    /// Room for the groups of an update, reserved at first.
    pub(crate) groups: Option<B::Owned>,
    /// What came of it, where the backend is the host.
    pub(crate) outcome: Outcome,
}

/// What an update amounted to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Outcome {
    /// Norm of the mean gradient before it was clipped; where it is not finite nothing was updated.
    pub norm: f64,
    /// Sum of the losses added since they were last asked for.
    pub loss: f64,
}

/// The gradient that an update takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Source {
    /// The sum of what was accumulated here.
    #[default]
    Own,
    /// The sum over all members.
    Reduced,
}

/// One update of flat buffers.
#[derive(Debug)]
pub struct FlatUpdate<'a> {
    /// 1 / trained tokens: gradients are sums.
    pub mean: f64,
    /// Longest mean gradient; 0 for no limit.
    pub max_norm: f64,
    /// Ranges that share factors, as [`super::groups`] makes them.
    pub groups: &'a [(usize, Option<Factors>)],
    /// Which gradient. It is 0 afterwards.
    pub source: Source,
}

impl<B: Backend> FlatState<B> {
    /// Everything 0, for `length` parameters.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(backend: &B, length: usize) -> Result<Self> {
        let exact = |length| backend.allocate(length, Use::Exact);
        Ok(Self {
            length,
            parameters: backend.allocate_parameters(length)?,
            gradient: exact(length)?,
            first: exact(length)?,
            second: exact(length)?,
            reduced: None,
            touched: false,
            sums: exact(Self::sums_length(length))?,
            queued_losses: 0,
            known_losses: Vec::new(),
            groups: None,
            outcome: Outcome::default(),
        })
    }

    /// Numbers of f32 in which partial sums of f64 find room, with norm, factor and losses in front of them.
    fn sums_length(length: usize) -> usize {
        2 * (2 + LOSSES + length.div_ceil(SQUARES))
    }

    /// Where sums over all members go.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn reserve_reduced(&mut self, backend: &B) -> Result<&mut B::Owned> {
        let place = &mut self.reduced;
        Ok(match place {
            Some(reduced) => reduced,
            None => place.insert(backend.allocate(self.length, Use::Exact)?),
        })
    }
}

impl FlatUpdate<'_> {
    /// Updates a state in host memory.
    pub(crate) fn apply(&self, state: &mut FlatState<Cpu>) {
        let FlatState { parameters, gradient, first, second, reduced, outcome, .. } = state;
        let gradient = match (self.source, reduced) {
            (Source::Reduced, Some(reduced)) => reduced,
            _ => gradient,
        };
        outcome.norm = global_norm(gradient) * self.mean;
        if let Some(clip) = clip_factor(outcome.norm, self.max_norm) {
            let scale = (self.mean * clip) as f32;
            let mut start = 0;
            for (end, factors) in self.groups {
                let range = start..*end;
                if let Some(factors) = factors {
                    adamw::apply(
                        factors,
                        scale,
                        &mut parameters[range.clone()],
                        &gradient[range.clone()],
                        &mut first[range.clone()],
                        &mut second[range],
                    );
                }
                start = *end;
            }
            gradient.fill(0.0);
        }
    }
}
