//! Guests with different offloads understand each other: the switch segments and completes checksums.

use anyhow::{Context, Result};
use e2e::lab::{Lab, Shared};
use e2e::qemu::GuestSpec;

/// Device properties of the guests: all, nothing, no mergeable buffers, another ring layout, checksums alone.
const GUESTS: [&str; 5] = [
    "",
    "csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,guest_uso4=off,\
     guest_uso6=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off,host_uso=off,mrg_rxbuf=off",
    "mrg_rxbuf=off",
    "packed=on,event_idx=off,indirect_desc=off",
    "guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,guest_uso4=off,guest_uso6=off",
];
/// One segment and less, several segments, the largest super-packet.
const PAYLOADS: [usize; 8] = [8, 1400, 1472, 1473, 4096, 20_000, 60_000, 65_000];

static LAB: Shared = Shared::new(|| {
    let mut lab = Lab::new(&[])?;
    for (number, properties) in (1..).zip(GUESTS) {
        lab.add_guest(number, "", GuestSpec::new(&format!("vm{number}")), properties)?;
    }
    lab.boot()?;
    Ok(lab)
});

fn exchange(lab: &Lab, from: usize, to: usize) -> Result<()> {
    for address in [format!("10.0.0.{}", to + 1), format!("[fd00::{}]", to + 1)] {
        let context = || format!("from {:?} to {:?}", GUESTS[from], GUESTS[to]);
        lab.check_echo(from, "tcp", &address, &PAYLOADS).with_context(context)?;
        lab.check_echo(from, "tcp", &address, &[1 << 20]).with_context(context)?;
        lab.check_echo(from, "udp", &address, &PAYLOADS).with_context(context)?;
    }
    Ok(())
}

#[test]
fn guests_with_different_devices_exchange_everything() -> Result<()> {
    LAB.test(|lab| {
        for from in 0..GUESTS.len() {
            for to in (0..GUESTS.len()).filter(|&to| to != from) {
                exchange(lab, from, to)?;
            }
        }
        Ok(())
    })
}

#[test]
fn guests_may_switch_their_offloads_at_any_time() -> Result<()> {
    LAB.test(|lab| {
        let all_on = "ethtool -K eth0 tx on sg on tso on gso on gro on";
        for setting in ["tso off", "tx off", "gso off tso off", "sg off", "gro off"] {
            lab.guests[0].run(&format!("ethtool -K eth0 {setting}"))?;
            for peer in [1, 2] {
                exchange(lab, 0, peer).with_context(|| setting.to_owned())?;
                exchange(lab, peer, 0).with_context(|| setting.to_owned())?;
            }
            lab.guests[0].run(all_on)?;
        }
        Ok(())
    })
}
