//! A node with the device plugin, the switch and the CNI plugin on it, and a kubelet that is played.

use anyhow::{Context, Result, ensure};
use e2e::machine;
use e2e::scratch::Scratch;
use e2e::switch::Switch;
use e2e::wait;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::kubelet::{FakeKubelet, Node, Plugin, SOCKETS};
use crate::multus::{INTERFACE, Multus};

const DEVICES: usize = 8;
/// Two lists of pods and the grace period between them, many times over.
const RECLAIM_LIMIT: Duration = Duration::from_secs(15);

/// See the module.
pub(crate) struct Cluster {
    // Dropped in this order.
    pub(crate) kubelet: FakeKubelet,
    pub(crate) multus: Multus,
    pub(crate) switch: Switch,
    /// Where pods of a source and a target of a migration meet.
    pub(crate) shared: Scratch,
    _plugin: Plugin,
    node: Node,
}

impl Cluster {
    /// Starts all of it, with folders owned by KubeVirt's user.
    pub(crate) async fn start() -> Result<Self> {
        let node = Node::new();
        open_to_pods(&node.path(""))?;
        let kubelet = node.kubelet();
        let program = machine::built_program("sluice-device-plugin", "SLUICE_DEVICE_PLUGIN")?;
        let count = DEVICES.to_string();
        let arguments = ["--owner", "107:107", "--sockets", &count, "--reconcile", "0.2", "--grace", "0.3"];
        let plugin = Plugin::start(&node, &program, &arguments).await;
        kubelet.wait_for_capacity(SOCKETS, DEVICES).await;
        let switch = Switch::start(&[])?;
        let multus = Multus::new(&switch.control(), &node.root(), &node.path("var/run/devinfo"))?;
        let shared = Scratch::new("shared")?;
        Ok(Self { kubelet, multus, switch, shared, _plugin: plugin, node })
    }

    /// The kubelet restarts. From then on it sends the plugin another `:authority`.
    pub(crate) async fn restart_kubelet(&mut self) {
        self.kubelet.stop().await;
        self.kubelet.serve();
        self.kubelet.wait_for_capacity(SOCKETS, DEVICES).await;
    }

    /// The switch's ports.
    pub(crate) fn ports(&self) -> Result<Vec<Value>> {
        let ports = self.switch.json(&["port", "list"])?;
        Ok(ports.as_array().context("no list of ports")?.clone())
    }

    /// Waits until no socket, file or port is left of any VM.
    pub(crate) async fn check_empty(&self) -> Result<()> {
        ensure!(self.ports()?.is_empty(), "ports are left: {:?}", self.ports()?);
        for entry in fs::read_dir(self.switch.state())? {
            let entry = entry?;
            // The keeper's socket is no memory.
            if !entry.file_type()?.is_file() {
                continue;
            }
            let path = entry.path();
            let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
            ensure!(!text.contains(INTERFACE), "{} remembers a port: {text:?}", path.display());
        }
        wait::until_true("folders and device-info files to be empty", RECLAIM_LIMIT, || {
            let folders = fs::read_dir(self.node.root())?.flatten();
            let info = ["dp", "cni"].iter().map(|kind| self.multus.device_info.join(kind));
            folders
                .map(|folder| folder.path())
                .chain(info)
                .try_fold(true, |empty, folder| Ok(empty && is_empty(&folder)?))
        })?;
        self.kubelet.wait_for_capacity(SOCKETS, DEVICES).await;
        Ok(())
    }

    /// Waits until the folder of a device is empty.
    pub(crate) fn wait_reclaimed(&self, device: &str) -> Result<()> {
        let folder = self.node.root().join(device);
        wait::until_true(&format!("{device} to be empty"), RECLAIM_LIMIT, || is_empty(&folder))
    }

    /// What helps to see why something did not work.
    pub(crate) fn diagnosis(&self) -> String {
        let ports = self.ports().map_or_else(|error| error.to_string(), |ports| format!("{ports:#?}"));
        let files = e2e::process::run("find", &[&self.node.root().to_string_lossy(), "-ls"]);
        format!("--- ports: {ports}\n--- switch:\n{}\n--- folders:\n{files:?}", self.switch.log_tail())
    }
}

fn is_empty(folder: &Path) -> Result<bool> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot look into {}", folder.display()));
    Ok(entries?.next().is_none())
}

/// Lets KubeVirt's user go through a folder that was made for us alone.
pub(crate) fn open_to_pods(folder: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?)
}
