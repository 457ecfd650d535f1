//! `shanty logs`: what a job's workers say.

use serde_json::json;
use shanty_proto::v1::{LogLine, TailLogsRequest};

use crate::{
    client::{Target, block_on, wire},
    failure::{CommandResult, Exit},
    ui::{Paint, Ui, paint},
};

/// Show the log of a job's workers, oldest line first
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty logs shakespeare
  shanty logs shakespeare -f --worker 0198f2")]
pub(crate) struct Args {
    /// The job's id or name
    job: String,
    /// Go on with lines as they come
    #[arg(short, long)]
    follow: bool,
    /// This worker's lines alone
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    worker: String,
    #[command(flatten)]
    target: Target,
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    block_on(async {
        let (connection, job_id) = args.target.connect_for(&args.job).await?;
        let request = TailLogsRequest {
            job_id,
            worker_id: args.worker,
            follow: args.follow,
            ..TailLogsRequest::default()
        };
        let mut stream = connection.client.status().tail_logs(request).await.map_err(wire)?.into_inner();
        loop {
            let message = tokio::select! {
                message = stream.message() => message.map_err(wire)?,
                _ = tokio::signal::ctrl_c() => return Ok(Exit::Interrupted),
            };
            let Some(message) = message else { return Ok(Exit::Done) };
            for line in message.lines {
                show(&line, ui)?;
            }
        }
    })
}

fn show(line: &LogLine, ui: &Ui) -> CommandResult<()> {
    let object = json!({
        "unix_ms": line.unix_ms, "worker": line.worker_id, "level": line.level, "text": line.text,
    });
    ui.data(&object, |_| {
        let color = ui.color_on_stdout();
        let tint = match line.level.as_str() {
            "error" => Paint::Red,
            "warn" => Paint::Yellow,
            "info" => Paint::Green,
            _ => Paint::Dim,
        };
        let level = paint(color, tint, &format!("{:>5}", line.level));
        let worker = paint(color, Paint::Dim, &line.worker_id);
        format!("{} {level} {worker} {}", clock(line.unix_ms), line.text)
    })
}

/// Time of day, UTC.
fn clock(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}.{:03}Z", seconds / 3600, seconds / 60 % 60, seconds % 60, unix_ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_is_utc() {
        assert_eq!(clock(1_700_000_000_123), "22:13:20.123Z");
    }
}
