//! Wrong inputs of every kind: each is answered with its code and exit code 2, without a panic, and leaves nothing behind.

use std::{fs, path::Path};

use serde_json::Value;
use shanty_testkit::{TinyJob, fixtures};

use crate::support::{Place, listing};

/// What is wrong, how it gets wrong, what is asked, and the code of the answer.
struct Case {
    name: &'static str,
    spoil: fn(&Path),
    arguments: &'static [&'static str],
    code: &'static str,
    /// The line of the job file that the answer points at, where it is one.
    line_holds: Option<&'static str>,
}

const RUN: &[&str] = &["run", "job.toml", "--workers", "1", "--threads", "1"];
const EVAL_ADAPTER: &[&str] = &["eval", "--model", "model", "--adapter", "adapter", "--data", "eval.jsonl"];
const GENERATE: &[&str] = &["generate", "--model", "model", "--prompt", "haul", "--max-tokens", "2"];

fn case(
    name: &'static str,
    arguments: &'static [&'static str],
    code: &'static str,
    spoil: fn(&Path),
) -> Case {
    Case { name, spoil, arguments, code, line_holds: None }
}

fn at_line(name: &'static str, code: &'static str, line_holds: &'static str, spoil: fn(&Path)) -> Case {
    Case { line_holds: Some(line_holds), ..case(name, RUN, code, spoil) }
}

fn job_file() -> Vec<Case> {
    vec![
        case("no job file", RUN, "SH0101", |place| fs::remove_file(place.join("job.toml")).unwrap()),
        case("a folder as job file", &["run", "model"], "SH0101", |_| {}),
        at_line("unknown key", "SH0102", "lora_alhpa", |place| edit(place, "lora_alpha", "lora_alhpa")),
        at_line("unknown table", "SH0102", "[trian]", |place| edit(place, "[train]", "[trian]")),
        at_line("text for a number", "SH0103", "r = \"four\"", |place| edit(place, "r = 4", "r = \"four\"")),
        at_line("fraction for a count", "SH0103", "steps = 1.5", |place| {
            edit(place, "steps = 12", "steps = 1.5")
        }),
        at_line("r is 0", "SH0104", "r = 0", |place| edit(place, "r = 4", "r = 0")),
        at_line("no row a step", "SH0104", "global_batch_size = 0", |place| {
            edit(place, "global_batch_size = 6", "global_batch_size = 0");
        }),
        at_line("dropout of everything", "SH0104", "lora_dropout = 1", |place| {
            edit(place, "lora_dropout = 0.1", "lora_dropout = 1.0");
        }),
        at_line("negative learning rate", "SH0104", "learning_rate", |place| {
            edit(place, "learning_rate = 0.005", "learning_rate = -1.0");
        }),
        at_line("no step", "SH0104", "steps = 0", |place| edit(place, "steps = 12", "steps = 0")),
        at_line("keep no checkpoint", "SH0104", "keep = 0", |place| edit(place, "keep = 3", "keep = 0")),
        at_line("rows of one token", "SH0104", "max_length = 1", |place| {
            edit(place, "max_length = 32", "max_length = 1");
        }),
        at_line("name with a slash", "SH0104", "name = ", |place| edit(place, "\"tiny\"", "\"../tiny\"")),
        Case {
            line_holds: Some("workers"),
            ..case("fewer workers than the fewest", &["run", "job.toml"], "SH0104", |place| {
                edit(place, "min = 1, max = 8", "min = 3, max = 2");
            })
        },
        case("no base model named", RUN, "SH0105", |place| edit(place, "model = \"model\"\n", "")),
        case("no TOML", RUN, "SH0106", |place| edit(place, "[train]", "[train")),
        at_line("unknown word", "SH0107", "quantization", |place| edit(place, "\"nf4\"", "\"int3\"")),
        case("job file in Latin-1", RUN, "SH0108", |place| {
            fs::write(place.join("job.toml"), b"name = \"caf\xe9\"\n").unwrap();
        }),
        case("--set without a value", &["run", "job.toml", "--set", "train.steps"], "SH0109", |_| {}),
        case("--set of an unknown key", &["run", "job.toml", "--set", "train.setps=4"], "SH0102", |_| {}),
        at_line("a model that is not there", "SH0110", "model = ", |place| {
            edit(place, "model = \"model\"", "model = \"modle\"");
        }),
        at_line("data that is not there", "SH0111", "train = ", |place| {
            edit(place, "\"train.jsonl\"", "\"trian.jsonl\"");
        }),
        at_line("longer than the context", "SH0112", "max_length = 257", |place| {
            edit(place, "max_length = 32", "max_length = 257");
        }),
        at_line("targets that match nothing", "SH0406", "target_modules", |place| {
            edit(place, "\"all-linear\"", "[\"query\"]");
        }),
        at_line("targets that are no expression", "SH0408", "target_modules", |place| {
            edit(place, "\"all-linear\"", "\"q_proj(\"");
        }),
        at_line("targets that carry no adapter", "SH0407", "target_modules", |place| {
            edit(place, "\"all-linear\"", "[\"input_layernorm\"]");
        }),
    ]
}

