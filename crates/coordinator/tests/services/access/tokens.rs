//! Tokens: made, used, expired, taken back; never kept.

use std::time::Duration;

use shanty_access::{Credentials, Role, Secret};
use shanty_proto::{
    from_status,
    v1::{self, access_service_client::AccessServiceClient, job_service_client::JobServiceClient, *},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{Server, closed, connect, start, with_token};

async fn create(server: &Server, admin: &Credentials, request: CreateTokenRequest) -> (Token, Secret) {
    let mut access = AccessServiceClient::new(connect(server, admin).await.unwrap());
    let answer = access.create_token(request).await.unwrap().into_inner();
    (answer.token.unwrap(), Secret::new(&answer.secret))
}

fn wanted(role: v1::Role, name: &str) -> CreateTokenRequest {
    CreateTokenRequest { role: role.into(), name: name.to_owned(), ..CreateTokenRequest::default() }
}

async fn list_jobs(server: &Server, credentials: &Credentials) -> Result<usize, Status> {
    let mut jobs = JobServiceClient::new(connect(server, credentials).await.unwrap());
    jobs.list_jobs(ListJobsRequest {}).await.map(|answer| answer.into_inner().jobs.len())
}

/// A session that says hello; the sender keeps it up.
async fn board(
    server: &Server,
    credentials: &Credentials,
    name: &str,
) -> (mpsc::Sender<WorkerMessage>, Streaming<CoordinatorMessage>) {
    let channel = connect(server, credentials).await.unwrap();
    let mut client = worker_service_client::WorkerServiceClient::new(channel);
    let (say, messages) = mpsc::channel(8);
    let hear = client.session(ReceiverStream::new(messages)).await.unwrap().into_inner();
    let hello = Hello { worker_id: name.to_owned(), ..Hello::default() };
    say.send(WorkerMessage { message: Some(worker_message::Message::Hello(hello)) }).await.unwrap();
    (say, hear)
}

async fn end_of<T>(stream: &mut Streaming<T>) -> Status {
    let end = async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended without a word"),
                Err(status) => return status,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), end).await.expect("the stream ends")
}

#[tokio::test]
async fn a_token_outlives_the_coordinator_and_its_secret_is_in_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    let (token, secret) = create(&server, &keys.of(Role::Admin), wanted(v1::Role::Submit, "ann")).await;
    assert_eq!((token.role(), token.name.as_str()), (v1::Role::Submit, "ann"));
    assert_eq!(list_jobs(&server, &with_token(&secret)).await.unwrap(), 0);
    server.stop().await;

    let hidden = secret.expose().rsplit('-').next().unwrap();
    let mut files = 0;
    for entry in std::fs::read_dir(folder.path().join("state")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let there = bytes.windows(hidden.len()).any(|window| window == hidden.as_bytes());
        assert!(!there, "{} holds the secret", path.display());
        files += 1;
    }
    assert!(files >= 2, "the store and the seed were looked at");

    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    assert_eq!(list_jobs(&server, &with_token(&secret)).await.unwrap(), 0);
    let mut access = AccessServiceClient::new(connect(&server, &keys.of(Role::Admin)).await.unwrap());
    let listed = access.list_tokens(ListTokensRequest {}).await.unwrap().into_inner().tokens;
    assert_eq!(listed, std::slice::from_ref(&token));
    let revoked =
        access.revoke_token(RevokeTokenRequest { token: "ann".to_owned() }).await.unwrap().into_inner();
    assert_eq!(revoked.revoked, [token]);
    assert_eq!(list_jobs(&server, &with_token(&secret)).await.unwrap_err().code(), Code::Unauthenticated);
    let status = access.revoke_token(RevokeTokenRequest { token: "ann".to_owned() }).await.unwrap_err();
    assert_eq!((status.code(), from_status(&status).code.as_str()), (Code::NotFound, "SH0747"));
    server.stop().await;
}

#[tokio::test]
async fn what_runs_on_a_token_ends_when_it_is_taken_back_or_expires() {
    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    let admin = keys.of(Role::Admin);
    let (token, secret) = create(&server, &admin, wanted(v1::Role::Worker, "crew")).await;
    let (_say, mut hear) = board(&server, &with_token(&secret), "a").await;
    assert!(hear.message().await.unwrap().is_some(), "it is welcome");
    let mut access = AccessServiceClient::new(connect(&server, &admin).await.unwrap());
    access.revoke_token(RevokeTokenRequest { token: token.id }).await.unwrap();
    let status = end_of(&mut hear).await;
    assert_eq!((status.code(), from_status(&status).code.as_str()), (Code::Unauthenticated, "SH0742"));

    let brief = CreateTokenRequest { lifetime_seconds: 1, ..wanted(v1::Role::Worker, "brief") };
    let (_, secret) = create(&server, &admin, brief).await;
    let (_say, mut hear) = board(&server, &with_token(&secret), "b").await;
    assert!(hear.message().await.unwrap().is_some(), "it is welcome");
    assert_eq!(from_status(&end_of(&mut hear).await).code, "SH0742");
    assert_eq!(list_jobs(&server, &with_token(&secret)).await.unwrap_err().code(), Code::Unauthenticated);
    let left = access.list_tokens(ListTokensRequest {}).await.unwrap().into_inner().tokens;
    assert!(left.is_empty(), "{left:?}");
    server.stop().await;
}

