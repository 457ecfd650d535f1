//! The built program, end to end, on a random model of 98,000 parameters: real processes, real ports, `kill -9`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

mod bad_input;
mod chaos;
mod coordinator;
mod data;
mod deploy;
mod drain;
mod exports;
mod guides;
mod help;
mod interop;
mod methods;
mod metrics;
mod object_store;
mod queue;
mod resume;
mod run;
mod secure;
mod slurm;
mod support;
mod tools;
mod top;
mod traces;
mod up;
mod using;
mod virtual_tokens;
mod worker_death;
mod world_size;
