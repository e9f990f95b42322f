//! A switch with guests around it, and what tests do with them.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::machine;
use crate::peer::Ovs;
use crate::qemu::{BOOT_LIMIT, ECHO_PORT, Guest, GuestSpec, Nic};
use crate::scratch::Scratch;
use crate::switch::Switch;
use crate::wait;

/// Frames per batch: well below the 256 descriptors of a guest's queue, so that no full queue drops any.
const BATCH: usize = 64;
const ARRIVAL_LIMIT: Duration = Duration::from_secs(10);

/// What the guests are connected to. The peer is there to prove the tests themselves.
#[derive(Debug)]
pub enum Fabric {
    /// The switch under test.
    Sluice(Switch),
    /// OVS-DPDK, when the environment says `E2E_SWITCH=ovs` or `ovs-tso`.
    Ovs(Ovs),
}

impl From<Switch> for Fabric {
    fn from(switch: Switch) -> Self {
        Self::Sluice(switch)
    }
}

/// A switch with guests around it.
#[derive(Debug)]
pub struct Lab {
    /// The guests, in the order they were added.
    pub guests: Vec<Guest>,
    /// The switch.
    pub fabric: Fabric,
    scratch: Scratch,
}

impl Lab {
    /// Starts a switch; `arguments` are those of `sluice run` beside the paths.
    pub fn new(arguments: &[&str]) -> Result<Self> {
        let fabric = match std::env::var("E2E_SWITCH").as_deref() {
            Ok("ovs") => Fabric::Ovs(Ovs::start(false)?),
            Ok("ovs-tso") => Fabric::Ovs(Ovs::start(true)?),
            _ => Fabric::Sluice(Switch::start(arguments)?),
        };
        Self::around(fabric)
    }

    /// A lab around a switch that runs already.
    pub fn around(fabric: impl Into<Fabric>) -> Result<Self> {
        Ok(Self { guests: Vec::new(), fabric: fabric.into(), scratch: Scratch::new("lab")? })
    }

    /// Two guests `vm1` and `vm2` with addresses 10.0.0.1 and 10.0.0.2, fd00::1 and fd00::2, ready to talk.
    pub fn pair() -> Result<Self> {
        Self::pair_with("")
    }

    /// [`Lab::pair`] with further properties of the guests' devices, such as `packed=on`.
    pub fn pair_with(properties: &str) -> Result<Self> {
        let mut lab = Self::new(&[])?;
        for number in 1..=2 {
            lab.add_guest(number, "", GuestSpec::new(&format!("vm{number}")), properties)?;
        }
        lab.boot()?;
        Ok(lab)
    }

