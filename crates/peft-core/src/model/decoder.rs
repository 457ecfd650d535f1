//! The loop over layers, forward and backward.
//!
//! It asks the base for one layer at a time (and says which comes next), so that a base may lie elsewhere, and
//! says of each layer's part of the flat gradient when it is final, so that its reduction may begin.

use crate::{
    adapter::{EmbeddingSite, ParameterLayout},
    backend::{AttentionShape, Backend, Ready, SpanStart, View, ViewMut},
    error::Result,
    loss::head::{Head, HeadGradient},
    model::{
        BaseSource, LayerWeights, LinearWeights, ModelConfig, Norm, Place, Projection, trained::Trained,
    },
    nn::{
        attention::{Attention, Prefix},
        embedding,
        inputs::Inputs,
        linear::{Linear, TrainedParts},
        mlp::Mlp,
        rms_norm::RmsNorm,
        rope::RopeTable,
    },
    plan::{Arena, Attended, Boundary, Joined, Level, Work, two},
};

/// A decoder at work on one micro-batch.
pub struct Decoder<'a, B: Backend, S: BaseSource + ?Sized> {
    /// Where operations run.
    pub backend: &'a B,
    /// What the model is made of.
    pub config: &'a ModelConfig,
    /// Frozen weights.
    pub base: &'a mut S,
    /// What is trained.
    pub trained: Trained<'a, B>,
    /// Angles.
    pub rope: &'a RopeTable<B>,
    /// Memory.
    pub arena: &'a mut Arena<B>,
    /// Tokens of the micro-batch that is loaded.
    pub tokens: usize,
    /// Its keys, virtual ones included.
    pub keys: usize,
    /// Rows of it that predict a trained token.
    pub predicting: usize,
    /// Whether a backward pass follows.
    pub training: bool,
}

