//! What people read: help and errors, whole, as they look.

use shanty_testkit::TinyJob;

use crate::support::Place;

/// Paths of this run and versions come out as words that stay.
fn filtered(place: &Place, text: &str) -> String {
    let folder = place.folder.path().display().to_string();
    text.replace(&folder, "[FOLDER]").replace(env!("CARGO_PKG_VERSION"), "[VERSION]")
}

fn stdout(arguments: &[&str]) -> String {
    let place = Place::new(TinyJob::default()).unwrap();
    let finished = place.shanty.run(arguments).unwrap().expect_code(0).unwrap();
    filtered(&place, &finished.stdout)
}

fn stderr(toml: impl Fn(String) -> String, arguments: &[&str]) -> String {
    let place = Place::new(TinyJob::default()).unwrap();
    std::fs::write(place.path("job.toml"), toml(place.job.toml())).unwrap();
    let finished = place.shanty.run(arguments).unwrap().expect_code(2).unwrap();
    filtered(&place, &finished.stderr)
}

#[test]
fn help_of_the_program() {
    insta::assert_snapshot!(stdout(&["--help"]));
}

#[test]
fn help_of_run() {
    insta::assert_snapshot!(stdout(&["run", "--help"]));
}

#[test]
fn help_of_generate() {
    insta::assert_snapshot!(stdout(&["generate", "--help"]));
}

#[test]
fn help_of_chat() {
    insta::assert_snapshot!(stdout(&["chat", "--help"]));
}

#[test]
fn help_of_eval() {
    insta::assert_snapshot!(stdout(&["eval", "--help"]));
}

#[test]
fn help_of_merge() {
    insta::assert_snapshot!(stdout(&["merge", "--help"]));
}

#[test]
fn help_of_export_gguf() {
    insta::assert_snapshot!(stdout(&["export", "gguf", "--help"]));
}

#[test]
fn help_of_adapters() {
    insta::assert_snapshot!(stdout(&["adapters", "--help"]));
}

#[test]
fn version() {
    assert_eq!(stdout(&["--version"]), "shanty [VERSION]");
}

#[test]
fn an_unknown_key_has_a_caret_and_a_hint() {
    insta::assert_snapshot!(stderr(|toml| toml.replace("lora_alpha", "lora_alhpa"), &["run", "job.toml"]));
}

#[test]
fn targets_that_match_nothing_name_what_there_is() {
    insta::assert_snapshot!(stderr(
        |toml| toml.replace("\"all-linear\"", "[\"query\"]"),
        &["plan", "job.toml"]
    ));
}

#[test]
fn several_mistakes_are_told_at_once() {
    insta::assert_snapshot!(stderr(
        |toml| toml.replace("r = 4", "r = 0").replace("keep = 3", "keep = 0"),
        &["run", "job.toml"]
    ));
}
