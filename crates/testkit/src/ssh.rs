//! An sshd of one's own, with keys, port and configuration of its own.
//!
//! Where OpenSSH's server is not installed, tests are skipped aloud; where `SHANTY_REQUIRE_SSHD` is set they fail.

use std::{
    env, fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, ensure};

use crate::{process::PATIENCE, wait};

/// A server on a port of this machine that lets its own user in. Stopped when it is dropped.
#[derive(Debug)]
pub struct Sshd {
    folder: PathBuf,
    port: u16,
    server: Child,
}

impl Sshd {
    /// Starts one with its files in `folder`; nothing where sshd is not installed.
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    pub fn start(folder: &Path) -> anyhow::Result<Option<Self>> {
        let program =
            ["/usr/sbin/sshd", "/usr/local/sbin/sshd"].into_iter().find(|path| Path::new(path).is_file());
        let Some(program) = program else {
            ensure!(
                env::var_os("SHANTY_REQUIRE_SSHD").is_none(),
                "SHANTY_REQUIRE_SSHD is set, and sshd is not installed"
            );
            eprintln!("SKIPPED: sshd is not installed (Debian's openssh-server)");
            return Ok(None);
        };
        fs::create_dir_all(folder)?;
        for key in ["host_key", "user_key"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(folder.join(key))
                .stdin(Stdio::null())
                .status()?;
            ensure!(made.success(), "ssh-keygen made no {key}");
        }
        fs::copy(folder.join("user_key.pub"), folder.join("authorized_keys"))?;
        // Where sshd drops its rights to; it insists.
        if rustix::process::getuid().is_root() {
            fs::create_dir_all("/run/sshd")?;
        }
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let here = folder.display();
        let configuration = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {here}/host_key\nAuthorizedKeysFile {here}/authorized_keys\n\
             PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        );
        fs::write(folder.join("sshd_config"), configuration)?;
        let host_key = fs::read_to_string(folder.join("host_key.pub"))?;
        let words: Vec<&str> = host_key.split_whitespace().take(2).collect();
        fs::write(folder.join("known_hosts"), format!("[127.0.0.1]:{port} {}\n", words.join(" ")))?;
        let log = fs::File::create(folder.join("sshd.log"))?;
        let server = Command::new(program)
            .args(["-D", "-e", "-f"])
            .arg(folder.join("sshd_config"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("failed to start sshd")?;
        let sshd = Self { folder: folder.to_owned(), port, server };
        wait::until("sshd to listen", PATIENCE, || {
            Ok(TcpStream::connect(("127.0.0.1", port)).ok().map(drop))
        })
        .with_context(|| sshd.log())?;
        Ok(Some(sshd))
    }

    /// `[ssh]` of a cluster's file that reaches it, with the server's key known.
    pub fn section(&self) -> String {
        let here = self.folder.display();
        format!(
            "[ssh]\nport = {}\nidentity_file = \"{here}/user_key\"\noptions = [\"UserKnownHostsFile={here}/known_hosts\", \
             \"StrictHostKeyChecking=yes\", \"IdentitiesOnly=yes\"]\n",
            self.port
        )
    }

    /// What it said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("sshd.log")).unwrap_or_default()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
