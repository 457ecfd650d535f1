//! A module's weight with its adapter folded in.
//!
//! Whatever a method does beside a linear layer, it is linear in the layer's input: sending the identity through the branch
//! gives the folded weight, and sending 0 the folded bias. A method that knows a shorter way says so
//! ([`crate::adapter::Method::fold`]); the long way takes a product of the weight's size squared in one dimension.

use std::collections::BTreeMap;

use crate::{
    adapter::{
        BranchScratch, Branches, EmbeddingBranch, EmbeddingSite, LinearBranch, LinearSite, ParameterEntry,
        layout::AdaptedModule, method::Role,
    },
    backend::{Backend, BatchRoom, Use, View, ViewMut, cpu::Cpu},
    batch::{PackedBatch, Span, VirtualTokens},
    error::Result,
    generate::LoadedAdapter,
    model::{ModelConfig, ModuleKind, Place},
    use_error::UseError,
};

/// Rows of the identity that are sent through a branch at once.
const ROWS: usize = 256;

/// What an adapter is to one tensor of the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The branch of this module changes its weight.
    Weight(usize),
    /// The branch of this module may change its bias.
    Bias(usize),
    /// This entry of the layout takes its place.
    Replaced(usize),
}

/// Folds an adapter into weights.
pub(super) struct Folder<'a> {
    adapter: &'a LoadedAdapter,
    cpu: Cpu,
    branches: Branches<Cpu>,
    /// By the name of the base's tensor.
    parts: BTreeMap<String, Part>,
}

impl<'a> Folder<'a> {
    /// Finds out which tensors change.
    ///
    /// # Errors
    /// No weight can hold what the method does.
    pub(super) fn new(adapter: &'a LoadedAdapter, config: &ModelConfig, threads: usize) -> Result<Self> {
        let fit = adapter.fit();
        let layout = fit.layout();
        let method = fit.method();
        let name = method.map_or("none", |method| method.peft_type());
        if method.is_some_and(|method| method.virtual_tokens() != VirtualTokens::None) {
            let reason = "what it puts before every text is no part of a weight".to_owned();
            return Err(UseError::NotMergeable { method: name.to_owned(), reason }.into());
        }
        let mut parts = BTreeMap::new();
        for (index, adapted) in layout.modules().iter().enumerate() {
            let path = &adapted.module.path;
            let entries = &layout.entries()[adapted.entries.clone()];
            if adapted.branch || entries.iter().any(|entry| entry.role == Role::Rows) {
                parts.insert(format!("{path}.weight"), Part::Weight(index));
                if adapted.module.bias {
                    parts.insert(format!("{path}.bias"), Part::Bias(index));
                }
            }
            for entry in adapted.entries.clone() {
                match layout.entries()[entry].role {
                    Role::Branch | Role::Rows => {}
                    Role::Weight => drop(parts.insert(format!("{path}.weight"), Part::Replaced(entry))),
                    Role::Bias => drop(parts.insert(format!("{path}.bias"), Part::Replaced(entry))),
                }
            }
        }
        Ok(Self { adapter, cpu: Cpu::new(threads)?, branches: fit.branches(config.layers), parts })
    }

    /// Whether embedding and head, which are one tensor, become two: one of them changes and the other does not.
    pub(super) fn splits_tied_head(&self) -> bool {
        let own = |entry: &ParameterEntry| matches!(entry.role, Role::Branch | Role::Weight);
        self.adapter.fit().layout().modules().iter().any(|adapted| match adapted.module.kind {
            ModuleKind::Head => true,
            ModuleKind::Embedding => self.adapter.fit().layout().tensors(adapted).iter().any(own),
            _ => false,
        })
    }

    /// What the adapter is to a tensor.
    pub(super) fn part(&self, tensor: &str) -> Option<Part> {
        self.parts.get(tensor).copied()
    }

    fn module(&self, index: usize) -> &AdaptedModule {
        &self.adapter.fit().layout().modules()[index]
    }

