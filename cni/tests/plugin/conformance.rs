//! Every command, in every version, with everything that can be wrong with a call.

use serde_json::{Value, json};

use crate::support::{Bench, PLUGIN, Pod, run};

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const COMMANDS: [&str; 5] = ["ADD", "DEL", "CHECK", "GC", "STATUS"];

fn known(command: &str, version: &str) -> bool {
    let since = match command {
        "CHECK" => "0.4.0",
        "GC" | "STATUS" => "1.1.0",
        _ => "0.3.0",
    };
    version >= since
}

#[test]
fn every_command_in_every_version() {
    let bench = Bench::new();
    let pod = Pod::new(1);
    for version in VERSIONS {
        let mut config = bench.config(version, &bench.device("sock-1"));
        config["mtu"] = 9000.into();
        config["runtimeConfig"] = json!({ "ips": ["10.1.2.3/24", "fd00::1/64"] });
        let result = pod.add(&config);
        assert_eq!(result["cniVersion"], version);
        let interfaces = result["interfaces"].as_array().unwrap();
        assert_eq!(interfaces.len(), 1);
        assert_eq!(interfaces[0]["name"], pod.interface.as_str());
        assert_eq!(interfaces[0]["sandbox"], pod.netns());
        assert_eq!(interfaces[0]["mtu"], 9000);
        assert_eq!(interfaces[0]["mac"], bench.ports()[0]["mac"]);
        assert_eq!(interfaces[0]["socketPath"].is_string(), version == "1.1.0");
        let ips = result["ips"].as_array().unwrap();
        assert_eq!((&ips[0]["address"], &ips[0]["interface"]), (&json!("10.1.2.3/24"), &json!(0)));
        let family = |place: usize| ips[place].get("version").and_then(Value::as_str);
        let families = if version < "1.0.0" { [Some("4"), Some("6")] } else { [None, None] };
        assert_eq!([family(0), family(1)], families);

        let mut later = config.clone();
        later["prevResult"] = result;
        later["cni.dev/valid-attachments"] = json!([{ "containerID": pod.container, "ifname": pod.interface }]);
        for command in ["CHECK", "STATUS", "GC"] {
            let answer = pod.call(command, &later);
            if known(command, version) {
                answer.silent();
            } else {
                let (code, message) = answer.error();
                assert_eq!(code, 1, "{command} {version}: {message}");
            }
        }
        assert_eq!(bench.ports().len(), 1, "{version}");
        pod.call("DEL", &later).silent();
        pod.call("DEL", &later).silent();
        assert!(bench.ports().is_empty());
    }
}

