//! From a base's files to the card: several threads read, hash and send; matrices are quantised there.
//!
//! Room for the whole base is reserved first, a layer in one allocation, so that too little memory is told before anything is
//! read. Then each thread takes one tensor after the other through two slots of pinned memory ([`Lane`]): the
//! host never holds more of the base than those, and what must stay with it.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
};

use half::bf16;
use safetensors::tensor::Dtype;

use super::{
    Cuda, DeviceError,
    base::{DeviceBase, Nf4Argument, PackedWeight, Shelf, Table as DeviceTable, dense_numbers, key},
    device::Device,
    held::{CardBase, HeldLayer, HeldNumbers, HeldTable},
    lane::{Lane, Nf4Place},
    memory::{DeviceMemory, Numbers, Registered},
    meter::{Meter, Vectors},
    ways::Ways,
};
use crate::{
    engine::SharedBase,
    error::Result,
    model::{
        LoadProgress, ModelConfig,
        resident::{
            Hashes, Table,
            plan::{BasePlan, LayerPlan, WeightPlan},
        },
        weights::{ModelFiles, Tensor},
    },
    quant::{
        Nf4Options,
        bitsandbytes::StoredWeight,
        double::{DYNAMIC_MAP, NESTED_BLOCK},
        nf4,
        packed::{PackedLayer, PackedShape, ScalesMut},
    },
};

/// What one thread does at a time.
enum Task<'a> {
    /// Reads a matrix and quantises it on the card.
    Quantise(&'a Tensor<'a>, Nf4Place),
    /// Reads a matrix that is quantised.
    Stored(&'a StoredWeight<'a>, Nf4Place),
    /// Reads numbers.
    Plain(&'a Tensor<'a>, u64, Numbers),
    /// Reads a matrix that is quantised, and widens it.
    Widen(&'a StoredWeight<'a>, u64, Numbers),
    /// Reads a table that stays with the host.
    Far(&'a Tensor<'a>),
}

/// What came of a task.
enum Made {
    Nothing,
    /// What double quantisation needs besides its bytes.
    Double {
        offset: f32,
        map: Box<[f32; 256]>,
    },
    Table(Table),
}

/// What threads tell the one that waits for them.
enum Word {
    Read(usize),
    Made(usize, Made),
    Failed(usize, crate::error::Error),
    Hashed(Hashes),
}

/// Where a matrix of the base lies.
enum Place {
    Packed(DeviceMemory, Nf4Place),
    Dense(DeviceMemory),
}