fn data() -> Vec<Case> {
    vec![
        case("empty data", RUN, "SH0202", |place| fs::write(place.join("train.jsonl"), "").unwrap()),
        case("data in Latin-1", RUN, "SH0203", |place| {
            append(place, "train.jsonl", b"{\"text\": \"caf\xe9 caf\xe9\"}\n");
        }),
        case("a broken line", RUN, "SH0204", |place| append(place, "train.jsonl", b"{\"text\": \"half\n")),
        case("a line that is a list", RUN, "SH0204", |place| append(place, "train.jsonl", b"[1, 2]\n")),
        case("columns of no form", RUN, "SH0205", |place| {
            fs::write(place.join("train.jsonl"), "{\"body\": \"haul away Joe\"}\n").unwrap();
        }),
        case("a row without its column", RUN, "SH0206", |place| {
            append(place, "train.jsonl", b"{\"body\": \"haul away Joe\"}\n");
        }),
        case("a number for a text", RUN, "SH0207", |place| append(place, "train.jsonl", b"{\"text\": 7}\n")),
        case("a Parquet file that is none", RUN, "SH0208", |place| {
            edit(place, "\"train.jsonl\"", "\"train.parquet\"");
            fs::write(place.join("train.parquet"), "PAR1 not really").unwrap();
        }),
        case("a conversation without a template", RUN, "SH0210", |place| {
            let line = r#"{"messages": [{"role": "user", "content": "haul"}, {"role": "assistant", "content": "away"}]}"#;
            fs::write(place.join("train.jsonl"), format!("{line}\n")).unwrap();
            fs::remove_file(place.join("eval.jsonl")).unwrap();
            edit(place, "eval = \"eval.jsonl\"\n", "");
        }),
        case("nothing to train", RUN, "SH0214", |place| {
            fs::write(place.join("train.jsonl"), "{\"text\": \"\"}\n").unwrap();
        }),
        case("a kind of file that is none", RUN, "SH0218", |place| {
            edit(place, "\"train.jsonl\"", "\"train.csv\"");
            fs::write(place.join("train.csv"), "text\nhaul\n").unwrap();
        }),
        case("broken held-out data", RUN, "SH0204", |place| append(place, "eval.jsonl", b"}\n")),
        case(
            "eval of data that is not there",
            &["eval", "--model", "model", "--data", "none.jsonl"],
            "SH0201",
            |_| {},
        ),
    ]
}

