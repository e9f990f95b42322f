//! Two namespaces with a switch and a guest each, and what lies between them.

use anyhow::{Context, Result};
use e2e::lab::{Lab, mac};
use e2e::machine;
use e2e::net::Namespace;
use e2e::process::Process;
use e2e::qemu::{GuestSpec, Nic};
use e2e::scratch::Scratch;
use e2e::switch::{Switch, program};
use e2e::wait;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Number of the plain host on the wire, where there is one, in the guests' networks.
pub(crate) const HOST: u8 = 100;
/// Says which kind of port the uplinks are: `afxdp` (if it is not set) or `dpdk`.
const KIND: &str = "SLUICE_UPLINK";
/// Largest MTU of wires and devices; guests use less of it.
pub(crate) const MTU: usize = 9000;

/// What joins the switches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wire {
    /// One veth pair.
    Direct,
    /// A bridge of Linux, which is a plain host as well.
    Bridge,
}

/// The guests are both in `near`, as `vm1` and `vm2`, but `vm2` is on the `far` switch.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(crate) near: Lab,
    pub(crate) far: Switch,
    pub(crate) between: Namespace,
    ends: [Namespace; 2],
    layout: Wire,
    vlan: Option<u16>,
    scratch: Scratch,
}

impl Rig {
    fn new() -> Result<Self> {
        let (ends, between) = ([Namespace::new()?, Namespace::new()?], Namespace::new()?);
        for end in &ends {
            // The switches' hosts have nothing to say of their own, such as which multicast groups they are in.
            end.run("for k in all default; do echo 1 >/proc/sys/net/ipv6/conf/$k/disable_ipv6; done")?;
        }
        // DPDK's ports, which are added later, do not go with a sandbox.
        let arguments: &[&str] = if is_dpdk() { &["--sandbox", "off"] } else { &["--sandbox", "strict"] };
        let mut near = Lab::around(Switch::start_in(&ends[0], arguments)?)?;
        let far = Switch::start_in(&ends[1], arguments)?;
        for number in 1..=2 {
            let name = format!("vm{number}");
            let nic = Nic::new(&near.socket(&name), &mac(number)).with(&format!("host_mtu={MTU}"));
            near.guests.push(GuestSpec::new(&name).nic(nic).start()?);
        }
        let scratch = Scratch::new("rig")?;
        let mut rig = Self { near, far, between, ends, layout: Wire::Direct, vlan: None, scratch };
        rig.add_guests_ports()?;
        rig.near.boot()?;
        for guest in &rig.near.guests {
            // An emulated guest takes its time to read: what it has not read yet is not to be lost.
            guest.run("echo 2097152 >/proc/sys/net/core/rmem_max; echo 2097152 >/proc/sys/net/core/wmem_max")?;
        }
        Ok(rig)
    }

    /// Lays a wire, with the guests in a VLAN on it or in none.
    pub(crate) fn lay(&mut self, layout: Wire, vlan: Option<u16>) -> Result<()> {
        self.cut()?;
        for (switch, port) in [(self.near.switch()?, "vm1"), (&self.far, "vm2")] {
            switch.del_port(port)?;
            // There is none the first time.
            let _ = switch.del_port("up");
        }
        (self.layout, self.vlan) = (layout, vlan);
        self.add_guests_ports()?;
        self.wire()?;
        let trunk = vlan.map(|vlan| format!(",trunk={vlan}")).unwrap_or_default();
        for (switch, end) in [self.near.switch()?, &self.far].into_iter().zip(&self.ends) {
            if !is_dpdk() {
                switch.add_port(&format!("up=afxdp:up0{trunk}"))?;
                continue;
            }
            // A tap of DPDK's, which a bridge joins to the wire. Its driver knows no jumbo frames.
            switch.add_port(&format!("up=dpdk:net_tap0,iface=tap0{trunk}"))?;
            end.run(&format!(
                "set -e; ip link add join mtu {MTU} type bridge mcast_snooping 0; ip link set join addrgenmode none up
                 for port in tap0 up0; do ip link set $port master join addrgenmode none up; done"
            ))?;
        }
        self.wait_up()
    }

    fn add_guests_ports(&mut self) -> Result<()> {
        let access = self.vlan.map(|vlan| format!(",vlan={vlan}")).unwrap_or_default();
        for (switch, port) in [(self.near.switch()?, "vm1"), (&self.far, "vm2")] {
            switch.add_port(&format!("{port}=vhost-user:{}{access}", self.near.socket(port).display()))?;
        }
        Ok(())
    }

