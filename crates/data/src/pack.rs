//! Puts samples into rows.

/// Share of `rows × max_length` that holds no token.
pub(crate) fn padding_fraction(rows: u64, tokens: u64, max_length: u32) -> f64 {
    match rows * u64::from(max_length) {
        0 => 0.0,
        room => 1.0 - tokens as f64 / room as f64,
    }
}
