//! Some modules of the dataplane, compiled with loom's primitives in place of the standard library's, for the models in
//! `tests/`. The source is the dataplane's own, so what is modelled is what runs.

pub mod sync;

#[path = "../../dataplane/src/virtq/suppress.rs"]
mod suppress;

use sync::primitives::AtomicU16;

/// As in the dataplane.
pub fn arm(place: &AtomicU16, request: u16, index: &AtomicU16, next: u16) -> bool {
    suppress::arm(place, request, index, next, || ())
}

/// As in the dataplane.
pub fn wanted_by_flags(flags: &AtomicU16, no_interrupt: u16) -> bool {
    suppress::wanted_by_flags(flags, no_interrupt)
}

/// As in the dataplane.
pub fn wanted_by_event(event: &AtomicU16, old: u16, new: u16) -> bool {
    suppress::wanted_by_event(event, old, new)
}
