//! Memory that goes while it is in use.

use sluice::config::SocketMode::Client;
use sluice::port::Publisher;
use sluice::status::PortState;
use sluice::virtq::Fault;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::support::*;

const MIB: u64 = 1 << 20;

#[test]
fn a_truncated_memory_file_stops_the_port_until_there_is_memory_again() {
    let _shared = shared();
    let bench = Bench::new("truncated", Client);
    let qemu = bench.listen();
    let stats = bench.recorder.stats().clone();
    let mut peer = qemu.accept();
    let guest = Guest::new(MIB);
    peer.negotiate();
    peer.frontend.set_mem_table(&[guest.region()]).unwrap();
    guest.file.set_len(4096).unwrap();
    // The port's own thread is the first that looks at the rings.
    peer.start_pair(0);
    assert_eq!(stats.fault(), Some(Fault::MemoryLost));

    // Neither the driver's reset nor the same rings again help.
    peer.frontend.get_vring_base(0).unwrap();
    peer.frontend.reset_owner().unwrap();
    peer.start_pair(0);
    assert_eq!(stats.fault(), Some(Fault::MemoryLost));

    let good = Guest::new(MIB);
    peer.frontend.set_mem_table(&[good.region()]).unwrap();
    assert_eq!(stats.fault(), None);
    assert_eq!((bench.recorder.newest().state, bench.recorder.newest().rx), (PortState::Up, 1));

    // So does connecting anew.
    good.file.set_len(0).unwrap();
    peer.frontend.get_vring_base(1).unwrap();
    peer.frontend.set_vring_enable(1, true).unwrap();
    peer.start_ring(1);
    assert_eq!(stats.fault(), Some(Fault::MemoryLost));
    drop(peer);
    let mut peer = qemu.accept();
    peer.bring_up(&Guest::new(MIB));
    assert_eq!(stats.fault(), None);
    assert_eq!(bench.recorder.newest().state, PortState::Up);
}
