//! The network configuration that the runtime passes on standard input.

use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sluice_proto::sluice::v1::{RateLimit, VlanSet};

use crate::environment::is_id;
use crate::error::{CniError, Code};

/// Versions of the specification that we speak, oldest first.
pub(crate) const VERSIONS: &[&str] = &["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The newest of them, for when the caller's is not known.
pub(crate) const NEWEST: &str = "1.1.0";
/// Our own keys.
const KEYS: &[&str] = &[
    "network",
    "vlan",
    "trunk",
    "mtu",
    "queues",
    "spoofCheck",
    "rateLimit",
    "control",
    "socketRoot",
    "containerRoot",
    "deviceID",
];
/// Keys of the specification, of libcni and of Multus, which are for others or mean nothing to us.
const OTHERS: &[&str] = &[
    "cniVersion",
    "cniVersions",
    "name",
    "type",
    "capabilities",
    "runtimeConfig",
    "prevResult",
    "ipam",
    "ipMasq",
    "dns",
    "args",
    "disableCheck",
    "disableGC",
    "loadOnlyInlinedPlugins",
    "pciBusID",
    "resourceName",
];

/// What every command needs. Lenient, so that a mistake elsewhere in the configuration does not stop a DEL.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// One of [`VERSIONS`].
    pub(crate) version: &'static str,
    /// Name of the network; checked by [`Config::check_name`].
    pub(crate) name: String,
    /// The switch's control socket.
    pub(crate) control: PathBuf,
    /// IPAM plugin to call.
    pub(crate) ipam: Option<String>,
    /// The configuration as it came.
    pub(crate) text: Vec<u8>,
    map: Map<String, Value>,
}

/// What an attachment is to be. Every key is checked, unknown ones too.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    pub(crate) network: String,
    pub(crate) vlan: Option<u32>,
    pub(crate) trunk: Option<VlanSet>,
    pub(crate) mtu: Option<u32>,
    pub(crate) queues: Option<u32>,
    pub(crate) spoof_check: bool,
    pub(crate) rate_rx: Option<RateLimit>,
    pub(crate) rate_tx: Option<RateLimit>,
    /// Folder with the devices' folders, as the switch sees it.
    pub(crate) socket_root: String,
    /// The same as the pod sees it.
    pub(crate) container_root: String,
    pub(crate) device_id: String,
    /// It stands in the plugin's own configuration.
    pub(crate) device_is_configured: bool,
    pub(crate) device_info_file: Option<PathBuf>,
    pub(crate) mac: Option<String>,
    pub(crate) ips: Vec<String>,
}

impl Config {
    /// Reads a configuration.
    ///
    /// # Errors
    /// Codes 6, 1 and 7.
    pub(crate) fn parse(text: Vec<u8>) -> Result<Self, CniError> {
        let decode = |error| CniError::new(Code::Decode, format!("the network configuration is not JSON: {error}"));
        let map: Map<String, Value> = serde_json::from_slice(&text).map_err(decode)?;
        // The specification's meaning of no version.
        let asked = get::<String>(&map, "cniVersion")?.unwrap_or_else(|| "0.1.0".into());
        let version = VERSIONS.iter().find(|known| **known == asked).ok_or_else(|| {
            let known = VERSIONS.join(", ");
            CniError::new(Code::Version, format!("cniVersion {asked:?} is not supported; use one of {known}"))
        })?;
        let ipam = get::<Map<String, Value>>(&map, "ipam")?.unwrap_or_default();
        Ok(Self {
            version,
            name: get(&map, "name")?.unwrap_or_default(),
            control: get(&map, "control")?.unwrap_or_else(|| "/run/sluice/control.sock".into()),
            ipam: get::<String>(&ipam, "type")?.filter(|name| !name.is_empty()),
            text,
            map,
        })
    }

    /// Whether the version is that one or a later one.
    pub(crate) fn at_least(&self, version: &str) -> bool {
        let place = |version: &str| VERSIONS.iter().position(|known| *known == version);
        place(self.version) >= place(version)
    }