#[tokio::test]
async fn a_jobs_own_workers_work_for_it_alone_and_no_longer_than_it() {
    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    let spec = server.prepare(10);
    let admin = keys.of(Role::Admin);
    let mut jobs = JobServiceClient::new(connect(&server, &admin).await.unwrap());
    let submit = |id: &str, spec: String| SubmitJobRequest { request_id: id.to_owned(), spec_json: spec };
    let job = jobs.submit_job(submit("1", spec.clone())).await.unwrap().into_inner().job_id;
    let mut access = AccessServiceClient::new(connect(&server, &admin).await.unwrap());
    let scoped = |role: v1::Role, job: &str| CreateTokenRequest {
        job_id: job.to_owned(),
        lifetime_seconds: 3600,
        ..wanted(role, "of the job")
    };
    for (request, code) in [
        (scoped(v1::Role::Worker, "no-such-job"), "SH0770"),
        (scoped(v1::Role::Admin, &job), "SH0775"),
        (wanted(v1::Role::Unspecified, ""), "SH0775"),
    ] {
        assert_eq!(from_status(&access.create_token(request).await.unwrap_err()).code, code);
    }
    let (token, secret) = create(&server, &admin, scoped(v1::Role::Worker, &job)).await;
    assert_eq!(token.job_id, job);
    let credentials = with_token(&secret);

    // Rows and reports of another job are refused.
    let channel = connect(&server, &credentials).await.unwrap();
    let mut worker = worker_service_client::WorkerServiceClient::new(channel);
    let lease = LeaseRowsRequest { job_id: "another".to_owned(), ..LeaseRowsRequest::default() };
    let status = worker.lease_rows(lease).await.unwrap_err();
    assert_eq!((status.code(), from_status(&status).code.as_str()), (Code::PermissionDenied, "SH0743"));
    let (say, mut hear) = board(&server, &credentials, "spy").await;
    assert!(hear.message().await.unwrap().is_some(), "it is welcome");
    let report = StepReport { job_id: "another".to_owned(), ..StepReport::default() };
    say.send(WorkerMessage { message: Some(worker_message::Message::Step(report)) }).await.unwrap();
    assert_eq!(from_status(&end_of(&mut hear).await).code, "SH0743");

    // It is asked to work for its job, and when the job is over its token ends soon.
    let (_say, mut hear) = board(&server, &credentials, "a").await;
    loop {
        let message = hear.message().await.unwrap().unwrap().message.unwrap();
        if let coordinator_message::Message::Assign(assign) = message {
            assert_eq!(assign.job_id, job);
            break;
        }
    }
    jobs.cancel_job(CancelJobRequest { job_id: job.clone() }).await.unwrap();
    let left = access.list_tokens(ListTokensRequest {}).await.unwrap().into_inner().tokens;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    assert!(left[0].expires_unix_ms <= now + 60_000, "{left:?}");
    // Another job's base is not asked of it, though it is idle.
    let other = spec.replace("pirate", "privateer").replace("/store\"", "/other\"");
    let (prepared, copy) = (folder.path().join("store/prepared"), folder.path().join("other/prepared"));
    std::fs::create_dir_all(&copy).unwrap();
    for entry in std::fs::read_dir(&prepared).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let other = jobs.submit_job(submit("2", other)).await.unwrap().into_inner().job_id;
    let (_say, mut stranger) = board(&server, &keys.of(Role::Worker), "b").await;
    loop {
        let message = stranger.message().await.unwrap().unwrap().message.unwrap();
        if let coordinator_message::Message::Assign(assign) = message {
            assert_eq!(assign.job_id, other);
            break;
        }
    }
    while let Ok(Ok(Some(message))) = tokio::time::timeout(Duration::from_millis(300), hear.message()).await {
        assert!(!matches!(message.message, Some(coordinator_message::Message::Assign(_))), "{message:?}");
    }
    server.stop().await;

    // After a restart the token of the job that is over is gone.
    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    let mut access = AccessServiceClient::new(connect(&server, &keys.of(Role::Admin)).await.unwrap());
    assert!(access.list_tokens(ListTokensRequest {}).await.unwrap().into_inner().tokens.is_empty());
    server.stop().await;
}

#[tokio::test]
async fn nobody_speaks_for_another_ones_worker() {
    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    let admin = keys.of(Role::Admin);
    let (_, ours) = create(&server, &admin, wanted(v1::Role::Worker, "ours")).await;
    let (_, theirs) = create(&server, &admin, wanted(v1::Role::Worker, "theirs")).await;
    let (_say, mut hear) = board(&server, &with_token(&ours), "a").await;
    assert!(hear.message().await.unwrap().is_some(), "it is welcome");
    let (_say_too, mut spy) = board(&server, &with_token(&theirs), "a").await;
    assert_eq!(from_status(&end_of(&mut spy).await).code, "SH0743");
    // The worker itself may come again over a new connection.
    let (_say_again, mut again) = board(&server, &with_token(&ours), "a").await;
    assert!(again.message().await.unwrap().is_some(), "it is welcome again");
    server.stop().await;
}
