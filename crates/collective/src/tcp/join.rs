//! Finding the neighbours of a generation: connect to the next rank, accept the rank before.

use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{debug, warn};

use super::{
    JoinOptions,
    handshake::{ANSWER_BYTES, Answer, HELLO_BYTES, Hello, Nonce, PROOF_BYTES, Side, WELCOME, nonce, proof},
    ring::{Link, wait_readable},
    seal::{LinkKey, Secret},
};
use crate::{AbortHandle, Error, Result};

/// A stranger must prove itself within this time.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Strangers at the door at a time; the oldest goes when another comes.
const STRANGERS: usize = 256;

/// How often joining looks at the abort and the connecting thread when no socket moves.
const TICK: Duration = Duration::from_millis(5);

/// How long one attempt to reach the next rank may take before it is made anew.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Finds both neighbours: the link to the next rank, and that from the rank before.
pub(super) fn find_neighbours(
    listener: &TcpListener,
    options: &JoinOptions,
    abort: &AbortHandle,
) -> Result<(Link, Link)> {
    let start = Instant::now();
    let connecting = Connecting::start(options.clone());
    let mut door = Door { options, strangers: Vec::new(), refused: None };
    let (mut next, mut previous): (Option<Link>, Option<Link>) = (None, None);
    loop {
        abort.check()?;
        next = next.or_else(|| connecting.found.try_recv().ok());
        // A newer connection of the same rank takes the place of the older: it was given up there.
        previous = door.look(listener).or(previous);
        match (next, previous) {
            (Some(next), Some(previous)) => return Ok((next, previous)),
            (one, other) => (next, previous) = (one, other),
        }
        if start.elapsed() >= options.deadline {
            let reason = missing(options, next.is_some(), previous.is_some(), &connecting, &door);
            return Err(Error::Join {
                rank: options.rank,
                generation: options.generation,
                waited: options.deadline,
                reason,
            });
        }
        let mut sockets: Vec<&dyn AsFd> = vec![listener];
        sockets.extend(door.strangers.iter().map(|stranger| &stranger.stream as &dyn AsFd));
        wait_readable(&sockets, TICK);
    }
}

fn missing(
    options: &JoinOptions,
    has_next: bool,
    has_previous: bool,
    connecting: &Connecting,
    door: &Door<'_>,
) -> String {
    let mut reasons = Vec::new();
    if !has_next {
        let last = connecting.last_failure.lock().unwrap_or_else(PoisonError::into_inner);
        reasons.push(format!("cannot reach {}: {last}", options.peer(options.next())));
    }
    if !has_previous {
        let refused = match &door.refused {
            Some(reason) => format!(" (last turned away: {reason})"),
            None => String::new(),
        };
        reasons.push(format!("{} did not connect{refused}", options.peer(options.previous())));
    }
    reasons.join("; ")
}

/// Where connections come in. Nobody there can hold up the others.
struct Door<'a> {
    options: &'a JoinOptions,
    strangers: Vec<Stranger>,
    refused: Option<String>,
}

/// A connection that has not proved anything yet.
struct Stranger {
    stream: TcpStream,
    address: String,
    since: Instant,
    bytes: Vec<u8>,
    /// What it was asked, once it said hello.
    asked: Option<Asked>,
}

struct Asked {
    hello: [u8; HELLO_BYTES],
    /// Our nonce.
    nonce: Nonce,
    /// Our half of the link's secret, if it is to be encrypted.
    secret: Option<Secret>,
}

/// What became of looking at a stranger.
enum Look {
    Waiting,
    Away(String),
    Welcome(Option<LinkKey>),
}

impl Door<'_> {
    /// Lets in the rank before, if it is there. Returns it once it has proved itself.
    fn look(&mut self, listener: &TcpListener) -> Option<Link> {
        self.open(listener);
        let mut welcome = None;
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.look(self.options) {
                Look::Waiting => self.strangers.push(stranger),
                Look::Welcome(key) => welcome = Some(Link { stream: stranger.stream, key }),
                Look::Away(reason) => {
                    debug!(from = stranger.address, reason, "turned away a collective connection");
                    self.refused = Some(format!("{}: {reason}", stranger.address));
                }
            }
        }
        welcome
    }

    fn open(&mut self, listener: &TcpListener) {
        loop {
            let (stream, address) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors, or the connection was gone again. The next look may go better.
                    debug!(%error, "failed to accept a collective connection");
                    return;
                }
            };
            if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
                continue;
            }
            if self.strangers.len() == STRANGERS {
                self.strangers.remove(0);
            }
            let (address, since) = (address.to_string(), Instant::now());
            self.strangers.push(Stranger { stream, address, since, bytes: Vec::new(), asked: None });
        }
    }
}

