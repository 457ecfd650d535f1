//! What a machine has for the CUDA engine: driver, card, libraries, memory, and two figures of speed.

use std::{fs, time::Instant};

use super::{Cuda, Precision, device::Device, libraries};
use crate::{
    backend::{Backend, Use, View, ViewMut},
    error::Result,
};

/// What was found.
#[derive(Debug, Clone)]
pub struct Survey {
    /// The card's name.
    pub card: String,
    /// Its architecture, such as `sm_90`.
    pub architecture: String,
    /// The version of CUDA that the driver speaks, such as `13.0`.
    pub driver: String,
    /// Library, version, and the file that it was loaded from.
    pub libraries: Vec<(&'static str, String, String)>,
    /// Bytes of the card's memory, and how many are free.
    pub memory_bytes: (u64, u64),
    /// Bytes a second of a copy inside the card's memory, read and written.
    pub copy_bytes_per_second: f64,
    /// Multiplications and additions a second of a product of bf16.
    pub product_flops: f64,
}

/// Looks at a card and measures it: some hundred megabytes for a second.
///
/// # Errors
/// What is missing or fails, as [`Cuda::new`] says it.
pub fn survey(index: usize) -> Result<Survey> {
    const SIDE: usize = 8192;
    let memory = Device::memory_bytes(index)?;
    let cuda = Cuda::new(index, Precision::Bf16)?;
    let matrix = || cuda.allocate(SIDE * SIDE, Use::Activation);
    let (mut a, mut b, mut c) = (matrix()?, matrix()?, matrix()?);
    // Numbers that are not all alike: a card is faster on zeros.
    let mut numbers = vec![0.0; SIDE * SIDE];
    crate::random::fill_uniform(1, "survey", 1.0, &mut numbers);
    cuda.upload(&numbers, &mut a);
    cuda.upload(&numbers, &mut b);
    let (a, b) = (View::<Cuda>::new(&a, SIDE, SIDE), View::<Cuda>::new(&b, SIDE, SIDE));
    let product =
        best(&cuda, || cuda.gemm(1.0, a, false, b, true, 0.0, ViewMut::<Cuda>::new(&mut c, SIDE, SIDE)))?;
    let copy = best(&cuda, || cuda.copy(a, ViewMut::<Cuda>::new(&mut c, SIDE, SIDE)))?;
    Ok(Survey {
        card: cuda.card().to_owned(),
        architecture: cuda.device.architecture.clone(),
        driver: libraries::driver_version(),
        libraries: libraries::versions()
            .into_iter()
            .map(|(name, version)| (name, version, loaded_from(name)))
            .collect(),
        memory_bytes: memory,
        copy_bytes_per_second: (4 * SIDE * SIDE) as f64 / copy,
        product_flops: 2.0 * (SIDE * SIDE) as f64 * SIDE as f64 / product,
    })
}

/// Seconds of one call: the best of five rounds of many.
fn best(cuda: &Cuda, mut work: impl FnMut()) -> Result<f64> {
    const CALLS: usize = 10;
    work();
    cuda.settle()?;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let begin = Instant::now();
        for _ in 0..CALLS {
            work();
        }
        cuda.settle()?;
        best = best.min(begin.elapsed().as_secs_f64() / CALLS as f64);
    }
    Ok(best)
}

/// The file of a library of this process.
fn loaded_from(name: &str) -> String {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let stem = format!("/lib{name}.so");
    let line = maps.lines().find(|line| line.contains(&stem));
    line.and_then(|line| line.split_whitespace().next_back()).unwrap_or("?").to_owned()
}
