//! The kernel's `netdev` netlink family (Documentation/netlink/specs/netdev.yaml), and what a driver says of itself there.

use std::ffi::CStr;
use std::io::{ErrorKind, Result};

use super::netlink::{HEADER, Netlink, REQUEST, attribute, check_error, find, message};

/// The family of families, and what it is asked.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// `NETDEV_CMD_DEV_GET`, and its attributes.
const DEV_GET: u8 = 1;
const DEV_IFINDEX: u16 = 1;
const DEV_XSK_FEATURES: u16 = 6;
/// `NETDEV_XSK_FLAGS_TX_CHECKSUM`.
const XSK_TX_CHECKSUM: u64 = 2;

const DUMP: u16 = 0x300;
const DONE: u16 = 3;
/// Length of `struct genlmsghdr`.
const COMMAND: usize = 4;

/// This family, or another with a name.
#[derive(Debug)]
pub(super) struct Family {
    netlink: Netlink,
    id: u16,
}

impl Family {
    /// # Errors
    /// If the kernel has none: those before 6.3.
    pub(super) fn open() -> Result<Self> {
        Self::named(c"netdev")
    }

    /// # Errors
    /// If the kernel has none of that name.
    pub(super) fn named(name: &CStr) -> Result<Self> {
        let netlink = Netlink::open_generic()?;
        let name = attribute(FAMILY_NAME, name.to_bytes_with_nul());
        netlink.send(&message(CONTROL, REQUEST, &command(GET_FAMILY), &name))?;
        let mut buffer = vec![0u8; 32 << 10];
        let len = netlink.receive(&mut buffer)?;
        let reply = buffer.get(..len).unwrap_or_default();
        check_error(reply)?;
        let id = find(reply.get(HEADER + COMMAND..).unwrap_or_default(), FAMILY_ID);
        let id = id.and_then(|id| id.first_chunk()).copied().ok_or(ErrorKind::InvalidData)?;
        Ok(Self { netlink, id: u16::from_ne_bytes(id) })
    }

    /// Has something listed, and takes in the attributes of each.
    pub(super) fn list(&self, what: u8, which: &[u8], mut take: impl FnMut(&[u8])) -> Result<()> {
        self.netlink.send(&message(self.id, REQUEST | DUMP, &command(what), which))?;
        let mut buffer = vec![0u8; 32 << 10];
        loop {
            let len = self.netlink.receive(&mut buffer)?;
            let mut rest = buffer.get(..len).unwrap_or_default();
            check_error(rest)?;
            while let Some((kind, attributes, next)) = split(rest) {
                if kind == DONE {
                    return Ok(());
                }
                take(attributes);
                rest = next;
            }
        }
    }

    /// Has something done.
    pub(super) fn order(&self, what: u8, attributes: &[u8]) -> Result<()> {
        self.netlink.order(self.id, &command(what), attributes)
    }
}

/// Whether the driver completes checksums of what an AF_XDP socket sends (`xsk-features`, `tx-checksum`). Kernels that do not
/// know the family know no such driver.
pub(super) fn completes_checksums(ifindex: u32) -> bool {
    let features = features(ifindex, DEV_XSK_FEATURES).ok().flatten();
    features.is_some_and(|features| features & XSK_TX_CHECKSUM != 0)
}

/// What the driver of an interface says in an attribute.
fn features(ifindex: u32, attribute: u16) -> Result<Option<u64>> {
    let (wanted, mut features) = (ifindex.to_ne_bytes(), None);
    Family::open()?.list(DEV_GET, &[], |attributes| {
        if find(attributes, DEV_IFINDEX) == Some(&wanted) {
            features = number(attributes, attribute);
        }
    })?;
    Ok(features)
}

/// The value of an attribute of four or eight bytes.
pub(super) fn number(attributes: &[u8], kind: u16) -> Option<u64> {
    match find(attributes, kind)? {
        value if value.len() == 8 => value.first_chunk().copied().map(u64::from_ne_bytes),
        value => value.first_chunk().copied().map(u32::from_ne_bytes).map(u64::from),
    }
}

/// A `struct genlmsghdr` of version 1.
pub(super) fn command(command: u8) -> [u8; COMMAND] {
    [command, 1, 0, 0]
}

/// The kind and the attributes of the first of several messages, and the others.
pub(super) fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    if len < HEADER {
        return None;
    }
    let attributes = bytes.get(..len)?.get(HEADER + COMMAND..).unwrap_or_default();
    Some((kind, attributes, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `NETDEV_A_DEV_XDP_FEATURES`, of which every driver that runs programs has some.
    const DEV_XDP_FEATURES: u16 = 3;

    #[test]
    fn drivers_are_asked_for_their_features() {
        // The loopback interface is the first, has no driver that runs programs, and is there.
        match features(1, DEV_XDP_FEATURES) {
            Ok(features) => assert_eq!(features, Some(0)),
            Err(error) => eprintln!("this kernel does not tell: {error}"),
        }
        assert!(!completes_checksums(1));
        assert!(features(0x7fff_ffff, DEV_XDP_FEATURES).ok().flatten().is_none());
    }
}
