//! Commands that use adapters: generate, chat, eval, merge, export, adapters.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use shanty_testkit::{Finished, TinyJob, fixtures};

use crate::support::Place;

/// A place with two adapters of one base: `a` and `b`.
fn place() -> Place {
    let place = Place::new(TinyJob::default()).unwrap();
    for (name, adapter) in
        [("a", "adapters/lora_all_linear/llama/adapter"), ("b", "adapters/lora_qv/llama/adapter")]
    {
        fixtures::copy_folder(&fixtures::reference(adapter), &place.path(name)).unwrap();
    }
    place
}

/// A chat template for the tiny model, whose tokenizer has none.
fn with_template(place: &Place) {
    let file = place.path("model/tokenizer_config.json");
    let mut settings: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    settings["chat_template"] = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}".into();
    fs::write(&file, settings.to_string()).unwrap();
}

fn run(place: &Place, arguments: &[&str]) -> Finished {
    place.shanty.run(arguments).unwrap()
}

fn ok(place: &Place, arguments: &[&str]) -> Finished {
    run(place, arguments).expect_code(0).unwrap()
}

fn code(place: &Place, arguments: &[&str]) -> String {
    let finished = run(place, &[arguments, &["--output", "json"]].concat()).expect_code(2).unwrap();
    finished.error().unwrap()["code"].as_str().unwrap().to_owned()
}

