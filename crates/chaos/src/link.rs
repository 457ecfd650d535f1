//! Links that are cut: those of a process in a network namespace of its own.

use std::{fs, process::Command};

use crate::{
    error::{Error, Result},
    fault::Blow,
};

/// Whether a process has a network namespace of its own, so that its link can be cut alone.
pub fn has_own_network(pid: u32) -> bool {
    let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let (own, other) = (of("self"), of(&pid.to_string()));
    other.is_some() && own != other
}

/// Cuts all links of a process's network namespace until the blow is healed. Packets are lost, connections are not told.
///
/// # Errors
/// [`Error::SharedNetwork`], [`Error::Command`]
pub fn partition(pid: u32) -> Result<Blow> {
    if !has_own_network(pid) {
        return Err(Error::SharedNetwork { pid });
    }
    // Held by its path: the process may be gone when the link comes back, the namespace is not.
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net")).map_err(|source| Error::Process {
        action: "open the network of",
        pid,
        source,
    })?;
    let links = links(&inside(&namespace, &["-o", "link", "show", "up"])?);
    for link in &links {
        inside(&namespace, &["link", "set", "dev", link, "down"])?;
    }
    Ok(Blow::new(move || {
        for link in &links {
            inside(&namespace, &["link", "set", "dev", link, "up"])?;
        }
        Ok(())
    }))
}

/// Names of the links that `ip -o link` lists, without the loopback.
fn links(listed: &str) -> Vec<String> {
    let name = |line: &str| {
        let name = line.split(": ").nth(1)?.split('@').next()?;
        (name != "lo").then(|| name.to_owned())
    };
    listed.lines().filter_map(name).collect()
}

/// Runs `ip` inside a network namespace.
fn inside(namespace: &fs::File, arguments: &[&str]) -> Result<String> {
    use std::os::fd::AsRawFd;

    let path = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
    let command = format!("ip {}", arguments.join(" "));
    let output = Command::new("nsenter")
        .arg(format!("--net={path}"))
        .arg("ip")
        .args(arguments)
        .output()
        .map_err(|error| Error::Command { command: "nsenter".to_owned(), reason: error.to_string() })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::Command { command, reason: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_but_the_loopback_are_listed() {
        let listed = "1: lo: <LOOPBACK,UP> mtu 65536 qdisc noqueue\n\
                      9: eth0@if8: <BROADCAST,UP> mtu 1500 qdisc noqueue\n12: sea: <UP> mtu 1500\n";
        assert_eq!(links(listed), ["eth0", "sea"]);
    }

    #[test]
    fn a_link_that_is_everybodys_is_not_cut() {
        let pid = std::process::id();
        assert!(!has_own_network(pid));
        assert!(matches!(partition(pid), Err(Error::SharedNetwork { .. })));
    }
}
