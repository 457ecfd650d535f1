//! Real processes that ask who it is: over TLS, with certificates and tokens; and where their secrets are not.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use shanty_testkit::{Finished, Running, TinyJob, process::PATIENCE, wait};

use crate::support::Place;

/// Every file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn holds(bytes: &[u8], secret: &str) -> bool {
    bytes.windows(secret.len()).any(|window| window == secret.as_bytes())
}

/// Command lines of all processes that can be read.
fn command_lines() -> Vec<Vec<u8>> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok()).collect()
}

/// The part of a token or of a PEM file that nobody may see.
fn hidden(text: &str) -> String {
    let last = text.trim().rsplit('-').find(|part| part.len() >= 40).unwrap_or_default();
    let line = last.lines().find(|line| line.len() >= 40).unwrap_or(last);
    assert!(line.len() >= 40, "no secret in it");
    line.to_owned()
}

struct Crew {
    place: Place,
    address: String,
    coordinator: Running,
    /// By name.
    secrets: Vec<(&'static str, String)>,
}

impl Crew {
    /// An authority, and a coordinator with TLS that knows it.
    fn start(job: TinyJob) -> Self {
        let place = Place::new(job).unwrap().environment("SHANTY_LOG", "debug");
        let shanty = &place.shanty;
        let run = |arguments: &[&str]| shanty.run(arguments).unwrap().expect_code(0).unwrap();
        run(&["certs", "init"]);
        run(&["certs", "issue", "head", "--role", "coordinator"]);
        run(&["certs", "issue", "node", "--role", "worker"]);
        let mut coordinator = shanty
            .start(&[
                "coordinator",
                "--listen",
                "127.0.0.1:0",
                "--state-dir",
                "state",
                "--cert",
                "certs/head.pem",
                "--key",
                "certs/head.key",
                "--ca",
                "certs/ca.pem",
                "--revoked",
                "certs/revoked.pem",
                "--output",
                "json",
            ])
            .unwrap();
        let event = coordinator.wait_for("the address", |event| event["event"] == "listening").unwrap();
        let address = event["address"].as_str().unwrap().to_owned();
        assert!(address.starts_with("https://") && event["asks_who"] == true, "{event}");
        let local_key = fs::read_to_string(event["local_key"].as_str().unwrap()).unwrap();
        let key = |name: &str| hidden(&fs::read_to_string(place.path(&format!("certs/{name}.key"))).unwrap());
        let secrets = vec![
            ("the local key", hidden(&local_key)),
            ("the authority's key", key("ca")),
            ("the coordinator's key", key("head")),
            ("the worker's key", key("node")),
            ("the seed", hidden(&fs::read_to_string(place.path("state/seed.key")).unwrap())),
        ];
        Self { place, address, coordinator, secrets }
    }

    fn ask(&self, arguments: &[&str]) -> Finished {
        let tail = ["--coordinator", &self.address, "--ca", "certs/ca.pem", "--output", "json"];
        self.place.shanty.run(&[arguments, &tail[..]].concat()).unwrap()
    }

    fn code(&self, arguments: &[&str]) -> String {
        let refused = self.ask(arguments).expect_code(2).unwrap();
        refused.error().unwrap()["code"].as_str().unwrap().to_owned()
    }

    /// Makes a token into a file, by the key that the coordinator left.
    fn token(&mut self, name: &'static str, more: &[&str]) {
        let file = format!("{name}.token");
        let made = self.ask(&[&["token", "create", "--name", name, "--out", &file], more].concat());
        let made = made.expect_code(0).unwrap().object().unwrap();
        assert!(made.get("token").is_none(), "what goes into a file is not shown as well: {made}");
        self.secrets.push((name, hidden(&fs::read_to_string(self.place.path(&file)).unwrap())));
    }

    fn worker(&self, credentials: &[&str]) -> Running {
        let head = ["worker", "--coordinator", &self.address, "--ca", "certs/ca.pem", "--device", "cpu"];
        self.place.shanty.start(&[&head[..], &["--threads", "1"], credentials].concat()).unwrap()
    }

