//! Guests that have migrated away and were not heard elsewhere yet.
//!
//! The source of a migration may end before its guest says a word at the target. What is held for the guest then stays
//! with the port that it has left, and so does what comes for it meanwhile, until it is heard or the time for which
//! frames are held is over.

use std::sync::Arc;

use crate::port::Link;
use crate::status::PortState;
use crate::switch::snapshot::PortView;
use crate::switch::{Inner, Slot, lock};

/// Lets a link go on with what the port's last one holds, if nobody is there any more to take it.
pub(super) fn inherit_hold(link: &mut Link, before: &Slot) {
    let Slot::Used(before) = before else { return };
    if link.hold.is_none() && link.tx.is_empty() && before.link.tx.is_empty() {
        link.hold = before.link.hold.clone().filter(|hold| hold.goes_on());
    }
}

impl Inner {
    /// Drops what was held for guests that were not heard in time, and forgets where they were.
    pub(super) fn end_holds(&self) {
        let mut tables = lock(&self.tables);
        let mut ended = Vec::new();
        for slot in &mut tables.slots {
            let Slot::Used(view) = slot else { continue };
            let gone = matches!(view.link.state, PortState::Connecting | PortState::Failed);
            if gone && view.link.hold.as_ref().is_some_and(|hold| !hold.goes_on()) {
                ended.push(view.id);
                let link = Arc::new(Link { hold: None, ..Link::clone(&view.link) });
                *view = Arc::new(PortView { link, ..PortView::clone(view) });
            }
        }
        if !ended.is_empty() {
            self.publish(&mut tables);
            self.fdb.retain(|entry| ended.contains(&entry.port) && !entry.is_static);
        }
    }
}
