//! The plugin under the library that the runtimes use: libcni of Debian's golang-github-appc-cni-dev, with the IPAM
//! plugin host-local of containernetworking-plugins. Where they are not installed, there is nothing to test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::support::{Bench, PLUGIN, Pod};

const LIBRARY: &str = "/usr/share/gocode/src/github.com/containernetworking/cni/libcni";
const HOST_LOCAL: &str = "/usr/lib/cni/host-local";

/// Compiles our driver of the library.
fn driver(bench: &Bench) -> Option<PathBuf> {
    let go = Command::new("go").arg("version").output().is_ok_and(|output| output.status.success());
    if !go || !Path::new(LIBRARY).exists() || !Path::new(HOST_LOCAL).exists() {
        let needs = "golang-go, golang-github-appc-cni-dev and containernetworking-plugins";
        assert!(std::env::var_os("SLUICE_REQUIRE_PACKAGES").is_none(), "this needs {needs}");
        eprintln!("skipped: needs {needs}");
        return None;
    }
    let program = bench.path("libcni");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/plugin/libcni.go");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program).arg(source).env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode");
    let cache = Path::new(PLUGIN).with_file_name("go-cache");
    assert!(build.env("GOCACHE", cache).status().unwrap().success());
    Some(program)
}

#[test]
fn libcni_understands_us() {
    let bench = Bench::new();
    let Some(driver) = driver(&bench) else { return };
    let plugins = bench.path("plugins");
    std::fs::create_dir(&plugins).unwrap();
    std::os::unix::fs::symlink(PLUGIN, plugins.join("sluice-cni")).unwrap();
    std::os::unix::fs::symlink(HOST_LOCAL, plugins.join("host-local")).unwrap();
    let pod = Pod::new(1);
    let call = |command: &str, config: &Value| -> Output {
        let list = json!({ "cniVersion": config["cniVersion"], "name": "blue", "plugins": [config] });
        std::fs::write(bench.path("blue.conflist"), list.to_string()).unwrap();
        let capabilities = json!({ "deviceID": "sock-1", "mac": "02:00:00:00:00:07", "unknown": 1 });
        let mut run = Command::new(&driver);
        run.arg(command).arg(bench.path("blue.conflist")).arg(&plugins).arg(bench.path("cache"));
        run.arg(capabilities.to_string()).envs(pod.environment(command)).output().unwrap()
    };
    bench.device("sock-1");
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let mut config = bench.config(version, "sock-1");
        config["capabilities"] = json!({ "deviceID": true, "mac": true, "ips": true });
        let ranges = json!([[{ "subnet": "10.22.0.0/16" }]]);
        config["ipam"] = json!({ "type": "host-local", "ranges": ranges, "dataDir": bench.path("leases") });
        let ok = |command: &str| {
            let output = call(command, &config);
            assert!(output.status.success(), "{version} {command}: {output:?}");
            output.stdout
        };
        ok("VALIDATE");
        let result: Value = serde_json::from_slice(&ok("ADD")).unwrap();
        assert_eq!(result["interfaces"][0]["mac"], "02:00:00:00:00:07", "{result}");
        assert_eq!(result["interfaces"][0]["sandbox"], pod.netns());
        assert!(result["ips"][0]["address"].as_str().unwrap().starts_with("10.22."), "{result}");
        assert_eq!(result["ips"][0]["interface"], 0);
        assert_eq!(bench.port_names(), ["sock-1.pod6c270ef2f25"]);
        if version >= "0.4.0" {
            ok("CHECK");
        }
        ok("DEL");
        ok("DEL");
        assert!(bench.ports().is_empty());
    }
    // Our errors reach the user through the library.
    let mut wrong = bench.config("1.0.0", "sock-1");
    wrong["vlna"] = 5.into();
    let output = call("ADD", &wrong);
    assert!(String::from_utf8_lossy(&output.stderr).contains("unsupported key \"vlna\" with value 5"), "{output:?}");
    let leases: Vec<_> =
        std::fs::read_dir(bench.path("leases/blue")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(leases.iter().all(|name| !name.to_string_lossy().starts_with("10.22.")), "{leases:?}");
}
