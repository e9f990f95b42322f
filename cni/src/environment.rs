//! What the runtime says in environment variables.

use crate::error::{CniError, Code};

/// Longest container id that we take; runtimes use 64.
const MAX_ID: usize = 128;
/// Longest interface name, in bytes (`IFNAMSIZ` less its terminator).
const MAX_INTERFACE: usize = 15;

/// The environment of one call. What the command does not need may be empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Environment {
    pub(crate) container_id: String,
    pub(crate) netns: String,
    pub(crate) interface: String,
    /// Folders with plugins, between colons.
    pub(crate) path: String,
    /// `K=V;K=V`.
    args: String,
}

/// A variable of the environment, by its name less `CNI_`.
type Read<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads the real environment. What is not UTF-8 fails the checks like anything else that is wrong.
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var_os(format!("CNI_{name}")).map(|value| value.to_string_lossy().into_owned())
}

impl Environment {
    /// Reads and checks what a command needs.
    ///
    /// # Errors
    /// Code 4, with the names of all that is missing.
    pub(crate) fn read(needed: &[&str], read: Read<'_>) -> Result<Self, CniError> {
        let get = |name| read(name).unwrap_or_default();
        let missing: Vec<_> =
            needed.iter().filter(|name| get(name).is_empty()).map(|name| format!("CNI_{name}")).collect();
        if !missing.is_empty() {
            let problem = format!("required environment variables are missing: {}", missing.join(", "));
            return Err(CniError::new(Code::Environment, problem));
        }
        let environment = Self {
            container_id: get("CONTAINERID"),
            netns: get("NETNS"),
            interface: get("IFNAME"),
            path: get("PATH"),
            args: get("ARGS"),
        };
        if !environment.container_id.is_empty() {
            check("CNI_CONTAINERID", &environment.container_id, is_id(&environment.container_id))?;
        }
        if !environment.interface.is_empty() {
            check("CNI_IFNAME", &environment.interface, is_interface(&environment.interface))?;
        }
        let uid = environment.pod_uid();
        check("K8S_POD_UID in CNI_ARGS", uid, uid.is_empty() || is_id(uid))?;
        Ok(environment)
    }

    /// A value of `CNI_ARGS`; empty if there is none.
    pub(crate) fn arg(&self, key: &str) -> &str {
        let pairs = self.args.split(';').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(name, _)| *name == key).map(|(_, value)| value).next_back().unwrap_or_default()
    }

    /// Whether it is about a pod of Kubernetes.
    pub(crate) fn is_of_pod(&self) -> bool {
        !self.pod_uid().is_empty() || !self.arg("K8S_POD_NAME").is_empty()
    }

    /// The pod's UID, if the runtime tells.
    pub(crate) fn pod_uid(&self) -> &str {
        self.arg("K8S_POD_UID")
    }
}

fn check(what: &str, value: &str, good: bool) -> Result<(), CniError> {
    if good {
        return Ok(());
    }
    Err(CniError::new(Code::Environment, format!("{what} has an invalid value: {value:?}")))
}

/// The specification's rule for container ids and network names.
pub(crate) fn is_id(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= MAX_ID
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// The specification's rule for interface names, less commas, which the switch has no use for.
fn is_interface(name: &str) -> bool {
    (1..=MAX_INTERFACE).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_graphic() && !b"/:,".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)], needed: &[&str]) -> Result<Environment, String> {
        let find = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Environment::read(needed, &find).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = read(&[("CONTAINERID", "c"), ("NETNS", "")], &["CONTAINERID", "NETNS", "IFNAME"]).unwrap_err();
        assert_eq!(error, "required environment variables are missing: CNI_NETNS, CNI_IFNAME");
        assert_eq!(read(&[], &[]), Ok(Environment::default()));
    }

    #[test]
    fn values_are_checked() {
        let long = "c".repeat(129);
        for (name, value) in [
            ("CONTAINERID", "../x"),
            ("CONTAINERID", "-c"),
            ("CONTAINERID", long.as_str()),
            ("IFNAME", ".."),
            ("IFNAME", "a/b"),
            ("IFNAME", "a b"),
            ("IFNAME", "a,b"),
            ("IFNAME", "0123456789abcdef"),
            ("ARGS", "K8S_POD_UID=a/b"),
        ] {
            assert!(read(&[(name, value)], &[]).is_err(), "{name}={value}");
        }
    }

    #[test]
    fn args_are_found() {
        let environment = read(&[("ARGS", "IgnoreUnknown=1;K8S_POD_UID=u-1;MAC=x=y;;Z")], &[]).unwrap();
        assert_eq!((environment.pod_uid(), environment.arg("MAC"), environment.arg("Z")), ("u-1", "x=y", ""));
    }
}
