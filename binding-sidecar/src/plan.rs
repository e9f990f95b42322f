//! What is to be done for a VM: which interfaces its domain gets, and which links.

use std::fmt::Write;
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::config::{Config, Layout, Links};
use crate::domain::{Model, Nic, PciAddress};
use crate::links::Link;
use crate::network_info::NetworkInfo;
use crate::vmi::{Interface, Vmi};

/// Longest path of a socket, in bytes (`sun_path` less its terminator).
const MAX_SOCKET_PATH: usize = 107;
/// What a guest takes without being told.
const USUAL_MTU: u32 = 1500;
/// Hexadecimal digits of the hash in the name of a pod's interface.
const HASH_DIGITS: usize = 11;

/// What is to be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The interfaces, in the order of the VM.
    pub nics: Vec<Nic>,
    /// The links that their paths go through.
    pub links: Vec<Link>,
}

/// Why it cannot be done.
#[derive(Debug, thiserror::Error)]
#[error("interface '{interface}': {problem}")]
pub struct PlanError {
    /// The interface in question.
    pub interface: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

/// Makes the plan for the interfaces of `vmi` that are ours.
///
/// # Errors
/// [`PlanError`] for the first interface that cannot be served.
pub fn plan(vmi: &Vmi, info: &NetworkInfo, config: &Config) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    for interface in vmi.interfaces(&config.bindings) {
        let failed = |problem| PlanError { interface: interface.name.clone(), problem };
        let (nic, link) = serve(interface, vmi, info, config).map_err(failed)?;
        plan.nics.push(nic);
        plan.links.extend(link);
    }
    Ok(plan)
}

fn serve(interface: &Interface, vmi: &Vmi, info: &NetworkInfo, config: &Config) -> Result<(Nic, Option<Link>), String> {
    let name = checked_name(&interface.name)?;
    let (dir, file) = socket(name, vmi, info, config)?;
    let (path, link) = match &config.links {
        Links::None => (dir.join(file), None),
        Links::In { here, compute } => {
            let link = Link { dir: here.clone(), name: name.into(), target: dir };
            (compute.join(name).join(file), Some(link))
        }
    };
    let entry = info.network(name);
    let mac = [Some(interface.mac_address.as_str()), entry.map(|entry| entry.mac.as_str())];
    let nic = Nic {
        name: name.into(),
        path: checked_path(&path)?,
        mac: mac.into_iter().flatten().find(|mac| !mac.is_empty()).map(checked_mac).transpose()?,
        address: pci_address(&interface.pci_address)?,
        acpi_index: Some(interface.acpi_index).filter(|index| *index > 0),
        boot_order: interface.boot_order.filter(|order| *order > 0),
        link_down: interface.state == "down",
        model: model(interface, vmi)?,
        queues: vmi.queues(),
        queue_size: config.queue_size,
        mtu: entry.and_then(|entry| entry.mtu).filter(|mtu| *mtu > 0 && *mtu != USUAL_MTU),
    };
    Ok((nic, link))
}

/// Names become names of files, so they are held to what KubeVirt holds them to: letters, digits and dashes.
fn checked_name(name: &str) -> Result<&str, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    match !name.is_empty() && !name.starts_with('.') && name.chars().all(fits) {
        true => Ok(name),
        false => Err("the name has other characters than letters, digits, '-', '_' and '.', or starts with '.'".into()),
    }
}

/// The directory that the pod got for a network, and the socket's name in it.
fn socket(network: &str, vmi: &Vmi, info: &NetworkInfo, config: &Config) -> Result<(PathBuf, String), String> {
    let device = info.device(network).ok_or("network-info has no vhost-user device for it")?;
    if !matches!(device.mode.as_str(), "" | "server") {
        return Err(format!("its device wants mode '{}', but QEMU can only be the server", device.mode));
    }
    let path = &device.path;
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    let (Some(parent), true) = (path.parent(), path.is_absolute() && path.components().all(plain)) else {
        return Err(format!("the path of its device, '{}', is not an absolute one without '..'", path.display()));
    };
    let pod_interface = || vmi.pod_interface_name(network).map_or_else(|| pod_interface_name(network), String::from);
    let name = path.file_name().and_then(|name| name.to_str()).ok_or("the name of its socket is not UTF-8")?;
    // The switch names sockets after the pod's interfaces, which a device plugin does not know: it tells the directory
    // alone, or a name that stands for any.
    let (dir, name) = match name {
        name if name == config.socket_name => (parent, None),
        _ if parent == config.container_root => (path.as_path(), None),
        name => (parent, Some(name)),
    };
    let name = name.map_or_else(|| checked_name(&pod_interface()).map(String::from), |name| Ok(name.into()))?;
    let dir = match config.layout {
        Layout::ById => dir,
        Layout::Fixed => &config.container_root,
    };
    Ok((dir.into(), name))
}

/// The name that KubeVirt gives the pod's side of a network.
fn pod_interface_name(network: &str) -> String {
    let hash = Sha256::digest(network.as_bytes()).iter().fold(String::new(), |mut hex, byte| {
        // Writing to a string cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    format!("pod{}", &hash[..HASH_DIGITS])
}

fn checked_path(path: &Path) -> Result<String, String> {
    let text = path.to_str().ok_or("the path of its socket is not UTF-8")?;
    if text.chars().any(char::is_control) {
        return Err(format!("the path of its socket has control characters: {text:?}"));
    }
    match text.len() {
        ..=MAX_SOCKET_PATH => Ok(text.into()),
        length => Err(format!(
            "the path of its socket, {text}, has {length} bytes, and the kernel takes at most {MAX_SOCKET_PATH}; \
             use a shorter name for the network"
        )),
    }
}

/// A MAC address in the form that libvirt takes.
fn checked_mac(mac: &str) -> Result<String, String> {
    match is_mac(mac) {
        true => Ok(mac.replace('-', ":").to_ascii_lowercase()),
        false => Err(format!("'{mac}' is not a MAC address")),
    }
}

/// Whether this is a MAC address: six pairs of hexadecimal digits.
pub(crate) fn is_mac(mac: &str) -> bool {
    let pairs: Vec<_> = mac.split([':', '-']).collect();
    pairs.len() == 6 && pairs.iter().all(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// An address such as `0000:02:00.0`; empty is none.
fn pci_address(text: &str) -> Result<Option<PciAddress>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let wrong = || format!("'{text}' is not a PCI address like 0000:02:00.0");
    let parts: Vec<_> = text.split([':', '.']).collect();
    let [domain, bus, slot, function] = parts.as_slice() else { return Err(wrong()) };
    let separators: String = text.chars().filter(|c| !c.is_ascii_hexdigit()).collect();
    let hex = |part: &str, digits: usize| part.len() == digits && part.bytes().all(|b| b.is_ascii_hexdigit());
    let right = hex(domain, 4) && hex(bus, 2) && hex(slot, 2) && matches!(function.as_bytes(), [b'0'..=b'7']);
    match right && separators == "::." {
        true => Ok(Some(PciAddress([domain, bus, slot, function].map(|part| format!("0x{part}"))))),
        false => Err(wrong()),
    }
}

fn model(interface: &Interface, vmi: &Vmi) -> Result<Model, String> {
    match (interface.model.as_str(), vmi.transitional()) {
        ("" | "virtio", true) => Ok(Model::Transitional),
        ("" | "virtio", false) => Ok(Model::NonTransitional),
        (other, _) => Err(format!("its model is '{other}', and vhost-user takes virtio only")),
    }
}

#[cfg(test)]
mod tests;
