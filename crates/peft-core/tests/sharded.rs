//! A base in parts: every number of it, every loss and every gradient is that of the whole base, bit for bit, and a member holds no more
//! than it should.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::{
    collections::VecDeque,
    path::Path,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
};

use half::bf16;
use memory::{MemoryBase, Random, bits, lora, reference};
use safetensors::tensor::{Dtype, TensorView};
use shanty_peft_core::{
    Engine, EngineOptions, Error, NoSink, StepKey,
    adapter::TargetModules,
    batch::{Row, Segment},
    model::{BaseSource, LayerGather, MemoryUse, ModelConfig, ResidentBase, ShardPart, ShardedBase},
    quant::{AlignedBytes, Nf4Options},
};

/// A layer's number, and one member's part of its bytes.
type Part = (usize, Arc<AlignedBytes>);

/// A member's end of a group in this process: parts travel through channels.
struct Channels {
    rank: usize,
    to: Vec<Option<Sender<Part>>>,
    from: Mutex<Vec<Option<Receiver<Part>>>>,
    begun: VecDeque<(usize, Arc<AlignedBytes>, AlignedBytes)>,
    done: Vec<(usize, AlignedBytes)>,
}

fn channels(members: usize) -> Vec<Channels> {
    let mut ends: Vec<Channels> = (0..members)
        .map(|rank| Channels {
            rank,
            to: (0..members).map(|_| None).collect(),
            from: Mutex::new((0..members).map(|_| None).collect()),
            begun: VecDeque::new(),
            done: Vec::new(),
        })
        .collect();
    for from in 0..members {
        for to in (0..members).filter(|to| *to != from) {
            let (sender, receiver) = channel();
            ends[from].to[to] = Some(sender);
            ends[to].from.lock().unwrap()[from] = Some(receiver);
        }
    }
    ends
}

impl LayerGather for Channels {
    fn begin(&mut self, layer: usize, own: Arc<AlignedBytes>, place: AlignedBytes) {
        for to in self.to.iter().flatten() {
            let _ = to.send((layer, Arc::clone(&own)));
        }
        self.begun.push_back((layer, own, place));
    }

    fn finish(&mut self, layer: usize) -> Result<AlignedBytes, String> {
        loop {
            if let Some(at) = self.done.iter().position(|(of, _)| *of == layer) {
                return Ok(self.done.swap_remove(at).1);
            }
            let (next, own, mut place) = self.begun.pop_front().ok_or("it was not begun")?;
            let length = own.len();
            let from = self.from.lock().unwrap();
            for (rank, from) in from.iter().enumerate() {
                let part = match from {
                    None => Arc::clone(&own),
                    Some(from) => {
                        let (of, part) = from.recv().map_err(|_| format!("member {rank} is gone"))?;
                        assert_eq!(of, next, "members {rank} and {} gather different layers", self.rank);
                        part
                    }
                };
                place.bytes_mut()[rank * length..][..length].copy_from_slice(part.bytes());
            }
            drop(from);
            self.done.push((next, place));
        }
    }
}

fn load(folder: &Path, nf4: Option<Nf4Options>, part: usize, parts: usize) -> ShardedBase {
    ShardedBase::load(folder, &[], nf4, ShardPart { part, parts }, &mut |_| {}).unwrap()
}

/// Loads all parts, and has their members agree.
fn agreed(folder: &Path, nf4: Option<Nf4Options>, parts: usize) -> Vec<ShardedBase> {
    let mut members: Vec<ShardedBase> = (0..parts).map(|part| load(folder, nf4, part, parts)).collect();
    if !members[0].is_settled() {
        let mut sums = vec![0.0; members[0].means()];
        members.iter().for_each(|member| member.add_scales(&mut sums).unwrap());
        let means = members[0].means_of(&sums).unwrap();
        members.iter_mut().for_each(|member| member.settle(&means).unwrap());
    }
    members
}

fn group(folder: &Path, nf4: Option<Nf4Options>, parts: usize) -> Vec<ShardedBase> {
    let mut members = agreed(folder, nf4, parts);
    for (member, ends) in members.iter_mut().zip(channels(parts)) {
        member.attach(Box::new(ends));
    }
    members
}

