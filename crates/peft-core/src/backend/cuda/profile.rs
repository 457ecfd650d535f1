//! Where a card's time goes: an event after each operation, on the stream that they run on.

use std::{collections::BTreeMap, sync::Arc};

use cudarc::driver::{result, sys};

use super::{
    DeviceError,
    device::{Device, call},
};

/// Events behind operations.
pub(super) struct Profile {
    last: sys::CUevent,
    marks: Vec<(String, sys::CUevent)>,
}

// SAFETY: events belong to the card and are used under the lock that this value lies behind.
unsafe impl Send for Profile {}

fn event(stream: sys::CUstream) -> Result<sys::CUevent, DeviceError> {
    let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
    let event = result::event::create(flags).map_err(call("cuEventCreate"))?;
    // SAFETY: both were made by the driver and live.
    unsafe { result::event::record(event, stream) }.map_err(call("cuEventRecord"))?;
    Ok(event)
}

impl Profile {
    pub(super) fn start(stream: sys::CUstream) -> Result<Self, DeviceError> {
        Ok(Self { last: event(stream)?, marks: Vec::new() })
    }

    /// Notes that the operation `name` was just queued.
    pub(super) fn mark(&mut self, stream: sys::CUstream, name: String) -> Result<(), DeviceError> {
        self.marks.push((name, event(stream)?));
        Ok(())
    }

    /// Seconds and calls by operation, the longest first. All operations are over.
    pub(super) fn take(&mut self) -> Result<Vec<(String, f64, u64)>, DeviceError> {
        let mut sums: BTreeMap<String, (f64, u64)> = BTreeMap::new();
        for (name, event) in self.marks.drain(..) {
            // SAFETY: both events were recorded and are over; the older one is destroyed here, its last use.
            let milliseconds = unsafe {
                let time = result::event::elapsed(self.last, event).map_err(call("cuEventElapsedTime"))?;
                result::event::destroy(self.last).map_err(call("cuEventDestroy"))?;
                time
            };
            self.last = event;
            let sum = sums.entry(name).or_default();
            sum.0 += f64::from(milliseconds) / 1e3;
            sum.1 += 1;
        }
        let mut all: Vec<_> =
            sums.into_iter().map(|(name, (seconds, calls))| (name, seconds, calls)).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok(all)
    }
}

/// A place in what is queued, whose time is taken when it is reached.
pub struct Clock {
    event: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: events may be used from any thread whose context is the card's.
unsafe impl Send for Clock {}

impl Clock {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        device.bind()?;
        Ok(Self { event: event(device.stream)?, device: Arc::clone(device) })
    }

    /// Waits for both places; the seconds between them.
    ///
    /// # Errors
    /// What failed on the card before.
    pub fn seconds_to(&self, later: &Self) -> crate::error::Result<f64> {
        self.device.bind()?;
        // SAFETY: both events were recorded and live.
        let milliseconds = unsafe {
            result::event::synchronize(later.event).map_err(call("cuEventSynchronize"))?;
            result::event::elapsed(self.event, later.event).map_err(call("cuEventElapsedTime"))?
        };
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: destroyed once, by its owner.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        for event in self.marks.drain(..).map(|(_, event)| event).chain([self.last]) {
            // SAFETY: destroyed once, by its owner. What cannot be destroyed now goes with the process.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}
