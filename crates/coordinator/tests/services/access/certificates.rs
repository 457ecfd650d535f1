//! TLS, and certificates in place of tokens.

use std::{path::Path, time::Duration};

use shanty_access::{
    Credentials, Role,
    authority::{Authority, IssuedFiles, Request},
    certificate::Purpose,
};
use shanty_coordinator::{Options, TlsFiles};
use shanty_proto::{
    from_status,
    v1::{job_service_client::JobServiceClient, worker_service_client::WorkerServiceClient, *},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{Server, closed, connect, start};

fn issue(authority: &Authority, name: &str, purpose: Purpose) -> IssuedFiles {
    let hosts = if purpose == Purpose::Coordinator { vec!["127.0.0.1".to_owned()] } else { Vec::new() };
    authority.issue(&Request { name: name.to_owned(), purpose, hosts, days: 30 }).unwrap()
}

fn encrypted(folder: &Path, authority: &Authority, head: &IssuedFiles) -> Options {
    let tls = TlsFiles {
        certificate: head.certificate.clone(),
        key: head.key.clone(),
        client_ca: Some(authority.folder().join("ca.pem")),
        revoked: Some(authority.folder().join("revoked.pem")),
    };
    Options { tls: Some(tls), ..closed(folder) }
}

fn showing(authority: &Authority, files: Option<&IssuedFiles>) -> Credentials {
    Credentials {
        ca: Some(authority.folder().join("ca.pem")),
        certificate: files.map(|files| files.certificate.clone()),
        key: files.map(|files| files.key.clone()),
        ..Credentials::default()
    }
}

async fn list_jobs(server: &Server, credentials: &Credentials) -> Result<(), String> {
    let channel = connect(server, credentials).await?;
    match JobServiceClient::new(channel).list_jobs(ListJobsRequest {}).await {
        Ok(_) => Ok(()),
        Err(status) => Err(from_status(&status).code),
    }
}

#[tokio::test]
async fn certificates_carry_roles_and_browsers_need_none() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::init(&folder.path().join("certs"), "crew", 365).unwrap();
    let head = issue(&authority, "head", Purpose::Coordinator);
    let (server, keys) = start(folder.path(), encrypted(folder.path(), &authority, &head)).await;
    assert!(server.url.starts_with("https://"));

    let of = |name: &str, role: Role| issue(&authority, name, Purpose::Client(role));
    let (ann, node) = (of("ann", Role::Read), of("node-7", Role::Worker));
    assert_eq!(list_jobs(&server, &showing(&authority, Some(&ann))).await, Ok(()));
    assert_eq!(list_jobs(&server, &showing(&authority, Some(&node))).await, Err("SH0741".to_owned()));
    // Without a certificate the connection is made, and a token is asked for.
    assert_eq!(list_jobs(&server, &showing(&authority, None)).await, Err("SH0740".to_owned()));
    let token = Credentials { token: keys.of(Role::Read).token, ..showing(&authority, None) };
    assert_eq!(list_jobs(&server, &token).await, Ok(()));
    // The coordinator's own certificate is for showing to clients, not to coordinators.
    assert!(list_jobs(&server, &showing(&authority, Some(&head))).await.is_err());

    // Another authority's certificates open nothing, and its coordinators are not trusted.
    let other = Authority::init(&folder.path().join("other"), "others", 365).unwrap();
    let pirate = issue(&other, "pirate", Purpose::Client(Role::Admin));
    let forged =
        Credentials { ca: Some(authority.folder().join("ca.pem")), ..showing(&other, Some(&pirate)) };
    assert!(list_jobs(&server, &forged).await.is_err_and(|why| why != "SH0741"));
    assert!(connect(&server, &showing(&other, None)).await.is_err(), "an unknown authority");
    // No words in clear on that port.
    let plain = tonic::transport::Channel::from_shared(server.url.replace("https", "http")).unwrap();
    if let Ok(channel) = plain.connect().await {
        assert!(JobServiceClient::new(channel).list_jobs(ListJobsRequest {}).await.is_err());
    }
    server.stop().await;
}

#[tokio::test]
async fn a_revoked_certificate_ends_what_runs_on_it_and_no_restart_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::init(&folder.path().join("certs"), "crew", 365).unwrap();
    let head = issue(&authority, "head", Purpose::Coordinator);
    let (server, _) = start(folder.path(), encrypted(folder.path(), &authority, &head)).await;
    let node = issue(&authority, "node-7", Purpose::Client(Role::Worker));
    let credentials = showing(&authority, Some(&node));
    let mut client = WorkerServiceClient::new(connect(&server, &credentials).await.unwrap());
    let (say, messages) = mpsc::channel(8);
    let mut hear = client.session(ReceiverStream::new(messages)).await.unwrap().into_inner();
    let hello = Hello { worker_id: "node-7".to_owned(), ..Hello::default() };
    say.send(WorkerMessage { message: Some(worker_message::Message::Hello(hello)) }).await.unwrap();
    assert!(hear.message().await.unwrap().is_some(), "it is welcome");

    authority.revoke("node-7").unwrap();
    let end = async { while let Ok(Some(_)) = hear.message().await {} };
    tokio::time::timeout(Duration::from_secs(10), end).await.expect("the session ends");
    assert!(list_jobs(&server, &credentials).await.is_err_and(|why| why != "SH0741"), "the door stays shut");
    // A new certificate of the same name is as good as any.
    let again = issue(&authority, "node-7", Purpose::Client(Role::Worker));
    assert_eq!(list_jobs(&server, &showing(&authority, Some(&again))).await, Err("SH0741".to_owned()));
    server.stop().await;
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::init(&folder.path().join("certs"), "crew", 365).unwrap();
    let head = issue(&authority, "head", Purpose::Coordinator);
    let (server, _) = start(folder.path(), encrypted(folder.path(), &authority, &head)).await;
    let trusting = showing(&authority, None);
    assert_eq!(list_jobs(&server, &trusting).await, Err("SH0740".to_owned()));
    // The same files with the certificate of an authority that nobody here trusts.
    let other = Authority::init(&folder.path().join("other"), "others", 365).unwrap();
    let strange = issue(&other, "head", Purpose::Coordinator);
    std::fs::copy(&strange.key, &head.key).unwrap();
    std::fs::copy(&strange.certificate, &head.certificate).unwrap();
    for _ in 0..200 {
        if connect(&server, &trusting).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(connect(&server, &trusting).await.is_err(), "the new certificate is shown");
    assert!(connect(&server, &showing(&other, None)).await.is_ok());
    server.stop().await;
}

#[tokio::test]
async fn keys_that_others_can_read_and_files_that_are_no_certificates_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::init(&folder.path().join("certs"), "crew", 365).unwrap();
    let head = issue(&authority, "head", Purpose::Coordinator);
    let code = async |options: Options| {
        let refused = shanty_coordinator::Coordinator::bind(options).await.err().expect("it is refused");
        shanty_diagnostic::Diagnose::diagnostic(&refused).code
    };
    shanty_access::files::set_mode(&head.key, 0o644).unwrap();
    assert_eq!(code(encrypted(folder.path(), &authority, &head)).await, "SH0746");
    shanty_access::files::set_mode(&head.key, 0o600).unwrap();
    std::fs::write(authority.folder().join("revoked.pem"), "nonsense").unwrap();
    assert_eq!(code(encrypted(folder.path(), &authority, &head)).await, "SH0933");
}
