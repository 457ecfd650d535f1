use std::{net::SocketAddr, time::Duration};

use shanty_config::{load_coordinator, load_worker};
use shanty_diagnostic::Diagnose;

use crate::{Bench, owned};

#[test]
fn the_services_start_without_a_file() {
    let coordinator = load_coordinator(None, &[]).expect("the defaults are right").value;
    assert_eq!(coordinator.address(), Ok(SocketAddr::from(([127, 0, 0, 1], 7461))));
    assert!(coordinator.state_dir.is_absolute());
    assert_eq!(coordinator.beat_interval(), Duration::from_millis(250));
    let worker = load_worker(None, &[]).expect("the defaults are right").value;
    assert_eq!(worker.coordinator, "http://127.0.0.1:7461");
    assert_eq!(worker.logs_dir(), worker.state_dir.join("logs"));
}

#[test]
fn a_service_file_has_its_own_keys_and_paths() {
    let bench = Bench::new();
    let file = bench.write("c.toml", "listen = \"127.0.0.1:0\"\nstate_dir = \"state\"\n");
    let flags = owned(&[("credit_ms", "60000")]);
    let coordinator = load_coordinator(Some(&file), &flags).expect("right");
    assert_eq!(coordinator.value.state_dir, bench.path("state"));
    assert_eq!(coordinator.value.credit_ms, 60_000);
    let file = bench.write("w.toml", "threads = 3\ndevice = \"cpu\"\nlogs = \"l\"\n");
    let worker = load_worker(Some(&file), &[]).expect("right").value;
    assert_eq!((worker.threads, worker.logs_dir()), (Some(3), bench.path("l")));
}

#[test]
fn wrong_service_files_are_answered_like_job_files() {
    let bench = Bench::new();
    let cases = [
        ("listen = \"localhost\"\n", "SH0104", 1),
        ("\nlisten = \"0.0.0.0:7461\"\n", "SH0104", 2),
        ("beat_interval_ms = 0\n", "SH0104", 1),
        ("beat_interval_ms = 1000\nlost_after_ms = 1500\n", "SH0104", 2),
        ("credit = 3\n", "SH0102", 1),
        ("insecure = \"yes\"\n", "SH0103", 1),
        ("cert = \"head.pem\"\n", "SH0104", 1),
        ("\nkey = \"head.key\"\n", "SH0104", 2),
        ("ca = \"ca.pem\"\n", "SH0104", 1),
        ("cert = \"c\"\nkey = \"k\"\nrevoked = \"r\"\n", "SH0104", 3),
        ("cert = \"c\"\nkey = \"k\"\ninsecure = true\n", "SH0104", 1),
        ("health_listen = \"7462\"\n", "SH0104", 1),
    ];
    for (text, code, line) in cases {
        let file = bench.write("c.toml", text);
        let error = load_coordinator(Some(&file), &[]).expect_err(text).diagnostic();
        assert_eq!((error.code.as_str(), error.line), (code, Some(line)), "{text}: {error}");
    }
    let file = bench.write("c.toml", "insecure = true\nlisten = \"0.0.0.0:7461\"\n");
    assert!(load_coordinator(Some(&file), &[]).is_ok(), "said aloud, it is allowed");
    let tls =
        "listen = \"0.0.0.0:7461\"\ncert = \"tls/head.pem\"\nkey = \"tls/head.key\"\nca = \"tls/ca.pem\"\n";
    let file = bench.write("c.toml", tls);
    let coordinator = load_coordinator(Some(&file), &[]).expect("with TLS it is allowed").value;
    assert_eq!(coordinator.cert, Some(bench.path("tls/head.pem")), "paths count from the file");
    let cases = [
        ("coordinator = \"127.0.0.1:7461\"\n", "SH0104"),
        ("threads = 0\n", "SH0104"),
        ("bind = \"eth0\"\n", "SH0104"),
        ("device = \"tpu\"\n", "SH0107"),
        ("key = \"node.key\"\n", "SH0104"),
    ];
    for (text, code) in cases {
        let file = bench.write("w.toml", text);
        let error = load_worker(Some(&file), &[]).expect_err(text).diagnostic();
        assert_eq!((error.code.as_str(), error.line), (code, Some(1)), "{text}: {error}");
    }
}

#[test]
fn a_value_of_a_service_is_answered_with_its_own_flag_or_variable() {
    let error = load_worker(None, &owned(&[("threads", "0")])).expect_err("wrong").diagnostic();
    assert!(error.message.ends_with("(from `--threads 0`)"), "{error}");
    let error = load_coordinator(None, &owned(&[("steps_ahead", "some")])).expect_err("wrong").diagnostic();
    assert!(error.message.ends_with("(from `--steps-ahead some`)"), "{error}");
}

#[test]
fn the_files_that_are_deployed_are_right() {
    let deployed = |name: &str| {
        std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/systemd")).join(name)
    };
    let coordinator = load_coordinator(Some(&deployed("coordinator.toml")), &[]).expect("right").value;
    assert_eq!(coordinator.state_dir, std::path::Path::new("/var/lib/shanty/coordinator"));
    let worker = load_worker(Some(&deployed("worker.toml")), &[]).expect("right").value;
    assert_eq!(worker.state_dir, std::path::Path::new("/var/lib/shanty/worker"));
}
