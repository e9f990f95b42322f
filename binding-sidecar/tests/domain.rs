//! The domain's edits: over documents such as KubeVirt makes, over arbitrary ones, and over hostile ones.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use sluice_binding_sidecar::config::Config;
use sluice_binding_sidecar::domain::{Model, Nic, PciAddress, apply};
use sluice_binding_sidecar::edit::{MAX_DEPTH, MAX_SIZE};
use sluice_binding_sidecar::network_info::NetworkInfo;
use sluice_binding_sidecar::plan::plan;
use sluice_binding_sidecar::vmi::Vmi;

mod reparse;

use reparse::go_reparse;

fn nic(name: &str) -> Nic {
    Nic {
        name: name.into(),
        path: format!("/var/run/kubevirt-hooks/hook-sidecar-0/userdata/{name}/pod0123456789a"),
        mac: None,
        address: None,
        acpi_index: None,
        boot_order: None,
        link_down: false,
        model: Model::NonTransitional,
        queues: 1,
        queue_size: 1024,
        mtu: None,
    }
}

fn refusal(xml: &str) -> String {
    apply(xml, &[nic("blue")]).unwrap_err().to_string()
}

const SIMPLE: &str = "<domain><devices/></domain>";

// -- documents such as KubeVirt makes

fn case(name: &str, kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/domains/{name}.{kind}"))
}

fn nics_of(name: &str) -> Vec<Nic> {
    let lookup = |name| (name == "CONTAINER_NAME").then(|| "hook-sidecar-0".to_owned());
    let config = Config::from_env(&lookup).unwrap();
    let vmi = Vmi::parse(&fs::read(case(name, "vmi.json")).unwrap()).unwrap();
    let info = NetworkInfo::parse(&fs::read(case(name, "info.json")).unwrap()).unwrap();
    plan(&vmi, &info, &config).unwrap().nics
}

const CASES: [&str; 4] = ["one-nic", "numa-hugepages", "commandline", "reparsed"];

#[test]
fn golden() {
    for name in CASES {
        let result = apply(&fs::read_to_string(case(name, "xml")).unwrap(), &nics_of(name)).unwrap();
        let expected = case(name, "expected.xml");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&expected, &result).unwrap();
        }
        assert_eq!(result, fs::read_to_string(&expected).unwrap(), "{name}");
    }
}

#[test]
fn golden_documents_keep_their_other_lines() {
    for name in CASES {
        let before = fs::read_to_string(case(name, "xml")).unwrap();
        let after = apply(&before, &nics_of(name)).unwrap();
        let mut after = after.lines();
        let gone: Vec<_> = before.lines().filter(|line| !after.by_ref().clone().any(|other| other == *line)).collect();
        let ours = |line: &&str| line.contains("<cell") || name == "reparsed";
        assert!(gone.iter().all(ours), "{name}: {gone:#?}");
    }
}

#[test]
fn twice_is_once_also_through_kubevirt() {
    for name in CASES {
        let nics = nics_of(name);
        let once = apply(&fs::read_to_string(case(name, "xml")).unwrap(), &nics).unwrap();
        assert_eq!(apply(&once, &nics).unwrap(), once, "{name}");
        let again = apply(&go_reparse(&once), &nics).unwrap();
        assert_eq!(apply(&go_reparse(&again), &nics).unwrap(), again, "{name}");
        for nic in &nics {
            assert_eq!(again.matches(&format!("path='{}'", nic.path)).count(), 1);
        }
        assert_eq!(again.matches("rx_queue_size='1024'").count(), nics.len());
    }
}

