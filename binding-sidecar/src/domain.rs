//! Edits of a libvirt domain: our interfaces, and the shared memory that vhost-user needs.

use roxmltree::{Document, Node};

use crate::edit::{Edits, Element, XmlError, check_depth, child, children, is, with_document};
use crate::mtu::edit_overrides;
use crate::plan::is_mac;

/// What KubeVirt puts before the names of aliases. libvirt keeps only aliases that start so.
const ALIAS_PREFIX: &str = "ua-";

/// An interface of the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Name of the VM's interface. It becomes the alias, by which KubeVirt and we find it again.
    pub name: String,
    /// Where QEMU listens.
    pub path: String,
    /// Its address; libvirt's, or none, if not given.
    pub mac: Option<String>,
    /// Its place on the PCI bus; libvirt's, or none, if not given.
    pub address: Option<PciAddress>,
    /// Its index in ACPI.
    pub acpi_index: Option<u32>,
    /// Its place in the boot order.
    pub boot_order: Option<u32>,
    /// Whether it starts without carrier.
    pub link_down: bool,
    /// Its model.
    pub model: Model,
    /// Its queue pairs.
    pub queues: u32,
    /// Descriptors of each queue.
    pub queue_size: u16,
    /// Largest layer-3 packet, if the guest has to be told.
    pub mtu: Option<u32>,
}

/// Domain, bus, slot and function, each as `0x..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciAddress(pub [String; 4]);

/// Model of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// For guests that know legacy virtio only.
    Transitional,
    /// Virtio 1.0 and later only.
    NonTransitional,
}

/// Why a domain was refused.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// The document itself.
    #[error("domain XML: {0}")]
    Xml(#[from] XmlError),
    /// It is XML, but not a domain.
    #[error("domain XML: {0}")]
    NotADomain(&'static str),
    /// Its memory is private, and somebody wants that.
    #[error("domain XML: {0}, but vhost-user needs memory that can be shared")]
    PrivateMemory(&'static str),
    /// The result is not what was intended. This is a mistake of ours.
    #[error("the edited domain XML is wrong: {0}")]
    Result(String),
}

/// The domain with the given interfaces, in shared memory. Interfaces that are there already, by alias, are written anew;
/// every byte outside of them and of the memory settings stays. Without interfaces, all of it stays.
///
/// # Errors
/// [`DomainError`].
pub fn apply(xml: &str, nics: &[Nic]) -> Result<String, DomainError> {
    let edited = with_document(xml, |document| edit(xml, document, nics))??;
    with_document(&edited, |document| check(document, nics))
        .map_err(|error| DomainError::Result(error.to_string()))??;
    Ok(edited)
}

fn edit(xml: &str, document: &Document<'_>, nics: &[Nic]) -> Result<String, DomainError> {
    check_depth(document)?;
    let (domain, devices) = devices(document)?;
    let mut edits = Edits::new(xml);
    if !nics.is_empty() {
        edit_interfaces(&mut edits, devices, nics);
        share_memory(&mut edits, domain, devices)?;
        share_numa_cells(&mut edits, domain)?;
        edit_overrides(&mut edits, domain, nics);
    }
    Ok(edits.apply())
}

fn devices<'a, 'i>(document: &'a Document<'i>) -> Result<(Node<'a, 'i>, Node<'a, 'i>), DomainError> {
    let domain = document.root_element();
    if !is(domain, "domain") {
        return Err(DomainError::NotADomain("the root is not <domain>"));
    }
    let devices = child(domain, "devices").ok_or(DomainError::NotADomain("there is no <devices>"))?;
    Ok((domain, devices))
}

/// Whether the result has what it should have.
fn check(document: &Document<'_>, nics: &[Nic]) -> Result<(), DomainError> {
    let (_, devices) = devices(document)?;
    for nic in nics {
        let ours: Vec<_> = with_alias(devices, &nic.name).collect();
        let path = ours.first().and_then(|node| child(*node, "source")).and_then(|source| source.attribute("path"));
        if ours.len() != 1 || path != Some(&nic.path) {
            return Err(DomainError::Result(format!("interface '{}' is not in it once", nic.name)));
        }
    }
    Ok(())
}

/// The alias of an interface.
pub(crate) fn alias(name: &str) -> String {
    format!("{ALIAS_PREFIX}{name}")
}

fn with_alias<'a, 'i>(devices: Node<'a, 'i>, name: &str) -> impl Iterator<Item = Node<'a, 'i>> {
    let alias = alias(name);
    children(devices, "interface")
        .filter(move |node| child(*node, "alias").is_some_and(|a| a.attribute("name") == Some(&alias)))
}

fn edit_interfaces(edits: &mut Edits<'_>, devices: Node<'_, '_>, nics: &[Nic]) {
    let mut new = Vec::new();
    for nic in nics {
        let mut present = with_alias(devices, &nic.name);
        match present.next() {
            Some(node) => edits.replace(node, &interface(nic, Some(node))),
            None => new.push(interface(nic, None)),
        }
        present.for_each(|duplicate| edits.remove(duplicate));
    }
    // After the other interfaces: guests count them in this order.
    match children(devices, "interface").last() {
        Some(last) => new.iter().for_each(|element| edits.insert_after(last, element)),
        None => edits.append(devices, &new),
    }
}

/// The element of an interface. What the VM does not say comes from `present`, where libvirt may have written it.
fn interface(nic: &Nic, present: Option<Node<'_, '_>>) -> Element {
    let present = |name| present.and_then(|node| child(node, name));
    let mut element = Element::new("interface").with("type", "vhostuser");
    let libvirts = || present("mac")?.attribute("address").filter(|mac| is_mac(mac)).map(String::from);
    if let Some(mac) = nic.mac.clone().or_else(libvirts) {
        element.push(Element::new("mac").with("address", mac));
    }
    element.push(Element::new("source").with("type", "unix").with("path", &nic.path).with("mode", "server"));
    if nic.link_down {
        element.push(Element::new("link").with("state", "down"));
    }
    element.push(Element::new("model").with("type", nic.model.name()));
    element.push(driver(nic));
    if let Some(order) = nic.boot_order {
        element.push(Element::new("boot").with("order", order));
    }
    if let Some(index) = nic.acpi_index {
        element.push(Element::new("acpi").with("index", index));
    }
    element.push(Element::new("alias").with("name", alias(&nic.name)));
    if let Some(address) = nic.address.as_ref().map(pci_address).or_else(|| present("address").map(Element::copy_of)) {
        element.push(address);
    }
    element
}

fn driver(nic: &Nic) -> Element {
    let mut driver = Element::new("driver");
    if nic.queues > 1 {
        driver = driver.with("queues", nic.queues);
    }
    driver.with("rx_queue_size", nic.queue_size).with("tx_queue_size", nic.queue_size)
}

fn pci_address(PciAddress([domain, bus, slot, function]): &PciAddress) -> Element {
    let address = Element::new("address").with("type", "pci").with("domain", domain).with("bus", bus);
    address.with("slot", slot).with("function", function)
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Self::Transitional => "virtio-transitional",
            Self::NonTransitional => "virtio-non-transitional",
        }
    }
}

