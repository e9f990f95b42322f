//! Networks that a port carries: who belongs where, while ports come and go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fdb::Station;
use super::publish::PortPublisher;
use super::vlan::VlanPolicy;
use super::*;
use crate::port::{Link, Publisher};
use crate::status::PortState;

const CARRIER: &str = "up=vhost-user:/nonexistent/up,networks=blue:100,red";

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

/// The bridge domain that workers see a port in, and its VLANs there.
fn place(switch: &Switch, name: &str) -> (String, VlanPolicy) {
    let tables = lock(&switch.inner.tables);
    let shown = tables.shown.clone().unwrap();
    let view = shown.port(tables.ports[name].id).unwrap();
    (tables.networks[usize::from(view.network)].clone(), view.vlan.clone())
}

fn id(switch: &Switch, name: &str) -> PortId {
    lock(&switch.inner.tables).ports[name].id
}

/// Lets a port's station be heard, as a worker would.
fn hear(switch: &Switch, name: &str, mac: u64, vid: u16) {
    let port = id(switch, name);
    let shown = lock(&switch.inner.tables).shown.clone().unwrap();
    let network = shown.port(port).unwrap().network;
    assert_ne!(switch.inner.fdb.set(Station { mac, vid, network }, port, false, 0), Learned::No);
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
    let publisher = PortPublisher { inner: Arc::downgrade(&switch.inner), id: id(&switch, "b"), stats };
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
    hear(&switch, "b", 7, 0);
    hear(&switch, "g", 8, 0);
    let moves: [fn(&Switch); 2] =
        [|switch| add(switch, CARRIER).unwrap(), |switch| drop(switch.remove_port("up").unwrap())];
    for change in moves {
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
fn a_port_that_cannot_start_carries_nothing() {
    let config = SwitchConfig { kinds: Some(vec!["vhost-user".into()]), ..SwitchConfig::default() };
    let switch = Switch::start(&config).unwrap();
    add(&switch, &port("b", "network=blue")).unwrap();
    assert!(matches!(add(&switch, "up=tap:t0,networks=blue:100"), Err(PortError::Setup(_))));
    assert_eq!(place(&switch, "b"), ("blue".into(), VlanPolicy::All));
    add(&switch, CARRIER).unwrap();
    switch.stop();
}

#[test]
fn another_process_learns_what_was_known() {
    let ports = [CARRIER.to_owned(), port("b", "network=blue")];
    let specs: Vec<_> = ports.iter().map(String::as_str).collect();
    let (old, new) = (switch(&specs), switch(&[specs[1], specs[0]]));
    hear(&old, "up", 1, 100);
    hear(&old, "b", 2, 100);
    let packed = old.pack(Instant::now() + Duration::from_secs(10)).unwrap();
    let Stations { networks, entries, .. } = old.stations(&packed);
    let names: Vec<_> = packed.iter().map(|port| port.config.name.clone()).collect();
    new.restore_stations(&networks, &names, &entries);
    drop(packed);
    assert_eq!((told(&new), told(&new).len()), (told(&old), 2));
    old.stop();
    new.stop();
}