impl Cuda {
    /// Loads a folder's base onto the card, and its hash, as [`ResidentBase`] has it: the matrices lie on the card alone.
    /// `embedding_stays` keeps the embedding with the host, unless it is the head as well. `threads` is 0 for all.
    ///
    /// # Errors
    /// The folder is not a model of a known family or does not hold together, or memory is short.
    ///
    /// [`ResidentBase`]: crate::model::ResidentBase
    pub fn load_folder(
        &mut self,
        folder: &Path,
        nf4: Option<Nf4Options>,
        embedding_stays: bool,
        threads: usize,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(SharedBase, blake3::Hash)> {
        let config = ModelConfig::load(folder)?;
        let files = ModelFiles::open(folder)?;
        let plan = BasePlan::new(&files, &config, nf4)?;
        let (base, hash) = self.load_base(&config, &plan, embedding_stays, threads, u64::MAX, progress)?;
        Ok((Box::new(base), hash))
    }

    /// Loads a base onto the card, and what it is hashed to. `embedding_stays` keeps the embedding with the host, unless
    /// it is the head as well. `room` is what of the card's memory may be taken besides, for as long as loading takes.
    ///
    /// # Errors
    /// A file that cannot be read or is damaged, or memory that is short.
    pub(crate) fn load_base(
        &mut self,
        config: &ModelConfig,
        plan: &BasePlan<'_>,
        embedding_stays: bool,
        threads: usize,
        room: u64,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(CardBase, blake3::Hash)> {
        self.base = DeviceBase::default();
        let device = Arc::clone(&self.device);
        let mut base = DeviceBase::default();
        let mut meter = Meter::new(plan, progress);

        // Small vectors stay with the host as well: methods begin from some of them.
        let layers = plan.layers.iter().map(|layer| Vectors::read(layer, config, &mut meter));
        let layers: Vec<Vectors> = layers.collect::<Result<_>>()?;
        let final_norm = meter.norm(&plan.final_norm, config.norms_less_one)?;

        let mut tasks = Vec::new();
        let far = embedding_stays && plan.head.is_some();
        let mut shelf = Shelf::new(&device, [4 * final_norm.len()])?;
        base.vector(&mut shelf, &final_norm)?;
        let embedding = (!far).then(|| near(&device, &plan.embedding)).transpose()?;
        let head = plan.head.as_ref().map(|head| near(&device, head)).transpose()?;
        for (tensor, memory) in
            plan.head.iter().zip(&head).chain([&plan.embedding].into_iter().zip(&embedding))
        {
            tasks.push(Task::Plain(tensor, memory.address, memory.numbers));
        }
        if far {
            tasks.push(Task::Far(&plan.embedding));
        }
        let tables = tasks.len();
        let mut places = Vec::with_capacity(plan.layers.len());
        for (layer, vectors) in plan.layers.iter().zip(&layers) {
            places.push(reserve(&device, &mut base, config, layer, vectors, &mut tasks)?);
        }
        let map = base.map(&device, &DYNAMIC_MAP)?;
        // What is reserved is also cleared, by a stream that the threads do not wait for.
        device.settle()?;
        let made = run(&device, &tasks, map, ways(&tasks, threads, room), &mut meter)?;
        drop(tasks);
        let hash = meter.hashes.content_hash(config);

        let mut made = made.into_iter();
        let far_table = made.by_ref().take(tables).fold(None, |far, made| match made {
            Made::Table(table) => Some(table),
            _ => far,
        });
        let mut held_layers = Vec::with_capacity(layers.len());
        for (vectors, places) in layers.into_iter().zip(places) {
            let mut weights = Vec::with_capacity(places.len());
            for (place, made) in places.into_iter().zip(made.by_ref()) {
                weights.push(hold(&device, &mut base, place, made)?);
            }
            let Vectors { norms, biases } = vectors;
            held_layers.push(HeldLayer { norms, weights, biases });
        }
        let mut table = |tensor: &Tensor<'_>, memory: DeviceMemory| {
            let held = HeldNumbers::plain(&device, &memory);
            let bytes = (memory.numbers.bytes() * tensor.elements()) as u64;
            base.tables.insert(held.key(), DeviceTable::Near(memory));
            HeldTable::Near { held, rows: config.vocabulary_size, bytes }
        };
        let head = head.and_then(|memory| Some(table(plan.head.as_ref()?, memory)));
        let embedding = match (embedding, far_table) {
            (Some(memory), _) => table(&plan.embedding, memory),
            (None, Some(stays)) => {
                let (key, registered) = register(&device, &stays)?;
                base.tables.insert(key, DeviceTable::Far(registered));
                HeldTable::Far(stays)
            }
            (None, None) => {
                let what = "an embedding that was not read: a defect of the program".to_owned();
                return Err(DeviceError::Unsupported { what }.into());
            }
        };
        device.settle()?;
        self.base = base;
        let base = CardBase { config: config.clone(), layers: held_layers, embedding, final_norm, head };
        Ok((base, hash))
    }
}

/// Room for an embedding or head, as stored: bf16, or f32.
fn near(device: &Arc<Device>, tensor: &Tensor<'_>) -> Result<DeviceMemory, DeviceError> {
    let numbers = if tensor.dtype() == Dtype::BF16 { Numbers::Bf16 } else { Numbers::F32 };
    let bytes = numbers.bytes() * tensor.elements();
    Shelf::new(device, [bytes])?.take(bytes, numbers)
}

/// Bytes of the parts of an NF4 matrix: codes, scales of 8 bits, scales of f32.
fn parts(shape: &PackedShape) -> [usize; 3] {
    let numbers = shape.rows * shape.columns;
    let blocks = nf4::blocks(numbers, shape.options.block_size);
    let (scales, nested) = match shape.options.double {
        true => (blocks, 4 * blocks.div_ceil(NESTED_BLOCK)),
        false => (0, 4 * blocks),
    };
    [nf4::code_bytes(numbers), scales, nested]
}

/// Reserves a layer in one allocation, and puts its vectors there.
fn reserve<'a>(
    device: &Arc<Device>,
    base: &mut DeviceBase,
    config: &ModelConfig,
    plan: &'a LayerPlan<'a>,
    vectors: &Vectors,
    tasks: &mut Vec<Task<'a>>,
) -> Result<Vec<Place>> {
    let dense = dense_numbers(device);
    let elements = |index: usize| config.shape(config.projections()[index]).iter().product::<usize>();
    let mut sizes: Vec<usize> = vectors.all().map(size_of_val).collect();
    for (index, weight) in plan.weights.iter().enumerate() {
        match weight.packed() {
            Some(shape) => sizes.extend(parts(&shape)),
            None => sizes.push(dense.bytes() * elements(index)),
        }
    }
    let mut shelf = Shelf::new(device, sizes)?;
    for vector in vectors.all() {
        base.vector(&mut shelf, vector)?;
    }
    let mut places = Vec::with_capacity(plan.weights.len());
    for (index, weight) in plan.weights.iter().enumerate() {
        let Some(shape) = weight.packed() else {
            let memory = shelf.take(dense.bytes() * elements(index), dense)?;
            match weight {
                WeightPlan::Widen(stored) => tasks.push(Task::Widen(stored, memory.address, dense)),
                WeightPlan::Dense(tensor) | WeightPlan::Quantise(tensor, _) => {
                    tasks.push(Task::Plain(tensor, memory.address, dense));
                }
                WeightPlan::Stored(_) => {}
            }
            places.push(Place::Dense(memory));
            continue;
        };
        let [codes, scales, nested] = parts(&shape);
        let memory = shelf.take(codes, Numbers::F32)?;
        let scales = shelf.take(scales, Numbers::F32)?.address;
        let nested = shelf.take(nested, Numbers::F32)?.address;
        let scales = if shape.options.double { scales } else { 0 };
        let place = Nf4Place { shape, codes: memory.address, scales, nested };
        match weight {
            WeightPlan::Quantise(tensor, _) => tasks.push(Task::Quantise(tensor, place)),
            WeightPlan::Stored(stored) => tasks.push(Task::Stored(stored, place)),
            WeightPlan::Dense(_) | WeightPlan::Widen(_) => {}
        }
        places.push(Place::Packed(memory, place));
    }
    Ok(places)
}

