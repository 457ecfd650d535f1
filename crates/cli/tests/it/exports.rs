//! Histories for other programs: what a real run left, read back by a decoder that checks every sum, by TensorBoard itself where
//! there is one, and line by line.

use std::{collections::BTreeMap, env, fs, process::Command};

use serde_json::Value;
use shanty_telemetry::tensorboard::masked_crc;
use shanty_testkit::TinyJob;

use crate::support::Place;

/// Values by tag and step.
type Scalars = BTreeMap<(String, u64), f64>;

/// Decodes an event file, as `record_reader.cc` and `event.proto` say.
fn decode(file: &[u8]) -> Scalars {
    let mut scalars = Scalars::new();
    let mut rest = file;
    let mut records = 0;
    while !rest.is_empty() {
        let (head, after) = rest.split_at(12);
        let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
        assert_eq!(
            u32::from_le_bytes(head[8..].try_into().unwrap()),
            masked_crc(&head[..8]),
            "sum of a length"
        );
        let (event, after) = after.split_at(length);
        let (sum, after) = after.split_at(4);
        assert_eq!(u32::from_le_bytes(sum.try_into().unwrap()), masked_crc(event), "sum of a record");
        rest = after;
        let fields = fields(event);
        if records == 0 {
            assert_eq!(fields[1], (3, Field::Bytes(b"brain.Event:2".to_vec())));
        }
        records += 1;
        let step = fields.iter().find_map(|(number, field)| match (number, field) {
            (2, Field::Number(step)) => Some(*step),
            _ => None,
        });
        for (number, field) in fields {
            if let (5, Field::Bytes(summary)) = (number, field) {
                for (_, value) in self::fields(&summary) {
                    let Field::Bytes(value) = value else { panic!("a value is a message") };
                    let parts = self::fields(&value);
                    let [(1, Field::Bytes(tag)), (2, Field::Float(value))] = &parts[..] else {
                        panic!("{parts:?}")
                    };
                    let tag = String::from_utf8(tag.clone()).unwrap();
                    scalars.insert((tag, step.unwrap_or_default()), f64::from(*value));
                }
            }
        }
    }
    scalars
}

#[derive(Debug, PartialEq)]
enum Field {
    Number(u64),
    Double(f64),
    Float(f32),
    Bytes(Vec<u8>),
}

fn fields(mut message: &[u8]) -> Vec<(u64, Field)> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let field = match key & 7 {
            0 => Field::Number(varint(&mut message)),
            1 => Field::Double(f64::from_le_bytes(take(&mut message, 8).try_into().unwrap())),
            2 => {
                let length = varint(&mut message) as usize;
                Field::Bytes(take(&mut message, length).to_vec())
            }
            5 => Field::Float(f32::from_le_bytes(take(&mut message, 4).try_into().unwrap())),
            other => panic!("wire type {other}"),
        };
        fields.push((key >> 3, field));
    }
    fields
}

fn take<'a>(message: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (taken, rest) = message.split_at(length);
    *message = rest;
    taken
}

fn varint(message: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = take(message, 1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return value;
        }
        shift += 7;
    }
}

/// What TensorBoard's own reader finds; nothing where there is no TensorBoard.
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn by_tensorboard(folder: &str) -> Option<Scalars> {
    let python = env::var("SHANTY_TENSORBOARD_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let script = "
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
read = EventAccumulator(sys.argv[1], size_guidance={'scalars': 0})
read.Reload()
print(json.dumps({tag: [[one.step, one.value] for one in read.Scalars(tag)] for tag in read.Tags()['scalars']}))
";
    let there = Command::new(&python).args(["-c", "import tensorboard"]).output();
    if !there.is_ok_and(|there| there.status.success()) {
        assert!(env::var_os("SHANTY_REQUIRE_TENSORBOARD").is_none(), "`{python}` cannot import tensorboard");
        eprintln!("skipped: `{python}` cannot import tensorboard");
        return None;
    }
    let output = Command::new(&python).args(["-c", script, folder]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: BTreeMap<String, Vec<(u64, f64)>> = serde_json::from_slice(&output.stdout).unwrap();
    let flat = read
        .into_iter()
        .flat_map(|(tag, values)| values.into_iter().map(move |(step, value)| ((tag.clone(), step), value)));
    Some(flat.collect())
}

#[test]
fn a_history_is_read_back_as_it_was_by_other_programs() {
    let place = Place::new(TinyJob { steps: 12, eval_every_steps: 4, ..TinyJob::default() }).unwrap();
    let finished = place.run(1).unwrap();
    let losses = finished.losses();
    let out = place.path("tb").display().to_string();
    let told = place
        .shanty
        .run(&["export", "tensorboard", "tiny", "--out", &out, "--output", "json"])
        .unwrap()
        .expect_code(0)
        .unwrap()
        .object()
        .unwrap();
    assert_eq!(told["steps"], 12, "{told}");
    let scalars = decode(&fs::read(told["file"].as_str().unwrap()).unwrap());
    for (step, loss) in &losses {
        let read = scalars[&("train/loss".to_owned(), *step)];
        assert!((read - loss).abs() < 1e-6 * loss.abs().max(1.0), "step {step}: {read}, not {loss}");
    }
    let evaluated: Vec<u64> =
        scalars.keys().filter(|(tag, _)| tag == "eval/loss").map(|(_, step)| *step).collect();
    assert_eq!(evaluated, [0, 4, 8, 12]);
    if let Some(read) = by_tensorboard(&format!("{out}/tiny")) {
        // Single precision is what the file holds; JSON between the two may turn the last bit of a double.
        let single = |scalars: Scalars| -> Vec<((String, u64), f32)> {
            scalars.into_iter().map(|(key, value)| (key, value as f32)).collect()
        };
        assert_eq!(single(read), single(scalars), "TensorBoard reads what was written");
    }

    let file = place.path("history.jsonl");
    let arguments = ["export", "wandb", "tiny", "--out", file.to_str().unwrap()];
    place.shanty.run(&arguments).unwrap().expect_code(0).unwrap();
    let text = fs::read_to_string(&file).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 13, "the evaluation before the first step, and twelve steps");
    for line in &lines[1..] {
        let step = line["_step"].as_u64().unwrap();
        assert_eq!(line["train/loss"].as_f64(), losses.get(&step).copied(), "{line}");
        assert!(line["_timestamp"].as_f64().unwrap() > 1.6e9 && line["_runtime"].as_f64().unwrap() >= 0.0);
        assert_eq!(line.get("eval/loss").is_some(), step % 4 == 0, "{line}");
    }
    assert!(lines.is_sorted_by_key(|line| line["_step"].as_u64()));
}
