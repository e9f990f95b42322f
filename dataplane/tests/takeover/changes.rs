//! What a frontend changes while frames flow costs none of them.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Bench, PACKED_CHAINED, PATIENCE, SPLIT, SPLIT_EVENTS, Station, alone};

const ROUNDS: usize = 100;

#[test]
fn no_change_of_a_frontend_costs_a_frame() {
    let _alone = alone();
    // A worker for each of the two machines, if there are CPUs for them.
    let cpus = e2e::machine::cpus().unwrap();
    let mut cpus = [cpus.switch[0], cpus.load[0]].map(|cpu| cpu.to_string()).to_vec();
    cpus.dedup();
    for kind in [SPLIT, SPLIT_EVENTS, PACKED_CHAINED] {
        let mut bench = Bench::with(kind, false, false, &["--cpu", &cpus.join(",")]);
        // On a busy machine a worker can be without its CPU for longer than others need to give a frame up.
        bench.stations.iter_mut().for_each(|station| station.patience = PATIENCE / 4);
        let mut changes = bench.stations.each_ref().map(Station::changes);
        let changing = thread::spawn(move || {
            for _ in 0..ROUNDS {
                changes.iter_mut().for_each(|change| change());
            }
        });
        let before = bench.received();
        let deadline = Instant::now() + 3 * PATIENCE;
        bench.stream_while(|bench| {
            assert!(Instant::now() < deadline, "the changes take for ever:\n{}", bench.diagnosis());
            !changing.is_finished()
        });
        changing.join().unwrap();
        println!("{kind:?}: {ROUNDS} rounds of changes, {before:?} and then {:?} frames received", bench.received());
        bench.stream(Duration::from_millis(50));
        bench.collect();
        // A worker that loses its CPU may cost the other one a few.
        let mut contended = 0;
        for port in ["vm1", "vm2"] {
            let drops = bench.json(&["port", "show", port])["drops"].clone();
            assert!(drops.as_object().unwrap().keys().all(|reason| reason == "contended"), "{port}: {drops}");
            contended += drops["contended"].as_u64().unwrap_or(0);
        }
        let lost: u64 = bench.stations.iter().map(|station| station.lost).sum();
        assert!(lost <= contended, "{lost} lost, {contended} counted\n{}", bench.diagnosis());
        assert!(bench.stations.iter().all(|station| station.duplicates == 0));
        // What was kept has been delivered, and what it was kept in is gone.
        let status = bench.json(&["status"]);
        assert_eq!(status["totals"]["held_frames"], Value::from(0), "{status}");
        assert!(status["memory_bytes"].as_u64().unwrap() < 16 << 20, "{status}");
    }
}
