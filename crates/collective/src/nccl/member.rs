//! One member of a generation over NCCL.

mod on_device;

use std::{
    collections::VecDeque,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use shanty_cuda::Span;

use super::{
    communicator::{Communicator, Work},
    device::{Card, Event, Staging},
};
use crate::{
    AbortHandle, Collective, DeviceCollective, Error, HopHook, HopPoint, Operation, Result, check,
    tcp::TcpCollective,
};

/// Calls that may be under way at a time; one more waits for the first.
const SLOTS: usize = 64;

/// What the ranks tell each other ahead of each call: operation, argument, sequence, bytes, generation.
const HEADER_WORDS: usize = 5;
const HEADER_BYTES: usize = HEADER_WORDS * size_of::<u64>();

/// How long a call may go on when a neighbour's link is closed. One that has all may leave; its last bytes are on
/// their way.
const GRACE: Duration = Duration::from_millis(250);

/// How often neighbours' links are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// How long a wait spins before it sleeps.
const SPIN: Duration = Duration::from_micros(100);
/// How long it sleeps between two looks.
const NAP: Duration = Duration::from_micros(50);

/// One member of a generation over NCCL.
pub struct NcclCollective {
    core: Core,
    staging: Option<Staging>,
}

struct Core {
    rank: u32,
    world_size: u32,
    generation: u64,
    card: Arc<Card>,
    communicator: Arc<Communicator>,
    /// What this rank and all ranks say ahead of calls, a slot a call.
    own: Staging,
    all: Staging,
    /// Under way, in order.
    queued: VecDeque<Queued>,
    sequence: u64,
    first_error: Option<Error>,
    abort: AbortHandle,
    hook: Option<HopHook>,
    deadline: Option<Duration>,
    /// Tells that a neighbour's process is gone. Dropped after the communicator.
    side: Option<TcpCollective>,
}

/// A call that is under way.
struct Queued {
    call: Call,
    /// What all ranks said is here.
    agreed: Event,
    /// Everything is done.
    done: Event,
    /// Keeps the memory that the card works on.
    _memory: [Option<Span>; 2],
}

#[derive(Debug, Clone, Copy)]
struct Call {
    operation: Operation,
    argument: u32,
    total_bytes: usize,
    sequence: u64,
}

impl Call {
    fn new(operation: Operation, argument: u32, total_bytes: usize) -> Self {
        Self { operation, argument, total_bytes, sequence: 0 }
    }

    fn words(&self, generation: u64) -> [u64; HEADER_WORDS] {
        let Self { operation, argument, total_bytes, sequence } = *self;
        [operation.number().into(), argument.into(), sequence, total_bytes as u64, generation]
    }

    /// Compares with what a rank said.
    fn compare(&self, rank: usize, ours: &[u64], theirs: &[u64]) -> Result<()> {
        if ours == theirs {
            return Ok(());
        }
        let (peer, operation, sequence) = (format!("rank {rank}"), self.operation, self.sequence);
        let is_same_call = [0, 1, 2, 4].into_iter().all(|word| ours[word] == theirs[word]);
        if is_same_call {
            let (ours_bytes, theirs_bytes) = (ours[3], theirs[3]);
            return Err(Error::LengthMismatch { peer, operation, sequence, ours_bytes, theirs_bytes });
        }
        let found = u32::try_from(theirs[0]).ok().and_then(Operation::of_number);
        let found = match found {
            Some(found) => format!("{found} {} of generation {}", theirs[2], theirs[4]),
            None => "bytes that are no header".to_owned(),
        };
        Err(Error::Unexpected { peer, operation, sequence, found })
    }
}

impl NcclCollective {
    pub(super) fn new(
        communicator: Arc<Communicator>,
        rank: u32,
        world_size: u32,
        generation: u64,
        abort: AbortHandle,
        side: Option<TcpCollective>,
    ) -> Result<Self> {
        let card = Arc::clone(&communicator.card);
        let own = Staging::new(&card, SLOTS * HEADER_BYTES)?;
        let all = Staging::new(&card, SLOTS * HEADER_BYTES * world_size as usize)?;
        let core = Core {
            rank,
            world_size,
            generation,
            card,
            communicator,
            own,
            all,
            queued: VecDeque::new(),
            sequence: 0,
            first_error: None,
            abort,
            hook: None,
            deadline: None,
            side,
        };
        Ok(Self { core, staging: None })
    }

    /// Carries out a call over host memory: `bytes` of staging, filled by `fill`, worked on in place.
    fn through_staging(
        &mut self,
        call: Call,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
        work: impl FnOnce(u64) -> Work,
    ) -> Result<&[u8]> {
        let Self { core, staging } = self;
        core.check()?;
        let result = (|| {
            core.card.bind()?;
            // What is queued may still use the staging's memory if that has to grow.
            if staging.as_ref().is_none_or(|staging| staging.device.bytes < bytes) {
                core.wait_all()?;
            }
            let staging = Staging::reserve(staging, &core.card, bytes)?;
            fill(&mut staging.host.bytes_mut()[..bytes]);
            core.begin(
                call,
                |core| {
                    core.card.upload(&staging.device, &staging.host, 0..bytes)?;
                    core.queue(work(staging.device.address))?;
                    core.card.download(&mut staging.host, &staging.device, 0..bytes)
                },
                [None, None],
            )?;
            core.wait_all()
        })();
        core.note(result)?;
        Ok(staging.as_ref().map_or(&[], |staging| &staging.host.bytes()[..bytes]))
    }
}

impl Core {
    /// Fails when the generation is over.
    fn check(&self) -> Result<()> {
        self.abort.check()?;
        match &self.first_error {
            Some(first) => Err(Error::Broken { first: first.to_string() }),
            None => Ok(()),
        }
    }

    /// Ends the generation here, and with it for the neighbours, if a call failed.
    fn note<T>(&mut self, result: Result<T>) -> Result<T> {
        let Err(error) = result else { return result };
        self.communicator.abort();
        self.queued.clear();
        if let Some(side) = &self.side {
            side.close();
        }
        // An abort is noticed by what it breaks.
        let error = self.abort.check().err().unwrap_or(error);
        self.first_error.get_or_insert_with(|| error.clone());
        Err(error)
    }

    /// Tells all ranks of a call and queues its work.
    fn begin(
        &mut self,
        call: Call,
        work: impl FnOnce(&mut Self) -> Result<()>,
        memory: [Option<Span>; 2],
    ) -> Result<()> {
        if self.queued.len() == SLOTS {
            self.wait_first()?;
        }
        self.sequence += 1;
        let call = Call { sequence: self.sequence, ..call };
        if let Some(hook) = &mut self.hook {
            hook(HopPoint { operation: call.operation, sequence: call.sequence, hop: 0, hops: 1 });
            self.abort.check()?;
        }
        let agreed = self.tell(&call)?;
        work(self)?;
        let done = Event::new(&self.card)?;
        done.record(self.card.stream)?;
        self.queued.push_back(Queued { call, agreed, done, _memory: memory });
        Ok(())
    }

    /// Where a call's header lies among all.
    fn slot(&self, call: &Call) -> usize {
        (call.sequence % SLOTS as u64) as usize
    }

    fn tell(&mut self, call: &Call) -> Result<Event> {
        let own = self.slot(call) * HEADER_BYTES;
        let all = own * self.world_size as usize;
        let words = call.words(self.generation);
        self.own.host.bytes_mut()[own..][..HEADER_BYTES].copy_from_slice(bytemuck::cast_slice(&words));
        self.card.upload(&self.own.device, &self.own.host, own..own + HEADER_BYTES)?;
        let (input, output) = (self.own.device.address + own as u64, self.all.device.address + all as u64);
        self.queue(Work::Gather { input, output, bytes: HEADER_BYTES })?;
        let gathered = all..all + HEADER_BYTES * self.world_size as usize;
        self.card.download(&mut self.all.host, &self.all.device, gathered)?;
        let agreed = Event::new(&self.card)?;
        agreed.record(self.card.stream)?;
        Ok(agreed)
    }

    /// Hands work to NCCL, and waits until NCCL has taken it.
    fn queue(&mut self, work: Work) -> Result<()> {
        self.communicator.queue(work)?;
        let call = Call::new(Operation::Barrier, 0, 0);
        self.wait(&Call { sequence: self.sequence, ..call }, |core| core.communicator.is_settled())
    }

    fn wait_all(&mut self) -> Result<()> {
        while !self.queued.is_empty() {
            self.wait_first()?;
        }
        Ok(())
    }

    /// Waits for the first call that is under way.
    fn wait_first(&mut self) -> Result<()> {
        let Some(queued) = self.queued.pop_front() else { return Ok(()) };
        let call = queued.call;
        self.wait(&call, |_| queued.agreed.is_over())?;
        self.agree(&call)?;
        self.wait(&call, |_| queued.done.is_over())
    }

    /// Checks that all make the same call.
    fn agree(&self, call: &Call) -> Result<()> {
        let ours = call.words(self.generation);
        let start = self.slot(call) * HEADER_BYTES * self.world_size as usize;
        let all = &self.all.host.bytes()[start..][..HEADER_BYTES * self.world_size as usize];
        for (rank, theirs) in all.chunks_exact(HEADER_BYTES).enumerate() {
            let mut words = [0u64; HEADER_WORDS];
            bytemuck::cast_slice_mut(&mut words).copy_from_slice(theirs);
            call.compare(rank, &ours, &words)?;
        }
        Ok(())
    }

    /// Waits for a condition, for as long as nothing is wrong.
    fn wait(&mut self, call: &Call, is_met: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        let mut looked = start;
        let mut lost: Option<(String, Instant)> = None;
        loop {
            self.abort.check()?;
            if is_met(self)? {
                return Ok(());
            }
            // What NCCL noticed by itself, such as a connection that broke.
            self.communicator.is_settled()?;
            let now = Instant::now();
            let (operation, sequence) = (call.operation, call.sequence);
            if now.duration_since(looked) >= LOOK_EVERY {
                looked = now;
                let gone = self.side.as_ref().and_then(TcpCollective::lost_neighbour);
                lost = lost.or(gone.map(|peer| (peer, now)));
            }
            if let Some((peer, since)) = &lost
                && now.duration_since(*since) >= GRACE
            {
                let reason = "it closed the connection".to_owned();
                return Err(Error::PeerLost { peer: peer.clone(), operation, sequence, reason });
            }
            if let Some(limit) = self.deadline
                && now.duration_since(start) >= limit
            {
                return Err(Error::Deadline { peer: self.peers(), operation, sequence, limit });
            }
            if now.duration_since(start) < SPIN {
                std::hint::spin_loop();
            } else {
                thread::sleep(NAP);
            }
        }
    }

    /// Whom a call waits for: NCCL does not say which.
    fn peers(&self) -> String {
        let others = (0..self.world_size).filter(|rank| *rank != self.rank);
        let names: Vec<String> = others.map(|rank| format!("rank {rank}")).collect();
        if names.is_empty() { "its own device".to_owned() } else { names.join(" or ") }
    }
}

impl Collective for NcclCollective {
    fn rank(&self) -> u32 {
        self.core.rank
    }

    fn world_size(&self) -> u32 {
        self.core.world_size
    }

    fn all_reduce_f32(&mut self, input: &[f32], output: &mut [f32]) -> Result<()> {
        check::same_length(input, output)?;
        let (bytes, elements) = (size_of_val(input), input.len());
        let sum = self.through_staging(
            Call::new(Operation::AllReduceF32, 0, bytes),
            bytes,
            |staging| staging.copy_from_slice(bytemuck::cast_slice(input)),
            |address| Work::SumF32 { input: address, output: address, elements },
        )?;
        bytemuck::cast_slice_mut(output).copy_from_slice(sum);
        Ok(())
    }

    fn all_reduce_u64(&mut self, values: &mut [u64]) -> Result<()> {
        let (bytes, elements) = (size_of_val(values), values.len());
        let sum = self.through_staging(
            Call::new(Operation::AllReduceU64, 0, bytes),
            bytes,
            |staging| staging.copy_from_slice(bytemuck::cast_slice(values)),
            |address| Work::SumU64 { input: address, output: address, elements },
        )?;
        bytemuck::cast_slice_mut(values).copy_from_slice(sum);
        Ok(())
    }

    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        check::gathered_length(input, output, self.core.world_size)?;
        let (bytes, own) = (input.len(), self.core.rank as usize * input.len());
        let all = self.through_staging(
            Call::new(Operation::AllGather, 0, bytes),
            output.len(),
            |staging| staging[own..][..bytes].copy_from_slice(input),
            // NCCL gathers in place where a rank's own bytes lie where they go.
            |address| Work::Gather { input: address + own as u64, output: address, bytes },
        )?;
        output.copy_from_slice(all);
        Ok(())
    }

    fn broadcast(&mut self, root: u32, buffer: &mut [u8]) -> Result<()> {
        check::root(root, self.core.world_size)?;
        let bytes = buffer.len();
        let received = self.through_staging(
            Call::new(Operation::Broadcast, root, bytes),
            bytes,
            |staging| staging.copy_from_slice(buffer),
            |address| Work::Broadcast { buffer: address, bytes, root },
        )?;
        buffer.copy_from_slice(received);
        Ok(())
    }

    fn abort_handle(&self) -> AbortHandle {
        self.core.abort.clone()
    }

    fn set_hop_hook(&mut self, hook: Option<HopHook>) {
        self.core.hook = hook;
    }

    fn set_call_deadline(&mut self, deadline: Option<Duration>) {
        self.core.deadline = deadline;
    }

    fn on_device(&mut self) -> Option<&mut dyn DeviceCollective> {
        Some(self)
    }
}
