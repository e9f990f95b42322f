//! A port in words: `NAME=KIND:TARGET[,key=value]...`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{
    AfxdpMode, Carried, DEFAULT_NETWORK, InvalidPort, PortConfig, PortTarget, RateLimit, SocketMode, VlanMode, number,
    parse_switch,
};
use crate::limits::{MAX_QUEUE_PAIRS, MAX_VLAN, MIN_MTU};
use crate::wire::MacAddr;

/// A port's configuration as words, before any of them is understood. SPEC and the file both fill this, so that they
/// mean the same.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortText {
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: String,
    /// Socket path or interface.
    pub target: String,
    /// The rest, by key of [`PortText::KEYS`], in the order given.
    pub options: Vec<(&'static str, String)>,
}

impl PortText {
    /// The optional keys.
    pub const KEYS: &'static [&'static str] = &[
        "mode",
        "network",
        "vlan",
        "trunk",
        "networks",
        "mtu",
        "queues",
        "mac",
        "spoofcheck",
        "rate-rx",
        "burst-rx",
        "rate-tx",
        "burst-tx",
        "owner",
        "replace",
        "busy-poll",
        "tx-checksum",
    ];

    /// Splits a SPEC into its words.
    ///
    /// # Errors
    /// If it does not have the form of a SPEC, or has an unknown or repeated key.
    pub fn from_spec(spec: &str) -> Result<Self, InvalidPort> {
        let form =
            || InvalidPort::new("target", format!("'{spec}' is not of the form NAME=KIND:TARGET[,key=value]..."));
        let (name, rest) = spec.split_once('=').ok_or_else(form)?;
        let (target, options) = rest.split_once(',').map_or((rest, None), |(target, rest)| (target, Some(rest)));
        let (kind, target) = target.split_once(':').ok_or_else(form)?;
        let mut text = Self { name: name.into(), kind: kind.into(), target: target.into(), options: Vec::new() };
        for part in options.into_iter().flat_map(|options| options.split(',')) {
            text.add_part(part)?;
        }
        Ok(text)
    }

    /// Takes one part between commas: `key=value`, or a further value of a list.
    fn add_part(&mut self, part: &str) -> Result<(), InvalidPort> {
        match (part.split_once('='), self.options.last_mut()) {
            // What is no key of ours is an argument of the device.
            (argument, None) if self.kind == "dpdk" && argument.is_none_or(|(key, _)| !Self::KEYS.contains(&key)) => {
                self.target.push(',');
                self.target.push_str(part);
                Ok(())
            }
            (Some((key, value)), _) => self.set(key, value),
            (None, Some(("trunk" | "networks", list))) => {
                list.push(',');
                list.push_str(part);
                Ok(())
            }
            _ => Err(InvalidPort::new("target", format!("'{part}' is not of the form key=value"))),
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), InvalidPort> {
        let Some(key) = Self::KEYS.iter().copied().find(|known| *known == key) else {
            let problem = format!("unknown key '{key}'; the keys are {}", Self::KEYS.join(", "));
            return Err(InvalidPort::new("target", problem));
        };
        if self.get(key).is_some() {
            return Err(InvalidPort::new(key, format!("{key} is given twice")));
        }
        self.options.push((key, value.into()));
        Ok(())
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.options.iter().find(|(known, _)| *known == key).map(|(_, value)| value.as_str())
    }

    /// Makes a relative socket path absolute.
    #[must_use]
    pub fn relative_to(mut self, base: &Path) -> Self {
        // `join` with an empty path would add a slash, and hide that the target is missing.
        if self.kind == "vhost-user"
            && !self.target.is_empty()
            && let Some(path) = base.join(&self.target).to_str()
        {
            self.target = path.into();
        }
        self
    }

    /// Understands the words and checks every rule.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn parse(&self) -> Result<PortConfig, InvalidPort> {
        let vlan = self.parse_vlans()?;
        let network = if matches!(vlan, VlanMode::Networks(_)) { "" } else { DEFAULT_NETWORK };
        let config = PortConfig {
            name: self.name.clone(),
            target: self.parse_target()?,
            network: self.get("network").unwrap_or(network).into(),
            vlan,
            mtu: self.parse_number("mtu", MIN_MTU, u16::MAX)?,
            queues: self.parse_number("queues", 1, MAX_QUEUE_PAIRS as u16)?,
            mac: self.get("mac").map(parse_mac).transpose()?,
            spoofcheck: self.parse_switch("spoofcheck")?,
            rate_rx: self.parse_rate("rate-rx", "burst-rx")?,
            rate_tx: self.parse_rate("rate-tx", "burst-tx")?,
            owner: self.get("owner").map(Into::into),
        };
        config.validate()?;
        Ok(config)
    }

    fn parse_target(&self) -> Result<PortTarget, InvalidPort> {
        let mode = self.get("mode");
        let foreign = ["replace", "busy-poll", "tx-checksum"].into_iter().find(|key| self.get(key).is_some());
        if let Some(key) = foreign.filter(|_| self.kind != "afxdp") {
            return Err(InvalidPort::new(key, format!("{key} is for ports of kind afxdp only")));
        }
        match self.kind.as_str() {
            "vhost-user" => Ok(PortTarget::VhostUser {
                path: PathBuf::from(&self.target),
                mode: mode.map_or(Ok(SocketMode::Client), parse_mode)?,
            }),
            "tap" if mode.is_some() => {
                Err(InvalidPort::new("mode", "mode is for ports of kind vhost-user and afxdp only"))
            }
            "tap" => Ok(PortTarget::Tap { interface: self.target.clone() }),
            "afxdp" => Ok(PortTarget::Afxdp {
                interface: self.target.clone(),
                mode: mode.map_or(Ok(AfxdpMode::Auto), parse_afxdp_mode)?,
                replace: self.parse_switch("replace")?,
                busy_poll: self.parse_switch("busy-poll")?,
                tx_checksum: self.get("tx-checksum").map(|_| self.parse_switch("tx-checksum")).transpose()?,
            }),
            "dpdk" if mode.is_some() => {
                Err(InvalidPort::new("mode", "mode is for ports of kind vhost-user and afxdp only"))
            }
            "dpdk" => Ok(PortTarget::Dpdk { device: self.target.clone() }),
            other => Err(InvalidPort::new("kind", format!("unknown kind '{other}'; use vhost-user, tap or afxdp"))),
        }
    }

    fn parse_switch(&self, key: &'static str) -> Result<bool, InvalidPort> {
        let parsed = self.get(key).map_or(Ok(false), |text| parse_switch(key, text));
        parsed.map_err(|problem| InvalidPort::new(key, problem))
    }

    fn parse_vlans(&self) -> Result<VlanMode, InvalidPort> {
        if let Some(list) = self.get("networks") {
            if let Some(key) = ["vlan", "trunk"].into_iter().find(|key| self.get(key).is_some()) {
                return Err(InvalidPort::new(key, format!("networks takes the place of {key}; leave one of them out")));
            }
            return list.split(',').map(parse_carried).collect::<Result<_, _>>().map(VlanMode::Networks);
        }
        let vlan = self.parse_number("vlan", 1, MAX_VLAN)?;
        match (vlan, self.get("trunk")) {
            (None, None) => Ok(VlanMode::All),
            (Some(vlan), None) => Ok(VlanMode::Access(vlan)),
            (native, Some(list)) => Ok(VlanMode::Trunk { native, allowed: parse_vlan_list(list)? }),
        }
    }

    fn parse_rate(&self, rate: &'static str, burst: &'static str) -> Result<Option<RateLimit>, InvalidPort> {
        let parse = |key| self.get(key).map(|text| parse_bits(key, text)).transpose();
        match (parse(rate)?, parse(burst)?) {
            (Some(bits_per_second), burst_bits) => Ok(Some(RateLimit { bits_per_second, burst_bits })),
            (None, Some(_)) => Err(InvalidPort::new(burst, format!("{burst} needs a rate; add {rate}=…"))),
            (None, None) => Ok(None),
        }
    }

    fn parse_number(&self, key: &'static str, low: u16, high: u16) -> Result<Option<u16>, InvalidPort> {
        let parse = |text| number(key, text, low..=high).map_err(|problem| InvalidPort::new(key, problem));
        self.get(key).map(parse).transpose()
    }
}

