//! Slow, half-open, greedy and over-long.

use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use shanty_access::Role;
use shanty_coordinator::{Options, access::Limits};
use shanty_proto::{
    from_status,
    v1::{job_service_client::JobServiceClient, status_service_client::StatusServiceClient, *},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tonic::Code;

use super::{Server, closed, connect, start};

/// Nothing here waits for longer.
const PATIENCE: Duration = Duration::from_secs(20);

fn strict(folder: &Path) -> Options {
    let limits = Limits {
        identify_within: Duration::from_millis(300),
        handshake_within: Duration::from_millis(300),
        silent_within: Duration::from_millis(1000),
        ..Limits::default()
    };
    Options { limits, ..closed(folder) }
}

fn address(server: &Server) -> SocketAddr {
    server.url.rsplit('/').next().unwrap().parse().unwrap()
}

/// How long it takes until the other side ends the connection.
async fn time_to_end(stream: &mut TcpStream) -> Duration {
    let began = Instant::now();
    let mut buffer = [0; 4096];
    let end = async { while matches!(stream.read(&mut buffer).await, Ok(read) if read > 0) {} };
    tokio::time::timeout(PATIENCE, end).await.expect("the connection is ended");
    began.elapsed()
}

#[tokio::test]
async fn a_connection_that_does_not_say_who_it_is_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), strict(folder.path())).await;
    // Not a byte.
    let mut silent = TcpStream::connect(address(&server)).await.unwrap();
    assert!(time_to_end(&mut silent).await >= Duration::from_millis(250), "it was given its time");
    // The first words of HTTP/2 and no more; one byte after the other; something else altogether.
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let mut polite = TcpStream::connect(address(&server)).await.unwrap();
    polite.write_all(PREFACE).await.unwrap();
    time_to_end(&mut polite).await;
    let slow = TcpStream::connect(address(&server)).await.unwrap();
    let (mut reads, mut writes) = slow.into_split();
    let trickle = tokio::spawn(async move {
        for byte in PREFACE {
            if writes.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // Kept open: only the other side can end it.
        std::future::pending::<()>().await;
    });
    let mut buffer = [0; 256];
    let end = async { while matches!(reads.read(&mut buffer).await, Ok(read) if read > 0) {} };
    tokio::time::timeout(PATIENCE, end).await.expect("the connection is ended");
    trickle.abort();
    let mut other = TcpStream::connect(address(&server)).await.unwrap();
    other.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    time_to_end(&mut other).await;
    // One that has said who it is may be silent for as long as it likes.
    let channel = connect(&server, &keys.of(Role::Read)).await.unwrap();
    let mut jobs = JobServiceClient::new(channel);
    jobs.list_jobs(ListJobsRequest {}).await.unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    jobs.list_jobs(ListJobsRequest {}).await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn connections_that_are_refused_do_not_live_on() {
    let folder = tempfile::tempdir().unwrap();
    let (server, _) = start(folder.path(), strict(folder.path())).await;
    let (relay, _stop, ended) = relay(address(&server)).await;
    let channel =
        tonic::transport::Channel::from_shared(format!("http://{relay}")).unwrap().connect().await.unwrap();
    let mut jobs = JobServiceClient::new(channel);
    let began = Instant::now();
    let mut ended = ended;
    // A stranger that asks again and again is as unknown as one that is silent.
    while !*ended.borrow() && began.elapsed() < PATIENCE {
        assert!(jobs.list_jobs(ListJobsRequest {}).await.is_err());
        tokio::select! {
            _ = ended.changed() => {}
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
    }
    assert!(*ended.borrow(), "the connection is ended");
    server.stop().await;
}

/// Carries bytes for one connection until it is told to stop; says when the server has ended its side.
async fn relay(to: SocketAddr) -> (SocketAddr, watch::Sender<bool>, watch::Receiver<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let (stop, mut stopped) = watch::channel(false);
    let (end, ended) = watch::channel(false);
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let server = TcpStream::connect(to).await.unwrap();
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
            (client.into_split(), server.into_split());
        let mut until_then = stopped.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
                _ = until_then.wait_for(|stopped| *stopped) => {}
            }
            // What the client says is not heard any more, but its side is not closed either.
            std::future::pending::<()>().await;
        });
        let mut buffer = vec![0; 65_536];
        loop {
            let quiet = *stopped.borrow_and_update();
            tokio::select! {
                changed = stopped.changed(), if !quiet => changed.unwrap(),
                read = from_server.read(&mut buffer) => match read {
                    Ok(read) if read > 0 => {
                        if !quiet {
                            let _ = to_client.write_all(&buffer[..read]).await;
                        }
                    }
                    _ => break,
                },
            }
        }
        end.send_replace(true);
    });
    (at, stop, ended)
}

