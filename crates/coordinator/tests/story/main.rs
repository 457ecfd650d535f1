//! What the machine does, told as short stories. Virtual time, no sleeps.

mod breaks;
mod forming;
mod jobs;
mod restarts;
mod stage;
