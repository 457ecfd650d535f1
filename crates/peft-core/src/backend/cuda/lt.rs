//! Products by cuBLASLt with an algorithm of our choice.

use std::{ffi::c_void, ptr};

use cudarc::{
    cublaslt::{result, sys},
    driver::sys::CUstream,
};

use super::{DeviceError, device::Product, memory::Numbers};
use crate::plan::WORKSPACE;

/// What tells one product from another, but for its number of rows: sizes, how operands lie, whether it is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    pub(super) columns: usize,
    pub(super) inner: usize,
    pub(super) transposed: [bool; 2],
    pub(super) strides: [usize; 3],
    pub(super) into: Numbers,
    pub(super) adds: bool,
}

impl Kind {
    /// The kind of a product of bf16 whose operands lie as algorithms are chosen for; none of others.
    pub(super) fn of(product: &Product) -> Option<Self> {
        const ALIGNMENT: u64 = 256;
        let Product { a, b, c, columns, inner, numbers, into, beta, .. } = *product;
        let aligned = [a, b, c].iter().all(|operand| operand.address.is_multiple_of(ALIGNMENT));
        (numbers == Numbers::Bf16 && aligned).then_some(Self {
            columns,
            inner,
            transposed: [a.transposed, b.transposed],
            strides: [a.stride, b.stride, c.stride],
            into,
            adds: beta != 0.0,
        })
    }
}

/// cuBLASLt's handle.
pub(super) struct Handle(sys::cublasLtHandle_t);

// SAFETY: the handle may be used from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

fn failed(operation: &'static str) -> impl Fn(result::CublasError) -> DeviceError {
    move |error| DeviceError::Call { operation, reason: format!("{:?}", error.0) }
}

impl Handle {
    pub(super) fn new() -> Result<Self, DeviceError> {
        result::create_handle().map(Self).map_err(failed("cublasLtCreate"))
    }

    /// The library's version: a choice holds for one.
    pub(super) fn version() -> usize {
        // SAFETY: asks for a number.
        unsafe { sys::cublasLtGetVersion() }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: destroyed once, by its owner.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// Descriptions of a product and its operands.
struct Described {
    product: sys::cublasLtMatmulDesc_t,
    /// Of A, B and C as cuBLAS has them.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
}

impl Drop for Described {
    fn drop(&mut self) {
        // SAFETY: each was made once and is destroyed once; those that were not made are null.
        unsafe {
            for layout in self.layouts.iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(*layout);
            }
            let _ = result::destroy_matmul_desc(self.product);
        }
    }
}

impl Described {
    /// By row-major matrices: the columns of C are the rows of cuBLAS, and its A is our B.
    fn new(kind: &Kind, rows: usize) -> Result<Self, DeviceError> {
        let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
        let into = if kind.into == Numbers::Bf16 { bf16 } else { sys::cudaDataType_t::CUDA_R_32F };
        let product = result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )
        .map_err(failed("cublasLtMatmulDescCreate"))?;
        let mut this = Self { product, layouts: [ptr::null_mut(); 3] };
        let [a_turned, b_turned] = kind.transposed;
        let attributes = [
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, b_turned),
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, a_turned),
        ];
        for (attribute, turned) in attributes {
            let value = i32::from(turned);
            // SAFETY: the description lives; the value is of the attribute's size.
            unsafe { result::set_matmul_desc_attribute(product, attribute, ptr::from_ref(&value).cast(), 4) }
                .map_err(failed("cublasLtMatmulDescSetAttribute"))?;
        }
        let turn = |turned: bool, shape: [usize; 2]| if turned { [shape[1], shape[0]] } else { shape };
        let shapes = [
            (bf16, turn(b_turned, [kind.columns, kind.inner]), kind.strides[1]),
            (bf16, turn(a_turned, [kind.inner, rows]), kind.strides[0]),
            (into, [kind.columns, rows], kind.strides[2]),
        ];
        for (layout, (numbers, [rows, columns], stride)) in this.layouts.iter_mut().zip(shapes) {
            *layout = result::create_matrix_layout(numbers, rows as u64, columns as u64, stride as i64)
                .map_err(failed("cublasLtMatrixLayoutCreate"))?;
        }
        Ok(this)
    }
}

