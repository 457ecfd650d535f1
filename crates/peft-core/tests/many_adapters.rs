//! Many adapters on one 4-bit base: each gives what it gives alone, and the base is there once.
#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ops::ControlFlow,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use common::reference;
use shanty_peft_core::{
    Engine, EngineOptions,
    adapter::{Fit, LoraConfig, SharedMethod, TargetModules, files},
    generate::{End, LoadedAdapter, Request, SamplingOptions},
    plan::Recompute,
    quant::Nf4Options,
    random,
};

/// Bytes that are in use.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
/// One test at a time: they share the count.
static ALONE: Mutex<()> = Mutex::new(());

// SAFETY: all work is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

const ADAPTERS: usize = 32;

fn example() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny-llama-14m")
}

/// An adapter whose every number is random, of one of several ranks and sets of modules.
fn write_adapter(folder: &Path, base: &Path, number: usize) {
    let targets = [&["q_proj", "v_proj"][..], &["gate_proj", "up_proj", "down_proj"], &["o_proj", "k_proj"]];
    let targets = targets[number % targets.len()].iter().map(|name| (*name).to_owned()).collect();
    let config = LoraConfig {
        r: [2, 4, 8, 5][number % 4],
        lora_alpha: 16.0,
        lora_dropout: 0.1,
        use_rslora: number.is_multiple_of(5),
        target_modules: TargetModules::Names(targets),
        ..LoraConfig::default()
    };
    let model = shanty_peft_core::model::ModelConfig::load(base).unwrap();
    let fit = config.fit(&model).unwrap();
    let layout = fit.layout();
    let mut parameters = vec![0.0; layout.len()];
    for entry in layout.entries() {
        let seed = number as u64 + 1;
        random::fill_uniform(seed, &entry.peft_name, 0.05, &mut parameters[entry.range.clone()]);
    }
    files::write(folder, &fit, &parameters, &[]).unwrap();
}

