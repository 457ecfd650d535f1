//! Processes as `/proc` shows them.

use std::{collections::BTreeSet, fs, path::PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use crate::error::{Error, Result};

/// Sends a signal.
pub(crate) fn signal(pid: u32, signal: Signal, action: &'static str) -> Result<()> {
    let source = match i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // A zombie takes signals and does nothing about them.
        Some(_) if !is_alive(pid) => std::io::Error::from_raw_os_error(3),
        Some(pid) => match kill_process(pid, signal) {
            Ok(()) => return Ok(()),
            Err(error) => error.into(),
        },
        None => std::io::Error::from_raw_os_error(3),
    };
    Err(Error::Process { action, pid, source })
}

/// The state letter of a process; none if it is gone.
pub fn state(pid: u32) -> Option<char> {
    stat(pid).map(|(state, _)| state)
}

/// Whether a process runs or stands still (and is no zombie).
pub fn is_alive(pid: u32) -> bool {
    state(pid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// The parent of a process.
pub fn parent(pid: u32) -> Option<u32> {
    stat(pid).map(|(_, parent)| parent)
}

/// Children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    pids().into_iter().filter(|other| parent(*other) == Some(pid)).collect()
}

/// The first word of its command line after the program, if there is one: `worker-device`, `coordinator`, …
pub fn command(pid: u32) -> Option<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let word = bytes.split(|byte| *byte == 0).nth(1)?;
    Some(String::from_utf8_lossy(word).into_owned())
}

/// The process that listens on a port of this network namespace.
///
/// # Errors
/// [`Error::NobodyListens`]
pub fn listener(port: u16) -> Result<u32> {
    let inodes: BTreeSet<String> = ["tcp", "tcp6"].iter().flat_map(|table| listening(table, port)).collect();
    let holds = |pid: &u32| {
        let folder = fs::read_dir(format!("/proc/{pid}/fd"));
        let links =
            folder.into_iter().flatten().flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        links.filter_map(inode).any(|inode| inodes.contains(&inode))
    };
    pids().into_iter().find(holds).ok_or(Error::NobodyListens { port })
}

/// Socket inodes that listen on a port.
fn listening(table: &str, port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    let text = fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
    let found = text.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let local = u16::from_str_radix(fields.get(1)?.rsplit_once(':')?.1, 16).ok()?;
        (local == port && *fields.get(3)? == LISTEN)
            .then(|| fields.get(9).map(|inode| (*inode).to_owned()))?
    });
    found.collect()
}

fn inode(link: PathBuf) -> Option<String> {
    Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
}

fn pids() -> Vec<u32> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.parse().ok()).collect()
}

/// State and parent.
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; what follows the last one does not.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_that_listens_is_found_and_nobody_else() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert_eq!(listener(port).unwrap(), std::process::id());
        drop(socket);
        assert!(matches!(listener(port), Err(Error::NobodyListens { .. })));
    }

    #[test]
    fn children_and_their_commands_are_seen() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        assert!(children(std::process::id()).contains(&child.id()));
        assert_eq!(command(child.id()).as_deref(), Some("600"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_alive(child.id()));
    }
}
