//! Which of the free devices suit a VM best.

/// A device that could be given out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Its id.
    pub(crate) id: String,
    /// NUMA node, if it has one.
    pub(crate) node: Option<u32>,
    /// No pod had its folder yet.
    pub(crate) fresh: bool,
    /// When it was given out last, as a number that grows; 0 for never.
    pub(crate) last_use: u64,
}

/// Chooses up to `size` of `available`, all of `required` among them. Others are fresh ones as far as there are enough: who had
/// one before may still have its folder open. Then on as few NUMA nodes as possible: the node with most of the required ones, else
/// the smallest that has room for all, so that larger ones keep room for larger VMs. Among equals, those that have been out of
/// use for longest: what an earlier pod left running has most time to end.
pub(crate) fn choose(mut available: Vec<Candidate>, required: &[String], size: usize) -> Vec<String> {
    available.sort_by(|a, b| (a.last_use, &a.id).cmp(&(b.last_use, &b.id)));
    let (must, mut others): (Vec<_>, Vec<_>) = available.into_iter().partition(|device| required.contains(&device.id));
    let wanted = size.saturating_sub(must.len());
    if others.iter().filter(|device| device.fresh).count() >= wanted {
        others.retain(|device| device.fresh);
    }
    let mut nodes: Vec<_> = others.iter().map(|device| device.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let on = |devices: &[Candidate], node| devices.iter().filter(|device| device.node == node).count();
    nodes.sort_by_key(|&node| {
        let room = on(&others, node);
        // Those with room come first, and the smallest of them; of the others, the largest.
        let size = if room >= wanted { (false, room) } else { (true, usize::MAX - room) };
        (std::cmp::Reverse(on(&must, node)), size)
    });
    let rank = |device: &Candidate| nodes.iter().position(|node| *node == device.node);
    // Stable, so that the order from above is kept within a node.
    others.sort_by_key(|device| (!device.fresh, rank(device)));
    must.into_iter().chain(others.into_iter().take(wanted)).map(|device| device.id).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn candidates(of: &[(&str, u32)]) -> Vec<Candidate> {
        of.iter()
            .map(|(id, node)| Candidate { id: (*id).into(), node: Some(*node), fresh: true, last_use: 0 })
            .collect()
    }

    const SIX: &[(&str, u32)] = &[("a0", 0), ("b1", 1), ("c0", 0), ("d1", 1), ("e0", 0), ("f0", 0)];

    #[test]
    fn a_vm_stays_on_the_smallest_node_with_room() {
        assert_eq!(choose(candidates(SIX), &[], 2), ["b1", "d1"]);
        assert_eq!(choose(candidates(SIX), &[], 3), ["a0", "c0", "e0"]);
    }

    #[test]
    fn if_none_has_room_the_largest_comes_first() {
        assert_eq!(choose(candidates(SIX), &[], 5), ["a0", "c0", "e0", "f0", "b1"]);
    }

    #[test]
    fn required_ones_decide_the_node() {
        assert_eq!(choose(candidates(SIX), &["e0".into()], 2), ["e0", "a0"]);
        assert_eq!(choose(candidates(SIX), &["e0".into(), "b1".into()], 2), ["b1", "e0"]);
        assert_eq!(choose(candidates(SIX), &["b1".into()], 4), ["b1", "d1", "a0", "c0"]);
    }

    #[test]
    fn the_longest_unused_come_first() {
        let mut available = candidates(SIX);
        for device in &mut available {
            device.node = None;
            device.last_use = if device.id.as_str() < "d" { 9 } else { 3 };
        }
        assert_eq!(choose(available, &[], 4), ["d1", "e0", "f0", "a0"]);
    }

    #[test]
    fn fresh_ones_come_first_wherever_they_are() {
        let mut available = candidates(SIX);
        for device in &mut available {
            device.fresh = ["b1", "e0", "f0"].contains(&device.id.as_str());
        }
        assert_eq!(choose(available.clone(), &[], 1), ["b1"]);
        assert_eq!(choose(available.clone(), &[], 2), ["e0", "f0"]);
        assert_eq!(choose(available.clone(), &["d1".into()], 2), ["d1", "b1"]);
        assert_eq!(choose(available.clone(), &["d1".into()], 3), ["d1", "b1", "e0"]);
        // Others only when there are no more.
        assert_eq!(choose(available, &[], 4), ["e0", "f0", "b1", "a0"]);
    }

    #[test]
    fn no_more_than_there_are() {
        assert_eq!(choose(candidates(SIX), &[], 9).len(), 6);
        assert_eq!(choose(Vec::new(), &["x".into()], 1), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn whatever_is_free_a_choice_is_right(
            devices in vec((0..3_u32, 0..3_u64, any::<bool>(), any::<bool>()), 0..40),
            size in 0..12_usize,
        ) {
            let available: Vec<_> = devices.iter().enumerate().map(|(number, &(node, last_use, _, fresh))| {
                Candidate { id: format!("sock-{number:04}"), node: Some(node), fresh, last_use }
            }).collect();
            let wanted = available.iter().zip(&devices).filter(|(_, (_, _, wanted, _))| *wanted);
            let required: Vec<_> = wanted.map(|(device, _)| device.id.clone()).take(size).collect();
            let chosen = choose(available.clone(), &required, size);

            let distinct: BTreeSet<_> = chosen.iter().collect();
            prop_assert_eq!(distinct.len(), size.min(available.len()));
            prop_assert_eq!(distinct.len(), chosen.len());
            prop_assert!(required.iter().all(|id| distinct.contains(id)));
            let nodes: BTreeSet<_> =
                available.iter().filter(|device| distinct.contains(&device.id)).map(|device| device.node).collect();
            let room = |node| available.iter().filter(|device| device.fresh && device.node == Some(node)).count();
            if required.is_empty() && (0..3).any(|node| room(node) >= size) {
                prop_assert!(nodes.len() <= 1, "{:?}", chosen);
            }
            let stale = chosen.iter().filter(|id| {
                available.iter().any(|device| device.id == **id && !device.fresh) && !required.contains(id)
            });
            let fresh = available.iter().filter(|device| device.fresh && !required.contains(&device.id)).count();
            let wanted = distinct.len() - required.len();
            prop_assert_eq!(stale.count(), wanted.saturating_sub(fresh));
        }
    }
}
