//! A generation whose members are processes, joined in a ring of TCP connections.
//!
//! Each member keeps one [`Listener`] for as long as it lives and joins one generation after the other on
//! it. Rank `r` connects to rank `r + 1` and accepts rank `r - 1`; both prove that they hold the
//! generation's token (`handshake`). Then every operation goes around the ring (`pass` says what,
//! `ring` how).
//!
//! A dead process closes its links: its neighbours see it at once, fail, and close theirs, so the failure
//! runs around the ring. A host that vanishes without a word is not seen here; the coordinator misses its
//! beats and has the others abort.
//!
//! Socket buffers are left to the system: Linux grows them as needed, and no longer once they are set.

mod frame;
mod handshake;
mod join;
mod pass;
mod ring;
mod rounded;
mod seal;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    net::{SocketAddr, TcpListener},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use self::{
    pass::{BroadcastPass, GatherPass, Pass, ReducePass, Schedule},
    ring::Ring,
    rounded::RoundedPass,
};
use crate::{AbortHandle, Collective, Compression, Error, Feedback, HopHook, Operation, Result, check, sum};

/// A buffer is gathered and added locally when no link carries more than this for it: half the hops of the
/// ring all-reduce. The sums are the same bits either way.
const GATHER_BYTES: usize = 64 * 1024;

/// The secret of a generation. Never sent; not shown by `Debug`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; 32]);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// What a member must know to join a generation.
#[derive(Debug, Clone)]
pub struct JoinOptions {
    /// The job; members must agree.
    pub job: String,
    /// The generation; members must agree.
    pub generation: u64,
    /// This member's number.
    pub rank: u32,
    /// Where each member listens, `host:port`, by rank; this member included.
    pub members: Vec<String>,
    /// The generation's secret.
    pub token: Token,
    /// How long joining may take.
    pub deadline: Duration,
    /// Whether links are encrypted; members must agree.
    pub encrypted: bool,
    /// How sums of rounds travel ([`Feedback`]); members must agree.
    pub compression: Compression,
}

/// Where this process accepts its neighbours' connections. Bound once; generations come and go on it.
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
    /// Held while joining: two joins would take each other's neighbours.
    joining: Mutex<()>,
}

impl Listener {
    /// Binds `host:port`, the first of its addresses that can be had. Port 0 lets the system choose.
    ///
    /// # Errors
    /// [`Error::Bind`]
    pub fn bind(address: &str) -> Result<Self> {
        let error =
            |error: std::io::Error| Error::Bind { address: address.to_owned(), reason: error.to_string() };
        let listener = TcpListener::bind(address).map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        let address = listener.local_addr().map_err(error)?;
        Ok(Self { listener, address, joining: Mutex::new(()) })
    }

    /// The address that it is bound to, with the port that the system chose.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Joins a generation: returns when every member is connected. Connections that are of another
    /// generation, prove nothing, or say nothing are turned away and disturb nobody.
    ///
    /// # Errors
    /// [`Error::Join`] after the deadline, with what is missing; [`Error::Aborted`]; [`Error::Argument`] for
    /// options that do not fit together.
    pub fn join(&self, options: &JoinOptions, abort: AbortHandle) -> Result<TcpCollective> {
        let world_size = options.members.len();
        if options.rank as usize >= world_size {
            let reason = format!("rank {} of {world_size} members", options.rank);
            return Err(Error::Argument { operation: "join", reason });
        }
        abort.check()?;
        let mut collective = TcpCollective {
            rank: options.rank,
            world_size: world_size as u32,
            ring: None,
            abort: abort.clone(),
            first_error: None,
            scratch: Vec::new(),
            compression: options.compression,
            feedback: Feedback::default(),
            wire: Vec::new(),
        };
        if world_size == 1 {
            return Ok(collective);
        }

        let _joining = self.joining.lock().unwrap_or_else(PoisonError::into_inner);
        let start = Instant::now();
        let failed = |reason: String| Error::Join {
            rank: options.rank,
            generation: options.generation,
            waited: start.elapsed(),
            reason,
        };
        let (to_next, from_previous) = join::find_neighbours(&self.listener, options, &abort)?;
        let (next, previous) = (options.peer(options.next()), options.peer(options.previous()));
        let mut ring = Ring::new(to_next, from_previous, next, previous, options.generation, abort)
            .map_err(|error| failed(error.to_string()))?;

        // Both neighbours are here; the others are once a barrier has gone around.
        ring.deadline = Some(options.deadline.saturating_sub(start.elapsed()));
        let mut barrier = GatherPass {
            operation: Operation::Barrier,
            rank: options.rank as usize,
            world_size,
            output: &mut [],
        };
        ring.run(&mut barrier).map_err(|error| match error {
            Error::Aborted { .. } => error,
            other => failed(other.to_string()),
        })?;
        ring.deadline = None;
        collective.ring = Some(ring);
        Ok(collective)
    }
}

/// One member of a generation over TCP.
pub struct TcpCollective {
    rank: u32,
    world_size: u32,
    /// Absent in a world of one.
    ring: Option<Ring>,
    abort: AbortHandle,
    first_error: Option<Error>,
    /// Room for the block that is being received, or for what all ranks bring to a small sum.
    scratch: Vec<f32>,
    compression: Compression,
    feedback: Feedback,
    /// What travels of a sum that is rounded.
    wire: Vec<u8>,
}

