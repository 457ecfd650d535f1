//! Checkpoints in a bucket of a server that speaks S3.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::{keep_newest, key, snapshot, write_steps};
use object_store::prefix::PrefixStore;
use shanty_checkpoint::{Blocking, Error, Expectations, Keep, Store};
use shanty_diagnostic::{Diagnose, Kind};
use shanty_remote::Environment;
use shanty_testkit::s3::{BUCKET, S3};

/// A store below `prefix` of the bucket.
fn store(server: &S3, prefix: &str) -> Blocking {
    let variables = server.environment();
    let environment = Environment::of(variables.iter().map(|(name, value)| (*name, value.as_str())));
    let url = format!("s3://{BUCKET}/{prefix}");
    let location = shanty_remote::open_store_in(&url, &environment).unwrap();
    Blocking::new(Store::of_objects(&url, Arc::new(PrefixStore::new(location.store, location.path)))).unwrap()
}

/// Everything on one server: starting one takes a second or two.
#[test]
fn a_bucket_keeps_checkpoints_as_a_folder_does() {
    let Some(server) = S3::start().unwrap() else { return };
    what_is_written_is_read_bit_for_bit(&server);
    the_first_writer_wins(&server);
    damage_is_noticed_and_passed_over(&server);
    retention_keeps_the_newest_and_the_best(&server);
    a_folder_is_replaced_as_a_whole(&server);
    who_is_not_there_is_named(&server);
}

fn what_is_written_is_read_bit_for_bit(server: &S3) {
    let store = store(server, "runs/one");
    assert_eq!(store.newest_good(&Expectations::default()).unwrap(), None);
    let mut written = snapshot(key(50, 1, 3));
    // 30 MB, so that it travels in parts.
    let large: Vec<f32> = (0..2_500_000).map(|number| number as f32).collect();
    written.optimizer.parameters.clone_from(&large);
    written.optimizer.exp_avg.clone_from(&large);
    written.optimizer.exp_avg_sq = large;
    written.state.loss = Some(1.25.into());
    let result = store.write(&written).unwrap();
    assert_eq!(result.path, "checkpoints/00000050-a1-g3");
    let found = store.newest_good(&Expectations::default()).unwrap().unwrap();
    assert_eq!(found.snapshot, written);
    assert_eq!(found.manifest.state.loss.map(|loss| loss.value()), Some(1.25));
    let keys = server.keys("runs/one/").unwrap();
    assert_eq!(keys.len(), 4, "{keys:?}");
    assert!(keys.contains(&"runs/one/checkpoints/00000050-a1-g3/manifest.json".to_owned()));
}

fn the_first_writer_wins(server: &S3) {
    let store = store(server, "runs/two");
    let first = snapshot(key(7, 1, 1));
    store.write(&first).unwrap();
    let mut second = first.clone();
    second.state.epoch += 1;
    let error = store.write(&second).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    // One that died before its manifest is no checkpoint, and its files serve the one who tries again.
    let next = snapshot(key(8, 1, 1));
    let given_up = store.write_with(&next, &mut |_| Err("killed".to_owned())).unwrap_err();
    assert!(matches!(given_up, Error::GivenUp { .. }), "{given_up}");
    assert_eq!(store.newest_good(&Expectations::default()).unwrap().unwrap().snapshot, first);
    store.write(&next).unwrap();
    assert_eq!(store.newest_good(&Expectations::default()).unwrap().unwrap().snapshot, next);
    // Another writer's manifest alone, put there in the moment between looking and writing.
    let manifest = "runs/two/checkpoints/00000009-a1-g1/manifest.json";
    let mut race = |point| {
        if point == shanty_checkpoint::WritePoint::BeforeManifest {
            server.put(manifest, b"{}").unwrap();
        }
        Ok(())
    };
    let error = store.write_with(&snapshot(key(9, 1, 1)), &mut race).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    assert_eq!(server.get(manifest).unwrap(), b"{}", "what is there is never overwritten");
}

