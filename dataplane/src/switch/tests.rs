//! Frames from ring to ring, through everything but the threads: what comes out where, and what is dropped why.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::publish::PortPublisher;
use super::snapshot::{Announcement, PortView, Snapshot};
use super::*;
use crate::config::{Carried, FdbConfig, VlanMode};
use crate::frame::BurstStorage;
use crate::limits::MAX_HELD_FRAMES;
use crate::port::vhost::hold::Hold;
use crate::port::vhost::queue::{QueueSetup, guest_rx, guest_tx};
use crate::port::{Link, Publisher, RxEntry, RxQueue};
use crate::status::PortState;
use crate::switch::forward::Forwarder;
use crate::switch::vlan::VlanPolicy;
use crate::testing::*;
use crate::virtq::Vring;
use crate::virtq::chain::Direction;
use crate::virtq::ring::Ring;

/// A station on a port: a guest that sends and a guest that receives (the two rings of a pair, each with memory of its
/// own, so that a mix-up shows).
struct Station_ {
    out: TestGuest,
    into: Vec<TestGuest>,
    rx: Arc<dyn RxQueue>,
    stats: Arc<PortStats>,
}

struct Bench {
    stations: Vec<Station_>,
    snapshot: Snapshot,
    forwarder: Forwarder,
    fdb: Arc<Fdb>,
    storage: BurstStorage,
}

#[derive(Clone)]
struct Port {
    network: u16,
    vlan: VlanMode,
    mtu: usize,
    mac: Option<u64>,
    only_source: Option<u64>,
    features: u64,
    queues: usize,
    up: bool,
    policers: Policers,
    /// Whether its guest migrates.
    logged: bool,
}

impl Default for Port {
    fn default() -> Self {
        let features = VERSION_1 | MRG_RXBUF | INDIRECT_DESC | GUEST_CSUM | GUEST_TSO4;
        Self {
            network: 0,
            vlan: VlanMode::All,
            mtu: 65_535,
            mac: None,
            only_source: None,
            features,
            queues: 1,
            up: true,
            policers: Policers::default(),
            logged: false,
        }
    }
}

fn mac(station: usize) -> u64 {
    0x0200_0000_0000 + station as u64 + 1
}

const BROADCAST: u64 = 0xffff_ffff_ffff;

impl Bench {
    fn new(ports: &[Port]) -> Self {
        let fdb = Arc::new(Fdb::new(FdbConfig::default()));
        let (mut stations, mut views) = (Vec::new(), Vec::new());
        for (id, port) in ports.iter().enumerate() {
            let guest = || TestGuest::new(64, port.features);
            let guest = || if port.logged { guest().logged() } else { guest() };
            let out = guest();
            let into: Vec<_> = (0..port.queues).map(|_| guest()).collect();
            let stats = Arc::new(PortStats::default());
            let rx = guest_tx(QueueSetup { stats: stats.clone(), ..out.setup() }, &out.ring());
            let tx = into.iter().enumerate().map(|(pair, guest)| {
                guest_rx(QueueSetup { pair, stats: stats.clone(), ..guest.setup() }, &guest.ring())
            });
            let tx = if port.up { tx.collect() } else { Vec::new() };
            let rx_entry = RxEntry { pair: 0, queue: rx.clone() };
            let link = Link { rx: vec![rx_entry], tx, ..Link::down(PortState::Up, None) };
            views.push(Some(Arc::new(PortView {
                id: PortId(id as u16),
                network: port.network,
                vlan: VlanPolicy::from(&port.vlan),
                mtu: port.mtu,
                mac: port.mac,
                only_source: port.only_source,
                policers: port.policers.clone(),
                stats: stats.clone(),
                link: Arc::new(link),
            })));
            stations.push(Station_ { out, into, rx, stats });
        }
        let members = |network: u16| {
            let of = |view: &&Arc<PortView>| view.network == network && view.link.receives();
            views.iter().flatten().filter(of).map(|view| view.id).collect()
        };
        let networks = (0..=ports.iter().map(|port| port.network).max().unwrap_or(0)).map(members).collect();
        let snapshot =
            Snapshot { epoch: 0, ports: views, networks, holding: Vec::new(), plans: Vec::new(), announcement: None };
        Self { stations, snapshot, forwarder: Forwarder::new(fdb.clone()), fdb, storage: BurstStorage::default() }
    }

    /// Lets a station send frames (header and frame each) and switches them.
    fn send(&mut self, from: usize, frames: &[Vec<u8>]) {
        for bytes in frames {
            self.stations[from].out.send(bytes, &[]);
        }
        self.switch(from);
    }

    fn switch(&mut self, from: usize) {
        let port = self.snapshot.ports[from].clone().unwrap();
        let rx = self.stations[from].rx.clone();
        let (forwarder, snapshot) = (&mut self.forwarder, &self.snapshot);
        while rx.poll(&mut self.storage, &mut |burst| forwarder.forward(snapshot, &port, burst)).unwrap() > 0 {}
    }

    fn post(&mut self, to: usize, count: usize, len: u32) {
        for guest in &mut self.stations[to].into {
            (0..count).for_each(|_| drop(guest.post(&[len], WRITE)));
        }
    }

    fn received(&mut self, at: usize) -> Vec<Vec<u8>> {
        self.stations[at].into.iter_mut().flat_map(|guest| guest.received()).map(|(_, frame)| frame).collect()
    }

    fn drops(&self, port: usize, reason: DropReason) -> u64 {
        self.stations[port].stats.drops(reason)
    }

    /// Every station has said something, so that the table is full.
    fn introduce(&mut self) {
        for from in 0..self.stations.len() {
            let hello = frame(BROADCAST, mac(from), 60);
            let tagged = |vid: u16| {
                let mut bytes = hello.clone();
                bytes.splice(24..24, [0x81, 0x00, (vid >> 8) as u8, vid as u8]);
                bytes
            };
            self.send(from, &[hello.clone(), tagged(10)]);
        }
    }

    /// Has what comes for a port be held, which is a member of its network only if it is up. Returns the link before, too.
    fn hold(&mut self, at: usize, state: PortState) -> (Arc<Hold>, Arc<Link>) {
        let hold = Arc::new(Hold::new(self.stations[at].stats.clone()));
        let before = self.relink(at, Link { hold: Some(hold.clone()), ..Link::down(state, None) });
        if state != PortState::Up {
            self.snapshot.networks[0].retain(|port| usize::from(port.0) != at);
        }
        (hold, before)
    }

    /// Gives a port another link. Returns the one before.
    fn relink(&mut self, at: usize, link: Link) -> Arc<Link> {
        let view = self.snapshot.ports[at].clone().unwrap();
        let before = view.link.clone();
        self.snapshot.ports[at] = Some(Arc::new(PortView { link: Arc::new(link), ..PortView::clone(&view) }));
        let holds = |view: &&Arc<PortView>| view.link.hold.is_some();
        self.snapshot.holding = self.snapshot.ports.iter().flatten().filter(holds).map(|view| view.id).collect();
        before
    }
}

fn bench(count: usize) -> Bench {
    let mut bench = Bench::new(&vec![Port::default(); count]);
    bench.introduce();
    (0..count).for_each(|at| bench.post(at, 32, 2048));
    bench
}

#[test]
fn unicast_goes_to_one_broadcast_to_all_but_the_sender() {
    let mut bench = bench(3);
    bench.send(0, &[frame(mac(1), mac(0), 60)]);
    assert_eq!([0, 1, 2].map(|at| bench.received(at).len()), [0, 1, 0]);
    bench.send(0, &[frame(BROADCAST, mac(0), 60), frame(mac(77), mac(0), 61)]);
    assert_eq!([0, 1, 2].map(|at| bench.received(at).len()), [0, 2, 2]);
    assert_eq!(bench.stations[0].stats.rx(0).read().0, 5);
}

