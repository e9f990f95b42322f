//! What KubeVirt makes of a domain when it reads it into its own types and writes it again. Shared with the systems tests.

use roxmltree::Node;
use sluice_binding_sidecar::edit::{is, with_document};

/// The domain as the next call sees it: laid out by Go, without comments, and with our interfaces stripped of what
/// `api.Interface` has no field for, but with what libvirt assigned. It has no field for overrides either.
pub(crate) fn go_reparse(xml: &str) -> String {
    with_document(xml, |document| {
        let mut out = String::new();
        write(xml, document.root_element(), 0, &mut out);
        out
    })
    .unwrap()
}

fn write(xml: &str, node: Node<'_, '_>, depth: usize, out: &mut String) {
    let indent = "\t".repeat(depth);
    let source = &xml[node.range()];
    let name = source[1..].split(|c: char| c.is_whitespace() || "/>".contains(c)).next().unwrap();
    out.push_str(&format!("{indent}<{name}"));
    for (name, value) in attributes(xml, node) {
        out.push_str(&format!(" {name}=\"{value}\""));
    }
    out.push('>');
    let is_known = |child: &Node<'_, '_>| !xml[child.range()].starts_with("<qemu:override");
    let elements: Vec<_> = node.children().filter(Node::is_element).filter(is_known).collect();
    if elements.is_empty() {
        out.push_str(&escape(node.text().unwrap_or_default()));
        out.push_str(&format!("</{name}>"));
        return;
    }
    for child in elements {
        out.push('\n');
        write(xml, child, depth + 1, out);
    }
    if is_interface(node) && !node.children().any(|child| is(child, "address")) {
        out.push_str(&format!(
            "\n{indent}\t<address type=\"pci\" domain=\"0x0000\" bus=\"0x02\" slot=\"0x00\" function=\"0x0\"></address>"
        ));
    }
    out.push_str(&format!("\n{indent}</{name}>"));
}

fn attributes(xml: &str, node: Node<'_, '_>) -> Vec<(String, String)> {
    let fields: Option<&[&str]> = match node.parent().is_some_and(is_interface) {
        true if is(node, "source") => Some(&["network", "dev", "bridge", "mode"]),
        true if is(node, "driver") => Some(&["name", "queues", "iommu"]),
        _ => None,
    };
    let kept = |name: &str| fields.is_none_or(|fields| fields.contains(&name));
    let attributes = node.attributes().filter(|attribute| kept(attribute.name()));
    let mut written: Vec<_> = attributes.map(|a| (xml[a.range_qname()].to_owned(), escape(a.value()))).collect();
    // Declarations of namespaces are no attributes to the parser.
    let new = node.namespaces().filter(|space| !inherited(node, space) && space.name() != Some("xml"));
    written.extend(new.map(|space| {
        let name = space.name().map_or("xmlns".into(), |prefix| format!("xmlns:{prefix}"));
        (name, escape(space.uri()))
    }));
    written
}

fn inherited(node: Node<'_, '_>, space: &roxmltree::Namespace<'_>) -> bool {
    node.parent_element().is_some_and(|parent| parent.namespaces().any(|other| other == space))
}

fn is_interface(node: Node<'_, '_>) -> bool {
    is(node, "interface")
        && node.attribute("type") == Some("vhostuser")
        && node
            .parent()
            .is_some_and(|parent| is(parent, "devices") && parent.parent_element().is_some_and(|p| is(p, "domain")))
}

fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;");
    text.replace('\n', "&#xA;").replace('\t', "&#x9;").replace('\r', "&#xD;")
}
