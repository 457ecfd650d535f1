//! The functions of NCCL and of the driver that are used, looked up one by one: what is missing is an error that
//! names it. cudarc gives the types; its own look-up panics.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use cudarc::nccl::sys;
use libloading::Library;
use shanty_cuda::libraries as places;

use crate::error::{Error, Result};

/// The oldest NCCL that can be started without blocking.
pub(super) const OLDEST: c_int = 21_400;

/// Results of calls, as numbers: a newer library may know more of them than an enum of ours.
pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = sys::ncclResult_t::ncclInProgress as c_int;
pub(super) const INVALID_USAGE: c_int = sys::ncclResult_t::ncclInvalidUsage as c_int;

/// `cuEventQuery`: not there yet.
pub(super) const NOT_READY: c_int = 600;

pub(super) type Comm = sys::ncclComm_t;
pub(super) type Handle = *mut c_void;

/// Where the two libraries are.
#[derive(Debug, Clone, Default)]
pub struct Libraries {
    nccl: Option<PathBuf>,
    driver: Option<PathBuf>,
}

impl Libraries {
    /// Those of the system, of a toolkit or of a Python wheel, as `SHANTY_CUDA_LIBRARIES` says first.
    pub fn of_the_system() -> Self {
        Self::default()
    }

    /// Two files: for tests.
    pub fn at(nccl: impl Into<PathBuf>, driver: impl Into<PathBuf>) -> Self {
        Self { nccl: Some(nccl.into()), driver: Some(driver.into()) }
    }

    /// The version of NCCL that these are, such as 22809 for 2.28.9, once it is known that a member can be started
    /// with them.
    ///
    /// # Errors
    /// [`Error::NoLibrary`], [`Error::NoSymbol`], [`Error::TooOld`]
    pub fn version(&self) -> Result<u32> {
        self.load().map(|api| api.version.unsigned_abs())
    }

    /// Loads them for good: NCCL has threads of its own that run until the process ends.
    pub(super) fn load(&self) -> Result<&'static Api> {
        static OF_THE_SYSTEM: OnceLock<Result<&'static Api>> = OnceLock::new();
        match (&self.nccl, &self.driver) {
            (None, None) => OF_THE_SYSTEM.get_or_init(|| Api::load(self)).clone(),
            _ => Api::load(self),
        }
    }
}

