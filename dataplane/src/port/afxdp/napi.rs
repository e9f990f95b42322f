//! Who takes frames out of an interface's driver: the kernel at once, or whoever polls (`netdev` netlink family,
//! Documentation/netlink/specs/netdev.yaml; Documentation/networking/napi.rst, "IRQ mitigation").
//!
//! A socket may poll its driver, but the kernel is quicker: frame by frame, if they come one by one. An interface can be
//! told to hold it back for a moment, in which a call of ours takes them all. Kernels before 6.13 cannot be told so here.

use std::io::{ErrorKind, Result};

use super::netlink::{HEADER, Netlink, REQUEST, attribute, check_error, find, message};

/// Times that the kernel, finding nothing, still holds back.
const ROUNDS: u32 = 2;
/// Nanoseconds that frames wait for a call of ours at most. The ring of a veth pair, the shortest that there is, has 256
/// places, which a sender does not fill in that time.
const TIMEOUT: u64 = 50_000;

/// The family of families, and what it is asked.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// `NETDEV_CMD_NAPI_GET`, `NETDEV_CMD_NAPI_SET`, and their attributes.
const NAPI_GET: u8 = 11;
const NAPI_SET: u8 = 14;
const NAPI_IFINDEX: u16 = 1;
const NAPI_ID: u16 = 2;
const NAPI_ROUNDS: u16 = 5;
const NAPI_TIMEOUT: u16 = 6;

const DUMP: u16 = 0x300;
const DONE: u16 = 3;
/// Length of `struct genlmsghdr`.
const COMMAND: usize = 4;

/// How one of an interface's drivers' instances holds back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Setting {
    id: u32,
    pub(super) rounds: u32,
    /// Nanoseconds.
    pub(super) timeout: u64,
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
        let before = family.settings(ifindex)?;
        let deferral = Self { family, before };
        for &setting in &deferral.before {
            deferral.family.set(Setting { rounds: ROUNDS, timeout: TIMEOUT, ..setting })?;
        }
        Ok(deferral)
    }
}

impl Drop for Deferral {
    fn drop(&mut self) {
        for &setting in &self.before {
            // The interface may be gone.
            let _ = self.family.set(setting);
        }
    }
}

/// How an interface's driver holds back at the moment.
#[cfg(test)]
pub(super) fn settings(ifindex: u32) -> Result<Vec<Setting>> {
    Family::open()?.settings(ifindex)
}

/// The kernel's `netdev` family.
#[derive(Debug)]
struct Family {
    netlink: Netlink,
    id: u16,
}

impl Family {
    fn open() -> Result<Self> {
        let netlink = Netlink::open_generic()?;
        netlink.send(&message(CONTROL, REQUEST, &command(GET_FAMILY), &attribute(FAMILY_NAME, b"netdev\0")))?;
        let mut buffer = vec![0u8; 32 << 10];
        let len = netlink.receive(&mut buffer)?;
        let reply = buffer.get(..len).unwrap_or_default();
        check_error(reply)?;
        let id = find(reply.get(HEADER + COMMAND..).unwrap_or_default(), FAMILY_ID);
        let id = id.and_then(|id| id.first_chunk()).copied().ok_or(ErrorKind::InvalidData)?;
        Ok(Self { netlink, id: u16::from_ne_bytes(id) })
    }

    fn settings(&self, ifindex: u32) -> Result<Vec<Setting>> {
        let which = attribute(NAPI_IFINDEX, &ifindex.to_ne_bytes());
        self.netlink.send(&message(self.id, REQUEST | DUMP, &command(NAPI_GET), &which))?;
        let (mut settings, mut buffer) = (Vec::new(), vec![0u8; 32 << 10]);
        loop {
            let len = self.netlink.receive(&mut buffer)?;
            let mut rest = buffer.get(..len).unwrap_or_default();
            check_error(rest)?;
            while let Some((kind, attributes, next)) = split(rest) {
                if kind == DONE {
                    return Ok(settings);
                }
                settings.extend(setting(attributes));
                rest = next;
            }
        }
    }

    fn set(&self, setting: Setting) -> Result<()> {
        let mut attributes = attribute(NAPI_ID, &setting.id.to_ne_bytes());
        attributes.extend(attribute(NAPI_ROUNDS, &setting.rounds.to_ne_bytes()));
        attributes.extend(attribute(NAPI_TIMEOUT, &setting.timeout.to_ne_bytes()));
        self.netlink.order(self.id, &command(NAPI_SET), &attributes)
    }
}

/// A `struct genlmsghdr` of version 1.
fn command(command: u8) -> [u8; COMMAND] {
    [command, 1, 0, 0]
}

/// The kind and the attributes of the first of several messages, and the others.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    if len < HEADER {
        return None;
    }
    let attributes = bytes.get(..len)?.get(HEADER + COMMAND..).unwrap_or_default();
    Some((kind, attributes, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

fn setting(attributes: &[u8]) -> Option<Setting> {
    let number = |kind| match find(attributes, kind)? {
        value if value.len() == 8 => value.first_chunk().copied().map(u64::from_ne_bytes),
        value => value.first_chunk().copied().map(u32::from_ne_bytes).map(u64::from),
    };
    Some(Setting { id: number(NAPI_ID)? as u32, rounds: number(NAPI_ROUNDS)? as u32, timeout: number(NAPI_TIMEOUT)? })
}

#[cfg(test)]
mod tests {
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
