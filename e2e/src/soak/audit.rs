//! What has to hold whenever everything is silent.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::hostile::frontend::Setup;
use crate::hostile::queue::Layout;
use crate::soak::crowd::Members;
use crate::soak::guests::Guests;
use crate::soak::ledger::{Ports, Totals};
use crate::soak::station::Station;
use crate::soak::{DARK, DOMAINS, EVIL, MOST, NARROW, Soak, USUAL};
use crate::switch::Usage;
use crate::wait;

/// For what is under way inside the switch, and for what guests say by themselves.
const SETTLE: Duration = Duration::from_secs(8);
/// An answer on the control socket takes no longer, on a machine with other work.
const ANSWER: Duration = Duration::from_secs(3);
/// Frames that one worker has in its hands when it is killed, and elements of a ring that it has written and not yet
/// published.
const BURST: u64 = 32;
const BATCH: u64 = 64;

/// Descriptors that the ports of guests have more or less, by what QEMU has sent since it was started or lost its switch.
const GUESTS_FDS: usize = 12;

/// What was so at an audit.
#[derive(Debug)]
pub struct Before {
    ports: Ports,
    missing: BTreeMap<(u32, u32), u32>,
}

impl Soak {
    /// Has everything fall silent, demands what has to hold, and lets all go on.
    pub(super) fn audit(&mut self) -> Result<()> {
        let guests = self.guests.take();
        let silent = guests.as_ref().map(Guests::pause);
        // Guests that met something wrong are gone, which must not be taken for what is wrong.
        let well = guests.as_ref().map_or(Ok(()), Guests::check);
        let done = well.and_then(|()| self.audit_silence());
        drop(silent);
        self.guests = guests;
        done
    }

    fn audit_silence(&mut self) -> Result<()> {
        self.restore_population()?;
        self.dark.iter_mut().try_for_each(|frontend| frontend.reconnect(Setup::of(Layout::Split)))?;
        self.crowd.silence()?;
        self.crowd.greet_all(&[NARROW]).context("greetings of silent stations")?;
        self.crowd.silence()?;
        let totals = self.balance()?;
        let ports = self.ports()?;
        let recovered = self.compare(&ports)?;
        self.settle_process()?;
        self.watch.audit(self.lab.switch()?)?;
        self.watch.read_log(self.lab.switch()?)?;
        self.report.audited(&totals, recovered);
        self.crashed = false;
        let mut members = self.crowd.members();
        let missing = members.missing();
        if let Some(before) = &self.before {
            delivered(&members, before, &ports, &missing)?;
        }
        self.before = Some(Before { ports, missing });
        let ids = members.ids();
        for station in &mut members.stations {
            station.disturbed = false;
            station.forget_all_but(&ids);
        }
        members.talking = true;
        Ok(())
    }

