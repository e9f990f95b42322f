//! What we offer to a frontend, and the names of it.

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)*) => {
        $($(#[$doc])* pub const $name: u64 = 1 << $bit;)*

        /// Every feature that we offer.
        ///
        /// `NOTIFY_ON_EMPTY`, UFO, RSS and hash reports are left out on purpose: the first two are legacy,
        /// and the key and table of the others never reach a vhost-user backend.
        pub const OFFERED: u64 = $($name)|*;

        const NAMES: &[(u64, &str)] = &[$(($name, stringify!($name))),*];
    };
}

features! {
    /// The driver leaves checksums to us (virtio 1.2, 5.1.3).
    CSUM = 0;
    /// The driver takes frames whose checksum is partial.
    GUEST_CSUM = 1;
    /// The frontend tells the driver an MTU.
    MTU = 3;
    /// The driver takes TCP over IPv4 super-packets.
    GUEST_TSO4 = 7;
    /// The driver takes TCP over IPv6 super-packets.
    GUEST_TSO6 = 8;
    /// The driver takes super-packets with ECN.
    GUEST_ECN = 9;
    /// The driver sends TCP over IPv4 super-packets.
    HOST_TSO4 = 11;
    /// The driver sends TCP over IPv6 super-packets.
    HOST_TSO6 = 12;
    /// The driver sends super-packets with ECN.
    HOST_ECN = 13;
    /// A frame may fill several receive buffers.
    MRG_RXBUF = 15;
    /// The frontend tells the driver the state of the link.
    STATUS = 16;
    /// The frontend has a control queue.
    CTRL_VQ = 17;
    /// The control queue sets receive modes.
    CTRL_RX = 18;
    /// The driver announces itself after a migration.
    GUEST_ANNOUNCE = 21;
    /// Several queue pairs.
    MQ = 22;
    /// Pages that we write to are marked in the dirty log (vhost-user, "Migration"). Never seen by the driver.
    LOG_ALL = 26;
    /// Headers and payload may share descriptors (legacy; implied by `VERSION_1`).
    ANY_LAYOUT = 27;
    /// Descriptors may refer to tables of descriptors.
    INDIRECT_DESC = 28;
    /// Notifications are suppressed by index.
    EVENT_IDX = 29;
    /// vhost-user protocol features are negotiated; rings begin disabled.
    PROTOCOL_FEATURES = 30;
    /// virtio 1.0 or later.
    VERSION_1 = 32;
    /// Descriptors form a single ring.
    RING_PACKED = 34;
    /// We use buffers in the order in which they were made available.
    IN_ORDER = 35;
    /// The driver takes UDP over IPv4 super-packets.
    GUEST_USO4 = 54;
    /// The driver takes UDP over IPv6 super-packets.
    GUEST_USO6 = 55;
    /// The driver sends UDP super-packets.
    HOST_USO = 56;
}

/// Names of the offered features in `features`, for the operator. Bits without a name are left out.
pub fn names(features: u64) -> Vec<&'static str> {
    NAMES.iter().filter(|(bit, _)| features & bit != 0).map(|&(_, name)| name).collect()
}

/// The vhost-user protocol features that we offer.
///
/// Not `CONFIG`: QEMU's network device has no use for it and warns. Not `BACKEND_REQ`: we have nothing to ask. Not
/// `PAGEFAULT` (postcopy): a worker that touches a page which is not there yet would hold up all other guests.
pub fn protocol() -> Protocol {
    Protocol::MQ
        | Protocol::REPLY_ACK
        | Protocol::MTU
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::STATUS
        | Protocol::LOG_SHMFD
        | Protocol::RARP
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_bits() {
        assert_eq!(names(0), Vec::<&str>::new());
        assert_eq!(names(VERSION_1 | CSUM | 1 << 33), ["CSUM", "VERSION_1"]);
        assert_eq!(names(u64::MAX).len(), OFFERED.count_ones() as usize);
    }

    #[test]
    fn leaves_out_what_we_cannot_do() {
        for bit in [5, 10, 14, 24, 33, 57, 60] {
            assert_eq!(OFFERED & 1 << bit, 0, "bit {bit}");
        }
        assert!(!protocol().intersects(Protocol::PAGEFAULT | Protocol::CONFIG | Protocol::BACKEND_REQ));
    }
}
