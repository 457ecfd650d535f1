//! Logits, losses and every gradient of adapters beside those of Hugging Face PEFT.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use memory::{
    MemoryBase, Setup, assert_close, case, floats, integers, padded_rows, reference, tensors, tolerance,
};
use shanty_peft_core::{NoSink, StepKey, adapter::AdapterFolder, plan::Recompute};

fn check(name: &str, model: &str) {
    let path = format!("adapters/{name}/{model}");
    let (case, folder) = (case(&path), reference(&path));
    let base = || MemoryBase::load(&reference(&format!("models/{model}")));
    let adapter = AdapterFolder::open(&folder.join("adapter")).unwrap();
    let config = base().config;
    let fit = adapter.fit(&config).unwrap();
    let mut modules = fit.matched().modules();
    modules.sort();
    assert_eq!(serde_json::json!(modules), case["adapted_modules"], "{path}");
    let layout = fit.layout();
    let mut parameters = vec![0.0; layout.len()];
    adapter.read_into(layout, &mut parameters).unwrap();
    let expected = tensors(&folder.join("expected.safetensors"));
    for side in ["right", "left"] {
        let of = |name: &str| expected.get(&format!("{side}.{name}"));
        let Some(logits) = of("logits") else { continue };
        let (ids, mask) = (of("input_ids").unwrap(), of("attention_mask").unwrap());
        let mut engine = Setup::new(Some(adapter.method().clone())).engine(base());
        let (vocabulary, columns) = (engine.config().vocabulary_size, ids.dims2().unwrap().1);
        let mask_numbers = integers(mask);
        for (index, row) in padded_rows(ids, mask, of("labels")).iter().enumerate() {
            let got = engine.logits(Some(&parameters), std::slice::from_ref(&row.token_ids)).unwrap();
            let own = &mask_numbers[index * columns..(index + 1) * columns];
            let first = index * columns + own.iter().position(|m| *m != 0).unwrap();
            let wanted = &floats(logits)[first * vocabulary..][..got.len()];
            assert_close(&format!("{path} {side} logits"), &got, wanted, tolerance(&case, "logits"));
        }
    }
    let of = |name: &str| &expected[&format!("right.{name}")];
    let rows = padded_rows(of("input_ids"), of("attention_mask"), Some(of("labels")));
    for recompute in [Recompute::Never, Recompute::Layers] {
        let setup = Setup { recompute, ..Setup::new(Some(adapter.method().clone())) };
        let mut engine = setup.engine(base());
        let mut gradient = vec![0.0; layout.len()];
        let key = StepKey { seed: 1, step: 1 };
        let sum = engine.forward_backward(&parameters, &rows, key, &mut gradient, &mut NoSink).unwrap();
        assert_close(&path, &[sum.mean() as f32], &floats(of("loss")), tolerance(&case, "loss"));
        let mut compared = 0;
        for entry in layout.entries().iter().filter(|entry| !entry.range.is_empty()) {
            let wanted = floats(of(&format!("grad.{}", entry.peft_name)));
            let got: Vec<f32> =
                gradient[entry.range.clone()].iter().map(|sum_of| sum_of / sum.tokens as f32).collect();
            let what = format!("{path} {recompute:?} {}", entry.peft_name);
            assert_close(&what, &got, &wanted, tolerance(&case, "grad"));
            compared += 1;
        }
        let has_numbers = |name: &&String| expected[*name].elem_count() > 0;
        let listed = expected.keys().filter(|name| name.starts_with("right.grad.")).filter(has_numbers);
        assert_eq!(compared, listed.count(), "{path}: every gradient of the reference is compared");
    }
}

macro_rules! cases {
    ($($name:ident),+) => {
        $(
            #[test]
            fn $name() {
                for model in ["llama", "qwen2"] {
                    check(stringify!($name), model);
                }
            }
        )+
    };
}

cases!(
    lora_qv,
    lora_all_linear,
    rslora,
    lora_regex,
    lora_patterns,
    lora_layers,
    lora_bias_only,
    lora_modules_to_save,
    lora_loose_file,
    dora,
    ia3,
    adalora,
    adalora_pruned
);
