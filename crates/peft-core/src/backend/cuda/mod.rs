//! Operations on an NVIDIA card: kernels of our own, compiled for the card when first used, and cuBLAS for products.
//!
//! Products run in the [`Precision`] asked for: f32 throughout, TF32, or bf16 with sums in f32; then activations
//! ([`Use::Activation`]) are kept as bf16 as well. Parameters, gradients of parameters, norms' factors, losses and
//! attention's logarithms are f32 always. Nothing here uses atomics on numbers: the same micro-batch gives the same bits.
//!
//! Operations only queue work. A failure is kept; nothing runs after it, and [`Backend::settle`] returns it.

mod attention;
mod base;
pub mod compile;
mod device;
mod error;
mod held;
mod lane;
mod libraries;
mod loading;
mod low_rank;
mod memory;
mod merge;
mod meter;
mod operations;
mod optimizer;
mod outgoing;
mod products;
mod profile;
mod reduce;
mod survey;
mod transfers;
mod virtual_tokens;
mod ways;

use std::sync::{Arc, Mutex, PoisonError};

pub use error::DeviceError;
pub use libraries::{LIBRARIES_VARIABLE, NVRTC_VARIABLE};
pub use memory::{Aside, DeviceBuffer, DeviceMemory};
use memory::{Numbers, Pinned, Region, Source};
pub use profile::Clock;
pub use reduce::{CardFlat, Mark};
use serde::{Deserialize, Serialize};
pub use survey::{Survey, survey};

use self::{
    attention::TileLists,
    base::DeviceBase,
    device::{Device, Operand},
};
use super::{Backend, Use, View, ViewMut};
use crate::{error::Result, model::BaseSource, random::DropoutKey};

/// Whether this machine has a card that [`Cuda::new`] can use, and the libraries for it: for `auto`, which asks first.
pub fn is_available() -> bool {
    Device::probe().is_ok()
}

/// How many cards this machine has; 0 without a driver.
pub fn cards() -> usize {
    Device::count().unwrap_or(0)
}

/// Bytes of a card, and how many are free; none where there is no such card.
pub fn memory_bytes(index: usize) -> Option<(u64, u64)> {
    Device::memory_bytes(index).ok()
}

/// Bytes of a card that are free; none where there is no such card.
pub fn free_bytes(index: usize) -> Option<u64> {
    Device::memory_bytes(index).ok().map(|(_, free)| free)
}

/// How products are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Operands and sums in f32: slow, for comparison with the CPU.
    F32,
    /// Operands rounded to 10 bits of mantissa, sums in f32.
    Tf32,
    /// Activations and operands of products in bf16; sums in f32.
    #[default]
    Bf16,
}

/// Threads of a block.
const THREADS: usize = 256;

/// The CUDA backend: one card.
pub struct Cuda {
    device: Arc<Device>,
    base: DeviceBase,
    /// Operands of a product, rounded to bf16.
    rounded: Mutex<[Option<DeviceMemory>; 2]>,
    nothing: DeviceBuffer,
    source: Mutex<Source>,
    /// Flat buffers on their way between host and card: pinned, so that the copy runs at the bus's speed.
    staging: Mutex<Option<Pinned>>,
    /// Pieces of a gradient on their way to other members and back; reserved at first.
    pieces: Mutex<Option<reduce::Pieces>>,
}

/// A micro-batch on the card.
pub struct CudaBatch {
    ids: DeviceMemory,
    positions: DeviceMemory,
    samples: DeviceMemory,
    spans: DeviceMemory,
    predicting: DeviceMemory,
    targets: DeviceMemory,
    /// What attention's backward pass needs of every row and head: two numbers.
    statistics: DeviceMemory,
    tiles: TileLists,
    outgoing: outgoing::Outgoing,
    span_count: usize,
    longest_queries: usize,
    longest_keys: usize,
}

/// A matrix as kernels take it.
#[derive(Clone, Copy)]
#[repr(C)]
struct MatrixArgument {
    address: u64,
    stride: u64,
    rows: u32,
    columns: u32,
}

