//! Downloads from a server that speaks the hub's paths: redirects to a second origin, hashes, ranges, cuts.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use ring::digest;
use shanty_diagnostic::{Diagnose, Kind};
use shanty_remote::{
    hub::{Hub, HubOptions, ModelId, Snapshot, public_name},
    testing::{Reply, Request, Server, serve_file},
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_only_for_the_hub";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// `git hash-object`.
fn git_hash(bytes: &[u8]) -> String {
    let blob = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hex(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref())
}

fn content(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 % 251) as u8).collect()
}

#[derive(Clone)]
struct File {
    name: &'static str,
    bytes: Vec<u8>,
    /// Large files are redirected to the second origin.
    is_large: bool,
}

fn small(name: &'static str, text: &str) -> File {
    File { name, bytes: text.into(), is_large: false }
}

fn large(name: &'static str, length: usize) -> File {
    File { name, bytes: content(length), is_large: true }
}

fn tiny_model() -> Vec<File> {
    vec![
        small("config.json", "{\"model_type\": \"llama\"}"),
        small("tokenizer.json", "{}"),
        small("README.md", "not needed"),
        large("model.safetensors", 300_000),
        large("pytorch_model.bin", 1000),
        small("onnx/config.json", "{}"),
    ]
}

type Twist = dyn Fn(&Request, Reply) -> Reply + Send + Sync;

/// The hub and its store of large files.
struct Stage {
    hub: Server,
    store: Arc<Server>,
    folder: tempfile::TempDir,
}

impl Stage {
    fn new(files: Vec<File>) -> Self {
        Self::twisted(files, |_, reply| reply)
    }

    /// `twist` changes answers of the store of large files.
    fn twisted(files: Vec<File>, twist: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static) -> Self {
        let twist: Arc<Twist> = Arc::new(twist);
        let stored = files.clone();
        let store = Arc::new(Server::start(move |request| {
            let name = request.path().trim_start_matches("/blob/").to_owned();
            let file = stored.iter().find(|file| file.name == name).unwrap();
            twist(request, serve_file(request, &file.bytes, &format!("store-{name}")))
        }));
        let place = store.url();
        let hub = Server::start(move |request| hub(request, &files, &place));
        Self { hub, store, folder: tempfile::tempdir().unwrap() }
    }

    fn options(&self) -> HubOptions {
        HubOptions {
            endpoint: self.hub.url(),
            cache: self.folder.path().join("hub"),
            token: Some(TOKEN.to_owned()),
            offline: false,
        }
    }

    fn download(&self) -> Result<Snapshot, shanty_remote::Error> {
        Hub::new(self.options()).snapshot(&model("main"), &mut |_| {})
    }

    fn root(&self) -> std::path::PathBuf {
        self.folder.path().join("hub/models--crew--tiny")
    }
}

fn model(revision: &str) -> ModelId {
    ModelId::parse(Path::new(&format!("hf://crew/tiny@{revision}"))).unwrap()
}

