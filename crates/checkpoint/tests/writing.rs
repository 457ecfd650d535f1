//! Writing: round trips, writers that die, writers that race.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;

use std::{
    fs,
    sync::{Barrier, Mutex},
    thread,
};

use bytes::Bytes;
use common::{file, keep_newest, key, open, snapshot, store, write_steps};
use shanty_checkpoint::{Blocking, Error, Expectations, Snapshot, WritePoint};

#[test]
fn what_is_written_is_read_bit_for_bit() {
    let (folder, store) = store();
    let written = snapshot(key(50, 1, 3));
    let result = store.write(&written).unwrap();
    assert_eq!(result.path, "checkpoints/00000050-a1-g3");

    let found = store.newest_good(&Expectations::default()).unwrap().unwrap();
    assert_eq!(found.snapshot, written);
    assert_eq!(found.skipped, []);
    assert_eq!(found.manifest.size_bytes(), result.bytes);
    let on_disk = fs::read_dir(folder.path().join(&result.path)).unwrap();
    let mut names: Vec<_> = on_disk.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    let expected =
        ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.safetensors"];
    assert_eq!(names, expected);
}

#[test]
fn numbers_that_are_none_survive() {
    let (_folder, store) = store();
    let mut written = snapshot(key(1, 1, 1));
    let odd = [f32::NAN, -0.0, f32::INFINITY, f32::MIN_POSITIVE / 2.0];
    written.optimizer.parameters[..4].copy_from_slice(&odd);
    store.write(&written).unwrap();
    let read = store.newest_good(&Expectations::default()).unwrap().unwrap().snapshot;
    let bits =
        |snapshot: &Snapshot| snapshot.optimizer.parameters.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&read), bits(&written));
}

