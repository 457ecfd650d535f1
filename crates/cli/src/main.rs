//! The `shanty` program.
fn main() {}
