//! What can be set, on the command line or by environment variables.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::folder::Owner;

/// Longest path of a unix socket, in bytes (108 in the kernel, with the zero at its end).
const MAX_SOCKET_PATH: usize = 107;
/// Longest name of a network interface, after which sockets are called.
const MAX_INTERFACE: usize = 15;
/// Most devices: a switch has 1024 ports, and a few of them are for others.
const MAX_SOCKETS: usize = 1000;

/// How VM folders are mounted in pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// At `<container root>/<device id>`; a pod can have several
    ById,
    /// At the container root itself; a container can have one, at the same path on every node
    Fixed,
}

/// Whether there is the switch's resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dataplane {
    /// For clusters in which only the switch may ask for it
    On,
    /// The switch gets the folder in another way
    Off,
}

/// Gives VM pods their socket folders, and the switch's pod all of them.
#[derive(Debug, Clone, Parser)]
#[command(name = "sluice-device-plugin", version, after_long_help = AFTER_HELP)]
pub struct Config {
    /// How many VM interfaces this node can have, 1000 at most
    #[arg(long, env = "SLUICE_SOCKETS", value_name = "N", default_value_t = 256)]
    pub sockets: usize,
    /// Folder of all VM folders, on the node and here alike
    #[arg(long, env = "SLUICE_ROOT", value_name = "DIR", default_value = "/var/run/sluice/sockets")]
    pub root: PathBuf,
    /// Where VM folders are in VM pods
    #[arg(long, env = "SLUICE_CONTAINER_ROOT", value_name = "DIR", default_value = "/var/run/vhostuser")]
    pub container_root: PathBuf,
    /// How VM folders are mounted in VM pods
    #[arg(long, env = "SLUICE_LAYOUT", value_enum, default_value_t = Layout::ById)]
    pub layout: Layout,
    /// Offer the folder of all VM folders as resource PREFIX/dataplane, for the switch's pod. Kubernetes gives a device to
    /// whoever asks first, and this one is every VM's memory: set it to off where the switch has the folder as a hostPath
    #[arg(long, env = "SLUICE_DATAPLANE", value_enum, default_value_t = Dataplane::On)]
    pub dataplane: Dataplane,
    /// Where the folder of all VM folders is in the switch's pod [default: as on the node]
    #[arg(long, env = "SLUICE_DATAPLANE_ROOT", value_name = "DIR")]
    pub dataplane_root: Option<PathBuf>,
    /// Resources are called PREFIX/sockets and PREFIX/dataplane
    #[arg(long, env = "SLUICE_RESOURCE_PREFIX", value_name = "PREFIX", default_value = "sluice.io")]
    pub resource_prefix: String,
    /// User and group that own VM folders
    #[arg(long, env = "SLUICE_OWNER", value_name = "UID:GID", default_value = "107:107", value_parser = parse_owner)]
    pub owner: Owner,
    /// SELinux label of the folders where SELinux is on; empty for none
    #[arg(
        long,
        env = "SLUICE_SELINUX_LABEL",
        value_name = "LABEL",
        default_value = "system_u:object_r:container_file_t:s0"
    )]
    pub selinux_label: String,
    /// Socket name in device-info files, where the interface's name is not known yet
    #[arg(long, env = "SLUICE_SOCKET_NAME", value_name = "NAME", default_value = "vhost.sock")]
    pub socket_name: String,
    /// Folder of device-info files
    #[arg(
        long,
        env = "SLUICE_DEVICE_INFO_DIR",
        value_name = "DIR",
        default_value = "/var/run/k8s.cni.cncf.io/devinfo/dp"
    )]
    pub device_info_dir: PathBuf,
    /// Write CDI files here, like /var/run/cdi, and let the runtime mount by them, where devices have to come by CDI [default:
    /// plain mounts, which do the same with any runtime]
    #[arg(long, env = "SLUICE_CDI_DIR", value_name = "DIR")]
    pub cdi_dir: Option<PathBuf>,
    /// Spread the devices over these NUMA nodes [default: no preference]
    #[arg(long = "numa", env = "SLUICE_NUMA", value_name = "NODE[,NODE]", value_delimiter = ',')]
    pub numa_nodes: Vec<u32>,
    /// The kubelet's folder of device plugins
    #[arg(long, env = "SLUICE_KUBELET_DIR", value_name = "DIR", default_value = "/var/lib/kubelet/device-plugins")]
    pub kubelet_dir: PathBuf,
    /// The kubelet's pod-resources socket; without it, leftovers stay until their device is given out again
    #[arg(
        long,
        env = "SLUICE_POD_RESOURCES",
        value_name = "PATH",
        default_value = "/var/lib/kubelet/pod-resources/kubelet.sock"
    )]
    pub pod_resources: PathBuf,
    /// Name of our own pod. Where it is given, the kubelet's lists count only if they have it: after a restart without the API
    /// server it knows static pods alone, and all VMs seem to be gone
    #[arg(long, env = "SLUICE_POD_NAME", value_name = "NAME", requires = "pod_namespace")]
    pub pod_name: Option<String>,
    /// Its namespace
    #[arg(long, env = "SLUICE_POD_NAMESPACE", value_name = "NAME", requires = "pod_name")]
    pub pod_namespace: Option<String>,
    /// Seconds between two looks at what pods use
    #[arg(long, env = "SLUICE_RECONCILE", value_name = "S", default_value = "30", value_parser = parse_seconds)]
    pub reconcile: Duration,
    /// Seconds for which a device must be unused before what is left in it is removed
    #[arg(long, env = "SLUICE_GRACE", value_name = "S", default_value = "60", value_parser = parse_seconds)]
    pub grace: Duration,
    /// Seconds between two looks at the folders
    #[arg(long, env = "SLUICE_CHECK", value_name = "S", default_value = "5", value_parser = parse_seconds)]
    pub check: Duration,
    /// Serve /metrics, /healthz and /readyz here, like 0.0.0.0:9091 [default: not]
    #[arg(long, env = "SLUICE_METRICS", value_name = "ADDR")]
    pub metrics: Option<SocketAddr>,
    /// Log JSON
    #[arg(long, env = "SLUICE_JSON")]
    pub json: bool,
    /// Log more; twice for all. SLUICE_LOG has the last word, like SLUICE_LOG=debug
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

