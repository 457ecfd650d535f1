//! The dashboard: the built pages of `web/dist`, embedded, and the headers that keep them to themselves.

use axum::{
    body::Body,
    http::{HeaderValue, Method, Request, Response, StatusCode, header},
};
use rust_embed::{EmbeddedFile, RustEmbed};

/// What browsers are given. Built by `npm run build` in `web/`, committed, and proved fresh by continuous integration.
#[derive(RustEmbed)]
#[folder = "../../web/dist"]
struct Files;

/// The page that answers every address of the dashboard.
const INDEX: &str = "index.html";

/// Nothing but what this origin serves: no inline script, no other host, no frame around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'";

/// Answers a request that no service took: a file of the dashboard, or its page for an address within it.
pub(crate) async fn answer(request: Request<Body>) -> Response<Body> {
    let path = request.uri().path().trim_start_matches('/');
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return plain(StatusCode::METHOD_NOT_ALLOWED);
    }
    // Names of assets carry a hash of what is in them.
    let found = match Files::get(path) {
        Some(file) if path.starts_with("assets/") => Some((path, file, "public, max-age=31536000, immutable")),
        Some(file) => Some((path, file, "no-cache")),
        None if is_page(path) => Files::get(INDEX).map(|file| (INDEX, file, "no-cache")),
        None => None,
    };
    match found {
        Some((name, file, caching)) => serve(name, file, caching, request.method() == Method::HEAD),
        None => plain(StatusCode::NOT_FOUND),
    }
}

/// Whether an address is one that the dashboard shows: not a file, not a method of a service.
fn is_page(path: &str) -> bool {
    let first = path.split('/').next().unwrap_or_default();
    matches!(first, "" | "jobs" | "compare")
}

fn serve(name: &str, file: EmbeddedFile, caching: &'static str, head: bool) -> Response<Body> {
    let length = file.data.len();
    let mut response = Response::new(if head { Body::empty() } else { Body::from(file.data.into_owned()) });
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type(name)));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));
    guard(headers);
    response
}

fn plain(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    guard(response.headers_mut());
    response
}

fn guard(headers: &mut axum::http::HeaderMap) {
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
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

    async fn get(path: &str) -> Response<Body> {
        answer(Request::get(path).body(Body::empty()).expect("a request")).await
    }

    async fn body(response: Response<Body>) -> String {
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 24).await.expect("all of it");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[tokio::test]
    async fn every_address_of_the_dashboard_is_the_same_page() {
        let page = body(get("/").await).await;
        assert!(page.contains("<div id=\"app\">"), "{page}");
        for path in ["/jobs/pirate-1", "/compare?job=a&job=b"] {
            let response = get(path).await;
            assert_eq!(response.status(), StatusCode::OK, "{path}");
            assert_eq!(body(response).await, page, "{path}");
        }
    }

    #[tokio::test]
    async fn what_the_page_names_is_there_and_nothing_is_fetched_from_elsewhere() {
        let page = body(get("/").await).await;
        let names: Vec<&str> = page.split('"').filter(|part| part.starts_with('/') && part.contains('.')).collect();
        assert!(names.len() >= 3, "a script, a style sheet and an icon: {names:?}");
        for name in names {
            let response = get(name).await;
            assert_eq!(response.status(), StatusCode::OK, "{name}");
            assert_ne!(response.headers()[header::CONTENT_TYPE], "application/octet-stream", "{name}");
        }
        assert!(!page.contains("http://") && !page.contains("https://"), "{page}");
    }

    #[tokio::test]
    async fn every_answer_carries_the_policy() {
        for path in ["/", "/icon.svg", "/shanty.v1.JobService/Nothing", "/../Cargo.toml"] {
            let response = get(path).await;
            let policy = response.headers()[header::CONTENT_SECURITY_POLICY].to_str().expect("ASCII");
            assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{path}");
        }
    }

    #[tokio::test]
    async fn what_is_not_there_is_not_found_and_nothing_is_written() {
        for path in ["/assets/none.js", "/shanty.v1.JobService/Nothing", "/../Cargo.toml", "/else"] {
            assert_eq!(get(path).await.status(), StatusCode::NOT_FOUND, "{path}");
        }
        let post = Request::post("/").body(Body::empty()).expect("a request");
        assert_eq!(answer(post).await.status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}
