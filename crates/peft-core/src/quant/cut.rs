//! A decoder layer's quantised matrices, cut into parts that several members hold.
//!
//! The layer's matrices lie end to end as a row of units: the codes and scales of [`NESTED_BLOCK`] blocks, which share one
//! scale of scales. The row is cut between units into parts of nearly the same length, so that every number
//! of a part can be quantised and read back without the others. A part is one buffer: for each matrix that it has some of, its
//! codes, then its scales, then its scales of scales. Parts are made equally long, so that an all-gather lays
//! them end to end; matrices are read from there piece by piece, without being put together.

use std::ops::Range;

use bytemuck::Zeroable;

use crate::quant::{
    double::NESTED_BLOCK,
    nf4::{self, Nf4View, Scales},
    packed::{ALIGNMENT, Line, PackedParts, PackedShape, ScalesMut},
};

/// Bytes that begin at a multiple of [`ALIGNMENT`], as the parts of [`Cut`] want them.
#[derive(Debug, Clone, Default)]
pub struct AlignedBytes(Vec<Line>);

impl AlignedBytes {
    /// So many zeros, rounded up to a multiple of [`ALIGNMENT`].
    pub fn zeros(bytes: usize) -> Self {
        Self(vec![Line::zeroed(); bytes.div_ceil(ALIGNMENT)])
    }

    /// All of them.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }

    /// All of them, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.0)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len() * ALIGNMENT
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Some of a matrix, all of which one part holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Which matrix of the layer.
    pub matrix: usize,
    /// Its numbers, counted row after row. Begins at a unit.
    pub numbers: Range<usize>,
    /// Places in all parts end to end.
    codes: Range<usize>,
    scales: Range<usize>,
    nested: Range<usize>,
}

impl Piece {
    /// Its blocks, counted from the matrix's first.
    pub fn blocks(&self, shape: &PackedShape) -> Range<usize> {
        let size = shape.options.block_size;
        self.numbers.start / size..self.numbers.end.div_ceil(size)
    }
}

/// How a layer is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    shapes: Vec<PackedShape>,
    /// By part, and within a part by matrix; the pieces of a matrix lie together in the order of its numbers.
    pieces: Vec<Piece>,
    of_part: Vec<Range<usize>>,
    of_matrix: Vec<Range<usize>>,
    part_bytes: usize,
}

impl Cut {
    /// Cuts a layer into `parts`.
    ///
    /// # Panics
    /// If there is to be no part: a defect of the caller.
    pub fn new(shapes: &[PackedShape], parts: usize) -> Self {
        assert!(parts > 0, "a layer is cut into parts");
        let units = units(shapes);
        let total: usize = units.iter().map(|(_, _, bytes)| bytes).sum();
        let mut pieces: Vec<Piece> = Vec::new();
        let mut of_part = vec![0..0; parts];
        let (mut passed, mut last_part) = (0, 0);
        for (matrix, numbers, bytes) in units {
            let part = (passed * parts / total.max(1)).min(parts - 1);
            passed += bytes;
            match pieces.last_mut().filter(|last| last.matrix == matrix && part == last_part) {
                Some(last) => last.numbers.end = numbers.end,
                None => pieces.push(Piece { matrix, numbers, codes: 0..0, scales: 0..0, nested: 0..0 }),
            }
            for part in &mut of_part[last_part + 1..=part.max(last_part)] {
                *part = pieces.len() - 1..pieces.len() - 1;
            }
            of_part[part].end = pieces.len();
            last_part = part;
        }
        for part in &mut of_part[last_part + 1..] {
            *part = pieces.len()..pieces.len();
        }
        let mut part_bytes = 0;
        for own in &of_part {
            part_bytes = part_bytes.max(place(shapes, &mut pieces[own.clone()]));
        }
        for (part, own) in of_part.iter().enumerate() {
            for piece in &mut pieces[own.clone()] {
                for range in [&mut piece.codes, &mut piece.scales, &mut piece.nested] {
                    *range = range.start + part * part_bytes..range.end + part * part_bytes;
                }
            }
        }
        let first = |matrix: usize| pieces.partition_point(|piece| piece.matrix < matrix);
        let of_matrix = (0..shapes.len()).map(|matrix| first(matrix)..first(matrix + 1)).collect();
        Self { shapes: shapes.to_vec(), pieces, of_part, of_matrix, part_bytes }
    }

    /// The matrices.
    pub fn shapes(&self) -> &[PackedShape] {
        &self.shapes
    }

    /// How many parts there are.
    pub fn parts(&self) -> usize {
        self.of_part.len()
    }

    /// Bytes of one part.
    pub fn part_bytes(&self) -> usize {
        self.part_bytes
    }

    /// Bytes of all parts end to end.
    pub fn bytes(&self) -> usize {
        self.parts() * self.part_bytes
    }

    /// What a part holds.
    pub fn pieces(&self, part: usize) -> &[Piece] {
        &self.pieces[self.of_part[part].clone()]
    }

