//! One interface of one pod: what it is called everywhere, and the port of the switch that it gets.

use sluice_proto::sluice::v1 as proto;

use crate::config::{Config, Settings};
use crate::environment::Environment;
use crate::error::CniError;

/// Longest path of a unix socket, in bytes.
const MAX_SOCKET_PATH: usize = 107;
/// Longest name of a port.
const MAX_PORT_NAME: usize = 64;
/// Longest device id that the kubelet's contract allows.
const MAX_DEVICE_ID: usize = 63;
/// Queue pairs that a port may use if nothing is configured.
const MAX_QUEUES: u32 = 256;
/// Longest owner of a port.
const MAX_OWNER: usize = 256;

/// What the names of pods of virtual machines begin with.
const LAUNCHER: &str = "virt-launcher-";
/// Length of a generated name whose first part the API server may have cut, to make room for its random end.
const FULL_POD_NAME: usize = 63;

/// What all owners that we give to ports begin with.
pub(crate) const OWNERS: &str = "cni/";

/// Whose port it is: `cni/<container id>/<interface>/<pod UID>/<network name>`.
///
/// The first two tell attachments apart and are known to every command, so that DEL finds its port with nothing else,
/// and never one that another pod has got meanwhile under the same device id. The network's name is for GC, the UID for
/// people, and to know a pod again that got another sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner<'a> {
    pub(crate) container_id: &'a str,
    pub(crate) interface: &'a str,
    pub(crate) uid: &'a str,
    pub(crate) network: &'a str,
}

impl<'a> Owner<'a> {
    /// Reads an owner that we gave. The parts have no slash, as is checked before they are put together.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.strip_prefix(OWNERS)?.split('/');
        let (container_id, interface, uid, network) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        parts.next().is_none().then_some(Self { container_id, interface, uid, network })
    }

    /// What the owners of all ports of this attachment begin with.
    pub(crate) fn prefix(environment: &Environment) -> String {
        format!("{OWNERS}{}/{}/", environment.container_id, environment.interface)
    }
}

/// An attachment, ready to be made.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Attachment {
    pub(crate) port: proto::PortConfig,
    pub(crate) owner: String,
    pub(crate) mac: String,
    /// The device's folder as the switch sees it, with a slash at the end.
    pub(crate) device_folder: String,
    /// The socket as the switch sees it.
    pub(crate) socket: String,
    /// The socket as the pod sees it.
    pub(crate) pod_socket: String,
}

impl Attachment {
    /// Puts together what the configuration and the environment say.
    ///
    /// # Errors
    /// Code 7.
    pub(crate) fn new(config: &Config, settings: &Settings, environment: &Environment) -> Result<Self, CniError> {
        let device = settings.device_id.as_str();
        check_device(device)?;
        // What the kubelet has given, Multus writes into the plugin's own configuration. In "runtimeConfig" alone is what the
        // pod's annotation says, and that may be another pod's device.
        if !settings.device_is_configured && environment.is_of_pod() {
            return Err(CniError::config(format!(
                "the kubelet has given this pod no device for this network: \"deviceID\" {device:?} comes from the pod's \
                 annotation, which does not count. Leave it out there, and have the pod ask for the resource that the \
                 NetworkAttachmentDefinition names (sluice.io/sockets)"
            )));
        }
        let interface = &environment.interface;
        let device_folder = format!("{}/{device}/", settings.socket_root);
        let socket = format!("{device_folder}{interface}");
        let pod_socket = format!("{}/{device}/{interface}", settings.container_root);
        check_path("socketRoot", &socket)?;
        check_path("containerRoot", &pod_socket)?;
        let owner = format!("{}{}/{}", Owner::prefix(environment), environment.pod_uid(), config.name);
        if owner.len() > MAX_OWNER {
            return Err(CniError::config("\"name\" of the network and the container id are too long together"));
        }
        let mac = mac_of(config, settings, environment)?;
        let target = proto::VhostUserTarget { path: socket.clone(), mode: proto::SocketMode::Client.into() };
        let port = proto::PortConfig {
            name: port_name(device, interface),
            target: Some(proto::port_config::Target::VhostUser(target)),
            network: settings.network.clone(),
            vlan: settings.vlan,
            trunk: settings.trunk.clone(),
            mtu: settings.mtu,
            queues: settings.queues,
            mac: Some(mac.clone()),
            spoofcheck: settings.spoof_check,
            rate_rx: settings.rate_rx,
            rate_tx: settings.rate_tx,
            owner: Some(owner.clone()),
            networks: Vec::new(),
        };
        Ok(Self { port, owner, mac, device_folder, socket, pod_socket })
    }

