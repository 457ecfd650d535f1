//! The order of sums.
//!
//! A buffer is cut into blocks of [`BLOCK`] elements. Block `b` belongs to *segment* `b % world_size`. The
//! sum of a segment `s` starts with rank `s` and goes once around the ring: `s, s + 1, …, s - 1`, rounded
//! to f32 at each addition. So the order depends on the world size and the element's index alone, and the
//! ring can add while it passes blocks on.

/// Elements in a block: 64 KiB of f32.
pub const BLOCK: usize = 16 * 1024;
