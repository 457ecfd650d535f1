//! The members that share one base with this worker: `parts` ranks in a row, of which each holds one part.
//!
//! They have a collective of their own, worked by a thread of its own, so that a layer travels while the one before computes. Everything
//! that goes over it goes in one order, the same at all members: layers as passes ask for them, and between micro-batches a
//! word on how to go on ([`Generation::round`]). A member without rows gathers the layers that the others need.
//!
//! When the generation is left, members finish the micro-batch that they are in, as others do, and stop at the same one. If one of them is
//! gone, or does not come to that point in [`GRACE`], the rest give up: what a micro-batch had added to a sum is then void with it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::{Duration, Instant},
};

use bytemuck::{Pod, Zeroable};
use shanty_collective::{
    AbortHandle, Collective, Compression,
    tcp::{JoinOptions, TcpCollective, Token},
};
use shanty_peft_core::{
    model::{LayerGather, ShardPart, ShardedBase, resident::ContentSum},
    quant::AlignedBytes,
};
use shanty_proto::v1::MemberPhase;
use tracing::info;

use crate::{Error, control::Control};

use super::{Stop, Surroundings, formation::Formation, job::Job, start::broken, step::Generation};

/// How long the others of a group may take to come to the end of a micro-batch once the generation is left.
const GRACE: Duration = Duration::from_secs(2);
/// How often a wait looks whether the generation is left.
const LOOK: Duration = Duration::from_millis(25);

/// What the thread is to do.
enum Order {
    Gather { layer: usize, own: Arc<AlignedBytes>, place: AlignedBytes },
    Exchange { own: Vec<u8>, members: usize },
    Broadcast { root: u32, bytes: Vec<u8> },
}

/// What came of it.
enum Done {
    Gathered(usize, AlignedBytes),
    Exchanged(Vec<u8>),
}

/// What trainer, base and thread share.
struct Shared {
    orders: Mutex<Sender<Order>>,
    inbox: Mutex<Inbox>,
    abort: AbortHandle,
    control: Arc<Control>,
    generation: u64,
}

struct Inbox {
    done: Receiver<Result<Done, shanty_collective::Error>>,
    /// Layers that came while another was waited for.
    layers: HashMap<usize, AlignedBytes>,
    failure: Option<shanty_collective::Error>,
    /// Since when the generation was known to be left.
    left: Option<Instant>,
}

/// This worker's end of its group. Dropped, it closes the collective.
pub(super) struct Group {
    shared: Arc<Shared>,
    part: usize,
    parts: usize,
}

/// Gives a base its layers, as long as the group is there.
struct Gather(Weak<Shared>);

/// What each member says to the others before the base is of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
struct Introduction {
    identity: [u8; 32],
    /// What it alone has read of the base.
    sum: ContentSum,
    means: u64,
    /// 1 where it knows the means of all scales.
    settled: u64,
}

/// Finds the others of this worker's group and agrees with them on the base; none where the base is not shared.
pub(super) fn join(
    around: &Surroundings,
    job: &mut Job,
    formation: &Formation,
) -> Result<Option<Group>, Stop> {
    let Some(base) = job.engine.shared_base() else { return Ok(None) };
    let ShardPart { part, parts } = base.part();
    let (rank, world) = (formation.rank as usize, formation.members.len());
    if !world.is_multiple_of(parts) || rank % parts != part {
        let reason = format!("rank {rank} of {world} is not the place of part {part} of {parts} of a base");
        return Err(Error::Protocol { message: "Form", reason }.into());
    }
    let number = rank / parts;
    let options = JoinOptions {
        job: format!("{}/group-{number}", job.plan.job_id),
        rank: u32::try_from(part).unwrap_or(u32::MAX),
        members: formation.members[number * parts..][..parts].to_vec(),
        token: Token(*blake3::keyed_hash(&formation.token, &number.to_le_bytes()).as_bytes()),
        compression: Compression::Off,
        ..formation.join_options(&job.plan.job_id, &job.plan.spec.cluster)
    };
    let abort = AbortHandle::new();
    let collective = connect(around, formation, &options, &abort)?;
    let control = Arc::clone(&around.control);
    let group = Group::start(Box::new(collective), abort, control, formation.generation)?;
    let hash = group.agree(around, formation, base)?;
    base.attach(Box::new(Gather(Arc::downgrade(&group.shared))));
    let memory = base.memory();
    info!(
        group = number,
        part,
        parts,
        linear_bytes = memory.linear_bytes,
        slot_bytes = memory.slot_bytes,
        embedding_bytes = memory.embedding_bytes,
        head_bytes = memory.head_bytes,
        "shares a base"
    );
    job.engine.agree_on_base(hash);
    group.start_together(around, job, formation)?;
    Ok(Some(group))
}