#[test]
fn networks_are_apart() {
    let ports: Vec<_> = [0, 0, 1].map(|network| Port { network, ..Port::default() }).into();
    let mut bench = Bench::new(&ports);
    bench.introduce();
    (0..3).for_each(|at| bench.post(at, 8, 2048));
    bench.send(0, &[frame(BROADCAST, mac(0), 60), frame(mac(2), mac(0), 60)]);
    assert_eq!([1, 2].map(|at| bench.received(at).len()), [2, 0]);
    // The same address in both networks is two stations.
    bench.send(2, &[frame(mac(1), mac(0), 60)]);
    assert_eq!(bench.drops(2, DropReason::NoDestination), 3);
    bench.send(1, &[frame(mac(0), mac(1), 60)]);
    assert_eq!(bench.received(0).len(), 1);
}

#[test]
fn a_station_that_moves_is_followed() {
    let mut bench = bench(3);
    bench.send(2, &[frame(mac(1), mac(0), 60)]);
    bench.received(1);
    bench.send(1, &[frame(mac(0), mac(1), 60)]);
    assert_eq!([0, 2].map(|at| bench.received(at).len()), [0, 1]);
}

#[test]
fn frames_for_a_guest_that_migrates_wait_for_it_in_order() {
    let mut bench = bench(4);
    let (hold, up) = bench.hold(1, PortState::Down);
    let to_it: Vec<_> = (60..80).map(|len| frame(mac(1), mac(0), len * 20)).collect();
    bench.send(0, &to_it[..12]);
    bench.send(2, &to_it[12..]);
    assert_eq!(bench.received(3), Vec::<Vec<u8>>::new());
    // It appears at another port.
    bench.send(3, &[frame(BROADCAST, mac(1), 60)]);
    let expected: Vec<_> = to_it.iter().map(|frame| frame[12..].to_vec()).collect();
    assert!(bench.received(3) == expected);
    // It goes on where it was.
    bench.send(1, &[frame(BROADCAST, mac(1), 60)]);
    bench.send(0, &to_it[..3]);
    bench.relink(1, Link { hold: Some(hold.clone()), ..Link::clone(&up) });
    bench.received(1);
    bench.forwarder.release_returned(&bench.snapshot);
    assert!(bench.received(1) == expected[..3]);
    assert_eq!(bench.drops(1, DropReason::LinkDown), 0);
}

/// A guest is heard at a port just when its ring there is being changed.
#[test]
fn what_is_held_waits_again_where_a_ring_is_changed() {
    let mut bench = bench(3);
    bench.introduce();
    let (first, _) = bench.hold(1, PortState::Down);
    let (second, up) = bench.hold(2, PortState::Up);
    let to_it: Vec<_> = (60..70).map(|len| frame(mac(1), mac(0), len * 20)).collect();
    bench.send(0, &to_it[..6]);
    bench.send(2, &[frame(BROADCAST, mac(1), 60)]);
    bench.send(0, &to_it[6..]);
    assert_eq!([first.len(), second.len()], [0, 10]);
    bench.relink(2, Link { hold: Some(second.clone()), ..Link::clone(&up) });
    bench.received(2);
    bench.forwarder.release_returned(&bench.snapshot);
    let expected: Vec<_> = to_it.iter().map(|frame| frame[12..].to_vec()).collect();
    assert!(bench.received(2) == expected);
}

/// By who holds the frame: another worker, or, as here, the one that hears the guest later in the same burst.
#[test]
fn a_guest_that_is_heard_before_a_frame_for_it_is_held_gets_it() {
    let mut bench = bench(3);
    let (hold, _) = bench.hold(1, PortState::Down);
    let (to_it, from_it) = (frame(mac(1), mac(2), 60), frame(mac(0), mac(1), 60));
    bench.send(2, &[to_it.clone(), from_it]);
    assert!(bench.received(2) == [to_it[12..].to_vec()]);
    assert!(hold.is_empty());
}

/// As when QEMU speaks for its guest before the guest's ring has started.
#[test]
fn a_guest_that_is_heard_before_it_can_receive_gets_what_was_held() {
    let mut bench = bench(3);
    let (hold, _) = bench.hold(1, PortState::Down);
    let up = bench.relink(2, Link::down(PortState::Down, None));
    bench.snapshot.networks[0].retain(|port| *port == PortId(0));
    let to_it = frame(mac(1), mac(0), 60);
    bench.send(0, &[to_it.clone(), frame(mac(2), mac(0), 60)]);
    bench.send(2, &[frame(BROADCAST, mac(1), 60)]);
    bench.forwarder.release_returned(&bench.snapshot);
    assert_eq!((hold.len(), bench.drops(2, DropReason::LinkDown)), (1, 1));
    bench.relink(2, Link::clone(&up));
    bench.received(2);
    bench.forwarder.release_returned(&bench.snapshot);
    assert!(bench.received(2) == [to_it[12..].to_vec()]);
    assert!(hold.is_empty());
}

/// What goes to all has come to where the guest is heard as well.
#[test]
fn what_is_held_of_a_flood_stays_with_its_port() {
    let mut bench = bench(3);
    let (hold, up) = bench.hold(1, PortState::Up);
    // Nobody has heard this station, and then a third port does, or the second is where it was.
    let to_all = [frame(mac(7), mac(0), 60), frame(BROADCAST, mac(0), 61)];
    bench.send(0, &to_all);
    bench.send(2, &[frame(mac(0), mac(7), 62)]);
    bench.send(2, &[frame(mac(0), mac(1), 63)]);
    bench.forwarder.release_returned(&bench.snapshot);
    assert_eq!((hold.len(), bench.received(2).len()), (2, 2));
    bench.received(1);
    bench.relink(1, Link { hold: Some(hold.clone()), ..Link::clone(&up) });
    bench.forwarder.release_returned(&bench.snapshot);
    assert!(bench.received(1) == to_all.map(|frame| frame[12..].to_vec()));
}

#[test]
fn what_is_held_is_bounded_and_counted() {
    let mut bench = bench(2);
    bench.introduce();
    let (hold, _) = bench.hold(1, PortState::Down);
    for _ in 0..MAX_HELD_FRAMES + 7 {
        bench.send(0, &[frame(mac(1), mac(0), 60)]);
        drop(bench.stations[0].out.returned());
    }
    assert_eq!(bench.drops(1, DropReason::LinkDown), 7);
    bench.snapshot.ports[1] = None;
    drop(hold);
    assert_eq!(bench.drops(1, DropReason::LinkDown), 7 + MAX_HELD_FRAMES as u64);
}

/// That of a port's thread.
fn publisher_of(switch: &Switch, id: PortId) -> PortPublisher {
    let stats = lock(&switch.inner.tables).ports.values().find(|entry| entry.id == id).unwrap().stats.clone();
    PortPublisher::new(Arc::downgrade(&switch.inner), id, stats)
}

#[test]
fn a_thread_that_was_left_behind_is_nobody() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    switch.add_port("a=vhost-user:/nonexistent/a".parse().unwrap()).unwrap();
    let old = publisher_of(&switch, PortId(0));
    switch.remove_port("a").unwrap();
    switch.add_port("b=vhost-user:/nonexistent/b".parse().unwrap()).unwrap();
    let station = Station { mac: mac(0), vid: 0, network: 0 };
    switch.inner.fdb.learn(station, PortId(0));
    old.publish(Link::down(PortState::Failed, Some("hung".into())));
    old.forget_stations();
    assert_ne!(switch.ports()[0].state, PortState::Failed);
    assert_eq!(switch.inner.fdb.lookup(station), Some(PortId(0)));
    assert!(old.journal().is_none());
    switch.stop();
}

