//! The flat gradient on its way to other members: as addresses for a collective that works in the card's memory, or through
//! pinned host memory for one that does not.

use std::{ffi::c_void, sync::Arc};

use cudarc::driver::{result, sys};
use shanty_cuda::Span;

use super::{
    Cuda, DeviceError,
    device::{Device, call},
    memory::{DeviceMemory, Pinned, Region},
};
use crate::{
    error::Result,
    optim::{FlatState, SumPiece},
};

/// The sum of a state's gradients, and the place of its sum over all members, as addresses of a card's memory. They hold as
/// long as the state does.
#[derive(Clone)]
pub struct CardFlat {
    device: Arc<Device>,
    gradient: u64,
    reduced: u64,
    length: usize,
    /// What the two lie in.
    regions: [Option<Arc<Region>>; 2],
}

impl CardFlat {
    /// Both as memory that somebody else may work in: the gradient, and the place of its sum. None where no
    /// room for the sum was reserved.
    pub fn spans(&self) -> Option<[Span; 2]> {
        let [gradient, reduced] = &self.regions;
        let bytes = self.length * size_of::<f32>();
        let span = |address, region: &Option<Arc<Region>>| {
            let region = Arc::clone(region.as_ref()?);
            // SAFETY: the region holds the numbers, and lives as long as the span; it keeps the device, and so the stream.
            Some(unsafe { Span::new(address, bytes, self.device.stream as u64, region) })
        };
        Some([span(self.gradient, gradient)?, span(self.reduced, reduced)?])
    }

    /// Numbers of f32 in each.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Address of the gradient's first number.
    pub fn gradient(&self) -> u64 {
        self.gradient
    }

    /// Address of the first number of its sum over all members; 0 where no room for it was reserved.
    pub fn reduced(&self) -> u64 {
        self.reduced
    }

    /// The stream (`CUstream`) that the gradient is made on, and that an update is queued on: what is queued here comes
    /// between the two.
    pub fn stream(&self) -> *mut c_void {
        self.device.stream.cast()
    }

    /// Makes the card's context current on the calling thread.
    ///
    /// # Errors
    /// What the driver says.
    pub fn bind(&self) -> Result<()> {
        Ok(self.device.bind()?)
    }

    /// A mark behind the work that is queued so far.
    ///
    /// # Errors
    /// What the driver says.
    pub fn mark(&self) -> Result<Mark> {
        self.device.bind()?;
        let mark = Mark::new(&self.device)?;
        mark.record(self.device.stream)?;
        Ok(mark)
    }
}

/// A place in a stream, for others to wait for.
pub struct Mark {
    event: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: events may be used from any thread whose context is the card's.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Mark {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = result::event::create(flags).map_err(call("cuEventCreate"))?;
        Ok(Self { event, device: Arc::clone(device) })
    }

    pub(super) fn record(&self, stream: sys::CUstream) -> Result<(), DeviceError> {
        // SAFETY: stream and event live.
        unsafe { result::event::record(self.event, stream) }.map_err(call("cuEventRecord"))
    }

    fn hold_back(&self, stream: sys::CUstream) -> Result<(), DeviceError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event live.
        unsafe { result::stream::wait_event(stream, self.event, flags) }.map_err(call("cuStreamWaitEvent"))
    }

    /// The event (`CUevent`).
    pub fn event(&self) -> *mut c_void {
        self.event.cast()
    }

    /// Waits for it.
    ///
    /// # Errors
    /// What failed on the card before it.
    pub fn wait(&self) -> Result<()> {
        Ok(self.wait_here()?)
    }

    pub(super) fn wait_here(&self) -> Result<(), DeviceError> {
        self.device.bind()?;
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.event) }.map_err(call("cuEventSynchronize"))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: destroyed once, by its owner.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

/// Pinned memory of two pieces on their way from the card, and of two on their way back.
pub(super) struct Pieces {
    own: [Pinned; 2],
    sums: [Pinned; 2],
    /// Behind the copy of each.
    arrived: [Mark; 2],
    returned: [Mark; 2],
    /// Behind the work at hand.
    fence: Mark,
    length: usize,
}