fn model() -> Vec<Case> {
    vec![
        at_line("no config", "SH0110", "model = ", |place| {
            fs::remove_file(place.join("model/config.json")).unwrap();
        }),
        at_line("no tokenizer", "SH0110", "model = ", |place| {
            fs::remove_file(place.join("model/tokenizer.json")).unwrap();
        }),
        at_line("no weights", "SH0110", "model = ", |place| {
            fs::remove_file(place.join("model/model.safetensors")).unwrap();
        }),
        case("a broken tokenizer", RUN, "SH0209", |place| {
            fs::write(place.join("model/tokenizer.json"), "{}").unwrap();
        }),
        case("a config without a size", RUN, "SH0303", |place| {
            edit_file(place, "model/config.json", "\"hidden_size\"", "\"hiden_size\"");
        }),
        case("an unknown family", RUN, "SH0304", |place| {
            edit_file(place, "model/config.json", "\"llama\"", "\"lhama\"");
        }),
        case("weights cut short", RUN, "SH0306", |place| cut(place, "model/model.safetensors")),
        case("weights of another shape", RUN, "SH0308", |place| {
            edit_file(place, "model/config.json", "\"intermediate_size\": 96", "\"intermediate_size\": 128");
        }),
        case("layers that are not there", RUN, "SH0307", |place| {
            edit_file(place, "model/config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
        }),
        case("generate without a model", GENERATE, "SH0301", |place| {
            fs::remove_dir_all(place.join("model")).unwrap();
        }),
        case("generate with a broken config", GENERATE, "SH0302", |place| {
            fs::write(place.join("model/config.json"), "{").unwrap();
        }),
    ]
}

fn adapter() -> Vec<Case> {
    vec![
        case("no adapter", EVAL_ADAPTER, "SH0401", |_| {}),
        case("an adapter without weights", EVAL_ADAPTER, "SH0401", |place| {
            good_adapter(place);
            fs::remove_file(place.join("adapter/adapter_model.safetensors")).unwrap();
        }),
        case("an adapter config that is no JSON", EVAL_ADAPTER, "SH0402", |place| {
            good_adapter(place);
            fs::write(place.join("adapter/adapter_config.json"), "r = 4").unwrap();
        }),
        case("an adapter of another method", EVAL_ADAPTER, "SH0404", |place| {
            good_adapter(place);
            edit_file(place, "adapter/adapter_config.json", "\"LORA\"", "\"VERA\"");
        }),
        case("adapter weights cut short", EVAL_ADAPTER, "SH0410", |place| {
            good_adapter(place);
            cut(place, "adapter/adapter_model.safetensors");
        }),
        case("an adapter of another rank", EVAL_ADAPTER, "SH0411", |place| {
            good_adapter(place);
            let config = fs::read_to_string(place.join("adapter/adapter_config.json")).unwrap();
            let mut config: Value = serde_json::from_str(&config).unwrap();
            config["r"] = 5.into();
            fs::write(place.join("adapter/adapter_config.json"), config.to_string()).unwrap();
        }),
    ]
}

fn arguments() -> Vec<Case> {
    fn nothing(_: &Path) {}
    vec![
        case("no command", &["--output", "json"], "SH0901", nothing),
        case("an unknown command", &["sail"], "SH0901", nothing),
        case("an unknown flag", &["run", "job.toml", "--wokers", "2"], "SH0901", nothing),
        case("a number that is none", &["run", "job.toml", "--workers", "two"], "SH0901", nothing),
        case("no worker at all", &["run", "job.toml", "--workers", "0"], "SH0901", nothing),
        case("no model", &["generate", "--prompt", "haul"], "SH0901", nothing),
        case(
            "ids that are none",
            &["logits", "--model", "model", "--ids", "1,2", "--out", "o"],
            "SH0908",
            nothing,
        ),
        case(
            "rows of two lengths",
            &["logits", "--model", "model", "--ids", "[[1],[2,3]]", "--out", "o"],
            "SH0908",
            nothing,
        ),
        case(
            "an id above the vocabulary",
            &["logits", "--model", "model", "--ids", "[[288]]", "--out", "o"],
            "SH0908",
            nothing,
        ),
        case(
            "a share above 1",
            &["generate", "--model", "model", "--prompt", "a", "--top-p", "1.5"],
            "SH0915",
            nothing,
        ),
        case("an unknown code", &["explain", "SH9999"], "SH0906", nothing),
        case("nobody to ask", &["jobs"], "SH0904", nothing),
        case("nothing to resume", &["resume", "job.toml"], "SH0903", nothing),
        case(
            "a coordinator that is no address",
            &["jobs", "--coordinator", "not an address"],
            "SH0916",
            nothing,
        ),
        case("a shell that is none", &["completions", "cmd"], "SH0901", nothing),
        case(
            "bench beyond the context",
            &["bench", "step", "--model", "model", "--length", "300"],
            "SH0915",
            nothing,
        ),
    ]
}

#[test]
fn wrong_job_files_are_answered_at_their_line() {
    check(job_file());
}

#[test]
fn wrong_data_is_answered_before_any_worker_starts() {
    check(data());
}

#[test]
fn wrong_model_folders_are_answered() {
    check(model());
}

#[test]
fn wrong_adapter_folders_are_answered() {
    check(adapter());
}

#[test]
fn wrong_arguments_are_answered() {
    check(arguments());
}

/// Runs all cases and tells all that fail, not just the first.
fn check(cases: Vec<Case>) {
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| answer(case).err().map(|error| format!("{}: {error:#}", case.name)))
        .collect();
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n\n"));
}

