//! Configuration. All of it comes from the environment, since KubeVirt starts sidecars without arguments.

use std::path::PathBuf;
use std::time::Duration;

/// The variables that are read, for `--help`.
pub const VARIABLES: &str = "\
Environment:
  SLUICE_BINDING          names in the KubeVirt CR to serve, separated by commas
                          [default: $NETWORK_BINDING_PLUGIN_NAME, else 'vhostuser']
  SLUICE_LINKS            how the paths in the domain are kept the same on each node [default: userdata]
                            userdata   links in the hook directory (KubeVirt 1.6 and later)
                            shared     links in a directory that a webhook mounts in both containers
                            none       no links, for SLUICE_LAYOUT=fixed: the path is the same everywhere
  SLUICE_LAYOUT           as it is set for the device plugin [default: by-id]
                            by-id      socket directories are at <container root>/<device id>
                            fixed      the container root is the one socket directory, on every node
  SLUICE_LINKS_DIR        that directory, for 'shared' [default: /var/run/kubevirt/vhostuser]
  SLUICE_CONTAINER_ROOT   where the compute container has the socket directories [default: /var/run/vhostuser]
  SLUICE_SOCKET_NAME      name in device-info that stands for the name of the pod's interface, which the device plugin
                          does not know [default: vhost.sock]
  SLUICE_QUEUE_SIZE       descriptors of each queue: 256, 512 or 1024 [default: 1024]
  SLUICE_NETWORK_INFO     what KubeVirt tells about the networks [default: /etc/podinfo/network-info]
  SLUICE_WAIT_SECONDS     how long to wait for that, 0 to 50 [default: 45]
  SLUICE_HOOKS            where virt-launcher looks for hook sockets [default: /var/run/kubevirt-hooks]
  SLUICE_LOG              what to log, like 'debug' [default: info]";

/// How the path of a socket is made the same on the source and the target of a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Links {
    /// Links in a directory; the two containers may see it at different places.
    In {
        /// Where the sidecar makes them.
        here: PathBuf,
        /// Where the compute container, and so QEMU, finds them.
        compute: PathBuf,
    },
    /// The path is the same already.
    None,
}

/// Where the device plugin has socket directories mounted in the compute container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// At `<container root>/<device id>`.
    ById,
    /// At the container root itself. A CNI plugin does not know of it, and tells a path as if it were by id.
    Fixed,
}

/// The configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Names of the binding in the KubeVirt CR.
    pub bindings: Vec<String>,
    /// Where links go.
    pub links: Links,
    /// Where socket directories are.
    pub layout: Layout,
    /// Parent of the socket directories, as the compute container sees it.
    pub container_root: PathBuf,
    /// Name of a socket in device-info that stands for the name of the pod's interface.
    pub socket_name: String,
    /// Descriptors of each queue.
    pub queue_size: u16,
    /// The file that tells the devices.
    pub network_info: PathBuf,
    /// How long to wait for that file.
    pub patience: Duration,
}

/// Why the environment does not make a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A variable has a wrong value.
    #[error("{variable}={value}: {problem}")]
    Invalid {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        problem: &'static str,
    },
    /// This KubeVirt is too old for the layout.
    #[error(
        "CONTAINER_NAME is not set, so this KubeVirt is older than 1.6; use SLUICE_LINKS=shared and the webhook, or SLUICE_LINKS=none"
    )]
    NoContainerName,
}