impl<B: Backend, S: BaseSource + ?Sized> Decoder<'_, B, S> {
    /// From token ids to the last hidden state, keeping what the backward pass needs.
    ///
    /// # Errors
    /// When a layer's weights cannot be had.
    pub fn forward(&mut self) -> Result<()> {
        self.forward_with(|_, attention, step| {
            let Attend { backend, batch, tokens, work, joined, attended } = step;
            attention.attend(backend, batch, tokens, work, joined, attended);
        })
    }

    /// [`Decoder::forward`] with attention handed to `attend(layer, block, …)`.
    ///
    /// # Errors
    /// When a layer's weights cannot be had.
    pub fn forward_with(
        &mut self,
        mut attend: impl FnMut(usize, &Attention<'_, B>, Attend<'_, B>),
    ) -> Result<()> {
        let (backend, tokens) = (self.backend, self.tokens);
        let config = self.config;
        let arena = &mut *self.arena;
        let hidden = config.hidden_size;
        let first = ViewMut::<B>::new(&mut arena.inputs[0], tokens, hidden);
        self.base.prefetch(0);
        match self.trained.embedding_table(config) {
            Some(table) => backend.gather_ids(&arena.batch, table, false, first),
            None => embedding::forward(backend, &arena.batch, &self.base.embedding(), first),
        }
        if let Some((branch, parameters)) = self.trained.embedding() {
            let site = EmbeddingSite { backend, batch: &arena.batch, parameters };
            let first = ViewMut::<B>::new(&mut arena.inputs[0], tokens, hidden);
            branch.forward(&site, first, &mut arena.scratch.branch);
        }
        if let Some(scale) = config.embedding_scale {
            backend.scale(scale, ViewMut::<B>::new(&mut arena.inputs[0], tokens, hidden));
        }
        if let Some(rows) = self.trained.virtual_rows(hidden) {
            let first = ViewMut::<B>::new(&mut arena.inputs[0], tokens, hidden);
            backend.put_virtual(&arena.batch, SpanStart::Queries, rows, first);
        }
        for layer in 0..config.layers {
            let weights = layer_going_up(&mut *self.base, layer, config.layers)?;
            let (trained, keys) = (&self.trained, self.keys);
            let site = Site { backend, config, layer, trained, rope: self.rope, keys };
            let (attention, mlp) = site.blocks(&weights, &mut arena.weights);
            let levels = arena.levels;
            let (own, after) = (levels.boundary_place(layer), levels.boundary_place(layer + 1));
            // What lay in the places that this layer writes to may still be on its way to the host.
            let shared = |layer: usize| self.training && layer < levels.aside;
            if shared(layer) && layer >= 2 {
                arena.aside[layer - 2].wait(backend);
            }
            let (x, next) = two(&mut arena.inputs, own, after);
            let x = View::<B>::new(x, tokens, hidden);
            let (work, scratch) = (&mut arena.work[levels.work_place(layer)], &mut arena.scratch);
            let expansion = &mut arena.expansions[levels.expansion_place(layer)];
            let attended = &mut arena.attended[own];
            attention.project(backend, &arena.batch, x, work, scratch);
            let (batch, joined) = (&arena.batch, &mut scratch.joined);
            attend(layer, &attention, Attend { backend, batch, tokens, work, joined, attended });
            attention.output(backend, &arena.batch, x, attended, work, scratch);
            if let Some(boundary) = arena.aside.get_mut(layer).filter(|_| self.training) {
                boundary.put(backend, x, attended, config);
            }
            mlp.expand(backend, &arena.batch, tokens, work, expansion, scratch);
            if shared(layer + 1) && layer >= 1 {
                arena.aside[layer - 1].wait(backend);
            }
            let next = ViewMut::<B>::new(next, tokens, hidden);
            mlp.contract(backend, &arena.batch, work, expansion, scratch, next);
        }
        Ok(())
    }

    /// The loss of each predicting row, for [`Decoder::sum`]; with `flat`, the gradient of the last hidden state is left in
    /// the arena, and that of what is trained of the head is added to `flat`.
    pub fn loss(&mut self, flat: Option<&mut B::Buffer>) {
        let (backend, tokens) = (self.backend, self.tokens);
        let (hidden, layers) = (self.config.hidden_size, self.config.layers);
        let head = head(backend, &*self.base, &self.trained);
        let arena = &mut *self.arena;
        let last = View::<B>::new(&arena.inputs[arena.levels.boundary_place(layers)], tokens, hidden);
        let (mut scratch, branch, flowing) = Arena::head_scratch(&mut arena.scratch, &mut arena.head);
        let gradient =
            flat.map(|flat| HeadGradient { hidden: ViewMut::<B>::new(flowing, tokens, hidden), flat });
        head.loss(backend, &arena.batch, self.predicting, last, &mut scratch, branch, gradient);
    }

    /// Summed loss. Waits for it: asked for when all work is queued, it delays nothing.
    pub fn sum(&mut self) -> f64 {
        Head::<B>::sum(self.backend, self.predicting, &mut self.arena.head)
    }

    /// Loss of each row that predicts a trained token, in their order. Waits for them.
    pub fn losses(&mut self, out: &mut [f32]) {
        self.loss(None);
        self.backend.download(View::<B>::new(&self.arena.head.losses, out.len(), 1), out);
    }

    /// Logits of the last `rows` rows of the micro-batch, written to `out`.
    pub fn logits(&mut self, rows: usize, out: &mut [f32]) {
        let (backend, tokens) = (self.backend, self.tokens);
        let (hidden, layers) = (self.config.hidden_size, self.config.layers);
        let head = head(backend, &*self.base, &self.trained);
        let arena = &mut *self.arena;
        let last = View::<B>::new(&arena.inputs[arena.levels.boundary_place(layers)], tokens, hidden);
        let (mut scratch, branch, _) = Arena::head_scratch(&mut arena.scratch, &mut arena.head);
        head.logits(backend, &arena.batch, last.row_range(tokens - rows, rows), &mut scratch, branch, out);
    }

    /// From the last hidden state's gradient down to the lowest trained tensor; adds to `flat`.
    ///
    /// # Errors
    /// When a layer's weights cannot be had.
    pub fn backward(&mut self, flat: &mut B::Buffer, ready: &mut Ready<'_, B>) -> Result<()> {
        let (backend, tokens) = (self.backend, self.tokens);
        let config = self.config;
        let hidden = config.hidden_size;
        let arena = &mut *self.arena;
        let layout = self.trained.layout;
        let head = layout.range(Place::Head);
        if !head.is_empty() {
            ready(head, flat);
        }
        let virtual_tokens = self.trained.virtual_tokens();
        let (lowest, through) = match layout.lowest() {
            None | Some(Place::Head) => return Ok(()),
            Some(Place::Layer(layer)) => (layer, false),
            // Virtual keys are inputs of every layer; nothing is trained below the first.
            Some(Place::Input) => (0, virtual_tokens.keys() == 0),
        };
        let levels = arena.levels;
        for layer in (lowest..config.layers).rev() {
            let weights = layer_going_down(&mut *self.base, layer, lowest)?;
            let (trained, keys) = (&self.trained, self.keys);
            let site = Site { backend, config, layer, trained, rope: self.rope, keys };
            let (attention, mlp) = site.blocks(&weights, &mut arena.weights);
            let own = levels.boundary_place(layer);
            // The two highest of those that lie aside are still here as well.
            let returns = |layer: usize| layer + 2 < levels.aside;
            if returns(layer) {
                arena.aside[layer].wait(backend);
            }
            if layer > lowest && returns(layer - 1) {
                let below = levels.boundary_place(layer - 1);
                let (input, attended) = (&mut arena.inputs[below], &mut arena.attended[below]);
                arena.aside[layer - 1].bring(backend, tokens, input, attended, config);
            }
            let x = View::<B>::new(&arena.inputs[own], tokens, hidden);
            let (work, scratch) = (&mut arena.work[levels.work_place(layer)], &mut arena.scratch);
            let expansion = &mut arena.expansions[levels.expansion_place(layer)];
            let attended = &arena.attended[own];
            // The last layer's work is still there from the forward pass.
            let last = layer + 1 == config.layers;
            let level = if last { Level::Everything } else { levels.of(layer) };
            let mut again = matches!(level, Level::Boundaries | Level::Aside);
            if again {
                attention.project(backend, &arena.batch, x, work, scratch);
                attention.output(backend, &arena.batch, x, attended, work, scratch);
            }
            if level != Level::Everything {
                mlp.expand(backend, &arena.batch, tokens, work, expansion, scratch);
            }
            if again {
                again = !mlp.contract_again(backend, &arena.batch, tokens, work, expansion, scratch);
            }
            let below = layer > lowest || through;
            let into_attention = below || attention.is_adapted();
            mlp.backward(
                backend,
                &arena.batch,
                tokens,
                work,
                expansion,
                scratch,
                flat,
                again,
                into_attention,
            );
            if into_attention {
                attention.backward(backend, &arena.batch, x, attended, work, scratch, flat, below);
            }
            let range = layout.layer_range(layer);
            if !range.is_empty() {
                ready(range, flat);
            }
        }
        if through {
            if let Some(rows) = self.trained.virtual_rows(hidden) {
                let gradient = View::<B>::new(&arena.scratch.gradient, tokens, hidden);
                backend.sum_virtual(&arena.batch, gradient, rows.of(flat));
            }
            if let Some(scale) = config.embedding_scale {
                backend.scale(scale, ViewMut::<B>::new(&mut arena.scratch.gradient, tokens, hidden));
            }
            if let Some(at) = self.trained.place(self.trained.branches.embedding_weight()) {
                let gradient = View::<B>::new(&arena.scratch.gradient, tokens, hidden);
                let table = ViewMut::<B>::at(&mut *flat, at, config.vocabulary_size, hidden);
                backend.scatter_ids(&arena.batch, gradient, false, table);
            }
            if let Some((branch, parameters)) = self.trained.embedding() {
                let site = EmbeddingSite { backend, batch: &arena.batch, parameters };
                let gradient = View::<B>::new(&arena.scratch.gradient, tokens, hidden);
                branch.backward(&site, gradient, flat, &mut arena.scratch.branch);
            }
        }
        let input = layout.range(Place::Input);
        if !input.is_empty() {
            ready(input, flat);
        }
        Ok(())
    }
}

