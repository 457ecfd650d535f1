//! The services over a real port: users, watchers and workers.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

mod access;
mod crew;

use crew::*;
use shanty_coordinator::{Coordinator, Error, Options};
use shanty_diagnostic::{Diagnose, Diagnostic, Kind};
use shanty_proto::{
    from_status,
    v1::{watch_job_response::Update, worker_message::Message as In, *},
};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_job_from_submission_to_adapter_with_a_lost_worker_in_between() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path()).await;
    let spec = server.prepare(10);
    let job = server.submit(&spec).await;
    assert_eq!(job, "pirate");
    assert_eq!(server.submit(&spec).await, "pirate", "the same request id is the same job");
    let mut watch = server
        .statuses()
        .await
        .watch_job(WatchJobRequest { job_id: job.clone(), pulse_every_ms: Some(1) })
        .await
        .unwrap()
        .into_inner();

    let status = server.until(&job, |status| status.state() == JobState::Forming).await;
    assert!(status.reason.contains("0 of at least 1 workers are ready"), "{}", status.reason);
    let request: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("request.json")).unwrap()).unwrap();
    assert_eq!(request["max_length"], 32);

    let (mut a, welcome) = Sailor::board(&server, "a", None).await;
    assert_eq!((welcome.attached, welcome.credit_ms, welcome.beat_interval_ms), (false, 1500, 250));
    let (mut b, _) = Sailor::board(&server, "b", None).await;
    let assign = a.load().await;
    let data = assign.data.unwrap();
    assert_eq!((data.train_rows, data.eval_rows, data.steps), (10, 1, 6));
    b.load().await;
    let (form_a, form_b) = (a.formed().await, b.formed().await);
    assert_eq!((form_a.rank, form_b.rank, form_a.token.len()), (0, 1, 32));
    assert_eq!(form_a.members, form_b.members);
    assert!(matches!(form_a.start.as_ref().unwrap().source, Some(start_point::Source::Fresh(_))));
    let credit = a.beat(&form_a, 0).await.unwrap();
    assert_eq!((credit.generation, credit.up_to_step), (1, 6));
    assert!(credit.deadline_ms > 0, "how long a member may be without progress");

    // Rows arrive as they were prepared, with what the step must amount to.
    let rows = rows_of(1);
    let lease = a.lease(&form_a, Split::Train, 1, rows[..2].to_vec()).await.unwrap();
    assert_eq!(lease.rows.iter().map(|row| row.id).collect::<Vec<_>>(), rows[..2]);
    assert!(
        lease
            .rows
            .iter()
            .all(|row| row.token_ids.len() > 2 && row.segments.len() == 1 && !row.trained.is_empty())
    );
    let announcement = lease.announcement.unwrap();
    assert_eq!(announcement.rows, 4);
    let eval = b.lease(&form_b, Split::Eval, 0, vec![0]).await.unwrap();
    assert_eq!(eval.announcement.unwrap().rows, 1);
    let foreign = a.lease(&form_a, Split::Train, 1, rows_of(2)).await.unwrap_err();
    assert_eq!(from_status(&foreign).code, "SH0775");

    a.report(&form_a, 1, announcement).await;
    b.report(&form_b, 1, announcement).await;
    server.until(&job, |status| status.step == 1).await;

    // b dies in mid-step: its stream breaks, and a is told at once.
    drop(b);
    let leave = a.told_to_leave().await;
    assert!(leave.reason.contains("b was lost"), "{}", leave.reason);
    let rows = rows_of(2);
    a.left(&form_a, 1, rows[..2].to_vec()).await;
    let form = a.formed().await;
    assert_eq!((form.generation, form.rank, form.members.len()), (2, 0, 1));
    let start = form.start.clone().unwrap();
    assert_eq!(start.applied_step, 1);
    assert_eq!(start.rows, [RankRows { rank: 0, kept: rows[..2].to_vec(), compute: rows[2..].to_vec() }]);
    // The old generation gets no more rows.
    let stale = from_status(&a.lease(&form_a, Split::Train, 2, vec![]).await.unwrap_err());
    assert_eq!((stale.code.as_str(), stale.kind), ("SH0775", Kind::Transient));

    for step in 2..=6 {
        let announcement = a.lease(&form, Split::Train, step, vec![]).await.unwrap().announcement.unwrap();
        a.report(&form, step, announcement).await;
    }
    let within = |step| (form.job_id.clone(), form.attempt, form.generation, step);
    let (job_id, attempt, generation, step) = within(6);
    a.say(In::Evaluation(EvaluationReport { job_id, attempt, generation, step, loss: 3.25, tokens: 7 }))
        .await;
    let (job_id, attempt, generation, step) = within(6);
    let path = "checkpoints/00000006-a1-g2".to_owned();
    a.say(In::Checkpoint(CheckpointWritten {
        job_id,
        attempt,
        generation,
        step,
        path,
        size_bytes: 9,
        seconds: 0.1,
        ..CheckpointWritten::default()
    }))
    .await;
    let (job_id, attempt, generation, step) = within(6);
    a.say(In::Finished(Finished { job_id, attempt, generation, step, adapter: "/adapter".to_owned() })).await;
    assert!(a.released().await.succeeded);

    // The watcher has seen it all, and the end.
    let (mut steps, mut kinds, mut pulses, mut last) = (Vec::new(), Vec::new(), Vec::new(), None);
    while let Some(response) = watch.message().await.unwrap() {
        assert_eq!(response.missed, 0, "this watcher reads as fast as it is told");
        match response.update.unwrap() {
            Update::Step(step) => steps.push(step.step),
            Update::Event(event) => kinds.push(event.kind),
            Update::Status(status) => last = Some(status),
            Update::Pulse(pulse) => pulses.push(pulse),
            Update::Evaluation(_) | Update::Checkpoint(_) => {}
        }
    }
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    assert!(!pulses.is_empty() && pulses.iter().all(|pulse| pulse.unix_ms > 0 && pulse.ledger.is_some()));
    for kind in ["prepared", "formed", "member_lost", "recovered", "evaluated", "checkpoint", "state"] {
        assert!(kinds.iter().any(|seen| seen == kind), "{kind} in {kinds:?}");
    }
    let last = last.unwrap();
    assert_eq!((last.state(), last.step, last.adapter.as_str()), (JobState::Succeeded, 6, "/adapter"));
    let ledger = last.ledger.unwrap();
    // Two epochs of 4, 4 and 2 rows.
    assert_eq!((ledger.committed, ledger.requeued, ledger.remaining, ledger.duplicates), (20, 2, 0, 0));
    let lost = last.events.iter().find(|event| event.kind == "member_lost").unwrap();
    assert!(lost.worker_id == "b" && lost.detection_ms.is_some());
    assert!(last.events.iter().any(|event| event.kind == "recovered" && event.stall_ms.is_some()));
    let listed = server
        .statuses()
        .await
        .list_steps(ListStepsRequest { job_id: job.clone(), from_step: 2, ..ListStepsRequest::default() })
        .await;
    assert_eq!(listed.unwrap().into_inner().steps.len(), 5);
    server.stop().await;
}

