//! The card that a member reduces on: a stream of its own, events, and memory on both sides.

use std::{
    ffi::{c_int, c_uint},
    ops::Range,
    ptr, slice,
    sync::Arc,
};

use shanty_cuda::Span;

use super::api::{Api, Handle, NOT_READY, SUCCESS};
use crate::error::Result;

/// `CU_STREAM_NON_BLOCKING`
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`
const WITHOUT_TIMING: c_uint = 2;
/// Ahead of the work that it runs beside, as far as the driver allows: it is short, and others wait for it.
const HIGH_PRIORITY: c_int = -1;

/// One card's context, and the collective's stream in it.
pub(super) struct Card {
    pub(super) api: &'static Api,
    device: c_int,
    context: Handle,
    pub(super) stream: Handle,
}

// SAFETY: handles of the driver may be used from any thread whose current context is theirs; `bind` sees to that.
unsafe impl Send for Card {}
// SAFETY: as above.
unsafe impl Sync for Card {}

impl Card {
    pub(super) fn open(api: &'static Api, index: u32) -> Result<Arc<Self>> {
        let driver = &api.driver;
        let mut device = 0;
        let index = c_int::try_from(index).unwrap_or(c_int::MAX);
        // SAFETY: each call writes one value, whose room is here.
        unsafe {
            api.driver("cuDeviceGet", (driver.device)(&mut device, index))?;
            let mut context = ptr::null_mut();
            api.driver("cuDevicePrimaryCtxRetain", (driver.retain)(&mut context, device))?;
            let mut this = Self { api, device, context, stream: ptr::null_mut() };
            this.bind()?;
            let created = (driver.stream_create)(&mut this.stream, NON_BLOCKING, HIGH_PRIORITY);
            api.driver("cuStreamCreateWithPriority", created)?;
            Ok(Arc::new(this))
        }
    }

    /// What tells this card from all others, also those of other hosts.
    pub(super) fn uuid(&self) -> Result<[u8; 16]> {
        let mut uuid = [0; 16];
        // SAFETY: writes 16 bytes.
        self.api.driver("cuDeviceGetUuid", unsafe { (self.api.driver.uuid)(&mut uuid, self.device) })?;
        Ok(uuid)
    }

    /// Makes the card current on the calling thread.
    pub(super) fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained as long as this value lives.
        self.api.driver("cuCtxSetCurrent", unsafe { (self.api.driver.set_current)(self.context) })
    }

    /// What is queued on the collective's stream from now on waits for what is queued on another now.
    pub(super) fn follow(self: &Arc<Self>, stream: u64) -> Result<()> {
        let event = Event::new(self)?;
        event.record(stream as Handle)?;
        event.hold(self.stream)
    }

    /// Copies a range of bytes to the same place on the card, in the stream.
    pub(super) fn upload(&self, to: &Memory, from: &Pinned, range: Range<usize>) -> Result<()> {
        debug_assert!(range.end <= to.bytes && range.end <= from.bytes);
        let source = from.start.wrapping_byte_add(range.start);
        let target = to.address + range.start as u64;
        // SAFETY: both are as large; owners keep them until the stream has passed.
        let result = unsafe { (self.api.driver.to_device)(target, source, range.len(), self.stream) };
        self.api.driver("cuMemcpyHtoDAsync", result)
    }

    /// Copies as many bytes as the span has to it, in the stream.
    pub(super) fn upload_to(&self, to: &Span, from: &Pinned) -> Result<()> {
        debug_assert!(to.bytes() <= from.bytes);
        // SAFETY: as for `upload`; the span's owner vouches for it.
        let result =
            unsafe { (self.api.driver.to_device)(to.address(), from.start, to.bytes(), self.stream) };
        self.api.driver("cuMemcpyHtoDAsync", result)
    }

    /// Copies as many bytes as the span has from it, in the stream.
    pub(super) fn download_from(&self, to: &mut Pinned, from: &Span) -> Result<()> {
        debug_assert!(from.bytes() <= to.bytes);
        // SAFETY: as for `upload_to`.
        let result =
            unsafe { (self.api.driver.to_host)(to.start, from.address(), from.bytes(), self.stream) };
        self.api.driver("cuMemcpyDtoHAsync", result)
    }

    /// Copies a range of bytes from the same place on the card, in the stream.
    pub(super) fn download(&self, to: &mut Pinned, from: &Memory, range: Range<usize>) -> Result<()> {
        debug_assert!(range.end <= from.bytes && range.end <= to.bytes);
        let source = from.address + range.start as u64;
        let target = to.start.wrapping_byte_add(range.start);
        // SAFETY: as above.
        let result = unsafe { (self.api.driver.to_host)(target, source, range.len(), self.stream) };
        self.api.driver("cuMemcpyDtoHAsync", result)
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // SAFETY: each is given back once, by its owner. What fails here can be told to nobody.
        unsafe {
            if self.bind().is_ok() && !self.stream.is_null() {
                let _ = (self.api.driver.stream_destroy)(self.stream);
            }
            let _ = (self.api.driver.release)(self.device);
        }
    }
}

/// A place in a stream.
pub(super) struct Event {
    card: Arc<Card>,
    handle: Handle,
}

// SAFETY: as for the card.
unsafe impl Send for Event {}

impl Event {
    pub(super) fn new(card: &Arc<Card>) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        let result = unsafe { (card.api.driver.event_create)(&mut handle, WITHOUT_TIMING) };
        card.api.driver("cuEventCreate", result)?;
        Ok(Self { card: Arc::clone(card), handle })
    }

    /// Puts it behind what is queued on a stream.
    pub(super) fn record(&self, stream: Handle) -> Result<()> {
        let driver = &self.card.api.driver;
        // SAFETY: event and stream live, in the same context.
        self.card.api.driver("cuEventRecord", unsafe { (driver.event_record)(self.handle, stream) })
    }

    /// Has a stream wait for it.
    pub(super) fn hold(&self, stream: Handle) -> Result<()> {
        let driver = &self.card.api.driver;
        // SAFETY: as above.
        self.card.api.driver("cuStreamWaitEvent", unsafe { (driver.stream_wait)(stream, self.handle, 0) })
    }

    /// Whether the stream has passed it.
    pub(super) fn is_over(&self) -> Result<bool> {
        // SAFETY: the event lives.
        match unsafe { (self.card.api.driver.event_query)(self.handle) } {
            SUCCESS => Ok(true),
            NOT_READY => Ok(false),
            result => self.card.api.driver("cuEventQuery", result).map(|()| false),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.card.bind().is_ok() {
            // SAFETY: destroyed once, by its owner; the driver keeps what a stream still needs.
            let _ = unsafe { (self.card.api.driver.event_destroy)(self.handle) };
        }
    }
}

/// Memory of the card.
pub(super) struct Memory {
    card: Arc<Card>,
    pub(super) address: u64,
    pub(super) bytes: usize,
}

impl Memory {
    pub(super) fn new(card: &Arc<Card>, bytes: usize) -> Result<Self> {
        let (mut address, bytes) = (0, bytes.max(1));
        // SAFETY: writes one address.
        let result = unsafe { (card.api.driver.allocate)(&mut address, bytes) };
        card.api.driver("cuMemAlloc", result)?;
        Ok(Self { card: Arc::clone(card), address, bytes })
    }

    pub(super) fn span(self: &Arc<Self>) -> Span {
        let stream = self.card.stream as u64;
        // SAFETY: the memory lives as long as this value, which the span keeps, and with it the card and its stream.
        unsafe { Span::new(self.address, self.bytes, stream, Arc::clone(self) as _) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.card.bind().is_ok() {
            // SAFETY: freed once, by its owner; the driver waits for work that uses it.
            let _ = unsafe { (self.card.api.driver.free)(self.address) };
        }
    }
}

/// Memory of the host that copies to and from the card need not wait for.
pub(super) struct Pinned {
    card: Arc<Card>,
    start: Handle,
    bytes: usize,
}

// SAFETY: plain memory that this value owns.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(super) fn new(card: &Arc<Card>, bytes: usize) -> Result<Self> {
        let (mut start, bytes) = (ptr::null_mut(), bytes.max(1));
        // SAFETY: writes one address; the memory is this value's.
        unsafe {
            let result = (card.api.driver.allocate_host)(&mut start, bytes, 0);
            card.api.driver("cuMemHostAlloc", result)?;
            ptr::write_bytes(start.cast::<u8>(), 0, bytes);
        }
        Ok(Self { card: Arc::clone(card), start, bytes })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: reserved and set; no copy is under way when its owner looks.
        unsafe { slice::from_raw_parts(self.start.cast(), self.bytes) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed once.
        unsafe { slice::from_raw_parts_mut(self.start.cast(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.card.bind().is_ok() {
            // SAFETY: freed once, by its owner.
            let _ = unsafe { (self.card.api.driver.free_host)(self.start) };
        }
    }
}

/// A buffer on both sides, made larger as needed.
pub(super) struct Staging {
    pub(super) host: Pinned,
    pub(super) device: Arc<Memory>,
}

impl Staging {
    pub(super) fn new(card: &Arc<Card>, bytes: usize) -> Result<Self> {
        Ok(Self { host: Pinned::new(card, bytes)?, device: Arc::new(Memory::new(card, bytes)?) })
    }

    /// The place, with room for `bytes`.
    pub(super) fn reserve<'a>(
        place: &'a mut Option<Self>,
        card: &Arc<Card>,
        bytes: usize,
    ) -> Result<&'a mut Self> {
        match place {
            Some(staging) if staging.host.bytes >= bytes => {}
            _ => *place = None,
        }
        match place {
            Some(staging) => Ok(staging),
            None => Ok(place.insert(Self::new(card, bytes)?)),
        }
    }
}
