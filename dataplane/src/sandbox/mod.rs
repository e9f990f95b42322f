//! What the process gives up once it has started, so that whoever takes it over by way of a guest or a VMM gets little.
//!
//! Four layers, each of which stands by itself:
//!
//! - *no new privileges*: nothing that is executed gains any;
//! - *capabilities*: only those that the kinds of port need which can be added;
//! - *landlock*: of the file system, only the folders that the switch writes to, and what it has to read;
//! - *seccomp*: only system calls that the switch makes, and of those still fewer for workers (`syscalls`).
//!
//! Threads inherit all of it from the one that starts them, so [`apply`] comes before there are others. What the kernel
//! does not know is left out, unless the operator is strict.

mod files;
mod syscalls;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use rustix::thread::CapabilitySet;
use sluice_daemon::capabilities;

pub use syscalls::confine_worker;

/// How much of the sandbox there has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SandboxMode {
    /// Whatever the kernel can do.
    #[default]
    Auto,
    /// Nothing.
    Off,
    /// All of it, or the switch does not start.
    Strict,
}

impl FromStr for SandboxMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "strict" => Ok(Self::Strict),
            _ => Err(format!("sandbox mode must be auto, off or strict, not '{text}'")),
        }
    }
}

/// Kinds of port that can be added unless the operator says otherwise. DPDK does as it likes with the machine, and has
/// to be asked for.
pub const DEFAULT_KINDS: [&str; 3] = ["vhost-user", "tap", "afxdp"];
/// The kind that no sandbox fits.
pub const UNCONFINED_KIND: &str = "dpdk";

/// Reads a list of kinds of port, such as `vhost-user,tap`.
///
/// # Errors
/// One line for the operator.
pub fn parse_kinds(text: &str) -> Result<Vec<String>, String> {
    let known = || DEFAULT_KINDS.into_iter().chain([UNCONFINED_KIND]);
    let kind = |word: &str| match known().find(|kind| *kind == word) {
        Some(kind) => Ok(kind.to_owned()),
        None => Err(format!("'{word}' is no kind of port; there are {}", known().collect::<Vec<_>>().join(", "))),
    };
    text.split(',').map(kind).collect()
}

/// What the process has to be able to do from now on.
#[derive(Debug, Clone)]
pub struct Needs {
    /// How much of the sandbox there has to be.
    pub mode: SandboxMode,
    /// Kinds of port that there are or will be.
    pub kinds: Vec<String>,
    /// The state directory.
    pub state: PathBuf,
    /// The control socket.
    pub control: PathBuf,
    /// Where all sockets of ports are; `None` if they can be anywhere.
    pub socket_root: Option<PathBuf>,
}

/// Why the switch cannot start within its sandbox.
#[derive(Debug, thiserror::Error)]
#[error(
    "the sandbox cannot be made: {layer}: {source}; let go of that with --sandbox auto, or of all with --sandbox off"
)]
pub struct SandboxError {
    layer: &'static str,
    source: io::Error,
}

/// What was given up.
#[derive(Debug, Default)]
pub struct Sandbox {
    /// Workers have to give up more: [`confine_worker`].
    pub workers: bool,
    layers: Vec<String>,
    missing: Vec<String>,
}

impl fmt::Display for Sandbox {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&if self.layers.is_empty() { "none".to_owned() } else { self.layers.join("; ") })?;
        if !self.missing.is_empty() {
            write!(out, " (not to be had here: {})", self.missing.join("; "))?;
        }
        Ok(())
    }
}

impl Sandbox {
    fn add(&mut self, strict: bool, layer: &'static str, result: io::Result<String>) -> Result<bool, SandboxError> {
        match result {
            Ok(detail) => self.layers.push(format!("{layer}{detail}")),
            Err(source) if strict => return Err(SandboxError { layer, source }),
            Err(source) => {
                self.missing.push(format!("{layer}: {source}"));
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What each kind of port needs. Whoever runs without it from the start does without.
fn needed(kind: &str) -> CapabilitySet {
    match kind {
        // To connect to sockets of QEMU's user.
        "vhost-user" => CapabilitySet::DAC_OVERRIDE,
        // To make the interface.
        "tap" => CapabilitySet::NET_ADMIN,
        // To load and attach the program, open the sockets, and lock their memory.
        "afxdp" => CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW | CapabilitySet::BPF | CapabilitySet::IPC_LOCK,
        _ => CapabilitySet::empty(),
    }
}

/// Keeps what those kinds of port need, as far as it is there, and tells what that is.
fn keep_capabilities(kinds: &[String]) -> io::Result<String> {
    let kept = capabilities::keep(kinds.iter().fold(CapabilitySet::empty(), |all, kind| all | needed(kind)))?;
    let names: Vec<_> = kept.iter_names().map(|(name, _)| name).collect();
    Ok(if names.is_empty() { "none".to_owned() } else { names.join(" ") })
}

/// Gives up all that is not needed, for good. To be called before there are other threads.
///
/// # Errors
/// [`SandboxError`] if the operator is strict.
pub fn apply(needs: &Needs) -> Result<Sandbox, SandboxError> {
    let mut sandbox = Sandbox::default();
    if needs.mode == SandboxMode::Off {
        return Ok(sandbox);
    }
    let strict = needs.mode == SandboxMode::Strict;
    sandbox.add(strict, "no new privileges", capabilities::gain_no_more().map(|()| String::new()))?;
    if needs.kinds.iter().any(|kind| kind == UNCONFINED_KIND) {
        let reason = io::Error::other("there are dpdk ports, which may need anything");
        sandbox.add(strict, "capabilities, landlock, seccomp", Err(reason))?;
        return Ok(sandbox);
    }
    sandbox.add(strict, "capabilities ", keep_capabilities(&needs.kinds))?;
    sandbox.add(strict, "landlock", files::restrict(needs))?;
    sandbox.workers = sandbox.add(strict, "seccomp", syscalls::confine_process())?;
    Ok(sandbox)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        assert_eq!("strict".parse(), Ok(SandboxMode::Strict));
        assert!("on".parse::<SandboxMode>().unwrap_err().contains("auto, off or strict"));
        assert_eq!(parse_kinds("vhost-user,tap").unwrap(), ["vhost-user", "tap"]);
        assert!(parse_kinds("vhost").unwrap_err().contains("'vhost' is no kind of port; there are vhost-user, tap"));
        assert!(parse_kinds("").is_err());
    }

    #[test]
    fn what_is_missing_is_told_or_ends_it() {
        let mut sandbox = Sandbox::default();
        assert_eq!(sandbox.to_string(), "none");
        assert!(sandbox.add(false, "a", Ok(" x".into())).unwrap());
        assert!(!sandbox.add(false, "b", Err(io::Error::other("no such thing"))).unwrap());
        assert_eq!(sandbox.to_string(), "a x (not to be had here: b: no such thing)");
        let error = sandbox.add(true, "b", Err(io::Error::other("no such thing"))).unwrap_err();
        assert!(error.to_string().contains("b: no such thing; let go of that with --sandbox auto"));
    }
}