fn layer_going_up<S: BaseSource + ?Sized>(
    base: &mut S,
    layer: usize,
    layers: usize,
) -> Result<LayerWeights<'_>> {
    if layer + 1 < layers {
        base.prefetch(layer + 1);
    }
    base.layer(layer)
}

fn layer_going_down<S: BaseSource + ?Sized>(
    base: &mut S,
    layer: usize,
    lowest: usize,
) -> Result<LayerWeights<'_>> {
    if layer > lowest {
        base.prefetch(layer - 1);
    }
    base.layer(layer)
}

/// Asks for the layers that a pass asks for, in its order, and computes nothing: for a member that has no rows while others, who share its
/// base, have. With the layout of what is trained the backward pass is accompanied too.
///
/// # Errors
/// When a layer's weights cannot be had.
pub fn accompany<S: BaseSource + ?Sized>(
    base: &mut S,
    layers: usize,
    training: Option<&ParameterLayout>,
) -> Result<()> {
    base.prefetch(0);
    for layer in 0..layers {
        layer_going_up(base, layer, layers)?;
    }
    let lowest = match training.and_then(ParameterLayout::lowest) {
        None | Some(Place::Head) => return Ok(()),
        Some(Place::Layer(layer)) => layer,
        Some(Place::Input) => 0,
    };
    for layer in (lowest..layers).rev() {
        layer_going_down(base, layer, lowest)?;
    }
    Ok(())
}

