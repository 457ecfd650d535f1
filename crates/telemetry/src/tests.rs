use std::sync::mpsc::sync_channel;

use shanty_diagnostic::Diagnose;
use tracing::{debug, info, info_span, warn};

use super::*;

fn nothing(_: &str) -> Option<String> {
    None
}

fn quiet() -> Options {
    Options { format: Format::None, ..Options::default() }
}

fn with_layers<T>(layers: Vec<BoxedLayer>, work: impl FnOnce() -> T) -> T {
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layers), work)
}

#[test]
fn a_listener_gets_message_fields_and_the_spans_around() {
    let (sender, receiver) = sync_channel(8);
    let options = Options { forward: Some(sender.into()), ..quiet() };
    let (layers, guard) = build(options, &nothing).expect("start");
    with_layers(layers, || {
        let span = info_span!("step", step = 7, worker = "w-1", reason = tracing::field::Empty).entered();
        span.record("reason", "lost beat");
        warn!(loss = 1.5, name = "a b", "loss rose");
        debug!("below the level");
    });
    let line = receiver.try_recv().expect("a line");
    assert_eq!(line.text, r#"loss rose loss=1.5 name="a b" step=7 worker=w-1 reason="lost beat""#);
    assert_eq!((line.level, line.target.as_str()), (Level::Warn, "shanty_telemetry::tests"));
    assert!(line.unix_ms > 1_600_000_000_000);
    assert!(receiver.try_recv().is_err(), "debug is off unless asked for");
    assert_eq!(guard.dropped(), 0);
}

#[test]
fn a_full_listener_drops_lines_and_counts_them() {
    let (sender, receiver) = sync_channel(2);
    let (layers, guard) =
        build(Options { forward: Some(sender.into()), ..quiet() }, &nothing).expect("start");
    with_layers(layers, || {
        for number in 0..5 {
            info!(number, "line");
        }
    });
    assert_eq!(receiver.try_iter().count(), 2);
    assert_eq!(guard.dropped(), 3);
}

#[test]
fn the_file_holds_one_json_object_a_line_when_the_guard_is_gone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("logs/worker.log");
    let (layers, guard) = build(Options { file: Some(path.clone()), ..quiet() }, &nothing).expect("start");
    with_layers(layers, || {
        info!(step = 3, "step applied");
        warn!("worker missed its heartbeat");
    });
    drop(guard);
    let text = std::fs::read_to_string(path).expect("the log file");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!((&lines[0]["message"], &lines[0]["step"]), (&"step applied".into(), &3.into()));
    assert_eq!(lines[1]["level"], "WARN");
}

#[test]
fn the_variable_wins_over_the_level_and_a_wrong_one_is_answered() {
    let (sender, receiver) = sync_channel(8);
    let options = Options { level: Some("error".to_owned()), forward: Some(sender.into()), ..quiet() };
    let environment = |name: &str| (name == SHANTY_LOG).then(|| "shanty_telemetry=debug".to_owned());
    let (layers, _guard) = build(options, &environment).expect("start");
    with_layers(layers, || debug!("seen"));
    assert_eq!(receiver.try_iter().count(), 1);

    let wrong = |name: &str| (name == SHANTY_LOG).then(|| "shanty=loud".to_owned());
    let options = Options { format: Format::Json, ..Options::default() };
    let error = build(options, &wrong).err().expect("refused").diagnostic();
    assert_eq!(error.code, "SH0115");
    assert!(error.message.contains("SHANTY_LOG `shanty=loud`"), "{error}");
}

#[test]
fn a_log_file_that_cannot_be_opened_is_answered() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let options = Options { file: Some(folder.path().to_owned()), ..quiet() };
    let error = build(options, &nothing).err().expect("refused").diagnostic();
    assert_eq!(error.code, "SH0116");
}
