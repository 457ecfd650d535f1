//! `shanty certs`: a small authority for coordinators, workers and users.

use std::{path::PathBuf, time::SystemTime};

use serde_json::json;
use shanty_access::{
    Role,
    authority::{Authority, CERTIFICATE, Issued, REVOKED, Request},
    certificate::{self, Purpose},
};

use crate::{
    failure::{CommandResult, Exit},
    format,
    ui::Ui,
};

const DAY: i64 = 24 * 3600;
/// Hosts by which a coordinator is always reached on its own machine.
const OWN_HOSTS: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Make a small authority; issue certificates, take them back, look at them
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  shanty certs init
  shanty certs issue head --role coordinator --host head.example --host 10.0.0.10
  shanty certs issue node-7 --role worker
  shanty certs issue ann --role submit --days 90
  shanty certs revoke node-7
  shanty certs show

Keys are readable by their owner alone. Keep ca.key where nobody else gets at it; the coordinator does not need it.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Args)]
struct Folder {
    /// The authority's folder
    #[arg(long, value_name = "DIR", default_value = "certs")]
    dir: PathBuf,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make an authority
    Init {
        #[command(flatten)]
        folder: Folder,
        /// The authority's name
        #[arg(long, default_value = "shanty")]
        name: String,
        /// How long it holds
        #[arg(long, default_value_t = 3650)]
        days: u32,
    },
    /// Issue a certificate with its key
    Issue {
        /// Whose: letters, digits, `-`, `_` and `.`; names the files, too
        name: String,
        #[command(flatten)]
        folder: Folder,
        /// What for
        #[arg(long, value_parser = ["coordinator", "worker", "read", "submit", "admin"])]
        role: String,
        /// A host name or address of a coordinator; may be repeated. Those of its own machine are added
        #[arg(long = "host", value_name = "HOST")]
        hosts: Vec<String>,
        /// How long it holds
        #[arg(long, default_value_t = 365)]
        days: u32,
    },
    /// Take certificates back; a running coordinator that reads the list ends what runs on them
    Revoke {
        /// A name, or a number
        certificate: String,
        #[command(flatten)]
        folder: Folder,
    },
    /// Show the authority's certificates and when they end, or what a file holds
    Show {
        /// A certificate's file
        file: Option<PathBuf>,
        #[command(flatten)]
        folder: Folder,
    },
}

pub(crate) fn execute(args: Args, ui: &Ui) -> CommandResult<Exit> {
    match args.command {
        Command::Init { folder, name, days } => init(&folder, &name, days, ui),
        Command::Issue { name, folder, role, hosts, days } => issue(name, &folder, &role, hosts, days, ui),
        Command::Revoke { certificate, folder } => revoke(&certificate, &folder, ui),
        Command::Show { file: Some(file), .. } => show_file(&file, ui),
        Command::Show { file: None, folder } => show(&folder, ui),
    }?;
    Ok(Exit::Done)
}

fn init(folder: &Folder, name: &str, days: u32, ui: &Ui) -> CommandResult<()> {
    let authority = Authority::init(&folder.dir, name, days)?;
    let place = |file: &str| authority.folder().join(file);
    let (ca, revoked) = (place(CERTIFICATE), place(REVOKED));
    ui.data(&json!({ "ca": ca, "key": place("ca.key"), "revoked": revoked }), |_| ca.display().to_string())?;
    ui.note("next: shanty certs issue head --role coordinator --host THIS-HOST");
    Ok(())
}

fn issue(
    name: String,
    folder: &Folder,
    role: &str,
    mut hosts: Vec<String>,
    days: u32,
    ui: &Ui,
) -> CommandResult<()> {
    let purpose = Purpose::parse(role).unwrap_or(Purpose::Client(Role::Read));
    if purpose == Purpose::Coordinator {
        let own = OWN_HOSTS.map(str::to_owned).into_iter().filter(|host| !hosts.contains(host));
        let own: Vec<String> = own.collect();
        hosts.extend(own);
    }
    let files = Authority::open(&folder.dir)?.issue(&Request { name, purpose, hosts, days })?;
    let answer = json!({
        "certificate": files.certificate, "key": files.key, "role": files.entry.purpose,
        "name": files.entry.name, "serial": files.entry.serial, "expires_unix": files.entry.expires_unix,
    });
    ui.data(&answer, |_| format!("{}\n{}", files.certificate.display(), files.key.display()))
}