/// How the tasks are shared out.
fn ways(tasks: &[Task<'_>], threads: usize, room: u64) -> Ways {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let count = if threads == 0 { cores } else { threads }.min(tasks.len());
    let (mut largest, mut blocks) = (0, 1);
    for task in tasks {
        let elements = task.elements();
        largest = largest.max(elements);
        if let Task::Quantise(_, place) = task {
            blocks = blocks.max(nf4::blocks(elements, place.shape.options.block_size));
        }
    }
    Ways::within(count, largest, blocks, room)
}

/// Runs all tasks, the first ones first: what came of each.
fn run(
    device: &Arc<Device>,
    tasks: &[Task<'_>],
    map: u64,
    ways: Ways,
    meter: &mut Meter<'_>,
) -> Result<Vec<Made>> {
    let lanes = (0..ways.count).map(|_| Lane::new(device, ways.slot, ways.blocks, map));
    let lanes: Vec<Lane> = lanes.collect::<Result<_, _>>()?;
    // The slots on the card are cleared before they are written to.
    device.settle()?;
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (next, stop) = (&next, &stop);
    let mut made: Vec<Option<Made>> = tasks.iter().map(|_| None).collect();
    let mut failure: Option<(usize, crate::error::Error)> = None;
    std::thread::scope(|scope| {
        let (say, heard) = mpsc::channel();
        for lane in lanes {
            let say = say.clone();
            scope.spawn(move || work(device, lane, tasks, next, stop, &say));
        }
        drop(say);
        for word in heard {
            match word {
                Word::Read(bytes) => meter.count(bytes),
                Word::Made(index, outcome) => made[index] = Some(outcome),
                Word::Hashed(hashes) => meter.hashes.join(hashes),
                Word::Failed(index, error) => {
                    if failure.as_ref().is_none_or(|(first, _)| index < *first) {
                        failure = Some((index, error));
                    }
                }
            }
        }
    });
    match failure {
        Some((_, error)) => Err(error),
        None => Ok(made.into_iter().map(|made| made.unwrap_or(Made::Nothing)).collect()),
    }
}

/// One thread: takes tasks until none is left or one failed.
fn work(
    device: &Device,
    mut lane: Lane,
    tasks: &[Task<'_>],
    next: &AtomicUsize,
    stop: &AtomicBool,
    say: &mpsc::Sender<Word>,
) {
    let mut hashes = Hashes::default();
    // Who listens outlives this thread.
    let tell = |word| drop(say.send(word));
    let fail = |index, error| {
        stop.store(true, Ordering::Relaxed);
        tell(Word::Failed(index, error));
    };
    if let Err(error) = device.bind() {
        return fail(0, error.into());
    }
    let mut last = 0;
    while !stop.load(Ordering::Relaxed) {
        let index = next.fetch_add(1, Ordering::Relaxed);
        let Some(task) = tasks.get(index) else { break };
        last = index;
        let mut see = |tensor: &Tensor<'_>, bytes: &[u8]| {
            hashes.see(tensor, bytes);
            tell(Word::Read(bytes.len()));
        };
        match task.run(&mut lane, &mut see) {
            Ok(made) => tell(Word::Made(index, made)),
            Err(error) => fail(index, error),
        }
    }
    if let Err(error) = lane.finish() {
        fail(last, error.into());
    }
    tell(Word::Hashed(hashes));
}

impl Task<'_> {
    /// Numbers that it is about.
    fn elements(&self) -> usize {
        match self {
            Self::Quantise(tensor, _) | Self::Plain(tensor, ..) | Self::Far(tensor) => tensor.elements(),
            Self::Stored(stored, _) | Self::Widen(stored, ..) => stored.shape().rows * stored.shape().columns,
        }
    }

    fn run(&self, lane: &mut Lane, see: &mut dyn FnMut(&Tensor<'_>, &[u8])) -> Result<Made> {
        match self {
            Self::Quantise(tensor, place) => {
                let offset = lane.quantise(tensor, *place, &mut |bytes| see(tensor, bytes))?;
                Ok(Made::Double { offset, map: Box::new(DYNAMIC_MAP) })
            }
            Self::Plain(tensor, to, numbers) => {
                lane.plain(tensor, *to, *numbers, &mut |bytes| see(tensor, bytes))?;
                Ok(Made::Nothing)
            }
            Self::Far(tensor) => Ok(Made::Table(Table::read(tensor, &mut |bytes| see(tensor, bytes))?)),
            Self::Stored(stored, place) => {
                let mut alone = PackedLayer::new(&[stored.shape()]);
                stored.read_into(&mut alone, 0, see)?;
                let parts = alone.parts_mut(0);
                lane.bytes(parts.codes, place.codes)?;
                match parts.scales {
                    ScalesMut::Plain(scales) => lane.bytes(bytemuck::cast_slice(scales), place.nested)?,
                    ScalesMut::Double { codes, nested } => {
                        lane.bytes(codes, place.scales)?;
                        lane.bytes(bytemuck::cast_slice(nested), place.nested)?;
                    }
                }
                Ok(match alone.view(0).scales() {
                    nf4::Scales::Double { offset, map, .. } => Made::Double { offset, map: Box::new(*map) },
                    nf4::Scales::Plain(_) => Made::Nothing,
                })
            }
            Self::Widen(stored, to, numbers) => {
                let mut alone = PackedLayer::new(&[stored.shape()]);
                stored.read_into(&mut alone, 0, see)?;
                let view = alone.view(0);
                let mut wide = vec![0.0; view.rows() * view.columns()];
                view.write_f32(0, &mut wide);
                lane.floats(&wide, *to, *numbers)?;
                Ok(Made::Nothing)
            }
        }
    }
}

/// Makes a matrix known to the card, and gives it the name that the layer loop asks by.
fn hold(
    device: &Arc<Device>,
    base: &mut DeviceBase,
    place: Place,
    made: Made,
) -> Result<Box<HeldNumbers>, DeviceError> {
    match place {
        Place::Dense(memory) => {
            let held = HeldNumbers::plain(device, &memory);
            base.dense.insert(held.key(), memory);
            Ok(held)
        }
        Place::Packed(memory, place) => {
            let double = place.shape.options.double;
            let (offset, map) = match made {
                Made::Double { offset, map } => (offset, map),
                _ => (0.0, Box::new(DYNAMIC_MAP)),
            };
            let argument = Nf4Argument {
                codes: place.codes,
                scales: place.scales,
                nested: place.nested,
                map: if double { base.map(device, &map)? } else { 0 },
                offset,
                block_shift: place.shape.options.block_size.trailing_zeros(),
                numbers: (place.shape.rows * place.shape.columns) as u64,
            };
            let held = HeldNumbers::packed(device, &memory, argument, map);
            base.packed.insert(held.key(), PackedWeight { _memory: vec![memory], argument });
            Ok(held)
        }
    }
}

/// Lets the card read a table where it is: by what it is found again.
fn register(device: &Arc<Device>, table: &Table) -> Result<(usize, Registered), DeviceError> {
    match table {
        Table::F32(data) => {
            Ok((key(data), Registered::new(device, bytemuck::cast_slice(data), Numbers::F32)?))
        }
        Table::Bf16(data) => {
            let data: &[bf16] = data;
            Ok((key(data), Registered::new(device, bytemuck::cast_slice(data), Numbers::Bf16)?))
        }
    }
}
