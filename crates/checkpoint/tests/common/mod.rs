//! Checkpoints to test with.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};

use bytes::Bytes;
use shanty_checkpoint::{Blocking, Keep, Key, Optimizer, Snapshot, State, Store};

/// A store in a folder that goes away with the guard.
pub fn store() -> (tempfile::TempDir, Blocking) {
    let folder = tempfile::tempdir().unwrap();
    let store = Blocking::new(open(folder.path())).unwrap();
    (folder, store)
}

pub fn open(folder: &Path) -> Store {
    Store::open(folder.to_str().unwrap()).unwrap()
}

pub fn key(step: u64, attempt: u32, generation: u64) -> Key {
    Key { attempt, step, generation }
}

/// A snapshot whose content depends on its key.
pub fn snapshot(key: Key) -> Snapshot {
    let numbers = |factor: f32| (0..1000).map(|i| (i as f32 - 500.0) * factor + key.step as f32).collect();
    Snapshot {
        job: "pirate-1".to_owned(),
        key,
        files: vec![
            ("adapter_config.json".to_owned(), Bytes::from_static(br#"{"r": 16}"#)),
            ("adapter_model.safetensors".to_owned(), Bytes::from(vec![key.step as u8; 5000])),
        ],
        optimizer: Optimizer {
            parameters: numbers(1.0),
            exp_avg: numbers(f32::MIN_POSITIVE),
            exp_avg_sq: numbers(1e-20),
        },
        state: State {
            epoch: 2,
            world_size: 3,
            threads: 2,
            micro_batch_rows: 4,
            global_batch_size: 16,
            // Does not fit a double: must not travel as one.
            seed: u64::MAX - 1,
            evaluated_step: Some(key.step / 2),
            loss: None,
            base_hash: "base".to_owned(),
            tokenizer_hash: "tokenizer".to_owned(),
            data_hash: "data".to_owned(),
            adapter_hash: "adapter".to_owned(),
            shanty_version: "0.1.0".to_owned(),
        },
    }
}

/// Writes checkpoints of these steps, attempt 1, generation 1.
pub fn write_steps(store: &Blocking, steps: impl IntoIterator<Item = u64>) {
    for step in steps {
        store.write(&snapshot(key(step, 1, 1))).unwrap();
    }
}

/// Where a file of a checkpoint lies.
pub fn file(folder: &Path, key: Key, name: &str) -> PathBuf {
    folder.join(key.path()).join(name)
}

/// Flips a bit in the middle of a file.
pub fn flip_a_bit(path: &Path) {
    let mut content = std::fs::read(path).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 1;
    std::fs::write(path, content).unwrap();
}

/// Cuts a file in half.
pub fn truncate(path: &Path) {
    let content = std::fs::read(path).unwrap();
    std::fs::write(path, &content[..content.len() / 2]).unwrap();
}

/// Keeps so many of the newest.
pub fn keep_newest(newest: usize) -> Keep {
    Keep { newest, best: 0 }
}
