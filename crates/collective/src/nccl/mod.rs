//! A generation whose members reduce between GPUs with NCCL, each on a device of its own.
//!
//! NCCL is loaded when it is first needed; where it is missing, that is an error value. A communicator is made and
//! used without blocking: every wait here looks, many times a second, at the work's own event, at what NCCL noticed
//! by itself, at the caller's abort, at the deadline, and at the TCP links to the neighbours. These links are the
//! generation's ring of [`crate::tcp`], which members join first: it authenticates them, carries what they must
//! know of each other (NCCL's unique id among it), and says at once when a process is gone, which NCCL does not.
//! So nothing that NCCL needs goes through the coordinator, which may be away.
//!
//! Unlike the other implementations, the order of a sum is NCCL's: all members get the same bits, but not those of
//! [`crate::sum`]. Ahead of each call the ranks tell each other what they are about to do, on the same stream; so
//! members that disagree get an error that names the rank.
//!
//! [`AbortHandle::abort`] ends the communicator from a thread of its own, whatever the member's thread does.

mod api;
mod communicator;
mod config;
mod device;
mod member;
#[cfg(test)]
mod tests;

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bytemuck::{Pod, Zeroable};

use self::{
    api::named,
    communicator::{Communicator, ID_BYTES, unique_id},
    device::Card,
};
use crate::{AbortHandle, Collective, Error, Result, tcp::TcpCollective};

pub use self::{api::Libraries, member::NcclCollective};

/// How often a wait for the others looks.
const TICK: Duration = Duration::from_micros(500);

/// A device with NCCL, ready to join generations.
pub struct Device {
    card: Arc<Card>,
}

/// What a member must know besides its links.
#[derive(Debug, Clone)]
pub struct JoinOptions {
    /// The generation; members must agree.
    pub generation: u64,
    /// How long joining may take.
    pub deadline: Duration,
}

/// What rank 0 makes for each generation: with it the ranks find each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; ID_BYTES]);

/// What members tell each other before they start NCCL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Introduction {
    /// 1 for a member that has all it needs.
    is_ready: u64,
    version: u64,
    device: [u8; 16],
}

impl Device {
    /// Opens a device by its number in this process.
    ///
    /// # Errors
    /// [`Error::NoLibrary`], [`Error::NoSymbol`], [`Error::TooOld`], [`Error::Device`]
    pub fn open(index: u32, libraries: &Libraries) -> Result<Self> {
        Ok(Self { card: Card::open(libraries.load()?, index)? })
    }

    /// The version of NCCL, such as 2.28.9.
    pub fn nccl_version(&self) -> String {
        named(self.card.api.version)
    }

    /// What tells this device from all others, also those of other hosts.
    ///
    /// # Errors
    /// [`Error::Device`]
    pub fn uuid(&self) -> Result<[u8; 16]> {
        self.card.uuid()
    }

    /// Makes the id of a new generation, which all its ranks must be given.
    ///
    /// # Errors
    /// [`Error::Nccl`]
    pub fn unique_id(&self) -> Result<UniqueId> {
        self.card.bind()?;
        unique_id(self.card.api).map(UniqueId)
    }

    /// Starts a communicator with an id that came from anywhere; without links, only NCCL itself and the deadline
    /// say that a peer is gone.
    ///
    /// # Errors
    /// [`Error::Join`] after the deadline, [`Error::Aborted`], [`Error::Nccl`]
    pub fn join_with(
        &self,
        id: UniqueId,
        rank: u32,
        world_size: u32,
        options: &JoinOptions,
        abort: AbortHandle,
        side: Option<TcpCollective>,
    ) -> Result<NcclCollective> {
        abort.check()?;
        let communicator = Communicator::begin(&self.card, id.0, rank, world_size)?;
        let weak = Arc::downgrade(&communicator);
        abort.on_abort(move || {
            if let Some(communicator) = weak.upgrade() {
                communicator.abort_beside();
            }
        });
        let start = Instant::now();
        let joined = self.settle(&communicator, rank, options, &abort, side.as_ref(), start);
        if let Err(error) = joined {
            communicator.abort();
            return Err(abort.check().err().unwrap_or(error));
        }
        NcclCollective::new(communicator, rank, world_size, options.generation, abort, side)
    }