/// Joins the group's collective. That the generation is left ends the wait.
fn connect(
    around: &Surroundings,
    formation: &Formation,
    options: &JoinOptions,
    abort: &AbortHandle,
) -> Result<TcpCollective, Stop> {
    let (control, generation) = (&around.control, formation.generation);
    let joined = std::thread::scope(|scope| {
        let (over, ended) = channel::<()>();
        let ends = abort.clone();
        scope.spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(LOOK) {
                if control.check(generation).is_err() {
                    return ends.abort("the generation was left");
                }
            }
        });
        let joined = around.listener.join(options, abort.clone());
        drop(over);
        joined
    });
    joined.map_err(|error| broken(around, formation, &error))
}

impl Group {
    fn start(
        collective: Box<dyn Collective>,
        abort: AbortHandle,
        control: Arc<Control>,
        generation: u64,
    ) -> Result<Self, Error> {
        let (part, parts) = (collective.rank() as usize, collective.world_size() as usize);
        let (orders, ordered) = channel();
        let (doing, done) = channel();
        std::thread::Builder::new()
            .name("shard group".to_owned())
            .spawn(move || serve(collective, &ordered, &doing))
            .map_err(|source| Error::Process { what: "the thread of a shard group".to_owned(), source })?;
        let inbox = Inbox { done, layers: HashMap::new(), failure: None, left: None };
        let shared =
            Shared { orders: Mutex::new(orders), inbox: Mutex::new(inbox), abort, control, generation };
        Ok(Self { shared: Arc::new(shared), part, parts })
    }

    /// Why the group is of no use any more.
    pub(super) fn failure(&self) -> Option<shanty_collective::Error> {
        self.shared.inbox().failure.clone()
    }

    /// What all members say, by part.
    fn exchange(&self, own: &[u8]) -> Result<Vec<u8>, shanty_collective::Error> {
        self.shared.order(Order::Exchange { own: own.to_vec(), members: self.parts })?;
        self.shared.exchanged()
    }

    /// What one member says.
    fn broadcast(&self, root: usize, bytes: Vec<u8>) -> Result<Vec<u8>, shanty_collective::Error> {
        let root = u32::try_from(root).unwrap_or(u32::MAX);
        self.shared.order(Order::Broadcast { root, bytes })?;
        self.shared.exchanged()
    }

