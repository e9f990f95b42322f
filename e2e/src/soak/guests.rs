//! Real guests that talk, reboot and migrate, in a thread of their own.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::hostile::Dice;
use crate::lab::{self, Lab};
use crate::qemu::{BOOT_LIMIT, ECHO_PORT, Guest, GuestSpec, Nic};
use crate::{machine, wait};

/// Bytes a second of a migration.
const FAST: u64 = 8 << 30;
const MIGRATION_LIMIT: Duration = Duration::from_secs(60);
const TALK_LIMIT: Duration = Duration::from_secs(60);
/// A guest that has lost its switch asks for addresses again, a second apart.
const RECOVERY: Duration = Duration::from_secs(4);
const PAUSE: Duration = Duration::from_millis(200);
/// Settings of their ports.
const SETTINGS: &str = "network=real";

/// What the guests have done.
#[derive(Debug, Default, Clone)]
pub struct Record {
    /// Live migrations.
    pub migrations: u64,
    /// Guests that were killed and started again.
    pub boots: u64,
    /// Messages echoed.
    pub echoes: u64,
    /// Datagrams that were not echoed while guests migrated, and while or just after the switch was restarted.
    pub lost: (u64, u64),
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Held while guests do something.
    turn: Mutex<()>,
    /// Held while they do what a restart of the switch would spoil.
    fragile: Mutex<()>,
    /// When the last restart was begun or over.
    restarted: Mutex<Option<Instant>>,
    /// When that last was one which hangs up, so that guests lose their links and each other's addresses.
    parted: Mutex<Option<Instant>>,
    record: Mutex<Record>,
    problem: Mutex<Option<anyhow::Error>>,
}

/// The guests, at work until this is dropped.
#[derive(Debug)]
pub struct Guests {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guests {
    /// Boots a guest that stays (`vm1`) and one that migrates between two ports (`vm2` and `vm3`).
    pub fn start(lab: &mut Lab, seed: u64) -> Result<Self> {
        // What the first one gets has to be segmented and completed by the switch.
        let cpus = machine::cpus()?;
        let cpus = [cpus.switch, cpus.load].concat();
        let spec = |number: usize| GuestSpec::new(&format!("vm{number}")).cpus(&cpus);
        lab.add_guest(1, SETTINGS, spec(1), "guest_tso4=off,guest_tso6=off,guest_csum=off")?;
        lab.add_guest(2, SETTINGS, spec(2), "")?;
        lab.boot()?;
        lab.wait_reachable(0, "10.0.0.2")?;
        lab.add_port("vm3", SETTINGS)?;
        let nic = Nic::new(&lab.socket("vm3"), &lab::mac(2));
        lab.guests.push(spec(3).nic(nic).incoming().start()?);
        let guests = std::mem::take(&mut lab.guests);
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let mut work = Work { guests, here: 1, there: 2, dice: Dice::new(seed ^ 0x9e57), shared: theirs };
        let thread = thread::spawn(move || work.run());
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Waits until the guests have finished what they do; they do nothing more while this is held.
    pub fn pause(&self) -> MutexGuard<'_, ()> {
        lock(&self.shared.turn)
    }

    /// Whether the switch may be restarted; while this is held guests do nothing that needs it. `parting`: it hangs up.
    pub fn may_restart(&self, parting: bool) -> Option<Restart<'_>> {
        let fragile = self.shared.fragile.try_lock().ok()?;
        let restart = Restart { shared: &self.shared, parting, _fragile: fragile };
        restart.note();
        Some(restart)
    }

    /// What was wrong, if something was.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<()> {
        lock(&self.shared.problem).take().map_or(Ok(()), Err)
    }

    /// What they have done.
    pub fn record(&self) -> Record {
        lock(&self.shared.record).clone()
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The switch is being restarted.
#[derive(Debug)]
pub struct Restart<'a> {
    shared: &'a Shared,
    parting: bool,
    _fragile: MutexGuard<'a, ()>,
}

impl Restart<'_> {
    fn note(&self) {
        let now = Some(Instant::now());
        *lock(&self.shared.restarted) = now;
        if self.parting {
            *lock(&self.shared.parted) = now;
        }
    }
}

impl Drop for Restart<'_> {
    fn drop(&mut self) {
        self.note();
    }
}

/// Whether what was begun at `begun` may still feel what happened last.
fn is_felt(last: &Mutex<Option<Instant>>, begun: Instant) -> bool {
    lock(last).is_some_and(|at| at + RECOVERY >= begun)
}

