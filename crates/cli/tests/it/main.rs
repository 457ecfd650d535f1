//! The built program, end to end, on a random model of 98,000 parameters: real processes, real ports, `kill -9`.

mod bad_input;
mod coordinator;
mod help;
mod resume;
mod run;
mod support;
mod tools;
mod worker_death;
mod world_size;
