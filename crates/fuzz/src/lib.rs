//! What is fuzzed: readers of files that others wrote.
//!
//! A [`Target`] takes any bytes: errors are fine, panics, endless loops and memory beyond [`allowed_bytes`] are not. The same
//! functions run under cargo-fuzz (`fuzz/`), under the driver of this crate where there is no nightly toolchain, and
//! over the committed corpora in the test suite. `cargo xtask fuzz` runs all of them.

pub mod driver;
pub mod memory;
mod mutate;

use std::path::PathBuf;

/// A reader under fuzzing.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, that of its corpus's folder.
    pub name: &'static str,
    /// Reads bytes.
    pub run: fn(&[u8]),
    /// Whether [`allowed_bytes`] holds for it: readers of headers. What parses JSON or templates keeps trees of what it read.
    pub bounded: bool,
    /// Words that mutations put in: what random bytes would rarely spell.
    pub words: &'static [&'static str],
}

/// All targets.
pub const TARGETS: [Target; 5] = [
    Target {
        name: "safetensors_header",
        run: shanty_peft_core::fuzz::safetensors_header,
        bounded: true,
        words: &[
            "\"dtype\":",
            "\"shape\":[",
            "\"data_offsets\":[0,",
            "\"F32\"",
            "\"BF16\"",
            "\"I64\"",
            "\"__metadata__\":{",
            "18446744073709551615",
            "{}",
            "1,1,1,1,1,1,1,1,1",
        ],
    },
    Target {
        name: "gguf",
        run: shanty_peft_core::fuzz::gguf,
        bounded: true,
        words: &[
            "GGUF",
            "general.architecture",
            "general.alignment",
            "llama",
            "llama.block_count",
            "llama.attention.head_count",
            "tokenizer.ggml.tokens",
            "token_embd.weight",
            "\u{9}\0\0\0\u{8}\0\0\0",
        ],
    },
    Target {
        name: "adapter_config",
        run: shanty_peft_core::fuzz::adapter_config,
        bounded: false,
        words: &[
            "\"peft_type\":\"LORA\"",
            "\"peft_type\":\"PREFIX_TUNING\"",
            "\"peft_type\":\"IA3\"",
            "\"peft_type\":\"ADALORA\"",
            "\"target_modules\":",
            "\"all-linear\"",
            "\"rank_pattern\":{",
            "\"r\":",
            "(?:(.*)(?:\\\\1|.)*)*z",
            "null",
            "1e309",
        ],
    },
    Target {
        name: "jsonl",
        run: shanty_data::fuzz::jsonl,
        bounded: false,
        words: &[
            "\"messages\":[",
            "\"role\":\"assistant\"",
            "\"content\":",
            "\"prompt\":",
            "\"completion\":",
            "\"text\":",
            "\"instruction\":",
            "\"conversations\":[",
            "\"from\":\"gpt\"",
            "\n",
        ],
    },
    Target {
        name: "chat_template",
        run: shanty_data::fuzz::chat_template,
        bounded: false,
        words: &[
            "{% for message in messages %}",
            "{% endfor %}",
            "{{ message['content'] }}",
            "{% generation %}",
            "{% endgeneration %}",
            "range(99999999)",
            "{% if ",
            "| tojson",
            "loop.index0",
            "raise_exception(",
        ],
    },
];

/// The target of a name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Bytes that a bounded reader may hold at once for so many bytes of a file: four times those, and what an error's text and
/// other things of fixed size take.
pub fn allowed_bytes(input: usize) -> usize {
    4 * input + (16 << 10)
}

/// The folder of a target's committed corpus.
pub fn corpus(target: &Target) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}

/// Runs a target over one input, and checks what it held in memory where the caller's program counts that with
/// [`memory::Counting`].
///
/// # Panics
/// Where the target does, or holds more than it may: that is what fuzzing looks for.
pub fn check(target: &Target, input: &[u8]) {
    let (peak, ()) = memory::peak_of(|| (target.run)(input));
    let allowed = allowed_bytes(input.len());
    assert!(
        !target.bounded || peak <= allowed,
        "{} held {peak} bytes for {} bytes of input; {allowed} are allowed",
        target.name,
        input.len()
    );
}