fn matrix(view: View<'_, Cuda>) -> MatrixArgument {
    MatrixArgument {
        address: view.data.address + (view.data.numbers.bytes() * view.offset) as u64,
        stride: view.stride as u64,
        rows: view.rows as u32,
        columns: view.columns as u32,
    }
}

/// A matrix as kernels take it that serve either kind of number.
#[derive(Clone, Copy)]
#[repr(C)]
struct AnyArgument {
    matrix: MatrixArgument,
    half: u32,
    padding: u32,
}

fn any(view: View<'_, Cuda>) -> AnyArgument {
    AnyArgument { matrix: matrix(view), half: u32::from(view.data.numbers == Numbers::Bf16), padding: 0 }
}

fn target(view: &ViewMut<'_, Cuda>) -> MatrixArgument {
    matrix(view.view())
}

/// Blocks for rows of `columns`: one block a row, more where a row is long; a thread takes eight numbers at once.
fn grid(rows: usize, columns: usize) -> [usize; 3] {
    [rows, columns.div_ceil(8 * THREADS).clamp(1, 64), 1]
}

macro_rules! launch {
    ($device:expr, $name:expr, $grid:expr, $block:expr, $($argument:expr),+ $(,)?) => {{
        let name = $name;
        launch!(at $device, $device.function(name), name, $grid, $block, 0, $($argument),+)
    }};
    (at $device:expr, $function:expr, $name:expr, $grid:expr, $block:expr, $shared:expr, $($argument:expr),+ $(,)?) => {{
        // SAFETY: the arguments are those of the kernel of this name, in its order. They are temporaries of this one
        // expression, so they live until the kernel is queued, which copies them.
        unsafe {
            $device.launch($function, $name, $grid, $block, $shared, &mut [
                $(::std::ptr::from_ref(&$argument).cast_mut().cast::<::std::ffi::c_void>()),+
            ])
        }
    }};
}

/// The kernel of a family for numbers of one kind, or read as one and written as another kind.
macro_rules! kernel {
    ($name:literal, $numbers:expr) => {
        match $numbers {
            Numbers::F32 => concat!($name, "_f32"),
            Numbers::Bf16 => concat!($name, "_bf16"),
        }
    };
    ($name:literal, $from:expr, $to:expr) => {
        match ($from, $to) {
            (Numbers::F32, Numbers::F32) => concat!($name, "_f32_f32"),
            (Numbers::F32, Numbers::Bf16) => concat!($name, "_f32_bf16"),
            (Numbers::Bf16, Numbers::F32) => concat!($name, "_bf16_f32"),
            (Numbers::Bf16, Numbers::Bf16) => concat!($name, "_bf16_bf16"),
        }
    };
}

use kernel;
use launch;

impl Cuda {
    /// The card of number `index`, with nothing on it.
    ///
    /// # Errors
    /// Where there is no driver, no such card, the card is too old, a library is missing or a kernel does not compile.
    pub fn new(index: usize, precision: Precision) -> Result<Self> {
        let device = Device::open(index, precision)?;
        Ok(Self {
            nothing: DeviceBuffer::new(0, Numbers::F32),
            base: DeviceBase::default(),
            rounded: Mutex::new([None, None]),
            source: Mutex::new(Source::Single),
            staging: Mutex::new(None),
            pieces: Mutex::new(None),
            device,
        })
    }

    /// Uploads a base, which must stay where it is on the host for as long as this backend works on it. With
    /// `embedding_stays` the card reads the rows of the embedding that it needs from there, unless it is the head as well.
    ///
    /// # Errors
    /// Where the card's memory is short, or a layer cannot be had.
    pub fn hold<S: BaseSource + ?Sized>(&mut self, base: &mut S, embedding_stays: bool) -> Result<()> {
        self.base = DeviceBase::default();
        self.base = DeviceBase::upload(&self.device, base, embedding_stays)?;
        Ok(())
    }

    /// The card's name.
    pub fn card(&self) -> &str {
        &self.device.name
    }

    /// How products are computed.
    pub fn precision(&self) -> Precision {
        self.device.precision
    }