/// The source of a migration ends before its guest is heard at the target.
#[test]
fn what_is_held_outlives_the_frontend_for_a_while() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    switch.add_port("a=vhost-user:/nonexistent/a".parse().unwrap()).unwrap();
    let inner = &switch.inner;
    let publisher = publisher_of(&switch, PortId(0));
    let held = || lock(&inner.tables).slots[0].view().unwrap().link.hold.clone();
    let station = Station { mac: mac(0), vid: 0, network: 0 };
    inner.fdb.learn(station, PortId(0));
    let hold = Arc::new(Hold::new(Arc::default()));
    publisher.publish(Link { hold: Some(hold.clone()), ..Link::down(PortState::Down, None) });
    let began = Instant::now();
    // The frontend hangs up.
    publisher.publish(Link::down(PortState::Down, None));
    publisher.forget_stations();
    publisher.publish(Link::down(PortState::Connecting, None));
    if began.elapsed() < Duration::from_secs(1) {
        assert!(held().is_some_and(|now| Arc::ptr_eq(&now, &hold)));
        assert_eq!(inner.fdb.lookup(station), Some(PortId(0)));
    }
    // The guest was not heard: the housekeeper sees to it.
    while held().is_some() {
        assert!(began.elapsed() < Duration::from_secs(20), "it is held for ever");
        std::thread::sleep(Duration::from_millis(20));
    }
    while inner.fdb.lookup(station).is_some() {
        assert!(began.elapsed() < Duration::from_secs(20), "it is known for ever");
    }
    switch.stop();
}

#[test]
fn a_configured_address_moves_only_to_a_port_that_has_it_too() {
    let owner = Port { mac: Some(mac(0)), ..Port::default() };
    let mut bench = Bench::new(&[owner.clone(), owner, Port::default()]);
    let station = Station { mac: mac(0), vid: 0, network: 0 };
    bench.fdb.insert(station, PortId(0), true);
    bench.send(2, &[frame(BROADCAST, mac(0), 60)]);
    assert_eq!(bench.fdb.lookup(station), Some(PortId(0)));
    for port in [1, 0, 0, 1] {
        bench.send(port, &[frame(BROADCAST, mac(0), 60)]);
        assert_eq!(bench.fdb.lookup(station), Some(PortId(port as u16)));
        assert!(bench.fdb.is_static(station));
    }
}

/// Gives a port whose frontend is not there a ring to send to.
pub(super) fn come_up(switch: &Switch, name: &str, hold: Option<Arc<Hold>>) {
    let entry = || lock(&switch.inner.tables).ports.get(name).map(|entry| (entry.id, entry.stats.clone())).unwrap();
    let (id, stats) = entry();
    let link = || lock(&switch.inner.tables).slots[usize::from(id.0)].view().unwrap().link.clone();
    // Its thread has nothing more to say once it has said what it waits for.
    let began = Instant::now();
    while link().reason.is_none() {
        assert!(began.elapsed() < Duration::from_secs(20), "{name} says nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
    let guest = TestGuest::new(8, VERSION_1);
    let tx = vec![guest_rx(guest.setup(), &guest.ring())];
    let publisher = PortPublisher::new(Arc::downgrade(&switch.inner), id, stats);
    publisher.publish(Link { tx, hold, ..Link::down(PortState::Up, None) });
}

/// As when the worker that was to deliver it did not wait for another one.
#[test]
fn what_is_left_for_a_guest_that_is_there_is_looked_for_again() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    switch.add_port("vm=vhost-user:/nonexistent/vm".parse().unwrap()).unwrap();
    let hold = Arc::new(Hold::new(Arc::default()));
    come_up(&switch, "vm", Some(hold.clone()));
    let mut guest = TestGuest::new(8, VERSION_1);
    guest.send(&frame(mac(1), mac(0), 60), &[]);
    let queue = guest_tx(guest.setup(), &guest.ring());
    assert_eq!(queue.poll(&mut BurstStorage::default(), &mut |burst| hold.keep(burst, &[0], 0)), Ok(1));
    let began = Instant::now();
    while !hold.is_empty() {
        assert!(began.elapsed() < Duration::from_secs(20), "it is left for ever");
        std::thread::sleep(Duration::from_millis(20));
    }
    switch.stop();
}

/// Its guest runs on another host and comes here, or has run here and goes there.
#[test]
fn a_configured_address_is_elsewhere_while_its_port_cannot_receive() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let station = Station { mac: mac(0), vid: 0, network: 0 };
    let entry = || switch.fdb().into_iter().map(|entry| (entry.port, entry.is_static)).collect::<Vec<_>>();
    switch.add_port("up=vhost-user:/nonexistent/up".parse().unwrap()).unwrap();
    switch.inner.fdb.learn(station, PortId(0));
    switch.add_port("vm=vhost-user:/nonexistent/vm,mac=02:00:00:00:00:01".parse().unwrap()).unwrap();
    assert_eq!(entry(), [("up".to_owned(), false)]);
    come_up(&switch, "vm", None);
    assert_eq!(entry(), [("vm".to_owned(), true)]);
    let publisher = publisher_of(&switch, PortId(1));
    publisher.publish(Link::down(PortState::Down, None));
    assert_eq!(entry(), []);
    switch.stop();
}

#[test]
fn a_trunk_has_its_address_in_each_of_its_vlans() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let spec = "vm=vhost-user:/nonexistent/vm,mac=02:00:00:00:00:01,vlan=3,trunk=10,20";
    switch.add_port(spec.parse().unwrap()).unwrap();
    come_up(&switch, "vm", None);
    let entries: Vec<_> = switch.fdb().into_iter().map(|entry| (entry.vlan, entry.is_static)).collect();
    assert_eq!(entries, [(3, true), (10, true), (20, true)]);
    switch.stop();
}

#[test]
fn a_guest_that_has_gone_to_another_host_is_heard_behind_the_uplink() {
    let owner = Port { mac: Some(mac(0)), ..Port::default() };
    let other = Port { mac: Some(mac(1)), ..Port::default() };
    let mut bench = Bench::new(&[owner, other, Port::default()]);
    let station = Station { mac: mac(0), vid: 0, network: 0 };
    bench.fdb.insert(station, PortId(0), true);
    bench.send(2, &[frame(BROADCAST, mac(0), 60)]);
    assert_eq!(bench.fdb.lookup(station), Some(PortId(0)), "it is here");
    let (hold, up) = bench.hold(0, PortState::Up);
    bench.send(2, &[frame(BROADCAST, mac(0), 60)]);
    assert_eq!((bench.fdb.lookup(station), hold.len()), (Some(PortId(0)), 1), "a ring is changed");
    bench.relink(0, Link { hold: Some(hold.clone()), ..Link::down(PortState::Down, None) });
    let to_it = frame(mac(0), mac(1), 61);
    bench.send(1, std::slice::from_ref(&to_it));
    bench.send(1, &[frame(BROADCAST, mac(0), 60)]);
    assert_eq!((bench.fdb.lookup(station), hold.len()), (Some(PortId(0)), 3), "another guest has claimed it");
    bench.post(2, 8, 256);
    bench.send(2, &[frame(BROADCAST, mac(0), 60)]);
    assert_eq!((bench.fdb.lookup(station), bench.fdb.is_static(station)), (Some(PortId(2)), false));
    assert!(bench.received(2) == [to_it[12..].to_vec()]);
    // What has been heard there is no more than that.
    bench.relink(0, Link::clone(&up));
    bench.send(0, &[frame(BROADCAST, mac(0), 60)]);
    assert_eq!(bench.fdb.lookup(station), Some(PortId(0)));
}

#[test]
fn adding_a_port_takes_no_address_from_another() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let address = |name: &str| format!("{name}=vhost-user:/nonexistent/{name},mac=02:00:00:00:00:01");
    let place = || switch.inner.fdb.lookup(Station { mac: mac(0), vid: 0, network: 0 });
    switch.add_port(address("a").parse().unwrap()).unwrap();
    switch.add_port(address("b").parse().unwrap()).unwrap();
    assert_eq!(place(), None);
    come_up(&switch, "a", None);
    come_up(&switch, "b", None);
    assert_eq!(place(), Some(PortId(0)));
    // Who goes leaves it to the other, and does not get it back before it is heard.
    let publisher = publisher_of(&switch, PortId(0));
    publisher.publish(Link::down(PortState::Down, Some("gone".into())));
    let station = Station { mac: mac(0), vid: 0, network: 0 };
    assert_eq!((place(), switch.inner.fdb.is_static(station)), (Some(PortId(1)), true));
    come_up(&switch, "a", None);
    assert_eq!(place(), Some(PortId(1)));
    switch.remove_port("a").unwrap();
    assert_eq!(place(), Some(PortId(1)));
    switch.remove_port("b").unwrap();
    assert_eq!(place(), None);
    switch.stop();
}

