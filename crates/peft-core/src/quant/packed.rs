//! All quantised matrices of a decoder layer in one buffer.
//!
//! Codes and scales lie side by side so that a layer can be sharded, gathered and uploaded as plain bytes. Each part
//! begins at a multiple of 64 bytes; its directory says where. Maps and offsets of double quantisation are
//! a few numbers a matrix and lie outside.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use crate::quant::{
    Nf4Options,
    double::{self, NESTED_BLOCK},
    nf4::{self, Nf4View, Scales},
};

/// What every part's place is a multiple of, bytes.
pub const ALIGNMENT: usize = 64;

/// Keeps the buffer aligned.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u8; ALIGNMENT]);

/// A matrix to be packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedShape {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// How it is quantised.
    pub options: Nf4Options,
}

impl PackedShape {
    fn numbers(&self) -> usize {
        self.rows * self.columns
    }

    fn blocks(&self) -> usize {
        nf4::blocks(self.numbers(), self.options.block_size)
    }
}

/// Where the parts of one matrix lie in the buffer, bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedEntry {
    /// The matrix.
    pub shape: PackedShape,
    /// Two codes a byte.
    pub codes: Range<usize>,
    /// f32 a block, or a byte a block with double quantisation.
    pub scales: Range<usize>,
    /// f32 per 256 blocks; empty without double quantisation.
    pub nested: Range<usize>,
}

/// A decoder layer's quantised matrices.
#[derive(Debug, Clone)]
pub struct PackedLayer {
    lines: Vec<Line>,
    entries: Vec<PackedEntry>,
    /// Mean of the scales of each matrix; 0 without double quantisation.
    offsets: Vec<f32>,
    /// What bytes of scales stand for; nearly always one map for all.
    maps: Vec<[f32; 256]>,
    map_of: Vec<usize>,
}

/// The parts of one matrix, to be written.
#[derive(Debug)]
pub struct PackedParts<'a> {
    /// Two codes a byte.
    pub codes: &'a mut [u8],
    /// Block scales.
    pub scales: ScalesMut<'a>,
}

/// Block scales, to be written.
#[derive(Debug)]
pub enum ScalesMut<'a> {
    /// One f32 a block.
    Plain(&'a mut [f32]),
    /// One byte a block, and an f32 per 256 blocks.
    Double {
        /// One a block.
        codes: &'a mut [u8],
        /// One per [`NESTED_BLOCK`] blocks.
        nested: &'a mut [f32],
    },
}

/// Where each matrix lies, and where all end, bytes.
fn directory(shapes: &[PackedShape]) -> (Vec<PackedEntry>, usize) {
    let mut end = 0;
    let mut place = |bytes: usize| {
        let start = end;
        end = (start + bytes).next_multiple_of(ALIGNMENT);
        start..start + bytes
    };
    let entry = |shape: &PackedShape| {
        let blocks = shape.blocks();
        let (scales, nested) = match shape.options.double {
            true => (blocks, 4 * blocks.div_ceil(NESTED_BLOCK)),
            false => (4 * blocks, 0),
        };
        PackedEntry {
            shape: *shape,
            codes: place(nf4::code_bytes(shape.numbers())),
            scales: place(scales),
            nested: place(nested),
        }
    };
    (shapes.iter().map(entry).collect(), end)
}

impl PackedLayer {
    /// A buffer of zeros with room for `shapes`.
    pub fn new(shapes: &[PackedShape]) -> Self {
        let (entries, bytes) = directory(shapes);
        Self {
            lines: vec![Line::zeroed(); bytes / ALIGNMENT],
            offsets: vec![0.0; entries.len()],
            maps: Vec::new(),
            map_of: vec![0; entries.len()],
            entries,
        }
    }

    /// What [`Self::memory_bytes`] will be for `shapes`.
    pub fn bytes_for(shapes: &[PackedShape]) -> usize {
        let maps = usize::from(shapes.iter().any(|shape| shape.options.double));
        directory(shapes).1 + maps * size_of::<[f32; 256]>()
    }

    /// The whole buffer.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.lines)
    }

    /// The whole buffer, to be filled from elsewhere.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }

    /// Where each matrix lies.
    pub fn entries(&self) -> &[PackedEntry] {
        &self.entries
    }

    /// Memory held, bytes.
    pub fn memory_bytes(&self) -> usize {
        self.lines.len() * ALIGNMENT + self.maps.len() * size_of::<[f32; 256]>()
    }

    /// The parts of matrix `index`, to be written.
    pub fn parts_mut(&mut self, index: usize) -> PackedParts<'_> {
        let entry = self.entries[index].clone();
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.lines);
        // Parts lie one behind the other.
        let (codes, rest) = bytes[entry.codes.start..].split_at_mut(entry.scales.start - entry.codes.start);
        let codes = &mut codes[..entry.codes.len()];
        let (scales, nested) = rest.split_at_mut(entry.nested.start - entry.scales.start);
        let scales = &mut scales[..entry.scales.len()];
        let scales = match entry.shape.options.double {
            true => ScalesMut::Double {
                codes: scales,
                nested: bytemuck::cast_slice_mut(&mut nested[..entry.nested.len()]),
            },
            false => ScalesMut::Plain(bytemuck::cast_slice_mut(scales)),
        };
        PackedParts { codes, scales }
    }

    /// Stores the scales of matrix `index`, one a block, quantised themselves where its shape says so.
    pub fn set_scales(&mut self, index: usize, scales: &[f32]) {
        match self.parts_mut(index).scales {
            ScalesMut::Plain(out) => out.copy_from_slice(scales),
            ScalesMut::Double { codes, nested } => {
                let quantised = double::quantise(scales);
                codes.copy_from_slice(&quantised.codes);
                nested.copy_from_slice(&quantised.nested);
                self.set_double(index, quantised.offset, &double::DYNAMIC_MAP);
            }
        }
    }

    /// Sets what double quantisation of matrix `index` needs besides its bytes.
    pub fn set_double(&mut self, index: usize, offset: f32, map: &[f32; 256]) {
        self.offsets[index] = offset;
        self.map_of[index] = self.maps.iter().position(|known| known == map).unwrap_or_else(|| {
            self.maps.push(*map);
            self.maps.len() - 1
        });
    }

    /// Matrix `index`, to be read.
    ///
    /// # Panics
    /// If there is none, or [`Self::set_double`] was not called for it where it is called for: a defect of the caller.
    pub fn view(&self, index: usize) -> Nf4View<'_> {
        let entry = &self.entries[index];
        let bytes = self.bytes();
        let scales = &bytes[entry.scales.clone()];
        let scales = match entry.shape.options.double {
            true => Scales::Double {
                codes: scales,
                nested: bytemuck::cast_slice(&bytes[entry.nested.clone()]),
                offset: self.offsets[index],
                map: &self.maps[self.map_of[index]],
            },
            false => Scales::Plain(bytemuck::cast_slice(scales)),
        };
        let shape = entry.shape;
        Nf4View::new(shape.rows, shape.columns, shape.options.block_size, &bytes[entry.codes.clone()], scales)
    }
}