    /// Bytes of the card that are free.
    pub fn free_bytes(&self) -> u64 {
        self.device.memory().0
    }

    /// The most bytes that were reserved; the driver's own are not counted.
    pub fn peak_bytes(&self) -> u64 {
        self.device.memory().1
    }

    /// A matrix on the host, widened to f32 where it is bf16: for checks.
    ///
    /// # Errors
    /// What failed on the card before.
    pub fn read(&self, view: View<'_, Self>) -> Result<Vec<f32>> {
        let mut numbers = vec![f32::NAN; view.rows * view.columns];
        self.download(view, &mut numbers);
        self.settle()?;
        Ok(numbers)
    }

    /// Times every operation from now on, or no longer. Timing slows the host down, not the card.
    pub fn set_profiling(&self, on: bool) {
        self.device.set_profiling(on);
    }

    /// What took how long since profiling began: operation, seconds, calls; the longest first.
    ///
    /// # Errors
    /// What failed on the card before.
    pub fn take_profile(&self) -> Result<Vec<(String, f64, u64)>> {
        Ok(self.device.take_profile()?)
    }

    /// Queues a pause.
    pub(crate) fn hold_for(&self, seconds: f64) {
        let nanoseconds = (1e9 * seconds.max(0.0)) as u64;
        launch!(self.device, "hold", [1, 1, 1], [32, 1], nanoseconds);
    }

    /// A place behind what is queued so far.
    pub(crate) fn clock(&self) -> Result<Clock> {
        Ok(Clock::new(&self.device)?)
    }

