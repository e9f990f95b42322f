//! A private OVS-DPDK, to compare with and to prove this harness by.

use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::net::Namespace;
use crate::process::{self, Process};
use crate::scratch::Scratch;
use crate::switch::Usage;
use crate::{machine, wait};

/// The program, as Debian installs it.
pub const VSWITCHD: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const MEMORY_MIB: u32 = 512;
/// DPDK's programs look for any size; these can be had while the machine runs.
const HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const HUGEPAGE_MIB: u64 = 2;

/// Sees to it that so much is free in hugepages, which DPDK's programs (not ours) need. They are not mounted: all of these
/// programs run with `--in-memory`.
pub fn reserve_hugepages(mib: u32) -> Result<()> {
    let number = |name: &str| -> Result<u64> {
        let path = format!("{HUGEPAGES}/{name}");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        text.trim().parse().with_context(|| format!("no number in {path}"))
    };
    // What others have reserved and not touched yet is not free.
    let free = number("free_hugepages")?.saturating_sub(number("resv_hugepages")?);
    let needed = u64::from(mib) / HUGEPAGE_MIB;
    if free < needed {
        let more = number("nr_hugepages")? + needed - free;
        std::fs::write(format!("{HUGEPAGES}/nr_hugepages"), more.to_string()).context("cannot reserve hugepages")?;
    }
    Ok(())
}

/// A running OVS-DPDK with its own database.
#[derive(Debug)]
pub struct Ovs {
    // Dropped in this order.
    vswitchd: Process,
    _database: Process,
    // It makes links, one of its own and one for each bridge, which go with the namespace.
    _namespace: Namespace,
    scratch: Scratch,
    bridges: Vec<String>,
}

impl Ovs {
    /// Starts it on the switch's CPU; `tso` switches its userspace segmentation offload on.
    pub fn start(tso: bool) -> Result<Self> {
        reserve_hugepages(MEMORY_MIB)?;
        let scratch = Scratch::new("ovs")?;
        let namespace = Namespace::new()?;
        let database_file = scratch.join("conf.db").display().to_string();
        process::run("ovsdb-tool", &["create", &database_file, SCHEMA])?;
        let remote = format!("--remote=punix:{}", scratch.join("db.sock").display());
        let mut command = private("ovsdb-server", &namespace, &scratch);
        command.args([&database_file, &remote]);
        let mut database = Process::start("ovsdb-server", command, &scratch.join("ovsdb.log"), &[])?;
        wait::until_true("ovsdb-server to listen", Duration::from_secs(10), || {
            database.check_alive()?;
            Ok(scratch.join("db.sock").exists())
        })?;

        let cpu = machine::cpus()?.switch[0];
        let mask = format!("{:#x}", 1u64 << cpu);
        vsctl(&scratch, &["--no-wait", "init"])?;
        let settings = [
            "other_config:dpdk-init=true".to_owned(),
            format!("other_config:dpdk-lcore-mask={mask}"),
            format!("other_config:pmd-cpu-mask={mask}"),
            format!("other_config:dpdk-socket-mem={MEMORY_MIB}"),
            "other_config:dpdk-extra=--no-pci --in-memory --file-prefix=ovs".to_owned(),
            format!("other_config:userspace-tso-enable={tso}"),
        ];
        let mut set = vec!["--no-wait", "set", "Open_vSwitch", "."];
        set.extend(settings.iter().map(String::as_str));
        vsctl(&scratch, &set)?;
        let mut command = private(VSWITCHD, &namespace, &scratch);
        command.arg(format!("unix:{}", scratch.join("db.sock").display()));
        let vswitchd = Process::start("ovs-vswitchd", command, &scratch.join("vswitchd.log"), &[])?;
        Ok(Self { vswitchd, _database: database, _namespace: namespace, scratch, bridges: Vec::new() })
    }

    /// Adds a port that connects to `socket`; `extra` are settings such as `tag=10` or `mtu_request=9000`.
    pub fn add_port(&mut self, bridge: &str, name: &str, socket: &Path, extra: &[&str]) -> Result<()> {
        if !self.bridges.iter().any(|known| known == bridge) {
            self.bridges.push(bridge.to_owned());
            let kind = ["--", "set", "bridge", bridge, "datapath_type=netdev", "fail_mode=standalone"];
            vsctl(&self.scratch, &[&["add-br", bridge], &kind[..]].concat())?;
        }
        let path = format!("options:vhost-server-path={}", socket.display());
        let (interface, port): (Vec<&str>, Vec<&str>) = extra.iter().partition(|e| e.starts_with("mtu_request="));
        let kind = ["--", "set", "Interface", name, "type=dpdkvhostuserclient", &path];
        let arguments = [&["add-port", bridge, name], &port[..], &kind, &interface].concat();
        vsctl(&self.scratch, &arguments)
    }

    /// Changes a setting of a bridge, such as `other-config:mac-table-size=50000`.
    pub fn set_bridge(&self, bridge: &str, setting: &str) -> Result<()> {
        vsctl(&self.scratch, &["set", "bridge", bridge, setting])
    }

    /// Removes a port.
    pub fn del_port(&self, name: &str) -> Result<()> {
        vsctl(&self.scratch, &["del-port", name])
    }

    /// What it costs now, its database aside.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.vswitchd.pid())
    }

    /// What it has printed last.
    pub fn log_tail(&self) -> String {
        self.vswitchd.log_tail()
    }
}

fn private(program: &str, namespace: &Namespace, scratch: &Scratch) -> Command {
    let mut command = namespace.command(program);
    for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR"] {
        command.env(variable, scratch.path());
    }
    command
}

fn vsctl(scratch: &Scratch, arguments: &[&str]) -> Result<()> {
    let database = format!("--db=unix:{}", scratch.join("db.sock").display());
    process::run("ovs-vsctl", &[&["--timeout=30", &database], arguments].concat()).map(drop)
}
