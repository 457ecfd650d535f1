//! The door before every service.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::Frame;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Status, body::Body};
use tower_layer::Layer;
use tower_service::Service;

use super::{Access, Pass};
use crate::{error::Error, listen::Peer, services::refuse};

/// Puts a [`Guarded`] before a service.
#[derive(Debug, Clone)]
pub(crate) struct Guard {
    pub access: Arc<Access>,
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, access: Arc::clone(&self.access) }
    }
}

/// A service that is reached only by those who may. Nothing of a refused call's body is read.
#[derive(Debug, Clone)]
pub(crate) struct Guarded<S> {
    inner: S,
    access: Arc<Access>,
}

type Answer<E> = Pin<Box<dyn Future<Output = Result<http::Response<Body>, E>> + Send>>;

impl<S> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<Peer>().cloned();
        let pass = match self.access.admit(request.uri().path(), request.headers(), peer.as_ref()) {
            Ok(pass) => pass,
            Err(error) => {
                let address = peer.and_then(|peer| peer.address());
                tracing::debug!(?address, call = request.uri().path(), %error, "refused");
                return Box::pin(std::future::ready(Ok(refuse(error).into_http())));
            }
        };
        request.extensions_mut().insert(pass.caller.clone());
        let answer = self.inner.call(request);
        Box::pin(async move {
            tokio::select! {
                biased;
                () = pass.caller.ended.cancelled() => Ok(refuse(Error::RightsEnded).into_http()),
                answer = answer => answer.map(|answer| answer.map(|body| Body::new(Watched::new(body, pass)))),
            }
        })
    }
}

/// An answer that ends with the rights of whoever gets it.
struct Watched {
    inner: Body,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    is_over: bool,
    _pass: Pass,
}

impl Watched {
    fn new(inner: Body, pass: Pass) -> Self {
        let ended = Box::pin(pass.caller.ended.clone().cancelled_owned());
        Self { inner, ended, is_over: false, _pass: pass }
    }
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if self.ended.as_mut().poll(context).is_ready() {
            self.is_over = true;
            let mut trailers = http::HeaderMap::new();
            let refused = refuse(Error::RightsEnded).add_header(&mut trailers);
            return Poll::Ready(Some(refused.map(|()| Frame::trailers(trailers))));
        }
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.inner.is_end_stream()
    }
}
