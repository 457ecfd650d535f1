//! The dashboard: the built pages of `web/dist`, embedded, and the headers that keep them to themselves.
//!
//! Pages hold nothing that is anybody's: they are given to whoever asks, and what they show they fetch by calls that pass the
//! guard. So they stand before it, and take what is a GET; a call never is.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use rust_embed::{EmbeddedFile, RustEmbed};
use tonic::body::Body;
use tower_layer::Layer;
use tower_service::Service;

/// What browsers are given. Built by `npm run build` in `web/`, committed, and proved fresh by continuous integration.
#[derive(RustEmbed)]
#[folder = "../../web/dist"]
struct Files;

/// The page that answers every address of the dashboard.
const INDEX: &str = "index.html";

/// Nothing but what this origin serves: no inline script, no other host, no frame around it. The charts set sizes as inline
/// style through the object model, which no policy forbids.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// Puts [`WithPages`] before a service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pages;

impl<S> Layer<S> for Pages {
    type Service = WithPages<S>;

    fn layer(&self, inner: S) -> WithPages<S> {
        WithPages { inner }
    }
}

/// A service of calls, and pages beside it.
#[derive(Debug, Clone)]
pub(crate) struct WithPages<S> {
    inner: S,
}

/// An answer of either.
pub(crate) enum Answer<F> {
    Page(Ready<Response<Body>>),
    Call(Pin<Box<F>>),
}

impl<F, E> Future for Answer<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = Result<Response<Body>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Page(page) => Pin::new(page).poll(context).map(Ok),
            Self::Call(call) => call.as_mut().poll(context),
        }
    }
}

impl<S> Service<Request<Body>> for WithPages<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if is_of_a_page(&request) {
            return Answer::Page(ready(answer(request.method(), request.uri().path(), request.headers())));
        }
        Answer::Call(Box::pin(self.inner.call(request)))
    }
}

/// Whether a request is for a page: calls are POSTs, whoever makes them.
fn is_of_a_page<B>(request: &Request<B>) -> bool {
    matches!(*request.method(), Method::GET | Method::HEAD)
}

/// A file of the dashboard, or its page for an address within it.
fn answer(method: &Method, path: &str, headers: &HeaderMap) -> Response<Body> {
    let path = path.trim_start_matches('/');
    // Names of assets carry a hash of what is in them.
    let found = match Files::get(path) {
        Some(file) if path.starts_with("assets/") => {
            Some((path, file, "public, max-age=31536000, immutable"))
        }
        Some(file) => Some((path, file, "no-cache")),
        None if is_page(path) => Files::get(INDEX).map(|file| (INDEX, file, "no-cache")),
        None => None,
    };
    match found {
        Some((name, file, caching)) => serve(name, file, caching, *method == Method::HEAD, headers),
        None => plain(StatusCode::NOT_FOUND),
    }
}

/// Whether an address is one that the dashboard shows: not a file, not a method of a service.
fn is_page(path: &str) -> bool {
    let first = path.split('/').next().unwrap_or_default();
    matches!(first, "" | "jobs" | "queue" | "compare")
}

fn serve(
    name: &str,
    file: EmbeddedFile,
    caching: &'static str,
    head: bool,
    asked: &HeaderMap,
) -> Response<Body> {
    let tag = format!("\"{}\"", blake3::Hash::from_bytes(file.metadata.sha256_hash()).to_hex());
    if asked.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        let mut response = plain(StatusCode::NOT_MODIFIED);
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));
        return response;
    }
    let length = file.data.len();
    let body = if head { Body::empty() } else { full(file.data.into_owned()) };
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type(name)));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, tag);
    }
    guard(headers);
    response
}

/// A body of one piece.
fn full(bytes: Vec<u8>) -> Body {
    struct Whole(Option<Bytes>);

    impl http_body::Body for Whole {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<http_body::Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.take().map(|bytes| Ok(http_body::Frame::data(bytes))))
        }

        fn is_end_stream(&self) -> bool {
            self.0.is_none()
        }
    }

    Body::new(Whole(Some(bytes.into())))
}