/// Sees to it that all memory comes from files that QEMU can hand to the switch. libvirt does not check that.
fn share_memory(edits: &mut Edits<'_>, domain: Node<'_, '_>, devices: Node<'_, '_>) -> Result<(), DomainError> {
    let access = || Element::new("access").with("mode", "shared");
    let memfd = || Element::new("source").with("type", "memfd");
    let Some(backing) = child(domain, "memoryBacking") else {
        let mut backing = Element::new("memoryBacking");
        backing.push(memfd());
        backing.push(access());
        edits.insert_before(devices, &backing);
        return Ok(());
    };
    let mut missing = Vec::new();
    let hugepages = child(backing, "hugepages").is_some();
    match child(backing, "source").map(|source| source.attribute("type")) {
        None if !hugepages => missing.push(memfd()),
        Some(Some("anonymous")) if !hugepages => {
            return Err(DomainError::PrivateMemory("memoryBacking has source type 'anonymous'"));
        }
        _ => {}
    }
    match child(backing, "access") {
        None => missing.push(access()),
        Some(present) => match present.attribute("mode") {
            Some("shared") => {}
            Some(_) => return Err(DomainError::PrivateMemory("memoryBacking has access mode 'private'")),
            None => edits.add_attribute(present, "mode", "shared"),
        },
    }
    if !missing.is_empty() {
        edits.append(backing, &missing);
    }
    Ok(())
}

/// The same for the cells of a NUMA topology, which beat the common setting.
fn share_numa_cells(edits: &mut Edits<'_>, domain: Node<'_, '_>) -> Result<(), DomainError> {
    let numa = child(domain, "cpu").and_then(|cpu| child(cpu, "numa"));
    for cell in numa.iter().flat_map(|numa| children(*numa, "cell")) {
        match cell.attribute("memAccess") {
            Some("shared") => {}
            Some(_) => return Err(DomainError::PrivateMemory("a NUMA cell has memAccess 'private'")),
            None => edits.add_attribute(cell, "memAccess", "shared"),
        }
    }
    Ok(())
}
