//! All-reduce, all-gather and broadcast: in one process, over TCP and with NCCL, behind one trait.
//!
//! A *generation* is one fixed membership. Its members hold one [`Collective`] each and make the same
//! calls in the same order. When a member is lost, every call of the others fails and the collective is
//! dropped; the next generation joins anew.
//!
//! What holds for every implementation:
//! - **Same bits.** The sum at element `i` is taken in an order that depends on the world size and on `i`
//!   alone (see [`sum`]), not on the length of the buffer, the way the bytes travel, or who is first.
//! - **Out of place.** [`Collective::all_reduce_f32`] never writes to its input: after a broken call the
//!   local sum is whole. What a broken call leaves in its output is unspecified.
//! - **No hang on disagreement.** Members that make different calls, or the same with different lengths,
//!   get an error that names the neighbour.
//! - **One failure ends it.** After an error or an abort every later call fails, here and, as links
//!   close, at every other member.
//!
//! The calls block; [`AbortHandle`] ends them from another thread.
//!
//! ```
//! use shanty_collective::{Collective, local};
//!
//! let threads: Vec<_> = local::group(2)
//!     .into_iter()
//!     .map(|mut member| {
//!         std::thread::spawn(move || {
//!             let input = [1.0 + member.rank() as f32, 0.5];
//!             let mut sum = [0.0; 2];
//!             member.all_reduce_f32(&input, &mut sum).map(|()| sum)
//!         })
//!     })
//!     .collect();
//! for thread in threads {
//!     assert_eq!(thread.join().unwrap().unwrap(), [3.0, 1.0]);
//! }
//! ```

mod abort;
mod check;
mod device;
mod error;
mod feedback;
pub mod local;
pub mod nccl;
pub mod sum;
pub mod tcp;

pub use crate::{
    abort::AbortHandle,
    device::DeviceCollective,
    error::{Error, Result},
    feedback::{Compression, Feedback},
};

/// One member's end of a generation's collective operations.
pub trait Collective: Send {
    /// This member's number, `0..world_size`.
    fn rank(&self) -> u32;

    /// How many members there are.
    fn world_size(&self) -> u32;

    /// Sums `input` over all members into `output`. The input is not written; every member gets the same
    /// bits.
    ///
    /// # Shapes
    /// `input` and `output`: `[n]`, the same `n` at every member. `n = 0` is allowed and still checks that
    /// the members agree.
    ///
    /// # Errors
    /// [`Error::Argument`] when the two lengths differ; otherwise whatever broke the generation.
    fn all_reduce_f32(&mut self, input: &[f32], output: &mut [f32]) -> Result<()>;

    /// Sums `values` over all members in place, wrapping. Exact. Meant for a few numbers: every member
    /// receives those of every other.
    ///
    /// # Errors
    /// Whatever broke the generation.
    fn all_reduce_u64(&mut self, values: &mut [u64]) -> Result<()>;

    /// Lays the `input` of all members end to end in `output`, by rank.
    ///
    /// # Shapes
    /// `input`: `[n]`, the same `n` at every member; `output`: `[world_size * n]`.
    ///
    /// # Errors
    /// [`Error::Argument`] when the lengths do not fit; otherwise whatever broke the generation.
    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()>;

    /// Copies `buffer` of member `root` into that of every other. The root returns once all have it.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no such root; otherwise whatever broke the generation.
    fn broadcast(&mut self, root: u32, buffer: &mut [u8]) -> Result<()>;

    /// A handle that ends this collective from any thread.
    fn abort_handle(&self) -> AbortHandle;

    /// Has `hook` called at every hop from now on, in the thread that makes the call: a place for
    /// failpoints. `None` takes it off again.
    fn set_hop_hook(&mut self, hook: Option<HopHook>);

    /// Limits how long each later call may take; `None` (the start) is no limit. A call that runs out of
    /// time ends with [`Error::Deadline`], and the generation with it.
    fn set_call_deadline(&mut self, deadline: Option<std::time::Duration>);

    /// Gives the member what it owes to sums that travel rounded, and returns what it had. While a round of it is under
    /// way, [`Self::all_reduce_f32`] rounds as the members agreed when they joined; otherwise, and where they agreed on
    /// nothing, sums are exact.
    fn set_feedback(&mut self, _feedback: Option<Feedback>) -> Option<Feedback> {
        None
    }

    /// What it owes, to begin and commit rounds; none unless the members agreed on a way to round.
    fn feedback(&mut self) -> Option<&mut Feedback> {
        None
    }

    /// The same over memory of this member's device, where the implementation reaches it.
    fn on_device(&mut self) -> Option<&mut dyn DeviceCollective> {
        None
    }
}

/// Called at every hop of an operation; see [`Collective::set_hop_hook`].
pub type HopHook = Box<dyn FnMut(HopPoint) + Send>;

/// A place inside an operation: this member is about to wait for its neighbour's data of one hop. What it
/// took in at earlier hops is summed and may be on its way to the next neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HopPoint {
    /// The operation.
    pub operation: Operation,
    /// Counts this member's operations in the generation, from 1.
    pub sequence: u64,
    /// The hop, `0..hops`.
    pub hop: u32,
    /// How many hops this operation has at this member.
    pub hops: u32,
}

/// A collective operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// All members say that they are there; part of joining.
    Barrier,
    /// [`Collective::all_reduce_f32`]
    AllReduceF32,
    /// [`Collective::all_reduce_u64`]
    AllReduceU64,
    /// [`Collective::all_gather`]
    AllGather,
    /// [`Collective::broadcast`]
    Broadcast,
}

impl Operation {
    /// Its number on the wire: never reused.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Barrier => 1,
            Self::AllReduceF32 => 2,
            Self::AllReduceU64 => 3,
            Self::AllGather => 4,
            Self::Broadcast => 5,
        }
    }

    /// The operation of a number.
    pub(crate) fn of_number(number: u32) -> Option<Self> {
        let all = [Self::Barrier, Self::AllReduceF32, Self::AllReduceU64, Self::AllGather, Self::Broadcast];
        all.into_iter().find(|operation| operation.number() == number)
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Barrier => "barrier",
            Self::AllReduceF32 => "all-reduce (f32)",
            Self::AllReduceU64 => "all-reduce (u64)",
            Self::AllGather => "all-gather",
            Self::Broadcast => "broadcast",
        })
    }
}
