//! Reading one part of a base, and no more.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    error::{Error, Origin, Result},
    model::{
        ModelConfig, ShardPart, ShardedBase,
        resident::{
            Hashes, LoadProgress, Reader, hashes,
            plan::{BasePlan, LayerPlan, WeightPlan},
        },
        weights::{ModelFiles, Tensor},
    },
    quant::{
        AlignedBytes, Cut, Nf4Options, PackedShape,
        bitsandbytes::StoredWeight,
        cut::Piece,
        nf4,
        packed::{PackedParts, ScalesMut},
    },
};

use super::{Layer, Weight, settle::Raw, slots::Slots};

impl ShardedBase {
    /// Loads a part of a folder in Hugging Face layout, as [`super::super::ResidentBase::load_over`] loads all of it: of each shared
    /// matrix no byte is read that belongs to another part.
    ///
    /// # Errors
    /// As [`super::super::ResidentBase::load`]; and where the base cannot be shared.
    pub fn load(
        folder: &Path,
        over: &[PathBuf],
        nf4: Option<Nf4Options>,
        part: ShardPart,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        let config = ModelConfig::load(folder)?;
        let files = ModelFiles::open_over(folder, over)?;
        let plan = BasePlan::new(&files, &config, nf4)?;
        plan.check_shard(folder)?;
        let mut loader = Loader {
            part,
            own: Hashes::default(),
            reader: Reader::new(bytes_to_read(&plan, part), progress),
            last: None,
            raw: Raw::default(),
        };
        let embedding = loader.reader.table(&plan.embedding)?;
        let less_one = config.norms_less_one;
        let layers = plan.layers.iter().map(|layer| loader.layer(layer, less_one)).collect::<Result<_>>()?;
        let final_norm = loader.reader.norm(&plan.final_norm, less_one)?;
        let head = plan.head.as_ref().map(|head| loader.reader.table(head)).transpose()?;
        let Loader { own, reader, raw, .. } = loader;
        let common = reader.hashes.sum();
        let frame = hashes::frame(&config, &plan.tensors());
        // Where every matrix comes with its scales quantised, or none is quantised again, nobody need say anything.
        let waits = plan
            .layers
            .iter()
            .flat_map(|layer| &layer.weights)
            .any(|weight| matches!(weight, WeightPlan::Quantise(_, shape) if shape.options.double));
        Ok(Self {
            identity: hashes::finish(&frame, &common),
            frame,
            common,
            own: own.sum(),
            config,
            part,
            layers,
            embedding,
            final_norm,
            head,
            raw: waits.then_some(raw),
            slots: Slots::default(),
        })
    }
}

/// Bytes of the files that a part's member reads: its share of what is shared, and all of the rest.
fn bytes_to_read(plan: &BasePlan<'_>, part: ShardPart) -> u64 {
    let all: usize = plan.tensors().iter().map(Tensor::bytes).sum();
    let shared = plan.layers.iter().flat_map(|layer| &layer.weights).map(|weight| match weight {
        WeightPlan::Quantise(tensor, _) => tensor.bytes(),
        WeightPlan::Stored(stored) => stored.bytes(),
        WeightPlan::Dense(_) | WeightPlan::Widen(_) => 0,
    });
    let shared: usize = shared.sum();
    (all - shared + shared / part.parts) as u64
}

struct Loader<'a> {
    part: ShardPart,
    /// What this part alone reads.
    own: Hashes,
    reader: Reader<'a>,
    /// The cut of the layer before, which is nearly always that of the next.
    last: Option<Arc<Cut>>,
    raw: Raw,
}