fn parse_mode(text: &str) -> Result<SocketMode, InvalidPort> {
    match text {
        "client" => Ok(SocketMode::Client),
        "server" => Ok(SocketMode::Server),
        _ => Err(InvalidPort::new("mode", format!("mode must be client or server, not '{text}'"))),
    }
}

fn parse_afxdp_mode(text: &str) -> Result<AfxdpMode, InvalidPort> {
    let problem = || format!("mode must be auto, zerocopy, copy or skb, not '{text}'");
    AfxdpMode::from_name(text).ok_or_else(|| InvalidPort::new("mode", problem()))
}

/// A number of bits like `1500`, `10K`, `500M` or `2G`.
fn parse_bits(key: &'static str, text: &str) -> Result<u64, InvalidPort> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1000),
        Some(b'M') => (&text[..text.len() - 1], 1_000_000),
        Some(b'G') => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    let wrong = || InvalidPort::new(key, format!("{key} must be a number of bits like 500M or 10G, not '{text}'"));
    let number: u64 = number(key, digits, 0..=u64::MAX).map_err(|_| wrong())?;
    number.checked_mul(unit).ok_or_else(wrong)
}

/// A number of bits in the shortest exact form, like `500M`.
pub fn bits(number: u64) -> String {
    match number {
        0 => "0".into(),
        _ if number.is_multiple_of(1_000_000_000) => format!("{}G", number / 1_000_000_000),
        _ if number.is_multiple_of(1_000_000) => format!("{}M", number / 1_000_000),
        _ if number.is_multiple_of(1000) => format!("{}K", number / 1000),
        _ => number.to_string(),
    }
}