macro_rules! functions {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $symbol:literal($($argument:ty),*);)* }) => {
        $(#[$doc])*
        // SAFETY: these are types; whoever calls through one keeps what NCCL's or the driver's manual asks for.
        pub(super) struct $name {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl $name {
            fn find(library: &Library, file: &Path) -> Result<Self> {
                Ok(Self { $($field: find(library, file, $symbol)?,)* })
            }
        }
    };
}

functions! {
    /// NCCL. `stream` is a `CUstream`.
    Nccl {
        unique_id: "ncclGetUniqueId"(*mut sys::ncclUniqueId);
        init: "ncclCommInitRankConfig"(*mut Comm, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t);
        async_error: "ncclCommGetAsyncError"(Comm, *mut c_int);
        finalize: "ncclCommFinalize"(Comm);
        destroy: "ncclCommDestroy"(Comm);
        abort: "ncclCommAbort"(Comm);
        all_reduce: "ncclAllReduce"(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Handle);
        all_gather: "ncclAllGather"(*const c_void, *mut c_void, usize, c_int, Comm, Handle);
        broadcast: "ncclBroadcast"(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Handle);
    }
}

functions! {
    /// The driver.
    Driver {
        init: "cuInit"(c_uint);
        device: "cuDeviceGet"(*mut c_int, c_int);
        uuid: "cuDeviceGetUuid"(*mut [u8; 16], c_int);
        retain: "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
        release: "cuDevicePrimaryCtxRelease_v2"(c_int);
        set_current: "cuCtxSetCurrent"(Handle);
        stream_create: "cuStreamCreateWithPriority"(*mut Handle, c_uint, c_int);
        stream_wait: "cuStreamWaitEvent"(Handle, Handle, c_uint);
        stream_destroy: "cuStreamDestroy_v2"(Handle);
        event_create: "cuEventCreate"(*mut Handle, c_uint);
        event_record: "cuEventRecord"(Handle, Handle);
        event_query: "cuEventQuery"(Handle);
        event_destroy: "cuEventDestroy_v2"(Handle);
        allocate: "cuMemAlloc_v2"(*mut u64, usize);
        free: "cuMemFree_v2"(u64);
        allocate_host: "cuMemHostAlloc"(*mut Handle, usize, c_uint);
        free_host: "cuMemFreeHost"(Handle);
        to_device: "cuMemcpyHtoDAsync_v2"(u64, *const c_void, usize, Handle);
        to_host: "cuMemcpyDtoHAsync_v2"(*mut c_void, u64, usize, Handle);
    }
}

/// All that is called.
pub(super) struct Api {
    pub(super) nccl: Nccl,
    pub(super) driver: Driver,
    /// NCCL's, such as 22809.
    pub(super) version: c_int,
    // SAFETY: types again; both are called in one place each, with what NCCL gave.
    text: unsafe extern "C" fn(c_int) -> *const c_char,
    /// What NCCL says of the last error; since 2.13.
    last_error: unsafe extern "C" fn(Comm) -> *const c_char,
}

impl Api {
    fn load(libraries: &Libraries) -> Result<&'static Self> {
        let (library, file) = open("nccl", libraries.nccl.as_deref())?;
        // SAFETY: the type is that of the manual; the call below says what it needs.
        let get_version: unsafe extern "C" fn(*mut c_int) -> c_int = find(&library, &file, "ncclGetVersion")?;
        let mut version = 0;
        // SAFETY: writes one number.
        let result = unsafe { get_version(&mut version) };
        if result != SUCCESS || version < OLDEST {
            return Err(Error::TooOld { file: file.display().to_string(), version: named(version) });
        }
        let nccl = Nccl::find(&library, &file)?;
        let text = find(&library, &file, "ncclGetErrorString")?;
        let last_error = find(&library, &file, "ncclGetLastError")?;
        // Before the driver's own: both may be the same file, and neither is ever unloaded.
        std::mem::forget(library);
        let (library, file) = open("cuda", libraries.driver.as_deref())?;
        let driver = Driver::find(&library, &file)?;
        std::mem::forget(library);
        // SAFETY: the first call of the driver, without flags.
        let result = unsafe { (driver.init)(0) };
        if result != SUCCESS {
            return Err(Error::Device { operation: "cuInit", reason: format!("error {result}") });
        }
        Ok(Box::leak(Box::new(Self { nccl, driver, version, text, last_error })))
    }

    /// What a result of NCCL means, in its own words.
    pub(super) fn describe(&self, result: c_int) -> String {
        // SAFETY: NCCL gives a constant text for any number, and for no communicator at all its last error.
        let (text, last) = unsafe { ((self.text)(result), (self.last_error)(std::ptr::null_mut())) };
        // SAFETY: both end with a zero, or are null; a later error of another thread can cut the text, no more.
        let words = |text: *const c_char| unsafe {
            (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().trim().to_owned())
        };
        let text = words(text).unwrap_or_else(|| format!("result {result}"));
        match words(last).filter(|last| !last.is_empty()) {
            Some(last) => format!("{text} ({last})"),
            None => text,
        }
    }

    /// A call of the driver.
    pub(super) fn driver(&self, operation: &'static str, result: c_int) -> Result<()> {
        match result {
            SUCCESS => Ok(()),
            result => Err(Error::Device { operation, reason: format!("CUDA error {result}") }),
        }
    }
}

/// A version as people write it.
pub(super) fn named(version: c_int) -> String {
    // Up to 2.8 there were two digits less.
    if version >= 10_000 {
        format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    } else {
        format!("{}.{}.{}", version / 1000, version / 100 % 10, version % 100)
    }
}

/// Opens a library: the given file, or whatever is found in the common places.
fn open(name: &'static str, given: Option<&Path>) -> Result<(Library, PathBuf)> {
    let mut looked_in = Vec::new();
    let mut reason = String::new();
    let mut attempt = |file: &Path| {
        // SAFETY: the library's own initialisers run, which is what is asked.
        match unsafe { Library::new(file) } {
            Ok(library) => Some((library, file.to_owned())),
            Err(error) => {
                reason = error.to_string();
                None
            }
        }
    };
    if let Some(file) = given {
        looked_in.push(file.display().to_string());
        if let Some(opened) = attempt(file) {
            return Ok(opened);
        }
        return Err(Error::NoLibrary { library: name, looked_in, reason });
    }
    // By name, as the loader finds it: the driver comes with the system, and lies where the system says.
    let plain = || [1, 2].into_iter().map(|version| PathBuf::from(format!("lib{name}.so.{version}")));
    if (name == "cuda" || !places::is_explicit())
        && let Some(opened) = plain().find_map(|file| attempt(&file))
    {
        return Ok(opened);
    }
    for folder in places::folders() {
        looked_in.push(folder.display().to_string());
        if let Some(opened) = places::files(&folder, name).iter().find_map(|file| attempt(file)) {
            return Ok(opened);
        }
    }
    match plain().find_map(|file| attempt(&file)) {
        Some(opened) => Ok(opened),
        None => Err(Error::NoLibrary { library: name, looked_in, reason }),
    }
}

fn find<F: Copy>(library: &Library, file: &Path, symbol: &'static str) -> Result<F> {
    // SAFETY: callers name the type that the library's header declares.
    match unsafe { library.get::<F>(symbol.as_bytes()) } {
        Ok(function) => Ok(*function),
        Err(_) => Err(Error::NoSymbol { file: file.display().to_string(), symbol }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(named(22_809), "2.28.9");
        assert_eq!(named(2_804), "2.8.4");
        assert_eq!(named(21_304), "2.13.4");
    }
}
