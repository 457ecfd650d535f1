//! A connection, and what is known of the other side.

use std::{
    future::Future,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use shanty_access::{Role, certificate::Serial};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::Sleep,
};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use crate::{
    access::{Claim, Counts},
    error::Result,
};

/// Whom a verified certificate is of.
#[derive(Debug, Clone)]
pub(crate) struct ClientCertificate {
    pub name: Arc<str>,
    pub role: Role,
    pub serial: Serial,
    /// Seconds since the Unix epoch.
    pub not_after: i64,
}

/// The other side of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Peer(Arc<State>);

#[derive(Debug)]
pub(crate) struct State {
    address: Option<SocketAddr>,
    certificate: Option<ClientCertificate>,
    /// Whether it has said who it is.
    known: AtomicBool,
    /// Ends the connection.
    cut: CancellationToken,
    /// A connection may show several tokens; it counts as one of each.
    claims: Mutex<Vec<Claim>>,
    unidentified: Mutex<Option<OwnedSemaphorePermit>>,
    _slot: OwnedSemaphorePermit,
}

impl Peer {
    /// `permits` are the connection's slot, and its place among those that have not said who they are.
    pub fn new(
        address: Option<SocketAddr>,
        certificate: Option<ClientCertificate>,
        permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
    ) -> Self {
        let (slot, unidentified) = permits;
        Self(Arc::new(State {
            address,
            certificate,
            known: AtomicBool::new(false),
            cut: CancellationToken::new(),
            claims: Mutex::default(),
            unidentified: Mutex::new(Some(unidentified)),
            _slot: slot,
        }))
    }

    pub fn address(&self) -> Option<SocketAddr> {
        self.0.address
    }

    pub fn certificate(&self) -> Option<&ClientCertificate> {
        self.0.certificate.as_ref()
    }

    /// Cancelled when the connection ends because its certificate is no longer good; cancelling it ends the connection.
    pub fn cut(&self) -> CancellationToken {
        self.0.cut.clone()
    }

    pub fn downgrade(&self) -> Weak<State> {
        Arc::downgrade(&self.0)
    }

    pub fn upgrade(weak: &Weak<State>) -> Option<Self> {
        weak.upgrade().map(Self)
    }

    /// The other side has shown who it is.
    pub fn identified(&self, identity: &Arc<str>, connections: &Counts) -> Result<()> {
        let mut claims = self.0.claims.lock().unwrap_or_else(PoisonError::into_inner);
        if !claims.iter().any(|claim| claim.identity() == identity) {
            claims.push(connections.claim(identity)?);
        }
        drop(claims);
        if !self.0.known.swap(true, Ordering::Relaxed) {
            self.0.unidentified.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
        Ok(())
    }

    fn is_known(&self) -> bool {
        self.0.known.load(Ordering::Relaxed)
    }
}

/// Bytes, in clear or not.
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection that ends when its peer is cut, or does not say in time who it is.
pub(crate) struct Connection<IO> {
    io: IO,
    peer: Peer,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<IO> Connection<IO> {
    pub fn new(io: IO, peer: Peer, identify_within: Duration) -> Self {
        let cut = Box::pin(peer.cut().cancelled_owned());
        Self { io, peer, cut, deadline: Some(Box::pin(tokio::time::sleep(identify_within))) }
    }

    /// Whether it may go on.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if self.cut.as_mut().poll(context).is_ready() {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "its certificate is expired or revoked",
            ));
        }
        let Some(deadline) = &mut self.deadline else { return Ok(()) };
        if self.peer.is_known() {
            self.deadline = None;
        } else if deadline.as_mut().poll(context).is_ready() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it did not say in time who it is"));
        }
        Ok(())
    }
}

impl<IO> Connected for Connection<IO> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Connection<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Err(error) = self.check(context) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Connection<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(context),
            Self::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(context, parts),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