const AFTER_HELP: &str = "\
Device ids are sock-0000, sock-0001 and so on, and never change. Before lowering --sockets, drain the node: pods
keep their folders, but the kubelet will not restart containers whose device is gone.

It needs the capabilities CHOWN, FOWNER and DAC_OVERRIDE, and gives up all others.";

/// Why a configuration cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A number is out of bounds.
    #[error("--sockets must be 1 to {MAX_SOCKETS}: a switch has 1024 ports at most, and not all are for VMs")]
    Sockets,
    /// A path is not absolute, or goes up.
    #[error("{option} must be an absolute path without '..': {path}")]
    Path {
        /// The argument.
        option: &'static str,
        /// What it was.
        path: PathBuf,
    },
    /// A socket's path could not be used with the kernel.
    #[error("{option} is too long: sockets there would have a path of more than {MAX_SOCKET_PATH} bytes")]
    TooLong {
        /// The argument.
        option: &'static str,
    },
    /// The kubelet would not take the name.
    #[error("--resource-prefix must be a domain name, and none of kubernetes.io: {0}")]
    Prefix(String),
    /// Not the name of a file.
    #[error("--socket-name must be the name of a file: {0}")]
    SocketName(String),
    /// A node is named twice.
    #[error("--numa names a node twice")]
    Numa,
}

impl Config {
    /// Checks what the parser cannot.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_SOCKETS).contains(&self.sockets) {
            return Err(ConfigError::Sockets);
        }
        let longest_id = device_id(MAX_SOCKETS).len();
        let in_folder = longest_id + 1 + MAX_INTERFACE.max(self.socket_name.len());
        check_path("--root", &self.root, in_folder)?;
        check_path("--container-root", &self.container_root, in_folder)?;
        if let Some(path) = &self.dataplane_root {
            check_path("--dataplane-root", path, in_folder)?;
        }
        check_path("--kubelet-dir", &self.kubelet_dir, MAX_ENDPOINT)?;
        check_path("--device-info-dir", &self.device_info_dir, 0)?;
        self.cdi_dir.as_ref().map_or(Ok(()), |dir| check_path("--cdi-dir", dir, 0))?;
        check_prefix(&self.resource_prefix)?;
        let name = &self.socket_name;
        if name.is_empty() || name.contains('/') || matches!(name.as_str(), "." | "..") {
            return Err(ConfigError::SocketName(name.clone()));
        }
        let mut nodes = self.numa_nodes.clone();
        nodes.sort_unstable();
        nodes.dedup();
        if nodes.len() == self.numa_nodes.len() { Ok(()) } else { Err(ConfigError::Numa) }
    }

    /// The name of a resource.
    pub fn resource(&self, name: &str) -> String {
        format!("{}/{name}", self.resource_prefix)
    }

    /// The label that folders should have here.
    pub fn label(&self) -> Option<String> {
        (!self.selinux_label.is_empty() && selinux_is_on()).then(|| self.selinux_label.clone())
    }
}

