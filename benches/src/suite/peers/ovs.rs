//! Open vSwitch with DPDK.

use anyhow::Result;
use e2e::peer::Ovs;

use super::Job;

pub(super) fn start(job: &Job<'_>) -> Result<Ovs> {
    let mut ovs = Ovs::start(false)?;
    for (number, socket) in job.sockets.iter().enumerate() {
        ovs.add_port("br0", &format!("vhost{number}"), socket, &[])?;
        if number == 0 {
            // Its table holds 8192 addresses unless told otherwise.
            ovs.set_bridge("br0", &format!("other-config:mac-table-size={}", (2 * job.macs).max(8192)))?;
        }
    }
    Ok(ovs)
}