fn hub(request: &Request, files: &[File], store: &str) -> Reply {
    let path = request.path();
    if let Some(revision) = path.strip_prefix("/api/models/crew/tiny/revision/") {
        if revision != "main" && revision != COMMIT {
            return Reply::new(404, "")
                .with("X-Error-Code", "RevisionNotFound")
                .with("X-Error-Message", "Invalid rev id");
        }
        let lfs = |file: &File| {
            let (sha256, size) = (sha256(&file.bytes), file.bytes.len());
            file.is_large.then(
                || serde_json::json!({"sha256": sha256, "oid": sha256, "size": size, "pointerSize": 134}),
            )
        };
        let siblings: Vec<serde_json::Value> = files
            .iter()
            .map(|file| {
                let hash = git_hash(&file.bytes);
                serde_json::json!({"rfilename": file.name, "size": file.bytes.len(), "blobId": hash, "lfs": lfs(file)})
            })
            .collect();
        // Python asks for more than we do.
        let info = serde_json::json!({
            "id": "crew/tiny", "private": false, "downloads": 0, "likes": 0, "tags": [], "sha": COMMIT, "siblings": siblings,
        });
        return Reply::new(200, info.to_string());
    }
    if path.starts_with("/api/models/crew/tiny/tree/") {
        let tree: Vec<serde_json::Value> = files
            .iter()
            .map(|file| {
                let hash = git_hash(&file.bytes);
                let large = file.is_large.then(|| serde_json::json!({"oid": sha256(&file.bytes), "size": file.bytes.len(), "pointerSize": 134}));
                let mut entry = serde_json::json!({"type": "file", "path": file.name, "size": file.bytes.len(), "oid": hash});
                if let Some(large) = large {
                    entry["lfs"] = large;
                }
                entry
            })
            .collect();
        return Reply::new(200, serde_json::Value::from(tree).to_string());
    }
    if path.starts_with("/api/models/crew/gated") {
        return Reply::new(403, "")
            .with("X-Error-Code", "GatedRepo")
            .with("X-Error-Message", "Access is restricted");
    }
    if path.starts_with("/api/models/crew/private") {
        return Reply::new(401, "")
            .with("X-Error-Code", "RepoNotFound")
            .with("X-Error-Message", "Repository Not Found");
    }
    let Some(name) = path.strip_prefix(&format!("/crew/tiny/resolve/{COMMIT}/")) else {
        return Reply::new(404, "");
    };
    let Some(file) = files.iter().find(|file| file.name == name) else {
        return Reply::new(404, "").with("X-Error-Code", "EntryNotFound");
    };
    if file.is_large {
        return Reply::new(302, "")
            .with("Location", format!("{store}/blob/{name}?signed=yes"))
            .with("X-Repo-Commit", COMMIT)
            .with("X-Linked-ETag", format!("\"{}\"", sha256(&file.bytes)))
            .with("X-Linked-Size", file.bytes.len().to_string());
    }
    serve_file(request, &file.bytes, &git_hash(&file.bytes)).with("X-Repo-Commit", COMMIT)
}

#[test]
fn a_model_lands_in_the_layout_of_huggingface_hub() {
    let stage = Stage::new(tiny_model());
    let mut last = Default::default();
    let snapshot =
        Hub::new(stage.options()).snapshot(&model("main"), &mut |progress| last = progress.clone()).unwrap();
    assert_eq!((snapshot.commit.as_str(), &snapshot.doubt), (COMMIT, &None));
    assert_eq!(snapshot.folder, stage.root().join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(stage.root().join("refs/main")).unwrap(), COMMIT);
    let mut names: Vec<String> = fs::read_dir(&snapshot.folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["config.json", "model.safetensors", "tokenizer.json"],
        "no pickle, no README, no other folder"
    );
    let link = fs::read_link(snapshot.folder.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha256(&content(300_000))));
    assert!(fs::read(snapshot.folder.join("model.safetensors")).unwrap() == content(300_000));
    assert_eq!((last.bytes_done, last.files_done), (last.bytes_total, 3));
    assert!(fs::read_dir(stage.root().join("blobs")).unwrap().count() == 3, "nothing temporary stays");
    assert_eq!(public_name(&snapshot.folder), "crew/tiny");
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let stage = Stage::new(tiny_model());
    stage.download().unwrap();
    let bearer = format!("Bearer {TOKEN}");
    assert!(stage.hub.asked().iter().all(|request| request.header("authorization") == bearer));
    assert!(!stage.store.asked().is_empty());
    assert!(stage.store.asked().iter().all(|request| request.header("authorization").is_empty()));
}

#[test]
fn a_cut_download_goes_on_where_it_stopped() {
    let cuts = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&cuts);
    let stage = Stage::twisted(tiny_model(), move |request, reply| {
        match request.method == "GET" && count.fetch_add(1, Ordering::SeqCst) < 2 {
            true => reply.cut(100_000),
            false => reply,
        }
    });
    let snapshot = stage.download().unwrap();
    assert!(fs::read(snapshot.folder.join("model.safetensors")).unwrap() == content(300_000));
    let asked: Vec<(String, String)> = stage
        .store
        .asked()
        .iter()
        .filter(|request| request.method == "GET")
        .map(|request| (request.header("range").to_owned(), request.header("if-range").to_owned()))
        .collect();
    let tag = "\"store-model.safetensors\"".to_owned();
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert_eq!(asked[0], (String::new(), String::new()));
    // How much of what was sent had arrived when the line broke is up to the network; it never starts anew.
    let start =
        |range: &str| range.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().unwrap();
    assert!((1..=100_000).contains(&start(&asked[1].0)), "{asked:?}");
    assert!(start(&asked[2].0) > start(&asked[1].0), "{asked:?}");
    assert!(asked[1..].iter().all(|(_, condition)| *condition == tag), "{asked:?}");
}

