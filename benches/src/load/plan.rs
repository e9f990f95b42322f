//! What to generate.

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;

use super::frames::{Sizes, Stream};

/// What to generate, as options of the command line.
#[derive(Debug, Clone, Args, Serialize)]
pub struct Plan {
    /// Ports that send, in pairs: 0 and 1 send to each other, 2 and 3, ...
    #[arg(long, default_value_t = 2)]
    pub ports: u16,
    /// Queue pairs per port
    #[arg(long, default_value_t = 1)]
    pub queues: u16,
    /// Descriptors per ring
    #[arg(long, default_value_t = 1024)]
    pub ring: u16,
    /// Bytes of a frame without its checksum, or 'imix' (7 of 64 B, 4 of 590 B, 1 of 1514 B)
    #[arg(long, default_value = "64")]
    pub size: Sizes,
    /// MAC addresses, all ports together [default: one for each port]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    pub macs: u32,
    /// UDP flows per MAC address
    #[arg(long, default_value_t = 1)]
    pub flows: u32,
    /// Frames that each port keeps in flight; 0 keeps its transmit ring full, whatever gets lost
    #[arg(long, default_value_t = 256)]
    pub window: u32,
    /// Offer this many million frames per second, all ports together, instead of a window
    #[arg(long, value_name = "MPPS")]
    pub rate: Option<f64>,
    /// Packed rings
    #[arg(long)]
    pub packed: bool,
    /// Agree upon in-order use
    #[arg(long)]
    pub in_order: bool,
    /// Do not agree upon mergeable receive buffers
    #[arg(long)]
    pub no_mergeable: bool,
    /// Read the first line of each frame received and write that of each sent, as a real driver would
    #[arg(long)]
    pub touch: bool,
    /// Seconds to measure
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// Seconds to run before
    #[arg(long, default_value_t = 0.5)]
    pub warmup: f64,
    /// Measure the latency of every nth frame (a power of two)
    #[arg(long, value_name = "N")]
    pub latency: Option<u32>,
    /// Further ports that only stand beside
    #[arg(long, default_value_t = 0)]
    pub idle: u16,
    /// Two further ports, one of which sends this many million frames per second to the other
    #[arg(long, value_name = "MPPS")]
    pub flood: Option<f64>,
    /// The receiver of --flood does not take anything
    #[arg(long, requires = "flood")]
    pub stalled: bool,
    /// --flood sends broadcasts, which all ports get
    #[arg(long, requires = "flood")]
    pub broadcast: bool,
    /// Ports, from the first on, that share a log of dirty pages, as QEMU does while their guests migrate
    #[arg(long, value_name = "PORTS", default_value_t = 0, hide_default_value = true)]
    pub log: u16,
    /// CPU to run on
    #[arg(long)]
    pub cpu: Option<usize>,
    /// Sleep between turns, for a CPU shared with a worker of the switch; takes real-time priority
    #[arg(long, value_name = "MICROSECONDS")]
    pub nap: Option<u64>,
    /// Memory in pages of 4 KiB even if there are huge ones
    #[arg(long)]
    pub small_pages: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            ports: 2,
            queues: 1,
            ring: 1024,
            size: Sizes::Fixed(64),
            macs: 0,
            flows: 1,
            window: 256,
            rate: None,
            packed: false,
            in_order: false,
            no_mergeable: false,
            touch: false,
            seconds: 2.0,
            warmup: 0.5,
            latency: None,
            idle: 0,
            flood: None,
            stalled: false,
            broadcast: false,
            log: 0,
            cpu: None,
            nap: None,
            small_pages: false,
        }
    }
}

/// What a port is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// One of two that send to each other.
    Pair,
    /// Is there.
    Idle,
    /// Sends at the rate of `--flood`.
    Flooder,
    /// Is sent to by the flooder.
    Sink,
}

/// Frames sampled of those that arrive: one in so many, unless latency wants more.
const SAMPLE: u32 = 64;
/// Ports, so that MAC addresses and marks can tell them apart; what DPDK can do is less.
const MAX_PORTS: u32 = 1000;