/// Runs `work` for each member at the same time.
fn together<T: Send, R: Send>(members: Vec<T>, work: impl Fn(usize, T) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> =
            members.into_iter().enumerate().map(|(rank, one)| scope.spawn(move || work(rank, one))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// All numbers of a base's layers, layer by layer.
fn numbers(base: &mut dyn BaseSource) -> Vec<Vec<u32>> {
    let config = base.config().clone();
    (0..config.layers)
        .map(|layer| {
            if layer + 1 < config.layers {
                base.prefetch(layer + 1);
            }
            let weights = base.layer(layer).unwrap();
            let mut all: Vec<u32> = weights.norms().flat_map(bits).collect();
            for projection in config.projections() {
                let linear = weights.linear(*projection);
                let mut numbers = vec![f32::NAN; linear.weight.rows() * linear.weight.columns()];
                linear.weight.write_f32(&mut numbers);
                all.extend(bits(&numbers));
                all.extend(linear.bias.iter().flat_map(|bias| bits(bias)));
            }
            all
        })
        .collect()
}

fn table(base: &dyn BaseSource) -> Vec<u32> {
    let mut all = Vec::new();
    for view in [base.embedding(), base.head()] {
        let mut numbers = vec![f32::NAN; view.rows() * view.columns()];
        view.rows_f32(0..view.rows(), &mut numbers);
        all.extend(bits(&numbers));
    }
    all.extend(bits(base.final_norm()));
    all
}

/// Writes a base as Hugging Face would, its numbers as bf16.
fn save(base: &MemoryBase, folder: &Path, text: &str) {
    std::fs::write(folder.join("config.json"), text).unwrap();
    let stored: Vec<(String, Vec<usize>, Vec<u8>)> = base
        .tensors
        .iter()
        .map(|(name, numbers)| {
            let mut all = base.config.projections().iter().copied();
            let columns = match all.find(|p| name.ends_with(&format!(".{}.weight", p.name()))) {
                Some(projection) => base.config.shape(projection)[1],
                None if name.contains("norm") || name.ends_with("bias") => numbers.len(),
                None => base.config.hidden_size,
            };
            let shape = match numbers.len() / columns {
                1 if name.contains("norm") || name.ends_with("bias") => vec![columns],
                rows => vec![rows, columns],
            };
            let bytes = numbers.iter().flat_map(|number| bf16::from_f32(*number).to_le_bytes()).collect();
            (name.clone(), shape, bytes)
        })
        .collect();
    let views = stored
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

fn random_base(folder: &Path, text: &str) {
    let config = ModelConfig::from_json(text.as_bytes(), "config.json".as_ref()).unwrap();
    save(&MemoryBase::random(config, 5), folder, text);
}

/// Rows of a matrix are no multiple of a block, and matrices no multiple of a unit.
const ODD: &str = r#"{"model_type": "qwen2", "vocab_size": 97, "hidden_size": 200, "intermediate_size": 328,
    "num_hidden_layers": 3, "num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 20, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": false}"#;

/// 64 layers of 36 units each: a quarter of a layer is nine.
const DEEP: &str = r#"{"model_type": "llama", "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": false}"#;

#[test]
fn every_number_of_a_base_in_parts_is_that_of_the_whole() {
    let odd = tempfile::tempdir().unwrap();
    random_base(odd.path(), ODD);
    let stored = |case: &str| reference(case).join("model");
    let plain = Nf4Options { double: false, ..Nf4Options::default() };
    let small = Nf4Options { block_size: 32, double: true };
    let cases = [
        (odd.path().to_owned(), Nf4Options::default()),
        (odd.path().to_owned(), plain),
        (odd.path().to_owned(), small),
        (stored("nf4/checkpoint_double"), Nf4Options::default()),
        (stored("nf4/checkpoint_plain"), Nf4Options::default()),
        (reference("models/llama_tied"), Nf4Options::default()),
    ];
    for (folder, nf4) in cases {
        let mut whole = ResidentBase::load(&folder, Some(nf4), &mut |_| {}).unwrap();
        let (expected, tables) = (numbers(&mut whole), table(&whole));
        for parts in [2, 3, 4] {
            let members = group(&folder, Some(nf4), parts);
            let identities: Vec<_> = members.iter().map(ShardedBase::identity).collect();
            assert!(identities.iter().all(|identity| *identity == identities[0]));
            let sums: Vec<_> = members.iter().map(ShardedBase::own_sum).collect();
            assert_eq!(members[0].content_hash(&sums), whole.content_hash(), "{}", folder.display());
            let planned = MemoryUse::plan_shared(&folder, Some(nf4), parts).unwrap();
            for member in &members {
                assert_eq!(member.memory(), planned, "{parts} parts of {}", folder.display());
                assert_eq!(member.planned_memory(), planned);
            }
            let found = together(members, |_, mut member| (numbers(&mut member), table(&member)));
            for (found, found_tables) in found {
                assert!(found == expected, "{parts} parts of {}", folder.display());
                assert!(found_tables == tables);
            }
        }
    }
}

fn options(folder: &Path, shard: Option<ShardPart>) -> EngineOptions {
    EngineOptions {
        quantization: Some(Nf4Options::default()),
        adapter: Some(lora(TargetModules::all_linear(), 4, 2.0, 0.1).shared()),
        threads: 1,
        micro_batch_rows: Some(2),
        shard,
        ..EngineOptions::new(folder, 32)
    }
}

/// An engine that holds one part, and whose members agreed.
fn shared_engines(folder: &Path, parts: usize) -> Vec<Engine> {
    let load = |part| Engine::load(options(folder, Some(ShardPart { part, parts })), &mut |_| {}).unwrap();
    let mut engines: Vec<Engine> = (0..parts).map(load).collect();
    let mut sums = vec![0.0; engines[0].shared_base().unwrap().means()];
    for engine in &mut engines {
        engine.shared_base().unwrap().add_scales(&mut sums).unwrap();
    }
    let means = engines[0].shared_base().unwrap().means_of(&sums).unwrap();
    for (engine, ends) in engines.iter_mut().zip(channels(parts)) {
        let base = engine.shared_base().unwrap();
        base.settle(&means).unwrap();
        base.attach(Box::new(ends));
    }
    engines
}

/// Two micro-batches of a member, from rows of its own.
fn batches(rank: usize) -> [Vec<Row>; 2] {
    let mut random = Random::new(100 + rank as u64);
    let mut ids = |count: usize| (0..count).map(|_| random.below(96)).collect::<Vec<u32>>();
    let packed = vec![Segment { sample_id: 50, length: 9 }, Segment { sample_id: 51, length: 13 }];
    let row = Row { id: 1, token_ids: ids(22), segments: packed, trained: vec![4..9, 12..22] };
    [vec![Row::whole(0, ids(30)), row], vec![Row::whole(2, ids(17))]]
}

/// Losses and gradient of a member's micro-batches, then a loss without a gradient.
fn passes(engine: &mut Engine, rank: usize) -> (Vec<u64>, Vec<u32>) {
    let mut random = Random::new(8);
    let parameters = random.numbers(engine.layout().len(), 0.1);
    let mut gradient = vec![0.0; engine.layout().len()];
    let mut losses = Vec::new();
    let batches = batches(rank);
    for (step, rows) in batches.iter().enumerate() {
        let key = StepKey { seed: 3, step: 1 + step as u64 };
        let sum = engine.forward_backward(&parameters, rows, key, &mut gradient, &mut NoSink).unwrap();
        losses.push(sum.loss.to_bits());
    }
    losses.push(engine.evaluate(&parameters, &batches[0]).unwrap().loss.to_bits());
    (losses, bits(&gradient))
}

/// The bar: of 64 layers, four members hold at most 30 % each, the two places for whole layers included; and train the same bits.
#[test]
fn four_members_of_a_deep_base_hold_a_quarter_each_and_train_the_bits_of_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    random_base(folder.path(), DEEP);
    let file = std::fs::metadata(folder.path().join("model.safetensors")).unwrap().len();
    let mut read = 0;
    let part = ShardPart { part: 1, parts: 4 };
    let nf4 = Some(Nf4Options::default());
    ShardedBase::load(folder.path(), &[], nf4, part, &mut |progress| read = progress.done_bytes).unwrap();
    // Norms, embedding and head are read whole: here 0.4 % of the file.
    assert!(read * 100 < file * 26, "{read} of {file} bytes were read for a quarter of the base");

    let mut whole = Engine::load(options(folder.path(), None), &mut |_| {}).unwrap();
    let expected: Vec<_> = (0..3).map(|rank| passes(&mut whole, rank)).collect();
    let replicated = MemoryUse::plan(folder.path(), nf4).unwrap();
    drop(whole);

    let found = together(shared_engines(folder.path(), 4), |rank, mut engine| {
        if rank == 3 {
            // The last has no rows: it gathers what the others need.
            for training in [true, true, false] {
                engine.keep_company(training).unwrap();
            }
            return (None, engine.shared_base().unwrap().memory(), 0);
        }
        let passed = passes(&mut engine, rank);
        let base = engine.shared_base().unwrap();
        (Some(passed), base.memory(), base.gathered_layers())
    });
    for (rank, (passed, memory, gathered)) in found.into_iter().enumerate() {
        let packed = memory.linear_bytes + memory.slot_bytes;
        let share = packed as f64 / replicated.linear_bytes as f64;
        assert!(share <= 0.30, "member {rank} holds {:.1} % of the replicated layers", 100.0 * share);
        assert_eq!(memory.embedding_bytes, replicated.embedding_bytes, "reported apart");
        assert_eq!(memory.head_bytes, replicated.head_bytes, "reported apart");
        if let Some(passed) = passed {
            assert!(passed == expected[rank], "member {rank} computed other bits");
            // 64 up and 62 down the first time; then 62 each, and once more up alone.
            assert_eq!(gathered, 64 + 62 + 62 + 62 + 62);
        }
    }
}

#[test]
fn a_member_that_is_gone_is_an_error_and_no_hang() {
    let folder = tempfile::tempdir().unwrap();
    random_base(folder.path(), ODD);
    let mut members = group(folder.path(), Some(Nf4Options::default()), 3);
    members.truncate(2);
    let found = together(members, |_, mut member| member.layer(0).map(drop));
    for outcome in found {
        let problem = match outcome {
            Err(Error::NotGathered { layer: 0, problem }) => problem,
            other => panic!("{other:?}"),
        };
        assert!(problem.contains("gone"), "{problem}");
    }
}

/// What replaces a lost member reads its part and is told the means by one that knows them; the others keep what they have.
#[test]
fn a_member_that_comes_later_takes_the_means_that_the_others_have() {
    let folder = tempfile::tempdir().unwrap();
    random_base(folder.path(), ODD);
    let nf4 = Some(Nf4Options::default());
    let expected = numbers(&mut ResidentBase::load(folder.path(), nf4, &mut |_| {}).unwrap());
    let mut members = agreed(folder.path(), nf4, 3);
    let mut late = load(folder.path(), nf4, 1, 3);
    assert!(!late.is_settled() && late.settled_means().is_none());
    late.settle(&members[2].settled_means().unwrap()).unwrap();
    members[1] = late;
    for (member, ends) in members.iter_mut().zip(channels(3)) {
        member.attach(Box::new(ends));
    }
    for found in together(members, |_, mut member| numbers(&mut member)) {
        assert!(found == expected);
    }
}

#[test]
fn what_cannot_be_shared_says_so() {
    let dense = ShardedBase::load(
        &reference("models/llama"),
        &[],
        None,
        ShardPart { part: 0, parts: 2 },
        &mut |_| {},
    );
    assert!(matches!(dense, Err(Error::ShardNeedsNf4 { .. })));
    let folder = tempfile::tempdir().unwrap();
    random_base(folder.path(), ODD);
    let mut alone = load(folder.path(), Some(Nf4Options::default()), 0, 2);
    assert!(matches!(alone.layer(0), Err(Error::NotGathered { layer: 0, .. })), "nobody has agreed on it");
    alone.settle(&vec![0.1; alone.means()]).unwrap();
    assert!(matches!(alone.layer(0), Err(Error::NotGathered { layer: 0, .. })), "it belongs to no group");
}

/// The plan weighs what engines hold: a worker of each number of parts takes what was said of it, to the byte.
#[test]
fn the_choice_weighs_what_members_hold() {
    let folder = tempfile::tempdir().unwrap();
    random_base(folder.path(), DEEP);
    let mut engines = shared_engines(folder.path(), 2);
    let estimate = |shard| Engine::estimate(&options(folder.path(), shard)).unwrap();
    let of_two = estimate(Some(ShardPart { part: 0, parts: 2 }));
    assert_eq!(of_two.plan.base_bytes, engines[0].shared_base().unwrap().memory().total_bytes() as u64);
    assert_eq!(of_two.plan, *engines[1].plan());
    let choose = |limit: u64| {
        let options = EngineOptions { memory_limit: Some(limit), ..options(folder.path(), None) };
        Engine::choose_share(&options, 4).unwrap()
    };
    let roomy = choose(1 << 40);
    assert_eq!(roomy.parts, 1, "{}", roomy.reason);
    let whole = roomy.options[0].worker_bytes;
    let tight = choose(whole - 1);
    assert_eq!(tight.parts, 2, "{}", tight.reason);
    let two = tight.options[1].worker_bytes;
    assert!(two < whole && tight.reason.contains("2 workers share one"), "{}", tight.reason);
    assert_eq!(choose(two - 1).parts, 4);
    assert_eq!(choose(1).parts, 4, "{}", choose(1).reason);
}