/// An algorithm for products of a kind and a number of rows.
pub(super) struct Algorithm {
    described: Described,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: descriptions are read alone once they are made.
unsafe impl Send for Algorithm {}
// SAFETY: as above.
unsafe impl Sync for Algorithm {}

impl Handle {
    /// Algorithms for a product, what cuBLASLt takes for the best first, at most `most`.
    pub(super) fn candidates(
        &self,
        kind: &Kind,
        rows: usize,
        most: usize,
    ) -> Result<Vec<[u64; 8]>, DeviceError> {
        let described = Described::new(kind, rows)?;
        let preference = result::create_matmul_pref().map_err(failed("cublasLtMatmulPreferenceCreate"))?;
        let [a, b, c] = described.layouts;
        let mut count = 0;
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(most);
        // SAFETY: all descriptions live; the library writes at most `most` results and says how many.
        let outcome = unsafe {
            let room = WORKSPACE;
            let attribute =
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let bytes = ptr::from_ref(&room).cast();
            let outcome = result::set_matmul_pref_attribute(preference, attribute, bytes, size_of::<usize>())
                .and_then(|()| {
                    sys::cublasLtMatmulAlgoGetHeuristic(
                        self.0,
                        described.product,
                        a,
                        b,
                        c,
                        c,
                        preference,
                        most as i32,
                        found.as_mut_ptr(),
                        &mut count,
                    )
                    .result()
                });
            if outcome.is_ok() {
                found.set_len((count.max(0) as usize).min(most));
            }
            let _ = result::destroy_matmul_pref(preference);
            outcome
        };
        // That there is none is no failure.
        if outcome.is_err() {
            return Ok(Vec::new());
        }
        let sound =
            found.iter().filter(|found| found.state.result().is_ok() && found.workspaceSize <= WORKSPACE);
        Ok(sound.map(|found| found.algo.data).collect())
    }

    /// An algorithm made ready, if it serves the product.
    pub(super) fn ready(&self, kind: &Kind, rows: usize, data: [u64; 8]) -> Option<Algorithm> {
        let described = Described::new(kind, rows).ok()?;
        let algorithm = sys::cublasLtMatmulAlgo_t { data };
        let [a, b, c] = described.layouts;
        let mut checked = sys::cublasLtMatmulHeuristicResult_t {
            algo: algorithm,
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        // SAFETY: all descriptions live; the library fills the result in.
        let serves = unsafe {
            sys::cublasLtMatmulAlgoCheck(self.0, described.product, a, b, c, c, &algorithm, &mut checked)
        };
        let serves = serves.result().is_ok() && checked.workspaceSize <= WORKSPACE;
        serves.then_some(Algorithm { described, algorithm })
    }

    /// Queues a product.
    ///
    /// # Safety
    /// The operands must be matrices of the card's memory of the sizes that `algorithm` was made ready for, and the
    /// workspace [`WORKSPACE`] bytes.
    pub(super) unsafe fn multiply(
        &self,
        algorithm: &Algorithm,
        product: &Product,
        workspace: u64,
        stream: CUstream,
    ) -> Result<(), DeviceError> {
        let [a, b, c] = algorithm.described.layouts;
        // SAFETY: the caller's.
        unsafe {
            result::matmul(
                self.0,
                algorithm.described.product,
                ptr::from_ref(&product.alpha).cast(),
                ptr::from_ref(&product.beta).cast(),
                product.b.address as *const c_void,
                a,
                product.a.address as *const c_void,
                b,
                product.c.address as *const c_void,
                c,
                product.c.address as *mut c_void,
                c,
                &algorithm.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(failed("cublasLtMatmul"))
    }
}
