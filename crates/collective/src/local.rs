//! A generation whose members are threads of one process.
//!
//! Every call is one exchange: each member lays down a copy of what it brings, waits until all have, and
//! computes the result for itself from all of them, in the order of [`crate::sum`].

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{AbortHandle, Collective, Error, HopHook, HopPoint, Operation, Result, check, sum};

/// One member of a generation inside this process.
pub struct LocalCollective {
    rank: usize,
    table: Arc<Table>,
    abort: AbortHandle,
    sequence: u64,
    first_error: Option<Error>,
    hook: Option<HopHook>,
    deadline: Option<Duration>,
}

/// Makes the members of a generation, by rank.
pub fn group(world_size: u32) -> Vec<LocalCollective> {
    let members = world_size as usize;
    let round = Round { laid: vec![None; members], taken: 0, gone: vec![false; members] };
    let table = Arc::new(Table { round: Mutex::new(round), changed: Condvar::new() });
    (0..members).map(|rank| LocalCollective::new(rank, Arc::clone(&table))).collect()
}

/// Where the members meet.
struct Table {
    round: Mutex<Round>,
    changed: Condvar,
}

/// One exchange. It fills until all have laid something down, then empties until all have taken.
struct Round {
    laid: Vec<Option<Offer>>,
    taken: usize,
    /// Members that will bring nothing more.
    gone: Vec<bool>,
}

#[derive(Clone)]
struct Offer {
    operation: Operation,
    sequence: u64,
    /// What else must agree: the root of a broadcast.
    argument: u32,
    total_bytes: usize,
    /// The bytes, in words so that they can be looked at as any number.
    words: Arc<Vec<u64>>,
}

impl Offer {
    fn bytes(&self) -> &[u8] {
        let bytes = bytemuck::cast_slice(&self.words);
        &bytes[..self.total_bytes.min(bytes.len())]
    }
}

impl Round {
    fn is_full(&self) -> bool {
        self.laid.iter().all(Option::is_some)
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, rank: usize) {
        self.lock().gone[rank] = true;
        self.changed.notify_all();
    }
}

impl LocalCollective {
    fn new(rank: usize, table: Arc<Table>) -> Self {
        let abort = AbortHandle::new();
        let weak = Arc::downgrade(&table);
        abort.on_abort(move || {
            if let Some(table) = weak.upgrade() {
                table.leave(rank);
            }
        });
        Self { rank, table, abort, sequence: 0, first_error: None, hook: None, deadline: None }
    }

    /// Brings `bytes` (or nothing, of the same length) and returns what all bring, by rank.
    fn exchange(
        &mut self,
        operation: Operation,
        argument: u32,
        total_bytes: usize,
        bytes: Option<&[u8]>,
    ) -> Result<Vec<Offer>> {
        self.abort.check()?;
        if let Some(first) = &self.first_error {
            return Err(Error::Broken { first: first.to_string() });
        }
        self.sequence += 1;
        let mut words = vec![0; bytes.map_or(0, |bytes| bytes.len().div_ceil(8))];
        if let Some(bytes) = bytes {
            bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        }
        let sequence = self.sequence;
        if let Some(hook) = &mut self.hook {
            hook(HopPoint { operation, sequence, hop: 0, hops: 1 });
        }
        let offer = Offer { operation, sequence, argument, total_bytes, words: Arc::new(words) };
        let result = self.meet(offer);
        if let Err(error) = &result {
            self.table.leave(self.rank);
            self.first_error = Some(error.clone());
        }
        result
    }

    fn meet(&self, offer: Offer) -> Result<Vec<Offer>> {
        let start = Instant::now();
        let mut round = self.table.lock();
        self.check_all_there(&round, &offer)?;
        // The round before may still be emptying.
        while round.laid[self.rank].is_some() {
            round = self.wait(round, start, &offer)?;
        }
        round.laid[self.rank] = Some(offer.clone());
        self.table.changed.notify_all();
        while !round.is_full() {
            round = self.wait(round, start, &offer)?;
        }

        let offers: Vec<Offer> = round.laid.iter().flatten().cloned().collect();
        round.taken += 1;
        if round.taken == offers.len() {
            round.taken = 0;
            round.laid.fill(None);
            self.table.changed.notify_all();
        }
        drop(round);
        self.agree(&offer, &offers)?;
        Ok(offers)
    }

