//! Who takes frames out of an interface's driver: the kernel at once, or whoever polls (Documentation/networking/napi.rst,
//! "IRQ mitigation").
//!
//! A socket may poll its driver, but the kernel is quicker: frame by frame, if they come one by one. An interface can be
//! told to hold it back for a moment, in which a call of ours takes them all. Kernels before 6.13 cannot be told so here.

use std::io::Result;

use super::netdev::{Family, number};
use super::netlink::attribute;

/// Times that the kernel, finding nothing, still holds back.
const ROUNDS: u32 = 2;
/// Nanoseconds that frames wait for a call of ours at most. The ring of a veth pair, the shortest that there is, has 256
/// places, which a sender does not fill in that time.
const TIMEOUT: u64 = 50_000;

/// `NETDEV_CMD_NAPI_GET`, `NETDEV_CMD_NAPI_SET`, and their attributes.
const NAPI_GET: u8 = 11;
const NAPI_SET: u8 = 14;
const NAPI_IFINDEX: u16 = 1;
const NAPI_ID: u16 = 2;
const NAPI_ROUNDS: u16 = 5;
const NAPI_TIMEOUT: u16 = 6;

/// How one of an interface's drivers' instances holds back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Setting {
    id: u32,
    pub(super) rounds: u32,
    /// Nanoseconds.
    pub(super) timeout: u64,
}

impl Setting {
    /// What it was before us. A process that was killed, or has handed over, leaves ours behind, whose before is not known: the
    /// kernel's own is not to hold back.
    fn before(self) -> Self {
        if (self.rounds, self.timeout) == (ROUNDS, TIMEOUT) { Self { rounds: 0, timeout: 0, ..self } } else { self }
    }
}

/// An interface whose driver waits for calls. Dropping it puts things back.
#[derive(Debug)]
pub(super) struct Deferral {
    family: Family,
    before: Vec<Setting>,
}

impl Deferral {
    /// Has the kernel hold back.
    pub(super) fn new(ifindex: u32) -> Result<Self> {
        let family = Family::open()?;
        let before = settings_of(&family, ifindex)?.into_iter().map(Setting::before).collect();
        let deferral = Self { family, before };
        for &setting in &deferral.before {
            set(&deferral.family, Setting { rounds: ROUNDS, timeout: TIMEOUT, ..setting })?;
        }
        Ok(deferral)
    }

    /// Takes back what another process has left behind.
    pub(super) fn end_left(ifindex: u32) -> Result<()> {
        let family = Family::open()?;
        for setting in settings_of(&family, ifindex)? {
            if setting != setting.before() {
                set(&family, setting.before())?;
            }
        }
        Ok(())
    }
}

impl Drop for Deferral {
    fn drop(&mut self) {
        for &setting in &self.before {
            // The interface may be gone.
            let _ = set(&self.family, setting);
        }
    }
}

/// How an interface's driver holds back at the moment.
#[cfg(test)]
pub(super) fn settings(ifindex: u32) -> Result<Vec<Setting>> {
    settings_of(&Family::open()?, ifindex)
}

fn settings_of(family: &Family, ifindex: u32) -> Result<Vec<Setting>> {
    let mut settings = Vec::new();
    let which = attribute(NAPI_IFINDEX, &ifindex.to_ne_bytes());
    family.list(NAPI_GET, &which, |attributes| settings.extend(setting(attributes)))?;
    Ok(settings)
}

fn set(family: &Family, setting: Setting) -> Result<()> {
    let mut attributes = attribute(NAPI_ID, &setting.id.to_ne_bytes());
    attributes.extend(attribute(NAPI_ROUNDS, &setting.rounds.to_ne_bytes()));
    attributes.extend(attribute(NAPI_TIMEOUT, &setting.timeout.to_ne_bytes()));
    family.order(NAPI_SET, &attributes)
}

fn setting(attributes: &[u8]) -> Option<Setting> {
    let number = |kind| number(attributes, kind);
    Some(Setting { id: number(NAPI_ID)? as u32, rounds: number(NAPI_ROUNDS)? as u32, timeout: number(NAPI_TIMEOUT)? })
}

#[cfg(test)]
mod tests {
    use super::super::netdev::{command, split};
    use super::super::netlink::message;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn settings_are_read_from_several_messages() {
        let of = |id: u32, timeout: &[u8]| {
            let mut attributes = attribute(NAPI_ID, &id.to_ne_bytes());
            attributes.extend(attribute(NAPI_ROUNDS, &2u32.to_ne_bytes()));
            attributes.extend(attribute(NAPI_TIMEOUT, timeout));
            message(30, 0, &command(NAPI_GET), &attributes)
        };
        let bytes = [of(7, &9u32.to_ne_bytes()), of(8, &(1u64 << 40).to_ne_bytes())].concat();
        let (kind, first, rest) = split(&bytes).unwrap();
        assert_eq!((kind, setting(first)), (30, Some(Setting { id: 7, rounds: 2, timeout: 9 })));
        let (_, second, rest) = split(rest).unwrap();
        assert_eq!(setting(second), Some(Setting { id: 8, rounds: 2, timeout: 1 << 40 }));
        assert!(rest.is_empty() && split(rest).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut rest = &bytes[..];
            while let Some((_, attributes, next)) = split(rest) {
                let _ = setting(attributes);
                prop_assert!(next.len() < rest.len());
                rest = next;
            }
        }
    }
}
