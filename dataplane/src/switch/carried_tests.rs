//! Networks that a port carries: who belongs where, while ports come and go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fdb::Station;
use super::publish::PortPublisher;
use super::snapshot::PortView;
use super::tests::come_up;
use super::vlan::VlanPolicy;
use super::*;
use crate::frame::BurstStorage;
use crate::handover::FdbRecord;
use crate::port::vhost::hold::Hold;
use crate::port::vhost::queue::guest_tx;
use crate::port::{Link, Publisher};
use crate::status::PortState;
use crate::testing::{TestGuest, VERSION_1};

const CARRIER: &str = "up=vhost-user:/nonexistent/up,networks=blue:100,red";

/// There and back.
const MOVES: [fn(&Switch); 2] =
    [|switch| add(switch, CARRIER).unwrap(), |switch| drop(switch.remove_port("up").unwrap())];

fn switch(specs: &[&str]) -> Arc<Switch> {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    for spec in specs {
        add(&switch, spec).unwrap();
    }
    switch
}

fn add(switch: &Switch, spec: &str) -> Result<(), PortError> {
    switch.add_port(spec.parse().unwrap())
}

fn port(name: &str, settings: &str) -> String {
    format!("{name}=vhost-user:/nonexistent/{name},{settings}")
}

/// A port as workers see it.
fn view(switch: &Switch, name: &str) -> PortView {
    let tables = lock(&switch.inner.tables);
    let shown = tables.shown.clone().unwrap();
    shown.port(tables.ports[name].id).unwrap().clone()
}

/// Its bridge domain, and its VLANs there.
fn place(switch: &Switch, name: &str) -> (String, VlanPolicy) {
    let port = view(switch, name);
    let tables = lock(&switch.inner.tables);
    (tables.networks[usize::from(port.network)].clone(), port.vlan)
}

fn id(switch: &Switch, name: &str) -> PortId {
    lock(&switch.inner.tables).ports[name].id
}

/// Lets a port's station be heard, as a worker would.
fn hear(switch: &Switch, name: &str, mac: u64, vid: u16) {
    let port = view(switch, name);
    let station = Station { mac, vid, network: port.network };
    assert_ne!(switch.inner.fdb.set(station, port.id, false, 0), Learned::No);
}

fn told(switch: &Switch) -> Vec<(String, u16, String)> {
    switch.fdb().into_iter().map(|entry| (entry.network, entry.vlan, entry.port)).collect()
}

#[test]
fn networks_are_vlans_of_what_carries_them_in_whatever_order_ports_come() {
    let (blue, red, green) = (port("b", "network=blue"), port("r", "network=red"), port("g", "network=green"));
    let orders: [[&str; 4]; 3] =
        [[CARRIER, &blue, &red, &green], [&blue, &red, &green, CARRIER], [&blue, CARRIER, &green, &red]];
    for order in orders {
        let switch = switch(&order);
        assert_eq!(place(&switch, "b"), ("=up".into(), VlanPolicy::Access(100)));
        assert_eq!(place(&switch, "r"), ("=up".into(), VlanPolicy::Access(0)));
        assert_eq!(place(&switch, "g"), ("green".into(), VlanPolicy::All));
        let (domain, vlans) = place(&switch, "up");
        assert_eq!(domain, "=up");
        assert_eq!((vlans.egress(100), vlans.egress(0), vlans.egress(1)), (Some(true), Some(false), None));

        switch.remove_port("up").unwrap();
        assert_eq!(place(&switch, "b"), ("blue".into(), VlanPolicy::All));
        assert_eq!(place(&switch, "r"), ("red".into(), VlanPolicy::All));
        add(&switch, CARRIER).unwrap();
        assert_eq!(place(&switch, "b"), ("=up".into(), VlanPolicy::Access(100)));
        switch.stop();
    }
}

#[test]
fn a_link_that_changes_stays_where_its_port_belongs() {
    let switch = switch(&[&port("b", "network=blue"), CARRIER]);
    let stats = lock(&switch.inner.tables).ports["b"].stats.clone();
    let publisher = PortPublisher::new(Arc::downgrade(&switch.inner), id(&switch, "b"), stats);
    publisher.publish(Link::down(PortState::Down, None));
    assert_eq!(place(&switch, "b"), ("=up".into(), VlanPolicy::Access(100)));
    switch.stop();
}

