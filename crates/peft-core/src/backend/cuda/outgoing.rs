//! A micro-batch on its way to the card: through pinned memory, so that the host lays out the next one while the card works
//! on the last. From memory that may be paged out the driver copies only once the work before is done.

use std::sync::Arc;

use cudarc::driver::result;

use super::{
    DeviceError,
    device::{Device, call},
    memory::{Pinned, padded},
    reduce::Mark,
};

/// Pinned memory for two batches, which take turns.
pub(super) struct Outgoing {
    slots: [Slot; 2],
    /// The one that is filled.
    at: usize,
}

struct Slot {
    memory: Pinned,
    used: usize,
    /// Behind the last copy from here.
    copied: Mark,
}

impl Outgoing {
    /// Room for `parts` parts of `bytes` bytes together.
    pub(super) fn new(device: &Arc<Device>, bytes: usize, parts: usize) -> Result<Self, DeviceError> {
        device.bind()?;
        let room = bytes + parts * padded(1);
        let slot = || Ok(Slot { memory: Pinned::new(device, room)?, used: 0, copied: Mark::new(device)? });
        Ok(Self { slots: [slot()?, slot()?], at: 0 })
    }

    /// Begins a batch; waits until the one before the last has left.
    pub(super) fn begin(&mut self, device: &Device) {
        self.at = 1 - self.at;
        let slot = &mut self.slots[self.at];
        slot.used = 0;
        device.attempt(|| slot.copied.wait_here());
    }

    /// Queues a copy of `from` to `address`.
    pub(super) fn send<T: bytemuck::Pod>(&mut self, device: &Device, from: &[T], address: u64) {
        let slot = &mut self.slots[self.at];
        let bytes: &[u8] = bytemuck::cast_slice(from);
        let end = slot.used + bytes.len();
        if bytes.is_empty() {
            return;
        }
        let Some(place) = slot.memory.bytes_mut().get_mut(slot.used..end) else {
            // More than was planned for, as with more virtual keys than tokens: it goes the slower way.
            return device.upload(from, address);
        };
        place.copy_from_slice(bytes);
        slot.used += padded(bytes.len());
        let place = &*place;
        // SAFETY: the caller hands in the address of memory that holds as many numbers; the pinned memory is not written
        // again before the mark behind the copy is reached.
        device.attempt(|| {
            unsafe { result::memcpy_htod_async(address, place, device.stream) }
                .map_err(call("cuMemcpyHtoDAsync"))
        });
    }

    /// Ends a batch.
    pub(super) fn end(&mut self, device: &Device) {
        let slot = &self.slots[self.at];
        device.attempt(|| slot.copied.record(device.stream));
    }
}
