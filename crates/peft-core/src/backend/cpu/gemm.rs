//! Matrix products by the `gemm` crate, and memory that several tasks write in different places.
//!
//! A product is cut into [`Pieces`] by its shape alone, and each piece runs on one thread: that crate's own division
//! between threads waits for the slowest several times a product, and a piece's part of the target stays in the
//! second-level cache for a second product that is added to it.
//!
//! This is the one part of the CPU backend with raw pointers: the product's interface takes them, and attention's
//! tasks write columns of shared rows, which slices cannot express. Bounds are checked before.

use std::{cell::Cell, marker::PhantomData, ops::Range};

use gemm::Parallelism;

use super::{Cpu, NARROW, Operation};
use crate::backend::ViewMut;

thread_local! {
    /// Whether this thread is inside a product of its own.
    static OWN_PRODUCT: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is inside a matrix product: the `gemm` crate takes memory for packing there, and a test
/// that counts allocations must tell it apart.
pub fn in_product() -> bool {
    OWN_PRODUCT.try_with(Cell::get).unwrap_or(false)
}

/// A strided matrix that is read.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub data: &'a [f32],
    pub offset: usize,
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> Operand<'a> {
    /// Rows of `columns` numbers, `stride` apart.
    pub fn new(data: &'a [f32], offset: usize, rows: usize, columns: usize, stride: usize) -> Self {
        Self { data, offset, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// Rows become columns.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Some of the rows.
    #[must_use]
    pub fn rows_of(self, rows: &Range<usize>) -> Self {
        Self { offset: self.offset + rows.start * self.row_stride, rows: rows.len(), ..self }
    }

    /// Some of the columns.
    #[must_use]
    pub fn columns_of(self, columns: &Range<usize>) -> Self {
        Self { offset: self.offset + columns.start * self.column_stride, columns: columns.len(), ..self }
    }

    fn pointer(&self) -> *const f32 {
        if self.rows > 0 && self.columns > 0 {
            let last =
                self.offset + (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride;
            assert!(last < self.data.len(), "a matrix ends at {last}, its memory at {}", self.data.len());
        }
        self.data[self.offset.min(self.data.len())..].as_ptr()
    }
}

/// Memory that several tasks write at once, each in a place of its own.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    pointer: *mut f32,
    length: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]`, which may be sent; all writing goes through unsafe functions whose callers
// promise that no two tasks touch the same number.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub fn new(data: &'a mut [f32]) -> Self {
        Self { pointer: data.as_mut_ptr(), length: data.len(), owner: PhantomData }
    }

    /// A stretch of the memory.
    ///
    /// # Safety
    /// While the slice lives, nobody else touches these numbers.
    pub unsafe fn stretch(&self, start: usize, length: usize) -> &'a mut [f32] {
        assert!(
            start + length <= self.length,
            "a stretch ends at {}, its memory at {}",
            start + length,
            self.length
        );
        // SAFETY: inside the memory, as was just checked, and nobody else's, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), length) }
    }
}

/// Where a product is written: rows of `columns` numbers, `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub offset: usize,
    pub stride: usize,
}

/// Rows or columns of a large product's target that one thread computes at a time: as fast as all at once on one
/// thread (docs/performance.md), small enough for the second-level cache, enough of them to keep threads busy.
const PIECE: usize = 256;
/// The smallest piece: what one thread computes of a target with one short side.
const SMALL_PIECE: usize = 64;
/// Multiplications below which a product is not cut.
const UNCUT: usize = 1 << 18;

/// How a product's target is cut, along its longer side. Depends on nothing but the product's shape, so that the number
/// of threads changes no bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pieces {
    rows: usize,
    columns: usize,
    size: usize,
}

impl Pieces {
    /// Of a target of `rows` x `columns`, each number a sum of `depth` products.
    pub fn of(rows: usize, columns: usize, depth: usize) -> Self {
        let (long, short) = (rows.max(columns), rows.min(columns));
        let size = if rows * columns * depth < UNCUT {
            long
        } else if short <= SMALL_PIECE {
            (long / 8).next_multiple_of(SMALL_PIECE).clamp(SMALL_PIECE, PIECE)
        } else {
            PIECE
        };
        Self { rows, columns, size: size.max(1) }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.rows.max(self.columns).div_ceil(self.size)
    }

    /// Rows and columns of piece `index`.
    pub fn piece(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let start = index * self.size;
        if self.rows >= self.columns {
            (start..(start + self.size).min(self.rows), 0..self.columns)
        } else {
            (0..self.rows, start..(start + self.size).min(self.columns))
        }
    }
}

