//! After the first one, a step allocates nothing of its own.
//!
//! The `gemm` crate takes memory for packing inside each product and gives it back; such allocations are told
//! apart by [`shanty_peft_core::backend::cpu::in_product`].

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
};

use memory::{Random, reference};
use shanty_peft_core::{
    Engine, EngineOptions, NoSink, StepKey,
    adapter::{LoraConfig, TargetModules},
    backend::cpu::in_product,
    batch::Row,
    plan::Recompute,
    quant::Nf4Options,
};

struct Counting;

static ON: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);
static IN_PRODUCTS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ON.load(Relaxed) {
            if in_product() {
                IN_PRODUCTS.fetch_add(1, Relaxed);
            } else {
                COUNT.fetch_add(1, Relaxed);
                BYTES.fetch_add(layout.size(), Relaxed);
            }
        }
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_step_allocates_nothing_after_the_first() {
    for recompute in [Recompute::Never, Recompute::Layers] {
        let lora = LoraConfig {
            r: 4,
            lora_alpha: 8.0,
            lora_dropout: 0.1,
            target_modules: TargetModules::all_linear(),
            ..LoraConfig::default()
        };
        let options = EngineOptions {
            quantization: Some(Nf4Options::default()),
            adapter: Some(lora.shared()),
            threads: 2,
            recompute,
            micro_batch_rows: Some(4),
            ..EngineOptions::new(reference("models/llama"), 128)
        };
        let mut engine = Engine::load(options, &mut |_| {}).unwrap();
        let mut random = Random::new(1);
        let mut rows = |shift: u32| -> Vec<Row> {
            (0..4).map(|id| Row::whole(id, (0..128 - shift).map(|_| random.below(288)).collect())).collect()
        };
        let (first, second) = (rows(0), rows(9));
        let parameters = engine.initial_parameters(1).unwrap();
        let mut gradient = vec![0.0; parameters.len()];
        let mut step = |step: u64, rows: &[Row]| {
            engine
                .forward_backward(&parameters, rows, StepKey { seed: 1, step }, &mut gradient, &mut NoSink)
                .unwrap()
        };
        for warm in 0..3 {
            step(warm, &first);
        }
        ON.store(true, Relaxed);
        for number in 3..6 {
            step(number, &second);
        }
        ON.store(false, Relaxed);
        let (count, bytes, inside) =
            (COUNT.swap(0, Relaxed), BYTES.swap(0, Relaxed), IN_PRODUCTS.load(Relaxed));
        assert!(inside > 0, "the counter counts");
        // Handing a step to the pool may take a block of the pool's queue, once in 63 times.
        assert!(count <= 2 && bytes <= 4096, "{recompute:?}: {count} allocations of {bytes} bytes");
    }
}