/// Less what KubeVirt itself writes against the schema: empty elements, and a prefix without its declaration.
#[test]
fn libvirts_schema_knows_what_we_write() {
    const SCHEMA: &str = "/usr/share/libvirt/schemas/domain.rng";
    let xmllint = Command::new("xmllint").arg("--version").output().is_ok();
    if !xmllint || !Path::new(SCHEMA).exists() {
        assert!(std::env::var_os("SLUICE_REQUIRE_PACKAGES").is_none(), "this needs libvirt-clients");
        eprintln!("skipped: needs libvirt-clients");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for name in CASES.iter().filter(|name| **name != "commandline") {
        let mut result = apply(&fs::read_to_string(case(name, "xml")).unwrap(), &nics_of(name)).unwrap();
        for empty in ["<bios></bios>", "<baseBoard></baseBoard>", "<chassis></chassis>"] {
            result = result.replace(empty, "");
        }
        let file = folder.path().join(name);
        fs::write(&file, result).unwrap();
        let output = Command::new("xmllint").args(["--noout", "--relaxng", SCHEMA]).arg(file).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

// -- single rules

#[test]
fn without_interfaces_nothing_changes() {
    for name in CASES {
        let xml = fs::read_to_string(case(name, "xml")).unwrap();
        assert_eq!(apply(&xml, &[]).unwrap(), xml);
    }
}

#[test]
fn all_fields_are_written() {
    let full = Nic {
        mac: Some("02:00:00:00:00:01".into()),
        address: Some(PciAddress(["0x0000", "0x02", "0x00", "0x0"].map(String::from))),
        acpi_index: Some(3),
        boot_order: Some(1),
        link_down: true,
        model: Model::Transitional,
        queues: 4,
        mtu: Some(9000),
        ..nic("blue")
    };
    let expected = "<interface type='vhostuser'><mac address='02:00:00:00:00:01'/>\
        <source type='unix' path='/var/run/kubevirt-hooks/hook-sidecar-0/userdata/blue/pod0123456789a' mode='server'/>\
        <link state='down'/><model type='virtio-transitional'/>\
        <driver queues='4' rx_queue_size='1024' tx_queue_size='1024'/><boot order='1'/>\
        <acpi index='3'/><alias name='ua-blue'/>\
        <address type='pci' domain='0x0000' bus='0x02' slot='0x00' function='0x0'/></interface>";
    let result = apply(SIMPLE, std::slice::from_ref(&full)).unwrap();
    assert!(result.contains(expected), "{result}");
    // What the VM says beats what libvirt assigned.
    let present = "<domain><devices><interface type='x'><alias name='ua-blue'/><mac address='52:54:00:00:00:09'/>\
        <address type='pci' bus='0x09'/></interface></devices></domain>";
    assert!(apply(present, &[full]).unwrap().contains(expected));
}

#[test]
fn what_libvirt_assigned_is_kept() {
    let present = |mac: &str| {
        format!(
            "<domain><devices><interface type=\"vhostuser\"><mac address=\"{mac}\"></mac><source mode=\"server\"></source>\
             <address type=\"pci\" bus=\"0x09\"><zpci uid=\"1\"></zpci></address><alias name=\"ua-blue\"></alias>\
             </interface></devices></domain>"
        )
    };
    let result = apply(&present("52:54:00:00:00:09"), &[nic("blue")]).unwrap();
    assert!(result.contains("<mac address='52:54:00:00:00:09'/>"), "{result}");
    assert!(result.contains("<address type='pci' bus='0x09'><zpci uid='1'/></address>"), "{result}");
    assert!(!apply(&present(""), &[nic("blue")]).unwrap().contains("<mac"));
}

const QEMU: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

fn mtu_of(name: &str, mtu: u32) -> String {
    format!(
        "<qemu:device alias='ua-{name}'><qemu:frontend><qemu:property name='host_mtu' type='unsigned' value='{mtu}'/>\
         </qemu:frontend></qemu:device>"
    )
}

#[test]
fn the_mtu_goes_past_libvirt() {
    let nics = [Nic { mtu: Some(9000), ..nic("blue") }, nic("red"), Nic { mtu: Some(1400), ..nic("green") }];
    let both = mtu_of("blue", 9000) + &mtu_of("green", 1400);
    let result = apply(SIMPLE, &nics).unwrap();
    assert!(result.ends_with(&format!("</devices><qemu:override xmlns:qemu='{QEMU}'>{both}</qemu:override></domain>")));
    assert!(!result.contains("<mtu"), "{result}");
    // Where the prefix is declared, it is not declared again.
    let declared = format!("<domain xmlns:qemu='{QEMU}'><devices/><qemu:commandline/></domain>");
    let result = apply(&declared, &nics).unwrap();
    assert!(
        result.ends_with(&format!("<qemu:commandline/><qemu:override>{both}</qemu:override></domain>")),
        "{result}"
    );
    assert_eq!(apply(&result, &nics).unwrap(), result);
    // Where it got lost, too, and where it means something else.
    for domain in ["<domain><devices/><qemu:commandline/></domain>", "<domain xmlns:qemu='x'><devices/></domain>"] {
        let result = apply(domain, &nics).unwrap();
        assert!(result.contains(&format!("<qemu:override xmlns:qemu='{QEMU}'>{both}</qemu:override>")), "{result}");
        assert_eq!(apply(&result, &nics).unwrap(), result);
    }
}

#[test]
fn overrides_of_others_stay() {
    let other = "<q:device alias='ua-disk'><q:frontend/></q:device>";
    let ours = "<q:device alias='ua-blue'><q:frontend/></q:device>";
    let domain = |overrides: &str| format!("<domain xmlns:q='{QEMU}'><devices/>{overrides}<on_reboot/></domain>");
    let of = |devices: &str| format!("<q:override>{devices}</q:override>");
    let new = format!("<qemu:override xmlns:qemu='{QEMU}'>{}</qemu:override>", mtu_of("blue", 9000));
    let with_mtu = [Nic { mtu: Some(9000), ..nic("blue") }];
    let cases = [
        // Before, after, and after without an MTU.
        (of(other), of(other) + "<on_reboot/>" + &new, of(other) + "<on_reboot/>"),
        (of(&(ours.to_owned() + other)), of(other) + "<on_reboot/>" + &new, of(other) + "<on_reboot/>"),
        (of(ours), new.clone() + "<on_reboot/>", "<on_reboot/>".into()),
        (of(ours) + &of(ours), new.clone() + "<on_reboot/>", "<on_reboot/>".into()),
        (of(""), of("") + "<on_reboot/>" + &new, of("") + "<on_reboot/>"),
    ];
    for (before, after, without) in cases {
        let result = apply(&domain(&before), &with_mtu).unwrap();
        assert!(result.ends_with(&format!("</devices>{after}</domain>")), "{before}: {result}");
        assert_eq!(apply(&result, &with_mtu).unwrap(), result);
        let result = apply(&domain(&before), &[nic("blue")]).unwrap();
        assert!(result.ends_with(&format!("</devices>{without}</domain>")), "{before}: {result}");
    }
}

#[test]
fn other_interfaces_are_not_overridden() {
    let others = "<interface type='ethernet'><alias name='ua-default'/></interface>\
        <interface type='vhostuser'><alias name='ua-blue2'/></interface><interface type='x'/>";
    let result = apply(&format!("<domain><devices>{others}<disk/></devices></domain>"), &[nic("blue"), nic("red")]);
    let result = result.unwrap();
    let (before, after) = result.split_once(others).unwrap();
    assert!(before.ends_with("<devices>") && after.ends_with("<disk/></devices></domain>"));
    let (blue, red) = (after.find("ua-blue'").unwrap(), after.find("ua-red'").unwrap());
    assert!(blue < red, "guests count interfaces in the order of the VM");
}

#[test]
fn duplicates_become_one() {
    let one = "<interface type='x'><alias name='ua-blue'/></interface>";
    let xml = format!("<domain>\n <devices>\n  {one}\n  <disk/>\n  {one}\n </devices>\n</domain>");
    let result = apply(&xml, &[nic("blue"), nic("red")]).unwrap();
    assert_eq!(result.matches("'ua-blue'").count(), 1);
    assert!(result.contains("<disk/>\n  <interface"), "{result}");
}

#[test]
fn names_and_paths_are_escaped() {
    let odd = Nic { path: "/a'b<c>&\"d".into(), ..nic("blue") };
    let result = apply(SIMPLE, &[odd]).unwrap();
    assert!(result.contains("path='/a&apos;b&lt;c&gt;&amp;\"d'"), "{result}");
}

#[test]
fn memory_becomes_shared() {
    let memfd = "<source type='memfd'/>";
    let access = "<access mode='shared'/>";
    let cases = [
        ("", format!("<memoryBacking>{memfd}{access}</memoryBacking>")),
        ("<memoryBacking/>", format!("<memoryBacking>{memfd}{access}</memoryBacking>")),
        ("<memoryBacking></memoryBacking>", format!("<memoryBacking>{memfd}{access}</memoryBacking>")),
        ("<memoryBacking><hugepages/></memoryBacking>", format!("<memoryBacking><hugepages/>{access}</memoryBacking>")),
        (
            "<memoryBacking><source type='file'/><locked/></memoryBacking>",
            format!("<memoryBacking><source type='file'/><locked/>{access}</memoryBacking>"),
        ),
        (
            "<memoryBacking><access mode=\"shared\"></access></memoryBacking>",
            format!("<memoryBacking><access mode=\"shared\"></access>{memfd}</memoryBacking>"),
        ),
        (
            "<memoryBacking><source type='memfd'/><access/></memoryBacking>",
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>".into(),
        ),
        (
            "<memoryBacking><source type='anonymous'/><hugepages/></memoryBacking>",
            format!("<memoryBacking><source type='anonymous'/><hugepages/>{access}</memoryBacking>"),
        ),
    ];
    for (backing, expected) in cases {
        let xml = format!("<domain>{backing}<devices/></domain>");
        let result = apply(&xml, &[nic("blue")]).unwrap();
        assert!(result.starts_with(&format!("<domain>{expected}<devices>")), "{backing}: {result}");
    }
}

#[test]
fn numa_cells_become_shared() {
    let xml =
        "<domain><devices/><cpu><numa><cell id='0'/><cell\n memAccess='shared' id='1'></cell></numa></cpu></domain>";
    let result = apply(xml, &[nic("blue")]).unwrap();
    let expected = "<cell memAccess='shared' id='0'/><cell\n memAccess='shared' id='1'></cell>";
    assert!(result.contains(expected), "{result}");
}

#[test]
fn private_memory_is_refused() {
    let cases = [
        "<memoryBacking><access mode='private'/></memoryBacking>",
        "<memoryBacking><hugepages/><access mode=\"private\"></access></memoryBacking>",
        "<memoryBacking><source type='anonymous'/></memoryBacking>",
        "<cpu><numa><cell id='0' memAccess='private'/></numa></cpu>",
    ];
    for settings in cases {
        let error = refusal(&format!("<domain>{settings}<devices/></domain>"));
        assert!(error.contains("but vhost-user needs memory that can be shared"), "{error}");
    }
}

#[test]
fn layout_follows_the_document() {
    let xml = "<domain>\r\n    <devices>\n    </devices>\n</domain>";
    let result = apply(xml, &[nic("blue")]).unwrap();
    assert!(result.contains("\n    <memoryBacking>\n      <source type='memfd'/>\n"), "{result}");
    assert!(result.contains("<devices>\n      <interface type='vhostuser'>\n        <source"), "{result}");
    assert!(result.ends_with("\n      </interface>\n    </devices>\n</domain>"), "{result}");
}

// -- hostile documents

#[test]
fn no_xml_and_other_xml_is_refused() {
    for broken in ["", " ", "x", "<domain>", "<domain></devices>", "<domain><devices/></domain><domain/>", "\u{0}"] {
        assert!(refusal(broken).contains("not well-formed"), "{broken}: {}", refusal(broken));
    }
    assert!(refusal("<network><devices/></network>").contains("the root is not <domain>"));
    assert!(refusal("<domain/>").contains("there is no <devices>"));
    assert!(refusal("<domain xmlns='http://x'><devices/></domain>").contains("the root is not <domain>"));
    assert!(refusal("<domain><devices/><foo:bar/></domain>").contains("not well-formed"));
}

#[test]
fn entities_are_refused() {
    let bomb = "<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><domain><devices/>&b;</domain>";
    let file = "<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain><devices/>&x;</domain>";
    let external = "<!DOCTYPE domain SYSTEM 'http://example.org/d.dtd'><domain><devices/></domain>";
    for xml in [bomb, file, external] {
        assert!(refusal(xml).contains("has a DTD"), "{}", refusal(xml));
    }
    assert!(refusal("<domain><devices/>&unknown;</domain>").contains("not well-formed"));
}

#[test]
fn size_depth_and_number_are_bounded() {
    let nested = |depth: usize| format!("<domain><devices/>{}{}</domain>", "<a>".repeat(depth), "</a>".repeat(depth));
    assert!(apply(&nested(MAX_DEPTH - 1), &[nic("blue")]).is_ok());
    assert!(refusal(&nested(MAX_DEPTH)).contains("nested deeper"));
    assert!(refusal(&nested(20_000)).contains("nested deeper"));
    assert!(refusal(&nested(60_000)).contains("more than the 30000 nodes"));
    assert!(refusal(&format!("<domain>{}", "<a>".repeat(MAX_SIZE / 3 - 10))).contains("more than the 30000 nodes"));
    assert!(refusal(&format!("<domain>{}</domain>", " ".repeat(MAX_SIZE))).contains("bytes, more than"));
    // Many attributes of one element, each of which a parser may compare with all others.
    let attributes: String = (0..20_000).map(|n| format!(" a{n}=''")).collect();
    assert!(refusal(&format!("<domain{attributes}><devices/></domain>")).contains("more than the 512 attributes"));
}

// -- arbitrary documents

/// Some element that is not ours, with everything that XML can have in it.
fn arbitrary_element() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec![
        "a",
        "devices",
        "interface",
        "memoryBacking",
        "cell",
        "numa",
        "access",
        "source",
        "x-y.z",
        "qemu:arg",
        "k:v",
    ]);
    let attribute = ("[a-z]{1,5}", "[ -~&&[^<&\"']]{0,8}", any::<bool>());
    let attributes = prop::collection::vec(attribute, 0..3).prop_map(|attributes| {
        let quoted = attributes.into_iter().enumerate().map(|(n, (name, value, double))| match double {
            true => format!(" {name}{n}=\"{value}\""),
            false => format!("\n{name}{n} = '{value}'"),
        });
        quoted.collect::<String>()
    });
    let leaf = prop_oneof![
        "[ -~&&[^<&\\]]]{0,12}",
        Just("<!-- <interface><alias name='ua-blue'/></interface> -->".to_owned()),
        Just("<![CDATA[<devices> & </domain>]]>".to_owned()),
        Just("<?pi <x> ?>".to_owned()),
        Just("&amp;&#x41;&lt;".to_owned()),
        Just("\n\t".to_owned()),
        Just("žluťoučký 🐎".to_owned()),
    ];
    leaf.prop_recursive(4, 24, 4, move |inner| {
        (name.clone(), attributes.clone(), prop::collection::vec(inner, 0..4)).prop_map(
            |(name, attributes, content)| {
                // Not in the root's vocabulary, so that it cannot be a setting of memory by chance.
                match content.is_empty() {
                    true => format!("<w{name}{attributes}/>"),
                    false => format!("<w{name}{attributes} >{}</w{name}\n>", content.concat()),
                }
            },
        )
    })
    .prop_map(|text| text.replace("<wqemu:arg", "<qemu:arg").replace("</wqemu:arg", "</qemu:arg"))
    .prop_map(|text| text.replace("<wk:v", "<wkv").replace("</wk:v", "</wkv"))
}

#[derive(Debug, Clone)]
struct Parts {
    around: Vec<String>,
    declared: bool,
    present: bool,
    backing: usize,
}

fn arbitrary_parts() -> impl Strategy<Value = Parts> {
    (prop::collection::vec(arbitrary_element(), 5), any::<bool>(), any::<bool>(), 0..4usize)
        .prop_map(|(around, declared, present, backing)| Parts { around, declared, present, backing })
}

impl Parts {
    /// The document, with these in the places of our interface and of the memory's settings. All in one line, mostly:
    /// KubeVirt has each element on a line of its own, but nobody promised that.
    fn document(&self, ours: &str, backing: &str) -> String {
        let [a, b, c, d, e] = self.around.as_slice() else { unreachable!() };
        let xmlns = if self.declared { " xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'" } else { "" };
        format!(
            "<?xml version='1.0'?><!-- - --><domain type='kvm'{xmlns}>{a}<uuid/>{backing}<devices>{b}<emulator/>\
             <interface type='x'><alias name='ua-other'/></interface>{ours}{c}</devices>{d}<cpu><numa>\
             <cell memAccess='shared'/></numa></cpu>{e}</domain>\n"
        )
    }

    fn backing(&self) -> &'static str {
        ["", "<memoryBacking/>", "<memoryBacking><hugepages/> </memoryBacking>", "<memoryBacking>t</memoryBacking>"]
            [self.backing]
    }

    fn shared_backing(&self) -> String {
        let (memfd, access) = ("<source type='memfd'/>", "<access mode='shared'/>");
        match self.backing {
            0 | 1 => format!("<memoryBacking>{memfd}{access}</memoryBacking>"),
            2 => format!("<memoryBacking><hugepages/>{access} </memoryBacking>"),
            _ => format!("<memoryBacking>t{memfd}{access}</memoryBacking>"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn everything_else_stays(parts in arbitrary_parts()) {
        let present = "<interface type=\"vhostuser\"><mac address=\"52:54:00:00:00:09\"/><alias name=\"ua-blue\"></alias></interface>";
        let before = parts.document(if parts.present { present } else { "" }, parts.backing());
        let nics = [nic("blue")];
        let after = apply(&before, &nics).unwrap();

        // The same document with the new interface and settings in the places of the old ones.
        let start = after.rfind("<interface type='vhostuser'>").unwrap();
        let end = start + after[start..].find("</interface>").unwrap() + "</interface>".len();
        let expected = parts.document(&after[start..end], &parts.shared_backing());
        prop_assert_eq!(&after, &expected);

        // Twice is once, also through KubeVirt.
        prop_assert_eq!(apply(&after, &nics).unwrap(), after.clone());
        let again = apply(&go_reparse(&after), &nics).unwrap();
        prop_assert_eq!(apply(&go_reparse(&again), &nics).unwrap(), again);
    }

    #[test]
    fn never_panics(text in ".{0,200}", cut in 0..400usize) {
        let _ = apply(&text, &[nic("blue")]);
        let whole = fs::read_to_string(case("reparsed", "xml")).unwrap();
        let mut broken = whole.clone().into_bytes();
        broken.truncate(whole.len().saturating_sub(cut * 7));
        let _ = apply(&String::from_utf8_lossy(&broken), &[nic("blue")]);
        let at = cut * 9 % whole.len();
        let _ = apply(&[&whole[..at], &text, &whole[at..]].concat(), &[nic("blue")]);
    }
}
