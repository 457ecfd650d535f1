//! What the machine does, told as short stories. Virtual time, no sleeps.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

mod breaks;
mod crew;
mod forming;
mod jobs;
mod queueing;
mod restarts;
mod saving;
mod shared;
mod stage;