impl Stranger {
    fn look(&mut self, options: &JoinOptions) -> Look {
        loop {
            let due = if self.asked.is_none() { HELLO_BYTES } else { PROOF_BYTES };
            let mut buffer = [0; HELLO_BYTES];
            match self.stream.read(&mut buffer[..due - self.bytes.len()]) {
                Ok(0) => return Look::Away("it closed the connection".to_owned()),
                Ok(read) => self.bytes.extend_from_slice(&buffer[..read]),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if self.since.elapsed() < PATIENCE {
                        return Look::Waiting;
                    }
                    return Look::Away("it did not identify itself in time".to_owned());
                }
                Err(error) => return Look::Away(error.to_string()),
            }
            if self.bytes.len() < due {
                continue;
            }
            let outcome = match self.asked.take() {
                None => self.hear_hello(options).map(|()| None),
                Some(asked) => self.hear_proof(options, asked).map(Some),
            };
            self.bytes.clear();
            match outcome {
                Ok(Some(key)) => return Look::Welcome(key),
                Ok(None) => {}
                Err(reason) => return Look::Away(reason),
            }
        }
    }

    fn hear_hello(&mut self, options: &JoinOptions) -> Result<(), String> {
        let mut bytes = [0; HELLO_BYTES];
        bytes.copy_from_slice(&self.bytes);
        let Some(hello) = Hello::decode(&bytes) else {
            return Err("it does not speak this protocol".to_owned());
        };
        let expected =
            Hello { nonce: hello.nonce, ..options.hello(options.previous(), options.rank, hello.nonce) };
        if hello != expected {
            // It may be ahead of us or behind; it tries again until it is where we are.
            let _ = self.stream.write(&Answer::Refusal { generation: options.generation }.encode());
            if (Hello { manner: hello.manner, ..expected }) == hello {
                return Err("it encrypts or compresses otherwise than this rank".to_owned());
            }
            return Err(format!(
                "it is rank {} of {} in generation {} and wants rank {}; this is rank {} of {} in generation {}",
                hello.from,
                hello.world_size,
                hello.generation,
                hello.to,
                options.rank,
                options.members.len(),
                options.generation
            ));
        }
        let (nonce, secret) = nonce_of_link(options)?;
        let proof = proof(&options.token, Side::Accepting, &options.job, &bytes, &nonce);
        self.say(&Answer::Proof { nonce, proof }.encode())?;
        self.asked = Some(Asked { hello: bytes, nonce, secret });
        Ok(())
    }

    fn hear_proof(&mut self, options: &JoinOptions, asked: Asked) -> Result<Option<LinkKey>, String> {
        let Asked { hello, nonce, secret } = asked;
        let mut bytes = [0; PROOF_BYTES];
        bytes.copy_from_slice(&self.bytes);
        if blake3::Hash::from_bytes(bytes)
            != proof(&options.token, Side::Connecting, &options.job, &hello, &nonce)
        {
            warn!(from = self.address, "turned away a collective connection without the generation's token");
            return Err("it does not hold the generation's token".to_owned());
        }
        let key = match (secret, Hello::decode(&hello)) {
            (Some(secret), Some(said)) => Some(secret.key(&said.nonce, &options.token, &hello, &nonce)?),
            _ => None,
        };
        self.say(&[WELCOME])?;
        Ok(key)
    }

    /// The few bytes of an answer always fit into a fresh connection's buffer; one that takes them not is
    /// not worth waiting for.
    fn say(&mut self, bytes: &[u8]) -> Result<(), String> {
        match self.stream.write(bytes) {
            Ok(written) if written == bytes.len() => Ok(()),
            Ok(_) => Err("it does not listen".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// The thread that connects to the next rank, as resolving and connecting block. It is not waited for: it
/// ends soon after this is dropped.
struct Connecting {
    found: mpsc::Receiver<Link>,
    last_failure: Arc<Mutex<String>>,
    stop: Arc<AtomicBool>,
}

impl Connecting {
    fn start(options: JoinOptions) -> Self {
        let (sender, found) = mpsc::channel();
        let last_failure = Arc::new(Mutex::new("no answer yet".to_owned()));
        let stop = Arc::new(AtomicBool::new(false));
        let attempts = Attempts { options, end: None, stop: Arc::clone(&stop) };
        let failure = Arc::clone(&last_failure);
        let work = move || {
            if let Some(stream) = attempts.until_found(&failure) {
                // Nobody takes it when joining ended meanwhile.
                let _ = sender.send(stream);
            }
        };
        if let Err(error) = thread::Builder::new().name("collective-join".to_owned()).spawn(work) {
            *last_failure.lock().unwrap_or_else(PoisonError::into_inner) =
                format!("no thread to connect with: {error}");
        }
        Self { found, last_failure, stop }
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Attempts {
    options: JoinOptions,
    end: Option<Instant>,
    stop: Arc<AtomicBool>,
}

impl Attempts {
    fn until_found(mut self, last_failure: &Mutex<String>) -> Option<Link> {
        self.end = Instant::now().checked_add(self.options.deadline);
        let mut pause = Duration::from_millis(5);
        while !self.is_over() {
            match self.attempt() {
                Ok(link) => return Some(link),
                Err(reason) => {
                    debug!(
                        peer = self.options.peer(self.options.next()),
                        reason, "collective connection failed"
                    );
                    *last_failure.lock().unwrap_or_else(PoisonError::into_inner) = reason;
                }
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
        }
        None
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.end.is_some_and(|end| Instant::now() >= end)
    }

    fn attempt(&self) -> Result<Link, String> {
        let options = &self.options;
        let address = options.members[options.next() as usize].as_str();
        let resolved = address.to_socket_addrs().map_err(|error| format!("`{address}`: {error}"))?;
        let mut failure = format!("`{address}` has no address");
        let mut connected = None;
        for address in resolved {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(stream) => {
                    connected = Some(stream);
                    break;
                }
                Err(error) => failure = error.to_string(),
            }
        }
        let mut stream = connected.ok_or(failure)?;
        // A port that nobody listens on can be given to the connection itself ("simultaneous open").
        let ends = (stream.local_addr(), stream.peer_addr());
        if matches!(ends, (Ok(here), Ok(there)) if here == there) {
            return Err("connection refused".to_owned());
        }
        let error = |error: std::io::Error| error.to_string();
        stream.set_nodelay(true).map_err(error)?;
        stream.set_read_timeout(Some(Duration::from_millis(50))).map_err(error)?;

        let (ours, secret) = nonce_of_link(options)?;
        let hello = options.hello(options.rank, options.next(), ours).encode();
        stream.write_all(&hello).map_err(error)?;
        let mut answer = [0; ANSWER_BYTES];
        self.read(&mut stream, &mut answer)?;
        let (their_nonce, their_proof) = match Answer::decode(&answer) {
            Some(Answer::Proof { nonce, proof }) => (nonce, proof),
            Some(Answer::Refusal { generation }) => {
                return Err(format!(
                    "it turned us away: it is at generation {generation}, or in another place"
                ));
            }
            None => return Err("it does not speak this protocol".to_owned()),
        };
        let (token, job) = (&options.token, options.job.as_str());
        if their_proof != proof(token, Side::Accepting, job, &hello, &their_nonce) {
            return Err("it does not hold the generation's token".to_owned());
        }
        let our_proof = proof(token, Side::Connecting, job, &hello, &their_nonce);
        stream.write_all(our_proof.as_bytes()).map_err(error)?;
        let mut welcome = [0];
        self.read(&mut stream, &mut welcome)?;
        if welcome[0] != WELCOME {
            return Err("it did not accept our proof".to_owned());
        }
        let key = match secret {
            Some(secret) => Some(secret.key(&their_nonce, token, &hello, &their_nonce)?),
            None => None,
        };
        Ok(Link { stream, key })
    }

    /// Reads all of `buffer`. The peer may be busy and answer when it joins too: no limit but the end.
    fn read(&self, stream: &mut TcpStream, mut buffer: &mut [u8]) -> Result<(), String> {
        while !buffer.is_empty() {
            match stream.read(buffer) {
                Ok(0) => return Err("it closed the connection".to_owned()),
                Ok(read) => buffer = &mut buffer[read..],
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock | ErrorKind::TimedOut if !self.is_over() => {}
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => return Err("it did not answer".to_owned()),
                    _ => return Err(error.to_string()),
                },
            }
        }
        Ok(())
    }
}

/// A nonce for a handshake; on a link that is to be encrypted, half of its secret.
fn nonce_of_link(options: &JoinOptions) -> Result<(Nonce, Option<Secret>), String> {
    if !options.encrypted {
        return Ok((nonce(), None));
    }
    let secret = Secret::new()?;
    Ok((secret.public, Some(secret)))
}

impl JoinOptions {
    /// How bytes travel, which both ends of a link must agree on.
    fn manner(&self) -> u32 {
        u32::from(self.encrypted) | self.compression.number() << 8
    }

    pub(super) fn next(&self) -> u32 {
        (self.rank + 1) % self.members.len() as u32
    }

    pub(super) fn previous(&self) -> u32 {
        (self.rank + self.members.len() as u32 - 1) % self.members.len() as u32
    }

    pub(super) fn peer(&self, rank: u32) -> String {
        format!("rank {rank} ({})", self.members[rank as usize])
    }

    fn hello(&self, from: u32, to: u32, nonce: Nonce) -> Hello {
        let world_size = self.members.len() as u32;
        Hello { generation: self.generation, from, to, world_size, manner: self.manner(), nonce }
    }
}
