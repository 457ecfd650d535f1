//! What was killed and resumed is the same, bit by bit, as what ran through.

use std::{
    fs,
    path::{Path, PathBuf},
};

use shanty_testkit::{TinyJob, adapter};

use crate::support::{Place, fresh_seed, last_event};

fn job() -> TinyJob {
    TinyJob { steps: 60, every_steps: 10, dropout: 0.2, ..TinyJob::default() }
}

const RESUME: &[&str] = &["resume", "job.toml", "--workers", "2", "--threads", "1", "--output", "json"];

#[test]
fn resumed_after_kill_9_of_everything_is_bit_equal_to_uninterrupted() {
    let undisturbed = Place::new(job()).unwrap();
    let straight = undisturbed.run(2).unwrap();

    let seed = fresh_seed();
    let kill_at = 2 + seed % 50;
    println!("seed {seed}: killed once step {kill_at} is told");
    let place = Place::new(job()).unwrap();
    let mut running = place.start(2).unwrap();
    running.wait_for_step(kill_at).unwrap();
    let killed = running.kill_all().unwrap();
    assert!(killed.events_of("finished").is_empty(), "it was killed before its end");

    let resumed = place.shanty.run(RESUME).unwrap().expect_code(0).unwrap();
    let mut losses = killed.losses();
    losses.extend(resumed.losses());
    let bits = |losses: std::collections::BTreeMap<u64, f64>| -> Vec<(u64, u64)> {
        losses.into_iter().map(|(step, loss)| (step, loss.to_bits())).collect()
    };
    // Steps between the last that was told and the kill are known from neither half where a checkpoint covers them.
    let straight_bits = bits(straight.losses());
    for step in bits(losses) {
        assert!(straight_bits.contains(&step), "step {} has another loss (seed {seed})", step.0);
    }
    assert_eq!(resumed.losses().last_key_value(), straight.losses().last_key_value());
    let (one, other) = (undisturbed.adapter(&straight).unwrap(), place.adapter(&resumed).unwrap());
    assert!(adapter::same_bits(&one, &other).unwrap(), "the adapters differ (seed {seed})");
    assert_eq!(
        last_event(&straight).unwrap()["eval_loss_after"],
        last_event(&resumed).unwrap()["eval_loss_after"]
    );
    place.check_exactly_once().unwrap();
}

#[test]
fn a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used() {
    let place = Place::new(job()).unwrap();
    let mut running = place.start(2).unwrap();
    running
        .wait_for("the third checkpoint", |event| event["event"] == "checkpoint" && event["step"] == 30)
        .unwrap();
    let killed = running.kill_all().unwrap();
    let newest = killed.events_of("checkpoint").pop().unwrap();
    damage(&place, newest["path"].as_str().unwrap());

    let resumed = place.shanty.run(RESUME).unwrap().expect_code(0).unwrap();
    let first = resumed.events_of("step")[0]["step"].as_u64().unwrap();
    let newest_step = newest["step"].as_u64().unwrap();
    assert!(
        first <= newest_step,
        "it went on from step {first} although the checkpoint of {newest_step} is damaged"
    );
    let status = place.shanty.run(&["status", "tiny", "--output", "json"]).unwrap().object().unwrap();
    let events = status["events"].as_array().unwrap();
    let told = events.iter().find(|event| event["kind"] == "checkpoint_damaged").expect("the damage is told");
    assert!(told["text"].as_str().unwrap().contains(newest["path"].as_str().unwrap()), "{told}");
}

/// Flips one byte in the middle of the largest file of a checkpoint.
fn damage(place: &Place, path: &str) {
    let folder = place.store().join(path);
    let files = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    flip(&files.max_by_key(|file| fs::metadata(file).unwrap().len()).unwrap());
}

/// Flips one bit in the middle of a file.
fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(file, bytes).unwrap();
}

