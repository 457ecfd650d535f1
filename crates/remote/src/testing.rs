//! A small HTTP server for tests: on a port of its own, answers by a function, keeps what it was asked, and can break off.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// A request, as it arrived.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET`, `HEAD`, …
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Headers, with names in lower case.
    pub headers: HashMap<String, String>,
}

impl Request {
    /// The path, without query.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// A header by its name in lower case; empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// An answer.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Headers; `Content-Length` is added.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// The connection breaks off after so many bytes of the body.
    pub cut_after: Option<usize>,
}

impl Reply {
    /// An answer with a body.
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, body: body.into(), ..Self::default() }
    }

    /// Adds a header.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Breaks off after so many bytes.
    #[must_use]
    pub fn cut(mut self, after: usize) -> Self {
        self.cut_after = Some(after);
        self
    }
}

type Answer = dyn Fn(&Request) -> Reply + Send + Sync;

/// A server; it ends when it is dropped.
pub struct Server {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Request>>>,
    stopped: Arc<AtomicBool>,
}

impl Server {
    /// Starts a server on a free port of this machine.
    ///
    /// # Panics
    /// If there is no free port.
    pub fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a machine that runs tests has a free port");
        let address = listener.local_addr().expect("it is bound");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let stopped = Arc::new(AtomicBool::new(false));
        let (answer, log, stop): (Arc<Answer>, _, _) =
            (Arc::new(answer), Arc::clone(&asked), Arc::clone(&stopped));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let (answer, log) = (Arc::clone(&answer), Arc::clone(&log));
                std::thread::spawn(move || serve(&stream, &*answer, &log));
            }
        });
        Self { address, asked, stopped }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for a connection.
        drop(TcpStream::connect(self.address));
    }
}

/// Serves requests of one connection until it ends.
fn serve(stream: &TcpStream, answer: &Answer, log: &Mutex<Vec<Request>>) {
    let mut input = BufReader::new(stream);
    while let Some(request) = read(&mut input) {
        log.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
        let reply = answer(&request);
        let mut head = format!("HTTP/1.1 {} X\r\n", reply.status);
        let has_length = reply.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        if !has_length {
            head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
        }
        for (name, value) in &reply.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let body: &[u8] = if request.method == "HEAD" { &[] } else { &reply.body };
        let sent = &body[..reply.cut_after.unwrap_or(body.len()).min(body.len())];
        let mut output = stream;
        if output.write_all(head.as_bytes()).and_then(|()| output.write_all(sent)).is_err()
            || sent.len() < body.len()
        {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            return;
        }
    }
}

fn read(input: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    input.read_line(&mut line).ok().filter(|length| *length > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        input.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let length: usize = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    input.take(length as u64).read_to_end(&mut Vec::new()).ok()?;
    Some(Request { method, target, headers })
}

/// Answers a request for a file as servers that know ranges do: 206 for `Range: bytes=A-B`, honouring `If-Match` and `If-Range`.
pub fn serve_file(request: &Request, bytes: &[u8], etag: &str) -> Reply {
    let tag = format!("\"{etag}\"");
    let file = |status, body: &[u8]| {
        Reply::new(status, body)
            .with("ETag", tag.clone())
            .with("Last-Modified", "Tue, 24 Nov 2026 12:00:00 GMT")
            .with("Accept-Ranges", "bytes")
    };
    let wanted = request.header("if-match");
    if !wanted.is_empty() && wanted.trim_matches('"') != etag {
        return Reply::new(412, "");
    }
    let holds = request.header("if-range").is_empty() || request.header("if-range").trim_matches('"') == etag;
    let range = request.header("range").strip_prefix("bytes=").filter(|_| holds);
    let Some((start, end)) = range.and_then(|range| range.split_once('-')) else { return file(200, bytes) };
    let start: usize = start.parse().unwrap_or(0);
    let end = end.parse().map_or(bytes.len(), |last: usize| (last + 1).min(bytes.len()));
    if start >= end {
        return Reply::new(416, "").with("Content-Range", format!("bytes */{}", bytes.len()));
    }
    let range = format!("bytes {start}-{}/{}", end - 1, bytes.len());
    file(206, &bytes[start..end]).with("Content-Range", range)
}

/// Answers as the hub does for one model, whose files (name, bytes) all are small enough to come from the hub itself.
pub fn serve_model(request: &Request, id: &str, commit: &str, files: &[(String, Vec<u8>)]) -> Reply {
    let path = request.path();
    if path.starts_with(&format!("/api/models/{id}/revision/")) {
        let siblings: Vec<serde_json::Value> = files
            .iter()
            .map(|(name, bytes)| {
                serde_json::json!({"rfilename": name, "size": bytes.len(), "blobId": git_hash(bytes)})
            })
            .collect();
        return Reply::new(200, serde_json::json!({"sha": commit, "siblings": siblings}).to_string());
    }
    let name = path.strip_prefix(&format!("/{id}/resolve/{commit}/"));
    match files.iter().find(|(known, _)| Some(known.as_str()) == name) {
        Some((_, bytes)) => serve_file(request, bytes, &git_hash(bytes)).with("X-Repo-Commit", commit),
        None => Reply::new(404, "").with("X-Error-Code", "EntryNotFound"),
    }
}

/// What `git hash-object` says of bytes.
pub fn git_hash(bytes: &[u8]) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(format!("blob {}\0", bytes.len()).as_bytes());
    context.update(bytes);
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