#[test]
fn a_later_process_goes_on_too() {
    let broken = Arc::new(AtomicUsize::new(1));
    let is_broken = Arc::clone(&broken);
    let stage = Stage::twisted(tiny_model(), move |request, reply| match is_broken.load(Ordering::SeqCst) {
        1 if request.method == "GET" && request.header("range").is_empty() => reply.cut(120_000),
        1 => Reply::new(503, "busy"),
        _ => reply,
    });
    let error = stage.download().unwrap_err().diagnostic();
    assert_eq!((error.code.as_str(), error.kind), ("SH0342", Kind::Transient), "{error:?}");
    let partial = stage.root().join("blobs").join(format!("{}.incomplete", sha256(&content(300_000))));
    let arrived = fs::metadata(&partial).unwrap().len();
    assert!(arrived > 0 && arrived <= 120_000);
    let missing = Hub::new(stage.options()).missing(&model("main")).unwrap().unwrap();
    assert_eq!((missing.files, missing.bytes), (1, 300_000 - arrived));
    broken.store(0, Ordering::SeqCst);
    stage.store.forget();
    stage.download().unwrap();
    assert_eq!(stage.store.asked()[0].header("range"), format!("bytes={arrived}-"));
    assert!(!partial.exists());
}

#[test]
fn a_part_of_another_file_is_not_glued_on() {
    // The file behind the address is another one after the cut: its tag no longer fits, and all of it comes.
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let other = content(300_000);
    let stage = Stage::twisted(tiny_model(), move |request, reply| {
        match (request.method.as_str(), count.fetch_add(1, Ordering::SeqCst)) {
            ("GET", 0) => {
                // What arrives first is not the file at all.
                let wrong = Reply { body: vec![7; 300_000], headers: Vec::new(), ..reply };
                wrong.with("ETag", "\"older\"").cut(50_000)
            }
            _ => serve_file(request, &other, "newer"),
        }
    });
    let snapshot = stage.download().unwrap();
    assert!(fs::read(snapshot.folder.join("model.safetensors")).unwrap() == content(300_000));
    let second = &stage.store.asked()[1];
    assert_eq!(second.header("if-range"), "\"older\"");
}

#[test]
fn a_damaged_file_is_fetched_once_more_and_then_refused() {
    let wrong = |request: &Request, mut reply: Reply| {
        if request.method == "GET" {
            reply.body[17] ^= 1;
        }
        reply
    };
    let stage = Stage::twisted(tiny_model(), wrong);
    let error = stage.download().unwrap_err().diagnostic();
    assert_eq!(error.code, "SH0344", "{error:?}");
    assert!(
        error.message.contains("model.safetensors") && error.message.contains("its hash is"),
        "{error:?}"
    );
    assert_eq!(stage.store.asked().iter().filter(|request| request.method == "GET").count(), 2);
    assert!(!stage.root().join("snapshots").join(COMMIT).join("model.safetensors").exists());

    let tries = Arc::new(AtomicUsize::new(0));
    let once = Stage::twisted(tiny_model(), move |request, reply| {
        match request.method == "GET" && tries.fetch_add(1, Ordering::SeqCst) == 0 {
            true => wrong(request, reply),
            false => reply,
        }
    });
    let snapshot = once.download().unwrap();
    assert!(fs::read(snapshot.folder.join("model.safetensors")).unwrap() == content(300_000));
}

#[test]
fn what_is_in_the_cache_is_not_asked_for_again() {
    let stage = Stage::new(tiny_model());
    let first = stage.download().unwrap();
    stage.hub.forget();
    stage.store.forget();
    let pinned = Hub::new(stage.options()).snapshot(&model(COMMIT), &mut |_| {}).unwrap();
    assert_eq!(pinned, first);
    assert!(stage.hub.asked().is_empty(), "a commit never changes");
    stage.download().unwrap();
    assert_eq!(stage.hub.asked().len(), 1, "a branch is asked for its commit alone");
    assert!(stage.store.asked().is_empty());
    assert_eq!(Hub::new(stage.options()).missing(&model("main")).unwrap(), None);
}

