//! Reading: damage is noticed, said, and passed over; what belongs to something else is refused.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;

use std::{fs, path::Path};

use common::{file, flip_a_bit, keep_newest, key, snapshot, store, truncate, write_steps};
use shanty_checkpoint::{Blocking, Error, Expectations, Key, Skipped};
use shanty_diagnostic::{Diagnose, Kind};

fn expectations() -> Expectations {
    Expectations {
        base_hash: Some("base".to_owned()),
        tokenizer_hash: Some("tokenizer".to_owned()),
        data_hash: Some("data".to_owned()),
        adapter_hash: Some("adapter".to_owned()),
        seed: Some(u64::MAX - 1),
        global_batch_size: Some(16),
    }
}

type Damage = fn(&Path, Key);

/// How a checkpoint can be damaged, and what the reason must name.
const DAMAGES: [(&str, Damage); 10] = [
    ("adapter_model.safetensors does not have the hash", |folder, key| {
        flip_a_bit(&file(folder, key, "adapter_model.safetensors"));
    }),
    ("optimizer.safetensors does not have the hash", |folder, key| {
        flip_a_bit(&file(folder, key, "optimizer.safetensors"));
    }),
    ("optimizer.safetensors has", |folder, key| truncate(&file(folder, key, "optimizer.safetensors"))),
    ("adapter_config.json has 0 bytes", |folder, key| {
        fs::write(file(folder, key, "adapter_config.json"), "").unwrap();
    }),
    ("adapter_config.json is missing", |folder, key| {
        fs::remove_file(file(folder, key, "adapter_config.json")).unwrap();
    }),
    ("manifest.json cannot be read", |folder, key| truncate(&file(folder, key, "manifest.json"))),
    ("manifest.json cannot be read", |folder, key| {
        fs::write(file(folder, key, "manifest.json"), "").unwrap()
    }),
    ("manifest.json does not match its own hash", |folder, key| {
        edit_manifest(folder, key, "\"epoch\": 2", "\"epoch\": 3");
    }),
    // A file of the manifest that leads out of the folder.
    ("manifest.json does not match its own hash", |folder, key| {
        edit_manifest(folder, key, "adapter_config.json", "../../../etc/passwd");
    }),
    ("manifest.json is that of checkpoints/00000010-a1-g1", |folder, key| {
        let older = file(folder, Key { step: 10, ..key }, "manifest.json");
        fs::copy(older, file(folder, key, "manifest.json")).unwrap();
    }),
];