#[test]
fn stations_are_told_and_flushed_by_their_network() {
    let switch = switch(&[CARRIER, &port("b", "network=blue"), &port("r", "network=red"), &port("g", "network=green")]);
    for (number, (name, vid)) in (1..).zip([("up", 100), ("up", 0), ("b", 100), ("r", 0), ("g", 7)]) {
        hear(&switch, name, number, vid);
    }
    let entry = |network: &str, vlan, port: &str| (network.to_owned(), vlan, port.to_owned());
    let all = [
        entry("blue", 0, "up"),
        entry("blue", 0, "b"),
        entry("green", 7, "g"),
        entry("red", 0, "up"),
        entry("red", 0, "r"),
    ];
    assert_eq!(told(&switch), all);
    assert_eq!(switch.flush_fdb(Some("blue")), 2);
    assert_eq!(told(&switch), all[2..]);
    assert_eq!((switch.flush_fdb(Some("=up")), switch.flush_fdb(Some("none"))), (0, 0));
    assert_eq!(switch.flush_fdb(None), 3);
    switch.stop();
}

#[test]
fn ports_that_move_keep_no_station_but_their_own() {
    let (blue, red) = (port("b", "network=blue,mac=02:00:00:00:00:01"), port("r", "network=red,mac=02:00:00:00:00:01"));
    let switch = switch(&[&blue, &red, &port("g", "network=green")]);
    ["b", "r"].iter().for_each(|name| come_up(&switch, name, None));
    hear(&switch, "b", 7, 0);
    hear(&switch, "g", 8, 0);
    for change in MOVES {
        change(&switch);
        // Each is alone in its network with that address, configured and in one place.
        let entries = switch.fdb();
        let of = |name| entries.iter().filter(|entry| entry.port == name).collect::<Vec<_>>();
        for (name, network) in [("b", "blue"), ("r", "red")] {
            let [own] = of(name)[..] else { panic!("{entries:?}") };
            assert_eq!((own.mac.as_str(), own.network.as_str(), own.is_static), ("02:00:00:00:00:01", network, true));
        }
        assert_eq!(of("g").len(), 1, "{entries:?}");
    }
    switch.stop();
}

#[test]
fn networks_are_carried_once_and_have_no_vlans_inside() {
    let switch = switch(&[CARRIER, &port("g", "network=green,vlan=5")]);
    let refused = |spec: &str| match add(&switch, spec) {
        Err(PortError::Networks(problem)) => problem,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&port("up2", "networks=green2,red:7")), "network red is carried by port up already");
    let inside = refused(&port("b", "network=blue,vlan=5"));
    assert!(inside.starts_with("port up carries network blue as one VLAN, in which port b cannot"), "{inside}");
    let inside = refused(&port("up2", "networks=green:9"));
    assert!(inside.starts_with("port up2 carries network green as one VLAN, in which port g cannot"), "{inside}");
    // What was refused has left nothing behind.
    add(&switch, &port("b", "network=blue")).unwrap();
    assert_eq!(place(&switch, "b"), ("=up".into(), VlanPolicy::Access(100)));
    switch.remove_port("g").unwrap();
    add(&switch, &port("up2", "networks=green:9")).unwrap();
    switch.stop();
}

#[test]
fn a_port_that_cannot_start_moves_nobody() {
    let config = SwitchConfig { kinds: Some(vec!["vhost-user".into()]), ..SwitchConfig::default() };
    let switch = Switch::start(&config).unwrap();
    add(&switch, &port("b", "network=blue")).unwrap();
    hear(&switch, "b", 7, 0);
    assert!(matches!(add(&switch, "up=tap:t0,networks=blue:100"), Err(PortError::Setup(_))));
    assert_eq!(place(&switch, "b"), ("blue".into(), VlanPolicy::All));
    assert_eq!(told(&switch), [("blue".to_owned(), 0, "b".to_owned())]);
    add(&switch, CARRIER).unwrap();
    switch.stop();
}