fn revoke(which: &str, folder: &Folder, ui: &Ui) -> CommandResult<()> {
    let authority = Authority::open(&folder.dir)?;
    let revoked = authority.revoke(which)?;
    let serials: Vec<&str> = revoked.iter().map(|issued| issued.serial.as_str()).collect();
    let list = authority.folder().join(REVOKED);
    ui.data(&json!({ "revoked": serials, "list": list }), |_| {
        if serials.is_empty() {
            "revoked before".to_owned()
        } else {
            format!("revoked {}", serials.join(", "))
        }
    })?;
    ui.note(format!("coordinators that read `{}` follow at once; copy it to the others", list.display()));
    Ok(())
}

fn show(folder: &Folder, ui: &Ui) -> CommandResult<()> {
    let authority = Authority::open(&folder.dir)?;
    let own = authority.facts()?;
    let issued = authority.issued()?;
    let now = now();
    if ui.is_json() {
        ui.json(&json!({
            "name": "ca", "role": "authority", "serial": own.serial.as_str(), "expires_unix": own.not_after,
            "state": state(own.not_after, None, now),
        }))?;
        return issued.iter().try_for_each(|entry| {
            ui.json(&json!({
                "name": entry.name, "role": entry.purpose, "serial": entry.serial, "hosts": entry.hosts,
                "expires_unix": entry.expires_unix, "revoked_unix": entry.revoked_unix,
                "state": state(entry.expires_unix, entry.revoked_unix, now),
            }))
        });
    }
    let row = |entry: &Issued| {
        vec![
            entry.name.clone(),
            entry.purpose.clone(),
            state(entry.expires_unix, entry.revoked_unix, now),
            entry.hosts.join(" "),
            entry.serial.clone(),
        ]
    };
    let authority_row = vec![
        "ca".to_owned(),
        "authority".to_owned(),
        state(own.not_after, None, now),
        String::new(),
        own.serial.as_str().to_owned(),
    ];
    let rows: Vec<Vec<String>> = [authority_row].into_iter().chain(issued.iter().map(row)).collect();
    ui.line(format::table(&["NAME", "ROLE", "STATE", "HOSTS", "SERIAL"], &rows))
}

fn show_file(file: &std::path::Path, ui: &Ui) -> CommandResult<()> {
    let now = now();
    for der in certificate::read_pem(file)? {
        let facts = certificate::read(&der)
            .map_err(|what| shanty_access::Error::Damaged { path: file.to_owned(), what })?;
        let role = match facts.purpose {
            _ if facts.is_authority => "authority",
            Some(purpose) => purpose.as_str(),
            None => "none",
        };
        let answer = json!({
            "name": facts.name, "role": role, "serial": facts.serial.as_str(), "hosts": facts.hosts,
            "expires_unix": facts.not_after, "state": state(facts.not_after, None, now),
        });
        ui.data(&answer, |_| {
            let rows = [
                ("name", facts.name.clone()),
                ("role", role.to_owned()),
                ("state", state(facts.not_after, None, now)),
                ("hosts", facts.hosts.join(" ")),
                ("serial", facts.serial.as_str().to_owned()),
            ];
            rows.map(|(key, value)| format!("{key:<7} {value}")).join("\n")
        })?;
    }
    Ok(())
}

/// In words: how long it still holds.
fn state(expires: i64, revoked: Option<i64>, now: i64) -> String {
    if revoked.is_some() {
        return "revoked".to_owned();
    }
    match expires.saturating_sub(now) {
        left if left < 0 => "expired".to_owned(),
        left if left < 2 * DAY => format!("holds {} h", left / 3600),
        left => format!("holds {} days", left / DAY),
    }
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_say_how_long() {
        assert_eq!(state(100 * DAY, None, 0), "holds 100 days");
        assert_eq!(state(3600, None, 0), "holds 1 h");
        assert_eq!(state(0, None, 1), "expired");
        assert_eq!(state(100 * DAY, Some(1), 0), "revoked");
    }
}
