//! The HTTP client, its TLS provider, and the thread that its requests run on.

use std::{
    future::Future,
    sync::{Once, OnceLock, mpsc},
    time::Duration,
};

use tokio::runtime::Runtime;

use crate::Error;

/// Who we say we are.
pub(crate) const USER_AGENT: &str = concat!("shanty/", env!("CARGO_PKG_VERSION"));
/// A host that does not answer within this is not there.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that is silent for so long is dead.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Makes ring the process's TLS provider, unless there is one already.
pub(crate) fn install_tls() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // It fails only where another part of the program was first, with the same provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// A client that follows no redirect: whoever redirects may be of another origin, which gets no token.
pub(crate) fn http() -> Result<reqwest::Client, Error> {
    static CLIENT: OnceLock<reqwest::Client> = OnceLock::new();
    if let Some(client) = CLIENT.get() {
        return Ok(client.clone());
    }
    install_tls();
    let client = reqwest::Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(|source| Error::Client { reason: words(&source) })?;
    Ok(CLIENT.get_or_init(|| client).clone())
}

fn runtime() -> Result<&'static Runtime, Error> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("remote")
        .enable_all()
        .build()
        .map_err(|source| Error::Client { reason: source.to_string() })?;
    Ok(RUNTIME.get_or_init(|| runtime))
}

/// Runs a request on the threads of this crate, whatever thread asks; the asking one waits.
pub(crate) fn wait<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    later(work)?.recv().unwrap_or(Err(Error::Client { reason: "a request ended without a word".to_owned() }))
}

/// Starts a request; what comes of it is received later, or dropped.
pub(crate) fn later<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<mpsc::Receiver<Result<T, Error>>, Error> {
    let (sender, receiver) = mpsc::sync_channel(1);
    runtime()?.spawn(async move {
        let outcome = work.await;
        // Whoever asked may have gone.
        let _ = sender.send(outcome);
    });
    Ok(receiver)
}

/// An error with its causes, which is where clients say what happened; without URLs, which may hold signatures.
pub(crate) fn words(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = match error.downcast_ref::<reqwest::Error>() {
        Some(error) if error.is_timeout() => "it took too long".to_owned(),
        Some(error) if error.is_connect() => "no connection".to_owned(),
        Some(_) => "the request failed".to_owned(),
        None => error.to_string(),
    };
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = match inner.downcast_ref::<reqwest::Error>() {
            Some(error) if error.is_timeout() => "it took too long".to_owned(),
            Some(error) if error.is_connect() => "no connection".to_owned(),
            Some(_) => String::new(),
            None => inner.to_string(),
        };
        if !inner_text.is_empty() && !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}
