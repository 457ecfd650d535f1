//! Retention: what the rule promises for any list, and its application.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;

use std::fs;

use common::{file, keep_newest, key, snapshot, store, truncate, write_steps};
use proptest::prelude::*;
use shanty_checkpoint::{Blocking, Candidate, Expectations, Health, Keep, Key, best, retain};

fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let health = prop_oneof![Just(Health::Good), Just(Health::Damaged), Just(Health::Unknown)];
    let loss = prop_oneof![Just(None), (0u32..8).prop_map(|loss| Some(f64::from(loss).into()))];
    let entry = ((0u64..40, 1u32..3, 1u64..4), (health, loss));
    proptest::collection::btree_map(
        entry.0.prop_map(|(step, attempt, generation)| key(step, attempt, generation)),
        entry.1,
        0..20,
    )
    .prop_map(|map| {
        let candidate = |(key, (health, loss))| Candidate { key, health, loss };
        map.into_iter().map(candidate).collect::<Vec<_>>()
    })
    .prop_shuffle()
}

proptest! {
    #[test]
    fn retention_keeps_what_it_promises(
        list in candidates(),
        (keep, keep_best) in (0usize..6, 0usize..4),
        pinned in proptest::collection::vec((0u64..40).prop_map(|step| key(step, 1, 1)), 0..4),
    ) {
        let rule = Keep { newest: keep, best: keep_best };
        let deleted = retain(&list, rule, &pinned);
        let best = best(&list, keep_best);
        let loss = |key: &Key| {
            let entry = list.iter().find(|entry| entry.key == *key);
            entry.and_then(|entry| entry.loss).map(|loss| loss.value())
        };
        for entry in list.iter().filter(|entry| entry.health != Health::Damaged && entry.loss.is_some()) {
            let is_worse = |key: &Key| loss(key) <= entry.loss.map(|loss| loss.value());
            let full = best.len() == keep_best;
            prop_assert!(best.contains(&entry.key) || (full && best.iter().all(is_worse)), "the best are best");
        }
        let newest_good = list.iter().filter(|entry| entry.health == Health::Good).map(|entry| entry.key).max();

        prop_assert!(deleted.is_sorted(), "oldest first");
        for key in &deleted {
            prop_assert!(list.iter().any(|entry| entry.key == *key), "only what is there");
            prop_assert!(newest_good.is_some_and(|good| *key < good), "never the newest good, nor newer");
            prop_assert!(!pinned.contains(key), "never what is pinned");
            prop_assert!(!best.contains(key), "never the best");
        }
        let mut usable: Vec<Key> =
            list.iter().filter(|entry| entry.health != Health::Damaged).map(|entry| entry.key).collect();
        usable.sort_unstable_by(|a, b| b.cmp(a));
        for (index, key) in usable.iter().enumerate() {
            let within = index < keep.max(1);
            prop_assert!(!within || !deleted.contains(key), "the newest `keep` stay");
            let is_kept = pinned.contains(key) || best.contains(key);
            let must_go = !within && !is_kept && newest_good.is_some_and(|good| *key < good);
            prop_assert_eq!(must_go, deleted.contains(key), "the others go");
        }

        // What is left asks for nothing more.
        let left: Vec<Candidate> = list.iter().filter(|entry| !deleted.contains(&entry.key)).copied().collect();
        prop_assert_eq!(retain(&left, rule, &pinned), vec![]);
    }
}

fn steps(store: &Blocking) -> Vec<u64> {
    store.list().unwrap().iter().map(|manifest| manifest.step).collect()
}

#[test]
fn the_newest_stay_and_their_folders_alone() {
    let (folder, store) = store();
    write_steps(&store, [10, 20, 30, 40, 50]);
    let removed = store.apply_retention(keep_newest(2), &[key(20, 1, 1)]).unwrap();
    assert_eq!(removed.checkpoints, [key(10, 1, 1), key(30, 1, 1)]);
    assert_eq!(steps(&store), [50, 40, 20]);
    assert_eq!(fs::read_dir(folder.path().join("checkpoints")).unwrap().count(), 3);
    assert_eq!(store.apply_retention(keep_newest(2), &[key(20, 1, 1)]).unwrap(), Default::default());
    for manifest in store.list().unwrap() {
        store.load(&manifest).unwrap();
    }
}

#[test]
fn the_newest_good_stays_when_newer_ones_are_damaged() {
    let (folder, store) = store();
    write_steps(&store, [10, 20, 30, 40]);
    truncate(&file(folder.path(), key(40, 1, 1), "optimizer.safetensors"));
    truncate(&file(folder.path(), key(30, 1, 1), "manifest.json"));
    let removed = store.apply_retention(keep_newest(1), &[]).unwrap();
    assert_eq!(removed.checkpoints, [key(10, 1, 1)]);
    let found = store.newest_good(&Expectations::default()).unwrap().unwrap();
    assert_eq!((found.manifest.step, found.skipped.len()), (20, 2));
}

#[test]
fn with_no_good_checkpoint_nothing_is_deleted() {
    let (folder, store) = store();
    write_steps(&store, [10, 20, 30]);
    for step in [10, 20, 30] {
        truncate(&file(folder.path(), key(step, 1, 1), "adapter_model.safetensors"));
    }
    assert_eq!(store.apply_retention(keep_newest(1), &[]).unwrap(), Default::default());
    assert_eq!(steps(&store), [30, 20, 10]);
}

#[test]
fn leftovers_go_once_they_are_older_than_a_good_checkpoint() {
    let (folder, store) = store();
    let give_up = |step| {
        store.write_with(&snapshot(key(step, 1, 1)), &mut |_| Err("killed".to_owned())).unwrap_err();
        // What a writer killed in the middle of a file leaves.
        fs::write(file(folder.path(), key(step, 1, 1), "optimizer.safetensors#1"), "half").unwrap();
    };
    give_up(10);
    write_steps(&store, [20]);
    give_up(30);
    let removed = store.apply_retention(keep_newest(3), &[]).unwrap();
    assert_eq!((removed.checkpoints, removed.unfinished), (vec![], vec![key(10, 1, 1)]));
    assert!(!folder.path().join(key(10, 1, 1).path()).exists());
    // Step 30's writer may still be at work.
    assert!(file(folder.path(), key(30, 1, 1), "optimizer.safetensors").exists());
    assert_eq!(steps(&store), [20]);
}

#[test]
fn the_best_by_their_held_out_loss_stay_beside_the_newest() {
    let (_folder, store) = store();
    for (step, loss) in [(10, 3.0), (20, 1.5), (30, 2.5), (40, 2.0), (50, 2.2), (60, 2.4)] {
        let mut snapshot = snapshot(key(step, 1, 1));
        snapshot.state.loss = Some(loss.into());
        store.write(&snapshot).unwrap();
        store.apply_retention(Keep { newest: 2, best: 1 }, &[]).unwrap();
    }
    assert_eq!(steps(&store), [60, 50, 20], "20 had the lowest loss");
    let manifest = store.manifest(key(20, 1, 1)).unwrap();
    assert_eq!(manifest.state.loss.map(|loss| loss.value()), Some(1.5));
}