/// The program with something on stdin.
fn with_input(place: &Place, arguments: &[&str], input: &str) -> (String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_shanty"))
        .args(arguments)
        .current_dir(place.folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    (stdout, stderr)
}

const GENERATE: &[&str] = &["generate", "--model", "model", "--max-tokens", "6", "--threads", "1"];
const BOTH: &[&str] = &["--adapter", "pirate=a", "--adapter", "gnome=b"];

#[test]
fn one_prompt_streams_and_many_come_in_their_order() {
    let place = place();
    let alone = |adapter: &[&str]| {
        let arguments = [GENERATE, adapter, &["--prompt", "haul"]].concat();
        ok(&place, &arguments).stdout.trim_end().to_owned()
    };
    let (pirate, gnome, base) = (alone(&["--adapter", "a"]), alone(&["--adapter", "b"]), alone(&[]));
    assert!(pirate != base && gnome != base && pirate != gnome, "each adapter has its own text");

    fs::write(
        place.path("prompts.jsonl"),
        "{\"prompt\": \"haul\", \"adapter\": \"gnome\"}\n{\"prompt\": \"haul\"}\n{\"prompt\": \"haul\", \"adapter\": \"base\"}\n",
    )
    .unwrap();
    let arguments = [GENERATE, BOTH, &["--prompts", "prompts.jsonl", "--output", "json"]].concat();
    let lines = ok(&place, &arguments).events();
    let told: Vec<(&str, &str)> = lines
        .iter()
        .map(|line| (line["adapter"].as_str().unwrap_or("-"), line["text"].as_str().unwrap()))
        .collect();
    // What a line does not choose, every adapter continues.
    assert_eq!(told, [("gnome", &*gnome), ("pirate", &*pirate), ("gnome", &*gnome), ("-", &*base)]);
    assert!(lines.iter().all(|line| line["tokens"] == 6 && line["end"] == "limit"), "{lines:?}");

    let chosen = [GENERATE, BOTH, &["--use", "gnome", "--prompt", "haul"]].concat();
    assert_eq!(ok(&place, &chosen).stdout.trim_end(), gnome);
    let shown = [GENERATE, BOTH, &["--prompt", "haul"]].concat();
    let shown = ok(&place, &shown).stdout;
    assert_eq!(shown.trim_end(), format!("--- pirate\nhaul{pirate}\n--- gnome\nhaul{gnome}"));

    let (stdin, _) =
        with_input(&place, &[GENERATE, &["--adapter", "a", "--prompts", "-"]].concat(), "haul\n\nhaul\n");
    assert_eq!(stdin.trim_end(), format!("--- a\nhaul{pirate}\n--- a\nhaul{pirate}"));
}

#[test]
fn wrong_use_of_adapters_is_answered() {
    let place = place();
    fs::write(place.path("bad.jsonl"), "{\"prompt\": \"a\"}\n{\"promt\": \"b\"}\n").unwrap();
    fs::write(place.path("both.jsonl"), "{\"prompt\": \"a\", \"messages\": []}\n").unwrap();
    for (arguments, expected) in [
        ([GENERATE, &["--prompt", "a", "--use", "elf"]].concat(), "SH0920"),
        ([GENERATE, BOTH, &["--prompts", "bad.jsonl"]].concat(), "SH0922"),
        ([GENERATE, BOTH, &["--prompts", "both.jsonl"]].concat(), "SH0922"),
        ([GENERATE, &["--adapter", "x=a", "--adapter", "x=b", "--prompt", "a"]].concat(), "SH0921"),
        ([GENERATE, &["--adapter", "base=a", "--prompt", "a"]].concat(), "SH0921"),
        (GENERATE.to_vec(), "SH0901"),
        ([GENERATE, &["--prompts", "none.txt"]].concat(), "SH0907"),
        ([GENERATE, &["--prompt", "a", "--repetition-penalty", "0"]].concat(), "SH0915"),
        ([GENERATE, &["--prompt", "a", "--chat"]].concat(), "SH0210"),
        (vec!["chat", "--model", "model"], "SH0210"),
        (vec!["merge", "--model", "model", "--adapter", "none", "--out", "m"], "SH0401"),
        (vec!["merge", "--model", "model", "--adapter", "a", "--out", "model"], "SH0456"),
        (vec!["adapters", "combine", "a", "b", "--weights", "1", "--out", "c"], "SH0915"),
        (vec!["adapters", "combine", "a", "b", "--how", "linear", "--out", "c", "--rank", "3"], "SH0915"),
        (vec!["adapters", "rename", "a", "--out", "c"], "SH0901"),
        (vec!["adapters", "rename", "a", "--module", "absent=x", "--out", "c"], "SH0454"),
        (vec!["adapters", "inspect", "model"], "SH0401"),
        (
            vec!["export", "gguf", "--model", "model", "--adapter", "a", "--out", "model/config.json"],
            "SH0456",
        ),
        (vec!["export", "gguf", "--model", "model", "--adapter-only", "--out", "x.gguf"], "SH0901"),
    ] {
        assert_eq!(code(&place, &arguments), expected, "{arguments:?}");
    }
    for left in ["m", "c", "x.gguf"] {
        assert!(!place.path(left).exists(), "{left} is left behind");
    }
}

#[test]
fn a_conversation_switches_adapters_and_is_saved() {
    let place = place();
    with_template(&place);
    let chat = ["chat", "--model", "model", "--max-tokens", "5", "--threads", "1", "--system", "be brief"];
    let input = "haul\n/adapter gnome\nha\\\nul\n/adapter\n/adapter elf\n/nonsense\n/save talk.jsonl\n/save talk.jsonl\n/reset\nhaul\n/quit\nnever read\n";
    let (stdout, stderr) = with_input(&place, &[&chat[..], BOTH].concat(), input);
    assert_eq!(stdout.lines().count(), 3, "one answer a line of the user: {stdout:?}");
    for told in [
        "gnome answers from now on",
        "* gnome",
        "no adapter is called `elf`",
        "there is no /nonsense",
        "begins anew",
    ] {
        assert!(stderr.contains(told), "{told}: {stderr}");
    }
    let saved: Value = serde_json::from_str(&fs::read_to_string(place.path("talk.jsonl")).unwrap()).unwrap();
    let saved = saved["messages"].as_array().unwrap();
    let roles: Vec<&str> = saved.iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
    assert_eq!(saved[3]["content"], "ha\nul", "a line went on in the next");
    assert!(stderr.contains("failed to write `talk.jsonl`"), "nothing is written over: {stderr}");

    // As objects, and as long as the context lets it: old turns are left out, not refused.
    let long = format!("{}\nhaul\nhaul\n", "haul away Joe ".repeat(12));
    let (stdout, _) = with_input(&place, &[&chat[..], &["--output", "json"]].concat(), &long);
    let answers: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), 3);
    assert!(answers.iter().all(|answer| answer["adapter"].is_null() && answer["text"].is_string()));
}

