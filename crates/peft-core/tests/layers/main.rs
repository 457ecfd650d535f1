//! Each layer alone, forward and every gradient, beside candle's autograd in f64.
//!
//! A decoder whose gradients are right as a whole says nothing about which layer is wrong when they are not; this does.
//! Numbers are drawn afresh on every run; the seed is printed, and `SHANTY_TEST_SEED=…` runs it again. Memory that a
//! layer writes is full of NaN before, inside the target and around it: what it forgets to write, reads without
//! having written, or writes beside its target shows. Memory that it adds to holds random numbers before.
//!
//! # Tolerances
//! The oracle computes in f64 from the same f32 inputs, so the difference is our rounding alone, measured by the
//! largest number of the result. f32 rounds by at most u = 2^-24 = 6e-8 an operation. Work on single numbers takes some
//! ten roundings, one of them an exponential good to 4 u: [`SINGLE`] = 2e-6 is 32 u. A sum of n products errs by
//! about sqrt(n) u of its largest partial sum, two sums behind each other by twice that; for n up to 400 that is 40 u.
//! [`SUM`] = 1e-5 is 160 u. A wrong formula, a missed row or a wrong index differs by a hundredth and more.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod attention;
mod head;
mod linear;
#[path = "../memory/mod.rs"]
mod memory;
mod rows;
mod scene;
mod virtual_tokens;

/// Largest difference allowed where each number is worked on alone.
const SINGLE: f64 = 2e-6;
/// Largest difference allowed behind sums of products.
const SUM: f64 = 1e-5;
