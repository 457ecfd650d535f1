//! Operations on an NVIDIA card: kernels of our own, compiled for the card when first used, and cuBLAS for products.
//!
//! Activations are f32. Products run in the [`Precision`] asked for: f32 throughout, TF32, or operands rounded to bf16
//! with sums in f32. Nothing here uses atomics on numbers: the same micro-batch gives the same bits.
//!
//! Operations only queue work. A failure is kept; nothing runs after it, and [`Backend::settle`] returns it.

mod attention;
mod base;
pub mod compile;
mod device;
mod error;
mod libraries;
mod operations;

use std::sync::{Arc, Mutex, PoisonError};

pub use device::{DeviceBuffer, DeviceMemory};
pub use error::DeviceError;
use half::bf16;
pub use libraries::{LIBRARIES_VARIABLE, NVRTC_VARIABLE};
use serde::{Deserialize, Serialize};

use self::{
    base::DeviceBase,
    device::{Device, Numbers, Operand},
};
use super::{Backend, View, ViewMut};
use crate::{error::Result, model::BaseSource, random::DropoutKey};

/// Whether this machine has a card that [`Cuda::new`] can use, and the libraries for it: for `auto`, which asks first.
pub fn is_available() -> bool {
    Device::probe().is_ok()
}

/// How products are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Operands and sums in f32: slow, for comparison with the CPU.
    F32,
    /// Operands rounded to 10 bits of mantissa, sums in f32.
    Tf32,
    /// Operands of large products rounded to bf16, the rest as [`Precision::Tf32`]; sums in f32.
    #[default]
    Bf16,
}

/// Threads of a block.
const THREADS: usize = 256;
/// Products with a side below this are not worth rounding their operands for.
const NARROW: usize = 64;

/// The CUDA backend: one card.
pub struct Cuda {
    device: Arc<Device>,
    base: DeviceBase,
    /// Operands of a product, rounded to bf16.
    rounded: Mutex<[Option<DeviceMemory>; 2]>,
    nothing: DeviceBuffer,
}

/// A micro-batch on the card.
pub struct CudaBatch {
    ids: DeviceMemory,
    positions: DeviceMemory,
    samples: DeviceMemory,
    spans: DeviceMemory,
    predicting: DeviceMemory,
    targets: DeviceMemory,
    /// Sums of `dout * out` by row and head.
    delta: DeviceMemory,
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
        address: view.data.address + 4 * view.offset as u64,
        stride: view.stride as u64,
        rows: view.rows as u32,
        columns: view.columns as u32,
    }
}

fn target(view: &ViewMut<'_, Cuda>) -> MatrixArgument {
    matrix(view.view())
}

/// Blocks for rows of `columns`: one block a row, more where a row is long and rows are few.
fn grid(rows: usize, columns: usize) -> [usize; 3] {
    [rows, columns.div_ceil(4 * THREADS).clamp(1, 64), 1]
}

macro_rules! launch {
    ($device:expr, $name:literal, $grid:expr, $block:expr, $($argument:expr),+) => {
        launch!($device, $device.function($name), $name, $grid, $block, 0, $($argument),+)
    };
    ($device:expr, $function:expr, $name:literal, $grid:expr, $block:expr, $shared:expr, $($argument:expr),+) => {{
        // SAFETY: the arguments are those of the kernel of this name, in its order. They are temporaries of this one
        // expression, so they live until the kernel is queued, which copies them.
        unsafe {
            $device.launch($function, $name, $grid, $block, $shared, &mut [
                $(::std::ptr::from_ref(&$argument).cast_mut().cast::<::std::ffi::c_void>()),+
            ])
        }
    }};
}

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
            device,
        })
    }

    /// Uploads a base, which must stay where it is on the host for as long as this backend works on it.
    ///
    /// # Errors
    /// Where the card's memory is short, or a layer cannot be had.
    pub fn hold<S: BaseSource + ?Sized>(&mut self, base: &mut S) -> Result<()> {
        self.base = DeviceBase::upload(&self.device, base)?;
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

    /// A matrix without gaps on the host, widened to f32 where it is bf16: for checks.
    ///
    /// # Errors
    /// What failed on the card before.
    pub fn read(&self, view: View<'_, Self>) -> Result<Vec<f32>> {
        let count = view.rows * view.columns;
        let numbers = match view.data.numbers {
            Numbers::F32 => {
                let mut numbers = vec![f32::NAN; count];
                self.download(view, &mut numbers);
                numbers
            }
            Numbers::Bf16 => {
                let mut numbers = vec![bf16::NAN; count];
                self.device.download(view.data.address + 2 * view.offset as u64, &mut numbers);
                numbers.into_iter().map(bf16::to_f32).collect()
            }
        };
        self.settle()?;
        Ok(numbers)
    }

    fn missing(&self, what: &str) {
        let what = format!("{what} that was not uploaded: a defect of the program");
        self.device.note(Err(DeviceError::Unsupported { what }));
    }

    /// The memory of `place`, for `length` numbers; reserved at first.
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
            None => place.insert(self.allocate(length)?),
        };
        Ok(&mut memory.buffer)
    }

    /// Room for `bytes` bytes of a rounded operand.
    fn room(&self, side: usize, bytes: usize) -> u64 {
        let mut rounded = self.rounded.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = rounded[side].as_ref().is_some_and(|memory| memory.bytes >= bytes);
        if !enough {
            rounded[side] = None;
            match self.device.reserve(bytes, Numbers::Bf16) {
                Ok(memory) => rounded[side] = Some(memory),
                Err(error) => self.device.note(Err(error)),
            }
        }
        rounded[side].as_ref().map_or(0, |memory| memory.address)
    }

    /// An operand as bf16: itself, or rounded into room of its own.
    fn rounded(&self, side: usize, view: View<'_, Self>, transposed: bool) -> Operand {
        if view.data.numbers == Numbers::Bf16 {
            let address = view.data.address + 2 * view.offset as u64;
            return Operand { address, stride: view.stride, transposed };
        }
        let address = self.room(side, 2 * view.rows * view.columns);
        let wide =
            view.columns.is_multiple_of(4) && view.stride.is_multiple_of(4) && view.offset.is_multiple_of(4);
        let columns = if wide { view.columns / 4 } else { view.columns };
        let grid = [view.rows, columns.div_ceil(4 * THREADS).clamp(1, 64), 1];
        launch!(self.device, "narrow", grid, [THREADS, 1], matrix(view), address, u32::from(wide));
        Operand { address, stride: view.columns, transposed }
    }

    fn row_threads(columns: usize) -> [usize; 2] {
        [columns.next_multiple_of(32).clamp(32, 1024), 1]
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
        launch!(
            self.device,
            "dropout",
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
