//! Where fixtures lie, and small model folders made from them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("crates/testkit lies two below the root")
        .to_owned()
}

/// A path below `crates/testkit/fixtures/reference`.
pub fn reference(path: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/reference").join(path)
}

/// A path below `examples`.
pub fn example(path: impl AsRef<Path>) -> PathBuf {
    repository().join("examples").join(path)
}

/// Writes a random Llama of 98,000 parameters with its tokenizer (288 tokens, context 256) to `folder`.
pub fn tiny_model(folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        copy(&reference("models/llama").join(file), &folder.join(file))?;
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        copy(&reference("tokenizer").join(file), &folder.join(file))?;
    }
    Ok(())
}

/// Copies a folder with everything below it.
pub fn copy_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("failed to read `{}`", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?
        } else {
            copy(&entry.path(), &target)?
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    // Not `fs::copy`: fixtures may be read-only, copies must not be.
    let bytes = fs::read(from).with_context(|| format!("failed to read `{}`", from.display()))?;
    fs::write(to, bytes).with_context(|| format!("failed to write `{}`", to.display()))
}
