//! The worker: its session with the coordinator, the supervisor of device processes, and the step loop.
