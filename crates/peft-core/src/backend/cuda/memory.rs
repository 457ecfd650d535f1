//! Memory: regions of the card that buffers are cut from, and pinned memory of the host.

use std::{
    ops::{Deref, DerefMut},
    ptr, slice,
    sync::Arc,
};

use cudarc::driver::{result, sys};

use super::{
    DeviceError,
    device::{Device, call},
};

/// What every buffer's address is a multiple of, bytes.
const ALIGNMENT: usize = 256;

/// What a buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    F32,
    Bf16,
}

impl Numbers {
    /// Bytes of one.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Memory of the card that views look into.
pub struct DeviceBuffer {
    pub(super) address: u64,
    pub(super) numbers: Numbers,
    /// Where the same numbers lie rounded to bf16, for products; 0 where they do not.
    pub(super) rounded: u64,
}

impl DeviceBuffer {
    pub(super) fn new(address: u64, numbers: Numbers) -> Self {
        Self { address, numbers, rounded: 0 }
    }
}

/// Memory of the card that is owned: given back when the last buffer of its region is dropped.
pub struct DeviceMemory {
    pub(super) buffer: DeviceBuffer,
    pub(super) bytes: usize,
    /// None while memory is only counted.
    region: Option<Arc<Region>>,
}

impl DeviceMemory {
    /// What it lies in.
    pub(super) fn region(&self) -> Option<Arc<Region>> {
        self.region.clone()
    }

    /// The same memory, which is given back when the last of its owners is dropped.
    pub(super) fn share(&self) -> Self {
        let buffer = DeviceBuffer { ..self.buffer };
        Self { buffer, bytes: self.bytes, region: self.region.clone() }
    }
}

impl Deref for DeviceMemory {
    type Target = DeviceBuffer;

    fn deref(&self) -> &DeviceBuffer {
        &self.buffer
    }
}

impl DerefMut for DeviceMemory {
    fn deref_mut(&mut self) -> &mut DeviceBuffer {
        &mut self.buffer
    }
}

/// One allocation.
pub(super) struct Region {
    pub(super) address: u64,
    bytes: usize,
    device: Arc<Device>,
}

impl Region {
    /// Reserves `bytes` bytes, all 0.
    pub(super) fn new(device: &Arc<Device>, bytes: usize) -> Result<Arc<Self>, DeviceError> {
        let bytes = padded(bytes);
        let address = device.reserve(bytes)?;
        Ok(Arc::new(Self { address, bytes, device: Arc::clone(device) }))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.device.free(self.address, self.bytes);
    }
}

pub(super) fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT).max(ALIGNMENT)
}

/// Where new buffers come from.
pub(super) enum Source {
    /// An allocation for each.
    Single,
    /// Nowhere: their bytes are counted.
    Counting(usize),
    /// The rest of a region.
    Placing(Arc<Region>, usize),
}

impl Source {
    pub(super) fn take(
        &mut self,
        device: &Arc<Device>,
        bytes: usize,
        numbers: Numbers,
    ) -> Result<DeviceMemory, DeviceError> {
        let size = padded(bytes);
        let (address, region) = match self {
            Self::Single => {
                let region = Region::new(device, size)?;
                (region.address, Some(region))
            }
            Self::Counting(sum) => {
                *sum += size;
                (0, None)
            }
            Self::Placing(region, used) if *used + size <= region.bytes => {
                *used += size;
                (region.address + (*used - size) as u64, Some(Arc::clone(region)))
            }
            Self::Placing(..) => return Err(DeviceError::OutOfMemory { bytes: size, free: 0 }),
        };
        Ok(DeviceMemory { buffer: DeviceBuffer::new(address, numbers), bytes: size, region })
    }
}

/// Memory of the host that copies to and from the card run beside other work with.
pub(super) struct Pinned {
    start: *mut u8,
    bytes: usize,
    device: Arc<Device>,
}

// SAFETY: plain memory that this value owns.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(super) fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: the memory is fresh and owned by the value that is returned.
        let start = unsafe {
            let start = result::malloc_host(bytes, 0).map_err(|_| DeviceError::HostMemory { bytes })?;
            ptr::write_bytes(start.cast::<u8>(), 0, bytes);
            start.cast::<u8>()
        };
        Ok(Self { start, bytes, device: Arc::clone(device) })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `bytes` bytes were reserved and set.
        unsafe { slice::from_raw_parts(self.start, self.bytes) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed once.
        unsafe { slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: reserved by `malloc_host` and freed once. Copies that use it are over: owners settle first.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
    }
}