#[test]
fn offline_the_cache_serves_and_its_lack_is_told() {
    let stage = Stage::new(tiny_model());
    let offline = HubOptions { offline: true, ..stage.options() };
    let error = Hub::new(offline.clone()).snapshot(&model("main"), &mut |_| {}).unwrap_err().diagnostic();
    assert_eq!(error.code, "SH0343", "{error:?}");
    assert!(stage.hub.asked().is_empty());
    let first = stage.download().unwrap();
    stage.hub.forget();
    assert_eq!(Hub::new(offline.clone()).snapshot(&model("main"), &mut |_| {}).unwrap(), first);
    assert!(stage.hub.asked().is_empty());
    // A shard that is gone makes the model incomplete.
    fs::remove_file(first.folder.join("model.safetensors")).unwrap();
    assert!(Hub::new(offline).snapshot(&model("main"), &mut |_| {}).is_err());
}

#[test]
fn a_hub_that_is_gone_leaves_what_was_downloaded_and_says_so() {
    let stage = Stage::new(tiny_model());
    let first = stage.download().unwrap();
    let gone = HubOptions { endpoint: "http://127.0.0.1:1".to_owned(), ..stage.options() };
    let found = Hub::new(gone.clone()).snapshot(&model("main"), &mut |_| {}).unwrap();
    assert_eq!(found.folder, first.folder);
    assert!(found.doubt.unwrap().contains("127.0.0.1:1"));
    let empty = HubOptions { cache: stage.folder.path().join("other"), ..gone };
    let error = Hub::new(empty).snapshot(&model("main"), &mut |_| {}).unwrap_err().diagnostic();
    assert_eq!((error.code.as_str(), error.kind), ("SH0342", Kind::Transient), "{error:?}");
}

#[test]
fn refusals_of_the_hub_have_their_codes_and_hints() {
    let stage = Stage::new(tiny_model());
    let ask = |name: &str, token: Option<&str>| {
        let options = HubOptions { token: token.map(str::to_owned), ..stage.options() };
        let model = ModelId::parse(Path::new(&format!("hf://{name}"))).unwrap();
        Hub::new(options).snapshot(&model, &mut |_| {}).unwrap_err().diagnostic()
    };
    let cases = [
        ("crew/none", "SH0340", "org/name"),
        ("crew/tiny@elsewhere", "SH0340", "org/name"),
        ("crew/gated", "SH0341", "accept the licence at "),
        ("crew/private", "SH0341", "check HF_TOKEN"),
    ];
    for (name, code, hint) in cases {
        let error = ask(name, Some(TOKEN));
        assert_eq!(error.code, code, "{error:?}");
        assert!(error.hint.as_deref().unwrap_or_default().contains(hint), "{error:?}");
        assert!(!format!("{error:?}").contains(TOKEN));
    }
    assert!(ask("crew/gated", None).hint.unwrap().contains("HF_TOKEN"));
    assert!(ask("crew/private", None).hint.unwrap().contains("hf auth login"));
}

#[test]
fn models_without_usable_files_are_refused_with_what_to_do() {
    let config = || small("config.json", "{}");
    let tokenizer = || small("tokenizer.json", "{}");
    let cases = [
        (vec![config(), tokenizer(), large("pytorch_model.bin", 10)], "Python pickle"),
        (vec![config(), tokenizer(), large("tiny.Q4_0.gguf", 10)], "GGUF"),
        (vec![config(), tokenizer()], "no safetensors"),
        (vec![config(), large("model.safetensors", 10)], "no `tokenizer.json`"),
        (
            vec![
                config(),
                tokenizer(),
                small(
                    "model.safetensors.index.json",
                    "{\"weight_map\": {\"a\": \"model-00002.safetensors\"}}",
                ),
                large("model-00001.safetensors", 10),
            ],
            "names `model-00002.safetensors`",
        ),
        (
            vec![
                config(),
                tokenizer(),
                small("model.safetensors.index.json", "{\"weight_map\": {\"a\": \"../../x\"}}"),
                large("model-00001.safetensors", 10),
            ],
            "no `weight_map`",
        ),
    ];
    for (files, says) in cases {
        let error = Stage::new(files).download().unwrap_err().diagnostic();
        assert_eq!(error.code, "SH0345", "{error:?}");
        assert!(error.message.contains(says) && error.hint.is_some(), "{error:?}");
    }
}

#[test]
fn of_several_sets_of_weights_the_index_decides() {
    let index = "{\"weight_map\": {\"a\": \"model-00001-of-00002.safetensors\", \"b\": \"model-00002-of-00002.safetensors\"}}";
    let stage = Stage::new(vec![
        small("config.json", "{}"),
        small("tokenizer.json", "{}"),
        small("model.safetensors.index.json", index),
        large("model-00001-of-00002.safetensors", 5000),
        large("model-00002-of-00002.safetensors", 6000),
        large("consolidated.safetensors", 11_000),
    ]);
    let snapshot = stage.download().unwrap();
    assert!(snapshot.folder.join("model-00002-of-00002.safetensors").is_file());
    assert!(!snapshot.folder.join("consolidated.safetensors").exists());
    assert_eq!(Hub::new(stage.options()).cached(&model(COMMIT)), Some(snapshot));
}

