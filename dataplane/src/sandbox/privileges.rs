//! Capabilities (capabilities(7)), and the end of gaining any.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets};

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

pub(super) fn no_new() -> io::Result<String> {
    rustix::thread::set_no_new_privs(true)?;
    Ok(String::new())
}

/// Keeps what those kinds of port need, as far as it is there, and tells what that is.
pub(super) fn keep_for(kinds: &[String]) -> io::Result<String> {
    let needed = kinds.iter().fold(CapabilitySet::empty(), |all, kind| all | needed(kind));
    let have = rustix::thread::capabilities(None)?.permitted;
    if have.contains(CapabilitySet::SETPCAP) {
        // Up to where the kernel knows no more of them.
        for capability in (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                Err(rustix::io::Errno::INVAL) => break,
                result => result?,
            }
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let keep = have & needed;
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)?;
    let names: Vec<_> = keep.iter_names().map(|(name, _)| name).collect();
    Ok(if names.is_empty() { "none".to_owned() } else { names.join(" ") })
}