#[tokio::test]
async fn a_client_that_stops_reading_is_dropped_and_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), strict(folder.path())).await;
    let (relay, stop, mut ended) = relay(address(&server)).await;
    let mut server = server;
    server.url = format!("http://{relay}");
    let channel = connect(&server, &keys.of(Role::Read)).await.unwrap();
    JobServiceClient::new(channel.clone()).list_jobs(ListJobsRequest {}).await.unwrap();
    assert!(!*ended.borrow());
    stop.send_replace(true);
    let began = Instant::now();
    tokio::time::timeout(PATIENCE, ended.wait_for(|ended| *ended)).await.expect("it is dropped").unwrap();
    // Pings go out every 400 ms and are answered within 600 ms, or not at all.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    drop(channel);
    server.stop().await;
}

#[tokio::test]
async fn an_over_long_message_is_refused_and_a_strangers_is_not_even_read() {
    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    let long = SubmitJobRequest { request_id: "r".to_owned(), spec_json: " ".repeat(5 << 20) };
    let mut jobs = JobServiceClient::new(connect(&server, &keys.of(Role::Submit)).await.unwrap());
    let status = jobs.submit_job(long.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    let mut stranger =
        JobServiceClient::new(connect(&server, &shanty_access::Credentials::default()).await.unwrap());
    let status = stranger.submit_job(long).await.unwrap_err();
    assert_eq!(from_status(&status).code, "SH0740", "{status:?}");
    // Headers have an end, too.
    let mut request = tonic::Request::new(ListJobsRequest {});
    request.metadata_mut().insert("x-long", "a".repeat(64 << 10).parse().unwrap());
    assert!(jobs.list_jobs(request).await.is_err());
    server.stop().await;
}

#[tokio::test]
async fn one_identity_has_so_many_connections_and_calls_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { connections_per_identity: 2, calls_per_identity: 3, ..Limits::default() };
    let (server, keys) = start(folder.path(), Options { limits, ..closed(folder.path()) }).await;
    let spec = server.prepare(4);
    let mut submit = JobServiceClient::new(connect(&server, &keys.of(Role::Submit)).await.unwrap());
    let request = SubmitJobRequest { request_id: "1".to_owned(), spec_json: spec };
    let job = submit.submit_job(request).await.unwrap().into_inner().job_id;

    let read = keys.of(Role::Read);
    let mut first = StatusServiceClient::new(connect(&server, &read).await.unwrap());
    let watch = || WatchJobRequest { job_id: job.clone() };
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut stream = first.watch_job(watch()).await.unwrap().into_inner();
        assert!(stream.message().await.unwrap().is_some());
        open.push(stream);
    }
    let status = first.watch_job(watch()).await.unwrap_err();
    assert_eq!((status.code(), from_status(&status).code.as_str()), (Code::ResourceExhausted, "SH0744"));
    assert!(from_status(&status).kind.is_retryable());
    // Another identity is not held up.
    assert!(submit.list_jobs(ListJobsRequest {}).await.is_ok());
    open.clear();
    let freed = async {
        while first.watch_job(watch()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, freed).await.expect("what is closed does not count");

    let mut second = JobServiceClient::new(connect(&server, &read).await.unwrap());
    second.list_jobs(ListJobsRequest {}).await.unwrap();
    let mut third = JobServiceClient::new(connect(&server, &read).await.unwrap());
    let status = third.list_jobs(ListJobsRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    drop(second);
    let freed = async {
        while third.list_jobs(ListJobsRequest {}).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, freed).await.expect("a closed connection does not count");
    server.stop().await;
}

#[tokio::test]
async fn health_may_have_a_door_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { health_listen: Some("127.0.0.1:0".parse().unwrap()), ..closed(folder.path()) };
    let coordinator = shanty_coordinator::Coordinator::bind(options).await.unwrap();
    let handle = coordinator.handle();
    let stop = tokio_util::sync::CancellationToken::new();
    let serving = tokio::spawn(coordinator.serve(stop.clone()));
    let url = format!("http://{}", handle.health_address.unwrap());
    let channel = tonic::transport::Channel::from_shared(url).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let request = tonic_health::pb::HealthCheckRequest::default();
    assert!(health.check(request).await.is_ok());
    let status = JobServiceClient::new(channel).list_jobs(ListJobsRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "health, and nothing else");
    stop.cancel();
    serving.await.unwrap().unwrap();
}
