//! New processes that fail, at every step: the old one goes on.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::station::Station;
use crate::{Bench, GAP, PATIENCE, SPLIT, SPLIT_EVENTS, alone};

/// A process that wants to take over, played by the test. It lets go of the descriptors.
pub(crate) struct Taker(UnixStream);

impl Taker {
    pub(crate) fn new(bench: &Bench, version: u32) -> Self {
        let mut stream = UnixStream::connect(bench.path("ctl.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(b"SLUICE-TAKEOVER\n").unwrap();
        let mut taker = Self(stream);
        taker.say(&json!({"version": version}));
        taker
    }

    pub(crate) fn say(&mut self, record: &Value) {
        let text = record.to_string();
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.bytes());
        self.0.write_all(&bytes).unwrap();
    }

    pub(crate) fn hear(&mut self) -> Value {
        let mut head = [0; 8];
        self.0.read_exact(&mut head).unwrap();
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap()) as usize;
        let mut text = vec![0; word(0)];
        self.0.read_exact(&mut text).unwrap();
        let mut batches = vec![0; word(4).div_ceil(128)];
        self.0.read_exact(&mut batches).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

/// Plays a taker under traffic, and demands that all goes on.
fn play(bench: &mut Bench, taker: impl FnOnce(&mut Taker) + Send) -> Duration {
    bench.stations.iter_mut().for_each(crate::station::Station::reset_gap);
    let mut other = Taker::new(bench, 1);
    std::thread::scope(|scope| {
        let playing = scope.spawn(move || taker(&mut other));
        bench.stream_while(|_| !playing.is_finished());
        playing.join().unwrap();
    });
    bench.stream(Duration::from_millis(50));
    assert!(bench.switch.as_mut().unwrap().exited().is_none());
    bench.stations.iter().map(|station| station.gap).max().unwrap()
}

#[test]
fn a_new_process_that_fails_leaves_the_old_one_running() {
    let _alone = alone();
    let mut bench = Bench::new(SPLIT_EVENTS, false);
    let before = bench.json(&["port", "list"]);

    let mut other = Taker::new(&bench, 99);
    let answer = other.hear();
    assert!(answer["Refused"].as_str().unwrap().contains("version 99"), "{answer}");

    play(&mut bench, |taker| {
        assert!(taker.hear()["Offer"]["ports"].as_array().unwrap().len() == 2);
    });
    play(&mut bench, |taker| {
        taker.hear();
        taker.say(&json!("nonsense"));
        assert!(taker.hear()["Refused"].as_str().unwrap().contains("nonsense"));
    });
    // It dies at the worst moment: everything stands still.
    let die = |_| {
        play(&mut bench, |taker| {
            taker.hear();
            taker.say(&json!("prepared"));
            assert!(taker.hear()["ports"].as_array().unwrap().len() == 2);
        })
    };
    let gaps: Vec<_> = (0..3).map(die).collect();
    println!("a new process that died: {gaps:?}");
    // In the others, somebody else had the CPU.
    assert!(gaps.iter().any(|gap| *gap <= 5 * GAP), "{gaps:?}");
    // It falls silent.
    let gap = play(&mut bench, |taker| {
        taker.hear();
        taker.say(&json!("prepared"));
        taker.hear();
        let start = Instant::now();
        assert!(taker.hear()["Refused"].as_str().unwrap().contains("silent"));
        assert!(start.elapsed() < Duration::from_secs(5));
    });
    println!("a new process that fell silent: {gap:?}");
    // A real one that cannot: its workers want a CPU that there is not.
    let mut failing = bench.start(&["--takeover", "--cpu", "1000"]);
    assert!(!failing.ended().success());
    bench.stream(Duration::from_millis(50));
    // Its configuration names a group that there is not.
    std::fs::write(bench.path("group.toml"), "[control]\ngroup = \"no such group\"\n").unwrap();
    let mut failing = bench.start(&["--takeover", "--config", bench.path("group.toml").to_str().unwrap()]);
    assert!(!failing.ended().success());
    assert!(bench.log().contains("group 'no such group' is not in"), "{}", bench.log());
    bench.stream(Duration::from_millis(50));
    // One that is to carry a network whose ports have VLANs of their own, which would be missed only when it is too late.
    let inside = bench.path("inside.sock");
    bench.json(&["port", "add", &format!("inside=vhost-user:{},network=blue,vlan=7", inside.display())]);
    let carrier = format!("up=vhost-user:{},networks=blue:60", bench.path("up.sock").display());
    let mut failing = bench.start(&["--takeover", "--port", &carrier]);
    assert!(!failing.ended().success());
    assert!(bench.log().contains("port up carries network blue as one VLAN"), "{}", bench.log());
    bench.json(&["port", "del", "inside"]);
    bench.stream(Duration::from_millis(50));

    // After all of that it still can be taken over.
    bench.take_over();
    bench.check_whole();
    let after = bench.json(&["port", "list"]);
    for (before, after) in before.as_array().unwrap().iter().zip(after.as_array().unwrap()) {
        assert_eq!(before["features"], after["features"]);
        assert_eq!((&after["connects"], &after["state"]), (&json!(1), &json!("up")));
    }
}

/// A port that did not go together with another when the switch started is written down, and not there. It is no reason to
/// refuse.
#[test]
fn a_port_that_was_not_there_does_not_stop_a_takeover() {
    let _alone = alone();
    let mut bench = Bench::new(SPLIT_EVENTS, false);
    bench.json(&["port", "add", &format!("up=vhost-user:{},networks=blue:60", bench.path("up.sock").display())]);
    let table = bench.path("state/ports.json");
    let inside = format!("\"inside=vhost-user:{},network=blue,vlan=7\",", bench.path("inside.sock").display());
    let text = std::fs::read_to_string(&table).unwrap();
    assert!(text.contains("\"ports\": ["), "{text}");
    std::fs::write(&table, text.replace("\"ports\": [", &format!("\"ports\": [{inside}"))).unwrap();
    bench.take_over();
    bench.check_whole();
    assert_eq!(bench.names(), ["up", "vm1", "vm2"]);
    assert!(bench.log().contains("port up carries network blue as one VLAN"), "{}", bench.log());
}

/// The new process cannot find the folder of a socket that it is to listen at. That is no reason to be stuck with the port.
#[test]
fn a_port_whose_folder_has_gone_begins_anew() {
    let _alone = alone();
    let mut bench = Bench::new(SPLIT_EVENTS, false);
    let folder = bench.path("sub");
    std::fs::create_dir(&folder).unwrap();
    let port = |path: std::path::PathBuf| format!("s=vhost-user:{},mode=server", path.display());
    bench.json(&["port", "add", &port(folder.join("s.sock"))]);
    std::fs::remove_dir_all(&folder).unwrap();
    bench.take_over();
    let shown = bench.json(&["port", "show", "s"]);
    assert!(shown["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{shown}\n{}", bench.log());
    bench.json(&["port", "del", "s"]);
    bench.json(&["port", "add", &port(bench.path("s.sock"))]);
    assert!(bench.path("s.sock").exists());
    bench.stream(Duration::from_millis(50));
}

/// A frontend has taken memory away, so that the new process cannot map it. No single one may put takeovers off for ever.
#[test]
fn a_port_that_cannot_be_adopted_begins_anew() {
    let _alone = alone();
    withdraw(Station::shorten_memory);
    withdraw(Station::seal_memory);
}

fn withdraw(memory: fn(&Station)) {
    let mut bench = Bench::new(SPLIT, false);
    memory(&bench.stations[1]);
    let new = bench.start(&["--takeover"]);
    let mut old = bench.switch.replace(new).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        assert!(Instant::now() < deadline, "no takeover:\n{}", bench.log());
        if let Some(status) = old.exited() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(status.success(), "{status}:\n{}", bench.log());
    while !bench.stations[1].is_hung_up() {
        assert!(Instant::now() < deadline, "its connection is there still:\n{}", bench.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(bench.json(&["port", "show", "vm1"])["state"], "up");
    // It listens still, and has been found again by now, or will be.
    assert_ne!(bench.json(&["port", "show", "vm2"])["state"], "up");
    assert!(bench.log().contains("cannot be taken over, and begins anew"), "{}", bench.log());
}

/// One that does without a keeper lets go of what the old one has in its own only when that is gone.
#[test]
fn a_new_process_that_fails_leaves_the_keeper_alone() {
    let _alone = alone();
    let mut bench = Bench::with_keeper(SPLIT_EVENTS, false, true);
    bench.keeper = false;
    let mut failing = bench.start(&["--takeover", "--cpu", "1000"]);
    assert!(!failing.ended().success());
    bench.keeper = true;
    bench.stream(Duration::from_millis(50));
    bench.crash();
    bench.stream(Duration::from_millis(50));
    let port = bench.json(&["port", "show", "vm1"]);
    assert_eq!((&port["state"], &port["connects"]), (&json!("up"), &json!(1)), "{port}");

    bench.keeper = false;
    bench.take_over();
    let deadline = Instant::now() + PATIENCE;
    while bench.path("state/keeper.sock").exists() {
        assert!(Instant::now() < deadline, "the keeper goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
}
