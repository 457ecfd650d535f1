//! What browsers do: pages and gRPC-web, over HTTP/1.1 as the bare bytes of it, on the port of all other calls.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use shanty_access::{Role, authority::Authority, certificate::Purpose};
use shanty_coordinator::{LONGEST_MESSAGE, access::RIGHTS};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::Code;

use super::{
    Server,
    certificates::{encrypted, issue},
    closed, start,
};

/// A call that was let in may have nothing to say for a while.
const A_WHILE: Duration = Duration::from_millis(200);
/// An empty message: no flags, no bytes.
const EMPTY: [u8; 5] = [0; 5];

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Answer {
    /// The status of a call, from the headers of one that was refused or from the trailers at the end.
    fn code(&self) -> Option<Code> {
        let body = String::from_utf8_lossy(&self.body);
        let in_trailers = body.split_once("grpc-status:").and_then(|(_, rest)| rest.split("\r\n").next());
        let code = self.headers.get("grpc-status").map(String::as_str).or(in_trailers)?;
        Some(Code::from_i32(code.trim().parse().ok()?))
    }
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, head: &str, body: &[u8]) -> Answer {
    stream.write_all(head.as_bytes()).await.unwrap();
    // Whoever refuses a call need not read what comes after its head.
    let _ = stream.write_all(body).await;
    let mut bytes = Vec::new();
    let _ = timeout(A_WHILE, stream.read_to_end(&mut bytes)).await;
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
        // On a machine that is busy, the head may take longer than a while.
        let read = timeout(Duration::from_secs(20), stream.read_buf(&mut bytes)).await.unwrap().unwrap();
        assert!(read > 0, "no answer to {head}");
    }
    let end = bytes.windows(4).position(|end| end == b"\r\n\r\n").unwrap();
    let text = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = text.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
    Answer { status, headers, body: bytes[end + 4..].to_vec() }
}

fn host(server: &Server) -> &str {
    server.url.rsplit('/').next().unwrap()
}

async fn plain(server: &Server, head: &str, body: &[u8]) -> Answer {
    ask(TcpStream::connect(host(server)).await.unwrap(), head, body).await
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
}

fn post(path: &str, token: Option<&str>, length: usize, kind: &str) -> String {
    let token = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-grpc-web: 1\r\n{token}\
         content-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
    )
}

const WEB: &str = "application/grpc-web+proto";

#[tokio::test]
async fn every_call_of_a_browser_passes_the_same_guard() {
    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    let stranger = shanty_access::NewToken::draw().unwrap().secret;
    for (path, least) in RIGHTS {
        for token in [None, Some(stranger.expose())] {
            for kind in [WEB, "application/grpc-web", "application/grpc-web-text"] {
                let answer = plain(&server, &post(path, token, 5, kind), &EMPTY).await;
                assert_eq!(answer.code(), Some(Code::Unauthenticated), "{path} as {kind}");
                assert!(answer.body.is_empty(), "nothing is said beyond the refusal");
            }
        }
        for role in Role::ALL {
            let credentials = keys.of(role);
            let token = credentials.token.as_ref().map(|token| token.expose());
            let code = plain(&server, &post(path, token, 5, WEB), &EMPTY).await.code();
            let is_refused = matches!(code, Some(Code::Unauthenticated | Code::PermissionDenied));
            assert_eq!(is_refused, !role.may(*least), "{path} by {role}: {code:?}");
        }
    }
    // What no row of the table knows, by any name.
    let admin = keys.of(Role::Admin);
    let token = admin.token.as_ref().map(|token| token.expose());
    for path in ["/shanty.v1.JobService/DropAll", "/shanty.v2.JobService/ListJobs", "/", "/icon.svg"] {
        let code = plain(&server, &post(path, token, 5, WEB), &EMPTY).await.code();
        assert_eq!(code, Some(Code::PermissionDenied), "{path}");
    }
    server.stop().await;
}

#[tokio::test]
async fn long_messages_of_browsers_and_calls_of_other_kinds_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (server, keys) = start(folder.path(), closed(folder.path())).await;
    let admin = keys.of(Role::Admin);
    let token = admin.token.as_ref().map(|token| token.expose());
    let long = LONGEST_MESSAGE + 1;
    let mut body = vec![0; 5 + long];
    body[1..5].copy_from_slice(&u32::try_from(long).unwrap().to_be_bytes());
    let submit = "/shanty.v1.JobService/SubmitJob";
    let answer = plain(&server, &post(submit, token, body.len(), WEB), &body).await;
    assert_eq!(answer.code(), Some(Code::OutOfRange), "longer than any message may be");
    // gRPC itself has no form over HTTP/1.1.
    for kind in ["application/grpc", "application/json", "text/plain", "application/x-www-form-urlencoded"] {
        let answer = plain(&server, &post(submit, token, 5, kind), &EMPTY).await;
        assert_eq!(answer.status, 400, "{kind}");
    }
    // Another origin's page asks first whether it may, and is not told that it may.
    let asks = "OPTIONS /shanty.v1.JobService/ListJobs HTTP/1.1\r\nhost: x\r\norigin: https://evil.org\r\n\
                access-control-request-method: POST\r\nconnection: close\r\n\r\n";
    let answer = plain(&server, asks, &[]).await;
    assert!(!answer.headers.keys().any(|name| name.starts_with("access-control-")), "{:?}", answer.headers);
    server.stop().await;
}

fn is_page(answer: &Answer) {
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "text/html; charset=utf-8");
    assert!(answer.headers["content-security-policy"].starts_with("default-src 'none'"));
    assert!(String::from_utf8_lossy(&answer.body).contains("<div id=\"app\">"));
}

#[tokio::test]
async fn pages_are_for_everybody_in_clear_and_encrypted_and_calls_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let (server, _) = start(folder.path(), closed(folder.path())).await;
    is_page(&plain(&server, &get("/jobs/pirate"), &[]).await);
    assert_eq!(plain(&server, &get("/shanty.v1.JobService/ListJobs"), &[]).await.status, 404);
    server.stop().await;

    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::init(&folder.path().join("certs"), "crew", 365).unwrap();
    let head = issue(&authority, "head", Purpose::Coordinator);
    let (server, keys) = start(folder.path(), encrypted(folder.path(), &authority, &head)).await;
    let mut roots = RootCertStore::empty();
    for certificate in shanty_access::certificate::read_pem(&authority.folder().join("ca.pem")).unwrap() {
        roots.add(certificate).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
    let encrypted = async |head: String, body: &[u8]| {
        let stream = TcpStream::connect(host(&server)).await.unwrap();
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let stream = TlsConnector::from(Arc::clone(&config)).connect(name, stream).await.unwrap();
        ask(stream, &head, body).await
    };
    is_page(&encrypted(get("/"), &[]).await);
    let list = "/shanty.v1.JobService/ListJobs";
    assert_eq!(encrypted(post(list, None, 5, WEB), &EMPTY).await.code(), Some(Code::Unauthenticated));
    let reader = keys.of(Role::Read);
    let token = reader.token.as_ref().map(|token| token.expose());
    assert_eq!(encrypted(post(list, token, 5, WEB), &EMPTY).await.code(), Some(Code::Ok));
    server.stop().await;
}