    /// Agrees with the others on the base: it must be of the same files, and its scales are quantised about the means of all parts. Returns
    /// the hash of the whole.
    fn agree(
        &self,
        around: &Surroundings,
        formation: &Formation,
        base: &mut ShardedBase,
    ) -> Result<blake3::Hash, Stop> {
        let failed = |error: shanty_collective::Error| broken(around, formation, &error);
        let differs = |donor: usize| Error::StateDiffers {
            step: formation.start.applied_step,
            donor: u32::try_from(donor).unwrap_or(u32::MAX),
            what: "the shared base that this worker loaded",
        };
        let own = Introduction {
            identity: *base.identity().as_bytes(),
            sum: base.own_sum(),
            means: base.means() as u64,
            settled: u64::from(base.is_settled()),
        };
        let said = self.exchange(bytemuck::bytes_of(&own)).map_err(failed)?;
        let all: Vec<Introduction> = read(&said);
        let same = |one: &Introduction| (one.identity, one.means) == (own.identity, own.means);
        if let Some(other) = all.iter().position(|one| !same(one)) {
            return Err(differs(other).into());
        }
        let means: Vec<f32> = match all.iter().position(|one| one.settled == 1) {
            Some(knows) => {
                let known = base.settled_means().unwrap_or_else(|| vec![0.0; base.means()]);
                let said = self.broadcast(knows, bytemuck::cast_slice(&known).to_vec()).map_err(failed)?;
                let said: Vec<f32> = read(&said);
                let bits = |means: &[f32]| means.iter().map(|mean| mean.to_bits()).collect::<Vec<_>>();
                if base.is_settled() && bits(&known) != bits(&said) {
                    return Err(differs(knows).into());
                }
                said
            }
            None => {
                // One after the other, in the order of the parts: so a whole base sums them.
                let mut sums = vec![0.0f64; base.means()];
                for part in 0..self.parts {
                    if part == self.part {
                        base.add_scales(&mut sums).map_err(|error| Error::part(&error))?;
                    }
                    let said = self.broadcast(part, bytemuck::cast_slice(&sums).to_vec()).map_err(failed)?;
                    sums = read(&said);
                }
                base.means_of(&sums).map_err(|error| Error::part(&error))?
            }
        };
        base.settle(&means).map_err(|error| Error::part(&error))?;
        let sums: Vec<ContentSum> = all.iter().map(|one| one.sum).collect();
        Ok(base.content_hash(&sums))
    }

    /// Makes the state before the first step where that reads the base: all gather its layers if one of them needs it.
    fn start_together(
        &self,
        around: &Surroundings,
        job: &mut Job,
        formation: &Formation,
    ) -> Result<(), Stop> {
        if !job.engine.start_reads_base() {
            return Ok(());
        }
        let needs = super::start::begins_afresh(job, &formation.start);
        let said = self.exchange(&[u8::from(needs)]).map_err(|error| broken(around, formation, &error))?;
        if !said.contains(&1) {
            return Ok(());
        }
        let made = match needs {
            true => job.start_afresh(),
            false => job.engine.initial_parameters(job.plan.spec.train.seed).map(drop),
        };
        made.map_err(|error| self.stop(around, formation, error))
    }

    /// Why an engine's error stops the generation: for the group's failure, if there was one.
    pub(super) fn stop(&self, around: &Surroundings, formation: &Formation, error: Error) -> Stop {
        match self.failure() {
            Some(failure) => broken(around, formation, &failure),
            None => error.into(),
        }
    }
}