#[test]
fn an_announcement_is_a_broadcast_from_the_station() {
    let mut bench = bench(3);
    bench.introduce();
    (0..3).for_each(|port| drop((bench.post(port, 4, 256), bench.received(port))));
    let announcement = Announcement { port: PortId(1), mac: [2, 0, 0, 0, 0, 1] };
    bench.forwarder.announce(&bench.snapshot, &mut bench.storage, &announcement);
    assert_eq!(bench.fdb.lookup(Station { mac: mac(0), vid: 0, network: 0 }), Some(PortId(1)));
    let frame = crate::wire::rarp::request([2, 0, 0, 0, 0, 1]).to_vec();
    assert_eq!(bench.received(0), std::slice::from_ref(&frame));
    assert_eq!(bench.received(1), Vec::<Vec<u8>>::new());
    assert_eq!(bench.received(2), [frame]);
}

#[test]
fn nothing_goes_back_where_it_came_from() {
    let mut bench = bench(2);
    bench.send(0, &[frame(mac(0), mac(0), 60)]);
    assert_eq!(bench.drops(0, DropReason::SamePort), 1);
    assert_eq!([0, 1].map(|at| bench.received(at).len()), [0, 0]);
}

#[test]
fn vlans_access_and_trunk() {
    let access = |vid| Port { vlan: VlanMode::Access(vid), ..Port::default() };
    let trunk = Port { vlan: VlanMode::Trunk { native: None, allowed: vec![10] }, ..Port::default() };
    let mut bench = Bench::new(&[access(10), access(20), trunk, access(10)]);
    (0..4).for_each(|at| bench.post(at, 8, 2048));
    let plain = frame(BROADCAST, mac(0), 60);
    bench.send(0, std::slice::from_ref(&plain));
    let tagged = bench.received(2).remove(0);
    assert_eq!(&tagged[12..16], [0x81, 0, 0, 10]);
    assert_eq!([&tagged[..12], &tagged[16..]].concat(), plain[12..]);
    assert_eq!(bench.received(3), [&plain[12..]]);
    assert_eq!(bench.received(1).len(), 0);

    // Back, with priority bits: the tag goes where it is not wanted and stays where it is.
    let mut answer = frame(mac(0), mac(2), 60);
    answer.splice(24..24, [0x81, 0x00, 0xa0, 10]);
    bench.send(2, std::slice::from_ref(&answer));
    assert_eq!(bench.received(0), [[&answer[12..24], &answer[28..]].concat()]);
    bench.send(2, &[frame(BROADCAST, mac(2), 60)]);
    assert_eq!(bench.drops(2, DropReason::VlanDenied), 1);
    bench.send(0, std::slice::from_ref(&answer));
    assert_eq!(bench.drops(0, DropReason::VlanDenied), 1);
}

/// A tag behind that of the VLAN is the sender's own: all receivers get it, whatever form the others before them took.
#[test]
fn tags_behind_that_of_the_vlan_reach_everyone() {
    let trunk = || Port { vlan: VlanMode::Trunk { native: None, allowed: vec![5] }, ..Port::default() };
    let access = || Port { vlan: VlanMode::Access(5), ..Port::default() };
    // One whose number is the VLAN's could be mistaken for the VLAN's own.
    for inner in [5, 7] {
        let mut bench = Bench::new(&[trunk(), access(), access(), trunk(), access(), trunk()]);
        (1..6).for_each(|at| bench.post(at, 8, 2048));
        let mut stacked = frame(BROADCAST, mac(0), 60);
        stacked.splice(24..24, [0x81, 0x00, 0xa0, 5, 0x81, 0x00, 0x60, inner]);
        bench.send(0, std::slice::from_ref(&stacked));
        let bare = [&stacked[12..24], &stacked[28..]].concat();
        for (at, expected) in [(1, &bare[..]), (2, &bare), (3, &stacked[12..]), (4, &bare), (5, &stacked[12..])] {
            assert_eq!(bench.received(at), [expected], "port {at}, tag {inner}");
        }
    }
}

/// Behind a trunk's untagged VLAN, a tag of the sender's own would tell another VLAN.
#[test]
fn no_tag_of_ones_own_leads_from_one_vlan_to_another() {
    let native =
        |native| Port { vlan: VlanMode::Trunk { native: Some(native), allowed: vec![100] }, ..Port::default() };
    let access = |vlan| Port { vlan: VlanMode::Access(vlan), ..Port::default() };
    let carried = |network: &str, vlan| Carried { network: network.into(), vlan };
    let networks = VlanMode::Networks(vec![carried("red", None), carried("blue", Some(100))]);
    for (carrier, untagged) in [(native(5), 5), (Port { vlan: networks, ..Port::default() }, 0)] {
        let mut bench = Bench::new(&[access(untagged), carrier, access(100), access(untagged)]);
        (1..4).for_each(|at| bench.post(at, 8, 2048));
        // The last is a provider's tag, which is none to the VLANs here.
        for tags in [&[0x81, 0, 0, 0, 0x81, 0, 0, 100][..], &[0x81, 0, 0xe0, 0, 0x81, 0, 0, 0], &[0x88, 0xa8, 0, 100]] {
            let mut stacked = frame(BROADCAST, mac(0), 60);
            stacked.splice(24..24, tags.iter().copied());
            bench.send(0, &[stacked]);
        }
        bench.send(0, &[frame(BROADCAST, mac(0), 60)]);
        assert_eq!([1, 2, 3].map(|at| bench.received(at).len()), [2, 0, 4], "untagged: {untagged}");
        assert_eq!(bench.drops(1, DropReason::VlanDenied), 2);
    }
}

/// An uplink that is in one VLAN may be on a wire that has others.
#[test]
fn no_tag_of_ones_own_leads_to_another_vlan_of_the_wire() {
    let port = |vlan| Port { vlan, ..Port::default() };
    let access = || port(VlanMode::Access(5));
    let trunk = VlanMode::Trunk { native: None, allowed: vec![5] };
    let mut bench = Bench::new(&[access(), access(), access(), port(trunk)]);
    let wire = bench.snapshot.ports[1].clone().unwrap();
    let link = Link { rx: Vec::new(), tx: wire.link.tx.clone(), is_wire: true, ..Link::down(PortState::Up, None) };
    bench.snapshot.ports[1] = Some(Arc::new(PortView { link: Arc::new(link), ..PortView::clone(&wire) }));
    (1..3).for_each(|at| bench.post(at, 8, 2048));
    for (from, outer) in [(0, 0), (3, 5)] {
        let mut stacked = frame(BROADCAST, mac(from), 60);
        stacked.splice(24..24, [0x81, 0, 0, outer, 0x81, 0, 0, 100]);
        bench.send(from, &[stacked]);
    }
    bench.send(0, &[frame(BROADCAST, mac(0), 60)]);
    assert_eq!([1, 2].map(|at| bench.received(at).len()), [1, 3]);
    assert_eq!(bench.drops(1, DropReason::VlanDenied), 2);
}