    /// Checks the name of the network.
    ///
    /// # Errors
    /// Code 7.
    pub(crate) fn check_name(&self) -> Result<(), CniError> {
        if is_id(&self.name) {
            return Ok(());
        }
        let rule = "must begin with a letter or digit, and go on with those, '_', '.' and '-'";
        Err(CniError::config(format!("\"name\" {rule}, not {:?}", self.name)))
    }

    /// The result of the plugin before us in the chain, or of our own ADD.
    ///
    /// # Errors
    /// Code 7.
    pub(crate) fn prev_result(&self) -> Result<Option<Map<String, Value>>, CniError> {
        get(&self.map, "prevResult")
    }

    /// The attachments that are to stay, as (container id, interface).
    ///
    /// # Errors
    /// Code 7 if they are not given: to take that for "none" would remove everything.
    pub(crate) fn valid_attachments(&self) -> Result<Vec<(String, String)>, CniError> {
        const KEY: &str = "cni.dev/valid-attachments";
        let list: Option<Vec<Map<String, Value>>> = get(&self.map, KEY)?;
        let list = list.ok_or_else(|| CniError::config(format!("{KEY:?} is missing")))?;
        let need = |item: &Map<String, Value>, key: &str| {
            get::<String>(item, key)?.ok_or_else(|| CniError::config(format!("{KEY:?} has an item without {key:?}")))
        };
        list.iter().map(|item| Ok((need(item, "containerID")?, need(item, "ifname")?))).collect()
    }

    /// Reads and checks everything that is about an attachment.
    ///
    /// # Errors
    /// Codes 2 and 7.
    pub(crate) fn settings(&self) -> Result<Settings, CniError> {
        self.check_name()?;
        refuse_unknown(&self.map, |key| KEYS.contains(&key) || OTHERS.contains(&key) || key.contains('/'), KEYS)?;
        let runtime = get::<Map<String, Value>>(&self.map, "runtimeConfig")?.unwrap_or_default();
        let (rate_rx, rate_tx) = rate_limits(&get(&self.map, "rateLimit")?.unwrap_or_default())?;
        let folder = |key: &str, default: &str| {
            let path = get::<String>(&self.map, key)?.unwrap_or_else(|| default.into());
            let path = path.trim_end_matches('/');
            if path.starts_with('/') { Ok(path.to_owned()) } else { Err(wrong(key, "it must start with '/'")) }
        };
        let (device_id, device_is_configured) = self.device_id(&runtime)?;
        Ok(Settings {
            network: get(&self.map, "network")?.unwrap_or_else(|| self.name.clone()),
            vlan: get(&self.map, "vlan")?,
            trunk: get(&self.map, "trunk")?.map(|value| trunk(&value)).transpose()?,
            mtu: get(&self.map, "mtu")?,
            queues: get(&self.map, "queues")?,
            spoof_check: get(&self.map, "spoofCheck")?.unwrap_or(false),
            rate_rx,
            rate_tx,
            socket_root: folder("socketRoot", "/var/run/sluice/sockets")?,
            container_root: folder("containerRoot", "/var/run/vhostuser")?,
            device_id,
            device_is_configured,
            device_info_file: get(&runtime, "CNIDeviceInfoFile")?,
            mac: get(&runtime, "mac")?,
            ips: get(&runtime, "ips")?.unwrap_or_default(),
        })
    }

    /// Multus gives it twice if the capability is declared, else once. Also whether it is in the plugin's own part.
    fn device_id(&self, runtime: &Map<String, Value>) -> Result<(String, bool), CniError> {
        let given = |map| Ok::<_, CniError>(get::<String>(map, "deviceID")?.filter(|id| !id.is_empty()));
        match (given(&self.map)?, given(runtime)?) {
            (Some(one), Some(other)) if one != other => {
                Err(CniError::config(format!("\"deviceID\" is {one:?} at the top and {other:?} in \"runtimeConfig\"")))
            }
            (one, other) => Ok((one.clone().or(other).unwrap_or_default(), one.is_some())),
        }
    }
}

/// Whether a path leads out of the folder that it begins with.
pub(crate) fn goes_up(path: &Path) -> bool {
    path.components().any(|part| part == Component::ParentDir)
}

