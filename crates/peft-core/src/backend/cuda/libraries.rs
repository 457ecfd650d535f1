//! Finding the CUDA libraries where they commonly lie.
//!
//! Everything is loaded at run time: the same binary starts on a machine without CUDA. cudarc opens libraries by their
//! plain names; one that lies elsewhere is opened here by its path first, after which the plain name finds it.

use std::{
    ffi::{CString, c_char, c_int, c_void},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use shanty_cuda::libraries::{files, folders, is_explicit};

use super::DeviceError;

pub use shanty_cuda::libraries::{LIBRARIES_VARIABLE, NVRTC_VARIABLE};

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

/// Opens every library of a family that a folder holds, `libnvrtc-builtins` with `libnvrtc`.
fn open_from(folder: &Path, family: &str) -> bool {
    let needed: &[&str] = match family {
        "nvrtc" => &["nvrtc-builtins"],
        "cublas" => &["cublasLt"],
        _ => &[],
    };
    for name in needed {
        for file in files(folder, name) {
            open(&file);
        }
    }
    files(folder, family).iter().any(|file| open(file))
}

/// Makes a library available, or says where it was looked for.
fn require(family: &'static str, present: impl Fn() -> bool) -> Result<(), DeviceError> {
    let folders = folders();
    if !is_explicit() && present() {
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
