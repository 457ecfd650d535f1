//! One thread's way from a file to the card: a stream, and two slots of pinned memory that take turns.

use std::{ffi::c_void, ptr, sync::Arc};

use cudarc::driver::{result, sys};
use half::bf16;
use safetensors::tensor::Dtype;

use super::{
    DeviceError,
    base::Shelf,
    device::{Device, call},
    memory::{DeviceMemory, Numbers, Pinned},
};
use crate::{
    error::Result,
    model::weights::{Tensor, Witness},
    quant::{double, nf4, packed::PackedShape},
};

/// Numbers that a block of the kernel takes, and its threads.
const QUANTISED: usize = 4096;
const QUANTISE_THREADS: usize = 512;

/// Where the parts of an NF4 matrix lie on the card.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nf4Place {
    pub(super) shape: PackedShape,
    pub(super) codes: u64,
    /// 0 without double quantisation.
    pub(super) scales: u64,
    pub(super) nested: u64,
}

/// Pinned memory, and room on the card for what it holds.
struct Slot {
    host: Pinned,
    card: DeviceMemory,
    /// Behind the last work that reads either.
    free: sys::CUevent,
}

/// One thread's way to the card.
pub(super) struct Lane {
    device: Arc<Device>,
    stream: sys::CUstream,
    slots: [Slot; 2],
    turn: usize,
    /// Block scales of one matrix: on the card, and read back.
    scales: DeviceMemory,
    host_scales: Pinned,
    /// The map of double quantisation.
    map: u64,
}

// SAFETY: stream and events belong to the card's context, which every thread makes current before it uses them; the lane
// is used by one thread at a time.
unsafe impl Send for Lane {}

impl Lane {
    /// A way with slots of `bytes` bytes, for matrices of at most `blocks` blocks.
    pub(super) fn new(
        device: &Arc<Device>,
        bytes: usize,
        blocks: usize,
        map: u64,
    ) -> Result<Self, DeviceError> {
        device.bind()?;
        let mut shelf = Shelf::new(device, [bytes, bytes, 4 * blocks])?;
        let mut slot = || {
            let free = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .map_err(call("cuEventCreate"))?;
            Ok::<_, DeviceError>(Slot {
                host: Pinned::new(device, bytes)?,
                card: shelf.take(bytes, Numbers::F32)?,
                free,
            })
        };
        let slots = [slot()?, slot()?];
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(call("cuStreamCreate"))?;
        Ok(Self {
            device: Arc::clone(device),
            stream,
            slots,
            turn: 0,
            scales: shelf.take(4 * blocks, Numbers::F32)?,
            host_scales: Pinned::new(device, 4 * blocks)?,
            map,
        })
    }

    fn slot_bytes(&self) -> usize {
        self.slots[0].host.bytes().len()
    }

    /// Fills a slot of `bytes` bytes by `fill` once it is free, copies it to `to`, or to the slot's own place on the card,
    /// and lets `then` queue what reads that.
    fn send(
        &mut self,
        bytes: usize,
        to: Option<u64>,
        fill: impl FnOnce(&mut [u8]) -> Result<()>,
        then: impl FnOnce(&Self, u64) -> Result<(), DeviceError>,
    ) -> Result<()> {
        self.turn ^= 1;
        let slot = &mut self.slots[self.turn];
        // SAFETY: the event lives as long as the slot.
        unsafe { result::event::synchronize(slot.free) }.map_err(call("cuEventSynchronize"))?;
        fill(&mut slot.host.bytes_mut()[..bytes])?;
        let slot = &self.slots[self.turn];
        let to = to.unwrap_or(slot.card.address);
        // SAFETY: the memory is pinned and stays as it is until the event behind the copy; the place on the card was reserved
        // for as many bytes.
        unsafe { result::memcpy_htod_async(to, &slot.host.bytes()[..bytes], self.stream) }
            .map_err(call("cuMemcpyHtoDAsync"))?;
        then(self, to)?;
        // SAFETY: event and stream live.
        unsafe { result::event::record(self.slots[self.turn].free, self.stream) }
            .map_err(call("cuEventRecord"))?;
        Ok(())
    }