fn edit_manifest(folder: &Path, key: Key, from: &str, to: &str) {
    let path = file(folder, key, "manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

fn newest(store: &Blocking) -> (u64, Vec<Skipped>) {
    let found = store.newest_good(&expectations()).unwrap().unwrap();
    let verified = store.newest_verified(&expectations()).unwrap().unwrap();
    assert_eq!((verified.manifest, &verified.skipped), (found.manifest, &found.skipped), "both ways agree");
    (found.snapshot.key.step, found.skipped)
}

#[test]
fn a_damaged_newest_is_reported_and_the_one_before_is_used() {
    for (reason, damage) in DAMAGES {
        let (folder, store) = store();
        write_steps(&store, [10, 20]);
        assert_eq!(newest(&store), (20, vec![]));
        damage(folder.path(), key(20, 1, 1));
        let (step, skipped) = newest(&store);
        assert_eq!((step, skipped.len()), (10, 1), "{reason}");
        assert_eq!(skipped[0].path, "checkpoints/00000020-a1-g1");
        assert!(skipped[0].reason.starts_with(reason), "{} is not: {reason}", skipped[0].reason);
    }
}

#[test]
fn only_damaged_checkpoints_are_an_error_that_lists_them() {
    for (reason, damage) in DAMAGES {
        let (folder, store) = store();
        write_steps(&store, [10, 20]);
        damage(folder.path(), key(20, 1, 1));
        truncate(&file(folder.path(), key(10, 1, 1), "adapter_model.safetensors"));
        let error = store.newest_good(&expectations()).unwrap_err();
        assert_eq!(error.code(), "SH0508");
        let text = error.to_string();
        assert!(text.contains(reason) && text.contains("00000010-a1-g1"), "{text}");
        assert_eq!(store.newest_verified(&expectations()).unwrap_err().to_string(), text);
    }
}

#[test]
fn a_damaged_manifest_is_listed_apart() {
    let (folder, store) = store();
    write_steps(&store, [10, 20, 30]);
    truncate(&file(folder.path(), key(20, 1, 1), "manifest.json"));
    let listing = store.scan().unwrap();
    let steps: Vec<_> = listing.manifests.iter().map(|manifest| manifest.step).collect();
    assert_eq!(steps, [30, 10]);
    assert_eq!(listing.damaged.len(), 1);
    assert_eq!(listing.damaged[0].0, key(20, 1, 1));
    assert_eq!(store.manifest(key(20, 1, 1)).unwrap_err().code(), "SH0504");
    assert_eq!(store.manifest(key(40, 1, 1)).unwrap_err().code(), "SH0504");
    assert_eq!(store.manifest(key(30, 1, 1)).unwrap(), listing.manifests[0]);
}

#[test]
fn what_differs_is_named() {
    let (folder, store) = store();
    write_steps(&store, [10]);
    let other = || Some("other".to_owned());
    let cases = [
        ("base model", Expectations { base_hash: other(), ..expectations() }),
        ("tokenizer", Expectations { tokenizer_hash: other(), ..expectations() }),
        ("training data", Expectations { data_hash: other(), ..expectations() }),
        ("adapter configuration", Expectations { adapter_hash: other(), ..expectations() }),
        ("seed", Expectations { seed: Some(17), ..expectations() }),
        ("global batch size", Expectations { global_batch_size: Some(8), ..expectations() }),
    ];
    for (what, expect) in &cases {
        let error = store.newest_good(expect).unwrap_err();
        assert_eq!((error.code(), error.diagnostic().kind), ("SH0505", Kind::User));
        assert!(error.to_string().contains(what), "{error}");
    }
    // Also when its files are damaged: the way back does not lead to another job's checkpoints.
    truncate(&file(folder.path(), key(10, 1, 1), "optimizer.safetensors"));
    assert_eq!(store.newest_good(&cases[0].1).unwrap_err().code(), "SH0505");
}

#[test]
fn a_newer_format_is_not_passed_over() {
    let (folder, store) = store();
    write_steps(&store, [10, 20]);
    let newest = file(folder.path(), key(20, 1, 1), "manifest.json");
    // A later version may have other fields too.
    fs::write(newest, r#"{"manifest": {"format": 3, "shape": "unknown"}, "signature": "…"}"#).unwrap();
    let error = store.newest_good(&expectations()).unwrap_err();
    assert_eq!(error.code(), "SH0506");
    assert!(error.to_string().contains("format 3") && error.to_string().contains("up to 2"), "{error}");
    assert_eq!(store.scan().unwrap().damaged.len(), 1);
    // Nor is it deleted, nor does it count.
    write_steps(&store, [15, 30]);
    let removed = store.apply_retention(keep_newest(1), &[]).unwrap();
    assert_eq!(removed.checkpoints, [key(10, 1, 1), key(15, 1, 1)]);
}

#[test]
fn other_folders_and_files_are_not_ours() {
    let (folder, store) = store();
    write_steps(&store, [10]);
    for name in ["checkpoints/00000020", "checkpoints/+0000020-a1-g1", "checkpoints/20-a1-g1", "adapter"] {
        fs::create_dir_all(folder.path().join(name)).unwrap();
        fs::write(folder.path().join(name).join("manifest.json"), "{}").unwrap();
    }
    fs::write(folder.path().join("checkpoints/README"), "mine").unwrap();
    let listing = store.scan().unwrap();
    assert_eq!((listing.manifests.len(), listing.damaged.len(), listing.unfinished.len()), (1, 0, 0));
}

/// Wrong locations, each with its code.
#[test]
fn wrong_locations_have_codes() {
    let folder = tempfile::tempdir().unwrap();
    let a_file = folder.path().join("file");
    fs::write(&a_file, "x").unwrap();
    let below_a_file = a_file.join("run");
    let cases = [
        ("ftp://example.com/run", "SH0501"),
        ("https://example.com/run", "SH0501"),
        ("", "SH0502"),
        ("file://elsewhere/run", "SH0502"),
        (a_file.to_str().unwrap(), "SH0502"),
    ];
    for (location, code) in cases {
        let error = Blocking::open(location).unwrap_err();
        assert_eq!((error.code(), error.diagnostic().kind), (code, Kind::User), "`{location}`");
        assert!(error.to_string().contains(location), "{error}");
    }
    let store = Blocking::open(below_a_file.to_str().unwrap()).unwrap();
    let error = store.write(&snapshot(key(1, 1, 1))).unwrap_err();
    assert!(matches!(error, Error::BadLocation { .. }), "{error}");
}
