//! One card: its context, stream, memory, kernels and products.

use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use cudarc::{
    cublas,
    driver::{result, sys},
};

use super::{
    DeviceError, Precision, attention::AttentionKernels, compile::Unit, libraries, memory::Numbers,
    profile::Profile,
};
use crate::plan::WORKSPACE;

/// One card.
pub(super) struct Device {
    pub(super) name: String,
    pub(super) architecture: String,
    context: sys::CUcontext,
    number: sys::CUdevice,
    pub(super) stream: sys::CUstream,
    /// Copies to and from the host run here, beside the work.
    pub(super) side: sys::CUstream,
    blas: cublas::sys::cublasHandle_t,
    /// Where products keep sums between two kernels; work on the stream takes turns.
    pub(super) workspace: u64,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static str, sys::CUfunction>>,
    profile: Mutex<Option<Profile>>,
    pub(super) attention: AttentionKernels,
    pub(super) precision: Precision,
    pub(super) shared_bytes: usize,
    /// Blocks that run at once where each fills a multiprocessor.
    pub(super) multiprocessors: usize,
    broken: AtomicBool,
    failure: Mutex<Option<DeviceError>>,
    allocated: AtomicU64,
    peak: AtomicU64,
}

// SAFETY: handles of the driver may be used from any thread once the context is current there, which `bind` sees to;
// the handle of cuBLAS is used by one pass at a time, since passes need the engine exclusively.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

pub(super) fn call(operation: &'static str) -> impl Fn(result::DriverError) -> DeviceError {
    move |error| DeviceError::Call { operation, reason: format!("{error}") }
}

fn blas_call(operation: &'static str) -> impl Fn(cublas::result::CublasError) -> DeviceError {
    move |error| DeviceError::Call { operation, reason: format!("{:?}", error.0) }
}

impl Device {
    /// Whether the first card and the libraries can be used; nothing is started on the card.
    pub(super) fn probe() -> Result<(), DeviceError> {
        Card::find(0)?;
        libraries::nvrtc()?;
        libraries::cublas()
    }

    /// How many cards there are.
    pub(super) fn count() -> Result<usize, DeviceError> {
        libraries::driver()?;
        result::init().map_err(|_| DeviceError::NoDriver)?;
        Ok(result::device::get_count().map_err(|_| DeviceError::NoDriver)?.max(0) as usize)
    }

    /// Bytes of a card, and how many are free.
    pub(super) fn memory_bytes(index: usize) -> Result<(u64, u64), DeviceError> {
        let card = Card::find(index)?;
        // SAFETY: the device exists; its context is given back at once.
        unsafe {
            let context =
                result::primary_ctx::retain(card.number).map_err(call("cuDevicePrimaryCtxRetain"))?;
            let free = result::ctx::set_current(context)
                .map_err(call("cuCtxSetCurrent"))
                .and_then(|()| result::mem_get_info().map_err(call("cuMemGetInfo")));
            let _ = result::primary_ctx::release(card.number);
            let (free, total) = free?;
            Ok((total as u64, free as u64))
        }
    }

    pub(super) fn open(index: usize, precision: Precision) -> Result<Arc<Self>, DeviceError> {
        let Card { number, name, architecture, shared_bytes, multiprocessors } = Card::find(index)?;
        libraries::cublas()?;
        let code = Unit::general().load(&architecture)?;
        // SAFETY: the device exists; every handle is made here, used by this value alone and destroyed with it.
        unsafe {
            let context = result::primary_ctx::retain(number).map_err(call("cuDevicePrimaryCtxRetain"))?;
            result::ctx::set_current(context).map_err(call("cuCtxSetCurrent"))?;
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(call("cuStreamCreate"))?;
            let side = result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(call("cuStreamCreate"))?;
            let module = result::module::load_data(code.as_ptr().cast()).map_err(call("cuModuleLoadData"))?;
            let blas = cublas::result::create_handle().map_err(blas_call("cublasCreate"))?;
            cublas::result::set_stream(blas, stream.cast()).map_err(blas_call("cublasSetStream"))?;
            let workspace = result::malloc_sync(WORKSPACE).map_err(call("cuMemAlloc"))?;
            cublas::sys::cublasSetWorkspace_v2(blas, workspace as *mut c_void, WORKSPACE)
                .result()
                .map_err(blas_call("cublasSetWorkspace"))?;
            Ok(Arc::new(Self {
                name,
                architecture,
                context,
                number,
                stream,
                side,
                blas,
                workspace,
                module,
                functions: Mutex::new(HashMap::new()),
                profile: Mutex::new(None),
                attention: AttentionKernels::default(),
                precision,
                shared_bytes,
                multiprocessors,
                broken: AtomicBool::new(false),
                failure: Mutex::new(None),
                allocated: AtomicU64::new(WORKSPACE as u64),
                peak: AtomicU64::new(WORKSPACE as u64),
            }))
        }
    }