impl<B: Backend> Boundary<B> {
    /// Begins to copy a layer's input and attention's output to the host.
    fn put(&mut self, backend: &B, x: View<'_, B>, attended: &Attended<B>, config: &ModelConfig) {
        let queries = config.attention_heads * config.head_dim;
        backend.put_aside(x, &mut self.input);
        backend.put_aside(View::<B>::new(&attended.out, x.rows, queries), &mut self.out);
        let log_sum = View::<B>::new(&attended.log_sum, x.rows, config.attention_heads);
        backend.put_aside(log_sum, &mut self.log_sum);
    }

    /// Begins to copy them back.
    fn bring(
        &self,
        backend: &B,
        tokens: usize,
        input: &mut B::Buffer,
        attended: &mut Attended<B>,
        config: &ModelConfig,
    ) {
        let queries = config.attention_heads * config.head_dim;
        backend.bring_back(&self.input, ViewMut::<B>::new(input, tokens, config.hidden_size));
        backend.bring_back(&self.out, ViewMut::<B>::new(&mut attended.out, tokens, queries));
        let log_sum = ViewMut::<B>::new(&mut attended.log_sum, tokens, config.attention_heads);
        backend.bring_back(&self.log_sum, log_sum);
    }

    /// Whatever is queued from now on comes after the last copy.
    fn wait(&self, backend: &B) {
        // Copies follow each other in the order in which they were begun.
        backend.await_aside(&self.log_sum);
    }
}

/// What attention reads and writes in one layer.
pub struct Attend<'a, B: Backend> {
    /// Where operations run.
    pub backend: &'a B,
    /// The micro-batch.
    pub batch: &'a B::Batch,
    /// Its tokens.
    pub tokens: usize,
    /// q, k, v.
    pub work: &'a Work<B>,
    /// Where keys and values lie behind virtual ones.
    pub joined: &'a mut Joined<B>,
    /// Where the result goes.
    pub attended: &'a mut Attended<B>,
}

fn head<'a, B: Backend, S: BaseSource + ?Sized>(
    backend: &'a B,
    base: &'a S,
    trained: &Trained<'a, B>,
) -> Head<'a, B> {
    let config = base.config();
    let own = trained.place(trained.branches.final_norm());
    let weight = trained.vector(backend, own, base.final_norm());
    let norm = RmsNorm { weight, epsilon: config.norm_epsilon as f32, trained: own };
    let soft_cap = config.logits_soft_cap.map(|cap| cap as f32);
    Head { norm, table: base.head(), soft_cap, trained: trained.head(config) }
}

