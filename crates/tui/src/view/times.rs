//! Moments, as people read them.

use crate::format;

/// `12 s ago`. Clocks of two machines may differ: what is yet to come is now.
pub(super) fn ago(now: u64, then: u64) -> String {
    format!("{} ago", since(now, then))
}

/// `12 s`.
pub(super) fn since(now: u64, then: u64) -> String {
    let seconds = now.saturating_sub(then) as f64 / 1000.0;
    // Tenths of a second would flicker.
    if seconds < 10.0 { format!("{seconds:.0} s") } else { format::seconds(seconds) }
}

/// Time of day, UTC.
pub(super) fn clock(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// `850 ms`, `3.2 s`.
pub(super) fn milliseconds(milliseconds: f64) -> String {
    if milliseconds < 1000.0 {
        format!("{milliseconds:.0} ms")
    } else {
        format::seconds(milliseconds / 1000.0)
    }
}