impl TcpCollective {
    /// Fails when the generation is over.
    fn check(&self) -> Result<()> {
        self.abort.check()?;
        match &self.first_error {
            Some(first) => Err(Error::Broken { first: first.to_string() }),
            None => Ok(()),
        }
    }

    /// Closes the links: the neighbours notice.
    pub(crate) fn close(&self) {
        if let Some(ring) = &self.ring {
            ring.close();
        }
    }

    /// A neighbour that has closed its link, while no call of this collective is under way.
    pub(crate) fn lost_neighbour(&self) -> Option<String> {
        self.ring.as_ref()?.lost_neighbour()
    }

    /// Carries out `pass`. Only called in a world of several.
    fn run(ring: &mut Option<Ring>, first_error: &mut Option<Error>, pass: &mut impl Pass) -> Result<()> {
        let Some(ring) = ring else { return Ok(()) };
        let result = ring.run(pass);
        if let Err(error) = &result {
            *first_error = Some(error.clone());
        }
        result
    }

    /// Gathers `own` of every rank into `all`.
    fn gather(&mut self, operation: Operation, own: &[u8], all: &mut [u8]) -> Result<()> {
        let rank = self.rank as usize;
        all[rank * own.len()..][..own.len()].copy_from_slice(own);
        let world_size = self.world_size as usize;
        let mut pass = GatherPass { operation, rank, world_size, output: all };
        Self::run(&mut self.ring, &mut self.first_error, &mut pass)
    }
}

impl Collective for TcpCollective {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn all_reduce_f32(&mut self, input: &[f32], output: &mut [f32]) -> Result<()> {
        self.check()?;
        check::same_length(input, output)?;
        let (rank, world_size) = (self.rank as usize, self.world_size as usize);
        if world_size == 1 {
            output.copy_from_slice(input);
            return Ok(());
        }
        let schedule = Schedule { rank, world_size, length: input.len() };
        if self.compression != Compression::Off && self.feedback.is_begun() {
            let (owed, owes) = self.feedback.take(input.len())?;
            let mut pass =
                RoundedPass::new(schedule, self.compression, (input, output), (owed, owes), &mut self.wire);
            return Self::run(&mut self.ring, &mut self.first_error, &mut pass);
        }
        if size_of_val(input) * (world_size - 1) <= GATHER_BYTES {
            let mut all = std::mem::take(&mut self.scratch);
            all.resize((input.len() * world_size).max(all.len()), 0.0);
            let gathered = &mut all[..input.len() * world_size];
            let result = self.gather(
                Operation::AllReduceF32,
                bytemuck::cast_slice(input),
                bytemuck::cast_slice_mut(gathered),
            );
            if result.is_ok() && !input.is_empty() {
                let inputs: Vec<&[f32]> = gathered.chunks_exact(input.len()).collect();
                sum::sum_in_order(&inputs, output);
            }
            self.scratch = all;
            return result;
        }
        self.scratch.resize(sum::BLOCK.max(self.scratch.len()), 0.0);
        let mut pass = ReducePass { schedule, input, output, scratch: &mut self.scratch };
        Self::run(&mut self.ring, &mut self.first_error, &mut pass)
    }

    fn all_reduce_u64(&mut self, values: &mut [u64]) -> Result<()> {
        self.check()?;
        if self.world_size == 1 {
            return Ok(());
        }
        let count = values.len();
        let mut all = vec![0u64; count * self.world_size as usize];
        self.gather(
            Operation::AllReduceU64,
            bytemuck::cast_slice(values),
            bytemuck::cast_slice_mut(&mut all),
        )?;
        for (index, value) in values.iter_mut().enumerate() {
            *value = all.iter().skip(index).step_by(count).fold(0, |sum, more| sum.wrapping_add(*more));
        }
        Ok(())
    }

    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.check()?;
        check::gathered_length(input, output, self.world_size)?;
        self.gather(Operation::AllGather, input, output)
    }

    fn broadcast(&mut self, root: u32, buffer: &mut [u8]) -> Result<()> {
        self.check()?;
        check::root(root, self.world_size)?;
        let mut pass = BroadcastPass { root, rank: self.rank, world_size: self.world_size, buffer };
        Self::run(&mut self.ring, &mut self.first_error, &mut pass)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn set_hop_hook(&mut self, hook: Option<HopHook>) {
        if let Some(ring) = &mut self.ring {
            ring.hook = hook;
        }
    }

    fn set_call_deadline(&mut self, deadline: Option<Duration>) {
        if let Some(ring) = &mut self.ring {
            ring.deadline = deadline;
        }
    }

    fn set_feedback(&mut self, feedback: Option<Feedback>) -> Option<Feedback> {
        let before = std::mem::replace(&mut self.feedback, feedback.unwrap_or_default());
        (self.compression != Compression::Off).then_some(before)
    }

    fn feedback(&mut self) -> Option<&mut Feedback> {
        (self.compression != Compression::Off).then_some(&mut self.feedback)
    }
}