/// A place in the model.
struct Site<'a, 'b, B: Backend> {
    backend: &'a B,
    config: &'b ModelConfig,
    layer: usize,
    trained: &'b Trained<'a, B>,
    rope: &'a RopeTable<B>,
    /// Keys of the batch.
    keys: usize,
}

impl<'a, B: Backend> Site<'a, '_, B> {
    fn blocks<'c>(
        &self,
        weights: &LayerWeights<'c>,
        scratch: &'c mut [B::Owned; 7],
    ) -> (Attention<'c, B>, Mlp<'c, B>)
    where
        'a: 'c,
    {
        let epsilon = self.config.norm_epsilon as f32;
        let norm = |kind: Norm, weight: &'c [f32]| {
            let trained = self.trained.place(self.trained.branches.norm(self.layer, kind));
            RmsNorm { weight: self.trained.vector(self.backend, trained, weight), epsilon, trained }
        };
        let linear = |projection: Projection, scratch: &'c mut B::Owned| {
            self.linear(projection, weights.linear(projection), scratch)
        };
        let [q, k, v, o, gate, up, down] = scratch;
        let attention = Attention {
            norm: norm(Norm::AttentionInput, weights.input_norm),
            inputs: match self.config.fused {
                true => Inputs::Fused(linear(Projection::QueryKeyValue, q)),
                false => Inputs::Apart([
                    linear(Projection::Q, q),
                    linear(Projection::K, k),
                    linear(Projection::V, v),
                ]),
            },
            o: linear(Projection::O, o),
            query_key_norms: weights
                .query_norm
                .zip(weights.key_norm)
                .map(|(q, k)| [norm(Norm::Query, q), norm(Norm::Key, k)]),
            output_norm: weights.attention_output_norm.map(|weight| norm(Norm::AttentionOutput, weight)),
            shape: attention_shape(self.config, self.layer),
            rope: self.rope,
            prefix: self
                .trained
                .virtual_keys(self.layer, self.config.key_value_heads * self.config.head_dim)
                .map(|[keys, values]| Prefix { keys, values, rows: self.keys }),
        };
        let mlp = Mlp {
            norm: norm(Norm::MlpInput, weights.mlp_norm),
            inputs: match self.config.fused {
                true => Inputs::Fused(linear(Projection::GateUp, gate)),
                false => Inputs::Apart([linear(Projection::Gate, gate), linear(Projection::Up, up)]),
            },
            down: linear(Projection::Down, down),
            output_norm: weights.mlp_output_norm.map(|weight| norm(Norm::MlpOutput, weight)),
            activation: self.config.activation,
        };
        (attention, mlp)
    }

    fn linear<'c>(
        &self,
        projection: Projection,
        weights: &LinearWeights<'c>,
        scratch: &'c mut B::Owned,
    ) -> Linear<'c, B>
    where
        'a: 'c,
    {
        let parts = self.trained.branches.trained_parts(self.layer, projection.index());
        let parts = match self.trained.parameters {
            Some(_) => parts,
            None => TrainedParts::default(),
        };
        let branch = self.trained.linear(self.layer, projection.index());
        let update = branch.as_ref().and_then(|on| on.branch.update(on.parameters, on.dropout));
        let (weight, merged) = match (parts.weight, self.trained.parameters, &update) {
            (Some(at), Some(parameters), _) => {
                let [rows, columns] = self.config.shape(projection);
                (View::at(parameters, at, rows, columns), false)
            }
            (_, _, Some(update)) => self.backend.frozen_updated(&weights.weight, update, scratch),
            _ => (self.backend.frozen(&weights.weight, scratch), false),
        };
        let bias = weights.bias.map(|bias| self.trained.vector(self.backend, parts.bias, bias));
        Linear { weight, bias, branch, trained: parts, merged }
    }
}

/// The shape of attention in a layer of a model.
pub fn attention_shape(config: &ModelConfig, layer: usize) -> AttentionShape {
    AttentionShape {
        heads: config.attention_heads,
        kv_heads: config.key_value_heads,
        head_dim: config.head_dim,
        scale: config.attention_scale as f32,
        window: config.windows[layer],
        soft_cap: config.attention_soft_cap.map(|cap| cap as f32),
    }
}