impl Loader<'_> {
    fn layer(&mut self, plan: &LayerPlan<'_>, less_one: bool) -> Result<Layer> {
        let norms = self.reader.norms(plan, less_one)?;
        let shapes: Vec<PackedShape> = plan.weights.iter().filter_map(WeightPlan::packed).collect();
        let cut = match self.last.take().filter(|last| last.shapes() == shapes) {
            Some(last) => last,
            None => Arc::new(Cut::new(&shapes, self.part.parts)),
        };
        self.last = Some(Arc::clone(&cut));
        let mut own = AlignedBytes::zeros(cut.part_bytes());
        let mut weights = Vec::with_capacity(plan.weights.len());
        let mut double = Vec::with_capacity(shapes.len());
        let mut maps: Vec<[f32; 256]> = Vec::new();
        let mut raw = Vec::new();
        for weight in &plan.weights {
            let matrix = double.len();
            let pieces = cut.pieces(self.part.part).iter().filter(|piece| piece.matrix == matrix);
            match weight {
                WeightPlan::Dense(tensor) => {
                    weights.push(Weight::Dense(self.reader.numbers(tensor)?));
                    continue;
                }
                WeightPlan::Widen(stored) => {
                    weights.push(Weight::Dense(self.reader.widened(stored)?));
                    continue;
                }
                WeightPlan::Quantise(tensor, shape) => {
                    for piece in pieces {
                        let into = cut.parts_mut(self.part.part, piece, own.bytes_mut());
                        raw.push(self.quantise(tensor, *shape, piece, into)?);
                    }
                    double.push(None);
                }
                WeightPlan::Stored(stored) => {
                    for piece in pieces {
                        let into = cut.parts_mut(self.part.part, piece, own.bytes_mut());
                        self.read_stored(stored, piece, into)?;
                        raw.push(Vec::new());
                    }
                    double.push(self.common(stored)?.map(|(offset, map)| {
                        let known = maps.iter().position(|known| *known == map);
                        let map = known.unwrap_or_else(|| {
                            maps.push(map);
                            maps.len() - 1
                        });
                        (offset, map)
                    }));
                }
            }
            weights.push(Weight::Shared(matrix));
        }
        self.raw.0.push(raw);
        let biases = self.reader.biases(plan)?;
        Ok(Layer { norms, weights, biases, cut, own: Arc::new(own), double, maps })
    }

    /// Quantises a piece of a tensor. Returns its scales where they are to be quantised again.
    fn quantise(
        &mut self,
        tensor: &Tensor<'_>,
        shape: PackedShape,
        piece: &Piece,
        into: PackedParts<'_>,
    ) -> Result<Vec<f32>> {
        let block_size = shape.options.block_size;
        let mut scales = vec![0.0; nf4::blocks(piece.numbers.len(), block_size)];
        let (mut finite, mut done) = (true, 0);
        let (codes, own, reader) = (into.codes, &mut self.own, &mut self.reader);
        let mut witness = |from: usize, bytes: &[u8]| {
            own.see_at(tensor, from, bytes);
            reader.count(bytes.len());
        };
        tensor.pieces_f32_of(piece.numbers.clone(), &mut witness, |values| {
            let codes = &mut codes[done / 2..][..nf4::code_bytes(values.len())];
            let scales = &mut scales[done / block_size..][..nf4::blocks(values.len(), block_size)];
            finite &= nf4::quantise(values, block_size, codes, scales);
            done += values.len();
        })?;
        if !finite {
            let (file, tensor) = (tensor.file().to_owned(), tensor.name().to_owned());
            return Err(Error::NonFinite { origin: Origin::Base, file, tensor });
        }
        Ok(match into.scales {
            ScalesMut::Plain(out) => {
                out.copy_from_slice(&scales);
                Vec::new()
            }
            ScalesMut::Double { .. } => scales,
        })
    }

    fn read_stored(&mut self, stored: &StoredWeight<'_>, piece: &Piece, into: PackedParts<'_>) -> Result<()> {
        let (own, reader) = (&mut self.own, &mut self.reader);
        stored.read_part(piece.numbers.clone(), into, &mut |tensor, from, bytes| {
            own.see_at(tensor, from, bytes);
            reader.count(bytes.len());
        })
    }

    fn common(&mut self, stored: &StoredWeight<'_>) -> Result<Option<(f32, [f32; 256])>> {
        let reader = &mut self.reader;
        stored.read_common(&mut |tensor, bytes| {
            reader.hashes.see(tensor, bytes);
            reader.count(bytes.len());
        })
    }
}
