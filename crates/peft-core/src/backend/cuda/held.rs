//! A base that lies on the card alone: what the layer loop asks it for are names of what the card holds.

use std::{fmt, sync::Arc};

use half::bf16;

use super::{
    base::Nf4Argument,
    device::Device,
    memory::{DeviceMemory, Numbers},
};
use crate::{
    error::Result,
    model::{
        BaseSource, EmbeddingView, Held, HeldView, LayerWeights, LinearWeights, Matrix, ModelConfig, Norm,
        Projection, resident::Table,
    },
    quant::{
        Nf4View,
        double::NESTED_BLOCK,
        nf4::{self, Scales},
    },
};

/// Numbers of the base that lie on the card.
pub(super) struct HeldNumbers {
    device: Arc<Device>,
    kind: Kind,
    /// Keeps the memory.
    _memory: DeviceMemory,
}

enum Kind {
    Plain { address: u64, numbers: Numbers },
    Packed { argument: Nf4Argument, map: Box<[f32; 256]> },
}

impl HeldNumbers {
    /// Numbers one by one.
    pub(super) fn plain(device: &Arc<Device>, memory: &DeviceMemory) -> Box<Self> {
        let kind = Kind::Plain { address: memory.address, numbers: memory.numbers };
        Box::new(Self { device: Arc::clone(device), kind, _memory: memory.share() })
    }

    /// A matrix in NF4; `map` is what bytes of scales stand for, of no use without double quantisation.
    pub(super) fn packed(
        device: &Arc<Device>,
        memory: &DeviceMemory,
        argument: Nf4Argument,
        map: Box<[f32; 256]>,
    ) -> Box<Self> {
        let kind = Kind::Packed { argument, map };
        Box::new(Self { device: Arc::clone(device), kind, _memory: memory.share() })
    }

    /// By what the card finds it again.
    pub(super) fn key(&self) -> usize {
        HeldView::new(self, 0, 0).place()
    }
}

impl fmt::Debug for HeldNumbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldNumbers").field("card", &self.device.name).finish_non_exhaustive()
    }
}

impl Held for HeldNumbers {
    fn fetch(&self, first: usize, out: &mut [f32]) {
        match &self.kind {
            Kind::Plain { address, numbers: Numbers::F32 } => {
                self.device.download(address + 4 * first as u64, out);
            }
            Kind::Plain { address, numbers: Numbers::Bf16 } => {
                let mut narrow = vec![bf16::NAN; out.len()];
                self.device.download(address + 2 * first as u64, &mut narrow);
                out.iter_mut().zip(&narrow).for_each(|(out, number)| *out = number.to_f32());
            }
            Kind::Packed { argument, map } => {
                let block_size = 1_usize << argument.block_shift;
                // Where scales of scales begin, so that what is fetched is a matrix of its own.
                let start = first / (block_size * NESTED_BLOCK) * (block_size * NESTED_BLOCK);
                let count = first + out.len() - start;
                let (block, blocks) = (start / block_size, nf4::blocks(count, block_size));
                let mut codes = vec![0_u8; nf4::code_bytes(count)];
                self.device.download(argument.codes + start as u64 / 2, &mut codes);
                let mut write = |scales: Scales<'_>| {
                    Nf4View::new(1, count, block_size, &codes, scales).write_f32(first - start, out);
                };
                if argument.map == 0 {
                    let mut scales = vec![f32::NAN; blocks];
                    self.device.download(argument.nested + 4 * block as u64, &mut scales);
                    return write(Scales::Plain(&scales));
                }
                let mut scales = vec![0_u8; blocks];
                let mut nested = vec![f32::NAN; blocks.div_ceil(NESTED_BLOCK)];
                self.device.download(argument.scales + block as u64, &mut scales);
                let at = argument.nested + 4 * (block / NESTED_BLOCK) as u64;
                self.device.download(at, &mut nested);
                write(Scales::Double { codes: &scales, nested: &nested, offset: argument.offset, map });
            }
        }
    }
}

/// An embedding or head.
#[derive(Debug)]
pub(super) enum HeldTable {
    Near { held: Box<HeldNumbers>, rows: usize, bytes: u64 },
    Far(Table),
}

impl HeldTable {
    fn view(&self, columns: usize) -> EmbeddingView<'_> {
        match self {
            Self::Near { held, rows, bytes } => EmbeddingView::from_held(&**held, *rows, columns, *bytes),
            Self::Far(table) => table.view(columns),
        }
    }
}

/// A decoder layer: its vectors on the host as well, its matrices on the card alone.
#[derive(Debug)]
pub(super) struct HeldLayer {
    /// By [`Norm::index`]; empty where there is none.
    pub(super) norms: [Vec<f32>; Norm::ALL.len()],
    /// In the order of [`ModelConfig::projections`].
    #[expect(clippy::vec_box, reason = "the address of each is its name on the card")]
    pub(super) weights: Vec<Box<HeldNumbers>>,
    /// In the order of [`ModelConfig::projections`].
    pub(super) biases: Vec<Option<Vec<f32>>>,
}

/// A whole base on the card.
#[derive(Debug)]
pub(crate) struct CardBase {
    pub(super) config: ModelConfig,
    pub(super) layers: Vec<HeldLayer>,
    pub(super) embedding: HeldTable,
    pub(super) final_norm: Vec<f32>,
    pub(super) head: Option<HeldTable>,
}

impl BaseSource for CardBase {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn prefetch(&mut self, _layer: usize) {}

    fn layer(&mut self, layer: usize) -> Result<LayerWeights<'_>> {
        let held = &self.layers[layer];
        let mut stored = held.weights.iter().zip(&held.biases);
        let linear = |projection: Projection| {
            let (weight, bias) = stored.next().expect("a layer is loaded with all its projections");
            let [rows, columns] = self.config.shape(projection);
            LinearWeights {
                weight: Matrix::Held(HeldView::new(&**weight, rows, columns)),
                bias: bias.as_deref(),
            }
        };
        Ok(LayerWeights::of(&self.config, &held.norms, linear))
    }

    fn embedding(&self) -> EmbeddingView<'_> {
        self.embedding.view(self.config.hidden_size)
    }

    fn final_norm(&self) -> &[f32] {
        &self.final_norm
    }

    fn head(&self) -> EmbeddingView<'_> {
        self.head.as_ref().unwrap_or(&self.embedding).view(self.config.hidden_size)
    }
}
