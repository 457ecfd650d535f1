//! Collectives over memory of a member's own device.

use shanty_cuda::Span;

use crate::error::Result;

/// Collectives over memory of the member's device. Calls return once the work is queued on a stream of the
/// collective's own, behind what the memory's owner has queued by then; they are carried out in order.
/// [`Collective::all_reduce_u64`](crate::Collective::all_reduce_u64) goes into the same stream: when it returns, all
/// that was queued before is complete, at every member.
///
/// Memory must not be written, or where it is an output read, before the call is complete.
pub trait DeviceCollective: Send {
    /// New memory of the device; its content is unspecified.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device)
    fn allocate(&mut self, bytes: usize) -> Result<Span>;

    /// Sums `input` over all members into `output`. The input is not written unless it is the output.
    ///
    /// # Shapes
    /// `[n]` f32 both, the same `n` at every member.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_f32`](crate::Collective::all_reduce_f32); what goes wrong later is an error of
    /// [`Self::wait`].
    fn queue_all_reduce_f32(&mut self, input: &Span, output: &Span) -> Result<()>;

    /// Lays the `input` of all members end to end in `output`, by rank.
    ///
    /// # Errors
    /// As [`Collective::all_gather`](crate::Collective::all_gather).
    fn queue_all_gather(&mut self, input: &Span, output: &Span) -> Result<()>;

    /// Copies `buffer` of member `root` into that of every other.
    ///
    /// # Errors
    /// As [`Collective::broadcast`](crate::Collective::broadcast).
    fn queue_broadcast(&mut self, root: u32, buffer: &Span) -> Result<()>;

    /// Copies bytes of the host to the device, and waits for it and all that was queued before.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) when the lengths differ; otherwise as [`Self::wait`].
    fn upload(&mut self, from: &[u8], to: &Span) -> Result<()>;

    /// Copies bytes of the device to the host, and waits for it and all that was queued before.
    ///
    /// # Errors
    /// As [`Self::upload`].
    fn download(&mut self, from: &Span, to: &mut [u8]) -> Result<()>;

    /// Waits until all that was queued is complete here.
    ///
    /// # Errors
    /// Whatever broke the generation.
    fn wait(&mut self) -> Result<()>;

    /// Has what is queued on the span's own stream from now on wait for all that is queued here, without waiting
    /// itself. An aborted collective lets it go on, with content that is unspecified.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device)
    fn hold(&mut self, span: &Span) -> Result<()>;
}