    /// What of a running port is not as it was configured.
    pub(crate) fn differences(&self, running: &proto::PortStatus) -> Vec<&'static str> {
        let port = &self.port;
        let queues = port.queues.unwrap_or(MAX_QUEUES);
        let checks = [
            ("target", running.target == self.socket),
            ("network", running.network == port.network),
            ("vlan", running.vlan == port.vlan),
            ("trunk", running.trunk == port.trunk),
            ("mtu", running.mtu == port.mtu),
            // Older switches do not tell.
            ("queues", running.max_queues.is_none_or(|running| running == queues)),
            ("mac", running.mac == port.mac),
            ("spoofCheck", running.spoofcheck == port.spoofcheck),
            ("rateLimit", running.rate_rx == port.rate_rx && running.rate_tx == port.rate_tx),
        ];
        checks.into_iter().filter(|(_, same)| !same).map(|(key, _)| key).collect()
    }
}

/// A device id becomes a folder and part of a name, so it must be a plain word.
fn check_device(device: &str) -> Result<(), CniError> {
    if device.is_empty() {
        return Err(CniError::config(
            "no device was given for this network: the pod must have a device of the resource that annotation \
             k8s.v1.cni.cncf.io/resourceName of the NetworkAttachmentDefinition names (sluice.io/sockets), one for \
             each such network",
        ));
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    if device.len() <= MAX_DEVICE_ID && !device.starts_with('.') && device.bytes().all(plain) {
        return Ok(());
    }
    let shown: String = device.chars().take(80).collect();
    let rule = format!("must be 1 to {MAX_DEVICE_ID} letters, digits, '_', '.' and '-', and not begin with '.'");
    Err(CniError::config(format!("\"deviceID\" {rule}, not {shown:?}")))
}

fn check_path(key: &str, path: &str) -> Result<(), CniError> {
    let length = path.len();
    if length <= MAX_SOCKET_PATH {
        return Ok(());
    }
    Err(CniError::config(format!(
        "the socket's path would be {length} bytes long, and the kernel takes at most {MAX_SOCKET_PATH}; use a shorter \
         {key:?} than in {path:?}"
    )))
}

/// The port's name: device and interface, so that people find it, or a part of them and a hash, if they have no room.
fn port_name(device: &str, interface: &str) -> String {
    let plain = format!("{device}.{interface}");
    // An interface with a dot could be mistaken for a part of the device.
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"_-".contains(&b);
    if plain.len() <= MAX_PORT_NAME && interface.bytes().all(fits) {
        return plain;
    }
    let kept: String = plain.bytes().map(|b| if fits(b) || b == b'.' { char::from(b) } else { '-' }).take(47).collect();
    format!("{kept}-{:016x}", hash(&[device, interface]))
}

/// The address that was asked for (in the capability, or in the way that Multus has always passed it), or one that is
/// made up: locally administered, and the same every time.
fn mac_of(config: &Config, settings: &Settings, environment: &Environment) -> Result<String, CniError> {
    let asked = settings.mac.as_deref().unwrap_or(environment.arg("MAC"));
    if !asked.is_empty() {
        return normal_mac(asked).ok_or_else(|| {
            CniError::config(format!(
                "the MAC address must be that of one station, like 52:54:00:12:34:56, not {asked:?}"
            ))
        });
    }
    if settings.spoof_check && is_of_unknown_machine(environment.arg("K8S_POD_NAME")) {
        return Err(CniError::config(
            "spoofCheck needs an address that stays, and none can be made up here, since the virtual machine's name is too \
             long to tell from that of its pod: give its interface a \"macAddress\"",
        ));
    }
    let who = identity(environment);
    let hash = hash(&[&config.name, &who, &environment.interface]).to_be_bytes();
    let first = (hash[0] & 0xfc) | 2;
    let rest: Vec<_> = hash[1..6].iter().map(|byte| format!(":{byte:02x}")).collect();
    Ok(format!("{first:02x}{}", rest.concat()))
}

/// Who an address is made up for. The pods of one virtual machine, after a restart or on the other side of a migration,
/// differ in a generated last part of their name only; the guest keeps its address, so the machine is what counts.
fn identity(environment: &Environment) -> String {
    let pod = environment.arg("K8S_POD_NAME");
    match pod.strip_prefix(LAUNCHER).and_then(|name| name.rsplit_once('-')) {
        Some((machine, _)) if !is_of_unknown_machine(pod) => {
            format!("{}/{machine}", environment.arg("K8S_POD_NAMESPACE"))
        }
        _ if environment.pod_uid().is_empty() => environment.container_id.clone(),
        _ => environment.pod_uid().into(),
    }
}

/// Whether the machine's name in that of its pod may have been cut: others can begin with the same 43 characters.
fn is_of_unknown_machine(pod: &str) -> bool {
    pod.starts_with(LAUNCHER) && pod.len() >= FULL_POD_NAME
}

/// An address in the switch's form; none if it is not the address of one station.
pub(crate) fn normal_mac(text: &str) -> Option<String> {
    let parts: Vec<&str> = text.split([':', '-']).collect();
    // The parser alone would take a sign.
    let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    let byte = |part: &&str| u8::from_str_radix(part, 16).ok().filter(|_| hex(part));
    let bytes: Vec<u8> = parts.iter().map(byte).collect::<Option<_>>()?;
    let station = bytes.len() == 6 && bytes[0] & 1 == 0 && bytes.iter().any(|byte| *byte != 0);
    station.then(|| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"))
}

/// FNV-1a with a final mix. It must give the same in every version of this program, and nobody gains by a collision:
/// ports are told apart by their owners.
fn hash(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    let fnv = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mixed = (fnv ^ (fnv >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn environment(interface: &str, args: &str) -> Environment {
        let read = |name: &str| match name {
            "CONTAINERID" => Some("c1".to_owned()),
            "IFNAME" => Some(interface.into()),
            "ARGS" => Some(args.into()),
            _ => None,
        };
        Environment::read(&[], &read).unwrap()
    }

    fn make(more: serde_json::Value, environment: &Environment) -> Result<Attachment, String> {
        let mut map = json!({ "cniVersion": "1.0.0", "name": "blue", "deviceID": "sock-7" });
        map.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config = Config::parse(map.to_string().into_bytes()).unwrap();
        let settings = config.settings().unwrap();
        Attachment::new(&config, &settings, environment).map_err(|error| error.to_string())
    }

    #[test]
    fn names_and_paths() {
        let made = make(json!({}), &environment("net1", "K8S_POD_UID=u1")).unwrap();
        assert_eq!(made.port.name, "sock-7.net1");
        assert_eq!(made.owner, "cni/c1/net1/u1/blue");
        assert_eq!(made.socket, "/var/run/sluice/sockets/sock-7/net1");
        assert_eq!(made.pod_socket, "/var/run/vhostuser/sock-7/net1");
        assert_eq!(
            Owner::parse(&made.owner),
            Some(Owner { container_id: "c1", interface: "net1", uid: "u1", network: "blue" })
        );
        assert!(made.owner.starts_with(&Owner::prefix(&environment("net1", ""))));
        assert!(!made.owner.starts_with(&Owner::prefix(&environment("net", ""))));
        assert_eq!(Owner::parse("me"), None);
        assert_eq!(Owner::parse("cni/a/b/c/d/e"), None);
    }

    /// Multus passes on a `deviceID` of the pod's annotation if the kubelet has given no device.
    #[test]
    fn a_pod_does_not_choose_its_device() {
        let chosen = json!({ "deviceID": null, "runtimeConfig": { "deviceID": "sock-8" } });
        let error = make(chosen.clone(), &environment("net1", "K8S_POD_UID=u1")).unwrap_err();
        assert!(error.contains("no device for this network") && error.contains("sock-8"), "{error}");
        let both = json!({ "runtimeConfig": { "deviceID": "sock-7" } });
        assert_eq!(make(both, &environment("net1", "K8S_POD_UID=u1")).unwrap().port.name, "sock-7.net1");
        // An operator at a shell is nobody's pod.
        assert_eq!(make(chosen, &environment("net1", "")).unwrap().port.name, "sock-8.net1");
    }

    #[test]
    fn port_names_are_short_and_different() {
        assert_eq!(port_name("d", "eth0"), "d.eth0");
        let long = "x".repeat(63);
        let names = [
            port_name(&long, "pod0123456789a"),
            port_name(&long, "pod0123456789b"),
            port_name("d", "e@1"),
            port_name("d", "e:1"),
            port_name("a.b", "c"),
            port_name("a", "b.c"),
        ];
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        for (place, name) in names.iter().enumerate() {
            assert!(name.len() <= MAX_PORT_NAME && name.bytes().all(allowed), "{name}");
            assert!(!names[..place].contains(name), "{name}");
        }
    }

    #[test]
    fn hostile_devices_are_refused() {
        let long = "x".repeat(300);
        for device in ["", "../x", "/", "a/b", "..", ".", ".x", "a\0b", "a b", "a,b", "ä", long.as_str()] {
            let error = make(json!({ "deviceID": device }), &environment("net1", "")).unwrap_err();
            let expected =
                if device.is_empty() { "k8s.v1.cni.cncf.io/resourceName" } else { "must be 1 to 63 letters" };
            assert!(error.contains(expected), "{device:?}: {error}");
        }
    }

    #[test]
    fn paths_fit_a_socket_address() {
        let root = |length: usize| format!("/{}", "r".repeat(length - 1));
        let environment = environment("net1", "");
        // "/sock-7/net1" is 12 bytes.
        make(json!({ "socketRoot": root(95), "containerRoot": root(95) }), &environment).unwrap();
        for key in ["socketRoot", "containerRoot"] {
            let error = make(json!({ key: root(96) }), &environment).unwrap_err();
            assert!(error.contains("would be 108 bytes long") && error.contains(key), "{error}");
        }
    }

    #[test]
    fn addresses_are_stable() {
        let mac = |args: &str| make(json!({}), &environment("net1", args)).unwrap().mac;
        let vm = |namespace: &str, pod: &str| {
            mac(&format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={pod};K8S_POD_UID={pod}"))
        };
        // A fixed value: what was made up once must not change with a new version.
        assert_eq!(vm("ns", "virt-launcher-my-vm-abcde"), vm("ns", "virt-launcher-my-vm-fghij"));
        assert_ne!(vm("ns", "virt-launcher-my-vm-abcde"), vm("other", "virt-launcher-my-vm-abcde"));
        assert_ne!(vm("ns", "plain-abcde"), vm("ns", "plain-fghij"));
        assert_ne!(mac("K8S_POD_UID=a"), mac("K8S_POD_UID=b"));
        assert_eq!(mac(""), mac(""));
        let first = u8::from_str_radix(&mac("")[..2], 16).unwrap();
        assert_eq!(first & 3, 2, "locally administered, of one station");
        assert_eq!(mac("").len(), 17);
    }

    #[test]
    fn cut_names_are_nobodys() {
        // As the API server does it: 58 characters of "virt-launcher-NAME-", and five of its own.
        let pod = |machine: &str, random: &str| {
            let base = format!("virt-launcher-{machine}-");
            format!("{}{random}", &base[..base.len().min(58)])
        };
        let made = |more: &serde_json::Value, machine: &str, random: &str| {
            let args = format!("K8S_POD_NAMESPACE=ns;K8S_POD_NAME={0};K8S_POD_UID={0}", pod(machine, random));
            make(more.clone(), &environment("net1", &args)).map(|made| made.mac)
        };
        let name = |length: usize| format!("a-{}", "x".repeat(length - 2));
        let checked = json!({ "spoofCheck": true });
        assert_eq!(made(&checked, &name(42), "abcde").unwrap(), made(&checked, &name(42), "fghij").unwrap());
        for machine in [name(43), name(44), name(63), format!("{}-two", name(43))] {
            let plain = json!({});
            assert_ne!(made(&plain, &machine, "abcde").unwrap(), made(&plain, &machine, "fghij").unwrap(), "{machine}");
            let error = made(&checked, &machine, "abcde").unwrap_err();
            assert!(error.contains("macAddress"), "{machine}: {error}");
            let asked = json!({ "spoofCheck": true, "runtimeConfig": { "mac": "02:00:00:00:00:01" } });
            assert_eq!(made(&asked, &machine, "abcde").unwrap(), "02:00:00:00:00:01");
        }
    }

    #[test]
    fn an_address_asked_for_is_taken() {
        let capability = |mac: &str| json!({ "runtimeConfig": { "mac": mac } });
        let plain = environment("net1", "");
        assert_eq!(make(capability("52-54-00-AB-cd-EF"), &plain).unwrap().mac, "52:54:00:ab:cd:ef");
        let multus = environment("net1", "MAC=02:00:00:00:00:01");
        assert_eq!(make(json!({}), &multus).unwrap().mac, "02:00:00:00:00:01");
        assert_eq!(make(capability("52:54:00:00:00:02"), &multus).unwrap().mac, "52:54:00:00:00:02");
        for wrong in ["x", "52:54:00:00:00", "01:00:00:00:00:01", "00:00:00:00:00:00", "+2:00:00:00:00:00"] {
            assert!(make(capability(wrong), &plain).unwrap_err().contains("MAC address"), "{wrong}");
        }
    }

    #[test]
    fn differences_are_named() {
        let made = make(json!({ "vlan": 5 }), &environment("net1", "")).unwrap();
        let mut running = proto::PortStatus {
            target: made.socket.clone(),
            network: "blue".into(),
            vlan: Some(5),
            mac: Some(made.mac.clone()),
            ..Default::default()
        };
        assert!(made.differences(&running).is_empty());
        running.vlan = None;
        running.spoofcheck = true;
        assert_eq!(made.differences(&running), ["vlan", "spoofCheck"]);
    }

    #[test]
    fn queues_are_compared_if_the_switch_tells_them() {
        let made = |more| make(more, &environment("net1", "")).unwrap();
        for (configured, running, same) in [
            (json!({ "queues": 4 }), Some(4), true),
            (json!({ "queues": 4 }), Some(2), false),
            (json!({ "queues": 4 }), Some(256), false),
            (json!({}), Some(256), true),
            (json!({}), Some(4), false),
            (json!({ "queues": 4 }), None, true),
            (json!({}), None, true),
        ] {
            let running = proto::PortStatus { max_queues: running, ..Default::default() };
            assert_eq!(!made(configured).differences(&running).contains(&"queues"), same, "{running:?}");
        }
    }
}
