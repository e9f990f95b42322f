//! Two guests talk through the switch: every size, every protocol.

use anyhow::{Result, ensure};
use e2e::lab::{Lab, Shared};
use e2e::qemu::GuestSpec;

static LAB: Shared = Shared::new(Lab::pair);

/// Around every boundary: header, minimum frame, MTU, one and two pages, fragments, the largest datagram.
const PAYLOADS: [usize; 27] = [
    8, 17, 18, 19, 63, 64, 65, 127, 128, 129, 255, 256, 1023, 1024, 1471, 1472, 1473, 1500, 2047, 2952, 4095, 4096,
    4097, 16_384, 32_768, 60_000, 65_000,
];
const DIRECTIONS: [(usize, &str); 4] = [(0, "10.0.0.2"), (1, "10.0.0.1"), (0, "[fd00::2]"), (1, "[fd00::1]")];

#[test]
fn guests_ping_each_other() -> Result<()> {
    LAB.test(|lab| {
        for (from, address) in DIRECTIONS {
            let address = address.trim_matches(['[', ']']);
            lab.wait_reachable(from, address)?;
            let report = lab.guests[from].run(&format!("ping -c 10 -i 0.1 -W 2 {address}"))?;
            ensure!(report.contains(" 0% packet loss"), "{report}");
            println!("{address}: {}", report.trim().lines().last().unwrap_or_default());
        }
        Ok(())
    })
}

#[test]
fn frames_of_every_size_arrive_once_and_whole() -> Result<()> {
    LAB.test(|lab| frames_of_every_size(lab))
}

fn frames_of_every_size(lab: &Lab) -> Result<()> {
    let sizes: Vec<usize> = (60..=1514).collect();
    lab.check_frames(0, 1, 1, &sizes)?;
    lab.check_frames(1, 0, 2, &sizes)
}

#[test]
fn payloads_of_every_size_come_back_whole() -> Result<()> {
    LAB.test(|lab| payloads_of_every_size(lab))
}

fn payloads_of_every_size(lab: &Lab) -> Result<()> {
    for (from, address) in DIRECTIONS {
        lab.check_echo(from, "udp", address, &PAYLOADS)?;
        lab.check_echo(from, "tcp", address, &PAYLOADS)?;
        lab.check_echo(from, "tcp", address, &[1 << 20, 3, 4 << 20])?;
    }
    Ok(())
}

#[test]
fn packed_rings_carry_frames_and_payloads_of_every_size() -> Result<()> {
    e2e::lab::alone(
        || Lab::pair_with("packed=on"),
        |lab| {
            lab.wait_reachable(0, "10.0.0.2")?;
            if let Ok(switch) = lab.switch() {
                ensure!(switch.port("vm1")?.has("RING_PACKED"), "{}", switch.port("vm1")?.0);
            }
            frames_of_every_size(lab)?;
            payloads_of_every_size(lab)
        },
    )
}

#[test]
fn tcp_flows_both_ways() -> Result<()> {
    LAB.test(|lab| {
        lab.wait_reachable(0, "10.0.0.2")?;
        for (from, to) in [(0, 1), (1, 0)] {
            let rate = lab.iperf(from, to, 3, "")?;
            println!("vm{} to vm{}: {rate:.0} Mbit/s", from + 1, to + 1);
            // Far below what even emulated guests do, far above what losses leave.
            ensure!(rate > 20.0, "only {rate} Mbit/s");
        }
        Ok(())
    })
}

#[test]
fn jumbo_frames_of_every_size_arrive_once_and_whole() -> Result<()> {
    let make = || {
        let mut lab = Lab::new(&[])?;
        for number in 1..=2 {
            lab.add_guest(number, "mtu=9000", GuestSpec::new(&format!("vm{number}")), "host_mtu=9000")?;
        }
        lab.boot()?;
        Ok(lab)
    };
    e2e::lab::alone(make, |lab| {
        for guest in &lab.guests {
            guest.run("ip link set eth0 mtu 9000")?;
        }
        let every: Vec<usize> = (60..=9014).collect();
        lab.check_frames(0, 1, 1, &every)?;
        let some: Vec<usize> = (60..=9014).step_by(7).collect();
        lab.check_frames(1, 0, 2, &some)?;
        lab.check_echo(0, "tcp", "10.0.0.2", &PAYLOADS)?;
        lab.check_echo(1, "udp", "10.0.0.1", &PAYLOADS)
    })
}
