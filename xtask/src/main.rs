//! House rules as code, generated docs, release.
fn main() {}