fn answer(case: &Case) -> anyhow::Result<()> {
    let place = Place::new(TinyJob::default())?;
    (case.spoil)(place.folder.path());
    let before = listing(place.folder.path());
    let mut arguments = case.arguments.to_vec();
    if !arguments.contains(&"--output") {
        arguments.extend(["--output", "json"]);
    }
    let finished = place.shanty.run(&arguments)?.expect_code(2)?;
    for word in ["panicked", "sorry", "RUST_BACKTRACE"] {
        anyhow::ensure!(!finished.stderr.contains(word), "it says `{word}`: {}", finished.stderr);
    }
    let error = finished.error()?;
    anyhow::ensure!(error["code"] == case.code, "expected {}, got {error}", case.code);
    anyhow::ensure!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "no message in {error}");
    let after = listing(place.folder.path());
    anyhow::ensure!(
        after == before,
        "left behind: {:?}",
        after.iter().filter(|one| !before.contains(one)).collect::<Vec<_>>()
    );
    if let Some(expected) = case.line_holds {
        let file = fs::read_to_string(place.path("job.toml"))?;
        let line = error["line"].as_u64().and_then(|line| file.lines().nth(line as usize - 1));
        anyhow::ensure!(line.is_some_and(|line| line.contains(expected)), "points at {line:?}: {error}");
    }
    let explained = place.shanty.run(&["explain", case.code])?;
    anyhow::ensure!(explained.code() == Some(0), "`shanty explain {}` knows nothing", case.code);
    Ok(())
}

fn edit(place: &Path, from: &str, to: &str) {
    edit_file(place, "job.toml", from, to);
}

fn edit_file(place: &Path, file: &str, from: &str, to: &str) {
    let text = fs::read_to_string(place.join(file)).unwrap();
    assert!(text.contains(from), "{file} holds no {from}");
    fs::write(place.join(file), text.replacen(from, to, 1)).unwrap();
}

fn append(place: &Path, file: &str, bytes: &[u8]) {
    let mut text = fs::read(place.join(file)).unwrap();
    text.extend_from_slice(bytes);
    fs::write(place.join(file), text).unwrap();
}

fn cut(place: &Path, file: &str) {
    let bytes = fs::read(place.join(file)).unwrap();
    fs::write(place.join(file), &bytes[..bytes.len() / 2]).unwrap();
}

fn good_adapter(place: &Path) {
    fixtures::copy_folder(
        &fixtures::reference("adapters/lora_all_linear/llama/adapter"),
        &place.join("adapter"),
    )
    .unwrap();
}
