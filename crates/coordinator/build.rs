//! The dashboard is embedded: a new build of it is a new coordinator, also where the names of its files are new.

fn main() {
    println!("cargo::rerun-if-changed=../../web/dist");
}