    /// Where QEMU listens for the port of this name.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.scratch.join(format!("{name}.sock"))
    }

    /// The switch under test.
    pub fn switch(&self) -> Result<&Switch> {
        match &self.fabric {
            Fabric::Sluice(switch) => Ok(switch),
            Fabric::Ovs(_) => Err(anyhow::anyhow!("this test looks inside our switch; unset E2E_SWITCH")),
        }
    }

    /// [`Lab::switch`], to restart it.
    pub fn switch_mut(&mut self) -> Result<&mut Switch> {
        match &mut self.fabric {
            Fabric::Sluice(switch) => Ok(switch),
            Fabric::Ovs(_) => Err(anyhow::anyhow!("this test looks inside our switch; unset E2E_SWITCH")),
        }
    }

    /// Adds a vhost-user port; `settings` as in a SPEC, such as `network=blue,vlan=10`.
    pub fn add_port(&mut self, name: &str, settings: &str) -> Result<()> {
        let socket = self.socket(name);
        match &mut self.fabric {
            Fabric::Sluice(switch) => {
                let comma = if settings.is_empty() { "" } else { "," };
                switch.add_port(&format!("{name}=vhost-user:{}{comma}{settings}", socket.display()))
            }
            Fabric::Ovs(ovs) => add_ovs_port(ovs, name, &socket, settings),
        }
    }

    /// Removes a port.
    pub fn del_port(&self, name: &str) -> Result<()> {
        match &self.fabric {
            Fabric::Sluice(switch) => switch.del_port(name),
            Fabric::Ovs(ovs) => ovs.del_port(name),
        }
    }

    /// Gives the guests' ports new settings, in their order.
    pub fn set_ports(&mut self, settings: &[&str]) -> Result<()> {
        for (number, settings) in (1..).zip(settings) {
            self.del_port(&format!("vm{number}"))?;
            self.add_port(&format!("vm{number}"), settings)?;
        }
        Ok(())
    }

    /// Starts a guest (not waiting for its boot) with one device, and the port for it.
    pub fn add_guest(&mut self, number: usize, settings: &str, spec: GuestSpec, properties: &str) -> Result<()> {
        let nic = Nic::new(&self.socket(&format!("vm{number}")), &mac(number)).with(properties);
        self.add_guest_with(number, settings, spec.nic(nic))
    }

    /// [`Lab::add_guest`] with a device described by the caller.
    pub fn add_guest_with(&mut self, number: usize, settings: &str, spec: GuestSpec) -> Result<()> {
        self.add_port(&format!("vm{number}"), settings)?;
        self.guests.push(spec.start()?);
        Ok(())
    }

    /// Waits until all guests are up and gives each its addresses: 10.0.0.N and fd00::N for the Nth.
    pub fn boot(&mut self) -> Result<()> {
        // The switch has nothing to do yet.
        self.guests.iter().try_for_each(|guest| guest.spread(true))?;
        for guest in &mut self.guests {
            guest.wait_ready(BOOT_LIMIT)?;
        }
        self.guests.iter().try_for_each(|guest| guest.spread(false))?;
        for index in 0..self.guests.len() {
            self.configure(index)?;
        }
        Ok(())
    }

    /// Gives a freshly booted guest its addresses.
    pub fn configure(&self, index: usize) -> Result<()> {
        let (guest, number) = (&self.guests[index], index + 1);
        guest.set_address("eth0", &format!("10.0.0.{number}/24"))?;
        guest.run(&format!("ip addr add fd00::{number}/64 dev eth0")).map(drop)
    }

    /// Waits until the guest reaches the address, as it does once its port is up.
    pub fn wait_reachable(&self, from: usize, address: &str) -> Result<()> {
        let what = format!("{} to reach {address}", self.guests[from].name());
        wait::until_true(&what, BOOT_LIMIT, || Ok(self.guests[from].run(&format!("ping -c 1 -W 1 {address}")).is_ok()))
    }

    /// Whether the guest's echo requests to the address are answered at all.
    pub fn reaches(&self, from: usize, address: &str) -> bool {
        self.guests[from].run(&format!("ping -c 3 -i 0.2 -W 1 {address}")).is_ok()
    }

    /// Sends messages of these sizes from one guest and checks their echoes by another (see the agent's `echo_check`).
    pub fn echo(&self, from: usize, proto: &str, address: &str, sizes: &[usize]) -> Result<Value> {
        let request = json!({"op": "echo_check", "proto": proto, "to": format!("{address}:{ECHO_PORT}"), "sizes": sizes, "window": 1});
        self.guests[from].call_for(&request, Duration::from_secs(120))
    }

    /// [`Lab::echo`] that demands that everything comes back once and whole.
    pub fn check_echo(&self, from: usize, proto: &str, address: &str, sizes: &[usize]) -> Result<()> {
        let tally = self.echo(from, proto, address, sizes)?;
        let good = tally["received"] == sizes.len() && tally["corrupt"] == 0 && tally["duplicates"] == 0;
        ensure!(good, "{proto} echo from {} to {address}: {tally}", self.guests[from].name());
        Ok(())
    }

    /// Sends one checkable raw frame per size, batch by batch, and demands that each arrives once and whole.
    pub fn check_frames(&self, from: usize, to: usize, stream: u32, sizes: &[usize]) -> Result<()> {
        let (sender, receiver) = (&self.guests[from], &self.guests[to]);
        receiver.call(&json!({"op": "frames_watch", "dev": "eth0", "stream": stream}))?;
        for (batch, part) in sizes.chunks(BATCH).enumerate() {
            let first = batch * BATCH;
            sender.call(&json!({"op": "frames_send", "dev": "eth0", "dst": receiver.mac(), "src": sender.mac(),
                "stream": stream, "first": first, "sizes": part}))?;
            let complete = first + part.len();
            let arrived = wait::until_true("frames to arrive", ARRIVAL_LIMIT, || {
                Ok(frames_seen(receiver, "eth0", stream)?["received"].as_u64() >= Some(complete as u64))
            });
            let seen = frames_seen(receiver, "eth0", stream)?;
            arrived.with_context(|| format!("of sizes {part:?}, {first} before; seen {seen}"))?;
            let good = seen["received"] == complete && seen["distinct"] == complete && seen["corrupt"] == 0;
            ensure!(good, "frames from {} to {}: {seen}, {complete} sent", sender.name(), receiver.name());
        }
        Ok(())
    }

    /// Starts an iperf3 server in a guest, for one run.
    pub fn serve_iperf(&self, guest: usize) -> Result<()> {
        let listening = "while ! netstat -ltn | grep -q :5201; do usleep 20000; done";
        self.guests[guest].run(&format!("killall -q iperf3; iperf3 -s -D -1 && {listening}")).map(drop)
    }

    /// TCP throughput in Mbit/s between two guests, the first sending.
    pub fn iperf(&self, from: usize, to: usize, seconds: u32, extra: &str) -> Result<f64> {
        self.serve_iperf(to)?;
        let limit = Duration::from_secs(u64::from(seconds) + 30);
        let command = format!("iperf3 -J -c 10.0.0.{} -t {seconds} {extra}", to + 1);
        iperf_rate(&self.guests[from].run_for(&command, limit)?)
    }

    /// What helps to see why something did not work.
    pub fn diagnosis(&self) -> String {
        let mut text = match &self.fabric {
            Fabric::Sluice(switch) => {
                let ports = switch.json(&["port", "list"]).map_or_else(|e| e.to_string(), |ports| format!("{ports:#}"));
                format!("--- ports:\n{ports}\n--- switch:\n{}", switch.log_tail())
            }
            Fabric::Ovs(ovs) => format!("--- OVS:\n{}", ovs.log_tail()),
        };
        for guest in &self.guests {
            text.push('\n');
            text.push_str(&guest.diagnosis());
        }
        text
    }
}

