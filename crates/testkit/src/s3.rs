//! A server that speaks S3: moto, a Python program that tests of many projects use.
//!
//! Needs a Python with `moto[s3,server]`: `SHANTY_PYTHON`, else `python3`. Without one the test is skipped aloud; where
//! `SHANTY_REQUIRE_PYTHON` is set, as in continuous integration, it fails.

use std::{
    env,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, bail};

use crate::{process::PATIENCE, wait};

/// The bucket that is there from the start.
pub const BUCKET: &str = "crew";

/// A running server with one bucket, empty at first. Killed when it is dropped.
#[derive(Debug)]
pub struct S3 {
    child: Child,
    address: String,
}

impl S3 {
    /// Starts a server; none, and a word about it, where there is no Python with moto.
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    pub fn start() -> anyhow::Result<Option<Self>> {
        let python = env::var("SHANTY_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let found = Command::new(&python)
            .args(["-c", "import moto.server"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !found {
            if env::var_os("SHANTY_REQUIRE_PYTHON").is_some() {
                bail!("`{python}` cannot import moto.server: pip install 'moto[s3,server]'");
            }
            eprintln!("SKIPPED: `{python}` cannot import moto.server; nothing was stored");
            return Ok(None);
        }
        // Free a moment ago; if somebody takes it in between, the server ends and the wait below says so.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let child = Command::new(&python)
            .args(["-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("failed to start moto's server")?;
        let mut server = Self { child, address: format!("127.0.0.1:{port}") };
        wait::until("the S3 server to listen", PATIENCE, || {
            if let Some(status) = server.child.try_wait()? {
                bail!("the S3 server ended with {status}");
            }
            Ok(TcpStream::connect(&server.address).ok())
        })?;
        server.ask("PUT", &format!("/{BUCKET}"), b"")?;
        Ok(Some(server))
    }

    /// The variables that clients are set up from.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", format!("http://{}", self.address)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_ACCESS_KEY_ID", "test".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
        ]
    }

    /// Keys in the bucket that begin so, sorted.
    pub fn keys(&self, prefix: &str) -> anyhow::Result<Vec<String>> {
        let listed = self.ask("GET", &format!("/{BUCKET}?list-type=2&max-keys=1000&prefix={prefix}"), b"")?;
        let text = String::from_utf8(listed)?;
        let keys = text.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next());
        let mut keys: Vec<String> = keys.map(str::to_owned).collect();
        keys.sort();
        Ok(keys)
    }

    /// An object's content.
    pub fn get(&self, key: &str) -> anyhow::Result<Vec<u8>> {
        self.ask("GET", &format!("/{BUCKET}/{key}"), b"")
    }

    /// Puts an object in place of what is there.
    pub fn put(&self, key: &str, content: &[u8]) -> anyhow::Result<()> {
        self.ask("PUT", &format!("/{BUCKET}/{key}"), content).map(drop)
    }

    /// Deletes an object.
    pub fn delete(&self, key: &str) -> anyhow::Result<()> {
        self.ask("DELETE", &format!("/{BUCKET}/{key}"), b"").map(drop)
    }

    /// Flips a bit in the middle of an object.
    pub fn damage(&self, key: &str) -> anyhow::Result<()> {
        let mut content = self.get(key)?;
        let middle = content.len() / 2;
        *content.get_mut(middle).context("the object is empty")? ^= 1;
        self.put(key, &content)
    }

    /// One request on a connection of its own; the body of the answer.
    fn ask(&self, method: &str, target: &str, body: &[u8]) -> anyhow::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(&self.address)?;
        let head = format!(
            "{method} {target} HTTP/1.0\r\nHost: {}\r\nAuthorization: AWS4-HMAC-SHA256 \
             Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0\r\n\
             Content-Length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").context("no HTTP answer")?;
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        let status = head.split(' ').nth(1).unwrap_or_default();
        if !status.starts_with('2') {
            bail!("{method} {target}: {head}");
        }
        Ok(answer.split_off(end + 4))
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        // Gone already: then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
