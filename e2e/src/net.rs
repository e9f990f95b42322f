//! Network namespaces and links of the host that vanish at drop.

use anyhow::Result;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::process::run;
use crate::scratch;

/// A network namespace of its own.
#[derive(Debug)]
pub struct Namespace(String);

impl Namespace {
    /// Makes one, with its loopback up.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("sl-e2e-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        scratch::undo_at_end(&format!("ip netns del {name}"))?;
        run("ip", &["netns", "add", &name])?;
        let namespace = Self(name);
        // Addresses can be used at once: nobody else has them.
        namespace
            .run("ip link set lo up; for k in all default; do echo 0 >/proc/sys/net/ipv6/conf/$k/accept_dad; done")?;
        Ok(namespace)
    }

    /// Its name, for `ip`.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Joins two namespaces by a wire: a veth pair without the offloads that a wire does not have either.
    pub fn wire(&self, link: &str, other: &Self, other_link: &str, mtu: usize) -> Result<()> {
        let ends =
            [(self, link), (other, other_link)].map(|(space, link)| format!("{link} netns {} mtu {mtu}", space.0));
        run("sh", &["-c", &format!("ip link add {} type veth peer name {}", ends[0], ends[1])])?;
        for (space, link) in [(self, link), (other, other_link)] {
            space.run(&format!(
                "ip link set {link} addrgenmode none up && ethtool -K {link} tx off txvlan off tx-vlan-stag-hw-insert off gro off"
            ))?;
        }
        Ok(())
    }

    /// Moves a link of the host into the namespace.
    pub fn take(&self, link: &str) -> Result<()> {
        run("ip", &["link", "set", link, "netns", &self.0]).map(drop)
    }

    /// Runs a shell command inside and gives what it printed.
    pub fn run(&self, command: &str) -> Result<String> {
        run("ip", &["netns", "exec", &self.0, "sh", "-c", command])
    }

    /// A command that will run inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, program]);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = run("ip", &["netns", "del", &self.0]);
    }
}

/// Whether the host has a link of this name.
pub fn link_exists(name: &str) -> bool {
    std::path::Path::new("/sys/class/net").join(name).exists()
}
