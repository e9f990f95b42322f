//! Capabilities (capabilities(7)), and the end of gaining any.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets};

/// Keeps those of the calling thread's capabilities that are needed, as far as they are there, and rules out ever having
/// others. Returns what is left. Threads started later inherit it, so call it before there are any.
///
/// # Errors
/// If the kernel refuses.
pub fn keep(needed: CapabilitySet) -> io::Result<CapabilitySet> {
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
    Ok(keep)
}

/// Nothing that is executed from now on gains any privilege.
///
/// # Errors
/// If the kernel refuses.
pub fn gain_no_more() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_else_is_left() {
        let needed = CapabilitySet::CHOWN | CapabilitySet::DAC_OVERRIDE;
        // In a thread, since others run tests.
        let (kept, left) = std::thread::spawn(move || {
            let kept = keep(needed).unwrap();
            let raised = CapabilitySets {
                effective: CapabilitySet::SYS_ADMIN,
                permitted: CapabilitySet::SYS_ADMIN,
                inheritable: CapabilitySet::empty(),
            };
            assert!(rustix::thread::set_capabilities(None, raised).is_err());
            gain_no_more().unwrap();
            assert!(rustix::thread::no_new_privs().unwrap());
            (kept, rustix::thread::capabilities(None).unwrap())
        })
        .join()
        .unwrap();
        assert!(needed.contains(kept));
        assert_eq!((left.permitted, left.effective, left.inheritable), (kept, kept, CapabilitySet::empty()));
    }
}
