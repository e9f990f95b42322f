use serde_json::{Value, json};

use super::*;

fn config() -> Config {
    let lookup = |name| (name == "CONTAINER_NAME").then(|| "hook-sidecar-0".to_owned());
    Config::from_env(&lookup).unwrap()
}

/// Plans for one interface of network `blue`, with these additions.
fn plan_one(interface: Value, vmi: Value, entry: Value, config: &Config) -> Result<Plan, String> {
    let mut one = json!({"name": "blue", "binding": {"name": "vhostuser"}});
    let mut known = json!({"network": "blue", "deviceInfo": {"type": "vhost-user", "vhost-user": {"mode": "server",
        "path": "/var/run/vhostuser/s3"}}});
    let mut whole = json!({"spec": {"domain": {"devices": {}}}});
    for (base, more) in [(&mut one, interface), (&mut known, entry), (&mut whole, vmi)] {
        merge(base, more);
    }
    whole["spec"]["domain"]["devices"]["interfaces"] = json!([one]);
    let vmi = Vmi::parse(whole.to_string().as_bytes()).unwrap();
    let info = NetworkInfo::parse(json!({ "interfaces": [known] }).to_string().as_bytes()).unwrap();
    plan(&vmi, &info, config).map_err(|error| error.to_string())
}

fn merge(base: &mut Value, more: Value) {
    match (base, more) {
        (Value::Object(base), Value::Object(more)) => {
            for (key, value) in more {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, more) => *base = more,
    }
}

fn with_interface(interface: Value) -> Result<Nic, String> {
    plan_one(interface, json!({}), json!({}), &config()).map(|mut plan| plan.nics.remove(0))
}

fn with_path(path: &str, config: &Config) -> Result<Plan, String> {
    let entry = json!({"deviceInfo": {"vhost-user": {"path": path}}});
    plan_one(json!({}), json!({}), entry, config)
}

#[test]
fn goes_through_the_link() {
    let plan = plan_one(json!({}), json!({}), json!({}), &config()).unwrap();
    // sha256("blue") starts 16477688c0e.
    assert_eq!(plan.nics[0].path, "/var/run/kubevirt-hooks/hook-sidecar-0/userdata/blue/pod16477688c0e");
    let link = Link {
        dir: "/var/run/kubevirt-hooks/userdata".into(),
        name: "blue".into(),
        target: "/var/run/vhostuser/s3".into(),
    };
    assert_eq!(plan.links, [link]);
}

#[test]
fn names_the_socket_as_the_pod_or_the_device_does() {
    let legacy = json!({"status": {"interfaces": [{"name": "blue", "podInterfaceName": "net1"}]}});
    let plan = plan_one(json!({}), legacy, json!({}), &config()).unwrap();
    assert!(plan.nics[0].path.ends_with("/blue/net1"));
    let plan = with_path("/var/run/vhostuser/s3/own.sock", &config()).unwrap();
    assert!(plan.nics[0].path.ends_with("/blue/own.sock"));
    assert_eq!(plan.links[0].target, Path::new("/var/run/vhostuser/s3"));
    // What the device plugin writes when it does not know better.
    let plan = with_path("/var/run/vhostuser/s3/vhost.sock", &config()).unwrap();
    assert!(plan.nics[0].path.ends_with("/blue/pod16477688c0e"));
    let known = Config { socket_name: "s.sock".into(), ..config() };
    let plan = with_path("/var/run/vhostuser/s3/vhost.sock", &known).unwrap();
    assert!(plan.nics[0].path.ends_with("/blue/vhost.sock"));
}

#[test]
fn layouts() {
    let shared = Config { links: Links::In { here: "/l".into(), compute: "/l".into() }, ..config() };
    assert_eq!(with_path("/var/run/vhostuser/s3/a", &shared).unwrap().nics[0].path, "/l/blue/a");
    let none = Config { links: Links::None, ..config() };
    let plan = with_path("/var/run/vhostuser/s3/a", &none).unwrap();
    assert_eq!((plan.nics[0].path.as_str(), plan.links.len()), ("/var/run/vhostuser/s3/a", 0));
    let plan = with_path("/var/run/vhostuser/s3", &none).unwrap();
    assert_eq!(plan.nics[0].path, "/var/run/vhostuser/s3/pod16477688c0e");
}

#[test]
fn a_fixed_path_is_the_same_whatever_device_it_is() {
    let fixed = Config { links: Links::None, layout: Layout::Fixed, ..config() };
    let path = |path| with_path(path, &fixed).unwrap().nics[0].path.clone();
    // As the device plugin tells it (its test `a_fixed_path_is_for_one`), and as the CNI plugin does.
    assert_eq!(path("/var/run/vhostuser/vhost.sock"), "/var/run/vhostuser/pod16477688c0e");
    assert_eq!(path("/var/run/vhostuser/sock-3/pod16477688c0e"), "/var/run/vhostuser/pod16477688c0e");
    let linked = Config { layout: Layout::Fixed, ..config() };
    let plan = with_path("/var/run/vhostuser/sock-3/a", &linked).unwrap();
    assert_eq!(plan.links[0].target, Path::new("/var/run/vhostuser"));
}

#[test]
fn refuses_paths_that_lead_elsewhere() {
    for path in ["relative/s3/a", "/var/run/vhostuser/../../etc/a", "/"] {
        assert!(with_path(path, &config()).unwrap_err().contains("is not an absolute one"), "{path}");
    }
    assert!(with_path("/var/run/vhostuser/s3/a\nb", &config()).unwrap_err().contains("control characters"));
    let client = json!({"deviceInfo": {"vhost-user": {"mode": "client"}}});
    assert!(plan_one(json!({}), json!({}), client, &config()).unwrap_err().contains("mode 'client'"));
    let none = json!({"deviceInfo": null});
    assert!(plan_one(json!({}), json!({}), none, &config()).unwrap_err().contains("no vhost-user device"));
}

#[test]
fn refuses_paths_that_the_kernel_does_not_take() {
    let none = Config { links: Links::None, ..config() };
    let path = |length: usize| format!("/var/run/vhostuser/s3/{:a<1$}", "", length - 22);
    assert_eq!(with_path(&path(107), &none).unwrap().nics[0].path.len(), 107);
    assert!(with_path(&path(108), &none).unwrap_err().contains("has 108 bytes, and the kernel takes at most 107"));
}

#[test]
fn mac_is_the_users_then_the_networks() {
    let mac = |interface: Value, entry: Value| {
        plan_one(interface, json!({}), entry, &config()).map(|plan| plan.nics[0].mac.clone())
    };
    let ours = json!({"macAddress": "02:00:00:00:00:0A"});
    let theirs = json!({"mac": "02:00:00:00:00:0b"});
    assert_eq!(mac(ours.clone(), theirs.clone()).unwrap().unwrap(), "02:00:00:00:00:0a");
    assert_eq!(mac(json!({}), theirs).unwrap().unwrap(), "02:00:00:00:00:0b");
    assert_eq!(mac(json!({"macAddress": "02-00-00-00-00-0a"}), json!({})).unwrap().unwrap(), "02:00:00:00:00:0a");
    assert_eq!(mac(json!({}), json!({})).unwrap(), None);
    for wrong in ["02:00:00:00:00", "02:00:00:00:00:0g", "x' y='"] {
        assert!(mac(json!({ "macAddress": wrong }), json!({})).unwrap_err().contains("is not a MAC address"));
    }
}

#[test]
fn pci_addresses() {
    let address = |text: &str| with_interface(json!({ "pciAddress": text })).map(|nic| nic.address);
    let expected = PciAddress(["0x0000", "0x81", "0x1f", "0x7"].map(String::from));
    assert_eq!(address("0000:81:1f.7").unwrap(), Some(expected));
    assert_eq!(address("").unwrap(), None);
    for wrong in ["0000:81:1f.8", "81:1f.7", "0000:81:1f:7", "0000.81.1f.7", "00000:81:1f.7", "0000:8g:1f.0", "a"] {
        let error = address(wrong).unwrap_err();
        assert!(error.contains("is not a PCI address like 0000:02:00.0"), "{error}");
    }
}

#[test]
fn the_other_fields() {
    let nic = with_interface(json!({"acpiIndex": 7, "bootOrder": 2, "state": "down"})).unwrap();
    assert_eq!((nic.acpi_index, nic.boot_order, nic.link_down), (Some(7), Some(2), true));
    let nic = with_interface(json!({"acpiIndex": 0, "state": "up"})).unwrap();
    assert_eq!((nic.acpi_index, nic.boot_order, nic.link_down), (None, None, false));
    assert_eq!((nic.queues, nic.queue_size, nic.mtu, nic.model), (1, 1024, None, Model::NonTransitional));
    let vmi = json!({"spec": {"domain": {"cpu": {"cores": 4}, "devices": {"networkInterfaceMultiqueue": true,
        "useVirtioTransitional": true}}}});
    let plan = plan_one(json!({"model": "virtio"}), vmi, json!({"mtu": 9000}), &config()).unwrap();
    let nic = &plan.nics[0];
    assert_eq!((nic.queues, nic.mtu, nic.model), (4, Some(9000), Model::Transitional));
    // Guests take this without being told.
    assert_eq!(plan_one(json!({}), json!({}), json!({"mtu": 1500}), &config()).unwrap().nics[0].mtu, None);
    assert!(with_interface(json!({"model": "e1000"})).unwrap_err().contains("its model is 'e1000'"));
}

#[test]
fn names_become_files_and_are_checked() {
    for name in ["../etc", "a/b", "", ".blue.new", "a b"] {
        let vmi = json!({"spec": {"domain": {"devices": {"interfaces": [
            {"name": name, "binding": {"name": "vhostuser"}}]}}}});
        let vmi = Vmi::parse(vmi.to_string().as_bytes()).unwrap();
        let info = NetworkInfo::example([name].into_iter(), Path::new("/var/run/vhostuser"));
        let error = plan(&vmi, &info, &config()).unwrap_err().to_string();
        assert!(error.contains("the name has other characters"), "{error}");
    }
}