#[test]
fn version_tells_what_is_spoken() {
    for (input, echoed) in
        [(r#"{"cniVersion":"0.3.1"}"#, "0.3.1"), (r#"{"cniVersion":"9.9.9"}"#, "9.9.9"), ("", "1.1.0")]
    {
        let answer = run(&[("CNI_COMMAND", "VERSION".into())], input.as_bytes()).result();
        assert_eq!(answer, json!({ "cniVersion": echoed, "supportedVersions": VERSIONS }));
    }
}

#[test]
fn people_can_ask_for_the_version() {
    let output = std::process::Command::new(PLUGIN).arg("--version").env_clear().output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("sluice-cni {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_environment_is_checked() {
    let bench = Bench::down();
    let config = bench.config("1.1.0", "sock-1").to_string();
    let needed: [(&str, &[&str]); 5] = [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
        ("GC", &["CNI_PATH"]),
        ("STATUS", &[]),
    ];
    for (command, variables) in needed {
        for variable in variables {
            let mut environment = Pod::new(1).environment(command);
            environment.retain(|(name, _)| name != variable);
            let (code, message) = run(&environment, config.as_bytes()).error();
            assert_eq!(code, 4, "{command} {variable}");
            assert!(message.contains(variable), "{message}");
        }
        for (variable, value) in
            [("CNI_CONTAINERID", "../x"), ("CNI_IFNAME", "a/b"), ("CNI_IFNAME", "0123456789abcdef")]
        {
            let mut environment = Pod::new(1).environment(command);
            environment.push((variable, value.into()));
            let (code, message) = run(&environment, config.as_bytes()).error();
            assert_eq!(code, 4, "{command} {variable}: {message}");
        }
    }
    for (command, expected) in [("", "CNI_COMMAND is not set"), ("add", "CNI_COMMAND \"add\" is unknown")] {
        let (code, message) = run(&[("CNI_COMMAND", command.into())], config.as_bytes()).error();
        assert_eq!(code, 4);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn the_configuration_is_checked() {
    let bench = Bench::new();
    let good = bench.config("1.1.0", &bench.device("sock-1"));
    // Key, value, code for ADD, and whether DEL minds too.
    let cases: [(&str, Value, u64, bool); 25] = [
        ("cniVersion", json!("0.2.0"), 1, true),
        ("cniVersion", json!("2.0.0"), 1, true),
        ("cniVersion", json!(1), 7, true),
        ("cniVersion", json!(null), 1, true),
        ("vlna", json!(5), 2, false),
        ("bridge", json!("br0"), 2, false),
        ("rateLimit", json!({ "ingress": 5 }), 2, false),
        ("rateLimit", json!({ "rx": "1" }), 7, false),
        ("rateLimit", json!({ "rx": "fast" }), 7, false),
        ("vlan", json!("5"), 7, false),
        ("vlan", json!(4095), 7, false),
        ("trunk", json!([]), 7, false),
        ("trunk", json!(["x"]), 7, false),
        ("mtu", json!(67), 7, false),
        ("queues", json!(0), 7, false),
        ("network", json!("a/b"), 7, false),
        ("name", json!("../a"), 7, false),
        ("name", json!(null), 7, false),
        ("socketRoot", json!("relative"), 7, false),
        ("socketRoot", json!(format!("/{}", "x".repeat(100))), 7, false),
        ("socketRoot", json!("/nonexistent"), 11, false),
        ("runtimeConfig", json!({ "mac": "x" }), 7, false),
        ("runtimeConfig", json!({ "deviceID": "other" }), 7, false),
        ("deviceID", json!(""), 7, false),
        ("deviceID", json!(null), 7, false),
    ];
    let pod = Pod::new(1);
    for (key, value, expected, del_minds) in cases {
        let mut config = good.clone();
        config[key] = value.clone();
        let (code, message) = pod.call("ADD", &config).error();
        assert_eq!(code, expected, "{key}={value}: {message}");
        let del = pod.call("DEL", &config);
        if del_minds {
            assert_eq!(del.error().0, expected, "{key}={value}");
        } else {
            del.silent();
        }
        assert!(bench.ports().is_empty(), "{key}={value}");
    }
    // Whatever else the runtime puts in does not matter.
    let mut config = good.clone();
    for (key, value) in
        [("args", json!({ "cni": { "logicNetworkName": "n" } })), ("dns", json!({})), ("x.y/z", json!(1))]
    {
        config[key] = value;
    }
    pod.add(&config);
    pod.call("DEL", &config).silent();

    for command in COMMANDS {
        for text in ["", "{", "[]", "\u{fffd}", "null"] {
            let (code, message) = run(&pod.environment(command), text.as_bytes()).error();
            assert_eq!(code, 6, "{command} {text:?}: {message}");
        }
    }
}

#[test]
fn hostile_devices_get_nothing() {
    let bench = Bench::new();
    let pod = Pod::new(1);
    let long = "x".repeat(300);
    for device in ["../x", "/", "..", ".", "a/../../b", "a\0b", "a\nb", "a,mac=x", long.as_str()] {
        let config = bench.config("1.0.0", device);
        let (code, message) = pod.call("ADD", &config).error();
        assert_eq!(code, 7, "{device:?}: {message}");
        assert!(message.len() < 400, "{message}");
        pod.call("DEL", &config).silent();
    }
    let (code, message) = pod.call("ADD", &bench.config("1.0.0", "")).error();
    assert_eq!(code, 7);
    assert!(message.contains("k8s.v1.cni.cncf.io/resourceName"), "{message}");
    assert!(bench.ports().is_empty());
}

#[test]
fn check_finds_what_changed() {
    let bench = Bench::new();
    let pod = Pod::new(1);
    let mut config = bench.config("1.0.0", &bench.device("sock-1"));
    let (code, message) = pod.call("CHECK", &config).error();
    assert_eq!(code, 7, "{message}");
    config["prevResult"] = pod.add(&config);
    pod.call("CHECK", &config).silent();

    for (key, value) in [("vlan", 5), ("queues", 4)] {
        let mut changed = config.clone();
        changed[key] = value.into();
        let (code, message) = pod.call("CHECK", &changed).error();
        let named = message.ends_with(&format!("is not as configured in: {key}"));
        assert_eq!((code, named), (100, true), "{message}");
    }
    let mut other = config.clone();
    other["prevResult"]["interfaces"][0]["mac"] = "02:00:00:00:00:01".into();
    assert_eq!(pod.call("CHECK", &other).error().0, 7);
    other["prevResult"]["interfaces"] = json!([]);
    assert_eq!(pod.call("CHECK", &other).error().0, 7);

    assert!(bench.operate(&["port", "del", "sock-1.pod6c270ef2f25"]).status.success());
    let (code, message) = pod.call("CHECK", &config).error();
    assert_eq!((code, message.contains("has no port")), (100, true), "{message}");
}
