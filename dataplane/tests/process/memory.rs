//! What the process keeps of what it needed for a while.

use std::process::{Command, Stdio};

use e2e::switch::Usage;

use crate::daemon::Daemon;

/// The buffers of captures, 10 MiB for each, go back to the system when they end.
#[test]
fn captures_leave_no_memory_behind() {
    let mut daemon = Daemon::start(&[]);
    let (mut a, mut b) = (daemon.boot("a", 1), daemon.boot("b", 2));
    daemon.pass(&mut a, &mut b, "hello");
    let private = |daemon: &Daemon| Usage::of(daemon.pid()).unwrap().private_kib;
    let before = private(&daemon);
    for round in 0..6 {
        let captures = ["a", "b"].map(|name| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
            command.args(["capture", name, "--write", "-", "--count", "3", "--socket"]).arg(daemon.path("ctl.sock"));
            command.stdout(Stdio::null()).spawn().unwrap()
        });
        // What is allocated meanwhile may lie behind the buffers.
        daemon.add(&format!("later{round}"), &daemon.path(&format!("later{round}.sock")));
        for mut capture in captures {
            daemon.eventually("end of the capture", |_| {
                a.send(Some(&b), "look at me");
                b.received();
                capture.try_wait().unwrap().is_some_and(|status| status.success())
            });
        }
    }
    // A moment after its client, a capture ends. Ports have a thread each, which needs some.
    daemon.eventually("memory given back", |daemon| private(daemon) < before + 4096);
}
