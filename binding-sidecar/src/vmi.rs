//! What the sidecar needs to know of a `VirtualMachineInstance`.

use serde::Deserialize;

/// Most queue pairs that KubeVirt gives an interface.
pub const MAX_QUEUES: u32 = 256;
/// What `state` says of an interface that is being unplugged.
const ABSENT: &str = "absent";

/// A `VirtualMachineInstance`, as KubeVirt marshals it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Vmi {
    spec: Spec,
    status: Status,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Spec {
    domain: Domain,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Domain {
    cpu: Option<Cpu>,
    resources: Resources,
    devices: Devices,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Cpu {
    sockets: u32,
    cores: u32,
    threads: u32,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Resources {
    limits: Quantities,
    requests: Quantities,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Quantities {
    cpu: serde_json::Value,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Devices {
    interfaces: Vec<Interface>,
    network_interface_multiqueue: bool,
    use_virtio_transitional: bool,
}

/// An interface of the VM. It has the name of its network.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Interface {
    /// Its name, and the name of its network.
    pub name: String,
    /// The binding plugin that it wants.
    pub binding: Option<Binding>,
    /// Its address, if the user chose one.
    pub mac_address: String,
    /// Its place on the PCI bus, if the user chose one.
    pub pci_address: String,
    /// Its index in ACPI; 0 is none.
    pub acpi_index: u32,
    /// Its place in the boot order, from 1.
    pub boot_order: Option<u32>,
    /// `up`, `down`, `absent` or nothing.
    pub state: String,
    /// Model of the card.
    pub model: String,
}

/// The binding plugin of an interface.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Binding {
    /// Its name in the KubeVirt CR.
    pub name: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Status {
    interfaces: Vec<InterfaceStatus>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct InterfaceStatus {
    name: String,
    pod_interface_name: String,
}

impl Vmi {
    /// Reads the JSON of KubeVirt.
    ///
    /// # Errors
    /// If it is not the JSON of a `VirtualMachineInstance`.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// The interfaces that want one of `bindings` and are not on their way out.
    pub fn interfaces<'a>(&'a self, bindings: &'a [String]) -> impl Iterator<Item = &'a Interface> {
        let bound = |interface: &&Interface| interface.binding.as_ref().is_some_and(|b| bindings.contains(&b.name));
        self.spec.domain.devices.interfaces.iter().filter(bound).filter(|interface| interface.state != ABSENT)
    }

    /// The name that the pod's side of a network has, if KubeVirt knows it already.
    pub fn pod_interface_name(&self, network: &str) -> Option<&str> {
        let known = self.status.interfaces.iter().find(|interface| interface.name == network)?;
        Some(known.pod_interface_name.as_str()).filter(|name| !name.is_empty())
    }

    /// Whether the VM's virtio devices are transitional ones, for old guests.
    pub fn transitional(&self) -> bool {
        self.spec.domain.devices.use_virtio_transitional
    }

    /// Queue pairs of each interface: one for each virtual CPU there is now, if the user wants several.
    pub fn queues(&self) -> u32 {
        if !self.spec.domain.devices.network_interface_multiqueue {
            return 1;
        }
        self.cpus().clamp(1, MAX_QUEUES)
    }

    fn cpus(&self) -> u32 {
        let Domain { cpu, resources, .. } = &self.spec.domain;
        match cpu {
            Some(Cpu { sockets, cores, threads }) if (*sockets, *cores, *threads) != (0, 0, 0) => {
                [sockets, cores, threads].into_iter().fold(1, |product: u32, n| product.saturating_mul((*n).max(1)))
            }
            // KubeVirt's own answer for a VM that does not say.
            _ => whole_cpus(&resources.limits.cpu).or_else(|| whole_cpus(&resources.requests.cpu)).unwrap_or(1),
        }
    }
}

/// A quantity of CPUs (`2`, `"1.5"`, `"2500m"`), rounded up.
fn whole_cpus(quantity: &serde_json::Value) -> Option<u32> {
    let text = match quantity {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Number(number) => number.to_string(),
        _ => return None,
    };
    let cpus = match text.strip_suffix('m') {
        Some(thousandths) => thousandths.parse::<f64>().ok()? / 1000.0,
        None => text.parse().ok()?,
    };
    // The cast saturates, and more than that is capped anyway.
    (cpus > 0.0).then(|| cpus.ceil() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn vmi(domain: serde_json::Value) -> Vmi {
        Vmi::parse(json!({ "spec": { "domain": domain } }).to_string().as_bytes()).unwrap()
    }

    #[test]
    fn queues_follow_the_topology_of_now() {
        let multi = |mut domain: serde_json::Value| {
            domain["devices"]["networkInterfaceMultiqueue"] = json!(true);
            vmi(domain).queues()
        };
        assert_eq!(vmi(json!({"cpu": {"cores": 8}})).queues(), 1);
        let cases = [
            (json!({"cpu": {"cores": 4, "sockets": 2, "threads": 2, "maxSockets": 16}}), 16),
            (json!({"cpu": {"cores": 4}}), 4),
            (json!({"cpu": {"model": "host-passthrough"}, "resources": {"requests": {"cpu": "3"}}}), 3),
            (json!({"resources": {"requests": {"cpu": 2}, "limits": {"cpu": "2500m"}}}), 3),
            (json!({"resources": {"requests": {"memory": "1Gi"}}}), 1),
            (json!({"resources": {"limits": {"cpu": "many"}}}), 1),
            (json!({"cpu": {"cores": 100, "sockets": 100, "threads": 2}}), 256),
            (json!({"cpu": {"cores": 4_000_000_000u32, "sockets": 4_000_000_000u32}}), 256),
            (json!({}), 1),
        ];
        for (domain, expected) in cases {
            assert_eq!(multi(domain.clone()), expected, "{domain}");
        }
    }

    #[test]
    fn picks_our_interfaces_in_order() {
        let vmi = vmi(json!({"devices": {"interfaces": [
            {"name": "default", "masquerade": {}},
            {"name": "b", "binding": {"name": "vhostuser"}, "bootOrder": 2},
            {"name": "gone", "binding": {"name": "vhostuser"}, "state": "absent"},
            {"name": "a", "binding": {"name": "other"}},
            {"name": "c", "binding": {"name": "passt"}},
        ]}}));
        let bindings = ["vhostuser".to_owned(), "other".to_owned()];
        let names: Vec<_> = vmi.interfaces(&bindings).map(|interface| interface.name.as_str()).collect();
        assert_eq!(names, ["b", "a"]);
    }

    #[test]
    fn refuses_what_is_no_vmi() {
        assert!(Vmi::parse(b"").is_err());
        assert!(Vmi::parse(b"[1]").is_err());
        assert!(Vmi::parse(br#"{"spec": 1}"#).is_err());
        assert!(Vmi::parse(b"{}").unwrap().interfaces(&[]).next().is_none());
    }
}