    fn wait<'a>(
        &self,
        round: MutexGuard<'a, Round>,
        start: Instant,
        offer: &Offer,
    ) -> Result<MutexGuard<'a, Round>> {
        self.check_all_there(&round, offer)?;
        let Some(limit) = self.deadline else {
            return Ok(self.table.changed.wait(round).unwrap_or_else(PoisonError::into_inner));
        };
        let Some(left) = limit.checked_sub(start.elapsed()) else {
            let late = round.laid.iter().position(Option::is_none).unwrap_or(self.rank);
            let (operation, sequence) = (offer.operation, offer.sequence);
            return Err(Error::Deadline { peer: peer(late), operation, sequence, limit });
        };
        let (round, _) = self.table.changed.wait_timeout(round, left).unwrap_or_else(PoisonError::into_inner);
        Ok(round)
    }

    /// Fails when this member is aborted, or another will bring nothing more: then no round that is not
    /// full yet counts, also if that member laid something down before it left.
    fn check_all_there(&self, round: &Round, offer: &Offer) -> Result<()> {
        self.abort.check()?;
        let Some(lost) = round.gone.iter().position(|gone| *gone) else { return Ok(()) };
        Err(Error::PeerLost {
            peer: peer(lost),
            operation: offer.operation,
            sequence: offer.sequence,
            reason: "it left the generation".to_owned(),
        })
    }

    /// Checks that all make the same call.
    fn agree(&self, ours: &Offer, offers: &[Offer]) -> Result<()> {
        for (rank, theirs) in offers.iter().enumerate() {
            let (operation, sequence) = (ours.operation, ours.sequence);
            if (theirs.operation, theirs.sequence, theirs.argument) != (operation, sequence, ours.argument) {
                let found = format!("{} {} ({})", theirs.operation, theirs.sequence, theirs.argument);
                return Err(Error::Unexpected { peer: peer(rank), operation, sequence, found });
            }
            if theirs.total_bytes != ours.total_bytes {
                return Err(Error::LengthMismatch {
                    peer: peer(rank),
                    operation,
                    sequence,
                    ours_bytes: ours.total_bytes as u64,
                    theirs_bytes: theirs.total_bytes as u64,
                });
            }
        }
        Ok(())
    }
}

fn peer(rank: usize) -> String {
    format!("rank {rank}")
}

impl Collective for LocalCollective {
    fn rank(&self) -> u32 {
        self.rank as u32
    }

    fn world_size(&self) -> u32 {
        self.table.lock().laid.len() as u32
    }

    fn all_reduce_f32(&mut self, input: &[f32], output: &mut [f32]) -> Result<()> {
        check::same_length(input, output)?;
        let bytes: &[u8] = bytemuck::cast_slice(input);
        let offers = self.exchange(Operation::AllReduceF32, 0, bytes.len(), Some(bytes))?;
        let inputs: Vec<&[f32]> = offers.iter().map(|offer| bytemuck::cast_slice(offer.bytes())).collect();
        sum::sum_in_order(&inputs, output);
        Ok(())
    }

    fn all_reduce_u64(&mut self, values: &mut [u64]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let offers = self.exchange(Operation::AllReduceU64, 0, bytes.len(), Some(bytes))?;
        values.fill(0);
        for offer in &offers {
            for (value, word) in values.iter_mut().zip(offer.words.iter()) {
                *value = value.wrapping_add(*word);
            }
        }
        Ok(())
    }

    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        check::gathered_length(input, output, self.world_size())?;
        let offers = self.exchange(Operation::AllGather, 0, input.len(), Some(input))?;
        for (rank, offer) in offers.iter().enumerate() {
            output[rank * input.len()..][..input.len()].copy_from_slice(offer.bytes());
        }
        Ok(())
    }

    fn broadcast(&mut self, root: u32, buffer: &mut [u8]) -> Result<()> {
        check::root(root, self.world_size())?;
        let brought = (root as usize == self.rank).then_some(&*buffer);
        let offers = self.exchange(Operation::Broadcast, root, buffer.len(), brought)?;
        buffer.copy_from_slice(offers[root as usize].bytes());
        Ok(())
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn set_hop_hook(&mut self, hook: Option<HopHook>) {
        self.hook = hook;
    }

    fn set_call_deadline(&mut self, deadline: Option<Duration>) {
        self.deadline = deadline;
    }
}

impl Drop for LocalCollective {
    fn drop(&mut self) {
        self.table.leave(self.rank);
    }
}
