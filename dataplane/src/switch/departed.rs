//! Guests that have migrated away and were not heard elsewhere yet, or whose rings have not come back.
//!
//! The source of a migration may end before its guest says a word at the target. What is held for the guest then stays
//! with the port that it has left, and so does what comes for it meanwhile, until it is heard or the time for which
//! frames are held is over.

use std::sync::Arc;

use crate::port::Link;
use crate::port::vhost::hold::Hold;
use crate::status::PortState;
use crate::switch::snapshot::PortView;
use crate::switch::{Inner, Slot};
use crate::sync::lock;

/// Lets a link go on with what the port's last one holds, if nobody is there any more to take it.
pub(super) fn inherit_hold(link: &mut Link, before: &Slot) {
    let Slot::Used(before) = before else { return };
    if link.state != PortState::Up && link.hold.is_none() && !before.link.receives() {
        link.hold = before.link.hold.clone().filter(|hold| hold.goes_on());
    }
}

impl Inner {
    /// Drops what was held for guests that were not heard in time, and forgets where they were. Has workers look again where
    /// frames are left: a worker that another one made wait did not deliver them.
    pub(super) fn end_holds(&self) {
        let mut tables = lock(&self.tables);
        let (mut ended, mut is_left) = (Vec::new(), false);
        for slot in &mut tables.slots {
            let Slot::Used(view) = slot else { continue };
            is_left |= view.link.hold.as_ref().is_some_and(|hold| !hold.is_empty());
            let over = |hold: &Arc<Hold>| !view.link.receives() && !hold.goes_on();
            if let Some(hold) = view.link.hold.clone().filter(over) {
                ended.push((view.id, hold));
                let link = Arc::new(Link { hold: None, ..Link::clone(&view.link) });
                *view = Arc::new(PortView { link, ..PortView::clone(view) });
            }
        }
        if is_left || !ended.is_empty() {
            self.publish(&mut tables);
            // A device may have it yet, which no worker has any more.
            ended.iter().for_each(|(_, hold)| hold.clear());
            for (port, _) in &ended {
                self.forget_stations(&tables, *port);
            }
        }
    }
}