impl Pieces {
    fn new(device: &Arc<Device>, length: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        let pair = || Ok([Pinned::new(device, 4 * length)?, Pinned::new(device, 4 * length)?]);
        let marks = || Ok([Mark::new(device)?, Mark::new(device)?]);
        Ok(Self {
            own: pair()?,
            sums: pair()?,
            arrived: marks()?,
            returned: marks()?,
            fence: Mark::new(device)?,
            length,
        })
    }
}

impl Cuda {
    /// A state's gradient and the place of its sum, where there is one.
    pub(crate) fn flat(&self, state: &FlatState<Self>) -> CardFlat {
        let reduced = state.reduced.as_ref().map_or(0, |reduced| reduced.address);
        let (gradient, length) = (state.gradient.address, state.length);
        let regions = [state.gradient.region(), state.reduced.as_ref().and_then(DeviceMemory::region)];
        CardFlat { device: Arc::clone(&self.device), gradient, reduced, length, regions }
    }

    /// Has `work` sum the gradient over members piece by piece: while one is summed, the next arrives and the last returns.
    pub(crate) fn reduce_through_host<E>(
        &self,
        flat: &CardFlat,
        length: usize,
        work: &mut SumPiece<'_, E>,
    ) -> Result<std::result::Result<(), E>> {
        // What failed in the passes before is no gradient to be summed.
        self.device.settle()?;
        let length = length.min(flat.length.max(1));
        let mut place = self.pieces.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if place.as_ref().is_none_or(|pieces| pieces.length != length) {
            *place = None;
            *place = Some(Pieces::new(&self.device, length)?);
        }
        let pieces = place.as_mut().ok_or(DeviceError::HostMemory { bytes: 16 * length })?;
        let outcome = self.reduce_pieces(flat, pieces, work);
        // Copies may be under way from or to pinned memory that is used again.
        // SAFETY: the stream lives.
        let over = unsafe { result::stream::synchronize(self.device.side) };
        over.map_err(call("cuStreamSynchronize"))?;
        Ok(outcome?)
    }

    fn reduce_pieces<E>(
        &self,
        flat: &CardFlat,
        pieces: &mut Pieces,
        work: &mut SumPiece<'_, E>,
    ) -> Result<std::result::Result<(), E>, DeviceError> {
        let (stream, side) = (self.device.stream, self.device.side);
        let Pieces { own, sums, arrived, returned, fence, length } = pieces;
        let length = *length;
        let count = flat.length.div_ceil(length);
        let size = |piece: usize| length.min(flat.length - piece * length);
        fence.record(stream)?;
        fence.hold_back(side)?;
        let ask = |piece: usize, own: &mut Pinned, arrived: &Mark| {
            let into = &mut own.bytes_mut()[..4 * size(piece)];
            let from = flat.gradient + 4 * (piece * length) as u64;
            // SAFETY: the memory is pinned and as large, the gradient lies there; the copy is waited for before the piece is
            // read.
            unsafe { result::memcpy_dtoh_async(into, from, side) }.map_err(call("cuMemcpyDtoHAsync"))?;
            arrived.record(side)
        };
        ask(0, &mut own[0], &arrived[0])?;
        for piece in 0..count {
            let (here, next) = (piece % 2, (piece + 1) % 2);
            if piece + 1 < count {
                ask(piece + 1, &mut own[next], &arrived[next])?;
            }
            arrived[here].wait_here()?;
            if piece >= 2 {
                // The sum before the last is still on its way from here.
                returned[here].wait_here()?;
            }
            let bytes = 4 * size(piece);
            let sum = &mut sums[here].bytes_mut()[..bytes];
            if let Err(error) =
                work(bytemuck::cast_slice(&own[here].bytes()[..bytes]), bytemuck::cast_slice_mut(sum))
            {
                return Ok(Err(error));
            }
            let to = flat.reduced + 4 * (piece * length) as u64;
            // SAFETY: as above; the memory is not written again before the copy is waited for.
            unsafe { result::memcpy_htod_async(to, sum, side) }.map_err(call("cuMemcpyHtoDAsync"))?;
            returned[here].record(side)?;
        }
        Ok(Ok(()))
    }
}
