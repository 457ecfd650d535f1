//! Where CUDA's libraries commonly lie.
//!
//! Everything is loaded at run time: the same binary starts on a machine without CUDA.

use std::{
    env,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Folder or file to look for CUDA libraries first.
pub const LIBRARIES_VARIABLE: &str = "SHANTY_CUDA_LIBRARIES";
/// A libnvrtc to compile kernels with, where no GPU is needed: for tests.
pub const NVRTC_VARIABLE: &str = "SHANTY_NVRTC";

/// Folders below `nvidia/` where wheels of Python keep libraries.
const WHEELS: [&str; 4] = ["cu13", "cuda_nvrtc", "cublas", "nccl"];

/// Whether the user said where to look.
pub fn is_explicit() -> bool {
    [LIBRARIES_VARIABLE, NVRTC_VARIABLE].into_iter().any(|variable| path_of(variable).is_some())
}

/// Folders that may hold CUDA libraries, those that the user named first.
pub fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for path in [LIBRARIES_VARIABLE, NVRTC_VARIABLE].into_iter().filter_map(path_of) {
        let is_file = path.is_file();
        folders.push(if is_file { path.parent().map(Path::to_owned).unwrap_or(path) } else { path });
    }
    for home in ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(path_of) {
        folders.push(home.join("lib64"));
    }
    folders.push("/usr/local/cuda/lib64".into());
    folders.push("/usr/lib/x86_64-linux-gnu".into());
    // Wheels of Python: in the active environment, or the system's.
    let roots = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(path_of);
    for root in roots.chain([PathBuf::from("/usr"), PathBuf::from("/usr/local")]) {
        folders.extend(wheels_below(&root));
    }
    folders
}

fn path_of(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn wheels_below(root: &Path) -> Vec<PathBuf> {
    let Ok(versions) = root.join("lib").read_dir() else { return Vec::new() };
    let mut folders = Vec::new();
    let pythons = versions.flatten().filter(|entry| entry.file_name().as_bytes().starts_with(b"python3"));
    for python in pythons {
        for packages in ["site-packages", "dist-packages"] {
            let nvidia = python.path().join(packages).join("nvidia");
            let wheels = WHEELS.iter().map(|wheel| nvidia.join(wheel).join("lib"));
            folders.extend(wheels.filter(|folder| folder.is_dir()));
        }
    }
    folders
}

/// The files of a library in a folder, `libNAME.so` and `libNAME.so.2` alike, in the order of their names.
pub fn files(folder: &Path, name: &str) -> Vec<PathBuf> {
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.retain(|file| is_library(file, name));
    names.sort();
    names.into_iter().map(|file| folder.join(file)).collect()
}

/// Whether a file's name is that of a library. Those with `.alt` are built for another purpose.
fn is_library(file: &OsStr, name: &str) -> bool {
    let rest = file.as_bytes().strip_prefix(b"lib").and_then(|rest| rest.strip_prefix(name.as_bytes()));
    let is_alternative = file.as_bytes().windows(4).any(|part| part == b".alt");
    rest.is_some_and(|rest| rest.starts_with(b".so")) && !is_alternative
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_library_is_found_with_a_number_at_its_end() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["libnccl.so.2", "libnccl-net.so", "libncclx.so", "libnvrtc.alt.so.13", "libnccl.a"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(files(folder.path(), "nccl"), [folder.path().join("libnccl.so.2")]);
        assert!(files(folder.path(), "nvrtc").is_empty(), "an alternative build is not taken");
        assert!(files(&folder.path().join("none"), "nccl").is_empty());
    }

    #[test]
    fn wheels_are_found_below_an_environment() {
        let root = tempfile::tempdir().unwrap();
        let nccl = root.path().join("lib/python3.12/site-packages/nvidia/nccl/lib");
        fs::create_dir_all(&nccl).unwrap();
        assert_eq!(wheels_below(root.path()), [nccl]);
    }
}