/// Longest name of our sockets in the kubelet's folder, see [`crate::kubelet`].
pub(crate) const MAX_ENDPOINT: usize = 48;

/// The id of a device: stable, and sorted like its number.
pub fn device_id(number: usize) -> String {
    format!("sock-{number:04}")
}

fn check_path(option: &'static str, path: &Path, below: usize) -> Result<(), ConfigError> {
    let goes_up = path.components().any(|part| part == std::path::Component::ParentDir);
    // The kubelet speaks UTF-8.
    if !path.is_absolute() || goes_up || path.to_str().is_none() || path == Path::new("/") {
        return Err(ConfigError::Path { option, path: path.to_owned() });
    }
    if below > 0 && path.as_os_str().len() + 1 + below > MAX_SOCKET_PATH {
        return Err(ConfigError::TooLong { option });
    }
    Ok(())
}

/// The kubelet's rules: a DNS subdomain, short enough with `requests.` before it, and not its own.
fn check_prefix(prefix: &str) -> Result<(), ConfigError> {
    let is_label = |label: &str| {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        (1..=63).contains(&label.len())
            && label.starts_with(inner)
            && label.ends_with(inner)
            && label.chars().all(|c| inner(c) || c == '-')
    };
    let fits = prefix.len() <= 253 - "requests.".len() && prefix.split('.').all(is_label);
    let is_own = prefix.ends_with("kubernetes.io") || prefix.starts_with("requests.");
    if fits && !is_own { Ok(()) } else { Err(ConfigError::Prefix(prefix.into())) }
}

fn parse_owner(text: &str) -> Result<Owner, String> {
    let parse = || {
        let (user, group) = text.split_once(':')?;
        Some(Owner { user: user.parse().ok()?, group: group.parse().ok()? })
    };
    // The largest number means "leave as it is" to the kernel.
    let owner: Option<Owner> = parse().filter(|owner| owner.user != u32::MAX && owner.group != u32::MAX);
    owner.ok_or_else(|| "write it like 107:107".into())
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=86400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("0.05 to 86400 seconds".into()),
    }
}

/// The kernel registers SELinux's file system only if SELinux is on; unlike that file system itself, the list is visible in
/// a container.
fn selinux_is_on() -> bool {
    std::fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.contains("selinuxfs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(arguments: &[&str]) -> Result<(), ConfigError> {
        Config::try_parse_from([&["sluice-device-plugin"], arguments].concat()).unwrap().check()
    }

    #[test]
    fn the_defaults_are_fine() {
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&["--sockets", "1000"]), Ok(()));
        assert_eq!(check(&["--numa", "0,1", "--resource-prefix", "a-1.example"]), Ok(()));
    }

    #[test]
    fn what_would_fail_later_is_refused() {
        let long = format!("/{}", "x".repeat(90));
        for arguments in [
            ["--sockets", "0"],
            ["--sockets", "1001"],
            ["--root", "relative"],
            ["--root", "/a/../b"],
            ["--root", "/"],
            ["--root", &long],
            ["--container-root", &long],
            ["--kubelet-dir", &long],
            ["--resource-prefix", "x.kubernetes.io"],
            ["--resource-prefix", "Upper.io"],
            ["--resource-prefix", "requests.io.x"],
            ["--resource-prefix", ""],
            ["--socket-name", "a/b"],
            ["--socket-name", ".."],
            ["--numa", "1,1"],
        ] {
            assert!(check(&arguments).is_err(), "{arguments:?}");
        }
    }

    #[test]
    fn owners_and_times_are_read() {
        assert_eq!(parse_owner("107:36"), Ok(Owner { user: 107, group: 36 }));
        for text in ["107", "a:b", ":", "1:2:3", "-1:0", "4294967295:0"] {
            assert!(parse_owner(text).is_err(), "{text}");
        }
        assert_eq!(parse_seconds("0.25"), Ok(Duration::from_millis(250)));
        for text in ["0", "-1", "nan", "inf", "x"] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ids_sort_like_numbers() {
        assert_eq!(device_id(7), "sock-0007");
        assert!(device_id(99) < device_id(100));
    }
}
