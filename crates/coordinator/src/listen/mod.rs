//! Connections as they come in: counted, encrypted where TLS is on, and dropped if they do not say who they are.

mod connection;
mod tls;

use std::{io, sync::Arc, time::Duration};

use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

pub use self::tls::TlsFiles;
pub(crate) use self::{
    connection::{Connection, Peer, Stream},
    tls::Tls,
};
use crate::access::Limits;

/// Connections that wait for the server.
const QUEUE: usize = 256;
/// A pause after the system refused a connection, for lack of descriptors perhaps.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections until `stop`. TLS and every connection's first words are waited for beside each other.
pub(crate) fn accept(
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    limits: &Limits,
    stop: CancellationToken,
) -> ReceiverStream<io::Result<Connection<Stream>>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let slots = Arc::new(Semaphore::new(limits.connections));
    let unidentified = Arc::new(Semaphore::new(limits.unidentified));
    let limits = limits.clone();
    tokio::spawn(async move {
        let mut dropped = 0u64;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => return,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let permits = Arc::clone(&slots)
                .try_acquire_owned()
                .ok()
                .zip(Arc::clone(&unidentified).try_acquire_owned().ok());
            let Some(permits) = permits else {
                dropped += 1;
                if dropped.is_power_of_two() {
                    tracing::warn!(%address, dropped, "too many connections; a new one is dropped");
                }
                continue;
            };
            // Small messages, each waited for.
            let _ = stream.set_nodelay(true);
            let (sender, tls, limits) = (sender.clone(), tls.clone(), limits.clone());
            tokio::spawn(async move {
                let (stream, certificate) = match &tls {
                    None => (Stream::Plain(stream), None),
                    Some(tls) => match timeout(limits.handshake_within, tls.handshake(stream)).await {
                        Ok(Ok((stream, certificate))) => (Stream::Tls(Box::new(stream)), certificate),
                        Ok(Err(error)) => {
                            tracing::debug!(%address, %error, "no TLS was agreed on");
                            return;
                        }
                        Err(_) => {
                            tracing::debug!(%address, "no TLS was agreed on in time");
                            return;
                        }
                    },
                };
                let peer = Peer::new(Some(address), certificate, permits);
                if let Some(tls) = &tls {
                    tls.remember(&peer);
                }
                // When nobody takes it, the coordinator is stopping.
                let _ = sender.send(Ok(Connection::new(stream, peer, limits.identify_within))).await;
            });
        }
    });
    ReceiverStream::new(receiver)
}
