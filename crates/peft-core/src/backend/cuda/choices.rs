//! Which of cuBLASLt's algorithms multiplies what: timed on the card ahead of the first step, and kept on disk.
//!
//! A process times each kind of product once and then keeps to its choice, whatever engine asks, so that the same micro-batch
//! gives the same bits. Another process on the same kind of card with the same library finds the choice on disk; two that begin at once
//! may choose otherwise, and then differ in the last bits of sums. What cuBLASLt takes for the best is left only for one that is
//! faster by more than timing errs.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use cudarc::driver::{result, sys};

use super::{
    Cuda, DeviceError,
    compile::cache_folder,
    device::{Device, Operand, Product, call},
    lt::{Algorithm, Handle, Kind},
    memory::{Numbers, Region},
};
use crate::backend::PlannedProduct;

/// Algorithms that are timed for a product.
const CANDIDATES: usize = 12;
/// Rounds over all of them; the best of each counts.
const ROUNDS: usize = 3;
/// How much faster another must be than what cuBLASLt takes for the best.
const FASTER: f32 = 0.98;
/// Rows below which a product is left to cuBLAS.
const FEWEST_ROWS: usize = 512;

/// What this process has chosen, by card and library, and by product.
static CHOSEN: LazyLock<Mutex<ByCard>> = LazyLock::new(Mutex::default);

/// Algorithms by card and library, then by product.
type ByCard = BTreeMap<String, BTreeMap<String, [u64; 8]>>;
/// By kind and rows; none where the choice does not serve them.
type Ready = HashMap<(Kind, usize), Option<Arc<Algorithm>>>;

/// What a card's products run by.
#[derive(Default)]
pub(super) struct Choices {
    handle: Option<Handle>,
    /// By kind: rows that were timed, and the algorithm.
    chosen: Mutex<HashMap<Kind, (usize, [u64; 8])>>,
    /// Made ready for a number of rows.
    ready: Mutex<Ready>,
}

impl Choices {
    pub(super) fn new() -> Self {
        // Without the library every product is left to cuBLAS.
        Self { handle: Handle::new().ok(), ..Self::default() }
    }

    /// Multiplies by the algorithm chosen for it: whether there is one.
    ///
    /// # Safety
    /// As [`Handle::multiply`].
    pub(super) unsafe fn multiply(
        &self,
        product: &Product,
        workspace: u64,
        stream: sys::CUstream,
    ) -> Option<Result<(), DeviceError>> {
        let handle = self.handle.as_ref().filter(|_| product.rows >= FEWEST_ROWS)?;
        let kind = Kind::of(product)?;
        let (_, data) = *self.chosen.lock().unwrap_or_else(PoisonError::into_inner).get(&kind)?;
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let algorithm = ready
            .entry((kind, product.rows))
            .or_insert_with(|| handle.ready(&kind, product.rows, data).map(Arc::new));
        let algorithm = algorithm.as_ref()?;
        // SAFETY: the caller's.
        Some(unsafe { handle.multiply(algorithm, product, workspace, stream) })
    }
}

impl PlannedProduct {
    fn kind(&self) -> Kind {
        let b = if self.transpose_b { self.inner } else { self.columns };
        Kind {
            columns: self.columns,
            inner: self.inner,
            transposed: [false, self.transpose_b],
            strides: [self.inner, b, self.columns],
            into: Numbers::Bf16,
            adds: self.adds,
        }
    }

    fn name(&self) -> String {
        let Self { rows, columns, inner, transpose_b, adds } = self;
        format!("{rows} x {columns} x {inner}, transposed {transpose_b}, added {adds}")
    }

    fn bytes(&self) -> [usize; 3] {
        [self.rows * self.inner, self.inner * self.columns, self.rows * self.columns].map(|count| 2 * count)
    }
}

impl Cuda {
    /// Chooses an algorithm for each product that is large enough, by timing it where neither this process nor the disk
    /// knows. Memory for it is given back at once.
    pub(super) fn choose_products(&self, products: &[PlannedProduct]) -> Result<(), DeviceError> {
        let device = &self.device;
        let Some(handle) = &device.choices.handle else { return Ok(()) };
        let products = products.iter().filter(|product| product.rows >= FEWEST_ROWS);
        let products: Vec<&PlannedProduct> = products.collect();
        let place = format!("{}, cuBLASLt {}", device.name, Handle::version());
        let mut all = CHOSEN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.entry(place.clone()).or_insert_with(|| read(&place));
        let missing: Vec<&PlannedProduct> =
            products.iter().copied().filter(|product| !known.contains_key(&product.name())).collect();
        if !missing.is_empty() {
            let bench = Bench::new(device, &missing)?;
            for product in missing {
                if let Some(data) = bench.best(handle, product)? {
                    known.insert(product.name(), data);
                }
            }
            write(&place, known);
        }
        let mut chosen = device.choices.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        for product in products {
            if let Some(data) = known.get(&product.name()) {
                chosen.insert(product.kind(), (product.rows, *data));
            }
        }
        Ok(())
    }
}

/// Room for the operands of the largest product, with numbers that are not all alike: a card is faster on zeros.
struct Bench<'a> {
    device: &'a Device,
    regions: [Arc<Region>; 3],
    begin: sys::CUevent,
    end: sys::CUevent,
}