    /// The codes and scales of a piece of `part`, to be written into the buffer of that part alone.
    ///
    /// # Panics
    /// If the buffer is shorter than a part, or the piece another part's: a defect of the caller.
    pub fn parts_mut<'a>(&self, part: usize, piece: &Piece, own: &'a mut [u8]) -> PackedParts<'a> {
        let from = part * self.part_bytes;
        let here = |range: &Range<usize>| range.start - from..range.end - from;
        let (codes, scales, nested) = (here(&piece.codes), here(&piece.scales), here(&piece.nested));
        // They lie one behind the other.
        let (before, rest) = own[codes.start..].split_at_mut(scales.start - codes.start);
        let (middle, rest) = rest.split_at_mut(nested.start - scales.start);
        let middle = &mut middle[..scales.len()];
        let scales = match self.shapes[piece.matrix].options.double {
            true => ScalesMut::Double {
                codes: middle,
                nested: bytemuck::cast_slice_mut(&mut rest[..nested.len()]),
            },
            false => ScalesMut::Plain(bytemuck::cast_slice_mut(middle)),
        };
        PackedParts { codes: &mut before[..codes.len()], scales }
    }

    /// A matrix, read from all parts end to end. `double` is its mean scale and what bytes of scales stand for.
    ///
    /// # Panics
    /// If `gathered` is shorter than [`Cut::bytes`], or `double` is missing where it is called for: a defect of the caller.
    pub fn view<'a>(
        &'a self,
        matrix: usize,
        gathered: &'a [u8],
        double: Option<(f32, &'a [f32; 256])>,
    ) -> Nf4Pieces<'a> {
        let shape = self.shapes[matrix];
        assert!(gathered.len() >= self.bytes(), "all parts are there");
        assert_eq!(shape.options.double, double.is_some(), "scales of scales are known where there are any");
        Nf4Pieces { shape, pieces: &self.pieces[self.of_matrix[matrix].clone()], gathered, double }
    }
}

/// The units of a layer in order: matrix, numbers, bytes.
fn units(shapes: &[PackedShape]) -> Vec<(usize, Range<usize>, usize)> {
    let mut units = Vec::new();
    for (matrix, shape) in shapes.iter().enumerate() {
        let numbers = shape.rows * shape.columns;
        let unit = NESTED_BLOCK * shape.options.block_size;
        for start in (0..numbers).step_by(unit) {
            let numbers = start..(start + unit).min(numbers);
            let [codes, scales, nested] = bytes_of(shape, &numbers);
            units.push((matrix, numbers, codes + scales + nested));
        }
    }
    units
}

/// Bytes of codes, scales, and scales of scales.
fn bytes_of(shape: &PackedShape, numbers: &Range<usize>) -> [usize; 3] {
    let blocks = nf4::blocks(numbers.len(), shape.options.block_size);
    let codes = nf4::code_bytes(numbers.len());
    match shape.options.double {
        true => [codes, blocks, 4 * blocks.div_ceil(NESTED_BLOCK)],
        false => [codes, 4 * blocks, 0],
    }
}

/// Lays the pieces of a part one behind the other; returns where they end.
fn place(shapes: &[PackedShape], pieces: &mut [Piece]) -> usize {
    let mut end = 0;
    let mut next = |bytes: usize| {
        let start = end;
        end = (start + bytes).next_multiple_of(ALIGNMENT);
        start..start + bytes
    };
    for piece in pieces {
        let [codes, scales, nested] = bytes_of(&shapes[piece.matrix], &piece.numbers);
        (piece.codes, piece.scales, piece.nested) = (next(codes), next(scales), next(nested));
    }
    end
}

/// A matrix in NF4, row-major, whose pieces lie in several places.
#[derive(Debug, Clone, Copy)]
pub struct Nf4Pieces<'a> {
    shape: PackedShape,
    pieces: &'a [Piece],
    gathered: &'a [u8],
    double: Option<(f32, &'a [f32; 256])>,
}

impl<'a> Nf4Pieces<'a> {
    /// Its shape, and how it is quantised.
    pub fn shape(&self) -> PackedShape {
        self.shape
    }

    /// Where the parts lie in memory.
    pub(crate) fn place(&self) -> usize {
        self.gathered.as_ptr() as usize
    }

    /// Its pieces in the order of its numbers: each as a row, and its first number's place in the matrix.
    pub fn pieces(&self) -> impl Iterator<Item = (usize, Nf4View<'a>)> {
        let this = *self;
        this.pieces.iter().map(move |piece| {
            let scales = &this.gathered[piece.scales.clone()];
            let scales = match this.double {
                Some((offset, map)) => Scales::Double {
                    codes: scales,
                    nested: bytemuck::cast_slice(&this.gathered[piece.nested.clone()]),
                    offset,
                    map,
                },
                None => Scales::Plain(bytemuck::cast_slice(scales)),
            };
            let codes = &this.gathered[piece.codes.clone()];
            let size = this.shape.options.block_size;
            (piece.numbers.start, Nf4View::new(1, piece.numbers.len(), size, codes, scales))
        })
    }