/// One of the products that are summed into a target.
#[derive(Clone, Copy)]
pub(super) struct Factors<'a> {
    pub alpha: f32,
    pub a: Operand<'a>,
    pub b: Operand<'a>,
}

/// `out = beta out + alpha a b + …`, the part of it that lies in `rows` and `columns`.
///
/// # Safety
/// Nobody else touches that part of the target while this runs.
pub(super) unsafe fn multiply_piece(
    sum: &[Factors<'_>],
    beta: f32,
    out: Shared<'_>,
    target: Target,
    (rows, columns): (Range<usize>, Range<usize>),
) {
    let start = target.offset + rows.start * target.stride + columns.start;
    let target = Target { offset: start, stride: target.stride };
    for (index, factors) in sum.iter().enumerate() {
        let (a, b) = (factors.a.rows_of(&rows), factors.b.columns_of(&columns));
        let beta = if index == 0 { beta } else { 1.0 };
        // SAFETY: as the caller promises.
        unsafe { multiply_shared(factors.alpha, a, b, beta, out, target) };
    }
}

impl Cpu {
    /// `c = beta c + alpha a b + …`, in pieces.
    pub(super) fn sum_of_products(&self, sum: &[Factors<'_>], beta: f32, c: ViewMut<'_, Self>) {
        let (rows, columns) = (c.rows, c.columns);
        for Factors { a, b, .. } in sum {
            assert!(a.rows == rows && b.columns == columns, "a product's target has another shape");
        }
        let depth = sum.iter().map(|factors| factors.a.columns).sum();
        let widest = sum.iter().map(|factors| factors.a.columns).max().unwrap_or(0);
        let narrow = rows.min(columns).min(widest) <= NARROW;
        let operation = if narrow { Operation::NarrowProduct } else { Operation::Product };
        let target = Target { offset: c.offset, stride: c.stride };
        let out = Shared::new(c.data);
        let pieces = Pieces::of(rows, columns, depth);
        self.profile.measure(operation, 2 * rows * columns * depth, || {
            self.tasks(pieces.count(), |index| {
                // SAFETY: pieces do not overlap, and the target is borrowed mutably.
                unsafe { multiply_piece(sum, beta, out, target, pieces.piece(index)) }
            });
        });
    }
}

/// `out = alpha a b + beta out`; `beta` 0 never reads `out`. Runs on the calling thread.
pub(super) fn multiply(
    alpha: f32,
    a: Operand<'_>,
    b: Operand<'_>,
    beta: f32,
    out: &mut [f32],
    target: Target,
) {
    // SAFETY: `out` is borrowed mutably, so nobody else touches it.
    unsafe { multiply_shared(alpha, a, b, beta, Shared::new(out), target) }
}

/// [`multiply`] into memory that others write elsewhere.
///
/// # Safety
/// Nobody else touches the numbers of the target while this runs.
pub(super) unsafe fn multiply_shared(
    alpha: f32,
    a: Operand<'_>,
    b: Operand<'_>,
    beta: f32,
    out: Shared<'_>,
    target: Target,
) {
    assert_eq!(a.columns, b.rows, "inner sizes of a product differ");
    let (m, n, k) = (a.rows, b.columns, a.columns);
    if m == 0 || n == 0 {
        return;
    }
    assert!(target.stride >= n || m == 1, "rows of a product overlap");
    let last = target.offset + (m - 1) * target.stride + n - 1;
    assert!(last < out.length, "a product ends at {last}, its memory at {}", out.length);
    OWN_PRODUCT.set(true);
    // SAFETY: both operands and the target lie in their memory, as was checked; the target's rows do not overlap and are
    // nobody else's, as the caller promises; operands are shared borrows and so cannot alias it.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.pointer.add(target.offset),
            1,
            target.stride as isize,
            beta != 0.0,
            a.pointer(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.pointer(),
            b.column_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
    OWN_PRODUCT.set(false);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_target_once() {
        for (rows, columns, depth) in
            [(1, 1, 1), (2048, 384, 384), (16, 1000, 2048), (700, 16, 99), (512, 8192, 7)]
        {
            let pieces = Pieces::of(rows, columns, depth);
            let mut seen = vec![0; rows * columns];
            for index in 0..pieces.count() {
                let (some_rows, some_columns) = pieces.piece(index);
                for row in some_rows {
                    some_columns.clone().for_each(|column| seen[row * columns + column] += 1);
                }
            }
            assert!(seen.iter().all(|&times| times == 1), "{rows} x {columns} x {depth}");
        }
    }
}