impl<'a> Bench<'a> {
    fn new(device: &'a Arc<Device>, products: &[&PlannedProduct]) -> Result<Self, DeviceError> {
        const PIECE: usize = 1 << 21;
        let largest = |operand: usize| products.iter().map(|product| product.bytes()[operand]).max();
        let region = |operand| Region::new(device, largest(operand).unwrap_or(0));
        let regions = [region(0)?, region(1)?, region(2)?];
        let mut numbers = vec![0.0; PIECE];
        crate::random::fill_uniform(1, "products", 1.0, &mut numbers);
        let numbers: Vec<half::bf16> = numbers.iter().map(|x| half::bf16::from_f32(*x)).collect();
        for (operand, region) in regions.iter().enumerate() {
            let bytes = largest(operand).unwrap_or(0);
            for start in (0..bytes).step_by(2 * PIECE) {
                let count = ((bytes - start) / 2).min(PIECE);
                device.upload(&numbers[..count], region.address + start as u64);
            }
        }
        device.settle()?;
        let event =
            || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(call("cuEventCreate"));
        Ok(Self { device, regions, begin: event()?, end: event()? })
    }

    /// The fastest algorithm.
    fn best(&self, handle: &Handle, wanted: &PlannedProduct) -> Result<Option<[u64; 8]>, DeviceError> {
        let kind = wanted.kind();
        let candidates = handle.candidates(&kind, wanted.rows, CANDIDATES)?;
        let ready =
            candidates.into_iter().filter_map(|data| Some((data, handle.ready(&kind, wanted.rows, data)?)));
        let ready: Vec<([u64; 8], Algorithm)> = ready.collect();
        let operand = |index: usize, stride, transposed| Operand {
            address: self.regions[index].address,
            stride,
            transposed,
        };
        let [a, b, c] = kind.strides;
        let product = Product {
            a: operand(0, a, false),
            b: operand(1, b, wanted.transpose_b),
            c: operand(2, c, false),
            rows: wanted.rows,
            columns: wanted.columns,
            inner: wanted.inner,
            // Sums that are added to again and again stay small.
            alpha: 1e-3,
            beta: if wanted.adds { 0.5 } else { 0.0 },
            numbers: Numbers::Bf16,
            into: Numbers::Bf16,
        };
        let mut times = vec![f32::INFINITY; ready.len()];
        for round in 0..=ROUNDS {
            for ((_, algorithm), time) in ready.iter().zip(&mut times) {
                let took = self.time(handle, algorithm, &product)?;
                // The first round warms up.
                if round > 0 {
                    *time = time.min(took);
                }
            }
        }
        Ok(pick(&times).map(|index| ready[index].0))
    }

    /// Milliseconds of a product, as if there were no such algorithm where it fails.
    fn time(&self, handle: &Handle, algorithm: &Algorithm, product: &Product) -> Result<f32, DeviceError> {
        const CALLS: usize = 3;
        let device = self.device;
        device.bind()?;
        // SAFETY: the operands were reserved for the largest product; stream and events live.
        unsafe {
            result::event::record(self.begin, device.stream).map_err(call("cuEventRecord"))?;
            for _ in 0..CALLS {
                if handle.multiply(algorithm, product, device.workspace, device.stream).is_err() {
                    return Ok(f32::INFINITY);
                }
            }
            result::event::record(self.end, device.stream).map_err(call("cuEventRecord"))?;
            result::event::synchronize(self.end).map_err(call("cuEventSynchronize"))?;
            let took = result::event::elapsed(self.begin, self.end).map_err(call("cuEventElapsedTime"))?;
            Ok(took / CALLS as f32)
        }
    }
}

impl Drop for Bench<'_> {
    fn drop(&mut self) {
        for event in [self.begin, self.end] {
            // SAFETY: destroyed once, by their owner; all work is over.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}

/// The fastest, or the first where that is no slower by more than timing errs; none where none ran.
fn pick(times: &[f32]) -> Option<usize> {
    let (fastest, time) = times
        .iter()
        .enumerate()
        .min_by(|left, right| left.1.total_cmp(right.1))
        .filter(|(_, time)| time.is_finite())?;
    Some(if *time < FASTER * times[0] { fastest } else { 0 })
}

fn file(place: &str) -> Option<PathBuf> {
    let name = blake3::hash(format!("{place}\n{}", env!("CARGO_PKG_VERSION")).as_bytes()).to_hex();
    Some(cache_folder()?.join("shanty/products").join(format!("{name}.json")))
}

/// What lies on disk; what does not hold together is chosen anew.
fn read(place: &str) -> BTreeMap<String, [u64; 8]> {
    let text = file(place).and_then(|file| fs::read(file).ok()).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

/// A cache that cannot be written costs time at the next start, no more.
fn write(place: &str, known: &BTreeMap<String, [u64; 8]>) {
    let Some(file) = file(place) else { return };
    let Some(folder) = file.parent() else { return };
    let temporary = file.with_extension(format!("{}.tmp", std::process::id()));
    let text = serde_json::to_vec_pretty(known).unwrap_or_default();
    if fs::create_dir_all(folder).is_ok() && fs::write(&temporary, text).is_ok() {
        let _ = fs::rename(&temporary, &file);
    }
}

#[cfg(test)]
mod tests {
    use super::pick;

    #[test]
    fn the_library_s_own_choice_is_left_only_for_what_is_clearly_faster() {
        assert_eq!(pick(&[1.0, 0.99, 1.2]), Some(0));
        assert_eq!(pick(&[1.0, 0.9, 0.97]), Some(1));
        assert_eq!(pick(&[f32::INFINITY, 2.0]), Some(1));
        assert_eq!(pick(&[f32::INFINITY, f32::INFINITY]), None);
        assert_eq!(pick(&[]), None);
    }
}
