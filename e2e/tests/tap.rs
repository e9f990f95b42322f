//! The host's own stack joins by a tap port.

use anyhow::{Context, Result, ensure};
use e2e::lab::{Lab, Shared};
use e2e::machine::built_program;
use e2e::net::{Namespace, link_exists};
use e2e::process::Process;
use e2e::qemu::{ECHO_PORT, GuestSpec};
use e2e::scratch::{Scratch, undo_at_end};
use e2e::wait;
use std::time::Duration;

const TAP: &str = "sl-e2e0";

static LAB: Shared = Shared::new(|| {
    let mut lab = Lab::new(&[])?;
    lab.add_guest(1, "", GuestSpec::new("vm1"), "")?;
    lab.boot()?;
    Ok(lab)
});

/// Adds the tap, gives it to `test` in a namespace of its own as 10.0.0.100, and removes it.
fn with_tap(lab: &mut Lab, test: impl FnOnce(&Lab, &Namespace) -> Result<()>) -> Result<()> {
    undo_at_end(&format!("ip link del {TAP}"))?;
    lab.switch()?.add_port(&format!("host=tap:{TAP}"))?;
    let namespace = Namespace::new()?;
    wait::until_true("the tap", Duration::from_secs(5), || Ok(link_exists(TAP)))?;
    namespace.take(TAP)?;
    // Always the same address, or guests would for a while send to that of the tap before.
    namespace.run(&format!("ip link set {TAP} address 02:00:00:00:00:64"))?;
    namespace.run(&format!(
        "set -e; ip addr add 10.0.0.100/24 dev {TAP}; ip addr add fd00::100/64 dev {TAP} nodad; ip link set {TAP} up"
    ))?;
    lab.switch()?.wait_port("host", "up")?;
    let result = test(lab, &namespace);
    let removed = lab.switch()?.del_port("host");
    result?;
    removed?;
    let is_left = namespace.run(&format!("ip link show {TAP}")).is_ok();
    ensure!(!is_left && !link_exists(TAP), "{TAP} is left after its port was removed");
    Ok(())
}

#[test]
fn the_host_pings_a_guest() -> Result<()> {
    LAB.test(|lab| {
        with_tap(lab, |_, namespace| {
            wait::until_true("the host to reach vm1", Duration::from_secs(20), || {
                Ok(namespace.run("busybox ping -c 1 -W 1 10.0.0.1").is_ok())
            })?;
            for address in ["10.0.0.1", "fd00::1"] {
                let report = namespace.run(&format!("busybox ping -c 10 -i 0.1 -W 2 {address}"))?;
                ensure!(report.contains(" 0% packet loss"), "{report}");
            }
            Ok(())
        })
    })
}

#[test]
fn payloads_between_host_and_guest_stay_whole() -> Result<()> {
    LAB.test(|lab| {
        with_tap(lab, |lab, namespace| {
            let scratch = Scratch::new("echo")?;
            let mut command = namespace.command(&built_program("guest-agent", "GUEST_AGENT_BIN")?.to_string_lossy());
            command.args(["serve-echo", &ECHO_PORT.to_string()]);
            let _server = Process::start("echo", command, &scratch.join("echo.log"), &[])?;
            for address in ["10.0.0.100", "fd00::100"] {
                lab.wait_reachable(0, address)?;
            }
            for address in ["10.0.0.100", "[fd00::100]"] {
                lab.check_echo(0, "tcp", address, &[64, 1448, 1472, 1473, 4096, 65_000, 1 << 20])?;
                lab.check_echo(0, "udp", address, &[64, 1448, 1472, 1473, 4096, 65_000])?;
            }
            Ok(())
        })
    })
}

#[test]
fn tcp_between_host_and_guest_flows_both_ways() -> Result<()> {
    LAB.test(|lab| {
        with_tap(lab, |lab, namespace| {
            lab.wait_reachable(0, "10.0.0.100")?;
            for reverse in ["", "-R"] {
                lab.serve_iperf(0)?;
                let text = namespace.run(&format!("timeout 30 iperf3 -J -c 10.0.0.1 -t 2 {reverse}"))?;
                let rate = e2e::lab::iperf_rate(&text).with_context(|| format!("iperf3 {reverse}"))?;
                println!("host {} guest: {rate:.0} Mbit/s", if reverse.is_empty() { "to" } else { "from" });
                ensure!(rate > 20.0, "only {rate} Mbit/s");
            }
            Ok(())
        })
    })
}