/// The Mbit/s that were received, from what `iperf3 -J` printed.
pub fn iperf_rate(text: &str) -> Result<f64> {
    let report: Value = serde_json::from_str(text).context("iperf3 printed no JSON")?;
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(rate.with_context(|| format!("iperf3 gave no rate: {text}"))? / 1e6)
}

/// The Nth guest's MAC address.
pub fn mac(number: usize) -> String {
    format!("02:00:00:00:00:{number:02x}")
}

/// What a guest has recorded of a stream.
pub fn frames_seen(guest: &Guest, dev: &str, stream: u32) -> Result<Value> {
    guest.call(&json!({"op": "frames_seen", "dev": dev, "stream": stream}))
}

/// Our settings in OVS's words.
fn add_ovs_port(ovs: &mut Ovs, name: &str, socket: &Path, settings: &str) -> Result<()> {
    let (mut bridge, mut extra, mut trunks) = ("br0".to_owned(), Vec::new(), Vec::new());
    for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
        match setting.split_once('=') {
            Some(("network", network)) => bridge = format!("br-{network}"),
            Some(("vlan", vlan)) => extra.push(format!("tag={vlan}")),
            Some(("mtu", mtu)) => extra.push(format!("mtu_request={mtu}")),
            Some(("trunk", vlans)) => trunks.extend(range(vlans)),
            // The list of a trunk goes on.
            None => trunks.extend(range(setting)),
            // The rest has no counterpart, or needs none.
            _ => (),
        }
    }
    if !trunks.is_empty() {
        extra.push(format!("trunks={}", trunks.join(",")));
    }
    ovs.add_port(&bridge, name, socket, &extra.iter().map(String::as_str).collect::<Vec<_>>())
}

/// OVS knows no ranges such as `20-29`.
fn range(text: &str) -> Vec<String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse::<u16>(), last.parse::<u16>()) {
        (Ok(first), Ok(last)) => (first..=last).map(|vlan| vlan.to_string()).collect(),
        _ => vec![text.to_owned()],
    }
}

/// Runs a test on a lab of its own; a test that fails says what it left.
pub fn alone(make: impl FnOnce() -> Result<Lab>, test: impl FnOnce(&mut Lab) -> Result<()>) -> Result<()> {
    let _turn = machine::exclusive()?;
    judge(make()?, test).map(drop)
}

fn judge(mut lab: Lab, test: impl FnOnce(&mut Lab) -> Result<()>) -> Result<Lab> {
    match test(&mut lab) {
        Ok(()) => Ok(lab),
        Err(error) => {
            println!("{error:#}\n{}", lab.diagnosis());
            Err(error)
        }
    }
}

/// A lab that the tests of one file share: made by the first, and anew after one that failed.
pub struct Shared {
    lab: Mutex<Option<Lab>>,
    make: fn() -> Result<Lab>,
}

impl Shared {
    /// Nothing runs yet; `make` does it when it is needed.
    pub const fn new(make: fn() -> Result<Lab>) -> Self {
        Self { lab: Mutex::new(None), make }
    }

    /// Runs a test on the lab, one at a time.
    pub fn test(&self, test: impl FnOnce(&mut Lab) -> Result<()>) -> Result<()> {
        let _turn = machine::exclusive()?;
        let mut slot = self.lab.lock().unwrap_or_else(PoisonError::into_inner);
        let lab = match slot.take() {
            Some(lab) => lab,
            None => (self.make)()?,
        };
        *slot = Some(judge(lab, test)?);
        Ok(())
    }
}
