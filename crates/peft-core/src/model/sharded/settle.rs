//! What the members of a group tell each other before a base is of use: the means of scales, and what they read.

use std::sync::Arc;

use crate::{
    error::{Error, Result},
    model::{
        ShardedBase,
        resident::{ContentSum, hashes},
    },
    quant::{
        double::{self, DYNAMIC_MAP},
        packed::ScalesMut,
    },
};

/// Scales as they were measured, by layer and piece of this part; empty where they are not quantised again.
#[derive(Debug, Default)]
pub(super) struct Raw(pub(super) Vec<Vec<Vec<f32>>>);

impl Raw {
    pub(super) fn bytes(&self) -> usize {
        self.0.iter().flatten().map(|scales| size_of_val(scales.as_slice())).sum()
    }
}

impl ShardedBase {
    /// Whether it is of use: nothing is missing that the other members would have to say.
    pub fn is_settled(&self) -> bool {
        self.raw.is_none()
    }

    /// How many means of scales the members tell each other: one for each shared matrix of each layer.
    pub fn means(&self) -> usize {
        self.layers.iter().map(|layer| layer.cut.shapes().len()).sum()
    }

    /// Adds this part's scales to the sums of the parts below it, in their order: what the last member has is the sum of all, bit for bit
    /// as a whole base sums them. Members do this one after the other, by part.
    ///
    /// # Errors
    /// Not of [`ShardedBase::means`] numbers; or it is settled, and has the scales no more.
    pub fn add_scales(&self, sums: &mut [f64]) -> Result<()> {
        self.check_length(sums.len())?;
        let Some(raw) = &self.raw else {
            let problem = "its scales were quantised before".to_owned();
            return Err(Error::NotGathered { layer: 0, problem });
        };
        let mut first = 0;
        for (layer, raw) in self.layers.iter().zip(&raw.0) {
            for (piece, scales) in layer.cut.pieces(self.part.part).iter().zip(raw) {
                let sum = &mut sums[first + piece.matrix];
                *sum = double::sum(*sum, scales);
            }
            first += layer.cut.shapes().len();
        }
        Ok(())
    }

    /// The means that all sums make.
    ///
    /// # Errors
    /// Not of [`ShardedBase::means`] numbers.
    pub fn means_of(&self, sums: &[f64]) -> Result<Vec<f32>> {
        self.check_length(sums.len())?;
        let shapes = self.layers.iter().flat_map(|layer| layer.cut.shapes());
        let blocks = shapes.map(|shape| (shape.rows * shape.columns).div_ceil(shape.options.block_size));
        Ok(blocks.zip(sums).map(|(blocks, sum)| double::mean_of(*sum, blocks)).collect())
    }

    /// The means that it was settled with: for a member that comes later. None before.
    pub fn settled_means(&self) -> Option<Vec<f32>> {
        self.raw.is_none().then(|| {
            let all = self.layers.iter().flat_map(|layer| &layer.double);
            all.map(|double| double.map_or(0.0, |(offset, _)| offset)).collect()
        })
    }

    /// Quantises this part's scales about the means of all members'. What was settled before stays.
    ///
    /// # Errors
    /// Not of [`ShardedBase::means`] numbers.
    pub fn settle(&mut self, means: &[f32]) -> Result<()> {
        self.check_length(means.len())?;
        let Some(raw) = self.raw.take() else { return Ok(()) };
        let part = self.part.part;
        let mut first = 0;
        for (layer, raw) in self.layers.iter_mut().zip(raw.0) {
            let cut = Arc::clone(&layer.cut);
            let quantised_here =
                |matrix: usize| cut.shapes()[matrix].options.double && layer.double[matrix].is_none();
            let here: Vec<bool> = (0..cut.shapes().len()).map(quantised_here).collect();
            for (piece, scales) in cut.pieces(part).iter().zip(raw) {
                if !here[piece.matrix] {
                    continue;
                }
                let quantised = double::quantise_about(&scales, means[first + piece.matrix]);
                let own = Arc::make_mut(&mut layer.own);
                if let ScalesMut::Double { codes, nested } =
                    cut.parts_mut(part, piece, own.bytes_mut()).scales
                {
                    codes.copy_from_slice(&quantised.codes);
                    nested.copy_from_slice(&quantised.nested);
                }
            }
            for (matrix, _) in here.iter().enumerate().filter(|(_, here)| **here) {
                let known = layer.maps.iter().position(|map| *map == DYNAMIC_MAP);
                let map = known.unwrap_or_else(|| {
                    layer.maps.push(DYNAMIC_MAP);
                    layer.maps.len() - 1
                });
                layer.double[matrix] = Some((means[first + matrix], map));
            }
            first += cut.shapes().len();
        }
        Ok(())
    }

    /// The sum of what this member alone read; the sums of all members of a group make the hash of their base.
    pub fn own_sum(&self) -> ContentSum {
        self.own
    }

    /// The hash of the base whose members read this much in all: that of the same base when it is not shared.
    pub fn content_hash(&self, members: &[ContentSum]) -> blake3::Hash {
        let mut sum = self.common;
        members.iter().for_each(|own| hashes::add(&mut sum, own));
        hashes::finish(&self.frame, &sum)
    }

    fn check_length(&self, found: usize) -> Result<()> {
        let expected = self.means();
        let what = "the means of a shared base";
        if found == expected { Ok(()) } else { Err(Error::Length { what, found, expected }) }
    }
}