    /// Brings every domain to its usual stations, and takes away whatever else there is.
    pub(super) fn restore_population(&mut self) -> Result<()> {
        self.remove_void()?;
        for domain in 0..DOMAINS.len() {
            for place in 0..MOST {
                let present = self.station_at(domain, place);
                match present {
                    None if place < USUAL => self.join(domain, place)?,
                    Some(id) if place >= USUAL => self.leave(id)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Waits until the counters add up.
    fn balance(&mut self) -> Result<Totals> {
        let mut last = String::new();
        let balanced = wait::until("the counters to add up", SETTLE, || {
            let asked = Instant::now();
            let totals = Totals::read(self.lab.switch()?)?;
            self.slowest = self.slowest.max(asked.elapsed());
            ensure!(asked.elapsed() < ANSWER, "the switch took {:?} to answer", asked.elapsed());
            let missing = totals.unaccounted();
            last = format!("{missing} frames are unaccounted for: {totals}");
            Ok((missing == 0).then_some(totals))
        });
        balanced.with_context(|| last)
    }

    /// All ports, which are up where somebody is behind them.
    fn ports(&mut self) -> Result<Ports> {
        let ports = Ports::read(self.lab.switch()?)?;
        let down: Vec<_> = ports.states().filter(|(name, state)| *state != "up" && !name.starts_with("vm")).collect();
        ensure!(down.is_empty(), "ports are not up: {down:?}");
        Ok(ports)
    }

    /// Compares what stations have seen with what their ports count.
    fn compare(&mut self, ports: &Ports) -> Result<u64> {
        let crashed = u64::from(self.crashed) * self.workers;
        let mut members = self.crowd.members();
        members.listen()?;
        let (taken, delivered) = members.compare(&ports.counts(), (crashed * BURST, crashed * BATCH))?;
        Ok(taken + delivered)
    }

    /// Waits until what was closed is gone: descriptors are as many as they were.
    fn settle_process(&mut self) -> Result<()> {
        let pid = self.lab.switch()?.pid();
        let known = self.watch.lives.last().filter(|life| life.pid == pid).and_then(|life| life.fds.first().copied());
        let slack = if self.guests_run() { GUESTS_FDS } else { 0 };
        let (mut last, mut since) = (0, Instant::now());
        let settled = wait::until_true("descriptors to be as many as before", SETTLE, || {
            let now = Usage::of(pid)?.fds;
            if now != last {
                (last, since) = (now, Instant::now());
            }
            let settled = since.elapsed() > Duration::from_millis(200);
            Ok(known.map_or(settled, |known| known.abs_diff(now) <= slack))
        });
        let before = || self.watch.lives.last().map(|life| &life.open);
        settled.with_context(|| format!("{known:?} became {last}: {:?} became {:?}", before(), open_files(pid)))
    }

    /// Demands of a switch that is dead that no more was lost with it than what its workers had in their hands, if it has
    /// crashed, and nothing if it was told to end.
    pub(super) fn judge_end(&mut self, last_words: &Ports, crash: bool) -> Result<()> {
        let mut members = self.crowd.members();
        members.listen()?;
        if let Some(before) = self.before.take() {
            let now = members.missing();
            let calm = |station: &&Station| !station.disturbed && station.domain != NARROW;
            let ids: Vec<u32> = members.stations.iter().filter(calm).map(|station| station.id).collect();
            let lost: u64 = now
                .iter()
                .filter(|((from, to), _)| ids.contains(from) && ids.contains(to))
                .map(|(pair, count)| u64::from(count.saturating_sub(*before.missing.get(pair).unwrap_or(count))))
                .sum();
            let names = members.stations.iter().filter(|station| station.domain != NARROW).map(|station| &station.port);
            let dropped: u64 =
                names.map(|port| last_words.dropped(port).saturating_sub(before.ports.dropped(port))).sum();
            let in_hand = u64::from(crash) * self.workers * BURST;
            ensure!(
                lost <= dropped + in_hand,
                "{lost} frames were lost in the end: {dropped} were dropped before, {in_hand} can have been under way"
            );
        }
        for station in &mut members.stations {
            station.rebase();
            station.disturbed = true;
        }
        Ok(())
    }
}

/// Demands that what was taken for each station and not delivered is counted as dropped, at either end.
fn delivered(members: &Members, before: &Before, ports: &Ports, missing: &BTreeMap<(u32, u32), u32>) -> Result<()> {
    let drops = |station: &Station| ports.dropped(&station.port).saturating_sub(before.ports.dropped(&station.port));
    for to in members.stations.iter().filter(|station| !station.disturbed) {
        let (mut lost, mut dropped) = (0, drops(to));
        for from in members.stations.iter().filter(|from| !from.disturbed && from.domain == to.domain) {
            let Some((now, then)) = missing.get(&(from.id, to.id)).zip(before.missing.get(&(from.id, to.id))) else {
                continue;
            };
            lost += u64::from(now.saturating_sub(*then));
            dropped += drops(from);
        }
        ensure!(lost <= dropped, "port {}: {lost} frames for it are lost, {dropped} were dropped", to.port);
    }
    Ok(())
}

/// What a process has open, to tell what is too much.
pub(super) fn open_files(pid: u32) -> BTreeMap<String, u64> {
    let mut open = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let target = std::fs::read_link(entry.path()).map_or_else(|e| e.to_string(), |path| path.display().to_string());
        let kind = target.split(":[").next().unwrap_or_default().to_owned();
        *open.entry(kind).or_default() += 1;
    }
    open
}

/// Ports that nobody is behind, and their settings: one beside the hostile one, and one that carries networks of stations.
pub(super) const VOID: [(&str, &str); 2] = [("void", DARK), ("carrier", "networks=red:7,blue")];

impl Soak {
    /// Removes the ports that nobody is behind.
    pub(super) fn remove_void(&mut self) -> Result<()> {
        for (name, _) in VOID {
            if self.is_there(name)? {
                self.lab.del_port(name)?;
            }
        }
        Ok(())
    }

    /// Whether there is such a port.
    pub(super) fn is_there(&self, name: &str) -> Result<bool> {
        Ok(Ports::read(self.lab.switch()?)?.states().any(|(known, _)| known == name))
    }

    /// What the switch says of the hostile port, for errors.
    pub(super) fn evil_state(&self) -> String {
        self.lab
            .switch()
            .and_then(|switch| switch.port(EVIL.0))
            .map_or_else(|e| e.to_string(), |port| port.0.to_string())
    }
}