    /// Makes the card current on the calling thread.
    pub(super) fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context lives as long as this value.
        unsafe { result::ctx::set_current(self.context) }.map_err(call("cuCtxSetCurrent"))
    }

    /// Keeps the first failure; whatever comes after it is not run.
    pub(super) fn note(&self, outcome: Result<(), DeviceError>) {
        if let Err(error) = outcome {
            self.broken.store(true, Ordering::Release);
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    /// Runs `work` unless something failed before, and keeps its failure.
    pub(super) fn attempt(&self, work: impl FnOnce() -> Result<(), DeviceError>) {
        if !self.broken.load(Ordering::Acquire) {
            self.note(self.bind().and_then(|()| work()));
        }
    }

    /// Waits until all work is done, and says what failed since the last time.
    pub(super) fn settle(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream lives as long as this value.
        self.attempt(|| unsafe {
            result::stream::synchronize(self.stream).map_err(call("cuStreamSynchronize"))?;
            result::stream::synchronize(self.side).map_err(call("cuStreamSynchronize"))
        });
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(failure) => {
                self.broken.store(false, Ordering::Release);
                Err(failure)
            }
            None => Ok(()),
        }
    }

    /// Reserves `bytes` bytes, all 0: for regions, which give them back.
    pub(super) fn reserve(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.bind()?;
        // SAFETY: the memory is fresh and of this size.
        unsafe {
            let address = result::malloc_sync(bytes).map_err(|_| {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                DeviceError::OutOfMemory { bytes, free }
            })?;
            let allocated = self.allocated.fetch_add(bytes as u64, Ordering::AcqRel) + bytes as u64;
            self.peak.fetch_max(allocated, Ordering::AcqRel);
            result::memset_d8_async(address, 0, bytes, self.stream).map_err(call("cuMemsetD8Async"))?;
            Ok(address)
        }
    }

    pub(super) fn free(&self, address: u64, bytes: usize) {
        // SAFETY: the memory was reserved and is freed once, by its owner; the driver waits for work that uses it.
        if self.bind().is_ok() && unsafe { result::free_sync(address) }.is_ok() {
            self.allocated.fetch_sub(bytes as u64, Ordering::AcqRel);
        }
    }

    /// Bytes that are free, and the most that were reserved.
    pub(super) fn memory(&self) -> (u64, u64) {
        let free =
            self.bind().ok().and_then(|()| result::mem_get_info().ok()).map_or(0, |(free, _)| free as u64);
        (free, self.peak.load(Ordering::Acquire))
    }

    /// Copies host numbers to the card.
    pub(super) fn upload<T: bytemuck::Pod>(&self, from: &[T], address: u64) {
        if from.is_empty() {
            return;
        }
        // SAFETY: the caller hands in the address of memory that holds as many numbers. Pageable memory is
        // read before the call returns.
        self.attempt(|| {
            unsafe { result::memcpy_htod_async(address, from, self.stream) }
                .map_err(call("cuMemcpyHtoDAsync"))
        });
    }

    /// Waits for the work at hand, then copies numbers to the host.
    pub(super) fn download<T: bytemuck::Pod>(&self, address: u64, into: &mut [T]) {
        if into.is_empty() {
            return;
        }
        // SAFETY: the caller hands in the address of memory that holds as many numbers; the copy is over when the
        // stream is.
        self.attempt(|| unsafe {
            result::memcpy_dtoh_async(into, address, self.stream).map_err(call("cuMemcpyDtoHAsync"))?;
            result::stream::synchronize(self.stream).map_err(call("cuStreamSynchronize"))
        });
    }

    /// A kernel by its name; what is no kernel's name fails as what was launched.
    pub(super) fn function(&self, name: &'static str) -> sys::CUfunction {
        let mut known = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = known.get(name) {
            return *function;
        }
        // SAFETY: the module stays loaded as long as this value.
        match self.bind().and_then(|()| unsafe { function(self.module, name) }) {
            Ok(function) => {
                known.insert(name, function);
                function
            }
            Err(error) => {
                self.note(Err(error));
                ptr::null_mut()
            }
        }
    }

    /// Starts a kernel, unless something failed before.
    ///
    /// # Safety
    /// `arguments` must point to what the kernel takes, in its order.
    pub(super) unsafe fn launch(
        &self,
        function: sys::CUfunction,
        name: &'static str,
        grid: [usize; 3],
        block: [usize; 2],
        shared: usize,
        arguments: &mut [*mut c_void],
    ) {
        if grid.contains(&0) {
            return;
        }
        let [x, y, z] = grid.map(|size| size as u32);
        let block = (block[0] as u32, block[1] as u32, 1);
        // SAFETY: the caller's.
        self.attempt(|| {
            unsafe {
                result::launch_kernel(function, (x, y, z), block, shared as u32, self.stream, arguments)
            }
            .map_err(call(name))?;
            self.mark(|| name.to_owned())
        });
    }

    /// Starts a kernel on a stream of the caller's, whose context is current.
    ///
    /// # Safety
    /// `arguments` must point to what the kernel takes, in its order.
    pub(super) unsafe fn launch_on(
        &self,
        stream: sys::CUstream,
        name: &'static str,
        blocks: usize,
        threads: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<(), DeviceError> {
        let function = self.function(name);
        if function.is_null() {
            return self.settle();
        }
        let (grid, block) = ((blocks as u32, 1, 1), (threads as u32, 1, 1));
        // SAFETY: the caller's.
        unsafe { result::launch_kernel(function, grid, block, 0, stream, arguments) }.map_err(call(name))
    }

    /// Times every operation from now on, or no longer: an event after each, so that the times add up to the whole.
    pub(super) fn set_profiling(&self, on: bool) {
        self.attempt(|| {
            *self.profile.lock().unwrap_or_else(PoisonError::into_inner) =
                if on { Some(Profile::start(self.stream)?) } else { None };
            Ok(())
        });
    }

    /// What took how long since profiling began, seconds and calls by operation, the longest first.
    pub(super) fn take_profile(&self) -> Result<Vec<(String, f64, u64)>, DeviceError> {
        self.settle()?;
        match self.profile.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(profile) => profile.take(),
            None => Ok(Vec::new()),
        }
    }

    fn mark(&self, name: impl FnOnce() -> String) -> Result<(), DeviceError> {
        match self.profile.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(profile) => profile.mark(self.stream, name()),
            None => Ok(()),
        }
    }

    /// Loads machine code, which is never unloaded.
    pub(super) fn module(&self, code: &[u8]) -> Result<sys::CUmodule, DeviceError> {
        self.bind()?;
        // SAFETY: the code is whole.
        unsafe { result::module::load_data(code.as_ptr().cast()) }.map_err(call("cuModuleLoadData"))
    }

    /// `c = alpha op(a) op(b) + beta c` by row-major matrices: the columns of C are the rows of cuBLAS.
    pub(super) fn product(&self, product: &Product) {
        use cublas::sys::{
            cublasComputeType_t as Compute, cublasGemmAlgo_t::CUBLAS_GEMM_DFALT,
            cublasOperation_t as Operation, cudaDataType_t as Type,
        };
        let operation = |transposed| if transposed { Operation::CUBLAS_OP_T } else { Operation::CUBLAS_OP_N };
        let kind = |numbers| match numbers {
            Numbers::F32 => Type::CUDA_R_32F,
            Numbers::Bf16 => Type::CUDA_R_16BF,
        };
        let compute = match self.precision {
            _ if product.numbers == Numbers::Bf16 => Compute::CUBLAS_COMPUTE_32F,
            Precision::F32 => Compute::CUBLAS_COMPUTE_32F,
            Precision::Tf32 | Precision::Bf16 => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
        };
        let Product { a, b, c, rows, columns, inner, alpha, beta, numbers, into } = product;
        let size = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
        // SAFETY: the operands are matrices of the card's memory of these sizes, which views were checked for.
        self.attempt(|| {
            unsafe {
                cublas::result::gemm_ex(
                    self.blas,
                    operation(b.transposed),
                    operation(a.transposed),
                    size(*columns),
                    size(*rows),
                    size(*inner),
                    ptr::from_ref(alpha).cast(),
                    b.address as *const c_void,
                    kind(*numbers),
                    size(b.stride),
                    a.address as *const c_void,
                    kind(*numbers),
                    size(a.stride),
                    ptr::from_ref(beta).cast(),
                    c.address as *mut c_void,
                    kind(*into),
                    size(c.stride),
                    compute,
                    CUBLAS_GEMM_DFALT,
                )
            }
            .map_err(blas_call("cublasGemmEx"))?;
            self.mark(|| format!("product {rows} x {columns} x {inner}"))
        });
    }
}