#[tokio::test]
async fn workers_go_on_over_a_restart_of_the_coordinator() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path()).await;
    let spec = server.prepare(10);
    let job = server.submit(&spec).await;
    let (mut a, _) = Sailor::board(&server, "a", None).await;
    let (mut b, _) = Sailor::board(&server, "b", None).await;
    a.load().await;
    b.load().await;
    let (form_a, form_b) = (a.formed().await, b.formed().await);
    let announcement = a.lease(&form_a, Split::Train, 1, vec![]).await.unwrap().announcement.unwrap();
    a.report(&form_a, 1, announcement).await;
    server.until(&job, |status| status.step == 1).await;
    server.stop().await;

    let server = Server::start(folder.path()).await;
    let status = server.status(&job).await;
    assert_eq!((status.state(), status.step, status.generation), (JobState::Running, 1, 1));
    let (mut a, welcome) = Sailor::board(&server, "a", Some(attachment(&form_a, 2))).await;
    assert!(welcome.attached);
    let (_b, welcome) = Sailor::board(&server, "b", Some(attachment(&form_b, 2))).await;
    assert!(welcome.attached);
    assert_eq!(a.beat(&form_a, 2).await.unwrap().generation, 1);
    // Rows are leased at once: the prepared data is open again.
    let announcement = a.lease(&form_a, Split::Train, 3, rows_of(3)).await.unwrap().announcement.unwrap();
    a.report(&form_a, 3, announcement).await;
    let status = server.until(&job, |status| status.step == 3).await;
    assert_eq!((status.generation, status.state()), (1, JobState::Running));
    server.stop().await;
}