    /// Memory of the card for `bytes` bytes, all 0.
    fn take(&self, bytes: usize, numbers: Numbers) -> Result<DeviceMemory, DeviceError> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner).take(&self.device, bytes, numbers)
    }

    /// Runs `build` twice: to count what it takes, and to place it in one allocation of that size.
    fn in_one_region<R>(&self, mut build: impl FnMut() -> Result<R>) -> Result<R> {
        let swap = |source| {
            let mut place = self.source.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *place, source)
        };
        swap(Source::Counting(0));
        let counted = build().map(drop);
        let Source::Counting(bytes) = swap(Source::Single) else { return build() };
        counted?;
        let region = Region::new(&self.device, bytes)?;
        swap(Source::Placing(region, 0));
        let built = build();
        swap(Source::Single);
        built
    }

    /// Hands `work` pinned room for `length` numbers, reserved at first.
    fn with_staging<R>(&self, length: usize, work: impl FnOnce(&mut [f32]) -> Result<R>) -> Result<R> {
        let mut place = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        if place.as_ref().is_none_or(|memory| memory.bytes().len() < 4 * length) {
            *place = None;
            *place = Some(Pinned::new(&self.device, 4 * length)?);
        }
        let memory = place.as_mut().ok_or(DeviceError::HostMemory { bytes: 4 * length })?;
        work(&mut bytemuck::cast_slice_mut(memory.bytes_mut())[..length])
    }

    /// What a buffer for `purpose` holds.
    fn numbers(&self, purpose: Use) -> Numbers {
        match (purpose, self.device.precision) {
            (Use::Activation, Precision::Bf16) => Numbers::Bf16,
            _ => Numbers::F32,
        }
    }

    /// Notes a defect of the program where operands that must be of one kind are not; whether they are.
    fn alike(&self, what: &'static str, numbers: Numbers, all: &[Numbers]) -> bool {
        let alike = all.iter().all(|other| *other == numbers);
        if !alike {
            let what = format!("`{what}` on operands of several kinds: a defect of the program");
            self.device.note(Err(DeviceError::Unsupported { what }));
        }
        alike
    }

    fn missing(&self, what: &str) {
        let what = format!("{what} that was not uploaded: a defect of the program");
        self.device.note(Err(DeviceError::Unsupported { what }));
    }

    /// The memory of `place`, for `length` numbers of f32; reserved at first.
    fn reserved<'a>(
        &self,
        length: usize,
        place: &'a mut Option<DeviceMemory>,
    ) -> Result<&'a mut DeviceBuffer> {
        if place.as_ref().is_some_and(|memory| memory.bytes < 4 * length) {
            *place = None;
        }
        let memory = match place {
            Some(memory) => memory,
            None => place.insert(self.allocate(length, Use::Exact)?),
        };
        Ok(&mut memory.buffer)
    }

    /// Room for `bytes` bytes of a rounded operand.
    fn room(&self, side: usize, bytes: usize) -> u64 {
        let mut rounded = self.rounded.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = rounded[side].as_ref().is_some_and(|memory| memory.bytes >= bytes);
        if !enough {
            rounded[side] = None;
            match self.take(bytes, Numbers::Bf16) {
                Ok(memory) => rounded[side] = Some(memory),
                Err(error) => self.device.note(Err(error)),
            }
        }
        rounded[side].as_ref().map_or(0, |memory| memory.address)
    }

    /// Refreshes the rounded twin of a flat buffer.
    fn round(&self, buffer: &DeviceBuffer, length: usize) {
        if self.device.precision == Precision::Bf16 && buffer.rounded != 0 {
            // Rows of a fixed length, so that many blocks share the work; what is left over is a row of its own.
            const ROW: usize = 1 << 14;
            let whole = length / ROW;
            for (start, rows, columns) in [(0, whole, ROW), (whole * ROW, 1, length % ROW)] {
                let (stride, rows, columns) = (columns as u64, rows as u32, columns as u32);
                let from =
                    MatrixArgument { address: buffer.address + 4 * start as u64, stride, rows, columns };
                let to = MatrixArgument { address: buffer.rounded + 2 * start as u64, ..from };
                let blocks = grid(rows as usize, columns as usize);
                if rows > 0 && columns > 0 {
                    launch!(self.device, "copy_f32_bf16", blocks, [THREADS, 1], from, to);
                }
            }
        }
    }

    /// An operand as bf16: itself, its rounded twin, or rounded into room of its own.
    fn rounded(&self, side: usize, view: View<'_, Self>, transposed: bool) -> Operand {
        let at = |address: u64| address + 2 * view.offset as u64;
        if view.data.numbers == Numbers::Bf16 {
            return Operand { address: at(view.data.address), stride: view.stride, transposed };
        }
        if view.data.rounded != 0 {
            return Operand { address: at(view.data.rounded), stride: view.stride, transposed };
        }
        let address = self.room(side, 2 * view.rows * view.columns);
        let (rows, columns) = (view.rows, view.columns);
        let to =
            MatrixArgument { address, stride: columns as u64, rows: rows as u32, columns: columns as u32 };
        launch!(self.device, "copy_f32_bf16", grid(rows, columns), [THREADS, 1], matrix(view), to);
        Operand { address, stride: columns, transposed }
    }

    /// Threads for a block that takes a row.
    fn row_threads(columns: usize) -> [usize; 2] {
        [columns.div_ceil(8).next_multiple_of(32).clamp(32, 1024), 1]
    }

    fn drop_into(
        &self,
        batch: &CudaBatch,
        key: DropoutKey,
        p: f32,
        accumulate: bool,
        x: View<'_, Self>,
        out: &ViewMut<'_, Self>,
    ) {
        let [first, second] = key.philox_key();
        // The same cases as on the CPU: nothing is dropped, or everything.
        let threshold = if p <= 0.0 {
            0
        } else if p >= 1.0 {
            65_536
        } else {
            (p * 65_536.0).round() as u32
        };
        let scale = if p <= 0.0 || p >= 1.0 { 1.0 } else { 1.0_f32 / (1.0 - p) };
        let blocks = x.columns.div_ceil(64) * 8;
        let numbers = x.data.numbers;
        if !self.alike("dropout", numbers, &[out.data.numbers]) {
            return;
        }
        launch!(
            self.device,
            kernel!("dropout", numbers),
            grid(x.rows, blocks),
            [THREADS, 1],
            batch.samples.address,
            batch.positions.address,
            first,
            second,
            threshold,
            scale,
            u32::from(accumulate),
            matrix(x),
            target(out)
        );
    }
}