impl Plan {
    /// Checks what options cannot check one by one.
    ///
    /// # Errors
    /// If the plan cannot be carried out.
    pub fn check(&self) -> Result<()> {
        let powers = self.ring.is_power_of_two() && (64..=32_768).contains(&self.ring);
        ensure!(powers, "--ring is a power of two from 64 to 32768");
        ensure!(self.ports.is_multiple_of(2) && self.ports > 0, "--ports is an even number: they send to each other");
        ensure!(self.total_ports() <= MAX_PORTS, "at most {MAX_PORTS} ports together");
        ensure!((1..=64).contains(&self.queues), "--queues is 1 to 64");
        ensure!((1..=60_000).contains(&self.flows), "--flows is 1 to 60000");
        ensure!(self.macs <= 1 << 20, "--macs is at most {}", 1 << 20);
        ensure!(self.seconds > 0.0 && self.warmup >= 0.0, "--seconds and --warmup are times");
        ensure!([self.rate, self.flood].iter().flatten().all(|rate| *rate > 0.0), "rates are more than 0");
        let sample = self.sample();
        ensure!(
            sample.is_power_of_two() && sample <= u32::from(self.ring),
            "--latency is a power of two, at most --ring"
        );
        Ok(())
    }

    /// All ports.
    pub fn total_ports(&self) -> u32 {
        u32::from(self.ports) + u32::from(self.idle) + if self.flood.is_some() { 2 } else { 0 }
    }

    /// What the port of this number is there for.
    pub fn role(&self, port: u16) -> Role {
        match port.checked_sub(self.ports) {
            None => Role::Pair,
            Some(beyond) if beyond < self.idle => Role::Idle,
            Some(beyond) if beyond == self.idle => Role::Flooder,
            Some(_) => Role::Sink,
        }
    }

    /// Whom a port sends to, if it sends, and whom it hears.
    pub fn peer(&self, port: u16) -> u16 {
        match self.role(port) {
            Role::Pair => port ^ 1,
            Role::Idle => 0,
            Role::Flooder => port + 1,
            Role::Sink => port - 1,
        }
    }

    /// MAC addresses of one of the ports that send.
    pub fn stations(&self, port: u16) -> u32 {
        if self.role(port) == Role::Pair { (self.macs / u32::from(self.ports)).max(1) } else { 1 }
    }

    /// What a port sends.
    pub fn stream(&self, port: u16) -> Stream {
        let broadcast = self.broadcast && self.role(port) == Role::Flooder;
        let pair = self.role(port) == Role::Pair;
        Stream {
            from: port,
            to: (!broadcast).then(|| self.peer(port)),
            stations: self.stations(port),
            flows: if pair { self.flows } else { 1 },
            sizes: if pair { self.size } else { Sizes::Fixed(64) },
        }
    }

    /// One in so many frames is looked at, and carries its time if latency is measured.
    pub fn sample(&self) -> u32 {
        self.latency.unwrap_or(SAMPLE)
    }

    /// virtio features that a port agrees upon.
    pub fn features(&self, port: u16) -> u64 {
        let bit = |wanted: bool, bit: u32| if wanted { 1u64 << bit } else { 0 };
        let (mergeable, multi_queue) = (!self.no_mergeable, self.queues > 1);
        let logged = port < self.log;
        bit(logged, 26)
            | bit(true, 32)
            | bit(mergeable, 15)
            | bit(multi_queue, 22)
            | bit(self.packed, 34)
            | bit(self.in_order, 35)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_have_roles_and_peers() {
        let plan = Plan { ports: 4, idle: 2, flood: Some(1.0), ..Plan::default() };
        plan.check().unwrap();
        let roles: Vec<_> = (0..8).map(|port| plan.role(port)).collect();
        use Role::*;
        assert_eq!(roles, [Pair, Pair, Pair, Pair, Idle, Idle, Flooder, Sink]);
        assert_eq!((0..4).map(|port| plan.peer(port)).collect::<Vec<_>>(), [1, 0, 3, 2]);
        assert_eq!((plan.peer(6), plan.peer(7)), (7, 6));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for plan in [
            Plan { ports: 3, ..Plan::default() },
            Plan { ring: 1000, ..Plan::default() },
            Plan { latency: Some(3), ..Plan::default() },
            Plan { rate: Some(0.0), ..Plan::default() },
            Plan { idle: 2000, ..Plan::default() },
        ] {
            assert!(plan.check().is_err(), "{plan:?}");
        }
    }
}
