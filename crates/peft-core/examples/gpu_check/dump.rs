//! Hidden states and gradients of one batch, for other programs to compare: `gpu_check dump BASE ADAPTER IDS.json OUT f32|bf16|cpu
//! STEPS`; with the losses of as many training steps on it.

use std::{collections::BTreeMap, fs, path::PathBuf};

use safetensors::{Dtype, tensor::TensorView};
use shanty_peft_core::{
    Engine, EngineDevice, EngineOptions, NoSink, StepKey,
    backend::cuda::Precision,
    batch::Row,
    generate::LoadedAdapter,
    model::ModelConfig,
    optim::{AdamWOptions, FlatUpdate, Source, groups},
    plan::Recompute,
    quant::Nf4Options,
};

/// Losses of training steps: AdamW without decay, clipped to 1.
fn train(engine: &mut Engine, parameters: &[f32], rows: &[Row], steps: u64) -> Vec<f32> {
    let zeros = vec![0.0; parameters.len()];
    engine.begin(parameters, &zeros, &zeros).unwrap();
    let options = AdamWOptions { weight_decay: 0.0, ..AdamWOptions::default() };
    let step = |step| {
        let tokens = engine.accumulate(rows, StepKey { seed: 1, step }, &mut NoSink).unwrap();
        let groups = groups(&options, step, 1e-3, &[], parameters.len());
        let update =
            FlatUpdate { mean: 1.0 / tokens as f64, max_norm: 1.0, groups: &groups, source: Source::Own };
        (engine.update(&update).unwrap().loss / tokens as f64) as f32
    };
    (1..=steps).map(step).collect()
}

pub(crate) fn run(arguments: &[String]) {
    let [base, adapter, ids, out, precision, steps] = arguments else {
        panic!("dump takes BASE ADAPTER IDS.json OUT f32|bf16|cpu STEPS");
    };
    let device = match precision.as_str() {
        "f32" => EngineDevice::Cuda { index: 0, precision: Precision::F32 },
        "bf16" => EngineDevice::Cuda { index: 0, precision: Precision::Bf16 },
        "cpu" => EngineDevice::Cpu,
        other => panic!("no precision `{other}`"),
    };
    let ids: Vec<Vec<u32>> = serde_json::from_slice(&fs::read(ids).unwrap()).unwrap();
    let length = ids[0].len();
    let config = ModelConfig::load(&PathBuf::from(base)).unwrap();
    let loaded = LoadedAdapter::open(&PathBuf::from(adapter), &config).unwrap();
    let options = EngineOptions {
        quantization: Some(Nf4Options::default()),
        device,
        recompute: Recompute::Never,
        micro_batch_rows: Some(ids.len()),
        memory_limit: Some(64 << 30),
        ..EngineOptions::new(base, length)
    };
    let mut engine = Engine::load(options, &mut |_| {}).unwrap();
    engine.adapt(loaded.fit().clone());
    let rows: Vec<Row> = ids.iter().enumerate().map(|(id, ids)| Row::whole(id as u64, ids.clone())).collect();
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    let hidden = engine.hidden_states(Some(loaded.parameters()), &rows).unwrap();
    let hidden = hidden.expect("everything is kept");
    let columns = config.hidden_size;
    for (layer, numbers) in hidden.into_iter().enumerate() {
        tensors.insert(format!("hidden.{layer}"), (vec![numbers.len() / columns, columns], numbers));
    }
    let mut gradient = vec![0.0; loaded.parameters().len()];
    let key = StepKey { seed: 1, step: 1 };
    let parameters = loaded.parameters();
    let sum = engine.forward_backward(parameters, &rows, key, &mut gradient, &mut NoSink).unwrap();
    let scale = 1.0 / sum.tokens as f32;
    for entry in engine.layout().entries() {
        let numbers = gradient[entry.range.clone()].iter().map(|x| x * scale).collect();
        tensors.insert(entry.peft_name.clone(), (entry.shape.clone(), numbers));
    }
    tensors.insert("loss".to_owned(), (vec![1], vec![sum.mean() as f32]));
    let steps: u64 = steps.parse().unwrap();
    if steps > 0 {
        let curve = train(&mut engine, parameters, &rows, steps);
        tensors.insert("curve".to_owned(), (vec![curve.len()], curve));
    }
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, (shape, numbers))| (name, shape, numbers.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    fs::write(out, safetensors::serialize(views, None).unwrap()).unwrap();
    println!("loss {:.6}", sum.mean());
}