    /// The tensor `values` with the adapter folded in.
    pub(super) fn fold(&self, part: Part, values: &mut [f32]) -> Result<()> {
        match part {
            Part::Replaced(entry) => {
                let entry = &self.adapter.fit().layout().entries()[entry];
                let own = &self.adapter.parameters()[entry.range.clone()];
                values.iter_mut().zip(own).for_each(|(value, own)| *value = own - entry.shift);
                Ok(())
            }
            Part::Weight(index) => self.fold_weight(self.module(index), values),
            Part::Bias(index) => self.fold_bias(self.module(index), values),
        }
    }

    fn fold_weight(&self, adapted: &AdaptedModule, weight: &mut [f32]) -> Result<()> {
        let fit = self.adapter.fit();
        let own = |entry: &&ParameterEntry| matches!(entry.role, Role::Branch | Role::Rows);
        let tensors: Vec<ParameterEntry> =
            fit.layout().tensors(adapted).iter().filter(own).cloned().collect();
        let short = fit.method().is_some_and(|method| {
            self.cpu.install(|| method.fold(&adapted.module, &tensors, self.adapter.parameters(), weight))
        });
        if short {
            return Ok(());
        }
        match adapted.module.kind {
            ModuleKind::Embedding => match self.branches.embedding() {
                Some(branch) => self.through_embedding(branch, adapted, weight),
                None => Ok(()),
            },
            _ => match self.branch(adapted) {
                Some(branch) => self.through(branch, adapted, weight),
                None => Ok(()),
            },
        }
    }

    fn branch(&self, adapted: &AdaptedModule) -> Option<&dyn LinearBranch<Cpu>> {
        match adapted.module.place {
            Place::Layer(layer) => self.branches.linear(layer, adapted.module.index),
            _ => self.branches.head(),
        }
    }

    fn scratch(&self, adapted: &AdaptedModule, tokens: usize) -> Result<(Vec<f32>, BranchScratch<Cpu>)> {
        let needs = adapted.needs;
        let room = |numbers: usize| self.cpu.allocate(tokens * numbers, Use::Activation);
        let scratch = BranchScratch {
            wide: room(needs.wide)?,
            narrow: room(needs.narrow)?,
            output: room(needs.output)?,
            fixed: {
                let [a, b, c, d] = needs.fixed;
                let room = |numbers| self.cpu.allocate(numbers, Use::Exact);
                [room(a)?, room(b)?, room(c)?, room(d)?]
            },
        };
        Ok((room(needs.kept)?, scratch))
    }

    /// What a branch makes of 0: a bias of its own, which must have a place in the base.
    fn of_zero(&self, branch: &dyn LinearBranch<Cpu>, adapted: &AdaptedModule) -> Result<Vec<f32>> {
        let mut bias = vec![0.0; adapted.module.shape[0]];
        self.send_zero(branch, adapted, None, &mut bias)?;
        if bias.iter().any(|value| *value != 0.0) && !adapted.module.bias {
            let method = self.adapter.fit().method().map_or("none", |method| method.peft_type()).to_owned();
            let reason = format!("it adds a bias to `{}`, which has none", adapted.module.path);
            return Err(UseError::NotMergeable { method, reason }.into());
        }
        Ok(bias)
    }

    /// Sends the identity through a branch, some rows at a time: row `i` of what comes out, less what 0 gives, is column `i`
    /// of the weight.
    fn through(
        &self,
        branch: &dyn LinearBranch<Cpu>,
        adapted: &AdaptedModule,
        weight: &mut [f32],
    ) -> Result<()> {
        let [output, input] = adapted.module.shape;
        let frozen = weight.to_vec();
        let of_zero = self.of_zero(branch, adapted)?;
        let most = ROWS.min(input);
        let (mut kept, mut scratch) = self.scratch(adapted, most)?;
        let (mut x, mut y) = (vec![0.0; most * input], vec![0.0; most * output]);
        for first in (0..input).step_by(most) {
            let rows = most.min(input - first);
            x.fill(0.0);
            (0..rows).for_each(|row| x[row * input + first + row] = 1.0);
            let batch = self.batch(rows, &[])?;
            let site = self.site(&batch, View::<Cpu>::new(&frozen, output, input), None);
            self.cpu.run(|| {
                let y = ViewMut::<Cpu>::new(&mut y, rows, output);
                branch.forward(&site, View::<Cpu>::new(&x, rows, input), false, y, &mut kept, &mut scratch);
            });
            for (row, y) in y.chunks_exact(output).take(rows).enumerate() {
                for (out, (value, zero)) in y.iter().zip(&of_zero).enumerate() {
                    weight[out * input + first + row] = value - zero;
                }
            }
        }
        Ok(())
    }

