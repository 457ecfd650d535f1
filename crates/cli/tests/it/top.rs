//! `shanty top` beside real runs: what it shows is what the status service says, and the terminal survives it.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;
use shanty_access::Credentials;
use shanty_testkit::{LocalCluster, TinyJob, process, pty::Terminal, wait};
use shanty_tui::{
    feed::{self, Connect, Feed},
    state::{App, Input, Link, News, Page, Tab},
    view::{self, Theme},
};
use tokio::sync::{mpsc, watch};

use crate::support::Place;

const PLAIN: Theme = Theme { color: false, unicode: true };

fn cluster(place: &Place, workers: usize) -> LocalCluster {
    let mut cluster = LocalCluster::start(place.shanty.clone(), &place.path("state")).unwrap();
    for _ in 0..workers {
        cluster.add_worker().unwrap();
    }
    cluster
}

/// As the program connects: with the key that the coordinator left for its user.
fn connect(address: &str) -> Connect {
    let address = address.to_owned();
    Arc::new(move || {
        let address = address.clone();
        Box::pin(async move {
            let said = |error: &dyn std::error::Error| error.to_string();
            let endpoint =
                tonic::transport::Endpoint::from_shared(address.clone()).map_err(|error| said(&error))?;
            let url = url::Url::parse(&address).map_err(|error| said(&error))?;
            let token = local_token(&url)?;
            let credentials = Credentials { token: Some(token), ..Credentials::default() };
            let (endpoint, bearer) = credentials.prepare(&url, endpoint).map_err(|error| said(&error))?;
            let channel = endpoint.connect().await.map_err(|error| said(&error))?;
            Ok(shanty_access::Channel::new(channel, bearer))
        })
    })
}

/// The key lies where [`shanty_testkit::Shanty`] lets coordinators leave it.
fn local_token(url: &url::Url) -> Result<shanty_access::Secret, String> {
    let folder = std::env::temp_dir().join("shanty-tests/shanty");
    let port = url.port().unwrap_or_default().to_string();
    let found = walk(&folder).into_iter().find(|path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.contains(&port))
    });
    let path = found.ok_or_else(|| format!("no key of port {port} below {}", folder.display()))?;
    shanty_access::Secret::read(&path).map_err(|error| error.to_string())
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(walk(&path)) } else { found.push(path) }
    }
    found
}

/// Numbers, times, names, phases, curves and log lines change from run to run; what stands where does not.
fn masked(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let is_of_chart = line.contains('│');
        let masked = if is_of_chart { "CHART".to_owned() } else { masked_line(line) };
        out.push_str(masked.trim_end());
        out.push('\n');
    }
    out
}

fn masked_line(line: &str) -> String {
    const UNITS: [&str; 8] = ["ms", "s", "min", "h", "B", "KiB", "MiB", "GiB"];
    const PHASES: [&str; 7] = ["idle", "ready", "computing", "reducing", "waiting", "writing", "evaluating"];
    let mut words: Vec<String> = Vec::new();
    // Columns move with the numbers in them: spaces are one.
    for word in line.split(' ').filter(|word| !word.is_empty()) {
        let is_end_of_id = word.len() == 8 && word.chars().all(|letter| letter.is_ascii_hexdigit());
        let is_process = word.split_once(':').is_some_and(|(_, pid)| pid.parse::<u32>().is_ok());
        let bare = word.trim_end_matches(',');
        let masked = match word {
            _ if is_end_of_id => "WORKER".to_owned(),
            _ if is_process => "HOST".to_owned(),
            _ if word.starts_with('/') || word.starts_with("w-") => "NAME".to_owned(),
            _ if PHASES.contains(&word) => "PHASE".to_owned(),
            // A time may be of one unit or of two.
            _ if UNITS.contains(&bare) && words.last().is_some_and(|last| last == "9") => {
                words.pop();
                "9 UNIT".to_owned()
            }
            _ => digits(word),
        };
        if !(masked == "9 UNIT" && words.last().is_some_and(|last| last == "9 UNIT")) {
            words.push(masked);
        }
    }
    // What a worker said last is a matter of moments.
    if words.get(1).is_some_and(|word| word == "WORKER") && words.get(2).is_some_and(|word| word == "info") {
        return "LOG".to_owned();
    }
    words.join(" ")
}

