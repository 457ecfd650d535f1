//! `shanty up`: workers on plain hosts, started by ssh and watched.

use std::{path::PathBuf, process::Stdio, time::Duration};

use serde_json::{Value, json};
use shanty_launch::{ClusterFile, Error as LaunchError, Host};
use shanty_worker::supervisor::{Signals, signals};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader},
    process::{Child, Command},
};

use crate::{
    client::block_on,
    error::Error,
    failure::{CommandResult, Exit},
    ui::Ui,
};

/// First pause before a host is tried again; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A worker that ran for so long was no failed start.
const RAN_WELL: Duration = Duration::from_secs(60);
/// What ssh ends with if the connection is not made, or breaks.
const SSH_FAILED: i32 = 255;

/// Start workers on plain hosts by ssh, and keep them running
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty up cluster.toml
  shanty up cluster.toml --output json

cluster.toml:
  coordinator = \"https://head:7461\"
  ca = \"certs/ca.pem\"
  token_file = \"worker.token\"           # shanty token create --role worker --name crew --out worker.token
  [worker]
  program = \"/usr/local/bin/shanty\"
  [[host]]
  address = \"10.0.0.11\"
  [[host]]
  address = \"10.0.0.12\"
  name = \"big\"

A worker that dies, or whose host cannot be reached, is started again; one that was drained, or that its set-up is wrong for, is
not. Interrupted, all are asked to end: they hand back what they hold. Interrupted again, connections are cut.")]
pub(crate) struct Args {
    /// The file that names the hosts
    #[arg(value_name = "CLUSTER.toml")]
    file: PathBuf,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    let file = ClusterFile::read(&args.file)?;
    let read = |path: &PathBuf| {
        std::fs::read_to_string(path).map_err(|source| Error::File {
            action: "read",
            path: path.clone(),
            source,
        })
    };
    let ca = file.ca.as_ref().map(read).transpose()?;
    if let Some(token) = &file.token_file {
        shanty_access::files::require_private(token)?;
    }
    let token = file.token_file.as_ref().map(read).transpose()?.map(|text| text.trim().to_owned());
    block_on(async {
        let asked = signals()?;
        let all = file.hosts.iter().map(|host| {
            let arguments = file.ssh_arguments(host, ca.as_deref());
            Watch { host, arguments, token: token.as_deref(), asked: &asked, ui }.run()
        });
        let ends = futures::future::join_all(all).await;
        let ends: Vec<bool> = ends.into_iter().collect::<CommandResult<_>>()?;
        Ok(match () {
            () if asked.first.is_cancelled() => Exit::Interrupted,
            () if ends.iter().all(|well| *well) => Exit::Done,
            () => Exit::Failed,
        })
    })
}

/// One host's worker, from its first start to its last end.
struct Watch<'a> {
    host: &'a Host,
    arguments: Vec<String>,
    token: Option<&'a str>,
    asked: &'a Signals,
    ui: &'a Ui,
}

impl Watch<'_> {
    /// Keeps the worker running; gives whether it ended well.
    async fn run(self) -> CommandResult<bool> {
        let mut pause = FIRST_PAUSE;
        loop {
            let began = tokio::time::Instant::now();
            let code = self.once().await?;
            let asked = self.asked.first.is_cancelled();
            let (text, over) = match code {
                _ if asked => ("ended, as it was asked to".to_owned(), Some(true)),
                Some(0) => ("ended: it was drained".to_owned(), Some(true)),
                Some(2) => ("cannot work as it is set up; it is not started again".to_owned(), Some(false)),
                Some(93) => ("was stopped by a user; it is not started again".to_owned(), Some(true)),
                Some(SSH_FAILED) => ("cannot be reached, or the connection broke".to_owned(), None),
                Some(code) => (format!("ended with {code}"), None),
                None => ("was killed".to_owned(), None),
            };
            self.tell("ended", json!({ "code": code, "again": over.is_none() }), &text)?;
            if let Some(well) = over {
                return Ok(well);
            }
            if began.elapsed() > RAN_WELL {
                pause = FIRST_PAUSE;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.asked.first.cancelled() => return Ok(true),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One connection, from its start to its end; gives ssh's exit code, which is the worker's.
    async fn once(&self) -> CommandResult<Option<i32>> {
        let failed = |error: std::io::Error| LaunchError::Program {
            program: "ssh".to_owned(),
            reason: error.to_string(),
        };
        let mut child = Command::new("ssh")
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A ctrl-c at the terminal is for this program, which then asks the workers.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let lifeline = async {
            let Some(mut stdin) = stdin else { return };
            if let Some(token) = self.token {
                // A host that went away is noticed where its end is waited for.
                let _ = stdin.write_all(format!("{token}\n").as_bytes()).await;
                let _ = stdin.flush().await;
            }
            self.asked.first.cancelled().await;
            drop(stdin);
            std::future::pending::<()>().await;
        };
        let told = async {
            let (out, err) = tokio::join!(self.pass_on(stdout), self.pass_on(stderr));
            out.and(err)
        };
        let ended = async {
            let (told, status) = tokio::join!(told, self.end_of(&mut child));
            told.and(status)
        };
        tokio::select! {
            code = ended => code,
            () = lifeline => Ok(None),
        }
    }

    async fn end_of(&self, child: &mut Child) -> CommandResult<Option<i32>> {
        let failed = |error: std::io::Error| LaunchError::Program {
            program: "ssh".to_owned(),
            reason: error.to_string(),
        };
        tokio::select! {
            status = child.wait() => return Ok(status.map_err(failed)?.code()),
            () = self.asked.again.cancelled() => {}
        }
        child.start_kill().map_err(failed)?;
        Ok(child.wait().await.map_err(failed)?.code())
    }

    /// Passes on what the host says, with its name before each line.
    async fn pass_on(&self, stream: Option<impl AsyncRead + Unpin>) -> CommandResult<()> {
        let Some(stream) = stream else { return Ok(()) };
        let mut lines = BufReader::new(stream).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            match serde_json::from_str::<Value>(&line) {
                Ok(event) if event["event"] == "started" => {
                    self.tell("started", json!({ "pids": event["pids"] }), "its worker started")?;
                }
                _ => self.ui.always_note(&format!("{}: {line}", self.host.name())),
            }
        }
        Ok(())
    }

    fn tell(&self, event: &str, mut more: Value, text: &str) -> CommandResult<()> {
        more["event"] = event.into();
        more["host"] = self.host.name().into();
        self.ui.data(&more, |_| format!("{}: {text}", self.host.name()))
    }
}
