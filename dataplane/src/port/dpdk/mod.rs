//! DPDK ports: an uplink over a device that DPDK has a driver for.
//!
//! Only with the cargo feature `dpdk`. A small shim in C (`shim.c`, `ffi`) is all that knows DPDK; `queue` are the two
//! queue traits over it. The drivers are polled: there is nothing that a worker could sleep on, so one that serves such
//! a port looks at it at least every millisecond.

mod ffi;
mod queue;
#[cfg(test)]
mod tests;

use std::io::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::port::stats::PortStats;
use crate::port::watch::{End, Watch};
use crate::port::{Link, Publisher, RxEntry, TxQueue};
use crate::status::PortState;
use ffi::Device;
use queue::{Receiver, Transmitter};

/// Time between two looks at the link.
const LOOK: Duration = Duration::from_millis(200);

/// A running DPDK port. The device is removed when it is dropped.
#[derive(Debug)]
pub struct DpdkPort {
    _watch: Watch,
}

impl DpdkPort {
    /// Opens a device, described as for DPDK's own programs (`net_tap0,iface=up0`), and publishes its queues: one
    /// unless `queues` says otherwise.
    ///
    /// # Errors
    /// If DPDK cannot be started or does not have such a device.
    pub fn start(
        name: &str,
        device: &str,
        queues: Option<u16>,
        mtu: Option<u16>,
        publisher: Arc<dyn Publisher>,
    ) -> Result<Self> {
        let opened = Device::open(device, queues.unwrap_or(1), mtu).map_err(|e| {
            let why = match e.raw_os_error() {
                Some(libc::ERANGE) => "its driver does not take that mtu; leave mtu= away".into(),
                _ => e.to_string(),
            };
            Error::new(e.kind(), format!("cannot open DPDK device {device}: {why}"))
        })?;
        publisher.stats().connects.fetch_add(1, Ordering::Relaxed);
        let (driver, queues, mtu) = (opened.driver(), opened.queues(), opened.mtu());
        tracing::info!(port = name, device, driver, queues, mtu, "uplink open");
        let device = Arc::new(opened);
        Ok(Self { _watch: Watch::start("sl-dpdk", move |end| watch(&device, publisher.as_ref(), end))? })
    }
}

/// Tells the workers of the link, until the end. Who drops the device last is this thread: workers have let go of it.
fn watch(device: &Arc<Device>, publisher: &dyn Publisher, end: &End) {
    let mut shown = None;
    while !end.has_come() {
        let reason = match device.is_up() {
            Ok(true) => None,
            Ok(false) => Some("the device has no link"),
            Err(_) => Some("the device is gone"),
        };
        if shown != Some(reason) {
            publisher.publish(reason.map_or_else(
                || link(device, publisher.stats()),
                |reason| Link::down(PortState::Down, Some(reason.into())),
            ));
            shown = Some(reason);
        }
        end.wait(None, Some(LOOK));
    }
    publisher.publish(Link::down(PortState::Down, None));
}

fn link(device: &Arc<Device>, stats: &Arc<PortStats>) -> Link {
    let queues = 0..device.queues();
    let receiver = |queue: u16| Arc::new(Receiver::new(queue, device.clone(), stats.clone()));
    let transmitter = |queue: u16| Arc::new(Transmitter::new(queue, device.clone(), stats.clone()));
    Link {
        rx: queues.clone().map(|queue| RxEntry { pair: queue.into(), queue: receiver(queue) }).collect(),
        tx: queues.map(|queue| transmitter(queue) as Arc<dyn TxQueue>).collect(),
        features: vec!["dpdk"],
        is_wire: true,
        ..Link::down(PortState::Up, None)
    }
}