#[test]
fn eval_scores_choices_and_compares_adapters() {
    let place = place();
    let rows: String = ["haul", "away", "Joe"]
        .iter()
        .map(|word| format!("{{\"prompt\": \"say {word}:\", \"completion\": \" {word}\", \"choices\": [\"{word}\", \"no\", \"never\", \"what\"]}}\n"))
        .collect();
    fs::write(place.path("asked.jsonl"), rows).unwrap();
    let eval = ["eval", "--model", "model", "--data", "asked.jsonl", "--threads", "1"];
    let arguments = [&eval[..], BOTH, &["--with-base", "--exact-match", "--output", "json"]].concat();
    let found = ok(&place, &arguments).events();
    let names: Vec<&str> = found.iter().map(|one| one["adapter"].as_str().unwrap_or("-")).collect();
    assert_eq!(names, ["-", "pirate", "gnome"]);
    for one in &found {
        assert_eq!((one["chance"].as_f64().unwrap(), one["rows"].as_u64().unwrap()), (0.25, 3));
        let accuracy = one["accuracy"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&accuracy) && (3.0 * accuracy).fract().abs() < 1e-9, "{one}");
        assert!(one["exact_match"].as_f64().is_some() && one["loss"].as_f64().unwrap() > 0.0);
    }
    let text = ok(&place, &[&eval[..], BOTH].concat()).stdout;
    assert!(text.starts_with("adapter"), "{text}");
    assert_eq!(text.lines().count(), 3, "{text}");

    // The log likelihood that decides is that of the logits.
    fs::write(
        place.path("wrong.jsonl"),
        "{\"prompt\": \"a\", \"completion\": \"b\", \"choices\": [\"c\", \"d\"]}\n",
    )
    .unwrap();
    assert_eq!(code(&place, &["eval", "--model", "model", "--data", "wrong.jsonl"]), "SH0923");
    assert_eq!(
        code(&place, &["eval", "--model", "model", "--data", "train.jsonl", "--exact-match"]),
        "SH0901"
    );
}

#[test]
fn a_merged_model_says_what_base_and_adapter_say() {
    let place = place();
    let logits = |arguments: &[&str], out: &str| -> Vec<u8> {
        let ids = ["--quantization", "none", "--ids", "[[5,17,33,120,64]]", "--out", out];
        ok(&place, &[&["logits"], arguments, &ids].concat());
        fs::read(place.path(out)).unwrap()
    };
    let merge =
        ["merge", "--model", "model", "--adapter", "a", "--check", "--out", "merged", "--eval", "eval.jsonl"];
    let said = ok(&place, &merge).stdout;
    assert!(said.contains("14 tensors changed by `a`"), "{said}");
    assert!(said.contains("checked: 14 tensors"), "{said}");
    let (with, merged) = (
        logits(&["--model", "model", "--adapter", "a"], "with.safetensors"),
        logits(&["--model", "merged"], "merged.safetensors"),
    );
    assert!(close(&with, &merged, 1e-4), "the merged model has the adapter's logits");
    let bare = logits(&["--model", "model"], "bare.safetensors");
    assert!(!close(&bare, &merged, 1e-2));
    ok(&place, &["merge", "--model", "merged", "--adapter", "a", "--unmerge", "--out", "back"]);
    assert!(close(&logits(&["--model", "back"], "back.safetensors"), &bare, 1e-4));

    let lossy = ok(
        &place,
        &[
            "merge",
            "--model",
            "model",
            "--adapter",
            "a",
            "--form",
            "nf4",
            "--out",
            "small",
            "--eval",
            "eval.jsonl",
            "--output",
            "json",
        ],
    );
    let lossy = lossy.object().unwrap();
    let lost = lossy["loss_mean"].as_f64().unwrap();
    assert!((0.05..0.15).contains(&lost), "NF4 loses about 9 %: {lost}");
    assert_eq!(lossy["tensors"].as_array().unwrap().len(), 14);
    let (before, after) =
        (lossy["eval_loss_before"].as_f64().unwrap(), lossy["eval_loss_after"].as_f64().unwrap());
    assert!((before - after).abs() > 1e-6 && (before - after).abs() < 1.0, "{before} {after}");
}