fn plain(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    guard(response.headers_mut());
    response
}

fn guard(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
}

/// The few kinds of files that the build makes.
fn content_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(path: &str) -> Response<Body> {
        answer(&Method::GET, path, &HeaderMap::new())
    }

    async fn body(response: Response<Body>) -> String {
        let mut body = response.into_body();
        let mut text = String::new();
        while let Some(frame) =
            std::future::poll_fn(|context| http_body::Body::poll_frame(Pin::new(&mut body), context)).await
        {
            let data = frame.expect("no error").into_data().expect("no trailers");
            text += std::str::from_utf8(&data).expect("text");
        }
        text
    }

    #[tokio::test]
    async fn every_address_of_the_dashboard_is_the_same_page() {
        let page = body(get("/")).await;
        assert!(page.contains("<div id=\"app\">"), "{page}");
        for path in ["/jobs/pirate-1", "/queue", "/compare?job=a&job=b"] {
            let response = get(path.split('?').next().unwrap_or_default());
            assert_eq!(response.status(), StatusCode::OK, "{path}");
            assert_eq!(body(response).await, page, "{path}");
        }
    }

    #[tokio::test]
    async fn what_the_page_names_is_there_and_nothing_is_fetched_from_elsewhere() {
        let page = body(get("/")).await;
        let names: Vec<&str> =
            page.split('"').filter(|part| part.starts_with('/') && part.contains('.')).collect();
        assert!(names.len() >= 3, "a script, a style sheet and an icon: {names:?}");
        for name in names {
            let response = get(name);
            assert_eq!(response.status(), StatusCode::OK, "{name}");
            assert_ne!(response.headers()[header::CONTENT_TYPE], "application/octet-stream", "{name}");
        }
        assert!(!page.contains("http://") && !page.contains("https://"), "{page}");
    }

    #[tokio::test]
    async fn what_a_browser_has_already_is_not_sent_again() {
        let first = get("/");
        let tag = first.headers()[header::ETAG].clone();
        let headers = HeaderMap::from_iter([(header::IF_NONE_MATCH, tag)]);
        let again = answer(&Method::GET, "/", &headers);
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
        assert_eq!(body(again).await, "");
        assert_eq!(body(answer(&Method::HEAD, "/", &HeaderMap::new())).await, "");
        let asset = Files::iter().find(|name| name.starts_with("assets/")).expect("there are assets");
        let caching = get(&format!("/{asset}")).headers()[header::CACHE_CONTROL].clone();
        assert!(caching.to_str().expect("ASCII").contains("immutable"));
    }

    #[test]
    fn every_answer_carries_the_policy() {
        for path in ["/", "/icon.svg", "/shanty.v1.JobService/Nothing", "/../Cargo.toml"] {
            let response = get(path);
            let policy = response.headers()[header::CONTENT_SECURITY_POLICY].to_str().expect("ASCII");
            assert!(
                policy.starts_with("default-src 'none'")
                    && !policy.contains("-inline")
                    && !policy.contains("-eval"),
                "{path}"
            );
        }
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        for path in ["/assets/none.js", "/shanty.v1.JobService/Nothing", "/../Cargo.toml", "/else"] {
            assert_eq!(get(path).status(), StatusCode::NOT_FOUND, "{path}");
        }
    }

    #[test]
    fn a_call_is_never_taken_for_a_page() {
        let request =
            |method: Method| Request::builder().method(method).uri("/").body(()).expect("a request");
        assert!(is_of_a_page(&request(Method::GET)) && is_of_a_page(&request(Method::HEAD)));
        for method in [Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS, Method::PATCH] {
            assert!(!is_of_a_page(&request(method.clone())), "{method}");
        }
    }
}
