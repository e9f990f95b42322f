//! A switch that is told to end, and one that is started in its place.

use serde_json::json;

use super::*;
use crate::failures::Taker;

/// What the switch has taken it delivers before it ends, and the rest waits for the next one: nothing is lost.
#[test]
fn a_planned_restart_loses_no_frame() {
    let _alone = alone();
    let mut bench = Bench::new(SPLIT_EVENTS, false);
    for round in 0..6 {
        let mut old = bench.switch.take().unwrap();
        // SAFETY: the child has not been waited for, so the pid is its own.
        unsafe { libc::kill(old.0.id() as i32, libc::SIGTERM) };
        let deadline = Instant::now() + PATIENCE;
        let mut status = None;
        bench.stream_while(|_| {
            assert!(Instant::now() < deadline, "the switch does not end");
            status = old.exited();
            status.is_none()
        });
        assert!(status.unwrap().success(), "{status:?}");
        bench.switch = Some(bench.start(&[]));
        bench.connect();
        bench.stream(Duration::from_millis(20 + 9 * round));
    }
    bench.check_whole();
}

/// Whoever takes over while the switch is told to end finds the control socket in its place.
#[test]
fn a_takeover_under_way_is_waited_for() {
    let _alone = alone();
    let mut bench = Bench::new(SPLIT_EVENTS, false);
    let mut old = bench.switch.take().unwrap();
    let mut taker = Taker::new(&bench, 1);
    taker.hear();
    // SAFETY: the child has not been waited for, so the pid is its own.
    unsafe { libc::kill(old.0.id() as i32, libc::SIGTERM) };
    // Longer than calls under way may take.
    thread::sleep(Duration::from_secs(1));
    assert!(old.exited().is_none() && bench.path("ctl.sock").exists(), "{}", bench.log());
    for word in ["prepared", "ready"] {
        taker.say(&json!(word));
        taker.hear();
    }
    assert!(old.ended().success());
    assert!(bench.log().contains("handed over") && bench.path("ctl.sock").exists(), "{}", bench.log());
}
