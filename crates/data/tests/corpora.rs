//! The corpora of the fuzz targets, replayed: no panic, no endless loop, no memory without end.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    path::Path,
    time::{Duration, Instant},
};

/// Replays all files of a corpus, and each cut at many places.
fn replay(name: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "the corpus is there");
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let began = Instant::now();
        target(&bytes);
        for cut in (0..bytes.len()).step_by((bytes.len() / 16).max(1)) {
            target(&bytes[..cut]);
            let mut flipped = bytes.clone();
            flipped[cut] ^= 0x15;
            target(&flipped);
        }
        // 33 runs of at most 50,000 instructions each, several renderings a run, on a busy machine without optimisation.
        assert!(began.elapsed() < Duration::from_secs(60), "{} takes too long", file.display());
    }
}

#[test]
fn json_lines() {
    replay("jsonl", shanty_data::fuzz::jsonl);
}

#[test]
fn chat_templates() {
    replay("chat_template", shanty_data::fuzz::chat_template);
}