#[test]
fn the_optimizer_is_a_safetensors_file_that_others_can_read() {
    let (folder, store) = store();
    let written = snapshot(key(1, 1, 1));
    store.write(&written).unwrap();
    let content = fs::read(file(folder.path(), written.key, "optimizer.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&content).unwrap();
    let moments = tensors.tensor("exp_avg_sq").unwrap();
    assert_eq!((moments.dtype(), moments.shape()), (safetensors::Dtype::F32, &[1000][..]));
    assert_eq!(moments.data()[..4], written.optimizer.exp_avg_sq[0].to_le_bytes());
}

#[test]
fn newest_means_step_then_attempt_then_generation() {
    let (_folder, store) = store();
    let oldest_first = [key(9, 9, 9), key(50, 1, 7), key(50, 2, 3), key(50, 2, 12), key(100_000_000, 1, 1)];
    for key in [2, 0, 4, 1, 3].map(|index| oldest_first[index]) {
        store.write(&snapshot(key)).unwrap();
    }
    let listed: Vec<_> = store.list().unwrap().iter().map(|manifest| manifest.key()).collect();
    assert!(listed.iter().rev().eq(&oldest_first), "{listed:?}");
}

#[test]
fn an_empty_or_missing_store_has_nothing_and_stays_untouched() {
    let folder = tempfile::tempdir().unwrap();
    let location = folder.path().join("runs/none");
    let store = Blocking::new(open(&location)).unwrap();
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(store.newest_good(&Expectations::default()).unwrap(), None);
    assert_eq!(store.apply_retention(keep_newest(1), &[]).unwrap(), Default::default());
    assert!(!location.exists());
    // It is made by the first write, and found by the same handle.
    write_steps(&store, [1]);
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn a_file_url_is_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let with_space = folder.path().join("my runs");
    write_steps(&Blocking::new(open(&with_space)).unwrap(), [3]);
    let url = format!("file://{}/my%20runs", folder.path().display());
    assert_eq!(Blocking::open(&url).unwrap().list().unwrap()[0].step, 3);
}

#[test]
fn a_writer_that_dies_before_the_manifest_leaves_no_checkpoint() {
    let (folder, store) = store();
    write_steps(&store, [10]);
    let dying = snapshot(key(20, 1, 1));
    let mut seen = None;
    let error = store
        .write_with(&dying, &mut |point| {
            seen = Some((point, file(folder.path(), dying.key, "optimizer.safetensors").exists()));
            Err("killed here".to_owned())
        })
        .unwrap_err();
    assert_eq!(error.code(), "SH0510");
    assert_eq!(seen, Some((WritePoint::BeforeManifest, true)), "all files are there by then");

    let listing = store.scan().unwrap();
    assert_eq!((listing.manifests.len(), listing.unfinished), (1, vec![dying.key]));
    let found = store.newest_good(&Expectations::default()).unwrap().unwrap();
    assert_eq!((found.manifest.step, found.skipped), (10, vec![]));

    // The same write goes through afterwards.
    store.write(&dying).unwrap();
    assert_eq!(store.newest_good(&Expectations::default()).unwrap().unwrap().snapshot, dying);
}

#[test]
fn a_writer_that_dies_after_the_manifest_leaves_a_checkpoint() {
    let (_folder, store) = store();
    let written = snapshot(key(20, 1, 1));
    let mut points = Vec::new();
    let result = store.write_with(&written, &mut |point| {
        points.push(point);
        if point == WritePoint::AfterManifest { Err("too late".to_owned()) } else { Ok(()) }
    });
    assert!(result.is_ok());
    assert_eq!(points, [WritePoint::BeforeManifest, WritePoint::AfterManifest]);
    assert_eq!(store.newest_good(&Expectations::default()).unwrap().unwrap().snapshot, written);
}

#[test]
fn a_checkpoint_is_written_once() {
    let (folder, store) = store();
    let first = snapshot(key(5, 1, 1));
    store.write(&first).unwrap();
    let before = fs::read(file(folder.path(), first.key, "manifest.json")).unwrap();
    let mut second = snapshot(key(5, 1, 1));
    second.state.epoch = 77;
    second.files[1].1 = Bytes::from_static(b"other");
    let error = store.write(&second).unwrap_err();
    assert_eq!(error.code(), "SH0507");
    assert_eq!(fs::read(file(folder.path(), first.key, "manifest.json")).unwrap(), before);
    assert_eq!(store.newest_good(&Expectations::default()).unwrap().unwrap().snapshot, first);
}

#[test]
fn leftovers_of_another_content_are_not_mixed_in() {
    let (folder, store) = store();
    let ours = snapshot(key(5, 1, 1));
    let left = file(folder.path(), ours.key, "adapter_model.safetensors");
    fs::create_dir_all(left.parent().unwrap()).unwrap();
    fs::write(&left, vec![99; 5000]).unwrap();
    assert_eq!(store.write(&ours).unwrap_err().code(), "SH0507");
    assert_eq!(store.list().unwrap(), []);
    assert_eq!(fs::read(left).unwrap(), vec![99; 5000]);
}

#[test]
fn of_racing_writers_one_wins_and_the_checkpoint_is_whole() {
    for same_content in [true, false] {
        let (folder, store) = store();
        let at_once = Barrier::new(4);
        let wins = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for writer in 0..4u8 {
                let (at_once, wins, folder) = (&at_once, &wins, folder.path());
                scope.spawn(move || {
                    let store = Blocking::new(open(folder)).unwrap();
                    let mut ours = snapshot(key(7, 1, 1));
                    if !same_content {
                        // The first file differs: whoever creates it is the only one who can win.
                        ours.files[0].1 = Bytes::from(vec![writer; 3000]);
                    }
                    at_once.wait();
                    match store.write(&ours) {
                        Ok(_) => wins.lock().unwrap().push(ours),
                        Err(error) => assert_eq!(error.code(), "SH0507", "{error}"),
                    }
                });
            }
        });
        let wins = wins.into_inner().unwrap();
        // One who finds the very bytes that it would write takes them for its own, whose answer was lost.
        assert!(wins.len() == 1 || same_content && !wins.is_empty(), "same content: {same_content}");
        let found = store.newest_good(&Expectations::default()).unwrap().unwrap();
        assert_eq!(found.snapshot, wins[0]);
    }
}

#[test]
fn wrong_snapshots_are_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let location = folder.path().join("run");
    let store = Blocking::new(open(&location)).unwrap();
    let named = |name: &str| {
        let mut snapshot = snapshot(key(1, 1, 1));
        snapshot.files[0].0 = name.to_owned();
        snapshot
    };
    let mut uneven = snapshot(key(1, 1, 1));
    uneven.optimizer.exp_avg.pop();
    let mut cases = vec![uneven];
    let names = [
        "",
        "../up",
        "a/b",
        "manifest.json",
        "optimizer.safetensors",
        ".hidden",
        "adapter_model.safetensors",
        "a#1",
    ];
    cases.extend(names.map(named));
    for case in cases {
        let error = store.write(&case).unwrap_err();
        assert!(matches!(error, Error::BadSnapshot { .. }), "{:?}: {error}", case.files[0].0);
    }
    assert!(!location.exists());
}
