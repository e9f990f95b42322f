//! Why frames are dropped. Every reason has a name in the counters, a line in docs and a test.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])* $name:ident = $text:literal;)*) => {
        /// Why a frame was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum DropReason { $($(#[doc = $doc])* $name,)* }

        impl DropReason {
            /// Every reason.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name),*];
            /// Number of reasons.
            pub const COUNT: usize = Self::ALL.len();

            /// Name in counters, metrics and `--json`.
            pub fn name(self) -> &'static str {
                match self { $(DropReason::$name => $text,)* }
            }

            /// What it means, for people.
            pub fn describe(self) -> &'static str {
                match self { $(DropReason::$name => concat!($($doc),*).trim_ascii(),)* }
            }
        }
    };
}

reasons! {
    /// From the port: lost by the kernel before the switch took it, which was too slow.
    Missed = "missed";
    /// From the port: shorter than an Ethernet header.
    Runt = "runt";
    /// From the port: longer than the largest super-packet.
    Oversize = "oversize";
    /// From the port: offload metadata that contradicts the frame.
    BadOffload = "bad_offload";
    /// From the port: more than its rate limit (rate-rx) lets in.
    RateRx = "rate_rx";
    /// From or to the port: a VLAN that the port may not use, or a tag of the sender's own where none may be.
    VlanDenied = "vlan_denied";
    /// From the port: a source address that is not the port's own, with spoofcheck on, or is multicast.
    Spoofed = "spoofed";
    /// From the port: to a group that ends at the next bridge (spanning tree, pause, LACP, EAPOL, LLDP, CDP).
    Reserved = "reserved";
    /// From the port: larger than the port's MTU.
    MtuIngress = "mtu_ingress";
    /// From the port: the destination is behind the same port.
    SamePort = "same_port";
    /// From the port: nobody to deliver it to.
    NoDestination = "no_destination";
    /// To the port: larger than the port's MTU.
    MtuEgress = "mtu_egress";
    /// To the port: more than its rate limit (rate-tx) lets out.
    RateTx = "rate_tx";
    /// To the port: its link is down or its driver has not started.
    LinkDown = "link_down";
    /// To the port: the receiver has no buffers left.
    Full = "full";
    /// To the port: the driver of its interface does not take it.
    Refused = "refused";
    /// To the port: another worker has held its queue for too long.
    Contended = "contended";
    /// To the port: the receiver's buffer is too small for the frame.
    BufferTooSmall = "buffer_too_small";
    /// To the port: the receiver cannot take it and it cannot be segmented or completed in software.
    CannotConvert = "cannot_convert";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_described() {
        let mut names: Vec<_> = DropReason::ALL.iter().map(|r| r.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::COUNT);
        assert!(DropReason::ALL.iter().all(|r| !r.describe().is_empty()));
        for (place, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, place);
        }
    }
}
