//! What is trained, as one pass over the model sees it.

use crate::{
    adapter::{Branches, EmbeddingBranch, ParameterLayout, PassDropout},
    backend::{Backend, View},
    batch::VirtualTokens,
    loss::head::TrainedHead,
    model::ModelConfig,
    nn::linear::Branch,
};

/// What is trained, as one pass sees it.
pub struct Trained<'a, B: Backend> {
    /// The flat parameters; none runs the bare base.
    pub parameters: Option<&'a B::Buffer>,
    /// Where each tensor lies.
    pub layout: &'a ParameterLayout,
    /// What the method does beside each module.
    pub branches: &'a Branches<B>,
    /// Dropout of this pass.
    pub dropout: Option<PassDropout>,
    /// Whether spans begin here, with their virtual tokens; they do not where a cached sequence goes on.
    pub begins: bool,
}

impl<'a, B: Backend> Trained<'a, B> {
    pub(super) fn linear(&self, layer: usize, index: usize) -> Option<Branch<'a, B>> {
        let branch = self.branches.linear(layer, index)?;
        Some(Branch { branch, parameters: self.parameters?, dropout: self.dropout })
    }

    pub(super) fn embedding(&self) -> Option<(&'a dyn EmbeddingBranch<B>, &'a B::Buffer)> {
        Some((self.branches.embedding()?, self.parameters?))
    }

    /// The embedding itself in the parameters, where it is trained.
    pub(super) fn embedding_table(&self, config: &ModelConfig) -> Option<View<'a, B>> {
        let at = self.branches.embedding_weight()?;
        Some(View::at(self.parameters?, at, config.vocabulary_size, config.hidden_size))
    }

    /// A vector in the parameters where it is trained, else the base's.
    pub(super) fn vector<'c>(&self, backend: &'c B, trained: Option<usize>, base: &'c [f32]) -> View<'c, B>
    where
        'a: 'c,
    {
        match (trained, self.parameters) {
            (Some(at), Some(parameters)) => View::at(parameters, at, 1, base.len()),
            _ => backend.frozen_vector(base),
        }
    }

    /// Where a gradient goes; nowhere on the bare base.
    pub(super) fn place(&self, trained: Option<usize>) -> Option<usize> {
        trained.filter(|_| self.parameters.is_some())
    }

    pub(super) fn head(&self, config: &ModelConfig) -> TrainedHead<'a, B> {
        let Some(parameters) = self.parameters else { return TrainedHead::default() };
        let (vocabulary, hidden) = (config.vocabulary_size, config.hidden_size);
        let table = |at| View::at(parameters, at, vocabulary, hidden);
        let dropout = self.dropout;
        let rows = self.branches.rows().filter(|_| config.tied_embeddings);
        TrainedHead {
            table: self.branches.head_weight().map(table),
            branch: self.branches.head().map(|branch| Branch { branch, parameters, dropout }),
            rows: rows.map(|(ids, at)| (ids, View::at(parameters, at, ids.len(), hidden))),
        }
    }

    /// Virtual tokens of this pass: none on the bare base.
    pub fn virtual_tokens(&self) -> VirtualTokens {
        self.parameters.map_or(VirtualTokens::None, |_| self.layout.virtual_tokens())
    }

    /// Columns `first ..` of the virtual tokens, `[count, columns]`.
    fn virtual_columns(&self, first: usize, columns: usize) -> Option<View<'a, B>> {
        let entry = self.layout.virtual_tensor()?;
        let whole = View::<B>::at(self.parameters?, entry.range.start, entry.rows(), entry.columns());
        Some(whole.column_range(first, columns))
    }

    /// Virtual rows, `[count, hidden]`.
    pub fn virtual_rows(&self, hidden: usize) -> Option<View<'a, B>> {
        let put = self.begins && matches!(self.virtual_tokens(), VirtualTokens::Rows(_));
        put.then(|| self.virtual_columns(0, hidden))?
    }

    /// Virtual keys and values of a layer, `[count, kv_heads * head_dim]` each: PEFT lays out
    /// `[layer 0 K | layer 0 V | layer 1 K | …]`.
    pub fn virtual_keys(&self, layer: usize, features: usize) -> Option<[View<'a, B>; 2]> {
        if !matches!(self.virtual_tokens(), VirtualTokens::Keys(_)) {
            return None;
        }
        let part = |index: usize| self.virtual_columns((2 * layer + index) * features, features);
        Some([part(0)?, part(1)?])
    }
}