/// Whether two files of logits agree to a share of the largest.
fn close(one: &[u8], other: &[u8], tolerance: f32) -> bool {
    let numbers = |bytes: &[u8]| -> Vec<f32> {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let data = file.tensor("logits").unwrap().data().to_vec();
        data.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
    };
    let (one, other) = (numbers(one), numbers(other));
    let largest = other.iter().fold(0f32, |largest, number| largest.max(number.abs()));
    one.iter().zip(&other).all(|(a, b)| (a - b).abs() <= tolerance * largest)
}

#[test]
fn an_adapter_remembers_its_base() {
    let place = Place::new(TinyJob { steps: 2, ..TinyJob::default() }).unwrap();
    let finished = place.run(1).unwrap();
    let adapter = place.adapter(&finished).unwrap();
    let adapter = adapter.to_str().unwrap();
    let checked = ["adapters", "check", adapter, "--model", "model", "--output", "json"];
    let found = ok(&place, &checked).object().unwrap();
    assert_eq!(found["same_base"], true, "{found}");

    // Another base of the same shape.
    ok(&place, &["merge", "--model", "model", "--adapter", adapter, "--out", "other"]);
    for arguments in [
        vec!["adapters", "check", adapter, "--model", "other"],
        vec!["generate", "--model", "other", "--adapter", adapter, "--prompt", "haul", "--max-tokens", "2"],
        vec!["eval", "--model", "other", "--adapter", adapter, "--data", "eval.jsonl"],
        vec!["merge", "--model", "other", "--adapter", adapter, "--out", "twice"],
        vec!["export", "gguf", "--model", "other", "--adapter", adapter, "--out", "twice.gguf"],
    ] {
        assert_eq!(code(&place, &arguments), "SH0453", "{arguments:?}");
        let forced = ok(&place, &[&arguments[..], &["--force"]].concat());
        assert!(forced.stderr.contains("another base"), "it is said aloud: {}", forced.stderr);
    }
}

#[test]
fn adapters_are_looked_at_combined_and_converted() {
    let place = place();
    let inspected = ok(&place, &["adapters", "inspect", "a", "--output", "json"]).object().unwrap();
    assert_eq!(inspected["modules"].as_array().unwrap().len(), 14);
    assert!(inspected["modules"][0]["change_norm"].as_f64().unwrap() > 0.0);
    let same = ok(&place, &["adapters", "diff", "a", "a"]).stdout;
    assert_eq!(same.trim_end(), "the same: settings and 28 tensors");
    let differ = ok(&place, &["adapters", "diff", "a", "b", "--output", "json"]).object().unwrap();
    assert_eq!(differ["same"], false);

    ok(&place, &["adapters", "combine", "a", "b", "--weights", "0.5,-2", "--out", "sum"]);
    ok(&place, &["adapters", "convert", "sum", "--keys", "named", "--out", "named"]);
    ok(&place, &["adapters", "convert", "named", "--dtype", "bf16", "--out", "small"]);
    // Names with another adapter's name in them are read by these commands alone.
    ok(&place, &["adapters", "convert", "sum", "--keys", "named", "--name", "x", "--out", "elsewhere"]);
    assert_eq!(code(&place, &[GENERATE, &["--adapter", "elsewhere", "--prompt", "a"]].concat()), "SH0413");
    ok(&place, &["adapters", "convert", "elsewhere", "--out", "home"]);
    assert_eq!(
        fs::read(place.path("home/adapter_model.safetensors")).unwrap(),
        fs::read(place.path("sum/adapter_model.safetensors")).unwrap()
    );
    ok(&place, &["adapters", "rename", "small", "--base", "somewhere/else", "--out", "renamed"]);
    let config = fs::read_to_string(place.path("renamed/adapter_config.json")).unwrap();
    assert!(config.contains("somewhere/else"), "{config}");
    let logits = |adapter: &str| -> Vec<u8> {
        let out = format!("{adapter}.safetensors");
        let arguments =
            ["logits", "--model", "model", "--adapter", adapter, "--ids", "[[5,17,33]]", "--out", &out];
        ok(&place, &arguments);
        fs::read(place.path(&out)).unwrap()
    };
    let sum = logits("sum");
    assert!(close(&logits("named"), &sum, 0.0), "names change nothing");
    // bf16 factors: 2^-9 of each, through two layers.
    assert!(close(&logits("renamed"), &sum, 2e-2) && !close(&logits("a"), &sum, 2e-2));
}