impl Generation<'_> {
    /// Between micro-batches: whether one more is to be made, with rows if this worker has any. All members of a group get the same
    /// answer, so that each makes as many as the others.
    pub(super) fn round(&self, has_rows: bool) -> Result<bool, Stop> {
        let left = self.around.control.check(self.formation.generation);
        let Some(group) = &self.group else {
            left?;
            return Ok(has_rows);
        };
        let said = group.exchange(&[u8::from(has_rows), u8::from(left.is_err())]);
        let said = said.map_err(|error| broken(self.around, &self.formation, &error))?;
        let (words, _) = said.as_chunks::<2>();
        if words.iter().any(|[_, left]| *left == 1) {
            left?;
            return Err(Stop::Broken("another member of its group leaves the generation".to_owned()));
        }
        Ok(words.iter().any(|[has_rows, _]| *has_rows == 1))
    }

    /// Makes micro-batches without rows for as long as others of the group have some.
    pub(super) fn keep_company(&mut self, training: bool) -> Result<(), Stop> {
        while self.round(false)? {
            let kept = self.job.engine.keep_company(training);
            kept.map_err(|error| self.stop_for(error))?;
            self.around.control.advance();
        }
        Ok(())
    }

    /// Why an engine's error stops this generation.
    pub(super) fn stop_for(&self, error: Error) -> Stop {
        match &self.group {
            Some(group) => group.stop(self.around, &self.formation, error),
            None => error.into(),
        }
    }
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, order: Order) -> Result<(), shanty_collective::Error> {
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        match orders.send(order) {
            Ok(()) => Ok(()),
            Err(_) => Err(self.inbox().ended()),
        }
    }

    /// What the thread did next.
    fn next(&self, inbox: &mut Inbox) -> Result<Done, shanty_collective::Error> {
        if let Some(failure) = &inbox.failure {
            return Err(failure.clone());
        }
        let mut before = None;
        let came = loop {
            match inbox.done.recv_timeout(LOOK) {
                Ok(Ok(done)) => break done,
                Ok(Err(error)) => {
                    inbox.failure = Some(error.clone());
                    return Err(error);
                }
                Err(RecvTimeoutError::Disconnected) => return Err(inbox.ended()),
                Err(RecvTimeoutError::Timeout) => {
                    // That others take their time is nobody's fault here.
                    before.get_or_insert_with(|| {
                        let phase = self.control.phase().0;
                        self.control.set_phase(MemberPhase::Reducing);
                        phase
                    });
                    if self.control.check(self.generation).is_err() {
                        let left = *inbox.left.get_or_insert_with(Instant::now);
                        if left.elapsed() > GRACE {
                            self.abort.abort("the generation was left");
                        }
                    }
                }
            }
        };
        if let Some(before) = before {
            self.control.set_phase(before);
        }
        Ok(came)
    }

    fn exchanged(&self) -> Result<Vec<u8>, shanty_collective::Error> {
        let mut inbox = self.inbox();
        loop {
            match self.next(&mut inbox)? {
                Done::Exchanged(bytes) => return Ok(bytes),
                Done::Gathered(layer, place) => drop(inbox.layers.insert(layer, place)),
            }
        }
    }

    fn layer(&self, layer: usize) -> Result<AlignedBytes, shanty_collective::Error> {
        let mut inbox = self.inbox();
        loop {
            if let Some(place) = inbox.layers.remove(&layer) {
                return Ok(place);
            }
            if let Done::Gathered(layer, place) = self.next(&mut inbox)? {
                inbox.layers.insert(layer, place);
            }
        }
    }
}

impl Inbox {
    /// The thread has ended: with the failure that it told of, or for want of one.
    fn ended(&mut self) -> shanty_collective::Error {
        while let Ok(done) = self.done.try_recv() {
            if let Err(error) = done {
                self.failure.get_or_insert(error);
            }
        }
        let ended = || shanty_collective::Error::Broken { first: "the group's thread has ended".to_owned() };
        self.failure.get_or_insert_with(ended).clone()
    }
}

impl LayerGather for Gather {
    fn begin(&mut self, layer: usize, own: Arc<AlignedBytes>, place: AlignedBytes) {
        // What came of it is told by `finish`.
        if let Some(shared) = self.0.upgrade() {
            let _ = shared.order(Order::Gather { layer, own, place });
        }
    }

    fn finish(&mut self, layer: usize) -> Result<AlignedBytes, String> {
        let Some(shared) = self.0.upgrade() else { return Err("its group is gone".to_owned()) };
        shared.layer(layer).map_err(|error| error.to_string())
    }
}

/// Numbers as they travelled.
fn read<T: Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// The thread: carries out orders until one fails, or nobody gives any.
fn serve(
    mut collective: Box<dyn Collective>,
    orders: &Receiver<Order>,
    done: &Sender<Result<Done, shanty_collective::Error>>,
) {
    while let Ok(order) = orders.recv() {
        let came = match order {
            Order::Gather { layer, own, mut place } => {
                let bytes = own.len() * collective.world_size() as usize;
                let gathered = collective.all_gather(own.bytes(), &mut place.bytes_mut()[..bytes]);
                gathered.map(|()| Done::Gathered(layer, place))
            }
            Order::Exchange { own, members } => {
                let mut all = vec![0; own.len() * members];
                collective.all_gather(&own, &mut all).map(|()| Done::Exchanged(all))
            }
            Order::Broadcast { root, mut bytes } => {
                collective.broadcast(root, &mut bytes).map(|()| Done::Exchanged(bytes))
            }
        };
        let failed = came.is_err();
        if done.send(came).is_err() || failed {
            return;
        }
    }
}
