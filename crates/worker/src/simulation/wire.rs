//! tonic over turmoil's sockets.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, stream};
use hyper_util::rt::TokioIo;
use shanty_access::{Channel, Credentials};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Endpoint, Uri, server::Connected};
use turmoil::net::{TcpListener, TcpStream};

/// The coordinator's host and port.
pub(super) const HARBOUR: &str = "harbour";
pub(super) const PORT: u16 = 7070;

/// A connection to the coordinator that is made when it is needed, with a worker's settings and no
/// token.
pub(super) fn channel() -> Channel {
    let connector = tower::service_fn(|_: Uri| async {
        Ok::<_, io::Error>(TokioIo::new(TcpStream::connect((HARBOUR, PORT)).await?))
    });
    let address = url::Url::parse("http://harbour:7070").expect("a URL");
    let endpoint = Endpoint::from_static("http://harbour:7070")
        .connect_timeout(Duration::from_secs(2))
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true);
    let (endpoint, bearer) =
        Credentials::default().prepare(&address, endpoint).expect("without credentials nothing is read");
    Channel::new(endpoint.connect_with_connector_lazy(connector), bearer)
}

/// Connections as they come.
pub(super) async fn incoming() -> io::Result<impl Stream<Item = io::Result<Accepted>>> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    Ok(stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(stream, _)| Accepted(stream));
        Some((accepted, listener))
    }))
}

/// A connection that the coordinator accepted.
pub(super) struct Accepted(TcpStream);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
