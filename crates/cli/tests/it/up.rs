//! Workers on plain hosts: a real sshd, real connections.

use std::fs;

use serde_json::Value;
use shanty_testkit::{
    LocalCluster, Sshd, TinyJob,
    process::{PATIENCE, is_alive, kill_9},
    wait,
};

use crate::support::Place;

fn at_work(status: &Value) -> Vec<(String, u32)> {
    let members = status["members"].as_array().cloned().unwrap_or_default();
    let mut found: Vec<(String, u32)> = members
        .iter()
        .filter(|member| member["rank"].is_number() && member["reason"].is_null())
        .filter_map(|member| {
            Some((member["worker"].as_str()?.to_owned(), u32::try_from(member["pid"].as_u64()?).ok()?))
        })
        .collect();
    found.sort();
    found
}

fn are(members: &[(String, u32)], names: [&str; 2]) -> bool {
    members.len() == 2 && members.iter().zip(names).all(|((worker, _), name)| worker.starts_with(name))
}

#[test]
fn workers_on_two_hosts_are_started_by_ssh_started_again_and_drained() {
    let job = TinyJob { steps: 1_000_000, every_steps: 0, workers: (1, 2), ..TinyJob::default() };
    let place = Place::new(job).unwrap();
    let Some(sshd) = Sshd::start(&place.path("ssh")).unwrap() else { return };
    let cluster = LocalCluster::start(place.shanty.clone(), &place.path("state")).unwrap();
    let create = ["token", "create", "--role", "worker", "--name", "crew", "--out", "crew.token"];
    cluster.ask(&create).unwrap().expect_code(0).unwrap();
    let text = format!(
        "coordinator = \"{}\"\ntoken_file = \"crew.token\"\n{}[worker]\nprogram = \"{}\"\n\
         flags = [\"--device\", \"cpu\", \"--threads\", \"1\"]\n\
         [[host]]\naddress = \"127.0.0.1\"\nname = \"anchor\"\nfolder = \"{folder}/anchor\"\n\
         [[host]]\naddress = \"127.0.0.1\"\nname = \"bollard\"\nfolder = \"{folder}/bollard\"\n",
        cluster.address(),
        sshd.section(),
        env!("CARGO_BIN_EXE_shanty"),
        folder = place.folder.path().display(),
    );
    fs::write(place.path("cluster.toml"), text).unwrap();
    let mut up = place.shanty.start(&["up", "cluster.toml", "--output", "json"]).unwrap();
    for host in ["anchor", "bollard"] {
        up.wait_for(host, |event| event["event"] == "started" && event["host"] == host).unwrap();
    }
    let job = cluster.submit(&place.path("job.toml")).unwrap();
    let both =
        |status: &Value| are(&at_work(status), ["anchor-", "bollard-"]) && status["step"].as_u64() > Some(10);
    let status = cluster.wait_for_status(&job, "both hosts at work", both).unwrap();

    // The token is in nobody's arguments: neither of ssh, nor of the shells there, nor of the workers.
    let token = fs::read_to_string(place.path("crew.token")).unwrap();
    let arguments = |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = String::from_utf8_lossy(&arguments(pid)).into_owned();
        assert!(!line.contains(token.trim()), "a process shows the token");
    }

    // One dies; it is started again under its name, and the crew is whole again.
    let (_, victim) = at_work(&status)[1];
    kill_9(victim);
    let whole = |status: &Value| both(status) && at_work(status)[1].1 != victim;
    let status = cluster.wait_for_status(&job, "the crew to be whole again", whole).unwrap();
    let ended = up.wait_for("its end", |event| event["event"] == "ended").unwrap();
    assert_eq!((&ended["host"], &ended["again"]), (&"bollard".into(), &true.into()), "{ended}");

    // Interrupted, all hand back what they hold: nothing is lost, and nobody is left behind.
    let pids: Vec<u32> = at_work(&status).into_iter().map(|(_, pid)| pid).collect();
    up.interrupt();
    up.finish().unwrap().expect_code(130).unwrap();
    wait::until(
        "the workers to end",
        PATIENCE,
        || Ok((!pids.iter().any(|pid| is_alive(*pid))).then_some(())),
    )
    .unwrap();
    let status = cluster.status(&job).unwrap();
    assert_eq!(status["checkpoints"][0]["step"], status["step"], "the last one wrote a checkpoint: {status}");
    assert_eq!(status["ledger"]["duplicates"], 0);
}

#[test]
fn a_host_that_cannot_be_reached_is_tried_again_and_a_wrong_file_is_not() {
    let place = Place::new(TinyJob::default()).unwrap();
    let Some(sshd) = Sshd::start(&place.path("ssh")).unwrap() else { return };
    let head = format!("coordinator = \"http://127.0.0.1:1\"\n{}", sshd.section());
    let wrong =
        format!("{head}[worker]\nprogram = \"/bin/false\"\n[[host]]\naddress = \"127.0.0.1\"\nport = 1\n");
    fs::write(place.path("cluster.toml"), wrong).unwrap();
    let mut up = place.shanty.start(&["up", "cluster.toml", "--output", "json"]).unwrap();
    let twice = wait::until("two tries", PATIENCE, || {
        Ok((up.events().iter().filter(|event| event["code"] == 255 && event["again"] == true).count() > 1)
            .then_some(()))
    });
    twice.unwrap();
    assert!(!up.has_ended());
    up.interrupt();
    up.finish().unwrap().expect_code(130).unwrap();
    fs::write(place.path("cluster.toml"), "host = 3\n").unwrap();
    let refused =
        place.shanty.run(&["up", "cluster.toml", "--output", "json"]).unwrap().expect_code(2).unwrap();
    assert_eq!(refused.error().unwrap()["code"], "SH0964");
}