/// What is kept for a guest keeps the tag that came with it, and the form that it had by then.
#[test]
fn what_is_held_keeps_its_tags() {
    let vlan = |trunk| match trunk {
        true => VlanMode::Trunk { native: None, allowed: vec![5] },
        false => VlanMode::Access(5),
    };
    for held in [false, true] {
        let ports = [true, false, held].map(|trunk| Port { vlan: vlan(trunk), ..Port::default() });
        let mut bench = Bench::new(&ports);
        bench.post(1, 8, 2048);
        bench.post(2, 8, 2048);
        let (hold, up) = bench.hold(2, PortState::Up);
        let mut stacked = frame(BROADCAST, mac(0), 60);
        stacked.splice(24..24, [0x81, 0x00, 0xa0, 5, 0x81, 0x00, 0x60, 7]);
        bench.send(0, std::slice::from_ref(&stacked));
        let bare = [&stacked[12..24], &stacked[28..]].concat();
        assert_eq!(bench.received(1), [&bare[..]]);
        assert_eq!(hold.len(), 1);
        bench.relink(2, Link { hold: Some(hold), ..Link::clone(&up) });
        bench.forwarder.release_returned(&bench.snapshot);
        assert_eq!(bench.received(2), [if held { &stacked[12..] } else { &bare }], "to a trunk: {held}");
    }
}

#[test]
fn tagged_and_untagged_frames_of_a_burst_keep_their_vlans() {
    for mtu in [1500, usize::MAX / 2] {
        let trunk = Port { vlan: VlanMode::Trunk { native: Some(5), allowed: vec![5, 20] }, mtu, ..Port::default() };
        let mut bench = Bench::new(&[trunk.clone(), trunk]);
        (0..2).for_each(|at| bench.post(at, 16, 2048));
        let tag = |mut frame: Vec<u8>| {
            frame.splice(24..24, [0x81, 0x00, 0, 20]);
            frame
        };
        let answer = frame(BROADCAST, mac(1), 60);
        bench.send(1, &[answer.clone(), tag(answer)]);
        let plain = frame(mac(1), mac(0), 60);
        let burst = [plain.clone(), tag(plain.clone()), plain.clone(), tag(plain.clone()), plain];
        // The stations are learned in the first, their pairs in the second, and known in the third.
        for round in 0..3 {
            bench.send(0, &burst);
            let expected: Vec<_> = burst.iter().map(|frame| frame[12..].to_vec()).collect();
            assert_eq!(bench.received(1), expected, "round {round}, MTU {mtu}");
        }
    }
}

#[test]
fn a_frame_that_ends_within_its_tag_is_not_cut_shorter() {
    for len in 16..18 {
        let access = Port { vlan: VlanMode::Access(10), ..Port::default() };
        let mut bench = Bench::new(&[Port::default(), access, Port::default()]);
        (1..3).for_each(|at| bench.post(at, 8, 2048));
        let mut short = frame(BROADCAST, mac(0), 18);
        short[24..28].copy_from_slice(&[0x81, 0x00, 0, 10]);
        short.truncate(12 + len);
        bench.send(0, std::slice::from_ref(&short));
        assert_eq!((bench.received(1).len(), bench.received(2)), (0, vec![short[12..].to_vec()]), "{len} bytes");
    }
}

/// What the next switch would take to be the host's own word, and what the hosts' switches tell each other.
#[test]
fn what_is_meant_for_the_next_bridge_goes_no_further() {
    let mut bench = Bench::new(&[Port::default(), Port::default()]);
    bench.post(1, 16, 2048);
    let reserved = [0x0180_c200_0000, 0x0180_c200_0001, 0x0180_c200_000e, 0x0100_0ccc_cccc, 0x0100_0ccc_cccd];
    let others = [0x0180_c200_0010, 0x0180_c201_0000, 0x0100_0ccc_cc00, 0x3333_0000_0001, 0x0100_5e00_0001];
    bench.send(0, &reserved.map(|to| frame(to, mac(0), 60)));
    assert_eq!((bench.received(1).len(), bench.drops(0, DropReason::Reserved)), (0, 5));
    assert_eq!(bench.fdb.lookup(Station { mac: mac(0), vid: 0, network: 0 }), None);
    bench.send(0, &others.map(|to| frame(to, mac(0), 60)));
    assert_eq!((bench.received(1).len(), bench.drops(0, DropReason::Reserved)), (5, 5));
}

/// Whether a port has a limit on its frames' size says nothing of their tags.
#[test]
fn without_vlans_a_tag_of_priority_stays() {
    for mtu in [1500, usize::MAX / 2] {
        let mut bench = Bench::new(&[Port::default(), Port { mtu, ..Port::default() }]);
        bench.post(1, 8, 2048);
        for tags in [&[0x81, 0, 0xa0, 0][..], &[0x81, 0, 0xa0, 0, 0x81, 0, 0, 20]] {
            let mut tagged = frame(BROADCAST, mac(0), 60);
            tagged.splice(24..24, tags.iter().copied());
            bench.send(0, std::slice::from_ref(&tagged));
            assert_eq!(bench.received(1), [&tagged[12..]]);
        }
    }
}

#[test]
fn others_addresses_and_multicast_sources_are_refused() {
    let mut bench = Bench::new(&[Port { only_source: Some(mac(0)), ..Port::default() }, Port::default()]);
    bench.post(1, 8, 2048);
    bench.send(0, &[frame(BROADCAST, mac(5), 60), frame(BROADCAST, mac(0), 60)]);
    assert_eq!((bench.received(1).len(), bench.drops(0, DropReason::Spoofed)), (1, 1));
    bench.send(1, &[frame(BROADCAST, BROADCAST, 60)]);
    assert_eq!(bench.drops(1, DropReason::Spoofed), 1);
}

#[test]
fn mtus_are_kept_both_ways() {
    let mut bench = Bench::new(&[Port { mtu: 1500, ..Port::default() }, Port { mtu: 1400, ..Port::default() }]);
    bench.introduce();
    bench.post(1, 8, 4096);
    bench.send(0, &[frame(mac(1), mac(0), 1515), frame(mac(1), mac(0), 1415), frame(mac(1), mac(0), 1414)]);
    assert_eq!(bench.received(1).len(), 1);
    assert_eq!((bench.drops(0, DropReason::MtuIngress), bench.drops(1, DropReason::MtuEgress)), (1, 1));

    // Two tags go beside it, as on a wire that takes them.
    let stacks = [&[0x81, 0, 0, 5][..], &[0x88, 0xa8, 0, 5], &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6]];
    for (stack, longer) in stacks.into_iter().flat_map(|stack| [(stack, 0), (stack, 1)]) {
        let mut tagged = frame(BROADCAST, mac(0), 1414 + longer);
        tagged.splice(24..24, stack.iter().copied());
        bench.post(1, 1, 4096);
        bench.send(0, &[tagged]);
        assert_eq!(bench.received(1).len(), 1 - longer, "{stack:?} {longer}");
    }
}

/// A kilobyte a second, so that next to nothing flows back while the test runs.
fn slow(burst_bytes: u64) -> Option<Arc<policer::Policer>> {
    let limit = crate::config::RateLimit { bits_per_second: 8000, burst_bits: Some(8 * burst_bytes) };
    Some(Arc::new(policer::Policer::new(limit)))
}

#[test]
fn rates_are_limited_each_way() {
    let limited = Port { policers: Policers { rx: slow(4500), tx: slow(2500) }, ..Port::default() };
    let mut bench = Bench::new(&[limited, Port::default()]);
    bench.post(0, 32, 2048);
    bench.post(1, 32, 2048);
    bench.send(0, &vec![frame(BROADCAST, mac(0), 1000); 8]);
    assert_eq!((bench.received(1).len(), bench.drops(0, DropReason::RateRx)), (5, 3));
    bench.send(1, &vec![frame(BROADCAST, mac(1), 1000); 8]);
    assert_eq!((bench.received(0).len(), bench.drops(0, DropReason::RateTx)), (3, 5));
    assert_eq!(bench.drops(1, DropReason::RateRx) + bench.drops(1, DropReason::RateTx), 0);
    // What is dropped at the door teaches nothing.
    bench.send(0, &[frame(BROADCAST, mac(9), 60)]);
    assert_eq!(bench.fdb.len(), 2);
}