/// A word with a 9 for each number.
fn digits(word: &str) -> String {
    let mut out = String::new();
    let mut in_number = false;
    for letter in word.chars() {
        let is_digit = letter.is_ascii_digit();
        let goes_on = in_number && matches!(letter, '.' | ',' | ':');
        if is_digit && !in_number {
            out.push('9');
        } else if !is_digit && !goes_on {
            out.push(letter);
        }
        in_number = is_digit || goes_on;
    }
    out
}

/// All that one page takes of a job, from the real service, as messages that were recorded.
fn recorded(cluster: &LocalCluster, job: &str) -> App {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let news = runtime.block_on(async {
        let channel = connect(cluster.address())().await.unwrap();
        feed::once(channel, Some(job)).await.unwrap()
    });
    let mut app = App::new(cluster.address()).showing(job);
    let ended = cluster.status(job).unwrap();
    let times = ["ended_unix_ms", "started_unix_ms"].map(|key| ended[key].as_u64().unwrap_or_default());
    // A moment after the end, whatever the clock says by now.
    app.update(Input::Time(times[0].max(times[1]) + 4000));
    for one in news {
        app.update(Input::News(one));
    }
    app
}

fn page(app: &mut App, tab: Tab, size: (u16, u16)) -> String {
    app.page = Page::Job(tab);
    let text = view::text(app, PLAIN, size);
    let longest = text.lines().map(|line| line.chars().count()).max().unwrap_or_default();
    assert!(longest <= usize::from(size.0) && text.lines().count() == usize::from(size.1), "{text}");
    text
}

#[test]
fn pages_show_what_the_status_service_says_of_a_real_run() {
    let job =
        TinyJob { steps: 24, every_steps: 8, eval_every_steps: 8, workers: (2, 2), ..TinyJob::default() };
    let place = Place::new(job).unwrap();
    let cluster = cluster(&place, 2);
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    let status = cluster.wait_for_status(&job, "the end", |status| status["state"] == "succeeded").unwrap();
    let mut app = recorded(&cluster, &job);
    let narrow = page(&mut app, Tab::Overview, (80, 24));
    println!("{narrow}");
    let number = |value: &Value| value.as_f64().unwrap();
    let expected = [
        format!("loss {:.4}", number(&status["loss"])),
        "step 24/24".to_owned(),
        format!("{} committed", status["ledger"]["committed"]),
        "0 double".to_owned(),
        format!("rate {:.1e}", number(&status["learning_rate"])),
        "step 24 is safe".to_owned(),
        "succeeded".to_owned(),
    ];
    for text in expected {
        assert!(narrow.contains(&text), "`{text}` in\n{narrow}");
    }
    insta::assert_snapshot!("overview_80x24", masked(&narrow));
    for tab in [Tab::Members, Tab::Recoveries, Tab::Checkpoints] {
        let text = page(&mut app, tab, (80, 24));
        println!("{text}");
        insta::assert_snapshot!(format!("{}_80x24", tab.title()), masked(&text));
    }
    let wide = page(&mut app, Tab::Overview, (160, 50));
    println!("{wide}");
    assert!(wide.contains("ADAPTER") || wide.contains("adapter "), "{wide}");
    let events = page(&mut app, Tab::Events, (80, 24));
    println!("{events}");
    let kinds = ["submitted", "prepared", "formed", "checkpoint", "state"];
    assert!(kinds.iter().filter(|kind| events.contains(**kind)).count() >= 4, "{events}");
    let logs = page(&mut app, Tab::Logs, (160, 50));
    println!("{logs}");
    assert!(logs.contains("step applied step=24"), "{logs}");
    // Letters of ASCII alone, where the terminal shows no others.
    app.page = Page::Job(Tab::Overview);
    let ascii = view::text(&app, Theme { color: false, unicode: false }, (80, 24));
    println!("{ascii}");
    assert!(ascii.is_ascii() && ascii.contains('*') && ascii.contains("===="), "{ascii}");
    // The smallest screens say so, and do not panic.
    for size in [(0, 0), (1, 1), (39, 8), (40, 8), (41, 9), (200, 8)] {
        for tab in Tab::ALL {
            app.page = Page::Job(tab);
            view::text(&app, PLAIN, size);
        }
    }
    // The program itself prints the same page where it has no terminal.
    let printed = place
        .shanty
        .clone()
        .environment("LINES", "24")
        .environment("COLUMNS", "80")
        .run(&["top", &job, "--coordinator", cluster.address()])
        .unwrap()
        .expect_code(0)
        .unwrap();
    assert!(printed.stdout.contains(&format!("loss {:.4}", number(&status["loss"]))), "{}", printed.stdout);
    assert!(printed.stderr.contains("no terminal"), "{}", printed.stderr);
    let list = place.shanty.run(&["top", "--once", "--coordinator", cluster.address()]).unwrap().stdout;
    assert!(list.contains(&job) && list.contains("succeeded") && list.contains("24/24"), "{list}");
}

