//! Memory stays bounded whatever the size of the input. In a process of its own: it looks at the peak.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use shanty_data::{Format, PrepareOptions, prepare};

const LINES: u64 = 200_000;

/// The most memory that this process has held, bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn two_hundred_thousand_lines_fit_into_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.jsonl");
    let mut file = BufWriter::new(File::create(&path).unwrap());
    for line in 0..LINES {
        writeln!(file, "{{\"id\": {line}, \"note\": \"{}\", \"text\": \"line {line}\"}}", "x".repeat(400))
            .unwrap();
    }
    file.flush().unwrap();
    let size = std::fs::metadata(&path).unwrap().len();
    let mut options = PrepareOptions {
        model_dir: Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny-llama-14m"),
        train: path.to_str().unwrap().to_owned(),
        eval: None,
        format: Format::Auto,
        max_length: 256,
        packing: true,
        virtual_tokens: 0,
        template_time: None,
        out: folder.path().join("prepared"),
        threads: 2,
    };
    // The tokenizer, its tables and the threads, before the large file.
    let small = folder.path().join("small.jsonl");
    std::fs::write(&small, "{\"text\": \"a b\"}\n").unwrap();
    let large = std::mem::replace(&mut options.train, small.to_str().unwrap().to_owned());
    prepare(&options, &mut |_| {}).unwrap();
    let before = peak();
    options.train = large;
    let summary = prepare(&options, &mut |_| {}).unwrap();
    assert_eq!((summary.train.records, summary.train.samples), (LINES, LINES));
    let grown = peak() - before;
    println!("{size} bytes of input, peak {before} before, grown by {grown}");
    // 90 MB of input. A batch holds 4 MiB of lines, as parsed values and tokens some times that; the open rows
    // hold 128 × 256 tokens. The input as a whole, were it held, would be more than this.
    assert!(size > 80_000_000, "{size}");
    assert!(grown < 48 << 20, "memory grew by {grown} bytes for {size} bytes of input");
}