    fn settle(
        &self,
        communicator: &Communicator,
        rank: u32,
        options: &JoinOptions,
        abort: &AbortHandle,
        side: Option<&TcpCollective>,
        start: Instant,
    ) -> Result<()> {
        let failed = |reason: String| Error::Join {
            rank,
            generation: options.generation,
            waited: start.elapsed(),
            reason,
        };
        loop {
            abort.check()?;
            if communicator.is_settled()? {
                return Ok(());
            }
            if let Some(peer) = side.and_then(TcpCollective::lost_neighbour) {
                return Err(failed(format!("{peer} left while NCCL started")));
            }
            if start.elapsed() >= options.deadline {
                return Err(failed("not all ranks came to NCCL".to_owned()));
            }
            thread::sleep(TICK);
        }
    }
}

/// Joins a generation whose members are linked already: [`agree`], then [`start`].
///
/// # Errors
/// What this member lacks; [`Error::SharedDevice`]; [`Error::Refused`] for what another lacks; [`Error::Join`] after
/// the deadline; [`Error::Aborted`]
pub fn join(
    mut side: TcpCollective,
    device: Result<&Device, &Error>,
    options: &JoinOptions,
    abort: AbortHandle,
) -> Result<NcclCollective> {
    agree(&mut side, device, options.deadline)??;
    start(side, device.map_err(Error::clone)?, options, abort)
}

/// Members that are linked already tell each other whether they could start NCCL. All come to the same decision: `Ok`
/// inside when they can, else why not. `device` is what this member has, or why it has none.
///
/// # Errors
/// What broke the links.
pub fn agree(
    side: &mut TcpCollective,
    device: Result<&Device, &Error>,
    deadline: Duration,
) -> Result<Result<()>> {
    side.set_call_deadline(Some(deadline));
    let mine = device.map_err(Error::clone).and_then(|device| {
        let version = u64::from(device.card.api.version.unsigned_abs());
        Ok(Introduction { is_ready: 1, version, device: device.uuid()? })
    });
    let own = mine.as_ref().map_or_else(|_| Introduction::zeroed(), |own| *own);
    let mut all = vec![Introduction::zeroed(); side.world_size() as usize];
    side.all_gather(bytemuck::bytes_of(&own), bytemuck::cast_slice_mut(&mut all))?;
    side.set_call_deadline(None);
    Ok(mine.and_then(|_| check_introductions(&all)))
}

/// Takes rank 0's unique id over the links, and starts NCCL. The links stay open beside it.
///
/// # Errors
/// [`Error::Nccl`], [`Error::Refused`] when rank 0 makes no id, [`Error::Join`] after the deadline, [`Error::Aborted`]
pub fn start(
    mut side: TcpCollective,
    device: &Device,
    options: &JoinOptions,
    abort: AbortHandle,
) -> Result<NcclCollective> {
    let start = Instant::now();
    let (rank, world_size) = (side.rank(), side.world_size());
    side.set_call_deadline(Some(options.deadline));
    // The first byte says whether the root has one: nobody waits for an id that will not come.
    let mut letter = [0; 1 + ID_BYTES];
    let made = (rank == 0).then(|| device.unique_id());
    if let Some(Ok(id)) = &made {
        letter[0] = 1;
        letter[1..].copy_from_slice(&id.0);
    }
    side.broadcast(0, &mut letter)?;
    if let Some(Err(error)) = made {
        return Err(error);
    }
    if letter[0] == 0 {
        return Err(Error::Refused { wish: "NCCL", reason: "rank 0 cannot make a unique id".to_owned() });
    }
    let mut id = UniqueId([0; ID_BYTES]);
    id.0.copy_from_slice(&letter[1..]);
    let left = options.deadline.saturating_sub(start.elapsed());
    let options = JoinOptions { deadline: left, ..options.clone() };
    device.join_with(id, rank, world_size, &options, abort, Some(side))
}

/// Whether NCCL can be started with these members.
fn check_introductions(all: &[Introduction]) -> Result<()> {
    let refused = |reason| Err(Error::Refused { wish: "NCCL", reason });
    if let Some(rank) = all.iter().position(|member| member.is_ready != 1) {
        return refused(format!("rank {rank} cannot start it; that worker's log says why"));
    }
    for (second, member) in (0u32..).zip(all) {
        for (first, other) in (0u32..).zip(all).take_while(|(first, _)| *first < second) {
            if member.device == other.device {
                return Err(Error::SharedDevice { first, second });
            }
        }
        if member.version != all[0].version {
            let name = |version: u64| named(i32::try_from(version).unwrap_or(i32::MAX));
            return refused(format!(
                "rank 0 has NCCL {}, rank {second} has {}; all need the same",
                name(all[0].version),
                name(member.version)
            ));
        }
    }
    Ok(())
}
