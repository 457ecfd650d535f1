//! Times calls, and answers the page.

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
    engine::Engine,
    error::{Error, Result},
    hub::Hub,
};

/// Puts a [`Metered`] before a service.
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
        collect::write(&mut page, &views, &self.hub.facts(), now);
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
pub(crate) fn refused(error: &Error) -> Response<Body> {
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

/// A service whose calls are timed, with the page beside it.
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
        if request.uri().path() == PATH {
            let method = request.method().clone();
            return Box::pin(async move { Ok(meter.answer(method).await) });
        }
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
