//! All stations, and the thread in which they talk.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::hostile::{Dice, leave_the_switch_alone};
use crate::soak::station::{Peer, Station};
use crate::wait;

/// Between two rounds in which each station sends and receives: the machine has other things to do, too.
const PAUSE: Duration = Duration::from_millis(3);
/// Frames are through long before that, whatever the machine does.
const QUIET_LIMIT: Duration = Duration::from_secs(10);

/// The stations, talking until this is dropped.
#[derive(Debug)]
pub struct Crowd {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    members: Mutex<Members>,
    stop: AtomicBool,
}

/// The stations.
#[derive(Debug)]
pub struct Members {
    /// In no order.
    pub stations: Vec<Station>,
    /// Whether they send.
    pub talking: bool,
    dice: Dice,
    /// The first thing that was wrong.
    problem: Option<anyhow::Error>,
}

impl Crowd {
    /// Nobody yet.
    pub fn new(seed: u64) -> Self {
        let members = Members { stations: Vec::new(), talking: true, dice: Dice::new(seed ^ 0xc0_4d), problem: None };
        let shared = Arc::new(Shared { members: Mutex::new(members), stop: AtomicBool::new(false) });
        let theirs = shared.clone();
        let thread = thread::spawn(move || {
            let _ = leave_the_switch_alone();
            while !theirs.stop.load(Ordering::Acquire) {
                lock(&theirs).round();
                thread::sleep(PAUSE);
            }
        });
        Self { shared, thread: Some(thread) }
    }

    /// The stations, which do nothing meanwhile.
    pub fn members(&self) -> MutexGuard<'_, Members> {
        lock(&self.shared)
    }

    /// What was wrong, if something was.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<()> {
        self.members().problem.take().map_or(Ok(()), Err)
    }

    /// Does something with one station while the others go on.
    ///
    /// # Errors
    /// Its own, and if there is no such station.
    pub fn with<T>(&self, id: u32, act: impl FnOnce(&mut Station) -> Result<T>) -> Result<T> {
        let Some(mut station) = self.take(id) else { bail!("there is no station {id}") };
        let done = act(&mut station).with_context(|| format!("station {id}, port {}", station.port));
        self.members().stations.push(station);
        done
    }

    /// Takes a station out of the crowd.
    pub fn take(&self, id: u32) -> Option<Station> {
        let mut members = self.members();
        let place = members.stations.iter().position(|station| station.id == id)?;
        Some(members.stations.swap_remove(place))
    }

    /// Has everybody be silent, and waits until the switch has taken all that was sent.
    ///
    /// # Errors
    /// If it does not: a lost wake-up, or a ring that is not served.
    pub fn silence(&self) -> Result<()> {
        self.members().talking = false;
        let taken = wait::until_true("the switch to take all frames", QUIET_LIMIT, || {
            self.check()?;
            Ok(self.members().stations.iter().all(Station::is_quiet))
        });
        taken.with_context(|| {
            let members = self.members();
            let stuck: Vec<_> = members.stations.iter().filter(|station| !station.is_quiet()).collect();
            let names: Vec<_> = stuck.iter().map(|station| format!("{} ({})", station.id, station.port)).collect();
            format!("frames of stations {} are not taken", names.join(", "))
        })
    }

    /// With everybody silent: each sends to everybody, then to each of its peers, and all of that has to arrive.
    ///
    /// # Errors
    /// Who did not hear whom.
    pub fn greet_all(&self, but: &[usize]) -> Result<()> {
        for direct in [false, true] {
            {
                let mut members = self.members();
                let peers = members.peers();
                for station in &mut members.stations {
                    let others = peers.of(station);
                    station.greet(direct.then_some(&others));
                }
            }
            let arrived = wait::until_true("greetings to arrive", QUIET_LIMIT, || {
                self.check()?;
                Ok(self.members().unheard(direct, but).is_empty())
            });
            arrived.with_context(|| self.members().unheard(direct, but).join("; "))?;
        }
        Ok(())
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Members> {
    shared.members.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who is in which domain.
#[derive(Debug)]
pub struct Peers(BTreeMap<usize, Vec<Peer>>);

impl Peers {
    /// Everybody else in the station's domain.
    pub fn of(&self, station: &Station) -> Vec<Peer> {
        let all = self.0.get(&station.domain).map_or(&[][..], Vec::as_slice);
        all.iter().filter(|peer| peer.id != station.id).copied().collect()
    }
}

impl Members {
    /// Who is in which domain.
    pub fn peers(&self) -> Peers {
        let mut peers = BTreeMap::<usize, Vec<Peer>>::new();
        for station in &self.stations {
            peers.entry(station.domain).or_default().push(Peer { id: station.id, mac: station.mac() });
        }
        Peers(peers)
    }

    /// Stations by their numbers.
    pub fn ids(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = self.stations.iter().map(|station| station.id).collect();
        ids.sort_unstable();
        ids
    }

    fn round(&mut self) {
        let peers = self.peers();
        let Self { stations, talking, dice, problem } = self;
        for station in stations {
            if let Err(error) = station.listen() {
                problem.get_or_insert(error);
            }
            if *talking {
                station.talk(&peers.of(station), dice);
            }
        }
    }

    /// Takes what the switch has delivered and given back so far.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn listen(&mut self) -> Result<()> {
        self.stations.iter_mut().try_for_each(Station::listen)
    }

    /// Those who have not heard the last frame of some other, sent to them (`direct`) or to everybody.
    fn unheard(&self, direct: bool, but: &[usize]) -> Vec<String> {
        let mut unheard = Vec::new();
        for from in self.stations.iter().filter(|from| !but.contains(&from.domain)) {
            for to in self.stations.iter().filter(|to| to.domain == from.domain && to.id != from.id) {
                let stream = if direct { to.id } else { 0 };
                if to.last_heard(from.id, stream) != from.last_sent(stream) {
                    unheard.push(format!("{} ({}) does not hear {} ({})", to.id, to.port, from.id, from.port));
                }
            }
        }
        unheard
    }

    /// Frames from one to another that the switch has taken and not delivered, by those two.
    pub fn missing(&self) -> BTreeMap<(u32, u32), u32> {
        let mut missing = BTreeMap::new();
        for from in &self.stations {
            for to in self.stations.iter().filter(|to| to.domain == from.domain && to.id != from.id) {
                let count = from.taken_for(to.id).saturating_sub(to.heard_from(from.id));
                missing.insert((from.id, to.id), count);
            }
        }
        missing
    }

    /// Demands that the counters of each station's port are what the station has seen, and takes what a crash left
    /// uncounted as seen: at most `recovered` frames in sum from the stations, and so many to them.
    ///
    /// # Errors
    /// Which counter is wrong.
    pub fn compare(&mut self, counts: &BTreeMap<String, (u64, u64)>, recovered: (u64, u64)) -> Result<(u64, u64)> {
        let mut sum = (0, 0);
        for station in &mut self.stations {
            let &(rx, tx) = counts.get(&station.port).with_context(|| format!("port {} is gone", station.port))?;
            let (taken, delivered) = (station.taken, station.delivered);
            let said = || {
                format!(
                    "port {}: it counts {rx} frames received and {tx} sent; its station had {taken} taken and got {delivered}",
                    station.port
                )
            };
            let more = taken.checked_sub(rx).zip(delivered.checked_sub(tx)).with_context(said)?;
            sum = (sum.0 + more.0, sum.1 + more.1);
            ensure!(sum.0 <= recovered.0 && sum.1 <= recovered.1, "{}", said());
            (station.taken, station.delivered) = (rx, tx);
        }
        Ok(sum)
    }
}