#[tokio::test]
async fn errors_keep_code_place_and_hint_over_the_wire() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path()).await;
    let mut jobs = server.jobs().await;
    let status = jobs.cancel_job(CancelJobRequest { job_id: "nobody".to_owned() }).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound);
    let error = from_status(&status);
    assert_eq!((error.code.as_str(), error.hint.as_deref()), ("SH0770", Some("`shanty jobs` lists them")));
    let status = jobs.cancel_job(CancelJobRequest { job_id: "../etc".to_owned() }).await.unwrap_err();
    assert_eq!(from_status(&status).code, "SH0775");
    let bad = SubmitJobRequest { request_id: "r".to_owned(), spec_json: "{\"name\": 3}".to_owned() };
    let error = from_status(&jobs.submit_job(bad).await.unwrap_err());
    assert_eq!((error.code.as_str(), error.kind), ("SH0775", Kind::User));

    // The child says what is wrong with the data; the job shows it with file and line.
    let spec = server.prepare(3);
    let broken = Diagnostic::new("SH0203", "line 2 is no JSON")
        .in_file("/data/train.jsonl")
        .at_line(2)
        .hint("see there");
    let line = shanty_coordinator::prepare::PrepareLine::failed(broken);
    std::fs::write(folder.path().join("answer.json"), serde_json::to_string(&line).unwrap()).unwrap();
    let job = server.submit(&spec).await;
    let status = server.until(&job, |status| status.state() == JobState::Failed).await;
    let error = status.error.unwrap();
    assert_eq!(
        (status.error_code.as_str(), error.file.as_str(), error.line),
        ("SH0203", "/data/train.jsonl", 2)
    );
    // A child that dies without a word is an error of its own.
    std::fs::write(folder.path().join("answer.json"), "").unwrap();
    jobs.resume_job(ResumeJobRequest { job_id: job.clone(), ..Default::default() }).await.unwrap();
    let status = server.until(&job, |status| status.attempt == 2 && status.state() == JobState::Failed).await;
    assert_eq!(status.error_code, "SH0778");
    server.stop().await;
}

#[tokio::test]
async fn a_session_begins_with_hello_and_makes_sense() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path()).await;
    let (mut a, _) = Sailor::board(&server, "a", None).await;
    a.say(In::Hello(Hello { worker_id: "a".to_owned(), ..Hello::default() })).await;
    assert_eq!(from_status(&a.hear_error().await).code, "SH0775");
    // The same worker with a second stream: the first one is ended.
    let (mut first, _) = Sailor::board(&server, "b", None).await;
    let (second, _) = Sailor::board(&server, "b", None).await;
    assert!(from_status(&first.hear_error().await).message.contains("connected again"));
    drop(second);
    server.stop().await;
}

#[tokio::test]
async fn a_watcher_that_reads_late_gets_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path()).await;
    let spec = server.prepare(10).replace("\"steps\":6", "\"steps\":300");
    let job = server.submit(&spec).await;
    let (mut a, _) = Sailor::board(&server, "a", None).await;
    a.load().await;
    let form = a.formed().await;
    let mut watch = server
        .statuses()
        .await
        .watch_job(WatchJobRequest { job_id: job.clone(), ..WatchJobRequest::default() })
        .await
        .unwrap()
        .into_inner();
    assert!(matches!(watch.message().await.unwrap().unwrap().update, Some(Update::Status(_))));
    let mut announcements = std::collections::HashMap::new();
    for step in 1..=300 {
        // An epoch is 3 steps; its announcements differ by epoch, as rows are shuffled.
        let lease = a.lease(&form, Split::Train, step, vec![]).await.unwrap();
        announcements.insert(step, lease.announcement.unwrap());
        a.report(&form, step, announcements[&step]).await;
    }
    server.until(&job, |status| status.step == 300).await;
    server.jobs().await.cancel_job(CancelJobRequest { job_id: job.clone() }).await.unwrap();
    let (mut steps, mut last) = (0, None);
    while let Some(response) = watch.message().await.unwrap() {
        match response.update.unwrap() {
            Update::Step(_) => steps += 1,
            Update::Status(status) => last = Some(status),
            _ => {}
        }
    }
    // They all fit into the connection's buffers; how points are dropped is tested beside `follow`.
    assert_eq!(steps, 300);
    let last = last.unwrap();
    assert_eq!((last.state(), last.step), (JobState::Cancelled, 300));
    server.stop().await;
}

