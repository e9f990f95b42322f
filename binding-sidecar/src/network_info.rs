//! `network-info`: what KubeVirt tells its sidecars about the networks of the pod.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tokio::time::{Instant, sleep};

/// Pause between two looks at the file.
const POLL: Duration = Duration::from_millis(200);
/// Largest file read. An annotation, which is where the file comes from, is 256 KiB at most.
const MAX_SIZE: u64 = 1 << 20;

/// The file's content, by network. KubeVirt writes it as `{"interfaces": [...]}`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(from = "File")]
pub struct NetworkInfo {
    networks: BTreeMap<String, NetworkEntry>,
}

#[derive(Debug, Deserialize)]
struct File {
    #[serde(default)]
    interfaces: Vec<NetworkEntry>,
}

/// What is known of one network.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NetworkEntry {
    network: String,
    /// The device that the pod got for it.
    pub device_info: Option<DeviceInfo>,
    /// Address that the CNI plugin chose (KubeVirt 1.8 and later).
    pub mac: String,
    /// MTU that the CNI plugin chose (KubeVirt 1.9 and later).
    pub mtu: Option<u32>,
}

/// A device, as the device-info specification of the Network Plumbing Working Group has it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct DeviceInfo {
    /// The part about vhost-user devices.
    pub vhost_user: Option<VhostUser>,
}

/// A vhost-user device.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct VhostUser {
    /// Who makes the socket: `server` is QEMU.
    pub mode: String,
    /// Where, as the compute container sees it.
    pub path: PathBuf,
}

/// Why a network's device is not known.
#[derive(Debug, thiserror::Error)]
pub enum NetworkInfoError {
    /// There is no file.
    #[error(
        "{path} cannot be read after {seconds} s ({source}); the binding needs 'downwardAPI: device-info' in the KubeVirt CR"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// How long it was tried.
        seconds: u64,
        /// Why.
        source: std::io::Error,
    },
    /// KubeVirt has not written it. It does that when Multus has reported the networks.
    #[error(
        "{path} is still {state} after {seconds} s; see whether pod annotation kubevirt.io/network-info is there \
         (on migration targets it needs KubeVirt 1.6.3 or later)"
    )]
    NotReady {
        /// The file.
        path: PathBuf,
        /// How long it was tried.
        seconds: u64,
        /// What it is instead: empty or unfinished.
        state: &'static str,
    },
    /// A network has no vhost-user device.
    #[error(
        "network '{network}' has no vhost-user device in {path} after {seconds} s; its NetworkAttachmentDefinition \
         needs annotation k8s.v1.cni.cncf.io/resourceName and type sluice-cni"
    )]
    NoDevice {
        /// The network.
        network: String,
        /// The file.
        path: PathBuf,
        /// How long it was tried.
        seconds: u64,
    },
}

impl NetworkInfo {
    /// Reads the JSON of KubeVirt.
    ///
    /// # Errors
    /// If it is something else, such as the first half of it.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// An example for the given networks, each with a directory of its own in `sockets`.
    pub fn example<'a>(networks: impl Iterator<Item = &'a str>, sockets: &Path) -> Self {
        let entry = |network: &str| {
            let device = VhostUser { mode: "server".into(), path: sockets.join(format!("DEVICE-OF-{network}")) };
            let device_info = Some(DeviceInfo { vhost_user: Some(device) });
            (network.to_owned(), NetworkEntry { network: network.into(), device_info, ..NetworkEntry::default() })
        };
        Self { networks: networks.map(entry).collect() }
    }

    /// What is known of a network.
    pub fn network(&self, name: &str) -> Option<&NetworkEntry> {
        self.networks.get(name)
    }

    /// The vhost-user device of a network.
    pub fn device(&self, network: &str) -> Option<&VhostUser> {
        self.network(network)?
            .device_info
            .as_ref()?
            .vhost_user
            .as_ref()
            .filter(|device| !device.path.as_os_str().is_empty())
    }
}

impl From<File> for NetworkInfo {
    fn from(file: File) -> Self {
        Self { networks: file.interfaces.into_iter().map(|entry| (entry.network.clone(), entry)).collect() }
    }
}

/// Waits until the file tells the devices of all `networks`. KubeVirt writes it when the pod is ready, and the kubelet
/// takes its time to show it.
///
/// # Errors
/// [`NetworkInfoError`] after `patience`.
pub async fn wait(path: &Path, networks: &[&str], patience: Duration) -> Result<NetworkInfo, NetworkInfoError> {
    let deadline = Instant::now() + patience;
    loop {
        let error = match look(path, networks, patience.as_secs()) {
            Ok(info) => return Ok(info),
            Err(error) => error,
        };
        if Instant::now() >= deadline {
            return Err(error);
        }
        sleep(POLL.min(patience)).await;
    }
}

fn look(path: &Path, networks: &[&str], seconds: u64) -> Result<NetworkInfo, NetworkInfoError> {
    let content = read(path).map_err(|source| NetworkInfoError::Unreadable { path: path.into(), seconds, source })?;
    let not_ready = |state| NetworkInfoError::NotReady { path: path.into(), seconds, state };
    if content.trim_ascii().is_empty() {
        return Err(not_ready("empty"));
    }
    let info = NetworkInfo::parse(&content).map_err(|_| not_ready("unfinished"))?;
    match networks.iter().find(|network| info.device(network).is_none()) {
        None => Ok(info),
        Some(network) => Err(NetworkInfoError::NoDevice { network: (*network).into(), path: path.into(), seconds }),
    }
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(MAX_SIZE).read_to_end(&mut content)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const INFO: &str = r#"{"interfaces":[
        {"network":"blue","deviceInfo":{"type":"vhost-user","version":"1.1.0","vhost-user":{"mode":"server",
            "path":"/var/run/vhostuser/s3"}},"mac":"02:00:00:00:00:01","mtu":9000},
        {"network":"sriov","deviceInfo":{"type":"pci","version":"1.0.0","pci":{"pci-address":"0000:65:00.2"}}},
        {"network":"plain"}]}"#;

    #[test]
    fn reads_what_kubevirt_writes() {
        let info = NetworkInfo::parse(INFO.as_bytes()).unwrap();
        assert_eq!(info.device("blue").unwrap().path, Path::new("/var/run/vhostuser/s3"));
        assert_eq!(info.network("blue").unwrap().mtu, Some(9000));
        for other in ["sriov", "plain", "missing"] {
            assert!(info.device(other).is_none());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_an_empty_then_partial_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("network-info");
        let steps = ["", "\n", &INFO[..40], r#"{"interfaces":[]}"#, INFO];
        let writer = async {
            for step in steps {
                sleep(Duration::from_secs(3)).await;
                fs::write(&path, step).unwrap();
            }
        };
        let (info, ()) = tokio::join!(wait(&path, &["blue"], Duration::from_secs(45)), writer);
        assert!(info.unwrap().device("blue").is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("network-info");
        let patience = Duration::from_secs(45);
        let started = Instant::now();
        let error = wait(&path, &["blue"], patience).await.unwrap_err().to_string();
        assert!(error.contains("downwardAPI: device-info"), "{error}");
        assert!((45..47).contains(&started.elapsed().as_secs()));
        for (content, reason) in [("", "still empty"), ("{\"inter", "still unfinished"), (INFO, "network 'red' has no")]
        {
            fs::write(&path, content).unwrap();
            let error = wait(&path, &["blue", "red"], patience).await.unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