/// The value of a key; none if it is null.
fn get<T: DeserializeOwned>(map: &Map<String, Value>, key: &str) -> Result<Option<T>, CniError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value.clone()).map(Some).map_err(|error| wrong(key, error)),
    }
}

fn wrong(key: &str, problem: impl std::fmt::Display) -> CniError {
    CniError::config(format!("{key:?} is wrong: {problem}"))
}

fn refuse_unknown(map: &Map<String, Value>, known: impl Fn(&str) -> bool, keys: &[&str]) -> Result<(), CniError> {
    match map.iter().find(|(key, _)| !known(key)) {
        Some((key, value)) => {
            let problem = format!("unsupported key {key:?} with value {value}; the keys are {}", keys.join(", "));
            Err(CniError::new(Code::UnsupportedField, problem))
        }
        None => Ok(()),
    }
}

/// `[10, "20-29"]`, or the same as text: `"10,20-29"`.
fn trunk(value: &Value) -> Result<VlanSet, CniError> {
    let problem = || wrong("trunk", format!("write VLANs like [10, \"20-29\"], not {value}"));
    let items: Vec<String> = match value {
        Value::String(text) => text.split(',').map(|item| item.trim().to_owned()).collect(),
        Value::Array(items) => items.iter().map(|item| item.as_str().map_or(item.to_string(), Into::into)).collect(),
        _ => return Err(problem()),
    };
    let mut vlans = Vec::new();
    for item in &items {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let number = |text: &str| digits::<u32>(text).filter(|vlan| (1..=4094).contains(vlan));
        let range = number(first).zip(number(last)).filter(|(first, last)| first <= last);
        let (first, last) = range.ok_or_else(problem)?;
        vlans.extend(first..=last);
    }
    vlans.sort_unstable();
    vlans.dedup();
    Ok(VlanSet { vlans })
}

/// `{"rx": "500M", "tx": 1000000000, "rxBurst": "10M"}`, in bits; the directions are the switch's: `rx` is from the pod.
fn rate_limits(map: &Map<String, Value>) -> Result<(Option<RateLimit>, Option<RateLimit>), CniError> {
    const KEYS: &[&str] = &["rx", "tx", "rxBurst", "txBurst"];
    refuse_unknown(map, |key| KEYS.contains(&key), KEYS)?;
    let read = |key: &str| get::<Value>(map, key)?.map(|value| bits(key, &value)).transpose();
    let limit = |rate: &str, burst: &str| match (read(rate)?, read(burst)?) {
        (Some(bits_per_second), burst_bits) => Ok(Some(RateLimit { bits_per_second, burst_bits })),
        (None, Some(_)) => Err(wrong("rateLimit", format!("{burst:?} needs {rate:?}"))),
        (None, None) => Ok(None),
    };
    Ok((limit("rx", "rxBurst")?, limit("tx", "txBurst")?))
}

/// A number in plain digits.
fn digits<N: FromStr>(text: &str) -> Option<N> {
    text.parse().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()))
}

