//! The MTU that a guest learns from its device.
//!
//! libvirt's own `<mtu>` is of no use here: with it, libvirt (seen in 11.3) sets the MTU of the interface's network device
//! on the host too, of which vhost-user has none, and the domain does not start. So QEMU is told past libvirt, by an
//! override of the device's property, which libvirt knows since 8.2.

use roxmltree::Node;

use crate::domain::{Nic, alias};
use crate::edit::{Edits, Element};

/// The namespace of libvirt's elements for QEMU alone.
const QEMU: &str = "http://libvirt.org/schemas/domain/qemu/1.0";
/// QEMU's property of the device.
const PROPERTY: &str = "host_mtu";

/// Writes what the interfaces need anew, in the place of what an earlier call has written. Overrides of other devices stay.
pub(crate) fn edit_overrides(edits: &mut Edits<'_>, domain: Node<'_, '_>, nics: &[Nic]) {
    let mut wanted = wanted(domain, nics);
    let aliases: Vec<_> = nics.iter().map(|nic| alias(&nic.name)).collect();
    let is_ours = |device: &Node<'_, '_>| {
        is_qemu(*device, "device") && device.attribute("alias").is_some_and(|a| aliases.iter().any(|ours| ours == a))
    };
    for present in domain.children().filter(|node| is_qemu(*node, "override")) {
        let devices: Vec<_> = present.children().filter(Node::is_element).collect();
        let ours: Vec<_> = devices.iter().copied().filter(is_ours).collect();
        if ours.is_empty() {
            continue;
        }
        if ours.len() < devices.len() {
            ours.into_iter().for_each(|device| edits.remove(device));
        } else if let Some(element) = wanted.take() {
            edits.replace(present, &element);
        } else {
            edits.remove(present);
        }
    }
    edits.append(domain, wanted.as_slice());
}

/// The element for all interfaces that need it; none if there is no such interface.
fn wanted(domain: Node<'_, '_>, nics: &[Nic]) -> Option<Element> {
    let mut element = Element::new("qemu:override");
    if domain.lookup_namespace_uri(Some("qemu")) != Some(QEMU) {
        element = element.with("xmlns:qemu", QEMU);
    }
    let with_mtu: Vec<_> = nics.iter().filter_map(|nic| Some((nic, nic.mtu?))).collect();
    for (nic, mtu) in &with_mtu {
        let property = Element::new("qemu:property").with("name", PROPERTY).with("type", "unsigned").with("value", mtu);
        let mut frontend = Element::new("qemu:frontend");
        frontend.push(property);
        let mut device = Element::new("qemu:device").with("alias", alias(&nic.name));
        device.push(frontend);
        element.push(device);
    }
    (!with_mtu.is_empty()).then_some(element)
}

/// Whether an element is libvirt's `name` for QEMU. Where the declaration of its prefix got lost, the prefix has become a
/// part of the name (see [`crate::edit::with_document`]).
pub(crate) fn is_qemu(node: Node<'_, '_>, name: &str) -> bool {
    let tag = node.tag_name();
    node.is_element()
        && match tag.namespace() {
            Some(namespace) => namespace == QEMU && tag.name() == name,
            None => tag.name().strip_prefix("qemu_") == Some(name),
        }
}