    /// Copies bytes that lie in ordinary memory.
    pub(super) fn bytes(&mut self, from: &[u8], to: u64) -> Result<()> {
        let size = self.slot_bytes();
        for (piece, from) in from.chunks(size).enumerate() {
            let fill = |slot: &mut [u8]| {
                slot.copy_from_slice(from);
                Ok(())
            };
            self.send(from.len(), Some(to + (piece * size) as u64), fill, |_, _| Ok(()))?;
        }
        Ok(())
    }

    /// Copies f32 numbers as `numbers`.
    pub(super) fn floats(&mut self, from: &[f32], to: u64, numbers: Numbers) -> Result<()> {
        let most = self.slot_bytes() / 4;
        for (piece, from) in from.chunks(most).enumerate() {
            let at = to + (piece * most * numbers.bytes()) as u64;
            let fill = |slot: &mut [u8]| {
                match numbers {
                    Numbers::F32 => bytemuck::cast_slice_mut(slot).copy_from_slice(from),
                    Numbers::Bf16 => {
                        let slot: &mut [bf16] = bytemuck::cast_slice_mut(slot);
                        slot.iter_mut().zip(from).for_each(|(to, from)| *to = bf16::from_f32(*from));
                    }
                }
                Ok(())
            };
            self.send(numbers.bytes() * from.len(), Some(at), fill, |_, _| Ok(()))?;
        }
        Ok(())
    }

    /// Copies a tensor, one number after the other, as `numbers`.
    pub(super) fn plain(
        &mut self,
        tensor: &Tensor<'_>,
        to: u64,
        numbers: Numbers,
        witness: &mut Witness<'_>,
    ) -> Result<()> {
        if is_bf16(tensor) && numbers == Numbers::Bf16 {
            let size = self.slot_bytes();
            for start in (0..tensor.bytes()).step_by(size) {
                let bytes = size.min(tensor.bytes() - start);
                let fill = |slot: &mut [u8]| {
                    tensor.read_at(start, slot)?;
                    witness(slot);
                    finite(slot).then_some(()).ok_or_else(|| tensor.non_finite())
                };
                self.send(bytes, Some(to + start as u64), fill, |_, _| Ok(()))?;
            }
            return Ok(());
        }
        let (mut done, mut outcome) = (0, Ok(()));
        tensor.pieces_f32(witness, |piece| {
            if outcome.is_ok() {
                outcome = self.floats(piece, to + (done * numbers.bytes()) as u64, numbers);
            }
            done += piece.len();
        })?;
        outcome
    }

