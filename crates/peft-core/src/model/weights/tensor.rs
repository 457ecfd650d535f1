//! One tensor of a file, read as numbers.

use std::{ops::Range, path::Path};

use half::{bf16, f16};
use safetensors::tensor::Dtype;

use super::file::{Encoding, Stored, TensorFile};
use crate::error::{Error, Result};

/// Elements read at a time; a multiple of every quantisation block.
pub const PIECE: usize = 1 << 20;

/// Sees the bytes of a tensor as they are read.
pub type Witness<'a> = dyn FnMut(&[u8]) + 'a;

/// A tensor that lies in a file.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    pub(super) file: &'a TensorFile,
    pub(super) stored: &'a Stored,
}

/// Bytes as read, and the numbers that they are.
struct Buffer {
    bytes: Vec<u8>,
    numbers: Vec<f32>,
}

impl Buffer {
    fn new(numbers: usize, encoding: Encoding) -> Self {
        Self { bytes: vec![0; encoding.bytes(numbers)], numbers: vec![0.0; numbers] }
    }
}

impl<'a> Tensor<'a> {
    /// Its name.
    pub fn name(&self) -> &'a str {
        &self.stored.name
    }

    /// Its file.
    pub fn file(&self) -> &'a Path {
        self.file.path()
    }

    /// Its dtype; F32 where blocks of a GGUF file are widened.
    pub fn dtype(&self) -> Dtype {
        match self.stored.encoding {
            Encoding::Plain(dtype) => dtype,
            Encoding::Blocks(_) => Dtype::F32,
        }
    }

    /// How its numbers are stored, by name.
    pub fn stored_as(&self) -> String {
        match self.stored.encoding {
            Encoding::Plain(dtype) => format!("{dtype:?}"),
            Encoding::Blocks(kind) => format!("{kind:?}"),
        }
    }

    /// Whether its bytes are its numbers, in their order and of [`Tensor::dtype`].
    pub fn is_plain(&self) -> bool {
        matches!(self.stored.encoding, Encoding::Plain(_)) && self.stored.heads.is_none()
    }

    /// Its shape.
    pub fn shape(&self) -> &'a [usize] {
        &self.stored.shape
    }

    /// How many numbers it holds.
    pub fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// How many bytes it takes in the file.
    pub fn bytes(&self) -> usize {
        self.stored.encoding.bytes(self.elements())
    }

    /// Refuses any other shape.
    ///
    /// # Errors
    /// [`Error::WrongShape`].
    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape() == expected {
            return Ok(());
        }
        Err(Error::WrongShape {
            origin: self.file.origin(),
            file: self.file().to_owned(),
            tensor: self.name().to_owned(),
            found: self.shape().to_vec(),
            expected: expected.to_vec(),
        })
    }

    /// Refuses any dtype but those of `allowed`; `wanted` names them.
    ///
    /// # Errors
    /// [`Error::WrongDtype`].
    pub fn expect_dtype(&self, allowed: &[Dtype], wanted: &'static str) -> Result<()> {
        if allowed.contains(&self.dtype()) {
            return Ok(());
        }
        Err(Error::WrongDtype {
            origin: self.file.origin(),
            file: self.file().to_owned(),
            tensor: self.name().to_owned(),
            found: self.stored_as(),
            expected: wanted,
        })
    }

    /// Refuses whole numbers and 8-bit floats.
    ///
    /// # Errors
    /// [`Error::WrongDtype`].
    pub fn expect_float(&self) -> Result<()> {
        self.expect_dtype(&[Dtype::F32, Dtype::F16, Dtype::BF16], "F32, F16 or BF16")
    }

    /// What is said of a number that is infinite or none.
    pub(crate) fn non_finite(&self) -> Error {
        Error::NonFinite {
            origin: self.file.origin(),
            file: self.file().to_owned(),
            tensor: self.name().to_owned(),
        }
    }

    /// Reads bytes from `offset` of the tensor on.
    pub(crate) fn read_at(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        self.file.read_at(self.stored.start + offset as u64, out)
    }

    /// Reads all bytes as they are and hands them on in pieces; of use where [`Tensor::is_plain`].
    ///
    /// # Errors
    /// Unreadable.
    pub fn pieces(&self, take: &mut Witness<'_>) -> Result<()> {
        let mut piece = vec![0; (4 * PIECE).min(self.bytes())];
        let mut done = 0;
        while done < self.bytes() {
            let piece = &mut piece[..(4 * PIECE).min(self.bytes() - done)];
            self.read_at(done, piece)?;
            take(piece);
            done += piece.len();
        }
        Ok(())
    }

    /// Reads all bytes as they are; of use where [`Tensor::is_plain`].
    ///
    /// # Errors
    /// Unreadable.
    pub fn read_bytes(&self, out: &mut [u8], witness: &mut Witness<'_>) -> Result<()> {
        debug_assert_eq!(out.len(), self.bytes());
        for (piece, out) in out.chunks_mut(4 * PIECE).enumerate() {
            self.read_at(piece * 4 * PIECE, out)?;
            witness(out);
        }
        Ok(())
    }

    /// Reads the numbers as f32 and hands them on in pieces of [`PIECE`].
    ///
    /// # Errors
    /// Unreadable, another dtype than f32, f16 and bf16, or a number that is infinite or none.
    pub fn pieces_f32(&self, witness: &mut Witness<'_>, mut take: impl FnMut(&[f32])) -> Result<()> {
        self.expect_float()?;
        if let Some(heads) = self.stored.heads {
            return self.pieces_of_heads(heads, witness, take);
        }
        let mut buffer = Buffer::new(PIECE.min(self.elements()), self.stored.encoding);
        let mut done = 0;
        while done < self.elements() {
            let count = PIECE.min(self.elements() - done);
            take(self.read_numbers(done, count, &mut buffer, witness)?);
            done += count;
        }
        Ok(())
    }

    /// As [`Tensor::pieces_f32`], of rows that lie interleaved in each head: the first of the first half, the first of the
    /// second half, the second of the first half, and so on.
    fn pieces_of_heads(
        &self,
        heads: usize,
        witness: &mut Witness<'_>,
        mut take: impl FnMut(&[f32]),
    ) -> Result<()> {
        let (rows, columns) = (self.shape()[0] / heads, self.elements() / self.shape()[0]);
        let mut buffer = Buffer::new(rows * columns, self.stored.encoding);
        let mut waiting = Vec::with_capacity(rows * columns + PIECE.min(self.elements()));
        for head in 0..heads {
            let count = rows * columns;
            let numbers = self.read_numbers(head * count, count, &mut buffer, witness)?;
            for half in 0..2 {
                for row in 0..rows / 2 {
                    waiting.extend_from_slice(&numbers[(2 * row + half) * columns..][..columns]);
                }
            }
            while waiting.len() >= PIECE {
                take(&waiting[..PIECE]);
                waiting.drain(..PIECE);
            }
        }
        if !waiting.is_empty() {
            take(&waiting);
        }
        Ok(())
    }

    /// Reads `count` numbers from `first` on; both are whole blocks.
    fn read_numbers<'b>(
        &self,
        first: usize,
        count: usize,
        buffer: &'b mut Buffer,
        witness: &mut Witness<'_>,
    ) -> Result<&'b [f32]> {
        let encoding = self.stored.encoding;
        let bytes = &mut buffer.bytes[..encoding.bytes(count)];
        let numbers = &mut buffer.numbers[..count];
        self.read_at(encoding.bytes(first), bytes)?;
        witness(bytes);
        match encoding {
            Encoding::Plain(dtype) => widen(dtype, bytes, numbers),
            Encoding::Blocks(kind) => kind.write_f32(bytes, numbers),
        }
        if !numbers.iter().fold(true, |finite, value| finite & (value.to_bits() & 0x7f80_0000 != 0x7f80_0000))
        {
            return Err(self.non_finite());
        }
        Ok(numbers)
    }

    /// As [`Tensor::pieces_f32`], of the numbers of `range` alone, which begins and ends at a stored block; not of tensors
    /// whose rows lie interleaved. `witness` hears where in the tensor its bytes lie.
    ///
    /// # Errors
    /// As [`Tensor::pieces_f32`].
    pub fn pieces_f32_of(
        &self,
        range: Range<usize>,
        witness: &mut dyn FnMut(usize, &[u8]),
        mut take: impl FnMut(&[f32]),
    ) -> Result<()> {
        debug_assert!(self.stored.heads.is_none() && range.end <= self.elements());
        self.expect_float()?;
        let encoding = self.stored.encoding;
        let mut buffer = Buffer::new(PIECE.min(range.len()), encoding);
        for first in range.clone().step_by(PIECE) {
            let count = PIECE.min(range.end - first);
            let mut at = |bytes: &[u8]| witness(encoding.bytes(first), bytes);
            take(self.read_numbers(first, count, &mut buffer, &mut at)?);
        }
        Ok(())
    }

    /// Reads the bytes of `range` as they are; of use where [`Tensor::is_plain`]. `witness` hears where they lie.
    ///
    /// # Errors
    /// Unreadable.
    pub fn read_bytes_of(
        &self,
        range: Range<usize>,
        out: &mut [u8],
        witness: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<()> {
        debug_assert_eq!(out.len(), range.len());
        for (piece, out) in out.chunks_mut(4 * PIECE).enumerate() {
            let from = range.start + piece * 4 * PIECE;
            self.read_at(from, out)?;
            witness(from, out);
        }
        Ok(())
    }

    /// Reads the numbers as f32.
    ///
    /// # Errors
    /// As [`Self::pieces_f32`].
    pub fn read_f32(&self, out: &mut [f32], witness: &mut Witness<'_>) -> Result<()> {
        debug_assert_eq!(out.len(), self.elements());
        let mut done = 0;
        self.pieces_f32(witness, |piece| {
            out[done..done + piece.len()].copy_from_slice(piece);
            done += piece.len();
        })
    }

    /// Reads the numbers of a bf16 tensor as they are.
    ///
    /// # Errors
    /// Unreadable, another dtype, or a number that is infinite or none.
    pub fn read_bf16(&self, out: &mut [bf16], witness: &mut Witness<'_>) -> Result<()> {
        self.expect_dtype(&[Dtype::BF16], "BF16")?;
        self.read_bytes(bytemuck::cast_slice_mut(out), witness)?;
        if cfg!(target_endian = "big") {
            out.iter_mut().for_each(|value| *value = bf16::from_bits(value.to_bits().swap_bytes()));
        }
        // Exponent all ones: infinite or not a number.
        if out.iter().any(|value| value.to_bits() & 0x7f80 == 0x7f80) {
            return Err(self.non_finite());
        }
        Ok(())
    }
}

/// Widens little-endian numbers.
fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::BF16 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        _ => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}
