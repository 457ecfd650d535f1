//! `shanty token`: secrets that stand for a role, made and taken back at a coordinator.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use shanty_access::files;
use shanty_proto::v1::{self, CreateTokenRequest, ListTokensRequest, RevokeTokenRequest, Token};

use crate::{
    client::{Target, block_on, wire},
    failure::{CommandResult, Exit},
    format,
    ui::Ui,
};

/// How long the token of a job's workers holds at most, where nothing is said.
const LIFETIME_OF_A_JOBS: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long any other token holds, where nothing is said.
const LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);

/// Make tokens at a coordinator, list them, take them back
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty token create --role submit --name ann --out ann.token
  shanty token create --role worker --job pirate-1 --expires 12h --out workers.token
  shanty token list
  shanty token revoke ann

A token is shown this once; the coordinator keeps a hash of it. It is used by --token-file, SHANTY_TOKEN_FILE or SHANTY_TOKEN.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a token
    Create {
        /// What it stands for: read, submit, worker or admin
        #[arg(long, value_parser = ["read", "submit", "worker", "admin"])]
        role: String,
        /// Whose it is, for people
        #[arg(long, default_value = "")]
        name: String,
        /// A worker's token for this job alone; it ends with the job
        #[arg(long, value_name = "JOB")]
        job: Option<String>,
        /// When it ends: `90m`, `12h`, `30d` or `never`; 90 days when absent, 7 for one job's workers
        #[arg(long, value_name = "TIME", value_parser = lifetime)]
        expires: Option<Lifetime>,
        /// Write it to this file, readable by its owner alone, and not to stdout
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        target: Target,
    },
    /// List tokens, without their secrets
    List {
        #[command(flatten)]
        target: Target,
    },
    /// Take tokens back; what runs on them ends at once
    Revoke {
        /// A token's number, or its name
        token: String,
        #[command(flatten)]
        target: Target,
    },
}

/// How long a token holds; none stands for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lifetime(Option<Duration>);

fn lifetime(text: &str) -> Result<Lifetime, String> {
    if text == "never" {
        return Ok(Lifetime(None));
    }
    let number = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let seconds = match &text[number.len()..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err("write it as `90m`, `12h`, `30d` or `never`".to_owned()),
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(seconds)) {
        Some(seconds) if seconds > 0 => Ok(Lifetime(Some(Duration::from_secs(seconds)))),
        _ => Err("must be at least a second".to_owned()),
    }
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    block_on(async {
        match args.command {
            Command::Create { role, name, job, expires, out, target } => {
                let wanted = Wanted { role, name, job, expires, out };
                create(wanted, &target, ui).await
            }
            Command::List { target } => list(&target, ui).await,
            Command::Revoke { token, target } => revoke(token, &target, ui).await,
        }
    })?;
    Ok(Exit::Done)
}

struct Wanted {
    role: String,
    name: String,
    job: Option<String>,
    expires: Option<Lifetime>,
    out: Option<PathBuf>,
}

async fn create(wanted: Wanted, target: &Target, ui: &Ui) -> CommandResult<()> {
    let client = target.connect().await?;
    let usual = if wanted.job.is_some() { LIFETIME_OF_A_JOBS } else { LIFETIME };
    let lifetime = wanted.expires.unwrap_or(Lifetime(Some(usual))).0;
    let request = CreateTokenRequest {
        role: role_in(&wanted.role).into(),
        name: wanted.name,
        job_id: wanted.job.unwrap_or_default(),
        lifetime_seconds: lifetime.map_or(0, |lifetime| lifetime.as_secs()),
    };
    let answer = client.access().create_token(request).await.map_err(wire)?.into_inner();
    let mut shown = json_of(&answer.token.unwrap_or_default());
    match wanted.out {
        Some(path) => {
            files::write_private(&path, &format!("{}\n", answer.secret))?;
            shown["file"] = json!(path);
            ui.data(&shown, |_| path.display().to_string())
        }
        None => {
            shown["token"] = json!(answer.secret);
            ui.data(&shown, |_| answer.secret.clone())
        }
    }
}

async fn list(target: &Target, ui: &Ui) -> CommandResult<()> {
    let client = target.connect().await?;
    let tokens = client.access().list_tokens(ListTokensRequest {}).await.map_err(wire)?.into_inner().tokens;
    if ui.is_json() {
        return tokens.iter().try_for_each(|token| ui.json(&json_of(token)));
    }
    if tokens.is_empty() {
        ui.note("no token was made here");
        return Ok(());
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let row = |token: &Token| {
        let ends = match token.expires_unix_ms {
            0 => "never".to_owned(),
            at => format!("in {}", format::duration(Duration::from_millis(at).saturating_sub(now))),
        };
        vec![token.id.clone(), role_out(token).to_owned(), token.name.clone(), token.job_id.clone(), ends]
    };
    let rows: Vec<Vec<String>> = tokens.iter().map(row).collect();
    ui.line(format::table(&["TOKEN", "ROLE", "NAME", "JOB", "ENDS"], &rows))
}

async fn revoke(token: String, target: &Target, ui: &Ui) -> CommandResult<()> {
    let client = target.connect().await?;
    let request = RevokeTokenRequest { token };
    let revoked = client.access().revoke_token(request).await.map_err(wire)?.into_inner().revoked;
    let ids: Vec<&str> = revoked.iter().map(|token| token.id.as_str()).collect();
    ui.data(&json!({ "revoked": ids }), |_| format!("revoked {}", ids.join(", ")))
}

fn role_in(word: &str) -> v1::Role {
    match word {
        "read" => v1::Role::Read,
        "submit" => v1::Role::Submit,
        "worker" => v1::Role::Worker,
        "admin" => v1::Role::Admin,
        _ => v1::Role::Unspecified,
    }
}

fn role_out(token: &Token) -> &'static str {
    match token.role() {
        v1::Role::Unspecified => "none",
        v1::Role::Read => "read",
        v1::Role::Submit => "submit",
        v1::Role::Worker => "worker",
        v1::Role::Admin => "admin",
    }
}

fn json_of(token: &Token) -> Value {
    json!({
        "id": token.id, "role": role_out(token), "name": token.name, "job": token.job_id,
        "created_unix_ms": token.created_unix_ms, "expires_unix_ms": token.expires_unix_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_are_numbers_with_a_unit() {
        assert_eq!(lifetime("12h"), Ok(Lifetime(Some(Duration::from_secs(12 * 3600)))));
        assert_eq!(lifetime("30d"), Ok(Lifetime(Some(Duration::from_secs(30 * 24 * 3600)))));
        assert_eq!(lifetime("never"), Ok(Lifetime(None)));
        for wrong in ["", "0h", "12", "h", "12 parsecs", "-3d", "99999999999999999999d"] {
            assert!(lifetime(wrong).is_err(), "{wrong}");
        }
    }
}