/// Memory of the host that the card reads where it is.
pub(super) struct Registered {
    start: *mut std::ffi::c_void,
    /// Where the card finds it.
    pub(super) address: u64,
    pub(super) numbers: Numbers,
    device: Arc<Device>,
}

// SAFETY: only the address is used, by the driver.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registered {
    /// `data` must stay where it is for as long as this value lives.
    pub(super) fn new(device: &Arc<Device>, data: &[u8], numbers: Numbers) -> Result<Self, DeviceError> {
        const PORTABLE_AND_MAPPED: u32 = 1 | 2;
        device.bind()?;
        let start = data.as_ptr().cast_mut().cast();
        // SAFETY: the memory is there, and stays as the caller promises.
        unsafe {
            sys::cuMemHostRegister_v2(start, data.len(), PORTABLE_AND_MAPPED)
                .result()
                .map_err(|_| DeviceError::HostMemory { bytes: data.len() })?;
            let mut this = Self { start, address: 0, numbers, device: Arc::clone(device) };
            sys::cuMemHostGetDevicePointer_v2(&mut this.address, start, 0)
                .result()
                .map_err(call("cuMemHostGetDevicePointer"))?;
            Ok(this)
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: registered once, by this value; work that reads it is over: owners settle first.
            let _ = unsafe { sys::cuMemHostUnregister(self.start).result() };
        }
    }
}

/// Activations on the host, and how far their copies are.
pub struct Aside {
    memory: Pinned,
    /// Behind the work that a copy must wait for.
    fence: sys::CUevent,
    /// Behind the last copy.
    done: sys::CUevent,
}

// SAFETY: events may be used from any thread whose context is the card's.
unsafe impl Send for Aside {}
// SAFETY: as above.
unsafe impl Sync for Aside {}

impl Aside {
    pub(super) fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, DeviceError> {
        let memory = Pinned::new(device, bytes)?;
        let event = || {
            result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(call("cuEventCreate"))
        };
        Ok(Self { memory, fence: event()?, done: event()? })
    }

    /// Copies `bytes` bytes from `address` here, after the work that is queued, beside what comes later.
    pub(super) fn put(&mut self, device: &Device, address: u64, bytes: usize) {
        let bytes = bytes.min(self.memory.bytes);
        device.attempt(|| {
            // SAFETY: the stream and the events live; the memory is pinned and as large.
            unsafe {
                self.follow(device.stream, device.side)?;
                result::memcpy_dtoh_async(&mut self.memory.bytes_mut()[..bytes], address, device.side)
                    .map_err(call("cuMemcpyDtoHAsync"))?;
                result::event::record(self.done, device.side).map_err(call("cuEventRecord"))
            }
        });
    }

    /// Copies what lies here to `address`, after the work that is queued, beside what comes later.
    pub(super) fn bring(&self, device: &Device, address: u64, bytes: usize) {
        let bytes = bytes.min(self.memory.bytes);
        device.attempt(|| {
            // SAFETY: as above; the card's memory is as large.
            unsafe {
                self.follow(device.stream, device.side)?;
                result::memcpy_htod_async(address, &self.memory.bytes()[..bytes], device.side)
                    .map_err(call("cuMemcpyHtoDAsync"))?;
                result::event::record(self.done, device.side).map_err(call("cuEventRecord"))
            }
        });
    }

    /// Later work waits for the last copy.
    pub(super) fn wait(&self, device: &Device) {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        device.attempt(|| {
            // SAFETY: stream and event live.
            unsafe { result::stream::wait_event(device.stream, self.done, flags) }
                .map_err(call("cuStreamWaitEvent"))
        });
    }

    /// SAFETY: callers hand in streams that live.
    unsafe fn follow(&self, first: sys::CUstream, then: sys::CUstream) -> Result<(), DeviceError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the caller's.
        unsafe {
            result::event::record(self.fence, first).map_err(call("cuEventRecord"))?;
            result::stream::wait_event(then, self.fence, flags).map_err(call("cuStreamWaitEvent"))
        }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        for event in [self.fence, self.done] {
            // SAFETY: destroyed once, by their owner.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}