    /// Makes the links between the switches.
    pub(crate) fn wire(&self) -> Result<()> {
        let [near, far] = &self.ends;
        if self.layout == Wire::Direct {
            return near.wire("up0", far, "up0", MTU);
        }
        self.between.run(&format!("ip link add br0 mtu {MTU} type bridge && ip link set br0 addrgenmode none up"))?;
        for (end, port) in [(near, "port1"), (far, "port2")] {
            end.wire("up0", &self.between, port, MTU)?;
            self.between.run(&format!("ip link set {port} master br0"))?;
        }
        // The same address each time, or guests would for a while send to that of the bridge before.
        self.between.run(&format!(
            "set -e; ip link set br0 address 02:00:00:00:00:64
             ip addr add 10.0.0.{HOST}/24 dev br0; ip addr add fd00::{HOST}/64 dev br0 nodad"
        ))?;
        Ok(())
    }

    /// Removes what `wire` has made.
    pub(crate) fn cut(&self) -> Result<()> {
        // What is not there is cut already.
        let [near, far] = &self.ends;
        let links = [(near, "up0"), (far, "up0"), (near, "join"), (far, "join"), (&self.between, "br0")];
        for (namespace, link) in links {
            let _ = namespace.run(&format!("ip link del {link}"));
        }
        Ok(())
    }

    /// Waits until all ports are up.
    pub(crate) fn wait_up(&self) -> Result<()> {
        for (switch, port) in [(self.near.switch()?, "vm1"), (&self.far, "vm2")] {
            switch.wait_port(port, "up")?;
            switch.wait_port("up", "up")?;
        }
        Ok(())
    }

    /// Gives the guests and the plain host this MTU.
    pub(crate) fn set_mtu(&self, mtu: usize) -> Result<()> {
        for guest in &self.near.guests {
            guest.run(&format!("ip link set eth0 mtu {mtu}"))?;
        }
        if self.layout == Wire::Bridge {
            // Its route, rather than the bridge itself, which has to pass larger ones.
            for prefix in ["10.0.0.0/24", "fd00::/64 metric 256"] {
                self.between.run(&format!("ip route replace {prefix} dev br0 mtu {mtu}"))?;
            }
        }
        Ok(())
    }

    /// What the kernel of the plain host has counted of checksums that are wrong.
    pub(crate) fn checksum_errors(&self) -> Result<u64> {
        let snmp = self.between.run("cat /proc/net/snmp /proc/net/snmp6")?;
        let mut sum = 0;
        let mut lines = snmp.lines();
        while let Some(line) = lines.next() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                [name, value] if name.ends_with("InCsumErrors") => sum += value.parse::<u64>()?,
                [_, names @ ..] if line.contains("InCsumErrors") => {
                    let values = lines.next().context("no values in /proc/net/snmp")?;
                    let named = names.iter().zip(values.split_whitespace().skip(1));
                    for (_, value) in named.filter(|(name, _)| **name == "InCsumErrors") {
                        sum += value.parse::<u64>()?;
                    }
                }
                _ => {}
            }
        }
        Ok(sum)
    }

    /// Begins to capture a port's frames into a file.
    pub(crate) fn capture(&self, switch: &Switch, port: &str, file: &Path, options: &[&str]) -> Result<Process> {
        let _ = std::fs::remove_file(file);
        let mut command = Command::new(program()?);
        command.args(["capture", port]).arg("--write").arg(file).arg("--socket").arg(switch.control()).args(options);
        let mut process = Process::start("sluice capture", command, &self.scratch.join("capture.log"), &[])?;
        wait::until_true("the capture to begin", Duration::from_secs(10), || {
            process.check_alive()?;
            Ok(file.metadata().is_ok_and(|file| file.len() > 0))
        })?;
        Ok(process)
    }

    /// Ends a capture; it has lost nothing.
    pub(crate) fn end(&self, mut capture: Process) -> Result<()> {
        // What has passed is on its way to the file for a moment.
        std::thread::sleep(Duration::from_millis(200));
        let status = capture.terminate(Duration::from_secs(5))?;
        anyhow::ensure!(status.success() && capture.log().ends_with(" 0 lost\n"), "{status}: {}", capture.log_tail());
        Ok(())
    }

    fn diagnosis(&self) -> String {
        let ports = self.far.json(&["port", "list"]).map_or_else(|e| e.to_string(), |ports| format!("{ports:#}"));
        format!("{}\n--- far ports:\n{ports}\n--- far switch:\n{}", self.near.diagnosis(), self.far.log_tail())
    }
}

/// Whether uplinks are DPDK's taps.
pub(crate) fn is_dpdk() -> bool {
    std::env::var(KIND).is_ok_and(|kind| kind == "dpdk")
}

/// Runs a test on the rig that all tests share; one that fails says what it left, and the next gets a new one.
pub(crate) fn test(test: impl FnOnce(&mut Rig) -> Result<()>) -> Result<()> {
    static RIG: Mutex<Option<Rig>> = Mutex::new(None);
    let _turn = machine::exclusive()?;
    let mut slot = RIG.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rig = match slot.take() {
        Some(rig) => rig,
        None => Rig::new()?,
    };
    if let Err(error) = test(&mut rig) {
        println!("{error:#}\n{}", rig.diagnosis());
        return Err(error);
    }
    *slot = Some(rig);
    Ok(())
}