struct Work {
    /// The one that stays, and the two places of the one that migrates.
    guests: Vec<Guest>,
    here: usize,
    there: usize,
    dice: Dice,
    shared: Arc<Shared>,
}

impl Work {
    fn run(&mut self) {
        let shared = self.shared.clone();
        while !shared.stop.load(Ordering::SeqCst) {
            let turn = lock(&shared.turn);
            let roll = self.dice.below(100);
            let done = match roll {
                0..40 => self.talk("udp").context("guests talk over UDP"),
                40..70 => self.talk("tcp").context("guests talk over TCP"),
                70..92 => self.migrate().context("a guest migrates"),
                _ => self.reboot().context("a guest leaves and comes back"),
            };
            if let Err(error) = done {
                let diagnosis: Vec<String> = self.guests.iter().map(Guest::diagnosis).collect();
                // While it is our turn: the audit that waits for its own may be the last one to ask.
                *lock(&shared.problem) = Some(error.context(diagnosis.join("\n")));
                return;
            }
            drop(turn);
            thread::sleep(PAUSE);
        }
    }

    fn request(&self, proto: &str, seconds: f64) -> Value {
        json!({"op": "echo_check", "proto": proto, "to": format!("10.0.0.2:{ECHO_PORT}"), "window": 4,
            "sizes": [64, 1400, 9000, 200, 20_000], "seconds": seconds, "gap_ms": 5})
    }

    /// Nothing may come back changed or twice, or seconds late unless guests had to ask for addresses again. What is lost is
    /// counted.
    fn judge(&self, tally: &Value, asked: bool) -> Result<u64> {
        let count = |name: &str| tally[name].as_u64().with_context(|| format!("no {name} in {tally}"));
        ensure!(count("corrupt")? == 0 && count("duplicates")? == 0, "changed or doubled: {tally}");
        ensure!(asked || count("late")? == 0, "something kept frames for seconds: {tally}");
        lock(&self.shared.record).echoes += count("received")?;
        count("lost")
    }

    fn talk(&mut self, proto: &str) -> Result<()> {
        let begun = Instant::now();
        let seconds = 1.0 + self.dice.below(20) as f64 / 10.0;
        let tally = self.guests[0].call_for(&self.request(proto, seconds), TALK_LIMIT)?;
        let lost = self.judge(&tally, is_felt(&self.shared.parted, begun))?;
        let restarting = self.shared.fragile.try_lock().is_err();
        if !restarting && !is_felt(&self.shared.restarted, begun) {
            // How much is a matter of how much of a CPU the guests get. Where nothing was sent, connecting took all the time.
            ensure!(tally["received"].as_u64() > Some(0) || tally["sent"] == 0, "nothing passes: {tally}");
        } else {
            lock(&self.shared.record).lost.1 += lost;
        }
        Ok(())
    }

    fn migrate(&mut self) -> Result<()> {
        let shared = self.shared.clone();
        let _fragile = lock(&shared.fragile);
        let asked = is_felt(&shared.parted, Instant::now());
        let request = self.request("udp", 3.0);
        self.guests[0].begin(&request)?;
        let (source, target) = (&self.guests[self.here], &self.guests[self.there]);
        source.begin_migration(target, FAST)?;
        source.wait_migration(&["completed"], MIGRATION_LIMIT)?;
        let tally = self.guests[0].finish(&request, TALK_LIMIT)?;
        let lost = self.judge(&tally, asked)?;
        self.guests[self.there].adopt()?;
        self.guests[self.here].respawn_incoming()?;
        std::mem::swap(&mut self.here, &mut self.there);
        let mut record = lock(&shared.record);
        record.migrations += 1;
        if asked {
            record.lost.1 += lost
        } else {
            record.lost.0 += lost
        }
        Ok(())
    }

    fn reboot(&mut self) -> Result<()> {
        let shared = self.shared.clone();
        let _fragile = lock(&shared.fragile);
        let guest = &mut self.guests[0];
        guest.kill();
        guest.respawn()?;
        guest.wait_ready(BOOT_LIMIT)?;
        guest.set_address("eth0", "10.0.0.1/24")?;
        let guest = &self.guests[0];
        wait::until_true("the guest to reach the other", BOOT_LIMIT, || {
            Ok(guest.run("ping -c 1 -W 1 10.0.0.2").is_ok())
        })?;
        lock(&shared.record).boots += 1;
        Ok(())
    }
}