    /// Writes the numbers from flat index `start` on as f32, as many as `out` holds: the bits of [`Nf4View::write_f32`].
    ///
    /// # Panics
    /// If there are not that many: a defect of the caller.
    pub fn write_f32(&self, start: usize, out: &mut [f32]) {
        let end = start + out.len();
        assert!(end <= self.shape.rows * self.shape.columns, "the range lies within the matrix");
        for (first, view) in self.pieces() {
            let (from, to) = (start.max(first), end.min(first + view.columns()));
            if from < to {
                view.write_f32(from - first, &mut out[from - start..to - start]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::{Nf4Options, PackedLayer};

    fn shapes(sizes: &[(usize, usize)], double: bool) -> Vec<PackedShape> {
        let options = Nf4Options { block_size: 32, double };
        sizes.iter().map(|(rows, columns)| PackedShape { rows: *rows, columns: *columns, options }).collect()
    }

    #[test]
    fn equal_matrices_are_cut_into_equal_parts() {
        // 32 * 256 numbers a unit: 4, 4 and 8 units.
        let shapes = shapes(&[(128, 256), (256, 128), (256, 256)], true);
        let whole = PackedLayer::bytes_for(&shapes) - 1024;
        for parts in [1, 2, 4, 8] {
            let cut = Cut::new(&shapes, parts);
            assert_eq!(cut.bytes() / whole, 1, "{parts} parts take little more than the whole");
            assert!(cut.bytes() < whole + parts * 8 * ALIGNMENT);
        }
        assert!(Cut::new(&shapes, 40).pieces(39).is_empty(), "there are but 16 units");
    }

    proptest! {
        /// Whatever the shapes and the number of parts, what is quantised part by part reads as what is quantised whole.
        #[test]
        fn parts_end_to_end_read_as_the_whole(
            sizes in proptest::collection::vec((1usize..90, 1usize..300), 1..5),
            parts in 1usize..6,
            double: bool,
            seed: u64,
        ) {
            let shapes = shapes(&sizes, double);
            let mut state = seed | 1;
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 3.0
            };
            let weights: Vec<Vec<f32>> =
                shapes.iter().map(|shape| (0..shape.rows * shape.columns).map(|_| next()).collect()).collect();
            let mut whole = PackedLayer::new(&shapes);
            let cut = Cut::new(&shapes, parts);
            let mut gathered = AlignedBytes::zeros(cut.bytes());
            let mut offsets = Vec::new();
            let mut all_scales = Vec::new();
            for (index, weights) in weights.iter().enumerate() {
                let mut scales = vec![0.0; nf4::blocks(weights.len(), 32)];
                prop_assert!(nf4::quantise(weights, 32, whole.parts_mut(index).codes, &mut scales));
                whole.set_scales(index, &scales);
                offsets.push(crate::quant::double::quantise(&scales).offset);
                all_scales.push(scales);
            }
            let mut seen = vec![0; shapes.len()];
            for part in 0..parts {
                let bytes = &mut gathered.bytes_mut()[part * cut.part_bytes()..][..cut.part_bytes()];
                for piece in cut.pieces(part) {
                    prop_assert_eq!(seen[piece.matrix], piece.numbers.start);
                    seen[piece.matrix] = piece.numbers.end;
                    let values = &weights[piece.matrix][piece.numbers.clone()];
                    let shape = &shapes[piece.matrix];
                    let mut scales = vec![0.0; nf4::blocks(values.len(), 32)];
                    let into = cut.parts_mut(part, piece, bytes);
                    prop_assert!(nf4::quantise(values, 32, into.codes, &mut scales));
                    prop_assert_eq!(&scales, &all_scales[piece.matrix][piece.blocks(shape)]);
                    match into.scales {
                        ScalesMut::Plain(out) => out.copy_from_slice(&scales),
                        ScalesMut::Double { codes, nested } => {
                            let quantised = crate::quant::double::quantise_about(&scales, offsets[piece.matrix]);
                            codes.copy_from_slice(&quantised.codes);
                            nested.copy_from_slice(&quantised.nested);
                        }
                    }
                }
            }
            for (index, weights) in weights.iter().enumerate() {
                prop_assert_eq!(seen[index], weights.len());
                let double = double.then_some((offsets[index], &crate::quant::double::DYNAMIC_MAP));
                let view = cut.view(index, gathered.bytes(), double);
                let (mut found, mut expected) = (vec![f32::NAN; weights.len()], vec![f32::NAN; weights.len()]);
                whole.view(index).write_f32(0, &mut expected);
                view.write_f32(0, &mut found);
                prop_assert_eq!(bytemuck::cast_slice::<f32, u32>(&found), bytemuck::cast_slice::<f32, u32>(&expected));
                let (from, to) = (weights.len() / 3, weights.len() - weights.len() / 4);
                view.write_f32(from, &mut found[..to - from]);
                prop_assert_eq!(&found[..to - from], &expected[from..to]);
            }
        }
    }
}
