//! Data and bases from elsewhere, and looking at data: the commands as a user types them.

use std::fs;

use shanty_remote::testing::{Reply, Server, serve_file, serve_model};
use shanty_testkit::TinyJob;

use crate::support::{Place, last_event};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn example(path: &str) -> String {
    format!("{}/../../examples/{path}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn inspect_shows_what_is_trained_and_what_is_not() {
    let place = Place::new(TinyJob::default()).unwrap();
    let (data, base) = (example("tasks/chat.train.jsonl"), example("tiny-llama-14m"));
    let shown = place.shanty.run(&["data", "inspect", &data, "--base", &base, "--sample", "2"]).unwrap();
    let text = shown.expect_code(0).unwrap().stdout;
    assert!(!text.contains('\x1b'), "no colour where nobody looks at it");
    let marked = text.lines().filter(|line| line.contains('⟦')).count();
    assert!(marked >= 2, "{text}");
    for says in [
        "sample 1 of 2",
        "595 records (messages)",
        "595 of 595 samples train one",
        "left out    0 records",
        "up to",
    ] {
        assert!(text.contains(says), "`{says}` is not in\n{text}");
    }
    let json = place.shanty.run(&["data", "inspect", &data, "--base", &base, "--output", "json"]).unwrap();
    let report = json.expect_code(0).unwrap().object().unwrap();
    assert_eq!(
        (report["summary"]["records"].as_u64(), report["summary"]["trained_tokens"].as_u64()),
        (Some(595), Some(6239))
    );
    let samples = report["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 3);
    for sample in samples {
        let pieces = sample["pieces"].as_array().unwrap();
        assert!(
            pieces.iter().any(|piece| piece["trained"] == true)
                && pieces.iter().any(|piece| piece["trained"] == false)
        );
    }
    let colored =
        place.shanty.run(&["data", "inspect", &data, "--base", &base, "--color", "always"]).unwrap();
    let colored = colored.expect_code(0).unwrap().stdout;
    assert!(colored.contains("\x1b[32m⟦"), "{colored}");
}

#[test]
fn inspect_of_a_job_shows_rows_and_the_held_out_part() {
    let place = Place::new(TinyJob::default()).unwrap();
    let before = crate::support::listing(place.folder.path());
    let row =
        place.shanty.run(&["data", "inspect", "job.toml", "--row", "1"]).unwrap().expect_code(0).unwrap();
    assert!(row.stdout.contains("row         1: "), "{}", row.stdout);
    let eval =
        place.shanty.run(&["data", "inspect", "job.toml", "--split", "eval", "--sample", "0"]).unwrap();
    assert!(eval.expect_code(0).unwrap().stdout.starts_with("data "));
    let none =
        place.shanty.run(&["data", "inspect", "job.toml", "--row", "100000", "--output", "json"]).unwrap();
    assert_eq!(none.expect_code(1).unwrap().error().unwrap()["code"], "SH0220");
    let usage = place.shanty.run(&["data", "inspect", "train.jsonl", "--output", "json"]).unwrap();
    assert_eq!(usage.expect_code(2).unwrap().error().unwrap()["code"], "SH0901");
    assert_eq!(crate::support::listing(place.folder.path()), before, "nothing is left behind");
}

#[test]
fn data_that_trains_nothing_is_shown_and_refused_everywhere() {
    let place = Place::new(TinyJob::default()).unwrap();
    let row = r#"{"messages": [{"role": "user", "content": "Who goes there?"}, {"role": "assistant", "content": "Nobody.", "weight": 0}]}"#;
    fs::write(place.path("train.jsonl"), format!("{row}\n")).unwrap();
    let base = format!("base.model={}", example("tiny-llama-14m"));
    let inspect = place
        .shanty
        .run(&["data", "inspect", "job.toml", "--set", &base, "--set", "data.eval=train.jsonl"])
        .unwrap();
    let inspect = inspect.expect_code(2).unwrap();
    assert!(
        inspect.stdout.contains("all answers have weight 0") && inspect.stdout.contains("Who goes there?"),
        "{}",
        inspect.stdout
    );
    assert!(inspect.stderr.contains("SH0221"), "{}", inspect.stderr);
    let commands: [&[&str]; 3] = [
        &["plan", "job.toml"],
        &["run", "job.toml"],
        // Nobody listens there: it is refused before anybody is asked.
        &["submit", "job.toml", "--coordinator", "http://127.0.0.1:1"],
    ];
    for command in commands {
        let finished = place.shanty.run(&[command, &["--set", &base, "--output", "json"]].concat()).unwrap();
        let error = finished.expect_code(2).unwrap().error().unwrap();
        assert_eq!(error["code"], "SH0221", "{command:?}: {error}");
    }
    assert!(!place.store().join("prepared").exists());
}

#[test]
fn sources_mixed_by_weight_are_trained() {
    let place = Place::new(TinyJob { steps: 4, ..TinyJob::default() }).unwrap();
    fs::copy(place.path("eval.jsonl"), place.path("other.jsonl")).unwrap();
    let mix = "data.train=[{ path = \"train.jsonl\", weight = 1 }, { path = \"other.jsonl\", weight = 1 }]";
    let plan = place.shanty.run(&["plan", "job.toml", "--set", mix, "--output", "json"]).unwrap();
    let plan = plan.expect_code(0).unwrap().object().unwrap();
    assert!(plan["rows"].as_u64().unwrap() > 0);
    let inspect =
        place.shanty.run(&["data", "inspect", "job.toml", "--set", mix, "--output", "json"]).unwrap();
    let report = inspect.expect_code(0).unwrap().object().unwrap();
    let sources = report["summary"]["sources"].as_array().unwrap();
    let of = |index: usize, key: &str| sources[index][key].as_u64().unwrap();
    assert!(of(0, "rows_per_epoch").abs_diff(of(1, "rows_per_epoch")) <= 1, "{sources:?}");
    assert!(of(0, "rows") > 2 * of(1, "rows"), "{sources:?}");
    let run = place
        .shanty
        .run(&["run", "job.toml", "--set", mix, "--workers", "2", "--threads", "1", "--output", "json"])
        .unwrap();
    let finished = last_event(&run.expect_code(0).unwrap()).unwrap();
    assert_eq!((finished["state"].as_str(), finished["steps"].as_u64()), (Some("succeeded"), Some(4)));
}

#[test]
fn data_is_read_from_a_bucket() {
    let place = Place::new(TinyJob::default()).unwrap();
    let bytes = fs::read(place.path("train.jsonl")).unwrap();
    let server = Server::start(move |request| {
        if !request.header("authorization").contains("Credential=AKIATEST/") {
            return Reply::new(403, "<Error><Code>AccessDenied</Code></Error>");
        }
        match request.path() {
            "/crew/songs/train.jsonl" => serve_file(request, &bytes, "v1"),
            _ => Reply::new(404, "<Error><Code>NoSuchKey</Code></Error>"),
        }
    });
    let place = place
        .environment("AWS_ENDPOINT", &server.url())
        .environment("AWS_ALLOW_HTTP", "true")
        .environment("AWS_REGION", "eu-west-1")
        .environment("AWS_SECRET_ACCESS_KEY", "secret");
    let inspect = |place: &Place, code: i32| {
        let arguments = [
            "data",
            "inspect",
            "job.toml",
            "--set",
            "data.train=s3://crew/songs/train.jsonl",
            "--output",
            "json",
        ];
        place.shanty.run(&arguments).unwrap().expect_code(code).unwrap()
    };
    let place = place.environment("AWS_ACCESS_KEY_ID", "AKIAWRONG");
    let error = inspect(&place, 2).error().unwrap();
    assert_eq!(error["code"], "SH0225", "{error}");
    assert!(error["hint"].as_str().unwrap().contains("AWS_ACCESS_KEY_ID"));
    let place = place.environment("AWS_ACCESS_KEY_ID", "AKIATEST");
    let report = inspect(&place, 0).object().unwrap();
    assert_eq!(report["summary"]["records"], 48);
    assert_eq!(report["samples"][0]["file"], "s3://crew/songs/train.jsonl");
}

#[test]
fn a_base_of_the_hub_is_planned_downloaded_trained_and_named() {
    let place = Place::new(TinyJob { steps: 2, ..TinyJob::default() }).unwrap();
    let files: Vec<(String, Vec<u8>)> = fs::read_dir(place.path("model"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    let server = Server::start(move |request| serve_model(request, "crew/tiny", COMMIT, &files));
    let home = place.path("hf").display().to_string();
    let place = place.environment("HF_ENDPOINT", &server.url()).environment("HF_HOME", &home);
    let of_hub = ["--set", "base.model=crew/tiny", "--output", "json"];
    let plan = |place: &Place| {
        let finished = place.shanty.run(&[&["plan", "job.toml"][..], &of_hub].concat()).unwrap();
        finished.expect_code(0).unwrap().object().unwrap()
    };
    let before = plan(&place);
    assert_eq!(
        (before["download"]["model"].as_str(), before["download"]["commit"].as_str()),
        (Some("crew/tiny"), Some(COMMIT))
    );
    assert!(before["download"]["bytes"].as_u64().unwrap() > 100_000, "{before}");
    assert!(!place.path("hf").exists(), "a plan downloads nothing");

    let run = place
        .shanty
        .run(&[&["run", "job.toml", "--workers", "2", "--threads", "1"][..], &of_hub].concat())
        .unwrap();
    let run = run.expect_code(0).unwrap();
    assert!(run.events().iter().any(|event| event["event"] == "download"), "progress is told");
    let adapter = place.adapter(&run).unwrap();
    let config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(adapter.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["base_model_name_or_path"], "crew/tiny");

    server.forget();
    let place = place.environment("HF_HUB_OFFLINE", "1");
    assert_eq!(plan(&place)["steps"], 2);
    assert!(server.asked().is_empty(), "offline nobody is asked");
    let other = ["--set", "base.model=crew/other", "--output", "json"];
    let error = place.shanty.run(&[&["plan", "job.toml"][..], &other].concat()).unwrap();
    assert_eq!(error.expect_code(2).unwrap().error().unwrap()["code"], "SH0343");
}
