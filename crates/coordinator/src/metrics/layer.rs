//! Two layers: one answers the page, one times calls.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{SystemTime, UNIX_EPOCH},
};

use http::{HeaderValue, Method, Response, StatusCode, header};
use tokio::time::Instant;
use tonic::body::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::{PATH, collect, text::Page};
use crate::{
    access::Access,
    engine::Engine,
    error::{Error, Result},
    hub::Hub,
    listen::Peer,
};

/// Puts a [`Metered`] before a service, and knows the page.
#[derive(Clone)]
pub(crate) struct Meter {
    pub engine: Engine,
    pub hub: Arc<Hub>,
}

impl Meter {
    async fn page(self) -> Result<String> {
        let views = self.engine.look(|machine, now| machine.views(now)).await?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let mut page = Page::default();
        collect::write(&mut page, &views, &self.hub.facts.all(), now);
        let told = |job: &shanty_proto::JobId| {
            views.iter().any(|view| view.id == *job && collect::is_told(view, now))
        };
        self.hub.recorder.write(&mut page, told);
        Ok(page.render())
    }

    async fn answer(self, method: Method) -> Response<Body> {
        if method != Method::GET && method != Method::HEAD {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "this page is read with GET\n".to_owned());
        }
        match self.page().await {
            Ok(page) => plain(StatusCode::OK, page),
            Err(error) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
        }
    }
}

/// The page for whoever may not see it.
fn refused(error: &Error) -> Response<Body> {
    let status = match error {
        Error::Unauthenticated { .. } => StatusCode::UNAUTHORIZED,
        Error::NotAllowed { .. } => StatusCode::FORBIDDEN,
        _ => StatusCode::TOO_MANY_REQUESTS,
    };
    let mut answer = plain(status, format!("{error}\n"));
    if status == StatusCode::UNAUTHORIZED {
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    answer
}

fn plain(status: StatusCode, text: String) -> Response<Body> {
    let mut answer = Response::new(Body::new(text));
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, kind);
    answer
}

impl<S> Layer<S> for Meter {
    type Service = Metered<S>;

    fn layer(&self, inner: S) -> Metered<S> {
        Metered { inner, meter: self.clone() }
    }
}

/// A service whose calls are timed.
#[derive(Clone)]
pub(crate) struct Metered<S> {
    inner: S,
    meter: Meter,
}

type Answer<E> = Pin<Box<dyn Future<Output = std::result::Result<Response<Body>, E>> + Send>>;

impl<S> Service<http::Request<Body>> for Metered<S>
where
    S: Service<http::Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<std::result::Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let meter = self.meter.clone();
        // A call that nobody declared is counted under one name: whoever asks must not make up series.
        let call = crate::access::known_call(request.uri().path()).unwrap_or("other");
        let (began, answer) = (Instant::now(), self.inner.call(request));
        Box::pin(async move {
            let answer = answer.await;
            let is_good = answer.as_ref().is_ok_and(|answer| {
                let code = answer.headers().get("grpc-status");
                answer.status().is_success() && code.is_none_or(|code| code == "0")
            });
            meter.hub.recorder.call(call, is_good, began.elapsed());
            answer
        })
    }
}

/// Puts a [`WithPage`] before a service.
#[derive(Clone)]
pub(crate) struct Scraped {
    pub access: Arc<Access>,
    pub meter: Meter,
}

impl<S> Layer<S> for Scraped {
    type Service = WithPage<S>;

    fn layer(&self, inner: S) -> WithPage<S> {
        WithPage { inner, scraped: self.clone() }
    }
}

/// A service, and the page beside it.
#[derive(Clone)]
pub(crate) struct WithPage<S> {
    inner: S,
    scraped: Scraped,
}

impl<S> Service<http::Request<Body>> for WithPage<S>
where
    S: Service<http::Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<std::result::Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != PATH {
            return Box::pin(self.inner.call(request));
        }
        let peer = request.extensions().get::<Peer>().cloned();
        let admitted = self.scraped.access.admit(PATH, request.headers(), peer.as_ref());
        let (meter, method) = (self.scraped.meter.clone(), request.method().clone());
        Box::pin(async move {
            match admitted {
                // It counts as one of the caller's calls until it is answered.
                Ok(_pass) => Ok(meter.answer(method).await),
                Err(error) => Ok(refused(&error)),
            }
        })
    }
}
