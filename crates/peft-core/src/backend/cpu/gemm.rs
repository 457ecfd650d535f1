//! Matrix products by the `gemm` crate, and memory that several tasks write in different places.
//!
//! This is the one part of the CPU backend with raw pointers: the product's interface takes them, and attention's
//! tasks write columns of shared rows, which slices cannot express. Bounds are checked before.

use std::{
    cell::Cell,
    marker::PhantomData,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use gemm::Parallelism;

/// Products in progress that use several threads.
static SHARED_PRODUCTS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread is inside a product of its own.
    static OWN_PRODUCT: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is inside a matrix product, or one is going on that uses several threads: the `gemm`
/// crate takes memory for packing there, and a test that counts allocations must tell it apart.
pub fn in_product() -> bool {
    OWN_PRODUCT.try_with(Cell::get).unwrap_or(false) || SHARED_PRODUCTS.load(Relaxed) > 0
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

/// `out = alpha a b + beta out`; `beta` 0 never reads `out`. `threads` 0 runs on the calling thread alone.
pub(super) fn multiply(
    alpha: f32,
    a: Operand<'_>,
    b: Operand<'_>,
    beta: f32,
    out: &mut [f32],
    target: Target,
    threads: usize,
) {
    // SAFETY: `out` is borrowed mutably, so nobody else touches it.
    unsafe { multiply_shared(alpha, a, b, beta, Shared::new(out), target, threads) }
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
    threads: usize,
) {
    assert_eq!(a.columns, b.rows, "inner sizes of a product differ");
    let (m, n, k) = (a.rows, b.columns, a.columns);
    if m == 0 || n == 0 {
        return;
    }
    assert!(target.stride >= n || m == 1, "rows of a product overlap");
    let last = target.offset + (m - 1) * target.stride + n - 1;
    assert!(last < out.length, "a product ends at {last}, its memory at {}", out.length);
    let parallelism = if threads == 0 { Parallelism::None } else { Parallelism::Rayon(threads) };
    OWN_PRODUCT.set(true);
    if threads > 0 {
        SHARED_PRODUCTS.fetch_add(1, Relaxed);
    }
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
            parallelism,
        );
    }
    OWN_PRODUCT.set(false);
    if threads > 0 {
        SHARED_PRODUCTS.fetch_sub(1, Relaxed);
    }
}
