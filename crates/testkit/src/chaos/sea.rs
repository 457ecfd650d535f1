//! What takes root: a network namespace for each worker, and a small disk for the run.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

/// Bytes of the disk.
const DISK: &str = "size=96m";

/// A bridge with a network namespace for each worker behind it.
#[derive(Debug)]
pub(super) struct Sea {
    tag: u32,
    harbours: usize,
    disk: Option<PathBuf>,
}

impl Sea {
    /// Lays bridge and namespaces, and mounts a small disk on `disk`.
    pub(super) fn new(harbours: usize, disk: &Path) -> anyhow::Result<Self> {
        let mut sea = Self { tag: std::process::id() % 60_000, harbours: 0, disk: None };
        let bridge = sea.bridge();
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}/24", sea.address(None)), "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        for number in 0..harbours {
            sea.harbours = number + 1;
            let (name, outer, inner) = (sea.name(number), format!("sv{}x{number}", sea.tag), "eth0");
            ip(&["netns", "add", &name])?;
            ip(&["link", "add", &outer, "type", "veth", "peer", "name", inner, "netns", &name])?;
            ip(&["link", "set", &outer, "master", &bridge, "up"])?;
            let address = format!("{}/24", sea.address(Some(number)));
            ip(&["-n", &name, "addr", "add", &address, "dev", inner])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
            ip(&["-n", &name, "link", "set", inner, "up"])?;
        }
        std::fs::create_dir_all(disk)?;
        let path = disk.to_str().context("the disk's path is text")?;
        run("mount", &["-t", "tmpfs", "-o", DISK, "shanty-chaos", path])?;
        sea.disk = Some(disk.to_owned());
        Ok(sea)
    }

    fn bridge(&self) -> String {
        format!("sb{}", self.tag)
    }

    /// A worker's namespace.
    pub(super) fn name(&self, number: usize) -> String {
        format!("shanty-{}-{number}", self.tag)
    }

    /// A worker's address; the coordinator's for none.
    pub(super) fn address(&self, number: Option<usize>) -> String {
        let (high, low) = (64 + self.tag / 250 % 64, self.tag % 250);
        format!("10.{high}.{low}.{}", number.map_or(1, |number| number + 2))
    }
}

impl Drop for Sea {
    fn drop(&mut self) {
        // What is left if one of these fails is looked at by a person; nothing depends on it.
        for number in 0..self.harbours {
            let _ = ip(&["netns", "del", &self.name(number)]);
        }
        let _ = ip(&["link", "del", &self.bridge()]);
        if let Some(disk) = self.disk.as_ref().and_then(|disk| disk.to_str()) {
            let _ = run("umount", &["--lazy", disk]);
        }
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("failed to start {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), said.trim());
    Ok(())
}