#[test]
fn limits_are_those_of_the_configuration_and_outlive_links() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    switch.add_port("a=vhost-user:/nonexistent/a,rate-rx=1M".parse().unwrap()).unwrap();
    let policers = || lock(&switch.inner.tables).slots[0].view().unwrap().policers.clone();
    let before = policers();
    assert!(before.rx.is_some() && before.tx.is_none());
    let publisher = publisher_of(&switch, PortId(0));
    publisher.publish(Link::down(PortState::Down, None));
    assert!(Arc::ptr_eq(&before.rx.unwrap(), &policers().rx.unwrap()));
    switch.stop();
}

#[test]
fn super_packets_are_limited_by_their_bytes() {
    let limited = Port { policers: Policers { rx: None, tx: slow(30_000) }, ..Port::default() };
    let mut bench = Bench::new(&[Port::default(), limited]);
    bench.introduce();
    bench.post(1, 60, 2048);
    let whole = super_packet(20_000, 1448);
    // The second one takes more than is left, the third finds nothing.
    bench.send(0, &[whole.clone(), whole.clone(), whole]);
    assert_eq!((bench.received(1).len(), bench.drops(1, DropReason::RateTx)), (2, 1));
}

#[test]
fn what_does_not_fit_is_counted() {
    let small = Port { features: VERSION_1, ..Port::default() };
    let down = Port { up: false, ..Port::default() };
    let mut bench = Bench::new(&[Port::default(), small, down]);
    bench.introduce();
    bench.send(0, &[frame(mac(1), mac(0), 60)]);
    // Three of these: the introductions of station 0, before anyone had posted a buffer.
    let full = bench.drops(1, DropReason::Full);
    bench.post(1, 1, 100);
    bench.send(0, &[frame(mac(1), mac(0), 200), frame(mac(1), mac(0), 60), frame(mac(1), mac(0), 60)]);
    assert_eq!(bench.drops(1, DropReason::BufferTooSmall), 1);
    assert_eq!(bench.drops(1, DropReason::Full), full + 1);
    assert_eq!(bench.received(1).len(), 1);
    bench.send(0, &[frame(mac(2), mac(0), 60)]);
    assert_eq!(bench.drops(2, DropReason::LinkDown), 1);
}

#[test]
fn a_capture_tells_what_became_of_frames() {
    use crate::capture::{Capture, CaptureOptions, Direction};
    let down = Port { up: false, ..Port::default() };
    let mut bench = Bench::new(&[Port::default(), Port::default(), down]);
    bench.introduce();
    let mut captures: Vec<_> = bench
        .stations
        .iter()
        .map(|station| Capture::start(station.stats.clone(), CaptureOptions::default()).unwrap())
        .collect();
    let mut seen = |port: usize| {
        let frames = captures[port].drain().into_iter();
        frames.map(|frame| (frame.direction, frame.length, frame.drop_reason)).collect::<Vec<_>>()
    };
    // One buffer for two frames, a port that is down, and a frame to oneself.
    bench.post(1, 1, 200);
    bench.send(
        0,
        &[frame(mac(1), mac(0), 60), frame(mac(1), mac(0), 61), frame(mac(2), mac(0), 62), frame(mac(0), mac(0), 63)],
    );
    let rx = |len, reason| (Direction::Rx, len, reason);
    let tx = |len, reason| (Direction::Tx, len, reason);
    assert_eq!(seen(0), [rx(60, None), rx(61, None), rx(62, None), rx(63, Some(DropReason::SamePort))]);
    assert_eq!(seen(1), [tx(60, None), tx(61, Some(DropReason::Full))]);
    assert_eq!(seen(2), [tx(62, Some(DropReason::LinkDown))]);
    // What one burst has dropped is not said of the next.
    bench.post(1, 2, 200);
    bench.send(0, &[frame(mac(1), mac(0), 60), frame(mac(1), mac(0), 61)]);
    assert_eq!(seen(1), [tx(60, None), tx(61, None)]);
}

#[test]
fn frames_that_are_none_are_dropped_at_the_door() {
    let mut bench = bench(2);
    let mut oversize = frame(mac(1), mac(0), 60);
    oversize.resize(12 + crate::limits::MAX_FRAME + 1, 0);
    let mut bad = frame(mac(1), mac(0), 60);
    bad[0] = 1;
    bad[6..8].copy_from_slice(&60u16.to_le_bytes());
    bench.send(0, &[frame(mac(1), mac(0), 13), vec![0; 5], oversize, bad]);
    let count = |reason| bench.drops(0, reason);
    assert_eq!((count(DropReason::Runt), count(DropReason::Oversize), count(DropReason::BadOffload)), (2, 1, 1));
    assert_eq!(bench.received(1).len(), 0);
}

#[test]
fn a_capture_shows_what_was_not_let_in() {
    use crate::capture::{Capture, CaptureOptions};
    let mut bench = bench(2);
    let mut oversize = frame(mac(1), mac(0), 60);
    oversize.resize(12 + crate::limits::MAX_FRAME + 1, 0);
    let mut bad = frame(mac(1), mac(0), 60);
    (bad[0], bad[6]) = (1, 60);
    let runt = frame(mac(1), mac(0), 13);
    let start = |filter: &str, stats: &Arc<PortStats>| {
        let filter = (!filter.is_empty()).then(|| filter.parse().unwrap());
        Capture::start(stats.clone(), CaptureOptions { filter, ..CaptureOptions::default() }).unwrap()
    };
    let mut capture = start("", &bench.stations[0].stats);
    let sent = [frame(mac(1), mac(0), 60), runt.clone(), vec![0; 5], oversize.clone(), bad.clone()];
    bench.send(0, &sent);
    let mut seen: Vec<_> =
        capture.drain().into_iter().map(|frame| (frame.drop_reason, frame.length, frame.bytes)).collect();
    seen.sort_by_key(|(_, length, bytes)| (*length, bytes.len()));
    let wanted = [
        (Some(DropReason::Runt), 0, vec![]),
        (Some(DropReason::Runt), 13, runt[12..].to_vec()),
        (None, 60, sent[0][12..].to_vec()),
        (Some(DropReason::BadOffload), 60, bad[12..].to_vec()),
        (Some(DropReason::Oversize), crate::limits::MAX_FRAME + 1, oversize[12..12 + 128].to_vec()),
    ];
    let order = |(reason, length, _): &(Option<DropReason>, usize, Vec<u8>)| (*length, reason.is_some());
    seen.sort_by_key(order);
    assert_eq!(seen, wanted);
    drop(capture);
    let mut capture = start("dropped runt", &bench.stations[0].stats);
    bench.send(0, &sent);
    assert_eq!(capture.drain().len(), 2);
}

