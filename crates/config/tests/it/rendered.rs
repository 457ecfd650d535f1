use shanty_config::{
    check_files,
    render::{render, render_all, render_warning, to_json},
};
use shanty_diagnostic::{Diagnose, Diagnostic};

use crate::{Bench, GOOD};

/// What a user sees, with the temporary folder called `/jobs`.
fn shown(bench: &Bench, diagnostics: Vec<Diagnostic>) -> String {
    let folder = bench.folder().to_str().expect("UTF-8");
    let named: Vec<Diagnostic> = diagnostics
        .into_iter()
        .map(|mut diagnostic| {
            diagnostic.message = diagnostic.message.replace(folder, "/jobs");
            diagnostic.hint = diagnostic.hint.map(|hint| hint.replace(folder, "/jobs"));
            diagnostic
        })
        .collect();
    render_all(&named, false).replace(folder, "/jobs")
}

fn shown_errors(text: impl AsRef<[u8]>) -> String {
    let bench = Bench::new();
    let errors = bench.load(text).expect_err("wrong");
    shown(&bench, errors.diagnostics())
}

fn shown_file_errors(text: &str) -> String {
    let bench = Bench::new();
    let job = bench.load(text).unwrap_or_else(|errors| panic!("{errors}"));
    let errors = check_files(&job).expect_err("wrong");
    shown(&bench, errors.diagnostics())
}

macro_rules! snapshots {
    ($($name:ident: $shown:expr;)*) => {
        $(#[test]
        fn $name() {
            insta::assert_snapshot!(stringify!($name), $shown);
        })*
    };
}

snapshots! {
    unknown_key: shown_errors(format!("{GOOD}learnign_rate = 2e-4\n"));
    unknown_key_of_another_table: shown_errors(format!("{GOOD}lora_alpha = 2\n"));
    unknown_key_like_no_other: shown_errors(format!("{GOOD}[checkpoint]\nweather = \"fair\"\n"));
    unknown_key_in_an_inline_table: shown_errors(format!("{GOOD}[cluster]\nworkers = {{ min = 1, maximum = 8 }}\n"));
    wrong_type: shown_errors(format!("{GOOD}seed = \"17\"\n"));
    wrong_type_in_a_list: shown_errors(format!("{GOOD}[adapter]\ntarget_modules = [\n  \"q_proj\",\n  7,\n]\n"));
    impossible_value: shown_errors(format!("{GOOD}[adapter]\nr = 0\n"));
    impossible_values: shown_errors(format!("{GOOD}betas = [0.9, 1.5]\nglobal_batch_size = 0\n"));
    missing_key: shown_errors("name = \"pirate\"\n\n[base]\nquantization = \"nf4\"\n\n[data]\ntrain = \"d.jsonl\"\n");
    missing_name: shown_errors("[base]\nmodel = \"m\"\n[data]\ntrain = \"d.jsonl\"\n");
    syntax: shown_errors("name = \"pirate\n[base]\nmodel = \"m\"\n");
    key_twice: shown_errors(format!("{GOOD}steps = 11\n"));
    unknown_word: shown_errors(format!("{GOOD}schedule = \"cosin\"\n"));
    unknown_quantization: shown_errors(GOOD.replace("[data]", "quantization = \"int8\"\n[data]"));
    not_utf8: shown_errors(b"name = \"caf\xe9\"\n");
    letters_beyond_ascii: shown_errors(format!("{GOOD}[sample]\nprompt = \"où\" # é\nmax_token = 3\n"));
    model_is_missing: shown_file_errors(&GOOD.replace("\"model\"", "\"models/tiny\""));
    data_is_missing: shown_file_errors(&GOOD.replace("*.jsonl", "*.parquet"));
    above_the_context: shown_file_errors(&GOOD.replace("256", "4096"));
}

#[test]
fn missing_file() {
    let bench = Bench::new();
    let errors = shanty_config::load_job_with(&bench.path("jbo.toml"), Vec::new(), &[]).expect_err("missing");
    insta::assert_snapshot!(shown(&bench, errors.diagnostics()));
}

#[test]
fn value_from_a_flag() {
    let bench = Bench::new();
    let errors = bench.load_with(GOOD, &[], &[("adapter.r", "0")]).expect_err("wrong");
    insta::assert_snapshot!(shown(&bench, errors.diagnostics()));
}

#[test]
fn value_from_a_variable() {
    let bench = Bench::new();
    let errors = bench.load_with(GOOD, &[("SHANTY_JOB__TRAIN__LR", "1")], &[]).expect_err("wrong");
    insta::assert_snapshot!(shown(&bench, errors.diagnostics()));
}

#[test]
fn warning() {
    let bench = Bench::new();
    let job = bench.load(format!("{GOOD}learning_rate = 0.2\n")).expect("allowed");
    let folder = bench.folder().to_str().expect("UTF-8");
    insta::assert_snapshot!(render_warning(&job.warnings[0], false).replace(folder, "/jobs"));
}

#[test]
fn fault_far_along_a_long_line_of_data() {
    let bench = Bench::new();
    let long = format!("{{\"text\": \"{}\", \"txet\": 3}}", "heave ho ".repeat(500));
    let path = bench.write("data/long.jsonl", format!("{{}}\n{long}\n"));
    let column = long.find("txet").expect("it is there");
    let error = Diagnostic::new("SH0203", "unknown column").in_file(&path).at_line(2).at_column(column, 6);
    insta::assert_snapshot!(shown(&bench, vec![error]));
}

#[test]
fn colour_adds_escapes_and_its_absence_leaves_plain_ascii() {
    let bench = Bench::new();
    let error = bench.load(format!("{GOOD}seed = \"x\"\n")).expect_err("wrong").diagnostic();
    assert!(render(&error, true).contains("\u{1b}["));
    let plain = render(&error, false);
    assert!(plain.is_ascii() && !plain.contains('\u{1b}'), "{plain}");
    assert!(plain.contains("SH0103") && plain.contains("job.toml:10:8") && plain.contains("^^^"), "{plain}");
}

#[test]
fn a_place_that_is_gone_is_still_told() {
    let error =
        Diagnostic::new("SH0103", "wrong").in_file("/gone.toml").at_line(4).at_column(2, 1).hint("look");
    let plain = render(&error, false);
    assert!(plain.contains("in /gone.toml:4:2") && plain.contains("hint: look"), "{plain}");
}

#[test]
fn scripts_get_one_object_in_one_line() {
    let bench = Bench::new();
    let error = bench.load(format!("{GOOD}seed = \"17\"\n")).expect_err("wrong").diagnostic();
    let line = to_json(&error);
    let object: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    let keys: Vec<&String> = object.as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["code", "message", "file", "line", "column", "hint"]);
    assert_eq!(
        (&object["code"], &object["line"], &object["column"]),
        (&"SH0103".into(), &10.into(), &8.into())
    );
    assert!(!line.contains('\n'));
}
