//! Jobs that take seconds: a random Llama on a few dozen lines of made-up text.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use crate::fixtures;

/// A job on the tiny model. Change what matters to the test, then [`write`](Self::write) it.
#[derive(Debug, Clone)]
pub struct TinyJob {
    /// Name of the job.
    pub name: &'static str,
    /// Lines of training text; a line is about one row of 32 tokens.
    pub lines: usize,
    /// Optimizer steps.
    pub steps: u64,
    /// Rows a step.
    pub global_batch_size: usize,
    /// Rows a forward pass.
    pub micro_batch_size: Option<usize>,
    /// Lines of `[adapter]`; LoRA on all linear layers with `dropout` when none.
    pub adapter: Option<&'static str>,
    /// Longest row, tokens.
    pub max_length: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Share of adapter inputs dropped.
    pub dropout: f32,
    /// `nf4` or `none`.
    pub quantization: &'static str,
    /// A checkpoint every so many steps.
    pub every_steps: u64,
    /// An evaluation every so many steps.
    pub eval_every_steps: u64,
    /// Fewest and most workers.
    pub workers: (u32, u32),
    /// Prompt for the sample at the end.
    pub prompt: Option<&'static str>,
    /// Seed of order, initialisation and dropout.
    pub seed: u64,
}

impl Default for TinyJob {
    fn default() -> Self {
        Self {
            name: "tiny",
            lines: 48,
            steps: 12,
            global_batch_size: 6,
            micro_batch_size: Some(2),
            adapter: None,
            max_length: 32,
            learning_rate: 5e-3,
            dropout: 0.1,
            quantization: "nf4",
            every_steps: 4,
            eval_every_steps: 0,
            workers: (1, 8),
            prompt: None,
            seed: 17,
        }
    }
}

impl TinyJob {
    /// The text of the job file; paths are relative to its folder.
    pub fn toml(&self) -> String {
        let mut text = String::new();
        let micro =
            self.micro_batch_size.map(|size| format!("micro_batch_size = {size}\n")).unwrap_or_default();
        let lora = || {
            let dropout = self.dropout;
            format!("r = 4\nlora_alpha = 8\nlora_dropout = {dropout}\ntarget_modules = \"all-linear\"")
        };
        // Writing to a string does not fail.
        let _ = write!(
            text,
            r#"name = "{name}"

[base]
model = "model"
quantization = "{quantization}"

[adapter]
{adapter}

[data]
train = "train.jsonl"
eval = "eval.jsonl"
max_length = {max_length}

[train]
steps = {steps}
global_batch_size = {batch}
{micro}learning_rate = {rate:?}
schedule = "cosine"
warmup_steps = 2
seed = {seed}
eval_every_steps = {eval_every}

[checkpoint]
every_steps = {every}
keep = 3

[cluster]
workers = {{ min = {min}, max = {max} }}
device = "cpu"
"#,
            name = self.name,
            quantization = self.quantization,
            adapter = self.adapter.map_or_else(lora, str::to_owned),
            max_length = self.max_length,
            rate = self.learning_rate,
            steps = self.steps,
            batch = self.global_batch_size,
            seed = self.seed,
            eval_every = self.eval_every_steps,
            every = self.every_steps,
            min = self.workers.0,
            max = self.workers.1,
        );
        if let Some(prompt) = self.prompt {
            let _ = write!(text, "\n[sample]\nprompt = \"{prompt}\"\nmax_tokens = 8\n");
        }
        text
    }

    /// Writes model, data and job file into `folder`; gives the job file.
    pub fn write(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        fixtures::tiny_model(&folder.join("model"))?;
        fs::write(folder.join("train.jsonl"), lines(self.lines, 1))?;
        fs::write(folder.join("eval.jsonl"), lines(8, 1000))?;
        let job = folder.join("job.toml");
        fs::write(&job, self.toml())?;
        Ok(job)
    }
}

/// JSONL of `count` texts, each different, of 10 to 30 letters or so.
fn lines(count: usize, salt: usize) -> String {
    const WORDS: [&str; 8] = ["haul", "away", "Joe", "the", "bowline", "roll", "and", "go"];
    let mut text = String::new();
    for line in 0..count {
        let words: Vec<&str> =
            (0..3 + (line + salt) % 4).map(|word| WORDS[(line * 7 + word * (salt % 5 + 3)) % 8]).collect();
        let _ = writeln!(text, "{{\"text\": \"{} {}\"}}", words.join(" "), line + salt);
    }
    text
}
