//! A run whose checkpoints and adapter lie in a bucket of a server that speaks S3.

use shanty_testkit::{
    TinyJob, adapter,
    s3::{BUCKET, S3},
};

use crate::support::{Place, last_event};

fn job() -> TinyJob {
    TinyJob { steps: 60, every_steps: 10, eval_every_steps: 10, dropout: 0.2, ..TinyJob::default() }
}

#[test]
fn a_run_on_a_bucket_survives_a_kill_and_a_damaged_checkpoint_bit_by_bit() {
    let Some(server) = S3::start().unwrap() else { return };
    let undisturbed = Place::new(job()).unwrap();
    let straight = undisturbed.run(2).unwrap();

    let mut place = Place::new(job()).unwrap();
    for (name, value) in server.environment() {
        place = place.environment(name, &value);
    }
    let store = format!("checkpoint.store=s3://{BUCKET}/runs/tiny");
    let arguments = |verb: &'static str| {
        let mut arguments = vec![verb, "job.toml", "--workers", "2", "--threads", "1", "--output", "json"];
        arguments.extend(["--set", &store, "--set", "checkpoint.keep_best=1"]);
        arguments.into_iter().map(str::to_owned).collect::<Vec<String>>()
    };
    let mut running = place.shanty.start(&arguments("run")).unwrap();
    running
        .wait_for("the third checkpoint", |event| event["event"] == "checkpoint" && event["step"] == 30)
        .unwrap();
    let killed = running.kill_all().unwrap();
    let newest = killed.events_of("checkpoint").pop().unwrap();
    let (path, step) = (newest["path"].as_str().unwrap().to_owned(), newest["step"].as_u64().unwrap());
    server.damage(&format!("runs/tiny/{path}/optimizer.safetensors")).unwrap();

    let resumed = place.shanty.run(&arguments("resume")).unwrap().expect_code(0).unwrap();
    let first = resumed.events_of("step")[0]["step"].as_u64().unwrap();
    assert!(first <= step, "it went on from step {first} although the checkpoint of {step} is damaged");
    let over = last_event(&resumed).unwrap();
    assert_eq!(over["adapter_url"], format!("s3://{BUCKET}/runs/tiny/adapter"));
    assert_eq!(over["eval_loss_after"], last_event(&straight).unwrap()["eval_loss_after"]);

    // The adapter is in the bucket and on this machine, the same as that of a run that nobody disturbed.
    let (one, other) = (undisturbed.adapter(&straight).unwrap(), place.adapter(&resumed).unwrap());
    assert!(adapter::same_bits(&one, &other).unwrap(), "the adapters differ");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let uploaded = server.get(&format!("runs/tiny/adapter/{name}")).unwrap();
        assert_eq!(uploaded, std::fs::read(other.join(name)).unwrap(), "{name}");
    }
    place.check_exactly_once().unwrap();
    assert!(!place.store().join("checkpoints").exists(), "checkpoints are in the bucket alone");

    // The newest three, and the best where it is not among them.
    let manifests = server.keys("runs/tiny/checkpoints/").unwrap();
    let manifests = manifests.iter().filter(|key| key.ends_with("/manifest.json")).count();
    assert!((3..=4).contains(&manifests), "{manifests} checkpoints are left");
}