/// A port's address, as every source writes it.
pub(crate) fn parse_mac(text: &str) -> Result<MacAddr, InvalidPort> {
    text.parse()
        .map_err(|_| InvalidPort::new("mac", format!("mac must be an address like 52:54:00:12:34:56, not '{text}'")))
}

/// `10,20-29`, in any order; the result is sorted and without duplicates.
fn parse_vlan_list(list: &str) -> Result<Vec<u16>, InvalidPort> {
    let wrong = |problem| InvalidPort::new("trunk", problem);
    let mut vlans = Vec::new();
    for item in list.split(',') {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let first = number("trunk", first, 1..=MAX_VLAN).map_err(wrong)?;
        let last = number("trunk", last, 1..=MAX_VLAN).map_err(wrong)?;
        if first > last {
            return Err(wrong(format!("trunk has the range {item} the wrong way round; write {last}-{first}")));
        }
        vlans.extend(first..=last);
    }
    vlans.sort_unstable();
    vlans.dedup();
    Ok(vlans)
}

/// `blue:100`, or `blue` for one without a tag.
fn parse_carried(text: &str) -> Result<Carried, InvalidPort> {
    let (network, vlan) = text.split_once(':').map_or((text, None), |(network, vlan)| (network, Some(vlan)));
    let vlan = vlan.map(|vlan| number("the VLAN of a network", vlan, 1..=MAX_VLAN)).transpose();
    Ok(Carried { network: network.into(), vlan: vlan.map_err(|problem| InvalidPort::new("networks", problem))? })
}

/// Networks in the way of SPEC's `networks`.
pub fn network_list(networks: &[Carried]) -> String {
    networks.iter().map(Carried::to_string).collect::<Vec<_>>().join(",")
}

/// VLANs, sorted, in the way of SPEC's `trunk`: with ranges where there are any.
pub fn vlan_list(vlans: &[u16]) -> String {
    let runs = vlans.chunk_by(|a, b| a + 1 == *b);
    let items = runs.map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        [one] => one.to_string(),
        [] => String::new(),
    });
    items.collect::<Vec<_>>().join(",")
}

impl FromStr for PortConfig {
    type Err = InvalidPort;

    /// From a SPEC with an absolute path.
    fn from_str(spec: &str) -> Result<Self, InvalidPort> {
        PortText::from_spec(spec)?.parse()
    }
}