/// What the driver says of a card.
struct Card {
    number: sys::CUdevice,
    name: String,
    architecture: String,
    /// Shared memory that a block may take.
    shared_bytes: usize,
    multiprocessors: usize,
}

impl Card {
    fn find(index: usize) -> Result<Self, DeviceError> {
        use sys::CUdevice_attribute_enum as Attribute;
        let count = Device::count()?;
        if index >= count {
            return Err(DeviceError::NoSuchDevice { index, count });
        }
        let number = result::device::get(index as i32).map_err(call("cuDeviceGet"))?;
        let name = result::device::get_name(number).map_err(call("cuDeviceGetName"))?;
        // SAFETY: the device exists.
        let attribute = |which| unsafe { result::device::get_attribute(number, which) };
        let attribute = |which| attribute(which).map_err(call("cuDeviceGetAttribute"));
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let shared = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        if major < 8 {
            return Err(DeviceError::TooOld { card: name, major, minor });
        }
        let architecture = format!("sm_{major}{minor}");
        let (shared_bytes, multiprocessors) = (shared.max(0) as usize, multiprocessors.max(1) as usize);
        Ok(Self { number, name, architecture, shared_bytes, multiprocessors })
    }
}

/// An operand of a product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand {
    pub(super) address: u64,
    pub(super) stride: usize,
    pub(super) transposed: bool,
}