/// A number, or text with a unit as the switch's own configuration has it.
fn bits(key: &str, value: &Value) -> Result<u64, CniError> {
    let text = value.as_str().map_or_else(|| value.to_string(), Into::into);
    let (number, unit) = match text.strip_suffix(['k', 'K', 'M', 'G']) {
        Some(number) if text.ends_with('G') => (number, 1_000_000_000),
        Some(number) if text.ends_with('M') => (number, 1_000_000),
        Some(number) => (number, 1000),
        None => (text.as_str(), 1u64),
    };
    let bits = digits(number).and_then(|number: u64| number.checked_mul(unit));
    bits.ok_or_else(|| wrong("rateLimit", format!("{key:?} must be bits like \"500M\" or \"10G\", not {value}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings(more: Value) -> Result<Settings, String> {
        let mut config = json!({ "cniVersion": "1.1.0", "name": "blue", "type": "sluice-cni" });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config = Config::parse(config.to_string().into_bytes()).map_err(|error| error.to_string())?;
        config.settings().map_err(|error| error.to_string())
    }

    #[test]
    fn defaults() {
        let settings = settings(json!({ "vlan": null })).unwrap();
        assert_eq!((settings.network.as_str(), settings.mtu, settings.vlan), ("blue", None, None));
        assert_eq!(settings.socket_root, "/var/run/sluice/sockets");
        assert_eq!(settings.container_root, "/var/run/vhostuser");
        assert!(!settings.spoof_check && settings.device_id.is_empty() && settings.ips.is_empty());
    }

    #[test]
    fn everything() {
        let settings = settings(json!({
            "network": "red", "vlan": 5, "trunk": [30, "10-12", 11], "mtu": 9000, "queues": 4, "spoofCheck": true,
            "rateLimit": { "rx": "500M", "tx": 1_000_000_000, "txBurst": "20k" },
            "socketRoot": "/s/", "containerRoot": "/c", "deviceID": "d1", "pciBusID": "d1",
            "capabilities": { "mac": true }, "cni.dev/attachments": [],
            "runtimeConfig": { "deviceID": "d1", "mac": "m", "ips": ["10.0.0.1/24"], "CNIDeviceInfoFile": "/f", "x": 1 },
        }))
        .unwrap();
        let expected = Settings {
            network: "red".into(),
            vlan: Some(5),
            trunk: Some(VlanSet { vlans: vec![10, 11, 12, 30] }),
            mtu: Some(9000),
            queues: Some(4),
            spoof_check: true,
            rate_rx: Some(RateLimit { bits_per_second: 500_000_000, burst_bits: None }),
            rate_tx: Some(RateLimit { bits_per_second: 1_000_000_000, burst_bits: Some(20_000) }),
            socket_root: "/s".into(),
            container_root: "/c".into(),
            device_id: "d1".into(),
            device_is_configured: true,
            device_info_file: Some("/f".into()),
            mac: Some("m".into()),
            ips: vec!["10.0.0.1/24".into()],
        };
        assert_eq!(settings, expected);
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            (json!({ "vlna": 5 }), "unsupported key \"vlna\" with value 5; the keys are network, vlan"),
            (json!({ "spoofcheck": true }), "unsupported key \"spoofcheck\""),
            (json!({ "rateLimit": { "ingress": 1 } }), "unsupported key \"ingress\" with value 1; the keys are rx"),
            (json!({ "rateLimit": { "rx": "fast" } }), "\"rx\" must be bits like"),
            (json!({ "rateLimit": { "rx": -1 } }), "\"rx\" must be bits like"),
            (json!({ "rateLimit": { "rxBurst": 1 } }), "\"rxBurst\" needs \"rx\""),
            (json!({ "vlan": "5" }), "\"vlan\" is wrong: invalid type: string \"5\", expected u32"),
            (json!({ "trunk": ["20-10x"] }), "\"trunk\" is wrong"),
            (json!({ "trunk": ["20-10"] }), "\"trunk\" is wrong"),
            (json!({ "trunk": [0] }), "\"trunk\" is wrong"),
            (json!({ "trunk": {} }), "\"trunk\" is wrong"),
            (json!({ "socketRoot": "x" }), "\"socketRoot\" is wrong: it must start with '/'"),
            (json!({ "deviceID": "a", "runtimeConfig": { "deviceID": "b" } }), "is \"a\" at the top and \"b\""),
            (json!({ "name": "../x" }), "\"name\" must begin"),
            (json!({ "name": null }), "\"name\" must begin"),
            (json!({ "cniVersion": "0.2.0" }), "cniVersion \"0.2.0\" is not supported"),
            (json!({ "cniVersion": null }), "cniVersion \"0.1.0\" is not supported"),
        ];
        for (more, expected) in cases {
            let found = settings(more.clone()).unwrap_err();
            assert!(found.contains(expected), "{more}: {found}");
        }
    }

    #[test]
    fn versions_are_ordered() {
        let config = |version: &str| {
            Config::parse(json!({ "cniVersion": version, "name": "n" }).to_string().into_bytes()).unwrap()
        };
        assert!(config("1.0.0").at_least("0.4.0") && config("0.4.0").at_least("0.4.0"));
        assert!(!config("0.3.1").at_least("0.4.0") && !config("1.0.0").at_least("1.1.0"));
    }
}