impl fmt::Display for PortConfig {
    /// As SPEC, shortest form.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}=", self.name)?;
        match &self.target {
            PortTarget::VhostUser { path, mode } => {
                write!(out, "vhost-user:{}", path.display())?;
                if *mode == SocketMode::Server {
                    out.write_str(",mode=server")?;
                }
            }
            PortTarget::Tap { interface } => write!(out, "tap:{interface}")?,
            PortTarget::Dpdk { device } => write!(out, "dpdk:{device}")?,
            PortTarget::Afxdp { interface, mode, replace, busy_poll, tx_checksum } => {
                write!(out, "afxdp:{interface}")?;
                if *mode != AfxdpMode::Auto {
                    write!(out, ",mode={}", mode.name())?;
                }
                for (key, on) in [("replace", replace), ("busy-poll", busy_poll)] {
                    if *on {
                        write!(out, ",{key}=on")?;
                    }
                }
                if let Some(on) = tx_checksum {
                    write!(out, ",tx-checksum={}", if *on { "on" } else { "off" })?;
                }
            }
        }
        if !["", DEFAULT_NETWORK].contains(&self.network.as_str()) {
            write!(out, ",network={}", self.network)?;
        }
        match &self.vlan {
            VlanMode::All => {}
            VlanMode::Access(vlan) => write!(out, ",vlan={vlan}")?,
            VlanMode::Trunk { native, allowed } => {
                if let Some(vlan) = native {
                    write!(out, ",vlan={vlan}")?;
                }
                write!(out, ",trunk={}", vlan_list(allowed))?;
            }
            VlanMode::Networks(networks) => write!(out, ",networks={}", network_list(networks))?,
        }
        write_option(out, "mtu", self.mtu)?;
        write_option(out, "queues", self.queues)?;
        write_option(out, "mac", self.mac)?;
        if self.spoofcheck {
            out.write_str(",spoofcheck=on")?;
        }
        for (rate, burst, limit) in [("rate-rx", "burst-rx", self.rate_rx), ("rate-tx", "burst-tx", self.rate_tx)] {
            write_option(out, rate, limit.map(|limit| bits(limit.bits_per_second)))?;
            write_option(out, burst, limit.and_then(|limit| limit.burst_bits).map(bits))?;
        }
        write_option(out, "owner", self.owner.as_ref())
    }
}

