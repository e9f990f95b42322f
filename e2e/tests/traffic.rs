//! Two guests talk through the switch: every size, every protocol, every mix of offloads.

use anyhow::{Result, ensure};
use e2e::lab::{Lab, Shared};

static LAB: Shared = Shared::new(Lab::pair);

/// Around every boundary: header, minimum frame, MTU, one and two pages, fragments, the largest datagram.
const PAYLOADS: [usize; 26] = [
    8, 17, 18, 19, 63, 64, 65, 127, 128, 129, 255, 256, 1023, 1024, 1471, 1472, 1473, 1500, 2047, 2952, 4095, 4096,
    4097, 16_384, 32_768, 65_000,
];

#[test]
fn guests_ping_each_other() -> Result<()> {
    LAB.test(|lab| {
        for (from, address) in [(0, "10.0.0.2"), (1, "10.0.0.1"), (0, "fd00::2"), (1, "fd00::1")] {
            lab.wait_reachable(from, address)?;
            let report = lab.guests[from].run(&format!("ping -c 10 -i 0.1 -W 2 {address}"))?;
            println!("{report}");
            ensure!(report.contains(" 0% packet loss"), "{report}");
        }
        Ok(())
    })
}

#[test]
fn frames_of_every_size_arrive_once_and_whole() -> Result<()> {
    LAB.test(|lab| {
        let sizes: Vec<usize> = (60..=1514).collect();
        lab.check_frames(0, 1, 1, &sizes)?;
        lab.check_frames(1, 0, 2, &sizes)
    })
}

#[test]
fn payloads_of_every_size_come_back_whole() -> Result<()> {
    LAB.test(|lab| {
        for (from, address) in [(0, "10.0.0.2"), (1, "10.0.0.1"), (0, "[fd00::2]"), (1, "[fd00::1]")] {
            for proto in ["udp", "tcp"] {
                lab.check_echo(from, proto, address, &PAYLOADS)?;
            }
            lab.check_echo(from, "tcp", address, &[1 << 20, 3, 4 << 20])?;
        }
        Ok(())
    })
}

#[test]
fn tcp_flows_both_ways() -> Result<()> {
    LAB.test(|lab| {
        lab.wait_reachable(0, "10.0.0.2")?;
        for (from, to) in [(0, 1), (1, 0)] {
            let rate = lab.iperf(from, to, 3, "")?;
            println!("vm{} to vm{}: {rate:.0} Mbit/s", from + 1, to + 1);
            ensure!(rate > 20.0, "only {rate} Mbit/s");
        }
        Ok(())
    })
}