#[test]
fn a_coordinator_needs_no_weights() {
    let stage = Stage::new(tiny_model());
    let snapshot = Hub::new(stage.options()).small_files(&model("main"), &mut |_| {}).unwrap();
    assert!(snapshot.folder.join("tokenizer.json").is_file());
    assert!(!snapshot.folder.join("model.safetensors").exists());
    assert!(stage.store.asked().is_empty());
    assert_eq!(Hub::new(stage.options()).cached(&model("main")), None, "it is not the whole model");
}

#[test]
fn answers_that_lead_out_of_the_cache_are_refused() {
    for (name, sha) in [
        ("../../../evil", COMMIT),
        ("/etc/evil", COMMIT),
        ("config.json", "../../x"),
        ("config.json", "main"),
    ] {
        let answer = serde_json::json!({"sha": sha, "siblings": [{"rfilename": name}]}).to_string();
        let server = Server::start(move |_| Reply::new(200, answer.clone()));
        let folder = tempfile::tempdir().unwrap();
        let options =
            HubOptions { endpoint: server.url(), cache: folder.path().into(), token: None, offline: false };
        let error = Hub::new(options).snapshot(&model("main"), &mut |_| {}).unwrap_err().diagnostic();
        assert_eq!((error.code.as_str(), error.kind), ("SH0347", Kind::Internal), "{error:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn two_downloads_of_one_model_share_the_work() {
    let stage = Arc::new(Stage::new(tiny_model()));
    let outcomes = Arc::new(Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let (stage, outcomes) = (Arc::clone(&stage), Arc::clone(&outcomes));
            scope.spawn(move || {
                let snapshot = stage.download().unwrap();
                outcomes.lock().unwrap().push(snapshot);
            });
        }
    });
    let outcomes = outcomes.lock().unwrap();
    assert!(outcomes.len() == 3 && outcomes.iter().all(|snapshot| *snapshot == outcomes[0]));
    let fetched = stage.store.asked().iter().filter(|request| request.method == "GET").count();
    assert_eq!(fetched, 1, "the lock lets one download and the others wait");
}

/// Python's own library reads the cache, offline; and what it left is found here.
#[test]
fn python_finds_what_was_downloaded_here() {
    let Some(python) = std::env::var_os("SHANTY_PYTHON") else {
        assert!(std::env::var_os("SHANTY_REQUIRE_PYTHON").is_none(), "SHANTY_PYTHON is not set");
        println!("skipped: SHANTY_PYTHON names no Python with huggingface_hub");
        return;
    };
    let stage = Stage::new(tiny_model());
    let snapshot = stage.download().unwrap();
    let script = "import sys; from huggingface_hub import hf_hub_download, snapshot_download\n\
                  print(hf_hub_download('crew/tiny', 'model.safetensors', cache_dir=sys.argv[1], local_files_only=True))\n\
                  print(snapshot_download('crew/tiny', cache_dir=sys.argv[1], local_files_only=True))";
    let output = std::process::Command::new(&python)
        .args(["-c", script])
        .arg(stage.options().cache)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let expected =
        format!("{}\n{}\n", snapshot.folder.join("model.safetensors").display(), snapshot.folder.display());
    assert_eq!(text, expected, "{}", String::from_utf8_lossy(&output.stderr));

    // The other way round: Python downloads from the same server into another cache.
    let other = stage.folder.path().join("python");
    let script = "import sys; from huggingface_hub import snapshot_download\n\
                  snapshot_download('crew/tiny', cache_dir=sys.argv[1], allow_patterns=['*.json', '*.safetensors'])";
    let output = std::process::Command::new(python)
        .args(["-c", script])
        .arg(&other)
        .env("HF_ENDPOINT", stage.hub.url())
        .env("HF_HUB_DISABLE_XET", "1")
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .env_remove("HF_HUB_OFFLINE")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let options = HubOptions { cache: other.clone(), offline: true, ..stage.options() };
    let found = Hub::new(options).snapshot(&model("main"), &mut |_| {}).unwrap();
    assert!(found.folder.starts_with(other));
}
