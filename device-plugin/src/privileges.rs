//! Gives up all privileges that are not needed.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets};

/// What it takes to own and empty other users' folders.
const NEEDED: CapabilitySet = CapabilitySet::CHOWN.union(CapabilitySet::FOWNER).union(CapabilitySet::DAC_OVERRIDE);

/// Keeps of the calling thread's capabilities what is needed, and rules out ever having more. Threads started later
/// inherit it, so call it before there are any. Gives the needed ones that are missing.
///
/// # Errors
/// If the kernel refuses.
pub fn drop_unneeded() -> io::Result<CapabilitySet> {
    rustix::thread::set_no_new_privs(true)?;
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
    let keep = have & NEEDED;
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)?;
    Ok(NEEDED - keep)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_else_is_left() {
        // In a thread, since others run tests.
        let left = std::thread::spawn(|| {
            drop_unneeded().unwrap();
            let raised = CapabilitySets {
                effective: CapabilitySet::SYS_ADMIN,
                permitted: CapabilitySet::SYS_ADMIN,
                inheritable: CapabilitySet::empty(),
            };
            assert!(rustix::thread::set_capabilities(None, raised).is_err());
            assert!(rustix::thread::no_new_privs().unwrap());
            rustix::thread::capabilities(None).unwrap()
        });
        let left = left.join().unwrap();
        assert!(NEEDED.contains(left.permitted) && NEEDED.contains(left.effective), "{left:?}");
        assert!(left.inheritable.is_empty());
    }
}