    fn until(&self, job: &str, what: &str, accept: impl Fn(&Value) -> bool) -> Value {
        wait::until(what, PATIENCE, || {
            Ok(self.ask(&["status", job]).object().ok().filter(|status| accept(status)))
        })
        .unwrap()
    }

    fn look_into_command_lines(&self) {
        for line in command_lines() {
            for (name, secret) in &self.secrets {
                assert!(!holds(&line, secret), "{name} stands in {}", String::from_utf8_lossy(&line));
            }
        }
    }
}

#[test]
fn a_crew_over_tls_trains_and_its_secrets_are_nowhere_to_be_read() {
    let mut crew = Crew::start(TinyJob { steps: 60, every_steps: 20, workers: (2, 2), ..TinyJob::default() });
    crew.token("ann", &["--role", "submit"]);
    crew.token("crew", &["--role", "worker", "--expires", "1h"]);
    // Roles hold for real processes as well.
    assert_eq!(crew.code(&["submit", "job.toml", "--token-file", "crew.token"]), "SH0741");
    assert_eq!(crew.code(&["token", "list", "--token-file", "ann.token"]), "SH0741");
    let node = ["--cert", "certs/node.pem", "--key", "certs/node.key"];
    let submitted = crew.ask(&["submit", "job.toml", "--token-file", "ann.token"]).expect_code(0).unwrap();
    let job = submitted.object().unwrap()["job"].as_str().unwrap().to_owned();
    let workers = [crew.worker(&node), crew.worker(&["--token-file", "crew.token"])];
    crew.until(&job, "the crew at work", |status| status["step"].as_u64() >= Some(3));
    crew.look_into_command_lines();
    let over = crew.until(&job, "the end", |status| status["state"] == "succeeded");
    assert_eq!((&over["step"], &over["ledger"]["duplicates"]), (&60.into(), &0.into()));

    // A user's list of tokens shows no secret.
    let listed = crew.ask(&["token", "list"]).expect_code(0).unwrap();
    assert_eq!(listed.events().len(), 2);
    // What was taken back opens nothing, and the worker that ran on it ends with an error of its own.
    crew.ask(&["token", "revoke", "crew"]).expect_code(0).unwrap();
    let [first, second] = workers;
    let second = second.finish().unwrap();
    assert_eq!(second.code(), Some(2), "{}", second.stderr);
    crew.ask(&["token", "revoke", "ann"]).expect_code(0).unwrap();
    assert_eq!(crew.code(&["jobs", "--token-file", "ann.token"]), "SH0740");
    let revoked = crew.place.shanty.run(&["certs", "revoke", "node"]).unwrap().expect_code(0).unwrap();
    assert!(revoked.stdout.contains("revoked"));
    let shown = crew.place.shanty.run(&["certs", "show"]).unwrap().expect_code(0).unwrap().stdout;
    assert!(shown.lines().any(|line| line.starts_with("node ") && line.contains("revoked")), "{shown}");

    let mut said = vec![("a worker", second), ("a worker", first.kill_all().unwrap())];
    let secrets = std::mem::take(&mut crew.secrets);
    said.push(("the coordinator", crew.coordinator.kill_all().unwrap()));
    said.push(("a command", listed));
    for (who, finished) in &said {
        for (name, secret) in &secrets {
            let text = [finished.stdout.as_bytes(), finished.stderr.as_bytes()].concat();
            assert!(!holds(&text, secret), "{who} showed {name}");
        }
    }
    // Files where each secret belongs; all others are looked through: the store, logs, row logs, checkpoints.
    let own =
        ["certs/ca.key", "certs/head.key", "certs/node.key", "state/seed.key", "ann.token", "crew.token"];
    let own = own.map(|file| crew.place.path(file));
    let others: Vec<PathBuf> =
        files(crew.place.folder.path()).into_iter().filter(|path| !own.contains(path)).collect();
    assert!(others.iter().any(|path| path.ends_with("state/coordinator.sqlite")), "{others:?}");
    assert!(others.iter().any(|path| path.to_string_lossy().contains("checkpoint")), "{others:?}");
    for path in &others {
        let bytes = fs::read(path).unwrap();
        for (name, secret) in &secrets {
            assert!(!holds(&bytes, secret), "{} holds {name}", path.display());
        }
    }
}

#[test]
fn a_local_run_is_closed_to_those_without_its_key() {
    let place = Place::new(TinyJob { steps: 100_000, every_steps: 1000, ..TinyJob::default() }).unwrap();
    let mut running = place.start(1).unwrap();
    running.wait_for_step(2).unwrap();
    let address = fs::read_to_string(place.store().join("coordinator/address")).unwrap().trim().to_owned();
    // The same user's commands find the key; whoever does not have it is told nothing.
    place.shanty.run(&["jobs", "--coordinator", &address]).unwrap().expect_code(0).unwrap();
    let stranger = place
        .shanty
        .clone()
        .environment("XDG_STATE_HOME", "/nonexistent")
        .environment("TMPDIR", "/nonexistent");
    for command in [vec!["jobs"], vec!["cancel", "tiny-1"], vec!["token", "create", "--role", "admin"]] {
        let refused =
            stranger.run(&[&command[..], &["--coordinator", &address, "--output", "json"]].concat()).unwrap();
        assert_eq!(refused.expect_code(2).unwrap().error().unwrap()["code"], "SH0740", "{command:?}");
    }
    // Its workers hold a token that is in no argument.
    let environment = |pid: u32| fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let token = running.descendants().into_iter().find_map(|pid| {
        let text = String::from_utf8_lossy(&environment(pid)).into_owned();
        text.split('\0').find_map(|line| line.strip_prefix("SHANTY_TOKEN=").map(str::to_owned))
    });
    let token = token.expect("a worker has a token");
    let secret = hidden(&token);
    assert!(!command_lines().iter().any(|line| holds(line, &secret)));
    // That token works for the run's job, and does nothing else.
    let worker = place.shanty.clone().environment("SHANTY_TOKEN", &token);
    let refused = worker.run(&["cancel", "tiny-1", "--coordinator", &address, "--output", "json"]).unwrap();
    assert_eq!(refused.expect_code(2).unwrap().error().unwrap()["code"], "SH0741");
    running.interrupt();
    running.finish().unwrap().expect_code(130).unwrap();
    for path in files(&place.store()) {
        assert!(!holds(&fs::read(&path).unwrap(), &secret), "{} holds the workers' token", path.display());
    }
}

#[test]
fn what_would_give_a_secret_away_is_refused() {
    let place = Place::new(TinyJob::default()).unwrap();
    let token = format!("shanty-{}-{}", "0".repeat(12), "0".repeat(64));
    fs::write(place.path("open.token"), &token).unwrap();
    set_mode(&place.path("open.token"), 0o644);
    let code = |shanty: &shanty_testkit::Shanty, arguments: &[&str]| {
        let refused =
            shanty.run(&[arguments, &["--output", "json"]].concat()).unwrap().expect_code(2).unwrap();
        refused.error().unwrap()["code"].as_str().unwrap().to_owned()
    };
    let jobs = |address: &'static str| ["jobs", "--coordinator", address];
    let with_file = [&jobs("http://127.0.0.1:1")[..], &["--token-file", "open.token"]].concat();
    assert_eq!(code(&place.shanty, &with_file), "SH0746", "others can read the file");
    let with_token = place.shanty.clone().environment("SHANTY_TOKEN", &token);
    assert_eq!(code(&with_token, &jobs("http://203.0.113.1:7461")), "SH0746", "in clear over a network");
    let with_nonsense = place.shanty.clone().environment("SHANTY_TOKEN", "hunter2");
    assert_eq!(code(&with_nonsense, &jobs("https://203.0.113.1:7461")), "SH0746", "no token");
    let beyond = ["coordinator", "--listen", "0.0.0.0:0", "--state-dir", "state"];
    assert_eq!(code(&place.shanty, &beyond), "SH0104", "beyond loopback without TLS");
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}
