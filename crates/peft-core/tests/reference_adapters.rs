//! Logits, losses and every gradient of LoRA adapters beside those of Hugging Face PEFT.

#![allow(clippy::unwrap_used, reason = "a test that cannot set its scene should fail")]

mod memory;

use memory::{MemoryBase, Setup, assert_close, case, floats, padded_rows, reference, tensors, tolerance};
use shanty_peft_core::{NoSink, StepKey, adapter::AdapterFolder, plan::Recompute};

fn check(name: &str) {
    let path = format!("adapters/{name}/llama");
    let (case, folder) = (case(&path), reference(&path));
    let base = MemoryBase::load(&reference("models/llama"));
    let adapter = AdapterFolder::open(&folder.join("adapter")).unwrap();
    let fit = adapter.fit(&base.config).unwrap();
    let mut modules = fit.matched().modules();
    modules.sort();
    assert_eq!(serde_json::json!(modules), case["adapted_modules"]);
    let layout = fit.layout();
    let mut parameters = vec![0.0; layout.len()];
    adapter.read_into(layout, &mut parameters).unwrap();
    let expected = tensors(&folder.join("expected.safetensors"));
    let of = |name: &str| &expected[&format!("right.{name}")];
    let rows = padded_rows(of("input_ids"), of("attention_mask"), Some(of("labels")));

    for recompute in [Recompute::Never, Recompute::Layers] {
        let base = MemoryBase::load(&reference("models/llama"));
        let mut engine = Setup { recompute, ..Setup::new(Some(adapter.method().clone())) }.engine(base);
        let (vocabulary, columns) = (engine.config().vocabulary_size, of("input_ids").dims2().unwrap().1);
        for (index, row) in rows.iter().enumerate() {
            let got = engine.logits(Some(&parameters), std::slice::from_ref(&row.token_ids)).unwrap();
            let first = index * columns * vocabulary;
            let wanted = &floats(of("logits"))[first..first + got.len()];
            assert_close(&format!("{name} logits"), &got, wanted, tolerance(&case, "logits"));
        }
        let mut gradient = vec![0.0; layout.len()];
        let key = StepKey { seed: 1, step: 1 };
        let sum = engine.forward_backward(&parameters, &rows, key, &mut gradient, &mut NoSink).unwrap();
        assert_close("loss", &[sum.mean() as f32], &floats(of("loss")), tolerance(&case, "loss"));
        let mut compared = 0;
        for entry in layout.entries() {
            let wanted = floats(of(&format!("grad.{}", entry.peft_name)));
            let got: Vec<f32> =
                gradient[entry.range.clone()].iter().map(|sum_of| sum_of / sum.tokens as f32).collect();
            assert_close(
                &format!("{name} {recompute:?} {}", entry.peft_name),
                &got,
                &wanted,
                tolerance(&case, "grad"),
            );
            compared += 1;
        }
        let listed = expected.keys().filter(|name| name.starts_with("right.grad.")).count();
        assert_eq!(compared, listed, "every gradient of the reference is compared");
    }
}

#[test]
fn lora_on_queries_and_values() {
    check("lora_qv");
}

#[test]
fn lora_on_all_linear_layers() {
    check("lora_all_linear");
}

#[test]
fn rank_stabilised_lora() {
    check("rslora");
}

#[test]
fn lora_on_what_a_regular_expression_names() {
    check("lora_regex");
}