fn damage_is_noticed_and_passed_over(server: &S3) {
    let store = store(server, "runs/three");
    write_steps(&store, [10, 20, 30, 40]);
    let file = |step: u64, name: &str| format!("runs/three/{}/{name}", key(step, 1, 1).path());
    server.damage(&file(40, "optimizer.safetensors")).unwrap();
    server.delete(&file(30, "adapter_model.safetensors")).unwrap();
    server.damage(&file(20, "manifest.json")).unwrap();
    let found = store.newest_verified(&Expectations::default()).unwrap().unwrap();
    assert_eq!(found.manifest.step, 10);
    let reasons: Vec<String> = found.skipped.iter().map(ToString::to_string).collect();
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(reasons[0].contains("00000040-a1-g1") && reasons[0].contains("hash"), "{reasons:?}");
    assert!(reasons[1].contains("adapter_model.safetensors is missing"), "{reasons:?}");
    server.damage(&file(10, "adapter_config.json")).unwrap();
    let error = store.newest_good(&Expectations::default()).unwrap_err();
    assert!(matches!(error, Error::NoneGood { ref skipped, .. } if skipped.len() == 4), "{error}");
}

fn retention_keeps_the_newest_and_the_best(server: &S3) {
    let store = store(server, "runs/four");
    let mut removed = Vec::new();
    for (step, loss) in [(10, 2.0), (20, 1.0), (30, 3.0), (40, 2.5), (50, 2.4)] {
        let mut snapshot = snapshot(key(step, 1, 1));
        snapshot.state.loss = Some(loss.into());
        store.write(&snapshot).unwrap();
        removed.extend(store.apply_retention(Keep { newest: 2, best: 1 }, &[]).unwrap().checkpoints);
    }
    let steps: Vec<u64> = store.list().unwrap().iter().map(|manifest| manifest.step).collect();
    assert_eq!(steps, [50, 40, 20]);
    assert_eq!(removed, [key(10, 1, 1), key(30, 1, 1)]);
    assert_eq!(server.keys("runs/four/").unwrap().len(), 12, "nothing of the others is left");
    assert_eq!(
        store.apply_retention(keep_newest(1), &[]).unwrap().checkpoints,
        [key(20, 1, 1), key(40, 1, 1)]
    );
}

fn a_folder_is_replaced_as_a_whole(server: &S3) {
    let store = store(server, "runs/five");
    let files = |names: &[&str]| -> Vec<(String, Bytes)> {
        names.iter().map(|name| ((*name).to_owned(), Bytes::from(format!("content of {name}")))).collect()
    };
    let url = store.put_folder("adapter", &files(&["adapter_config.json", "old"]), &|| true).unwrap();
    assert_eq!(url, format!("s3://{BUCKET}/runs/five/adapter"));
    let refused = store.put_folder("adapter", &files(&["adapter_config.json"]), &|| false).unwrap_err();
    assert!(matches!(refused, Error::GivenUp { .. }), "{refused}");
    assert_eq!(server.keys("runs/five/").unwrap().len(), 2, "what was there is untouched");
    store.put_folder("adapter", &files(&["adapter_config.json", "new"]), &|| true).unwrap();
    let keys = server.keys("runs/five/").unwrap();
    assert_eq!(keys, ["runs/five/adapter/adapter_config.json", "runs/five/adapter/new"]);
    assert_eq!(server.get(&keys[1]).unwrap(), b"content of new");
}

fn who_is_not_there_is_named(server: &S3) {
    let variables = server.environment();
    let environment = Environment::of(variables.iter().map(|(name, value)| (*name, value.as_str())));
    let location = shanty_remote::open_store_in("s3://nobody/x", &environment).unwrap();
    let store = Blocking::new(Store::of_objects("s3://nobody/x", location.store)).unwrap();
    let error = store.write(&snapshot(key(1, 1, 1))).unwrap_err();
    assert!(!error.to_string().contains("test:"), "no credentials in {error}");
    assert_ne!(error.diagnostic().kind, Kind::Internal, "{error}");
}