#[test]
fn what_is_kept_for_a_guest_does_not_follow_it_into_another_domain() {
    let switch = switch(&[&port("b", "network=blue")]);
    let stats = lock(&switch.inner.tables).ports["b"].stats.clone();
    let (id, inner) = (id(&switch, "b"), Arc::downgrade(&switch.inner));
    let publisher = PortPublisher::new(inner, id, stats.clone());
    let hold = Arc::new(Hold::new(stats.clone()));
    publisher.publish(Link { hold: Some(hold.clone()), ..Link::down(PortState::Up, None) });
    let mut guest = TestGuest::new(8, VERSION_1);
    guest.send(&[&[0; 12][..], &[2; 60]].concat(), &[]);
    let queue = guest_tx(guest.setup(), &guest.ring());
    assert_eq!(queue.poll(&mut BurstStorage::default(), &mut |burst| hold.keep(burst, &[0], 0)), Ok(1));
    assert_eq!(hold.len(), 1);
    add(&switch, CARRIER).unwrap();
    assert!(view(&switch, "b").link.hold.is_none());
    assert_eq!((hold.len(), stats.drops(DropReason::LinkDown)), (0, 1));
    // Its driver goes on with it.
    publisher.publish(Link { hold: Some(hold), ..Link::down(PortState::Up, None) });
    assert_eq!(place(&switch, "b"), ("=up".into(), VlanPolicy::Access(100)));
    switch.stop();
}

#[test]
fn an_address_of_two_ports_stays_where_it_was_heard() {
    let of = |name| port(name, "network=blue,mac=02:00:00:00:00:01");
    let switch = switch(&[&of("a"), &of("b")]);
    ["a", "b"].iter().for_each(|name| come_up(&switch, name, None));
    let heard = Station { mac: 0x0200_0000_0001, vid: 0, network: view(&switch, "b").network };
    assert_ne!(switch.inner.fdb.set(heard, id(&switch, "b"), true, 0), Learned::No);
    for change in MOVES {
        change(&switch);
        assert_eq!(told(&switch), [("blue".to_owned(), 0, "b".to_owned())]);
    }
    switch.stop();
}

#[test]
fn another_process_learns_at_which_of_two_ports_an_address_was_heard() {
    let of = |name| port(name, "network=blue,mac=02:00:00:00:00:01");
    let old = switch(&[&of("a"), &of("b")]);
    ["b", "a"].iter().for_each(|name| come_up(&old, name, None));
    let (networks, names, entries) = known(&old);
    let new = switch(&[&of("a"), &of("b")]);
    new.restore_stations(&networks, &names, &entries, true);
    ["a", "b"].iter().for_each(|name| come_up(&new, name, None));
    let places = [&old, &new].map(|switch| told(switch));
    assert_eq!(places, [[("blue".to_owned(), 0, "b".to_owned())], [("blue".to_owned(), 0, "b".to_owned())]]);
    old.stop();
    new.stop();
}

/// What a process knows, as it tells another one: networks, ports and stations.
fn known(switch: &Switch) -> (Vec<String>, Vec<String>, Vec<FdbRecord>) {
    let packed = switch.pack(Instant::now() + Duration::from_secs(10)).unwrap();
    let Stations { networks, entries, .. } = switch.stations(&packed);
    (networks, packed.iter().map(|port| port.config.name.clone()).collect(), entries)
}

#[test]
fn another_process_learns_what_was_known() {
    let blue = port("b", "network=blue");
    let old = switch(&[CARRIER, &blue]);
    hear(&old, "up", 1, 100);
    hear(&old, "b", 2, 100);
    let (networks, names, entries) = known(&old);

    let new = switch(&[&blue, CARRIER]);
    new.restore_stations(&networks, &names, &entries, true);
    assert_eq!((told(&new), told(&new).len()), (told(&old), 2));
    new.stop();

    // An uplink that cannot be handed over comes late. What was heard meanwhile is newer.
    let new = switch(&[&blue, &port("c", "network=blue")]);
    new.restore_stations(&networks, &names, &entries, true);
    assert_eq!(told(&new), []);
    add(&new, CARRIER).unwrap();
    hear(&new, "c", 2, 100);
    new.restore_stations(&networks, &names, &entries, false);
    let ports: Vec<_> = new.fdb().into_iter().map(|entry| (entry.mac, entry.port)).collect();
    let expected = [("00:00:00:00:00:01", "up"), ("00:00:00:00:00:02", "c")];
    assert_eq!(ports, expected.map(|(mac, port)| (mac.to_owned(), port.to_owned())));
    new.stop();

    // The networks have changed places.
    let new = switch(&[&blue, &CARRIER.replace("blue:100,red", "blue:7,red:100"), &port("r", "network=red")]);
    new.restore_stations(&networks, &names, &entries, true);
    assert_eq!(told(&new), [("red".to_owned(), 0, "up".to_owned())]);
    new.stop();
    old.stop();
}
