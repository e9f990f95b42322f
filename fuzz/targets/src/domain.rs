//! Domain XML, as it comes from KubeVirt or from anywhere else.

use sluice_binding_sidecar::domain::{Model, Nic, apply};
use sluice_binding_sidecar::edit::with_document;

pub(crate) fn run(data: &[u8]) {
    let Ok(xml) = std::str::from_utf8(data) else { return };
    let nic = Nic {
        name: "blue".into(),
        path: "/var/run/kubevirt-hooks/sidecar/userdata/blue/pod0123456789a".into(),
        mac: None,
        address: None,
        acpi_index: None,
        boot_order: None,
        link_down: false,
        model: Model::NonTransitional,
        queues: 2,
        queue_size: 1024,
        mtu: None,
    };
    let Ok(edited) = apply(xml, std::slice::from_ref(&nic)) else { return };
    // What comes out is a document, has the interface, and is left alone the second time.
    assert!(with_document(&edited, |_| ()).is_ok(), "{edited}");
    assert!(edited.contains(&nic.path));
    assert_eq!(apply(&edited, &[nic]).ok().as_deref(), Some(edited.as_str()));
}