/// A TCP super-packet over IPv4 with its header.
fn super_packet(payload: usize, size: u16) -> Vec<u8> {
    let mut bytes = frame(mac(1), mac(0), 14 + 20 + 20 + payload);
    bytes[0] = 1;
    bytes[1] = 1;
    bytes[2..4].copy_from_slice(&54u16.to_le_bytes());
    bytes[4..6].copy_from_slice(&size.to_le_bytes());
    bytes[6..8].copy_from_slice(&34u16.to_le_bytes());
    bytes[8..10].copy_from_slice(&16u16.to_le_bytes());
    bytes[24..26].copy_from_slice(&[8, 0]);
    let len = (40 + payload) as u16;
    let mut ip = [0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    ip[2..4].copy_from_slice(&len.to_be_bytes());
    bytes[26..46].copy_from_slice(&ip);
    bytes[46..66].copy_from_slice(&[0, 80, 1, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    let pseudo = crate::wire::checksum::Sum::pseudo_v4([10, 0, 0, 1], [10, 0, 0, 2], 6, len - 20).fold();
    bytes[62..64].copy_from_slice(&pseudo.to_be_bytes());
    bytes
}

#[test]
fn super_packets_pass_whole_or_are_segmented() {
    let mut bench = Bench::new(&[Port::default(), Port::default(), Port { features: VERSION_1, ..Port::default() }]);
    bench.introduce();
    bench.post(1, 40, 2048);
    bench.post(2, 40, 2048);
    let whole = super_packet(20_000, 1448);
    bench.send(0, std::slice::from_ref(&whole));
    let (header, frame) = bench.stations[1].into[0].received().remove(0);
    assert_eq!(frame, whole[12..]);
    assert_eq!(header[..10], whole[..10]);

    let mut other = whole.clone();
    other[12..18].copy_from_slice(&mac(2).to_be_bytes()[2..]);
    bench.send(0, std::slice::from_ref(&other));
    let segments = bench.stations[2].into[0].received();
    assert_eq!(segments.len(), 20_000usize.div_ceil(1448));
    let payload: Vec<u8> = segments.iter().flat_map(|(_, frame)| frame[54..].to_vec()).collect();
    assert_eq!(payload, other[66..]);
    for (header, frame) in &segments {
        assert_eq!(header[..10], [0; 10]);
        let parsed = etherparse::PacketHeaders::from_ethernet_slice(frame).unwrap();
        let (Some(etherparse::NetHeaders::Ipv4(ip, _)), Some(etherparse::TransportHeader::Tcp(tcp))) =
            (parsed.net, parsed.transport)
        else {
            panic!("TCP over IPv4")
        };
        assert_eq!(tcp.checksum, tcp.calc_checksum_ipv4(&ip, &frame[54..]).unwrap());
    }
}

/// The counter that proves one copy: one for what passes as it is, two for what has to be rebuilt.
#[test]
fn copies_are_counted_where_they_are_made() {
    let without = Port { features: VERSION_1 | MRG_RXBUF, ..Port::default() };
    let mut bench = Bench::new(&[Port::default(), Port::default(), without]);
    bench.introduce();
    let counted = |bench: &mut Bench| {
        let copies = std::mem::take(bench.forwarder.meters().1);
        (copies.delivered, copies.extra)
    };
    counted(&mut bench);
    bench.post(1, 20, 4096);
    bench.post(2, 40, 4096);
    bench.send(0, &[frame(mac(1), mac(0), 60), frame(mac(1), mac(0), 1514)]);
    assert_eq!(counted(&mut bench), (2, 0));
    bench.send(0, &[super_packet(20_000, 1448)]);
    assert_eq!(counted(&mut bench), (1, 0));
    let mut other = super_packet(20_000, 1448);
    other[12..18].copy_from_slice(&mac(2).to_be_bytes()[2..]);
    bench.send(0, &[other]);
    let segments = 20_000_u64.div_ceil(1448);
    assert_eq!(counted(&mut bench), (segments, segments));
}

/// A worker that has lost its CPU in the midst of a burst costs the others one wait, not one for each burst.
#[test]
fn a_receiver_that_another_worker_holds_is_not_waited_for() {
    let mut bench = Bench::new(&[Port::default(), Port::default(), Port::default()]);
    bench.introduce();
    bench.post(1, 60, 2048);
    bench.post(2, 60, 2048);
    // The same again with a ring that can be held.
    let guest = &bench.stations[1].into[0];
    let (Vring::Split(ring), stats) = (guest.ring(), bench.stations[1].stats.clone()) else { panic!("a split ring") };
    let tx = guest_rx(QueueSetup { stats, ..guest.setup() }, &Vring::Split(ring.clone()));
    let old = bench.snapshot.ports[1].clone().unwrap();
    let link = Link { tx: vec![tx], ..(*old.link).clone() };
    bench.snapshot.ports[1] = Some(Arc::new(PortView { link: Arc::new(link), ..(*old).clone() }));

    let held = ring.try_lock(Direction::ToGuest).unwrap();
    let begun = Instant::now();
    for _ in 0..200 {
        let frames = [frame(mac(1), mac(0), 60), frame(mac(2), mac(0), 60)];
        bench.send(0, &frames);
        assert_eq!(bench.received(2).len(), 1);
        bench.post(2, 1, 2048);
        drop(bench.stations[0].out.returned());
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(bench.drops(1, DropReason::Contended), 200);
    drop(held);
    bench.send(0, &[frame(mac(1), mac(0), 60)]);
    assert_eq!((bench.received(1).len(), bench.drops(1, DropReason::Contended)), (1, 200));
}

#[test]
fn a_super_packet_that_lies_is_not_converted() {
    let mut bench = Bench::new(&[Port::default(), Port { features: VERSION_1, ..Port::default() }]);
    bench.introduce();
    bench.post(1, 40, 2048);
    let mut lie = super_packet(4000, 1448);
    // The offset of TCP's data claims a header beyond the frame's first part: fine for who takes it whole.
    lie[58] = 0xf0;
    lie.truncate(12 + 14 + 20 + 30);
    bench.send(0, &[lie]);
    let refused = bench.drops(1, DropReason::CannotConvert) + bench.drops(0, DropReason::BadOffload);
    assert_eq!((refused, bench.received(1).len()), (1, 0));
}

#[test]
fn partial_checksums_are_completed_for_who_cannot() {
    let mut bench = Bench::new(&[Port::default(), Port { features: VERSION_1, ..Port::default() }]);
    bench.introduce();
    bench.post(1, 4, 2048);
    let mut partial = super_packet(1000, 0);
    partial[1] = 0;
    bench.send(0, std::slice::from_ref(&partial));
    let (header, frame) = bench.stations[1].into[0].received().remove(0);
    assert_eq!(header[0], 0);
    let mut sum = crate::wire::checksum::Sum::pseudo_v4([10, 0, 0, 1], [10, 0, 0, 2], 6, 1020);
    sum.add(&frame[34..]);
    assert_eq!(sum.fold(), 0xffff);
    assert_eq!(frame[54..], partial[66..]);
}

#[test]
fn flows_spread_over_queues_and_keep_to_one() {
    let mut bench = Bench::new(&[Port::default(), Port { queues: 4, ..Port::default() }]);
    bench.introduce();
    bench.post(1, 60, 2048);
    let flow = |port: u8| {
        let mut bytes = super_packet(20, 0);
        bytes[..12].fill(0);
        bytes[47] = port;
        bytes
    };
    let frames: Vec<_> = (0..30).map(flow).collect();
    bench.send(0, &frames);
    let queues: Vec<Vec<_>> = bench.stations[1].into.iter_mut().map(|guest| guest.received()).collect();
    assert_eq!(queues.iter().map(Vec::len).sum::<usize>(), 30);
    assert!(queues.iter().all(|frames| !frames.is_empty()), "{:?}", queues.iter().map(Vec::len).collect::<Vec<_>>());
    let places: Vec<Vec<u8>> = queues.iter().map(|frames| frames.iter().map(|(_, f)| f[35]).collect()).collect();
    bench.send(0, &frames);
    let again: Vec<Vec<u8>> =
        bench.stations[1].into.iter_mut().map(|guest| guest.received().iter().map(|(_, f)| f[35]).collect()).collect();
    assert_eq!(places, again);
}

#[test]
fn a_broken_receiver_faults_alone() {
    let mut bench = bench(3);
    // Its next buffer is one to read from.
    for guest in &mut bench.stations[1].into {
        guest.returned();
        (0..32).for_each(|index| guest.set_desc(index, Desc { addr: 0x10_0000, len: 64, flags: 0, next: 0 }));
    }
    bench.send(0, &[frame(mac(1), mac(0), 60), frame(mac(2), mac(0), 60)]);
    assert_eq!(bench.stations[1].stats.fault(), Some(crate::virtq::Fault::WrongDirection));
    assert_eq!(bench.received(2).len(), 1);
    // Nor is the frame that met the fault forgotten.
    assert_eq!(bench.drops(1, DropReason::LinkDown), 1);
    bench.send(0, &[frame(mac(1), mac(0), 60), frame(mac(2), mac(0), 60)]);
    assert_eq!(bench.drops(1, DropReason::LinkDown), 2);
    assert_eq!(bench.received(2).len(), 1);
}

/// Every frame that is received, or made here, is sent or dropped: over broadcasts, segments, want of room and faults.
#[test]
fn counts_add_up() {
    let mut bench = Bench::new(&[Port::default(), Port::default(), Port { features: VERSION_1, ..Port::default() }]);
    bench.introduce();
    bench.post(1, 10, 2048);
    bench.post(2, 20, 2048);
    let mut segmented = super_packet(20_000, 1448);
    segmented[12..18].copy_from_slice(&mac(2).to_be_bytes()[2..]);
    let broadcast = frame(BROADCAST, mac(0), 60);
    bench.send(0, &[segmented.clone(), broadcast.clone(), frame(mac(1), mac(0), 60), frame(mac(0), mac(0), 60)]);
    // There is room for some of its segments only.
    bench.send(0, &[segmented, broadcast]);
    bench.stations[1].into[0].returned();
    bench.post(1, 4, 2048);
    (0..64).for_each(|index| bench.stations[1].into[0].set_desc(index, Desc { addr: 0, len: 64, flags: 0, next: 0 }));
    let to_broken = vec![frame(mac(1), mac(0), 60); 12];
    bench.send(0, &to_broken);
    assert!(bench.stations[1].stats.fault().is_some());
    let all = bench.stations.iter().map(|station| &station.stats);
    let sum = |count: fn(&PortStats) -> u64| all.clone().map(|stats| count(stats)).sum::<u64>();
    let (received, sent) = (sum(|stats| stats.frames().0), sum(|stats| stats.frames().1));
    let dropped = sum(|stats| DropReason::ALL.iter().map(|&reason| stats.drops(reason)).sum());
    assert!(sent > 20 && dropped > 10, "{sent} {dropped}");
    assert_eq!(received + sum(PortStats::made), sent + sum(PortStats::merged) + dropped);
}

/// What a port has counted outlives it.
#[test]
fn totals_know_of_ports_that_are_no_more() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let config: PortConfig = "gone=vhost-user:/nonexistent/sluice.sock".parse().unwrap();
    switch.add_port(config).unwrap();
    let stats = lock(&switch.inner.tables).ports.get("gone").map(|entry| entry.stats.clone()).unwrap();
    stats.rx(0).add(5, 300);
    stats.make_frames(2);
    let before = switch.totals();
    switch.remove_port("gone").unwrap();
    // As a hold does that outlives its port.
    stats.drop_frames(DropReason::LinkDown, 7);
    drop(stats);
    let after = switch.totals();
    assert_eq!((before.rx_frames, before.made_frames, before.drops.len()), (5, 2, 0));
    assert_eq!((after.rx_frames, after.made_frames, after.drops.get("link_down")), (5, 2, Some(&7)));
    let taken_over = Switch::start(&SwitchConfig::default()).unwrap();
    taken_over.restore_totals(&switch.removed_totals());
    assert_eq!(taken_over.totals(), after);
}

#[test]
fn frames_before_a_fault_are_delivered() {
    let mut bench = bench(2);
    bench.stations[0].out.send(&frame(mac(1), mac(0), 60), &[]);
    bench.stations[0].out.make_available(999);
    let port = bench.snapshot.ports[0].clone().unwrap();
    let rx = bench.stations[0].rx.clone();
    let (forwarder, snapshot) = (&mut bench.forwarder, &bench.snapshot);
    let fault = rx.poll(&mut bench.storage, &mut |burst| forwarder.forward(snapshot, &port, burst)).unwrap_err();
    assert_eq!(fault, crate::virtq::Fault::DescriptorIndex);
    assert_eq!(bench.received(1).len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever the layout on either side, the bytes arrive.
    #[test]
    fn any_layout_carries_any_frame(
        len in prop_oneof![14usize..300, 1400usize..1600, 14usize..65_000],
        split in proptest::collection::vec(1u32..3000, 0..6),
        buffers in proptest::collection::vec(12u32..5000, 1..4),
        tagged in any::<bool>(),
    ) {
        let vlan = if tagged { VlanMode::Access(5) } else { VlanMode::All };
        let ports = [Port { vlan, ..Port::default() }, Port::default()];
        let mut bench = Bench::new(&ports);
        let room: u32 = buffers.iter().sum();
        let chains = (len as u32 + 40).div_ceil(room).max(1).min(60 / buffers.len() as u32);
        for _ in 0..chains {
            bench.stations[1].into[0].post(&buffers, WRITE);
        }
        let fits = u64::from(chains) * u64::from(room) >= len as u64 + 12 + if tagged { 4 } else { 0 };
        let bytes = frame(mac(1), mac(0), len);
        bench.stations[0].out.send(&bytes, &split);
        bench.switch(0);
        let got = bench.received(1);
        if fits {
            prop_assert_eq!(got.len(), 1);
            let mut wanted = bytes[12..].to_vec();
            if tagged {
                wanted.splice(12..12, [0x81, 0, 0, 5]);
            }
            prop_assert!(got[0] == wanted);
        } else {
            prop_assert_eq!((got.len(), bench.drops(1, DropReason::Full)), (0, 1));
        }
    }
}

/// Every reason is shown by a test of this file or of the port that gives it, and explained to users.
/// Pages of a guest that differ from what they were.
fn changed(before: &[u8], guest: &TestGuest) -> Vec<u64> {
    let after = guest.read(0, MEMORY as usize);
    let pages = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    pages.filter(|(_, (a, b))| a != b).map(|(page, _)| page as u64).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever we write to while a guest migrates is marked, and hardly anything else.
    #[test]
    fn every_page_that_changes_is_logged(
        sizes in proptest::collection::vec(60usize..9000, 1..20),
        buffers in proptest::collection::vec(40u32..5000, 1..60),
        event_idx in any::<bool>(),
        rounds in 1..6,
    ) {
        let event_idx = if event_idx { EVENT_IDX } else { 0 };
        let logged = Port { logged: true, features: VERSION_1 | MRG_RXBUF | event_idx, ..Port::default() };
        let mut bench = Bench::new(&[logged.clone(), logged]);
        bench.introduce();
        for _ in 0..rounds {
            let room = 60 - bench.stations[1].into[0].outstanding();
            for &len in buffers.iter().take(room) {
                bench.stations[1].into[0].post(&[len], WRITE);
            }
            for &size in &sizes {
                bench.stations[0].out.send(&frame(mac(1), mac(0), size), &[]);
            }
            let (out, into) = (&bench.stations[0].out, &bench.stations[1].into[0]);
            let before = (out.read(0, MEMORY as usize), into.read(0, MEMORY as usize));
            drop((out.dirty(), into.dirty()));
            bench.stations[0].rx.arm();
            bench.stations[0].rx.disarm();
            bench.switch(0);
            let (out, into) = (&bench.stations[0].out, &bench.stations[1].into[0]);
            let (sent, received) = (changed(&before.0, out), changed(&before.1, into));
            let (marked_out, marked_into) = (out.dirty(), into.dirty());
            prop_assert!(sent.iter().all(|page| marked_out.contains(page)), "{sent:?} {marked_out:?}");
            prop_assert!(received.iter().all(|page| marked_into.contains(page)), "{received:?} {marked_into:?}");
            prop_assert!(marked_into.len() <= received.len() + buffers.len() + 2, "{received:?} {marked_into:?}");
            drop((bench.received(1), bench.stations[0].out.returned()));
        }
    }
}

#[test]
fn every_drop_reason_has_a_test() {
    // Some come from kinds of ports that are not at hand here.
    let tests = concat!(include_str!("tests.rs"), include_str!("../port/afxdp/tests/trouble.rs"));
    let docs = include_str!("../../../docs/features.md");
    for reason in DropReason::ALL {
        assert!(tests.contains(&format!("DropReason::{reason:?})")), "{reason:?} has no test");
        assert!(docs.contains(&format!("| `{}` |", reason.name())), "{reason:?} is not in docs/features.md");
    }
}

/// Workers take plans up; the tests above go without.
#[test]
fn a_switch_starts_and_stops() {
    let switch = Switch::start(&SwitchConfig { workers: vec![None, None], ..SwitchConfig::default() }).unwrap();
    assert_eq!(switch.workers().len(), 2);
    switch.stop();
}