/// A function that looks up variables of the environment.
pub type Lookup<'a> = &'a dyn Fn(&'static str) -> Option<String>;

impl Config {
    /// Reads the environment through `lookup`.
    ///
    /// # Errors
    /// [`ConfigError`] for the first value that is wrong.
    pub fn from_env(lookup: Lookup<'_>) -> Result<Self, ConfigError> {
        let get = |name| lookup(name).filter(|value| !value.is_empty());
        let bindings = get("SLUICE_BINDING").or_else(|| get("NETWORK_BINDING_PLUGIN_NAME"));
        let bindings = bindings.unwrap_or_else(|| "vhostuser".into());
        Ok(Self {
            bindings: bindings.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect(),
            links: links(&get)?,
            layout: layout(&get)?,
            socket_name: get("SLUICE_SOCKET_NAME").unwrap_or_else(|| "vhost.sock".into()),
            container_root: path(&get, "SLUICE_CONTAINER_ROOT", "/var/run/vhostuser")?,
            queue_size: number(&get, "SLUICE_QUEUE_SIZE", 1024, "must be 256, 512 or 1024", |size| {
                matches!(size, 256 | 512 | 1024)
            })?,
            network_info: path(&get, "SLUICE_NETWORK_INFO", "/etc/podinfo/network-info")?,
            // virt-launcher gives up after 60 seconds.
            patience: Duration::from_secs(
                number(&get, "SLUICE_WAIT_SECONDS", 45, "must be 0 to 50", |seconds| seconds <= 50)?.into(),
            ),
        })
    }
}

/// Where the sidecar listens. virt-launcher counts sockets by file name alone, so each container needs one of its own.
pub fn socket_path(lookup: Lookup<'_>) -> PathBuf {
    let name = container_name(lookup).or_else(|| lookup("NETWORK_BINDING_PLUGIN_NAME"));
    hooks_dir(lookup).join(format!("sluice-{}.sock", name.unwrap_or_else(|| "vhostuser".into()).replace('/', "-")))
}

fn hooks_dir(lookup: Lookup<'_>) -> PathBuf {
    lookup("SLUICE_HOOKS").filter(|value| !value.is_empty()).unwrap_or_else(|| "/var/run/kubevirt-hooks".into()).into()
}

fn container_name(lookup: Lookup<'_>) -> Option<String> {
    lookup("CONTAINER_NAME").filter(|name| !name.is_empty())
}

fn layout(get: &dyn Fn(&'static str) -> Option<String>) -> Result<Layout, ConfigError> {
    match get("SLUICE_LAYOUT").as_deref() {
        None | Some("by-id") => Ok(Layout::ById),
        Some("fixed") => Ok(Layout::Fixed),
        Some(other) => Err(ConfigError::Invalid {
            variable: "SLUICE_LAYOUT",
            value: other.into(),
            problem: "must be by-id or fixed",
        }),
    }
}

fn links(get: &dyn Fn(&'static str) -> Option<String>) -> Result<Links, ConfigError> {
    match get("SLUICE_LINKS").as_deref() {
        None | Some("userdata") => {
            let container = container_name(get).ok_or(ConfigError::NoContainerName)?;
            let hooks = hooks_dir(get);
            Ok(Links::In { here: hooks.join("userdata"), compute: hooks.join(container).join("userdata") })
        }
        Some("shared") => {
            let dir = path(get, "SLUICE_LINKS_DIR", "/var/run/kubevirt/vhostuser")?;
            Ok(Links::In { here: dir.clone(), compute: dir })
        }
        Some("none") => Ok(Links::None),
        Some(other) => Err(ConfigError::Invalid {
            variable: "SLUICE_LINKS",
            value: other.into(),
            problem: "must be userdata, shared or none",
        }),
    }
}

fn path(
    get: &dyn Fn(&'static str) -> Option<String>,
    variable: &'static str,
    default: &str,
) -> Result<PathBuf, ConfigError> {
    let value = get(variable).unwrap_or_else(|| default.into());
    match value.starts_with('/') {
        true => Ok(value.into()),
        false => Err(ConfigError::Invalid { variable, value, problem: "must be an absolute path" }),
    }
}

fn number(
    get: &dyn Fn(&'static str) -> Option<String>,
    variable: &'static str,
    default: u16,
    problem: &'static str,
    fits: impl Fn(u16) -> bool,
) -> Result<u16, ConfigError> {
    let Some(value) = get(variable) else { return Ok(default) };
    value.parse().ok().filter(|number| fits(*number)).ok_or(ConfigError::Invalid { variable, value, problem })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn lookup<'a>(variables: &'a [(&'a str, &'a str)]) -> impl Fn(&'static str) -> Option<String> + 'a {
        |name| variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn defaults_are_those_of_a_new_kubevirt() {
        let env = [("CONTAINER_NAME", "hook-sidecar-1"), ("NETWORK_BINDING_PLUGIN_NAME", "sluice")];
        let config = Config::from_env(&lookup(&env)).unwrap();
        assert_eq!(config.bindings, ["sluice"]);
        let (here, compute) =
            ("/var/run/kubevirt-hooks/userdata".into(), "/var/run/kubevirt-hooks/hook-sidecar-1/userdata".into());
        assert_eq!(config.links, Links::In { here, compute });
        assert_eq!((config.queue_size, config.patience.as_secs()), (1024, 45));
        let socket = socket_path(&lookup(&env));
        assert_eq!(socket, Path::new("/var/run/kubevirt-hooks/sluice-hook-sidecar-1.sock"));
    }

    #[test]
    fn an_older_kubevirt_needs_another_layout() {
        assert_eq!(Config::from_env(&lookup(&[])).unwrap_err(), ConfigError::NoContainerName);
        let config = Config::from_env(&lookup(&[("SLUICE_LINKS", "shared"), ("SLUICE_BINDING", "a, b,")])).unwrap();
        assert_eq!(config.bindings, ["a", "b"]);
        let dir = PathBuf::from("/var/run/kubevirt/vhostuser");
        assert_eq!(config.links, Links::In { here: dir.clone(), compute: dir });
        assert_eq!(Config::from_env(&lookup(&[("SLUICE_LINKS", "none")])).unwrap().links, Links::None);
        assert_eq!(socket_path(&lookup(&[])), Path::new("/var/run/kubevirt-hooks/sluice-vhostuser.sock"));
    }

    #[test]
    fn wrong_values_are_named() {
        let cases = [
            ("SLUICE_LINKS", "hard", "SLUICE_LINKS=hard: must be userdata, shared or none"),
            ("SLUICE_QUEUE_SIZE", "1000", "SLUICE_QUEUE_SIZE=1000: must be 256, 512 or 1024"),
            ("SLUICE_WAIT_SECONDS", "90", "SLUICE_WAIT_SECONDS=90: must be 0 to 50"),
            ("SLUICE_CONTAINER_ROOT", "run", "SLUICE_CONTAINER_ROOT=run: must be an absolute path"),
        ];
        for (variable, value, expected) in cases {
            let env = [("CONTAINER_NAME", "c"), (variable, value)];
            assert_eq!(Config::from_env(&lookup(&env)).unwrap_err().to_string(), expected);
        }
    }
}
