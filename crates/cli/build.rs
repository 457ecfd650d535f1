//! Embeds the error pages of `docs/errors`, so that `shanty explain` needs no files.

use std::{env, fmt::Write as _, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pages = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../docs/errors");
    println!("cargo:rerun-if-changed={}", pages.display());

    let mut entries = Vec::new();
    for entry in fs::read_dir(&pages)? {
        let path = entry?.path();
        let code = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
        if code.starts_with("SH") && path.extension().is_some_and(|extension| extension == "md") {
            println!("cargo:rerun-if-changed={}", path.display());
            entries.push((code, fs::read_to_string(&path)?));
        }
    }
    entries.sort();

    let mut source = String::from("pub(super) static PAGES: &[(&str, &str)] = &[\n");
    for (code, text) in entries {
        writeln!(source, "    ({code:?}, {text:?}),")?;
    }
    source.push_str("];\n");
    fs::write(PathBuf::from(env::var("OUT_DIR")?).join("error_pages.rs"), source)?;
    Ok(())
}
