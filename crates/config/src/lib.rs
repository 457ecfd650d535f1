//! Job, coordinator and worker files: layers, checks, and answers with file, line, caret and hint.

pub mod job;

pub use job::JobSpec;