    /// Quantises a tensor on its way; returns the mean of its scales, of use with double quantisation.
    pub(super) fn quantise(
        &mut self,
        tensor: &Tensor<'_>,
        place: Nf4Place,
        witness: &mut Witness<'_>,
    ) -> Result<f32> {
        let PackedShape { options, .. } = place.shape;
        let scales = if options.double { self.scales.address } else { place.nested };
        if is_bf16(tensor) {
            let most = self.slot_bytes() / 2 / QUANTISED * QUANTISED;
            for done in (0..tensor.elements()).step_by(most) {
                let count = most.min(tensor.elements() - done);
                let fill = |slot: &mut [u8]| {
                    tensor.read_at(2 * done, slot)?;
                    witness(slot);
                    Ok(())
                };
                let work = Quantise { count, done, scales, place, kernel: "quantise_bf16" };
                self.send(2 * count, None, fill, |lane, from| lane.queue(from, &work))?;
            }
        } else {
            let (mut at, mut outcome) = (0, Ok(()));
            tensor.pieces_f32(witness, |piece| {
                let most = self.slot_bytes() / 4 / QUANTISED * QUANTISED;
                for part in piece.chunks(most) {
                    let fill = |slot: &mut [u8]| {
                        bytemuck::cast_slice_mut(slot).copy_from_slice(part);
                        Ok(())
                    };
                    let count = part.len();
                    let work = Quantise { count, done: at, scales, place, kernel: "quantise_f32" };
                    if outcome.is_ok() {
                        outcome = self.send(4 * count, None, fill, |lane, from| lane.queue(from, &work));
                    }
                    at += count;
                }
            })?;
            outcome?;
        }
        let blocks = nf4::blocks(tensor.elements(), options.block_size);
        let read = &mut self.host_scales.bytes_mut()[..4 * blocks];
        // SAFETY: the memory is pinned and as large, and nobody looks at it until the stream is done.
        unsafe {
            result::memcpy_dtoh_async(read, scales, self.stream).map_err(call("cuMemcpyDtoHAsync"))?;
            result::stream::synchronize(self.stream).map_err(call("cuStreamSynchronize"))?;
        }
        let read: &[f32] = bytemuck::cast_slice(&self.host_scales.bytes()[..4 * blocks]);
        if !read.iter().fold(true, |finite, scale| finite & scale.is_finite()) {
            return Err(tensor.non_finite());
        }
        if !options.double {
            return Ok(0.0);
        }
        let offset = double::mean(read);
        let grid = blocks.div_ceil(double::NESTED_BLOCK);
        let arguments = (scales, blocks as u32, offset, self.map, place.scales, place.nested);
        let (from, count, mean, map, codes, nested) = &arguments;
        let pointer = |argument: *const c_void| argument.cast_mut();
        let mut all = [
            pointer(ptr::from_ref(from).cast()),
            pointer(ptr::from_ref(count).cast()),
            pointer(ptr::from_ref(mean).cast()),
            pointer(ptr::from_ref(map).cast()),
            pointer(ptr::from_ref(codes).cast()),
            pointer(ptr::from_ref(nested).cast()),
        ];
        // SAFETY: the arguments are those of the kernel, in its order.
        unsafe { self.device.launch_on(self.stream, "quantise_scales", grid, 256, &mut all) }?;
        Ok(offset)
    }

    /// Queues the kernel that quantises what lies at `from`.
    fn queue(&self, from: u64, work: &Quantise) -> Result<(), DeviceError> {
        let options = work.place.shape.options;
        let count = work.count as u32;
        let shift = options.block_size.trailing_zeros();
        let codes = work.place.codes + work.done as u64 / 2;
        let scales = work.scales + 4 * (work.done / options.block_size) as u64;
        let pointer = |argument: *const c_void| argument.cast_mut();
        let mut all = [
            pointer(ptr::from_ref(&from).cast()),
            pointer(ptr::from_ref(&count).cast()),
            pointer(ptr::from_ref(&shift).cast()),
            pointer(ptr::from_ref(&codes).cast()),
            pointer(ptr::from_ref(&scales).cast()),
        ];
        let grid = work.count.div_ceil(QUANTISED);
        // SAFETY: the arguments are those of the kernel, in its order.
        unsafe { self.device.launch_on(self.stream, work.kernel, grid, QUANTISE_THREADS, &mut all) }
    }

    /// Waits for all that was queued.
    pub(super) fn finish(&mut self) -> Result<(), DeviceError> {
        // SAFETY: the stream lives as long as this value.
        unsafe { result::stream::synchronize(self.stream) }.map_err(call("cuStreamSynchronize"))
    }
}

/// A piece of a tensor to be quantised.
struct Quantise {
    count: usize,
    /// Numbers of the tensor ahead of it.
    done: usize,
    scales: u64,
    place: Nf4Place,
    kernel: &'static str,
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.device.bind().is_err() {
            return;
        }
        // SAFETY: destroyed once, by their owner, when all work that uses them is over.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for slot in &self.slots {
                let _ = result::event::destroy(slot.free);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// Whether a tensor's bytes are bf16 as the card takes them.
fn is_bf16(tensor: &Tensor<'_>) -> bool {
    tensor.is_plain() && tensor.dtype() == Dtype::BF16 && cfg!(target_endian = "little")
}

/// Whether all numbers of bf16 are finite: an exponent of all ones is infinite or not a number.
fn finite(bytes: &[u8]) -> bool {
    let numbers: &[u16] = bytemuck::cast_slice(bytes);
    numbers.iter().fold(true, |finite, bits| finite & (bits & 0x7f80 != 0x7f80))
}
