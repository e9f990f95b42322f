//! What commands that follow live frames have in common.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use sluice_proto::sluice::v1 as proto;

use super::Failure;
use super::args::CaptureDirection;
use super::output::emit_json;

/// How soon a signal ends it.
pub(crate) const LOOK: Duration = Duration::from_millis(100);

/// A flag that SIGINT and SIGTERM set.
pub(crate) fn ended_by_signal() -> Result<Arc<AtomicBool>, Failure> {
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, ended.clone()).map_err(Failure::failed)?;
    }
    Ok(ended)
}

/// The direction as it is asked for; both if none was chosen.
pub(crate) fn direction(chosen: Option<CaptureDirection>) -> i32 {
    let direction = match chosen {
        None => proto::Direction::Unspecified,
        Some(CaptureDirection::Rx) => proto::Direction::Rx,
        Some(CaptureDirection::Tx) => proto::Direction::Tx,
    };
    direction.into()
}

/// Tells at the end how many frames were `done` (captured, shown) and how many lost. JSON goes to standard output, unless
/// that is `taken` by the frames themselves.
pub(crate) fn tell(done: &str, frames: u64, lost: u64, json: bool, taken: bool) -> Result<(), Failure> {
    let counts = serde_json::json!({ "frames": frames, "lost": lost });
    match (json, taken) {
        (true, true) => eprintln!("{counts}"),
        (true, false) => emit_json(&counts)?,
        (false, _) => eprintln!("{frames} frames {done}, {lost} lost"),
    }
    Ok(())
}