#[tokio::test]
async fn logs_are_kept_and_followed() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path()).await;
    let spec = server.prepare(10);
    let job = server.submit(&spec).await;
    let (a, _) = Sailor::board(&server, "a", None).await;
    let log = |text: &str| {
        let line = LogLine {
            unix_ms: 1,
            worker_id: "somebody else".to_owned(),
            level: "info".to_owned(),
            text: text.to_owned(),
        };
        In::Logs(LogLines { job_id: "pirate".to_owned(), lines: vec![line] })
    };
    a.say(log("first")).await;
    let mut statuses = server.statuses().await;
    let request = |follow| TailLogsRequest { job_id: job.clone(), follow, ..TailLogsRequest::default() };
    let mut past = Vec::new();
    while past.is_empty() {
        let mut tail = statuses.tail_logs(request(false)).await.unwrap().into_inner();
        while let Some(response) = tail.message().await.unwrap() {
            past.extend(response.lines);
        }
    }
    assert_eq!((past[0].text.as_str(), past[0].worker_id.as_str()), ("first", "a"));
    let mut tail = statuses.tail_logs(request(true)).await.unwrap().into_inner();
    assert_eq!(tail.message().await.unwrap().unwrap().lines.len(), 1);
    a.say(log("second")).await;
    assert_eq!(tail.message().await.unwrap().unwrap().lines[0].text, "second");
    server.stop().await;
}

#[tokio::test]
async fn health_is_served_and_beyond_loopback_must_be_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path()).await;
    let channel =
        tonic::transport::Channel::from_shared(server.url.clone()).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest { service: "shanty.v1.WorkerService".to_owned() };
    let answer = health.check(request).await.unwrap().into_inner();
    assert_eq!(answer.status, i32::from(tonic_health::pb::health_check_response::ServingStatus::Serving));

    let second = Coordinator::bind(options(folder.path())).await.err().unwrap();
    assert!(matches!(second, Error::StateInUse { .. }), "{second}");
    server.stop().await;

    let elsewhere = tempfile::tempdir().unwrap();
    let open = Options { listen: "0.0.0.0:0".parse().unwrap(), insecure: false, ..options(elsewhere.path()) };
    let refused = Coordinator::bind(open.clone()).await.err().unwrap();
    assert_eq!(refused.diagnostic().code, "SH0772");
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    let insecure = Options { insecure: true, ..open };
    Coordinator::run(insecure, shutdown, move |handle| {
        assert_ne!(handle.address.port(), 0);
        stop.cancel();
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_job_is_shown_as_it_was_submitted_with_what_was_learnt_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path()).await;
    let spec = server.prepare(10);
    let job = server.submit(&spec).await;
    let mut statuses = server.statuses().await;
    let request = || GetConfigurationRequest { job_id: job.clone() };
    server.until(&job, |status| status.state() == JobState::Forming).await;
    let before = statuses.get_configuration(request()).await.unwrap().into_inner();
    assert!(before.adapter.is_none(), "nobody has loaded the base");
    let shown: serde_json::Value = serde_json::from_str(&before.spec_json).unwrap();
    let submitted: serde_json::Value = serde_json::from_str(&spec).unwrap();
    assert_eq!((&shown["name"], &shown["train"]["seed"]), (&submitted["name"], &serde_json::json!(17)));
    let (mut a, _) = Sailor::board(&server, "a", None).await;
    a.load().await;
    let form = a.formed().await;
    let known = statuses.get_configuration(request()).await.unwrap().into_inner();
    let data = known.data.unwrap();
    assert_eq!((data.train_rows, data.eval_rows, data.steps, data.steps_per_epoch), (10, 1, 6, 3));
    assert!(known.adapter.is_some());
    let nobody = GetConfigurationRequest { job_id: "nobody".to_owned() };
    assert_eq!(from_status(&statuses.get_configuration(nobody).await.unwrap_err()).code, "SH0770");

    // A wish for a checkpoint reaches its members.
    let asked = CheckpointNowRequest { job_id: job.clone() };
    assert_eq!(server.jobs().await.checkpoint_now(asked).await.unwrap().into_inner().after_step, 0);
    loop {
        if let coordinator_message::Message::Save(save) = a.hear().await {
            assert_eq!((save.job_id, save.generation), (job, form.generation));
            break;
        }
    }
    server.stop().await;
}
