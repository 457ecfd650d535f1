//! Finding the CUDA libraries where they commonly lie.
//!
//! Everything is loaded at run time: the same binary starts on a machine without CUDA. cudarc opens libraries by their
//! plain names; one that lies elsewhere is opened here by its path first, after which the plain name finds it.

use std::{
    env,
    ffi::{CString, OsStr, c_char, c_int, c_void},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::DeviceError;

/// Folder or file to look for CUDA libraries first.
pub const LIBRARIES_VARIABLE: &str = "SHANTY_CUDA_LIBRARIES";
/// A libnvrtc to compile kernels with, where no GPU is needed: for tests.
pub const NVRTC_VARIABLE: &str = "SHANTY_NVRTC";

const RTLD_NOW: c_int = 2;
const RTLD_GLOBAL: c_int = 0x100;

// SAFETY: the C library's own declaration.
unsafe extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
}

/// Opens a library for good; whether that went well.
pub(super) fn open(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: the path is a C string; a library that is opened may run its own initialisers, which is what is asked.
    unsafe { !dlopen(path.as_ptr(), RTLD_NOW | RTLD_GLOBAL).is_null() }
}

/// Folders that may hold CUDA libraries.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for variable in [LIBRARIES_VARIABLE, NVRTC_VARIABLE] {
        if let Some(path) = env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from) {
            folders.push(if path.is_file() {
                path.parent().map(Path::to_owned).unwrap_or(path)
            } else {
                path
            });
        }
    }
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = env::var_os(variable).filter(|path| !path.is_empty()) {
            folders.push(Path::new(&home).join("lib64"));
        }
    }
    folders.push("/usr/local/cuda/lib64".into());
    folders.push("/usr/lib/x86_64-linux-gnu".into());
    // Wheels of Python: in the active environment, or the system's.
    let roots = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    for root in roots.chain([PathBuf::from("/usr"), PathBuf::from("/usr/local")]) {
        let Ok(versions) = root.join("lib").read_dir() else { continue };
        let pythons = versions.flatten().filter(|entry| entry.file_name().as_bytes().starts_with(b"python3"));
        for python in pythons {
            for packages in ["site-packages", "dist-packages"] {
                for wheel in ["cu13", "cuda_nvrtc", "cublas"] {
                    let folder = python.path().join(packages).join("nvidia").join(wheel).join("lib");
                    if folder.is_dir() {
                        folders.push(folder);
                    }
                }
            }
        }
    }
    folders
}

/// Opens every library of a family that a folder holds, `libnvrtc-builtins` with `libnvrtc`.
fn open_from(folder: &Path, family: &str) -> bool {
    let Ok(entries) = folder.read_dir() else { return false };
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    let belongs = |name: &OsStr, stem: &str| {
        let name = name.as_bytes();
        name.starts_with(stem.as_bytes()) && name[stem.len()..].starts_with(b".so")
    };
    names.retain(|name| !name.as_bytes().windows(4).any(|part| part == b".alt"));
    names.sort();
    let needed: &[&str] = match family {
        "nvrtc" => &["libnvrtc-builtins"],
        "cublas" => &["libcublasLt"],
        _ => &[],
    };
    for stem in needed {
        for name in names.iter().filter(|name| belongs(name, stem)) {
            open(&folder.join(name));
        }
    }
    let stem = format!("lib{family}");
    names.iter().any(|name| belongs(name, &stem) && open(&folder.join(name)))
}

/// Makes a library available, or says where it was looked for.
fn require(family: &'static str, present: impl Fn() -> bool) -> Result<(), DeviceError> {
    let folders = folders();
    let explicit = env::var_os(LIBRARIES_VARIABLE).is_some() || env::var_os(NVRTC_VARIABLE).is_some();
    if !explicit && present() {
        return Ok(());
    }
    for folder in &folders {
        if open_from(folder, family) && present() {
            return Ok(());
        }
    }
    if present() {
        return Ok(());
    }
    let looked_in = folders.iter().map(|folder| folder.display().to_string()).collect();
    Err(DeviceError::NoLibrary { library: family, looked_in })
}

/// Makes the driver available.
pub(super) fn driver() -> Result<(), DeviceError> {
    // SAFETY: opens a library of that name, no more.
    if unsafe { cudarc::driver::sys::is_culib_present() } { Ok(()) } else { Err(DeviceError::NoDriver) }
}

/// Makes the compiler of kernels available.
pub(super) fn nvrtc() -> Result<(), DeviceError> {
    // SAFETY: opens a library of that name, no more.
    require("nvrtc", || unsafe { cudarc::nvrtc::sys::is_culib_present() })
}

/// Makes the library of products available.
pub(super) fn cublas() -> Result<(), DeviceError> {
    // SAFETY: opens a library of that name, no more.
    require("cublas", || unsafe { cudarc::cublas::sys::is_culib_present() })
}

/// The version of CUDA that the driver speaks.
pub(super) fn driver_version() -> String {
    let mut version = 0;
    // SAFETY: writes one number.
    let asked = unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result();
    asked.map_or_else(|_| "?".to_owned(), |()| format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// The libraries that are loaded, with their versions.
pub(super) fn versions() -> Vec<(&'static str, String)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    let nvrtc = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor) }.result();
    let nvrtc = nvrtc.map_or_else(|_| "?".to_owned(), |()| format!("{major}.{minor}"));
    let part = |property| {
        let mut value = 0;
        // SAFETY: writes one number.
        let asked = unsafe { cudarc::cublas::sys::cublasGetProperty(property, &mut value) }.result();
        asked.map_or_else(|_| "?".to_owned(), |()| value.to_string())
    };
    use cudarc::cublas::sys::libraryPropertyType_t as Property;
    let parts = [Property::MAJOR_VERSION, Property::MINOR_VERSION, Property::PATCH_LEVEL];
    vec![("nvrtc", nvrtc), ("cublas", parts.map(part).join("."))]
}
