//! A job with real prepared data, and a coordinator's options.

use std::{ffi::OsString, path::Path};

use shanty_coordinator::{Options, prepare::PrepareLine};
use shanty_data::order::Order;

use crate::Result;

/// Rows that each worker gets a step.
pub const ROWS_A_WORKER: usize = 2;
/// Steps of an epoch; the job has as many epochs as it takes.
const STEPS_AN_EPOCH: usize = 8;
/// Steps of the job: more than anybody waits for.
pub const STEPS: u64 = 1_000_000;
/// Tokens that a row may have.
const MAX_LENGTH: u32 = 128;
/// The default of a job file.
const SEED: u64 = 17;

/// A job for a crew of one size.
pub struct Stage {
    /// The job file as JSON.
    pub spec_json: String,
    /// Which rows each step trains.
    pub order: Order,
}

impl Stage {
    /// Prepares data below `folder` and writes the job.
    pub fn set(folder: &Path, workers: usize) -> Result<Self> {
        let batch = workers * ROWS_A_WORKER;
        let rows = batch * STEPS_AN_EPOCH;
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny-llama-14m");
        let train = folder.join("train.jsonl");
        let verse = |n: usize| {
            let words = "haul away the bowline and roll the old chariot along ".repeat(5);
            format!("{{\"text\": \"verse {n}: {words}\"}}\n")
        };
        std::fs::write(&train, (0..rows).map(verse).collect::<String>())?;
        let store = folder.join("store");
        let options = shanty_data::PrepareOptions {
            max_length: MAX_LENGTH,
            packing: false,
            ..shanty_data::PrepareOptions::new(&model, train.display().to_string(), store.join("prepared"))
        };
        let summary = shanty_data::prepare(&options, &mut |_| {})?;
        let answer = serde_json::to_string(&PrepareLine::Done { summary })? + "\n";
        std::fs::write(folder.join("answer.json"), answer)?;
        let spec_json = serde_json::json!({
            "name": "load",
            "base": { "model": model },
            "adapter": {},
            "data": { "train": train, "max_length": MAX_LENGTH, "packing": false },
            "train": { "steps": STEPS, "global_batch_size": batch, "seed": SEED },
            "checkpoint": { "store": store },
            "cluster": { "workers": { "min": workers, "max": workers } },
        });
        Ok(Self { spec_json: spec_json.to_string(), order: Order::new(SEED, rows as u64, batch as u64)? })
    }
}

/// The defaults, on any port; data is prepared already, so the child that would prepare it only says so.
pub fn options(folder: &Path) -> Options {
    let script = format!("cat > /dev/null; cat '{}/answer.json'", folder.display());
    let command = ["sh", "-c", &script].map(OsString::from).to_vec();
    let mut options = Options::new(folder.join("state"), folder.join("runs"), command);
    options.listen = ([127, 0, 0, 1], 0).into();
    options
}
