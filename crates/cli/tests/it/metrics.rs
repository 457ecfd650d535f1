//! `/metrics` beside a real run: scraped by a real Prometheus, which finds what the status service says.

use std::{
    env, fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, bail};
use serde_json::Value;
use shanty_coordinator::metrics::table::{Kind, METRICS};
use shanty_testkit::{LocalCluster, TinyJob, process, wait};

use crate::support::Place;

/// A program of Debian's package `prometheus`. Without it a test is skipped aloud; where `SHANTY_REQUIRE_PROMETHEUS` is
/// set it fails.
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn program(name: &str) -> Option<PathBuf> {
    let folders = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.is_file());
    if found.is_none() {
        assert!(env::var_os("SHANTY_REQUIRE_PROMETHEUS").is_none(), "there is no `{name}`");
        eprintln!("skipped: there is no `{name}`; apt install prometheus");
    }
    found
}

/// Status and body of a page.
fn get(address: &str, method: &str, path: &str, token: Option<&str>) -> anyhow::Result<(u16, String)> {
    let address = address.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address)?;
    let shown = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: {address}\r\n{shown}Connection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("an answer has a head")?;
    let status = head.split(' ').nth(1).context("an answer has a status")?.parse()?;
    let is_chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Ok((status, if is_chunked { join_chunks(body)? } else { body.to_owned() }))
}

fn join_chunks(mut body: &str) -> anyhow::Result<String> {
    let mut joined = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length.trim(), 16)?;
        if length == 0 {
            break;
        }
        joined.push_str(&rest[..length]);
        body = rest[length..].trim_start_matches("\r\n");
    }
    Ok(joined)
}

/// A Prometheus that scrapes one coordinator every second. Killed when dropped.
struct Prometheus {
    child: Child,
    address: String,
}

impl Prometheus {
    fn start(program: &Path, folder: &Path, coordinator: &str) -> anyhow::Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let address = format!("127.0.0.1:{port}");
        // The file that we hand out, for this coordinator and in a hurry.
        let config = fs::read_to_string(deploy("grafana/prometheus.yml"))?;
        let config = config
            .replace("127.0.0.1:7461", coordinator.trim_start_matches("http://"))
            .replace("scrape_interval: 5s", "scrape_interval: 1s");
        let file = folder.join("prometheus.yml");
        fs::write(&file, config)?;
        let child = Command::new(program)
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("prometheus").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { child, address })
    }

    /// The values of a query by one label.
    fn query(&self, query: &str, label: &str) -> anyhow::Result<Vec<(String, f64)>> {
        let escaped: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let (status, body) = get(&self.address, "GET", &format!("/api/v1/query?query={escaped}"), None)?;
        if status != 200 {
            bail!("`{query}`: {status} {body}");
        }
        let answer: Value = serde_json::from_str(&body)?;
        let results = answer["data"]["result"].as_array().context("an answer has results")?;
        let value = |one: &Value| -> Option<(String, f64)> {
            let named = one["metric"][label].as_str().unwrap_or_default().to_owned();
            Some((named, one["value"][1].as_str()?.parse().ok()?))
        };
        Ok(results.iter().filter_map(value).collect())
    }

    /// Waits until a query gives a value that is as wanted.
    fn wait_for(&self, query: &str, accept: impl Fn(f64) -> bool) -> f64 {
        let mut last = None;
        wait::until(query, process::PATIENCE, || {
            // While it starts, it does not answer.
            last = self.query(query, "").ok();
            Ok(last.iter().flatten().map(|(_, value)| *value).find(|value| accept(*value)))
        })
        .unwrap_or_else(|error| panic!("{error}; the last answer was {last:?}"))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy").join(name)
}

/// Runs promtool; what it said, if it complained.
fn promtool(arguments: &[&str], input: &str) -> Option<Result<(), String>> {
    let mut child = Command::new(program("promtool")?)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Some(if output.status.success() { Ok(()) } else { Err(said) })
}

