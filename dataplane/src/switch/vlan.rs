//! VLAN membership of a port, ready for the hot path.

use crate::config::VlanMode;

/// Which VLANs may pass a port, and in which form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VlanPolicy {
    /// All, as they are.
    All,
    /// One, untagged.
    Access(u16),
    /// Some with their tag, and perhaps one untagged.
    Trunk {
        /// VLAN of untagged frames.
        native: Option<u16>,
        /// One bit for each VLAN that passes with its tag.
        allowed: Box<[u64; 64]>,
    },
}

/// The VLAN of a network that a port carries without a tag, in what they share.
pub const CARRIED_UNTAGGED: u16 = 0;

impl From<&VlanMode> for VlanPolicy {
    fn from(mode: &VlanMode) -> Self {
        match mode {
            VlanMode::All => Self::All,
            VlanMode::Access(vid) => Self::Access(*vid),
            VlanMode::Trunk { native, allowed } => Self::trunk(*native, allowed.iter().copied()),
            VlanMode::Networks(networks) => {
                let untagged = networks.iter().any(|carried| carried.vlan.is_none());
                let native = untagged.then_some(CARRIED_UNTAGGED);
                Self::trunk(native, networks.iter().filter_map(|carried| carried.vlan))
            }
        }
    }
}

impl VlanPolicy {
    fn trunk(native: Option<u16>, tagged: impl Iterator<Item = u16>) -> Self {
        let mut allowed = Box::new([0u64; 64]);
        for vid in tagged {
            allowed[usize::from(vid >> 6) & 63] |= 1 << (vid & 63);
        }
        Self::Trunk { native, allowed }
    }

    /// The VLAN that a frame from this port belongs to, by the tag it carries. `None`: it may not pass.
    #[inline]
    pub fn ingress(&self, tag: Option<u16>) -> Option<u16> {
        // A priority tag (VLAN 0) is as good as none.
        let vid = tag.map_or(0, |tci| tci & 0xfff);
        match self {
            Self::All => (vid != 0xfff).then_some(vid),
            Self::Access(own) => (vid == 0).then_some(*own),
            Self::Trunk { native, .. } if vid == 0 => *native,
            Self::Trunk { allowed, .. } => is_set(allowed, vid).then_some(vid),
        }
    }

    /// Whether a frame of a VLAN leaves this port with a tag. `None`: it may not pass.
    #[inline]
    pub fn egress(&self, vid: u16) -> Option<bool> {
        match self {
            Self::All => Some(vid != 0),
            Self::Access(own) => (vid == *own).then_some(false),
            Self::Trunk { native, .. } if *native == Some(vid) => Some(false),
            Self::Trunk { allowed, .. } => is_set(allowed, vid).then_some(true),
        }
    }

    /// The VLANs in which the port's own station is known to be: that of its untagged frames, and those that it lists.
    pub fn own(&self) -> Vec<u16> {
        match self {
            Self::All => vec![0],
            Self::Access(own) => vec![*own],
            Self::Trunk { native, allowed } => native.iter().copied().chain(listed(allowed)).collect(),
        }
    }
}

fn listed(bits: &[u64; 64]) -> impl Iterator<Item = u16> {
    (1..0xfff).filter(|vid| is_set(bits, *vid))
}

fn is_set(bits: &[u64; 64], vid: u16) -> bool {
    vid != 0 && bits[usize::from(vid >> 6) & 63] & (1 << (vid & 63)) != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Carried;

    #[test]
    fn membership() {
        let access = VlanPolicy::Access(100);
        assert_eq!(access.ingress(None), Some(100));
        assert_eq!(access.ingress(Some(0x6000)), Some(100));
        assert_eq!(access.ingress(Some(100)), None);
        assert_eq!((access.egress(100), access.egress(0)), (Some(false), None));

        let trunk = VlanPolicy::from(&VlanMode::Trunk { native: None, allowed: vec![10, 20, 4094] });
        assert_eq!(trunk.ingress(None), None);
        assert_eq!(trunk.ingress(Some(0xe00a)), Some(10));
        assert_eq!(trunk.ingress(Some(11)), None);
        assert_eq!((trunk.egress(4094), trunk.egress(0)), (Some(true), None));

        let native = VlanPolicy::from(&VlanMode::Trunk { native: Some(5), allowed: vec![10] });
        assert_eq!((native.ingress(None), native.egress(5)), (Some(5), Some(false)));
        assert_eq!((trunk.own(), native.own()), (vec![10, 20, 4094], vec![5, 10]));

        let carried = |network: &str, vlan| Carried { network: network.into(), vlan };
        let networks = VlanPolicy::from(&VlanMode::Networks(vec![carried("a", Some(9)), carried("b", None)]));
        assert_eq!((networks.ingress(None), networks.ingress(Some(9))), (Some(0), Some(9)));
        assert_eq!((networks.egress(0), networks.egress(9), networks.egress(8)), (Some(false), Some(true), None));
        let tagged = VlanPolicy::from(&VlanMode::Networks(vec![carried("a", Some(9))]));
        assert_eq!((tagged.ingress(None), tagged.egress(0)), (None, None));

        assert_eq!((VlanPolicy::All.ingress(None), VlanPolicy::All.ingress(Some(7))), (Some(0), Some(7)));
        assert_eq!((VlanPolicy::All.egress(0), VlanPolicy::All.egress(7)), (Some(false), Some(true)));
        assert_eq!(VlanPolicy::All.ingress(Some(0xfff)), None);
    }
}
