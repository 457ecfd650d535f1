//! One rank's communicator of NCCL: made without blocking, ended from any thread.

use std::{
    ffi::{c_int, c_void},
    mem, ptr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use cudarc::nccl::sys::{ncclDataType_t as Numbers, ncclRedOp_t, ncclUniqueId};
use tracing::warn;

use super::{
    api::{Api, Comm, IN_PROGRESS, INVALID_USAGE, SUCCESS},
    config::config,
    device::Card,
};
use crate::error::{Error, Result};

/// Bytes of what rank 0 makes and all must hold to find each other.
pub(super) const ID_BYTES: usize = size_of::<ncclUniqueId>();

/// How long a communicator may take to end as it should, before it is aborted.
const END_WITHIN: Duration = Duration::from_secs(2);

/// A communicator. Calls to it are short, and one at a time; whoever holds the lock and finds none, finds it aborted.
pub(super) struct Communicator {
    pub(super) card: Arc<Card>,
    raw: Mutex<Option<Raw>>,
    aborted: AtomicBool,
}

struct Raw(Comm);

// SAFETY: NCCL's communicators may be used by any thread, one at a time; the lock sees to that.
unsafe impl Send for Raw {}

/// What is done to the bytes of all ranks.
#[derive(Debug, Clone, Copy)]
pub(super) enum Work {
    SumF32 { input: u64, output: u64, elements: usize },
    SumU64 { input: u64, output: u64, elements: usize },
    Gather { input: u64, output: u64, bytes: usize },
    Broadcast { buffer: u64, bytes: usize, root: u32 },
}

/// What makes a rank findable: to be given to all ranks.
pub(super) fn unique_id(api: &Api) -> Result<[u8; ID_BYTES]> {
    // SAFETY: plain bytes, which the call fills.
    let (result, id) = unsafe {
        let mut id: ncclUniqueId = mem::zeroed();
        ((api.nccl.unique_id)(&mut id), id)
    };
    check(api, "ncclGetUniqueId", result)?;
    // SAFETY: the type is an array of as many bytes.
    Ok(unsafe { mem::transmute::<ncclUniqueId, [u8; ID_BYTES]>(id) })
}

fn check(api: &Api, call: &'static str, result: c_int) -> Result<()> {
    match result {
        SUCCESS | IN_PROGRESS => Ok(()),
        result => Err(Error::Nccl { call, reason: api.describe(result), is_usage: result == INVALID_USAGE }),
    }
}

impl Communicator {
    /// Begins to make one; [`Self::is_settled`] says when it is there.
    pub(super) fn begin(
        card: &Arc<Card>,
        id: [u8; ID_BYTES],
        rank: u32,
        world_size: u32,
    ) -> Result<Arc<Self>> {
        card.bind()?;
        let api = card.api;
        let mut raw: Comm = ptr::null_mut();
        let mut config = config(api.version);
        let number = |number: u32| c_int::try_from(number).unwrap_or(c_int::MAX);
        // SAFETY: the type is an array of as many bytes; the call copies id and configuration.
        let result = unsafe {
            let id = mem::transmute::<[u8; ID_BYTES], ncclUniqueId>(id);
            (api.nccl.init)(&mut raw, number(world_size), id, number(rank), &mut config)
        };
        let found = (!raw.is_null()).then_some(Raw(raw));
        let aborted = AtomicBool::new(false);
        let this = Arc::new(Self { card: Arc::clone(card), raw: Mutex::new(found), aborted });
        if let Err(error) = check(api, "ncclCommInitRankConfig", result) {
            this.abort();
            return Err(error);
        }
        Ok(this)
    }

    /// Whether the last call is through; fails with what broke the communicator.
    pub(super) fn is_settled(&self) -> Result<bool> {
        let raw = self.lock();
        self.settled(&raw)
    }

    fn settled(&self, raw: &Option<Raw>) -> Result<bool> {
        let Some(Raw(comm)) = raw else { return Err(self.gone()) };
        let api = self.card.api;
        let mut state = SUCCESS;
        // SAFETY: the communicator lives while the lock is held; one number is written.
        let result = unsafe { (api.nccl.async_error)(*comm, &mut state) };
        check(api, "ncclCommGetAsyncError", result)?;
        check(api, "ncclCommGetAsyncError", state)?;
        Ok(state == SUCCESS)
    }

    /// Queues work on the card's stream. The call before must be settled.
    pub(super) fn queue(&self, work: Work) -> Result<()> {
        let raw = self.lock();
        let Some(Raw(comm)) = &*raw else { return Err(self.gone()) };
        let (api, stream) = (self.card.api, self.card.stream);
        let sum = ncclRedOp_t::ncclSum as c_int;
        let pointer = |address: u64| address as *mut c_void;
        let reduce = |input, output, elements, numbers: Numbers| {
            let (input, output) = (pointer(input), pointer(output));
            // SAFETY: members hand in addresses of memory of this size, which they keep until the work is over.
            let result = unsafe {
                (api.nccl.all_reduce)(input, output, elements, numbers as c_int, sum, *comm, stream)
            };
            ("ncclAllReduce", result)
        };
        let bytes_are = Numbers::ncclUint8 as c_int;
        let (call, result) = match work {
            Work::SumF32 { input, output, elements } => reduce(input, output, elements, Numbers::ncclFloat32),
            Work::SumU64 { input, output, elements } => reduce(input, output, elements, Numbers::ncclUint64),
            Work::Gather { input, output, bytes } => {
                let (input, output) = (pointer(input), pointer(output));
                // SAFETY: as above; the output has room for all ranks' bytes.
                let result = unsafe { (api.nccl.all_gather)(input, output, bytes, bytes_are, *comm, stream) };
                ("ncclAllGather", result)
            }
            Work::Broadcast { buffer, bytes, root } => {
                let (buffer, root) = (pointer(buffer), c_int::try_from(root).unwrap_or(c_int::MAX));
                // SAFETY: as above; sender and receiver use the same memory, as NCCL allows.
                let result =
                    unsafe { (api.nccl.broadcast)(buffer, buffer, bytes, bytes_are, root, *comm, stream) };
                ("ncclBroadcast", result)
            }
        };
        check(api, call, result)
    }

    /// Ends all that is under way, here. From any thread; waits for a call that another thread is in.
    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        let Some(Raw(comm)) = self.lock().take() else { return };
        if self.card.bind().is_ok() {
            // SAFETY: taken out, so nobody uses it again.
            let result = unsafe { (self.card.api.nccl.abort)(comm) };
            if result != SUCCESS && result != IN_PROGRESS {
                warn!(result, "NCCL could not abort a communicator");
            }
        }
    }

    /// As [`Self::abort`], in a thread of its own: for callers that must not wait.
    pub(super) fn abort_beside(self: Arc<Self>) {
        self.aborted.store(true, Ordering::Release);
        let this = Arc::clone(&self);
        let spawned = thread::Builder::new().name("nccl-abort".to_owned()).spawn(move || this.abort());
        if let Err(error) = spawned {
            // Whoever waits for the communicator notices the flag and aborts it.
            warn!(%error, "no thread to abort NCCL in");
        }
    }

    pub(super) fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Acquire)
    }

    fn gone(&self) -> Error {
        Error::Nccl {
            call: "ncclCommAbort",
            reason: "the communicator was aborted".to_owned(),
            is_usage: false,
        }
    }

    /// The lock's holder never leaves half a state: it takes the communicator out, or leaves it.
    fn lock(&self) -> MutexGuard<'_, Option<Raw>> {
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it as it should be: what is queued gets through first. If that fails, it still has to be aborted.
    fn end(&self, comm: Comm) -> bool {
        let api = self.card.api;
        // SAFETY: the communicator is the caller's alone.
        if check(api, "ncclCommFinalize", unsafe { (api.nccl.finalize)(comm) }).is_err() {
            return false;
        }
        let start = Instant::now();
        let raw = Some(Raw(comm));
        loop {
            match self.settled(&raw) {
                Ok(true) => break,
                Ok(false) if start.elapsed() < END_WITHIN => thread::sleep(Duration::from_millis(1)),
                Ok(false) | Err(_) => return false,
            }
        }
        // SAFETY: finalised, and used by nobody from here on, whatever comes back.
        let _ = unsafe { (api.nccl.destroy)(comm) };
        true
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let Some(Raw(comm)) = self.lock().take() else { return };
        if self.card.bind().is_err() {
            return;
        }
        if self.is_aborted() || !self.end(comm) {
            // SAFETY: taken out, and not destroyed: `end` says so.
            let _ = unsafe { (self.card.api.nccl.abort)(comm) };
        }
    }
}
