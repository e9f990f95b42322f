//! Multus, as CNI plugins see it, and what KubeVirt makes of its result.

use anyhow::{Context, Result, bail, ensure};
use e2e::machine;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The network in the VMs, and the name of the pod's interface that KubeVirt makes of it: "pod" and a part of its SHA-256.
pub(crate) const NETWORK: &str = "blue";
pub(crate) const INTERFACE: &str = "pod16477688c0e";
/// Largest packet in the network: one that guests do not take by themselves.
pub(crate) const MTU: u32 = 2000;
/// The network that we ship as a sample.
const SAMPLE: &str = "deploy/kubevirt/network.yaml";

/// A pod, as far as CNI knows it.
#[derive(Debug, Clone)]
pub(crate) struct Sandbox {
    pub(crate) pod: String,
    pub(crate) uid: String,
    pub(crate) container_id: String,
    /// The device that the kubelet has given to the pod.
    pub(crate) device: String,
}

/// See the module.
pub(crate) struct Multus {
    program: PathBuf,
    config: Value,
    /// Parent of the folders of device-info files, `dp` and `cni`.
    pub(crate) device_info: PathBuf,
}

impl Multus {
    /// With the sample network, but the paths and the MTU of this test.
    pub(crate) fn new(control: &Path, socket_root: &Path, device_info: &Path) -> Result<Self> {
        let text = fs::read_to_string(machine::repository().join(SAMPLE)).context(SAMPLE)?;
        let (start, end) = (text.find('{').context(SAMPLE)?, text.rfind('}').context(SAMPLE)?);
        let mut config: Value = serde_json::from_str(&text[start..=end]).context(SAMPLE)?;
        config["control"] = json!(control);
        config["socketRoot"] = json!(socket_root);
        config["mtu"] = json!(MTU);
        let program = machine::built_program("sluice-cni", "SLUICE_CNI")?;
        Ok(Self { program, config, device_info: device_info.to_owned() })
    }

    /// ADD with all that Multus passes; gives what KubeVirt would write into its annotation `network-info`.
    pub(crate) fn add(&self, sandbox: &Sandbox, mac: &str) -> Result<Value> {
        let info = self.info_file(sandbox);
        self.copy_device_info(sandbox, &info)?;
        let mut config = self.config.clone();
        config["deviceID"] = json!(sandbox.device);
        config["pciBusID"] = json!(sandbox.device);
        config["runtimeConfig"] = json!({ "deviceID": sandbox.device, "CNIDeviceInfoFile": info, "mac": mac });
        let result = self.call("ADD", sandbox, &config, mac)?.context("ADD printed nothing")?;
        self.network_info(&result, sandbox, &info)
    }

    /// DEL, after which Multus removes its own file.
    pub(crate) fn del(&self, sandbox: &Sandbox) -> Result<()> {
        let mut config = self.config.clone();
        config["deviceID"] = json!(sandbox.device);
        let printed = self.call("DEL", sandbox, &config, "")?;
        ensure!(printed.is_none(), "DEL printed {printed:?}");
        self.forget(sandbox);
        Ok(())
    }

    /// Removes the file of a pod.
    pub(crate) fn forget(&self, sandbox: &Sandbox) {
        let _ = fs::remove_file(self.info_file(sandbox));
    }

    /// GC, with these pods still there.
    pub(crate) fn gc(&self, valid: &[&Sandbox]) -> Result<()> {
        let mut config = self.config.clone();
        // The first version that knows it.
        config["cniVersion"] = json!("1.1.0");
        let valid = valid.iter().map(|sandbox| json!({ "containerID": sandbox.container_id, "ifname": INTERFACE }));
        config["cni.dev/valid-attachments"] = valid.collect();
        let nobody =
            Sandbox { pod: String::new(), uid: String::new(), container_id: String::new(), device: String::new() };
        self.call("GC", &nobody, &config, "").map(drop)
    }

    fn call(&self, command: &str, sandbox: &Sandbox, config: &Value, mac: &str) -> Result<Option<Value>> {
        let Sandbox { pod, uid, container_id, .. } = sandbox;
        let mut arguments = format!(
            "IgnoreUnknown=true;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};K8S_POD_INFRA_CONTAINER_ID={container_id};K8S_POD_UID={uid}"
        );
        if !mac.is_empty() {
            arguments.push_str(&format!(";MAC={mac}"));
        }
        let mut plugin = Command::new(&self.program);
        plugin.env_clear().env("CNI_COMMAND", command).env("CNI_PATH", "/opt/cni/bin");
        plugin.env("SLUICE_CNI_DEVICE_INFO_DIR", &self.device_info);
        if !container_id.is_empty() {
            plugin.env("CNI_CONTAINERID", container_id).env("CNI_IFNAME", INTERFACE).env("CNI_ARGS", arguments);
            plugin.env("CNI_NETNS", netns(sandbox));
        }
        plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = plugin.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        child.stdin.take().context("no standard input")?.write_all(config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let printed = String::from_utf8(output.stdout)?;
        if !output.status.success() {
            bail!("sluice-cni {command}: {printed}");
        }
        Ok(if printed.is_empty() { None } else { Some(serde_json::from_str(&printed)?) })
    }

    /// Where Multus keeps what the CNI plugin may tell about the device.
    fn info_file(&self, sandbox: &Sandbox) -> PathBuf {
        let name = format!("default-sluice-blue-{}_{INTERFACE}", sandbox.container_id);
        self.device_info.join("cni").join(name)
    }

    /// Through structs that know these fields only.
    fn copy_device_info(&self, sandbox: &Sandbox, to: &Path) -> Result<()> {
        let from = self.device_info.join("dp").join(format!("sluice.io-sockets-{}-device.json", sandbox.device));
        let text = fs::read_to_string(&from).with_context(|| from.display().to_string())?;
        let info: Value = serde_json::from_str(&text)?;
        let user = &info["vhost-user"];
        let copy = json!({ "type": info["type"], "version": info["version"],
            "vhost-user": { "mode": user["mode"], "path": user["path"] } });
        fs::create_dir_all(to.parent().context("no parent")?)?;
        Ok(fs::write(to, copy.to_string())?)
    }

    /// Multus reports interfaces that have a sandbox, with the device; KubeVirt finds the VM's network by the name of the
    /// pod's interface.
    fn network_info(&self, result: &Value, sandbox: &Sandbox, info: &Path) -> Result<Value> {
        let interfaces = result["interfaces"].as_array().context("no interfaces in the result")?;
        let in_pod: Vec<_> = interfaces.iter().filter(|interface| interface["sandbox"] == netns(sandbox)).collect();
        let [interface] = in_pod[..] else { bail!("not one interface in the pod: {result}") };
        ensure!(interface["name"] == INTERFACE, "{interface}");
        let device: Value = serde_json::from_str(&fs::read_to_string(info)?)?;
        let network = json!({ "network": NETWORK, "deviceInfo": device, "mac": interface["mac"],
            "mtu": interface["mtu"] });
        Ok(json!({ "interfaces": [network] }))
    }
}

fn netns(sandbox: &Sandbox) -> String {
    format!("/var/run/netns/cni-{}", sandbox.uid)
}