fn options(base: &Path, adapter: Option<SharedMethod>) -> EngineOptions {
    EngineOptions {
        quantization: Some(Nf4Options::default()),
        adapter,
        threads: 1,
        recompute: Recompute::Layers,
        micro_batch_rows: Some(1),
        ..EngineOptions::new(base, 32)
    }
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

#[test]
fn thirty_two_adapters_on_one_base_give_what_each_gives_alone() {
    let _alone = ALONE.lock().unwrap();
    let base = reference("models/llama");
    let place = tempfile::tempdir().unwrap();
    let folders: Vec<_> = (0..ADAPTERS).map(|number| place.path().join(format!("{number}"))).collect();
    folders.iter().enumerate().for_each(|(number, folder)| write_adapter(folder, &base, number));

    let mut shared = Engine::load(options(&base, None), &mut |_| {}).unwrap();
    let config = shared.config().clone();
    let adapters: Vec<_> =
        folders.iter().map(|folder| LoadedAdapter::open(folder, &config).unwrap()).collect();
    let ids = vec![vec![5, 17, 33, 120, 64, 7, 201, 9], vec![8, 40, 12, 99, 150, 31, 77, 260]];
    let request = Request {
        prompt: ids[0].clone(),
        options: SamplingOptions { max_tokens: 6, seed: 3, ..SamplingOptions::default() },
    };
    let mut all = Vec::new();
    // From the last to the first, and the bare base between them: nothing of one may stay for the next.
    let bare = bits(&shared.logits(None, &ids).unwrap());
    for (adapter, folder) in adapters.iter().zip(&folders).rev() {
        shared.adapt(adapter.fit().clone());
        let parameters = Some(adapter.parameters());
        let logits = bits(&shared.logits(parameters, &ids).unwrap());
        let text = shared
            .continue_all(parameters, std::slice::from_ref(&request), &mut |_, _| ControlFlow::Continue(()))
            .unwrap();
        assert_eq!(bits(&shared.logits(None, &ids).unwrap()), bare);
        shared.adapt(Fit::bare());
        assert_eq!(bits(&shared.logits(None, &ids).unwrap()), bare);

        let method = adapter.fit().method().cloned();
        let mut alone = Engine::load(options(&base, method), &mut |_| {}).unwrap();
        let mut parameters = vec![0.0; alone.layout().len()];
        let opened = shanty_peft_core::adapter::AdapterFolder::open(folder).unwrap();
        opened.read_into(alone.layout(), &mut parameters).unwrap();
        assert_eq!(bits(&alone.logits(Some(&parameters), &ids).unwrap()), logits, "{}", folder.display());
        let expected =
            alone
                .generate(Some(&parameters), &request.prompt, &request.options, &mut |_| {
                    ControlFlow::Continue(())
                })
                .unwrap();
        assert_eq!(text[0].tokens, expected);
        assert!(!all.contains(&logits) && logits != bare, "{} is like another", folder.display());
        all.push(logits);
    }
}

#[test]
fn the_base_is_in_memory_once() {
    let _alone = ALONE.lock().unwrap();
    let base = example();
    let place = tempfile::tempdir().unwrap();
    let folders: Vec<_> = (0..ADAPTERS).map(|number| place.path().join(format!("{number}"))).collect();
    folders.iter().enumerate().for_each(|(number, folder)| write_adapter(folder, &base, number));

    let before = live();
    let engine = Engine::load(options(&base, None), &mut |_| {}).unwrap();
    let base_bytes = engine.plan().base_bytes as usize;
    assert!(live() - before >= base_bytes, "the base is counted");
    let config = engine.config().clone();
    let loaded = live();
    let adapters: Vec<_> =
        folders.iter().map(|folder| LoadedAdapter::open(folder, &config).unwrap()).collect();
    let (grown, numbers) = (live() - loaded, adapters.iter().map(LoadedAdapter::memory_bytes).sum::<usize>());
    // Names and places of tensors come on top of the numbers: well under 1 KiB a tensor.
    let tensors: usize = adapters.iter().map(|adapter| adapter.fit().layout().entries().len()).sum();
    assert!(
        (numbers..numbers + 1024 * tensors).contains(&grown),
        "32 adapters of {numbers} bytes in {tensors} tensors took {grown}"
    );
    assert!(numbers < base_bytes, "one more base would show");
    drop(engine);
}

#[test]
fn prompts_of_several_lengths_go_on_together_as_each_does_alone() {
    let _alone = ALONE.lock().unwrap();
    let base = reference("models/llama");
    let place = tempfile::tempdir().unwrap();
    write_adapter(place.path(), &base, 1);
    let mut engine = Engine::load(options(&base, None), &mut |_| {}).unwrap();
    let adapter = LoadedAdapter::open(place.path(), engine.config()).unwrap();
    engine.adapt(adapter.fit().clone());
    let greedy = SamplingOptions { temperature: 0.0, max_tokens: 10, ..SamplingOptions::default() };
    let request = |prompt: &[u32], options: &SamplingOptions| Request {
        prompt: prompt.to_vec(),
        options: options.clone(),
    };
    let mut requests = vec![
        request(&[5, 17, 33, 120, 64, 7, 201, 9], &greedy),
        request(&[8], &greedy),
        request(&[40, 12, 99], &SamplingOptions { max_tokens: 3, ..greedy.clone() }),
        request(&[150, 31, 77, 260, 3], &SamplingOptions { temperature: 1.0, seed: 9, ..greedy.clone() }),
        request(&[1; 256], &greedy),
        request(&[1; 250], &greedy),
    ];
    let mut alone = |request: &Request| {
        let requests = std::slice::from_ref(request);
        engine
            .continue_all(Some(adapter.parameters()), requests, &mut |_, _| ControlFlow::Continue(()))
            .unwrap()
            .remove(0)
    };
    // A stop token in the middle of what the second would say.
    let stop = alone(&requests[1]).tokens[4];
    requests[1].options.stop_ids = vec![stop];
    let expected: Vec<_> = requests.iter().map(&mut alone).collect();
    let mut heard = vec![Vec::new(); requests.len()];
    let together = engine
        .continue_all(Some(adapter.parameters()), &requests, &mut |index, token| {
            heard[index].push(token);
            ControlFlow::Continue(())
        })
        .unwrap();
    // Logits of a random model lie far apart compared with what a product of other sizes may round.
    assert_eq!(together, expected);
    assert_eq!(heard, together.iter().map(|end| end.tokens.clone()).collect::<Vec<_>>());
    assert_eq!(together[1].end, End::Stop(stop));
    assert_eq!((together[2].tokens.len(), together[2].end), (3, End::Limit));
    assert_eq!((together[4].tokens.len(), together[4].end), (0, End::Context));
    assert_eq!((together[5].tokens.len(), together[5].end), (6, End::Context));
}

#[test]
fn who_listens_may_end_one_of_several() {
    let _alone = ALONE.lock().unwrap();
    let mut engine = Engine::load(options(&reference("models/llama"), None), &mut |_| {}).unwrap();
    let options = SamplingOptions { temperature: 0.0, max_tokens: 5, ..SamplingOptions::default() };
    let requests: Vec<_> =
        (1..4).map(|id| Request { prompt: vec![id, 40 + id], options: options.clone() }).collect();
    let ends = engine
        .continue_all(None, &requests, &mut |index, _| match index {
            1 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
        .unwrap();
    assert_eq!(ends.iter().map(|end| end.tokens.len()).collect::<Vec<_>>(), [5, 1, 5]);
    assert_eq!(ends[1].end, End::Asked);
}