/// What people see, whole. Numbers of the reference adapters never change.
#[test]
fn what_is_shown_of_adapters() {
    let place = place();
    insta::assert_snapshot!("inspect", ok(&place, &["adapters", "inspect", "a"]).stdout);
    insta::assert_snapshot!("diff", ok(&place, &["adapters", "diff", "a", "b"]).stdout);
    insta::assert_snapshot!("check", ok(&place, &["adapters", "check", "b", "--model", "model"]).stdout);
    let merge = [
        "merge",
        "--model",
        "model",
        "--adapter",
        "pirate=a",
        "--form",
        "bf16",
        "--check",
        "--out",
        "merged",
    ];
    insta::assert_snapshot!("merge", ok(&place, &merge).stdout);
}

#[test]
fn a_closed_pipe_is_no_reason_to_panic() {
    let place = place();
    for arguments in [
        [GENERATE, BOTH, &["--prompt", "haul"]].concat(),
        vec!["adapters", "inspect", "a"],
        vec!["eval", "--model", "model", "--data", "eval.jsonl"],
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_shanty"))
            .args(&arguments)
            .current_dir(place.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!stderr.contains("panicked") && !stderr.contains("sorry"), "{arguments:?}: {stderr}");
    }
}

/// A Python with llama-cpp-python, named by `SHANTY_LLAMA_CPP_PYTHON`; none and a word about it.
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn llama_cpp() -> Option<PathBuf> {
    let python = std::env::var_os("SHANTY_LLAMA_CPP_PYTHON").map(PathBuf::from);
    if python.is_none() {
        eprintln!(
            "SKIPPED: SHANTY_LLAMA_CPP_PYTHON names no Python with llama-cpp-python; nothing was compared"
        );
    }
    python
}

#[test]
fn llama_cpp_reads_what_is_exported() {
    let Some(python) = llama_cpp() else { return };
    let place = Place::new(TinyJob::default()).unwrap();
    let base = fixtures::example("tiny-llama-14m");
    let base = base.to_str().unwrap();
    // Any adapter that changes something: random factors on every linear layer.
    let job = fs::read_to_string(place.path("job.toml")).unwrap().replace("\"model\"", &format!("{base:?}"));
    fs::write(place.path("job.toml"), job.replace("steps = 12", "steps = 6")).unwrap();
    let finished = place.run(1).unwrap();
    let adapter = place.adapter(&finished).unwrap();
    let adapter = adapter.to_str().unwrap();
    let export = |arguments: &[&str]| {
        ok(&place, &[&["export", "gguf", "--model", base][..], arguments].concat());
    };
    export(&["--type", "f32", "--out", "base.gguf"]);
    export(&["--type", "f32", "--adapter", adapter, "--adapter-only", "--out", "lora.gguf"]);
    for (kind, out) in [("f32", "f32.gguf"), ("f16", "f16.gguf"), ("q8_0", "q8.gguf"), ("q4_0", "q4.gguf")] {
        export(&["--type", kind, "--adapter", adapter, "--out", out]);
    }
    let text = "Ahoy! It was 1851, and the café was closed; don't ask why.";
    let tokenizer = shanty_data::Tokenizer::load(Path::new(base)).unwrap();
    let ids = serde_json::json!([tokenizer.encode(text, false).unwrap()]).to_string();
    ok(
        &place,
        &[
            "logits",
            "--model",
            base,
            "--adapter",
            adapter,
            "--quantization",
            "none",
            "--ids",
            &ids,
            "--out",
            "ours.safetensors",
        ],
    );
    let check = Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/open_in_llama_cpp.py"))
        .args(["--folder", ".", "--text", text, "--ids", &ids, "--logits", "ours.safetensors"])
        .current_dir(place.folder.path())
        .output()
        .unwrap();
    let (said, complained) = (String::from_utf8_lossy(&check.stdout), String::from_utf8_lossy(&check.stderr));
    assert!(check.status.success(), "{said}\n{complained}");
}