#[test]
fn a_real_prometheus_scrapes_a_real_run_that_loses_a_worker() {
    let Some(prometheus) = program("prometheus") else { return };
    let job = TinyJob { steps: 100_000, every_steps: 10, workers: (1, 2), ..TinyJob::default() };
    let place = Place::new(job).unwrap();
    let mut cluster = LocalCluster::start(place.shanty.clone(), &place.path("state")).unwrap();
    for _ in 0..2 {
        cluster.add_worker().unwrap();
    }
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    let both = |status: &Value| {
        status["step"].as_u64() >= Some(5) && status["members"].as_array().is_some_and(|all| all.len() == 2)
    };
    let status = cluster.wait_for_status(&job, "a crew of two", both).unwrap();
    let prometheus = Prometheus::start(&prometheus, place.folder.path(), cluster.address()).unwrap();
    prometheus.wait_for(r#"up{job="shanty"}"#, |up| up == 1.0);
    prometheus.wait_for(&format!(r#"sum(shanty_members{{job="{job}"}})"#), |members| members == 2.0);
    process::kill_9(status["members"][1]["pid"].as_u64().unwrap() as u32);

    // What happened is counted, and nothing else.
    prometheus
        .wait_for(&format!(r#"shanty_recoveries_total{{job="{job}",cause="lost"}}"#), |count| count == 1.0);
    prometheus.wait_for(&format!(r#"shanty_member_losses_total{{job="{job}"}}"#), |count| count == 1.0);
    let told = cluster.status(&job).unwrap();
    let recovery = &told["crew"]["recoveries"][0];
    let stall = prometheus.wait_for(r#"shanty_recovery_stall_seconds_sum{cause="lost"}"#, |sum| sum > 0.0);
    assert!((stall - recovery["stall_ms"].as_f64().unwrap() / 1000.0).abs() < 1e-9, "{stall} {recovery}");
    prometheus.wait_for(r#"shanty_recovery_detection_seconds_count{cause="lost"}"#, |count| count == 1.0);
    let rows =
        prometheus.wait_for(&format!(r#"shanty_recovery_requeued_rows_total{{job="{job}"}}"#), |_| true);
    assert_eq!(Some(rows), recovery["rows_requeued"].as_f64());
    prometheus.wait_for(r#"shanty_jobs{state="running"}"#, |count| count == 1.0);
    prometheus.wait_for(&format!(r#"shanty_rows{{job="{job}",state="duplicates"}}"#), |count| count == 0.0);

    // Counters count what the status counts: steps since the start of this coordinator are all steps.
    let steps = format!(r#"shanty_steps_total{{job="{job}"}} - on(job) shanty_job_step"#);
    prometheus.wait_for(&steps, |difference| difference.abs() <= 1.0);
    prometheus.wait_for(&format!(r#"rate(shanty_tokens_total{{job="{job}"}}[10s])"#), |rate| rate > 1.0);
    prometheus.wait_for(&format!(r#"shanty_checkpoint_age_seconds{{job="{job}"}}"#), |age| age < 60.0);
    prometheus.wait_for(&format!(r#"shanty_checkpoint_size_bytes{{job="{job}"}}"#), |size| size > 1000.0);
    prometheus.wait_for(&format!(r#"shanty_job_loss{{job="{job}"}}"#), |loss| loss > 0.0 && loss < 20.0);
    prometheus.wait_for("process_resident_memory_bytes", |bytes| bytes > 1e6);
    prometheus.wait_for("rate(process_cpu_seconds_total[10s])", |cores| cores > 0.0);
    let calls = r#"histogram_quantile(0.5, sum by (le) (shanty_rpc_duration_seconds_bucket{call="/shanty.v1.WorkerService/LeaseRows",outcome="ok"}))"#;
    prometheus.wait_for(calls, |seconds| seconds > 0.0 && seconds < 10.0);
    // A machine without cards says so; it does not leave the question open.
    prometheus
        .wait_for(&format!(r#"shanty_device_monitored{{job="{job}",device="cpu"}}"#), |there| there == 0.0);
    prometheus.wait_for(&format!(r#"shanty_worker_resident_bytes{{job="{job}"}}"#), |bytes| bytes > 1e6);
    let parts = prometheus.query(&format!(r#"shanty_worker_step_seconds{{job="{job}"}}"#), "part").unwrap();
    let compute = parts.iter().find(|(part, _)| part == "compute").unwrap();
    assert!(parts.len() == 4 && compute.1 > 0.0, "{parts:?}");
    let series = prometheus.query(r#"count({__name__=~"shanty_.+"})"#, "").unwrap();
    println!("{} series of one job with one worker left", series[0].1);
}

#[test]
fn the_page_is_for_readers_and_its_names_are_as_prometheus_wants_them() {
    let job = TinyJob {
        steps: 100_000,
        every_steps: 5,
        eval_every_steps: 5,
        workers: (1, 1),
        ..TinyJob::default()
    };
    let place = Place::new(job).unwrap();
    let mut cluster = LocalCluster::start(place.shanty.clone(), &place.path("state")).unwrap();
    cluster.add_worker().unwrap();
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    cluster
        .wait_for_status(&job, "a checkpoint", |status| {
            status["checkpoints"].as_array().is_some_and(|list| !list.is_empty())
        })
        .unwrap();
    let page = wait::until("what the worker takes", process::PATIENCE, || {
        let (status, page) = get(cluster.address(), "GET", "/metrics", None)?;
        assert_eq!(status, 200, "this machine is let in: {page}");
        Ok(page.contains("shanty_worker_resident_bytes{").then_some(page))
    })
    .unwrap();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        assert!(declared(name), "`{name}` is not declared");
    }
    let families = page.lines().filter(|line| line.starts_with("# TYPE")).count();
    // Of a run on a CPU without losses all are there but those of cards and of recoveries.
    assert!(families + 12 >= METRICS.len(), "{families} of {}\n{page}", METRICS.len());
    if let Some(said) = promtool(&["check", "metrics"], &page) {
        said.unwrap_or_else(|said| panic!("promtool says:\n{said}"));
    }

    let token = |role: &str| {
        let made = cluster
            .ask(&["token", "create", "--role", role, "--name", role])
            .unwrap()
            .expect_code(0)
            .unwrap();
        let made = made.object().unwrap();
        let secret =
            ["secret", "token"].iter().find_map(|key| made[*key].as_str().filter(|text| text.len() > 20));
        secret.unwrap_or_else(|| panic!("{made}")).to_owned()
    };
    let status = |token: Option<&str>| get(cluster.address(), "GET", "/metrics", token).unwrap().0;
    assert_eq!(status(Some(&token("read"))), 200);
    assert_eq!(status(Some(&token("worker"))), 403, "a worker's token is for work alone");
    assert_eq!(status(Some("nonsense")), 401);
    assert_eq!(get(cluster.address(), "POST", "/metrics", None).unwrap().0, 405);
    let other = get(cluster.address(), "GET", "/metrics/more", None).unwrap();
    assert!(!other.1.contains("shanty_jobs"), "{other:?}");
}

/// Whether a name of a sample is one of a declared metric.
fn declared(name: &str) -> bool {
    METRICS.iter().any(|metric| match metric.kind {
        Kind::Histogram(_) => {
            name.strip_prefix(metric.name).is_some_and(|end| matches!(end, "_bucket" | "_sum" | "_count"))
        }
        Kind::Counter | Kind::Gauge => name == metric.name,
    })
}

/// All expressions of the dashboard, as Prometheus gets them from Grafana.
fn expressions(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let filled = |text: &str| {
        text.replace("$__rate_interval", "1m").replace("$job", "tiny|other").replace("$instance", ".*")
    };
    targets.map(|target| filled(target["expr"].as_str().unwrap())).collect()
}

#[test]
fn the_dashboard_asks_for_declared_metrics_in_expressions_that_parse() {
    let text = fs::read_to_string(deploy("grafana/shanty.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let expressions = expressions(&dashboard);
    assert!(expressions.len() > 30, "{}", expressions.len());
    let mut asked = Vec::new();
    for expression in &expressions {
        assert!(!expression.contains('$'), "a variable that nobody fills in: {expression}");
        let words = expression.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        let names: Vec<&str> =
            words.filter(|word| word.starts_with("shanty_") || word.starts_with("process_")).collect();
        assert!(!names.is_empty(), "{expression} asks for nothing of ours");
        for name in names {
            assert!(declared(name), "`{name}` in `{expression}` is not declared");
            asked.push(name.to_owned());
        }
    }
    // Labels, too: a typo there would show an empty panel.
    for expression in &expressions {
        for clause in expression.split('{').skip(1).filter_map(|rest| rest.split('}').next()) {
            for label in clause.split(',').filter_map(|pair| pair.split(['=', '!']).next()) {
                let known =
                    METRICS.iter().any(|metric| metric.labels.contains(&label)) || label == "instance";
                assert!(known, "label `{label}` in `{expression}`");
            }
        }
    }
    let wanted = [
        "shanty_job_loss",
        "shanty_rows",
        "shanty_members",
        "shanty_checkpoint_age_seconds",
        "shanty_queue_length",
    ];
    assert!(wanted.iter().all(|name| asked.iter().any(|one| one == name)), "{asked:?}");
    let rules = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": expressions.iter().enumerate().map(
        |(number, expr)| serde_json::json!({ "record": format!("panel:{number}"), "expr": expr })).collect::<Vec<_>>() }] });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules.yml");
    // JSON is YAML.
    fs::write(&file, rules.to_string()).unwrap();
    if let Some(said) = promtool(&["check", "rules", file.to_str().unwrap()], "") {
        said.unwrap_or_else(|said| panic!("promtool says:\n{said}"));
    }
    let config = deploy("grafana/prometheus.yml");
    if let Some(said) = promtool(&["check", "config", config.to_str().unwrap()], "") {
        said.unwrap_or_else(|said| panic!("promtool says:\n{said}"));
    }
}
