//! A private OVS-DPDK, to compare with and to prove this harness by.

use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::process::{self, Process};
use crate::scratch::{self, Scratch};
use crate::{machine, wait};

const VSWITCHD: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
/// Links that OVS makes on the host, beside one per bridge.
const OVS_LINK: &str = "ovs-netdev";
/// 2 MiB pages: 512 MiB for OVS, as much again for a testpmd.
const HUGEPAGES: u32 = 1024;

/// Reserves hugepages, which DPDK's programs (not ours) need.
pub fn reserve_hugepages() -> Result<()> {
    let path = "/proc/sys/vm/nr_hugepages";
    let now: u32 = std::fs::read_to_string(path)?.trim().parse().context("cannot read the number of hugepages")?;
    if now < HUGEPAGES {
        std::fs::write(path, HUGEPAGES.to_string()).context("cannot reserve hugepages")?;
    }
    let mount = Path::new("/dev/hugepages");
    let is_mounted = std::fs::read_to_string("/proc/mounts")?.contains(" /dev/hugepages ");
    if !is_mounted {
        std::fs::create_dir_all(mount)?;
        process::run("mount", &["-t", "hugetlbfs", "none", "/dev/hugepages"])?;
    }
    Ok(())
}

/// A running OVS-DPDK with its own database.
#[derive(Debug)]
pub struct Ovs {
    // Dropped in this order.
    vswitchd: Process,
    _database: Process,
    scratch: Scratch,
    bridges: Vec<String>,
}

impl Ovs {
    /// Starts it on the switch's CPU; `tso` switches its userspace segmentation offload on.
    pub fn start(tso: bool) -> Result<Self> {
        reserve_hugepages()?;
        let scratch = Scratch::new("ovs")?;
        scratch::undo_at_end(&format!("ip link del {OVS_LINK}"))?;
        let database_file = scratch.join("conf.db").display().to_string();
        process::run("ovsdb-tool", &["create", &database_file, SCHEMA])?;
        let remote = format!("--remote=punix:{}", scratch.join("db.sock").display());
        let mut command = private("ovsdb-server", &scratch);
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
            "other_config:dpdk-socket-mem=512".to_owned(),
            "other_config:dpdk-extra=--no-pci --in-memory --file-prefix=ovs".to_owned(),
            format!("other_config:userspace-tso-enable={tso}"),
        ];
        let mut set = vec!["--no-wait", "set", "Open_vSwitch", "."];
        set.extend(settings.iter().map(String::as_str));
        vsctl(&scratch, &set)?;
        let mut command = private(VSWITCHD, &scratch);
        command.arg(format!("unix:{}", scratch.join("db.sock").display()));
        let vswitchd = Process::start("ovs-vswitchd", command, &scratch.join("vswitchd.log"), &[])?;
        Ok(Self { vswitchd, _database: database, scratch, bridges: Vec::new() })
    }

    /// Adds a port that connects to `socket`; `extra` are settings of the port such as `tag=10`.
    pub fn add_port(&mut self, bridge: &str, name: &str, socket: &Path, extra: &[&str]) -> Result<()> {
        if !self.bridges.iter().any(|known| known == bridge) {
            scratch::undo_at_end(&format!("ip link del {bridge}"))?;
            self.bridges.push(bridge.to_owned());
            let kind = ["--", "set", "bridge", bridge, "datapath_type=netdev", "fail_mode=standalone"];
            vsctl(&self.scratch, &[&["add-br", bridge], &kind[..]].concat())?;
        }
        let path = format!("options:vhost-server-path={}", socket.display());
        let mut arguments = vec!["add-port", bridge, name];
        arguments.extend(extra);
        arguments.extend(["--", "set", "Interface", name, "type=dpdkvhostuserclient", &path]);
        vsctl(&self.scratch, &arguments)
    }

    /// Removes a port.
    pub fn del_port(&self, name: &str) -> Result<()> {
        vsctl(&self.scratch, &["del-port", name])
    }

    /// What it has printed last.
    pub fn log_tail(&self) -> String {
        self.vswitchd.log_tail()
    }
}

impl Drop for Ovs {
    fn drop(&mut self) {
        let _ = self.vswitchd.terminate(Duration::from_secs(5));
        for link in self.bridges.iter().map(String::as_str).chain([OVS_LINK]) {
            // Gone already if OVS could clear up itself.
            let _ = process::run("ip", &["link", "del", link]);
        }
    }
}

fn private(program: &str, scratch: &Scratch) -> Command {
    let mut command = Command::new(program);
    for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR"] {
        command.env(variable, scratch.path());
    }
    command
}

fn vsctl(scratch: &Scratch, arguments: &[&str]) -> Result<()> {
    let database = format!("--db=unix:{}", scratch.join("db.sock").display());
    process::run("ovs-vsctl", &[&["--timeout=30", &database], arguments].concat()).map(drop)
}