    /// Sends 0 through a branch: what comes out is the bias.
    fn fold_bias(&self, adapted: &AdaptedModule, bias: &mut [f32]) -> Result<()> {
        let Some(branch) = self.branch(adapted) else { return Ok(()) };
        let frozen = bias.to_vec();
        self.send_zero(branch, adapted, Some(View::<Cpu>::new(&frozen, 1, frozen.len())), bias)
    }

    fn send_zero(
        &self,
        branch: &dyn LinearBranch<Cpu>,
        adapted: &AdaptedModule,
        bias: Option<View<'_, Cpu>>,
        out: &mut [f32],
    ) -> Result<()> {
        let [output, input] = adapted.module.shape;
        let (mut kept, mut scratch) = self.scratch(adapted, 1)?;
        // A weight of ones: what a method divides by its length must not be 0.
        let (x, weight) = (vec![0.0; input], vec![1.0; output * input]);
        let batch = self.batch(1, &[])?;
        let site = self.site(&batch, View::<Cpu>::new(&weight, output, input), bias);
        self.cpu.run(|| {
            let y = ViewMut::<Cpu>::new(out, 1, output);
            branch.forward(&site, View::<Cpu>::new(&x, 1, input), false, y, &mut kept, &mut scratch);
        });
        Ok(())
    }

    /// Sends every token through the embedding's branch.
    fn through_embedding(
        &self,
        branch: &dyn EmbeddingBranch<Cpu>,
        adapted: &AdaptedModule,
        table: &mut [f32],
    ) -> Result<()> {
        let [vocabulary, hidden] = adapted.module.shape;
        let (_, mut scratch) = self.scratch(adapted, ROWS)?;
        for first in (0..vocabulary).step_by(ROWS) {
            let rows = ROWS.min(vocabulary - first);
            let ids: Vec<u32> = (first..first + rows).map(|id| id as u32).collect();
            let batch = self.batch(rows, &ids)?;
            let site =
                EmbeddingSite { backend: &self.cpu, batch: &batch, parameters: self.adapter.parameters() };
            self.cpu.run(|| {
                let rows = ViewMut::<Cpu>::at(&mut *table, first * hidden, rows, hidden);
                branch.forward(&site, rows, &mut scratch);
            });
        }
        Ok(())
    }

    fn batch(&self, tokens: usize, ids: &[u32]) -> Result<<Cpu as Backend>::Batch> {
        let room = BatchRoom { tokens, longest_span: 1, widest: 0, heads: 1 };
        let mut batch = self.cpu.allocate_batch(room)?;
        let mut packed = PackedBatch::with_capacity(tokens);
        packed.token_ids.extend_from_slice(ids);
        packed.token_ids.resize(tokens, 0);
        packed.positions.resize(tokens, 0);
        packed.sample_ids.resize(tokens, 0);
        packed.spans.push(Span { query_start: 0, queries: tokens, key_start: 0, keys: tokens });
        self.cpu.load_batch(&packed, &mut batch);
        Ok(batch)
    }

    fn site<'b>(
        &'b self,
        batch: &'b <Cpu as Backend>::Batch,
        weight: View<'b, Cpu>,
        bias: Option<View<'b, Cpu>>,
    ) -> LinearSite<'b, Cpu> {
        let parameters = self.adapter.parameters();
        LinearSite { backend: &self.cpu, batch, weight, bias, parameters, dropout: None, merged: false }
    }
}