#[test]
fn resume_without_a_run_says_how_to_start_one() {
    let place = Place::new(job()).unwrap();
    let error = place.shanty.run(RESUME).unwrap().expect_code(2).unwrap().error().unwrap();
    assert_eq!(error["code"], "SH0903");
    assert!(error["hint"].as_str().unwrap().contains("shanty run job.toml"));
    assert!(!place.path("runs").exists(), "looking for a run leaves nothing behind");
}

/// What is done to every checkpoint of a run, in words, the code of the answer, and the deed.
type Spoiled = (&'static str, &'static str, fn(&Path));

const SPOILED: &[Spoiled] = &[
    ("a byte of the adapter flipped", "SH0508", |folder| flip(&folder.join("adapter_model.safetensors"))),
    ("a byte of the optimizer flipped", "SH0508", |folder| flip(&folder.join("optimizer.safetensors"))),
    ("the optimizer cut short", "SH0508", |folder| {
        let file = folder.join("optimizer.safetensors");
        let bytes = fs::read(&file).unwrap();
        fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
    }),
    ("the adapter gone", "SH0508", |folder| {
        fs::remove_file(folder.join("adapter_model.safetensors")).unwrap()
    }),
    ("a manifest cut short", "SH0508", |folder| {
        let file = folder.join("manifest.json");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(file, &text[..text.len() / 2]).unwrap();
    }),
    ("a manifest that is no JSON", "SH0508", |folder| {
        fs::write(folder.join("manifest.json"), "haul").unwrap()
    }),
    ("an empty manifest", "SH0508", |folder| fs::write(folder.join("manifest.json"), "").unwrap()),
    ("a manifest edited by hand", "SH0508", |folder| {
        edit_manifest(folder, "\"seed\": 17", "\"seed\": 18");
    }),
    ("a manifest of a later format", "SH0506", |folder| {
        edit_manifest(folder, "\"format\": 1", "\"format\": 99")
    }),
];

#[test]
fn a_run_whose_every_checkpoint_is_spoiled_is_refused_and_left_as_it_is() {
    let place = Place::new(job()).unwrap();
    let mut running = place.start(2).unwrap();
    running
        .wait_for("the second checkpoint", |event| event["event"] == "checkpoint" && event["step"] == 20)
        .unwrap();
    running.kill_all().unwrap();
    let kept = place.path("kept");
    fs::rename(place.path("runs"), &kept).unwrap();

    for (name, code, spoil) in SPOILED {
        let _ = fs::remove_dir_all(place.path("runs"));
        copy_folder(&kept, &place.path("runs"));
        let folders = checkpoints(&place);
        assert!(!folders.is_empty());
        folders.iter().for_each(|folder| spoil(folder));
        let before = trained(&place);
        let answer = place.shanty.run(RESUME).unwrap();
        assert!(!answer.stderr.contains("panicked"), "{name}: {}", answer.stderr);
        assert!(!answer.status.success(), "{name}: {}", answer.stdout);
        let error = answer.error().unwrap();
        assert_eq!(error["code"], *code, "{name}: {error}");
        assert_eq!(trained(&place), before, "{name}: nothing is trained");
        assert_eq!(checkpoints(&place), folders, "{name}: what there is stays");
    }
}

/// Bytes of the workers' row logs: they grow with every step that is tried.
fn trained(place: &Place) -> u64 {
    let entries = fs::read_dir(place.store().join("logs")).unwrap().map(Result::unwrap);
    let rows = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("rows-"));
    rows.map(|entry| entry.metadata().unwrap().len()).sum()
}

fn checkpoints(place: &Place) -> Vec<PathBuf> {
    let entries = fs::read_dir(place.store().join("checkpoints")).unwrap();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    // A folder without a manifest is a write that the kill broke off.
    folders.retain(|folder| folder.join("manifest.json").exists());
    folders.sort();
    folders
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn edit_manifest(folder: &Path, from: &str, to: &str) {
    let file = folder.join("manifest.json");
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(file, text.replace(from, to)).unwrap();
}