fn write_option(out: &mut fmt::Formatter<'_>, key: &str, value: Option<impl fmt::Display>) -> fmt::Result {
    value.map_or(Ok(()), |value| write!(out, ",{key}={value}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::MAX_RATE;

    fn problem(spec: &str) -> String {
        spec.parse::<PortConfig>().unwrap_err().problem
    }

    #[test]
    fn the_examples_of_the_design() {
        let plain: PortConfig = "vm1=vhost-user:/run/vm1.sock".parse().unwrap();
        assert_eq!(plain.target, PortTarget::VhostUser { path: "/run/vm1.sock".into(), mode: SocketMode::Client });
        assert_eq!((plain.network.as_str(), plain.vlan), ("default", VlanMode::All));
        assert_eq!((plain.mtu, plain.queues, plain.mac, plain.spoofcheck), (None, None, None, false));

        let full = "vm2=vhost-user:/run/vm2.sock,mode=server,network=blue,vlan=100,mtu=9000,queues=4";
        let full: PortConfig = full.parse().unwrap();
        assert_eq!(full.target, PortTarget::VhostUser { path: "/run/vm2.sock".into(), mode: SocketMode::Server });
        assert_eq!((full.network.as_str(), full.vlan), ("blue", VlanMode::Access(100)));
        assert_eq!((full.mtu, full.queues), (Some(9000), Some(4)));

        let tap: PortConfig = "host=tap:sluice0".parse().unwrap();
        assert_eq!(tap.target, PortTarget::Tap { interface: "sluice0".into() });
        let uplink: PortConfig = "up=afxdp:eth1,queues=2".parse().unwrap();
        let target = |mode, replace, busy_poll, tx_checksum| PortTarget::Afxdp {
            interface: "eth1".into(),
            mode,
            replace,
            busy_poll,
            tx_checksum,
        };
        assert_eq!((uplink.target, uplink.queues), (target(AfxdpMode::Auto, false, false, None), Some(2)));
        let uplink = "up=afxdp:eth1,mode=skb,replace=on,busy-poll=on,tx-checksum=off,trunk=10";
        let uplink: PortConfig = uplink.parse().unwrap();
        assert_eq!(uplink.target, target(AfxdpMode::Skb, true, true, Some(false)));
    }

    #[test]
    fn a_dpdk_device_has_arguments_of_its_own() {
        let spec = "up=dpdk:net_tap0,iface=up0,remote=eth1,trunk=10,20,mtu=9000";
        let text = PortText::from_spec(spec).unwrap();
        assert_eq!(text.target, "net_tap0,iface=up0,remote=eth1");
        if !cfg!(feature = "dpdk") {
            assert!(problem(spec).contains("not built in; build with --features dpdk"));
            return;
        }
        let port: PortConfig = spec.parse().unwrap();
        assert_eq!((port.mtu, &port.vlan), (Some(9000), &VlanMode::Trunk { native: None, allowed: vec![10, 20] }));
        assert_eq!(port.to_string(), spec);
        assert!(port.target.collides(&PortTarget::Dpdk { device: "net_tap0".into() }));
        assert!(problem("up=dpdk:,iface=x").contains("is written like net_tap0"));
    }

    #[test]
    fn a_list_goes_on_over_commas() {
        let port: PortConfig = "t=tap:t0,vlan=5,trunk=20-22,10,21,mtu=1500".parse().unwrap();
        assert_eq!(port.vlan, VlanMode::Trunk { native: Some(5), allowed: vec![10, 20, 21, 22] });
        assert_eq!(port.mtu, Some(1500));
        assert_eq!(port.to_string(), "t=tap:t0,vlan=5,trunk=10,20-22,mtu=1500");
        assert!(problem("t=tap:t0,vlan=5,6").contains("'6' is not of the form key=value"));
        assert!(problem("t=tap:t0,trunk=10,").contains("trunk must be a number"));
        assert!(problem("t=tap:t0,trunk=29-20").contains("write 20-29"));
    }

    #[test]
    fn every_mistake_is_named() {
        let long = format!("vm=vhost-user:/{}", "x".repeat(107));
        let cases = [
            ("", "not of the form"),
            ("vm1", "not of the form"),
            ("vm1=vhost-user", "not of the form"),
            ("=tap:t0", "name must be 1 to 64"),
            ("a b=tap:t0", "name must be 1 to 64"),
            ("vm=foo:/x", "unknown kind 'foo'; use vhost-user, tap or afxdp"),
            ("vm=vhost-user:", "path of the socket is missing"),
            ("vm=vhost-user:x.sock", "must start with '/'"),
            ("vm=vhost-user:/run/", "names a folder"),
            ("vm=vhost-user:/run/..", "names a folder"),
            ("vm=vhost-user:/a\nb", "control characters"),
            (long.as_str(), "108 bytes long"),
            ("vm=vhost-user:/x,colour=red", "unknown key 'colour'; the keys are mode, network"),
            ("vm=vhost-user:/x,mtu=1500,mtu=1500", "mtu is given twice"),
            ("vm=vhost-user:/x,mode=both", "mode must be client or server, not 'both'"),
            ("vm=tap:t0,mode=server", "mode is for ports of kind vhost-user and afxdp only"),
            ("vm=tap:0123456789abcdef", "the interface must be 1 to 15"),
            ("vm=tap:a/b", "the interface must be"),
            ("vm=tap:..", "the interface must be"),
            ("vm=tap:t0,network=", "network must be 1 to 64"),
            ("vm=tap:t0,vlan=0", "vlan must be a number from 1 to 4094, not '0'"),
            ("vm=tap:t0,vlan=4095", "vlan must be a number from 1 to 4094"),
            ("vm=tap:t0,vlan=+5", "vlan must be a number"),
            ("vm=tap:t0,trunk=1-5000", "trunk must be a number from 1 to 4094, not '5000'"),
            ("vm=tap:t0,mtu=67", "mtu must be a number from 68 to 65535"),
            ("vm=tap:t0,mtu=65536", "mtu must be a number from 68 to 65535"),
            ("vm=tap:t0,queues=0", "queues must be a number from 1 to 256"),
            ("vm=tap:t0,queues=257", "queues must be a number from 1 to 256"),
            ("vm=tap:t0,queues=2", "a tap has one queue pair, so queues cannot be 2; leave it out"),
            ("vm=tap:t0,mac=52:54:00", "mac must be an address like"),
            ("vm=tap:t0,mac=01:00:5e:00:00:01", "mac must be the address of one station"),
            ("vm=tap:t0,mac=00:00:00:00:00:00", "mac must be the address of one station"),
            ("vm=tap:t0,spoofcheck=on", "spoofcheck needs the port's address"),
            ("vm=tap:t0,spoofcheck=yes", "spoofcheck must be on or off"),
            ("vm=tap:t0,rate-rx=fast", "rate-rx must be a number of bits like 500M or 10G, not 'fast'"),
            ("vm=tap:t0,rate-rx=1.5G", "rate-rx must be a number of bits"),
            ("vm=tap:t0,rate-rx=G", "rate-rx must be a number of bits"),
            ("vm=tap:t0,rate-rx=-1", "rate-rx must be a number of bits"),
            ("vm=tap:t0,rate-tx=99999999999999G", "rate-tx must be a number of bits"),
            ("vm=tap:t0,rate-tx=999", "rate-tx must be 1K to 1000G"),
            ("vm=tap:t0,rate-tx=1001G", "rate-tx must be 1K to 1000G"),
            ("vm=tap:t0,rate-tx=1G,burst-tx=0", "burst-tx must be 1K to 1000G"),
            ("vm=tap:t0,burst-tx=1M", "burst-tx needs a rate; add rate-tx"),
            ("vm=tap:t0,owner=", "owner must be 1 to 256"),
            ("vm=tap:t0,owner=a b", "owner must be 1 to 256"),
        ];
        for (spec, expected) in cases {
            let found = problem(spec);
            assert!(found.contains(expected), "{spec:?}: {found:?} does not say {expected:?}");
        }
    }

    #[test]
    fn rates_have_units() {
        let port: PortConfig = "t=tap:t0,rate-rx=1500K,burst-rx=2000000,rate-tx=10G,owner=cni/a=b".parse().unwrap();
        assert_eq!(port.rate_rx, Some(RateLimit { bits_per_second: 1_500_000, burst_bits: Some(2_000_000) }));
        assert_eq!(port.rate_tx, Some(RateLimit { bits_per_second: 10_000_000_000, burst_bits: None }));
        assert_eq!(port.to_string(), "t=tap:t0,rate-rx=1500K,burst-rx=2M,rate-tx=10G,owner=cni/a=b");
        assert_eq!([1, 1000, 1001, 5_000_000].map(bits), ["1", "1K", "1001", "5M"]);
    }

    #[test]
    fn networks_that_a_port_carries() {
        let port: PortConfig = "up=afxdp:eth1,networks=blue:100,red,mtu=9000".parse().unwrap();
        let carried = |network: &str, vlan| Carried { network: network.into(), vlan };
        assert_eq!(port.vlan, VlanMode::Networks(vec![carried("blue", Some(100)), carried("red", None)]));
        assert_eq!((port.network.as_str(), port.mtu), ("", Some(9000)));
        for (settings, expected) in [
            ("networks=", "networks must be 1 to 64 letters"),
            ("networks=blue:0", "the VLAN of a network must be a number from 1 to 4094, not '0'"),
            ("networks=blue:", "the VLAN of a network must be a number from 1 to 4094, not ''"),
            ("networks=blue:7,blue:8", "network blue is given twice"),
            ("networks=blue:7,red:7", "VLAN 7 is given twice"),
            ("networks=blue,red", "only one network can be without a VLAN; write red:VLAN"),
            ("networks=blue:7,network=red", "networks takes the place of network"),
            ("vlan=7,networks=blue:7", "networks takes the place of vlan"),
            ("trunk=7,networks=blue:7", "networks takes the place of trunk"),
        ] {
            let problem = problem(&format!("up=afxdp:eth1,{settings}"));
            assert!(problem.starts_with(expected), "{settings}: {problem}");
        }
    }

    #[test]
    fn bounds_are_inclusive() {
        let name = "n".repeat(64);
        let path = format!("/{}", "x".repeat(106));
        for spec in [
            format!("{name}=vhost-user:{path},vlan=4094,mtu=65535,queues=256"),
            "a=tap:0123456789abcde,vlan=1,mtu=68,queues=1".into(),
        ] {
            assert_eq!(spec.parse::<PortConfig>().unwrap().to_string(), spec);
        }
        assert!(problem(&format!("{name}n=tap:t0")).contains("name must be"));
    }

    #[test]
    fn relative_paths_get_a_base() {
        let text = |spec| PortText::from_spec(spec).unwrap().relative_to(Path::new("/base"));
        assert_eq!(text("a=vhost-user:x/y.sock").target, "/base/x/y.sock");
        assert_eq!(text("a=vhost-user:/x.sock").target, "/x.sock");
        assert!(text("a=vhost-user:").parse().unwrap_err().problem.contains("missing"));
        assert_eq!(text("a=tap:t0").target, "t0");
    }

    prop_compose! {
        fn any_vlan_mode()(kind in 0..4, one in 1..=MAX_VLAN, native in proptest::option::of(1..=MAX_VLAN),
            allowed in proptest::collection::btree_set(1..=MAX_VLAN, 1..50),
            networks in proptest::collection::btree_set("[A-Za-z0-9._-]{1,64}", 50)) -> VlanMode {
            match kind {
                0 => VlanMode::All,
                1 => VlanMode::Access(one),
                2 => {
                    let vlans = native.is_some().then_some(None).into_iter().chain(allowed.into_iter().map(Some));
                    let carried = networks.into_iter().zip(vlans).map(|(network, vlan)| Carried { network, vlan });
                    VlanMode::Networks(carried.collect())
                }
                _ => VlanMode::Trunk { native, allowed: allowed.into_iter().collect() },
            }
        }
    }

    fn any_target() -> impl Strategy<Value = PortTarget> {
        let mode = prop_oneof![Just(SocketMode::Client), Just(SocketMode::Server)];
        prop_oneof![
            ("/[a-z0-9=:. ]{0,50}[a-z]", mode)
                .prop_map(|(path, mode)| PortTarget::VhostUser { path: path.into(), mode }),
            "[a-z0-9=.-]{1,14}[a-z]".prop_map(|interface| PortTarget::Tap { interface }),
            (
                "[a-z0-9=.-]{1,14}[a-z]",
                prop::sample::select(AfxdpMode::ALL.to_vec()),
                any::<(bool, bool, Option<bool>)>()
            )
                .prop_map(|(interface, mode, (replace, busy_poll, tx_checksum))| PortTarget::Afxdp {
                    interface,
                    mode,
                    replace,
                    busy_poll,
                    tx_checksum
                }),
        ]
    }

    fn any_rate() -> impl Strategy<Value = Option<RateLimit>> {
        let bits = || (0..=12u32, 1u64..1000).prop_map(|(zeroes, n)| (n * 10u64.pow(zeroes)).clamp(1000, MAX_RATE));
        let limit = (bits(), proptest::option::of(bits()));
        proptest::option::of(limit.prop_map(|(bits_per_second, burst_bits)| RateLimit { bits_per_second, burst_bits }))
    }

    prop_compose! {
        fn any_port()(name in "[A-Za-z0-9._-]{1,64}", target in any_target(), network in "[A-Za-z0-9._-]{1,64}",
            vlan in any_vlan_mode(), mtu in proptest::option::of(MIN_MTU..), queues in proptest::option::of(1..=256u16),
            mac in proptest::option::of(any::<[u8; 5]>()), spoofcheck: bool, rate_rx in any_rate(),
            rate_tx in any_rate(), owner in proptest::option::of("[!-+.-~]{1,256}")) -> PortConfig {
            let mac = mac.map(|[b, c, d, e, f]| MacAddr([0x52, b, c, d, e, f]));
            let spoofcheck = spoofcheck && mac.is_some();
            let queues = queues.filter(|&queues| queues == 1 || !matches!(target, PortTarget::Tap { .. }));
            let network = if matches!(vlan, VlanMode::Networks(_)) { String::new() } else { network };
            PortConfig { name, target, network, vlan, mtu, queues, mac, spoofcheck, rate_rx, rate_tx, owner }
        }
    }

    proptest! {
        #[test]
        fn written_and_read_again(port in any_port()) {
            prop_assert_eq!(port.validate(), Ok(()));
            prop_assert_eq!(port.to_string().parse::<PortConfig>(), Ok(port));
        }

        #[test]
        fn nonsense_never_panics(spec in ".*") {
            let _ = spec.parse::<PortConfig>();
        }

        #[test]
        fn what_is_accepted_is_valid(spec in "[a-c]=(tap:t|afxdp:t|vhost-user:/x)(,(vlan|trunk|networks?|mtu|queues|mac|mode|replace)=[0-9a-f:,-]{0,9}){0,3}") {
            if let Ok(port) = spec.parse::<PortConfig>() {
                prop_assert_eq!(port.validate(), Ok(()));
                prop_assert_eq!(port.to_string().parse::<PortConfig>(), Ok(port));
            }
        }
    }
}