/// What a screen knows while a crew loses a member and the coordinator is away.
#[test]
fn a_lost_worker_and_a_restarted_coordinator_are_seen_as_they_happen() {
    let job = TinyJob { steps: 100_000, every_steps: 50, workers: (1, 2), ..TinyJob::default() };
    let place = Place::new(job).unwrap();
    let mut cluster = cluster(&place, 2);
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    let crew_of_two = |status: &Value| {
        status["step"].as_u64() >= Some(5)
            && status["members"].as_array().is_some_and(|members| members.len() == 2)
    };
    let status = cluster.wait_for_status(&job, "a crew of two", crew_of_two).unwrap();
    let victim = status["members"][0]["pid"].as_u64().unwrap() as u32;

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (news, mut incoming) = mpsc::channel(256);
    let (_wanted, watched) = watch::channel(Some(job.clone()));
    let feed = Feed {
        connect: connect(cluster.address()),
        news,
        wanted: watched,
        every: Duration::from_millis(200),
    };
    let feed = runtime.spawn(feed.run());
    let mut app = App::new(cluster.address()).showing(&job);
    let mut until = |app: &mut App, what: &str, accept: &dyn Fn(&App) -> bool| {
        wait::until(what, process::PATIENCE, || {
            while let Ok(one) = incoming.try_recv() {
                app.update(Input::News(one));
            }
            app.update(Input::Time(now()));
            Ok(accept(app).then_some(()))
        })
        .unwrap_or_else(|error| panic!("{error}: {}", view::text(app, PLAIN, (120, 40))));
    };
    let points = |app: &App| app.job.as_ref().map_or(0, |job| job.history.steps().len());
    until(&mut app, "the curve", &|app| points(app) >= 5);
    let before = points(&app);
    until(&mut app, "a curve that moves", &|app| points(app) > before + 5);

    process::kill_9(victim);
    let killed = Instant::now();
    let is_missing = |app: &App| view::text(app, PLAIN, (120, 24)).contains("1 lost so far");
    until(&mut app, "the loss", &is_missing);
    println!("the loss was on the screen {:?} after the kill", killed.elapsed());
    app.page = Page::Job(Tab::Recoveries);
    until(&mut app, "the recovery", &|app| view::text(app, PLAIN, (80, 24)).contains("CAUSE"));
    let recoveries = view::text(&app, PLAIN, (120, 24));
    println!("{recoveries}");
    let told = cluster.status(&job).unwrap();
    let newest = &told["crew"]["recoveries"][0];
    assert!(recoveries.contains("CAUSE") && newest["cause"] == "lost", "{recoveries}\n{told}");
    // What the lost worker said last stands below its event, and in a file of its own.
    app.page = Page::Job(Tab::Events);
    until(&mut app, "its last words", &|app| {
        let text = view::text(app, PLAIN, (120, 40));
        text.contains("member_lost") && text.contains("it said")
    });
    println!("{}", view::text(&app, PLAIN, (120, 40)));
    let logs: Vec<_> = std::fs::read_dir(place.path(".shanty/worker/logs")).unwrap().flatten().collect();
    assert_eq!(logs.len(), 2, "one file a worker: {logs:?}");
    for log in logs {
        let text = std::fs::read_to_string(log.path()).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(lines.iter().any(|line| line["message"] == "worker started"), "{text}");
    }
    app.page = Page::Job(Tab::Overview);
    println!("{}", view::text(&app, PLAIN, (80, 24)));

    cluster.kill_coordinator().unwrap();
    until(&mut app, "no answer", &|app| matches!(app.link, Link::Lost { .. }));
    let away = view::text(&app, PLAIN, (80, 24));
    println!("{away}");
    assert!(
        away.contains("NO ANSWER") && away.contains("step "),
        "what was known stays on the screen: {away}"
    );
    let before = app.job.as_ref().and_then(|job| job.history.last()).map(|step| step.step);
    cluster.restart_coordinator().unwrap();
    until(&mut app, "the coordinator to be back", &|app| app.link == Link::Up);
    until(&mut app, "steps after the restart", &|app| {
        app.job.as_ref().and_then(|job| job.history.last()).map(|step| step.step) > before
    });
    let steps: Vec<u64> = app.job.iter().flat_map(|job| job.history.steps()).map(|step| step.step).collect();
    assert!(steps.is_sorted_by(|one, other| one < other), "no step twice: {steps:?}");
    feed.abort();

    let mut gone = App::new(cluster.address()).showing("nobody");
    gone.update(Input::News(News::NoSuchJob("there is no job `nobody`".to_owned())));
    assert!(view::text(&gone, PLAIN, (80, 24)).contains("no job `nobody`"));
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

#[test]
fn the_program_draws_listens_resizes_comes_back_and_leaves_the_terminal_clean() {
    let job = TinyJob { steps: 100_000, every_steps: 50, workers: (1, 1), ..TinyJob::default() };
    let place = Place::new(job).unwrap();
    let mut cluster = cluster(&place, 1);
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    cluster.wait_for_status(&job, "step 3", |status| status["step"].as_u64() >= Some(3)).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_shanty"));
    let arguments = ["top", "--coordinator", cluster.address()];
    let mut top = Terminal::start(program, &arguments, &[], (80, 24)).unwrap();
    top.wait_for("the list", |text| text.contains(&job) && text.contains("running")).unwrap();
    assert!(top.is_on_other_screen() && !top.shows_cursor());
    assert!(top.has_color(), "this terminal has colours");
    top.press("\r").unwrap();
    let overview = top
        .wait_for("a curve", |text| text.contains('⠤') || text.contains('⡠') || text.contains('⠒'))
        .unwrap();
    println!("{overview}");
    assert!(overview.contains("[1 overview]") && overview.contains("goodput"), "{overview}");
    top.press("2").unwrap();
    top.wait_for("the members", |text| text.contains("[2 members]") && text.contains("no card")).unwrap();
    top.press("6").unwrap();
    top.wait_for("the log", |text| text.contains("step applied")).unwrap();
    top.press("/loading\r").unwrap();
    top.wait_for("the filter", |text| text.contains("with \"loading\"") && !text.contains("step applied"))
        .unwrap();
    top.press("?").unwrap();
    top.wait_for("help", |text| text.contains("Ctrl-C")).unwrap();
    top.press("x1").unwrap();
    top.wait_for("the overview", |text| text.contains("[1 overview]")).unwrap();
    top.resize(160, 50).unwrap();
    let wide =
        top.wait_for("a wide page", |text| text.contains("COMPUTE") && text.lines().count() > 40).unwrap();
    println!("{wide}");
    top.resize(30, 5).unwrap();
    top.wait_for("a word about the size", |text| text.contains("too small")).unwrap();
    top.resize(80, 24).unwrap();
    top.wait_for("the page", |text| text.contains("[1 overview]")).unwrap();

    cluster.kill_coordinator().unwrap();
    top.wait_for("no answer", |text| text.contains("NO ANSWER")).unwrap();
    cluster.restart_coordinator().unwrap();
    top.wait_for("the coordinator", |text| text.lines().next().is_some_and(|line| line.ends_with("up")))
        .unwrap();

    top.press("q").unwrap();
    assert!(top.wait_for_end().unwrap().success());
    top.wait_until_as_it_was().unwrap();

    // Without colour, and ended by a signal.
    for (signal, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT"), (Signal::HUP, "HUP")] {
        let mut top = Terminal::start(
            program,
            &["top", &job, "--coordinator", cluster.address()],
            &[("NO_COLOR", "1")],
            (80, 24),
        )
        .unwrap();
        top.wait_for("the page", |text| text.contains("goodput")).unwrap();
        assert!(!top.has_color(), "NO_COLOR is obeyed");
        top.signal(signal);
        assert_eq!(top.wait_for_end().unwrap().code(), Some(130), "{name}");
        top.wait_until_as_it_was().unwrap();
    }
    // A terminal that cannot be drawn on gets one page as text.
    let mut dumb = Terminal::start(
        program,
        &["top", &job, "--coordinator", cluster.address()],
        &[("TERM", "dumb")],
        (80, 24),
    )
    .unwrap();
    assert!(dumb.wait_for_end().unwrap().success());
    dumb.wait_for("one page", |text| text.contains("goodput")).unwrap();
    assert!(!dumb.is_on_other_screen());
    dumb.wait_until_as_it_was().unwrap();
}