/// A product: C `[rows, columns]`, summed over `inner`. A and B hold `numbers`, C holds `into`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub(super) a: Operand,
    pub(super) b: Operand,
    pub(super) c: Operand,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) inner: usize,
    pub(super) alpha: f32,
    pub(super) beta: f32,
    pub(super) numbers: Numbers,
    pub(super) into: Numbers,
}

// SAFETY: callers hand in a module that is loaded.
pub(super) unsafe fn function(
    module: sys::CUmodule,
    name: &'static str,
) -> Result<sys::CUfunction, DeviceError> {
    let c_name = CString::new(name).unwrap_or_default();
    // SAFETY: the module is loaded.
    unsafe { result::module::get_function(module, c_name) }.map_err(|error| DeviceError::Call {
        operation: "cuModuleGetFunction",
        reason: format!("{name}: {error}"),
    })
}

impl Drop for Device {
    fn drop(&mut self) {
        // What cannot be given back now is given back when the process ends.
        if self.bind().is_err() {
            return;
        }
        // SAFETY: handles are destroyed once, by their owner; buffers keep the device alive, so none is left.
        unsafe {
            let _ = cublas::result::destroy_handle(self.blas);
            let _ = result::free_sync(self.workspace);
            let _ = result::stream::destroy(self.side);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.number);
        }
    }
}
