//! Where each trained tensor lies in the flat buffer.
//!
//! Parameters, gradients and optimizer moments are flat f32 buffers of one layout. Layers come in descending order
//! and projections in the order in which the backward pass reaches them, so that it fills the gradient front to
//! back and the reduction can follow it. Every tensor begins at a multiple of [`ALIGNMENT`]; the gaps are zeros, and
//! stay zeros under AdamW.

use std::ops::Range;

use crate::{
    model::config::{ModelConfig, Projection},
    random,
};

/// What every tensor's place is a multiple of, floats.
pub const ALIGNMENT: usize = 64;

/// The projections in the order in which the backward pass reaches them.
pub const BACKWARD_ORDER: [Projection; 7] = [
    Projection::Down,
    Projection::Up,
    Projection::Gate,
    Projection::O,
    Projection::V,
    Projection::K,
    Projection::Q,
];

/// Which factor of the update B · A.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Down to the rank, `[r, in]`.
    A,
    /// Up from the rank, `[out, r]`.
    B,
}

impl Kind {
    /// The last part of the tensor's name in PEFT's files.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::A => "lora_A.weight",
            Self::B => "lora_B.weight",
        }
    }
}

/// One trained tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterEntry {
    /// Name in PEFT's files, for example `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub peft_name: String,
    /// The adapted module, for example `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// The module's layer.
    pub layer: usize,
    /// Which of the layer's linear modules.
    pub projection: Projection,
    /// Which factor.
    pub kind: Kind,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// Where it lies in the flat buffer, floats.
    pub range: Range<usize>,
    /// What the update is multiplied by: alpha / r, or alpha / sqrt(r).
    pub scale: f32,
}

/// A module and its place in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Layer, from 0.
    pub layer: usize,
    /// Which of its linear modules.
    pub projection: Projection,
}

/// Where each trained tensor lies in the flat buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterLayout {
    entries: Vec<ParameterEntry>,
    /// Index of A in `entries` by layer and projection; B follows it.
    places: Vec<[Option<usize>; 7]>,
    length: usize,
}

impl ParameterLayout {
    /// The layout of LoRA of rank `r` on `targets`, in any order.
    ///
    /// `scale` is alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA.
    pub fn lora(config: &ModelConfig, targets: &[Target], r: usize, scale: f32) -> Self {
        let mut wanted = vec![[false; 7]; config.layers];
        for target in targets {
            wanted[target.layer][target.projection.index()] = true;
        }
        let mut layout = Self {
            entries: Vec::with_capacity(2 * targets.len()),
            places: vec![[None; 7]; config.layers],
            length: 0,
        };
        for layer in (0..config.layers).rev() {
            for projection in BACKWARD_ORDER {
                if !wanted[layer][projection.index()] {
                    continue;
                }
                let [out, input] = config.shape(projection);
                layout.places[layer][projection.index()] = Some(layout.entries.len());
                layout.push(layer, projection, Kind::A, [r, input], scale);
                layout.push(layer, projection, Kind::B, [out, r], scale);
            }
        }
        layout
    }

    fn push(&mut self, layer: usize, projection: Projection, kind: Kind, shape: [usize; 2], scale: f32) {
        let module = projection.module(layer);
        let range = self.length..self.length + shape[0] * shape[1];
        self.length = range.end.next_multiple_of(ALIGNMENT);
        self.entries.push(ParameterEntry {
            peft_name: format!("base_model.model.{module}.{}", kind.suffix()),
            module,
            layer,
            projection,
            kind,
            shape,
            range,
            scale,
        });
    }

    /// All tensors, in the order in which they lie.
    pub fn entries(&self) -> &[ParameterEntry] {
        &self.entries
    }

    /// A and B of a module; none where it is not adapted.
    pub fn pair(&self, layer: usize, projection: Projection) -> Option<(&ParameterEntry, &ParameterEntry)> {
        let index = (*self.places.get(layer)?)[projection.index()]?;
        Some((&self.entries[index], &self.entries[index + 1]))
    }

    /// The part of the buffer that holds a layer's tensors, gaps included; empty where none is adapted.
    pub fn layer_range(&self, layer: usize) -> Range<usize> {
        let mut own = self.entries.iter().enumerate().filter(|(_, entry)| entry.layer == layer);
        let Some((first, entry)) = own.next() else { return 0..0 };
        let last = own.next_back().map_or(first, |(index, _)| index);
        let end = self.entries.get(last + 1).map_or(self.length, |next| next.range.start);
        entry.range.start..end
    }

    /// Length of the flat buffer, floats, gaps included.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Trained parameters, without gaps.
    pub fn parameters(&self) -> usize {
        self.entries.iter().map(|entry| entry.range.len()).sum()
    }

    /// Writes the start that PEFT takes: A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5), B zero.
    ///
    /// Each tensor depends on `seed` and its name alone. `parameters` is of [`Self::len`].
    pub fn initialise(&self, seed: u64, parameters: &mut [f32]) {
        parameters.fill(0.0);
        for entry in self.entries.iter().filter(|entry| entry.kind == Kind::A) {
            let bound = 1.0 / (entry.shape[1] as f32).sqrt();
            random::fill_uniform(seed, &entry.peft_name, bound, &mut parameters[entry.range.clone()]);
        }
    }
}
