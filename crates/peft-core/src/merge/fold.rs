//! A module's weight with its adapter folded in.
//!
//! Whatever a method does beside a linear layer, it is linear in the layer's input: sending the identity through the branch
//! gives the folded weight, and sending 0 the folded bias. A method that knows a shorter way says so
//! ([`crate::adapter::Method::fold`]); the long way takes a product of the weight's size squared in one dimension.

use std::collections::BTreeMap;

use crate::{
    adapter::{
        BranchScratch, Branches, EmbeddingBranch, EmbeddingSite, LinearBranch, LinearSite, ParameterEntry,
        VirtualTokens, layout::AdaptedModule, method::Role,
    },
    backend::{Backend, BatchRoom, View, ViewMut, cpu::Cpu},
    batch::{PackedBatch, Span},
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
            if adapted.branch {
                parts.insert(format!("{path}.weight"), Part::Weight(index));
                if adapted.module.bias {
                    parts.insert(format!("{path}.bias"), Part::Bias(index));
                }
            }
            for entry in adapted.entries.clone() {
                match layout.entries()[entry].role {
                    Role::Branch => {}
                    Role::Weight => drop(parts.insert(format!("{path}.weight"), Part::Replaced(entry))),
                    Role::Bias => drop(parts.insert(format!("{path}.bias"), Part::Replaced(entry))),
                }
            }
        }
        Ok(Self { adapter, cpu: Cpu::new(threads)?, branches: fit.branches(config.layers), parts })
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
                let range = self.adapter.fit().layout().entries()[entry].range.clone();
                values.copy_from_slice(&self.adapter.parameters()[range]);
                Ok(())
            }
            Part::Weight(index) => self.fold_weight(self.module(index), values),
            Part::Bias(index) => self.fold_bias(self.module(index), values),
        }
    }

    fn fold_weight(&self, adapted: &AdaptedModule, weight: &mut [f32]) -> Result<()> {
        let fit = self.adapter.fit();
        let own = |entry: &&ParameterEntry| entry.role == Role::Branch;
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
        let room = |numbers: usize| self.cpu.allocate(tokens * numbers);
        let scratch = BranchScratch {
            wide: room(needs.wide)?,
            narrow: room(needs.narrow)?,
            output: room(needs.output)?,
            fixed: self.cpu.allocate(needs.fixed)?,
        };
        Ok((room(needs.kept)?, scratch))
    }

    /// Sends the identity through a branch, some rows at a time: row `i` of what comes out is column `i` of the weight.
    fn through(
        &self,
        branch: &dyn LinearBranch<Cpu>,
        adapted: &AdaptedModule,
        weight: &mut [f32],
    ) -> Result<()> {
        let [output, input] = adapted.module.shape;
        let frozen = weight.to_vec();
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
                y.iter().enumerate().for_each(|(out, value)| weight[out * input + first + row] = *value);
            }
        }
        Ok(())
    }

    /// Sends 0 through a branch: what comes out is the bias.
    fn fold_bias(&self, adapted: &AdaptedModule, bias: &mut [f32]) -> Result<()> {
        let Some(branch) = self.branch(adapted) else { return Ok(()) };
        let [output, input] = adapted.module.shape;
        let (mut kept, mut scratch) = self.scratch(adapted, 1)?;
        let (x, weight, frozen) = (vec![0.0; input], vec![0.0; output * input], bias.to_vec());
        let batch = self.batch(1, &[])?;
        let site = self.site(
            &batch,
            View::<Cpu>::new(&weight, output, input),
            Some(View::<Cpu>::new(&frozen, 1, output)),
        );
        self.cpu.run(|| {
            let y = ViewMut::<Cpu>::new(bias, 1, output);
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
        LinearSite { backend: &self.cpu, batch, weight, bias, parameters, dropout: None }
    }
}
