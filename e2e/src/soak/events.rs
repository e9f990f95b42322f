//! What happens.

use anyhow::{Context, Result};
use std::fs;

use crate::hostile::frontend::{EVENT_IDX, Frontend, GUEST_CSUM, INDIRECT_DESC, MRG_RXBUF, Setup};
use crate::hostile::queue::Layout;
use crate::hostile::random::Random;
use crate::soak::audit::VOID;
use crate::soak::ledger::Ports;
use crate::soak::station::{Station, mac};
use crate::soak::{DOMAINS, MOST, Soak, VICTIM};

/// Things that a hostile frontend does in a row.
const WICKED: u64 = 60;
/// The domain whose stations have addresses of their own, by configuration.
const STRICT: usize = 0;

impl Soak {
    /// One thing happens. Returns what.
    pub(super) fn event(&mut self) -> Result<&'static str> {
        let stormy = self.is_stormy();
        let roll = self.dice.below(if stormy { 130 } else { 100 });
        let name = match roll {
            0..16 => self.somebody_joins(),
            16..32 => self.somebody_leaves(),
            32..46 => self.somebody(Station::reset).map(|()| "resets"),
            46..60 => self.somebody_returns(),
            60..68 => self.pin(),
            68..74 => self.lab.switch()?.json(&["fdb", "flush"]).map(|_| "flushes"),
            74..82 => self.void(),
            82..88 => self.capture(),
            88..100 => self.hostile(),
            100..112 => self.restart(Some(true)),
            112..118 => self.restart(Some(false)),
            _ => self.restart(None),
        };
        name.map(|name| self.count(name))
    }

    /// The station at a place of a domain.
    pub(super) fn station_at(&self, domain: usize, place: u16) -> Option<u32> {
        let members = self.crowd.members();
        let mut here = members.stations.iter().filter(|station| station.domain == domain && station.place == place);
        here.next().map(|station| station.id)
    }

    /// A driver.
    fn setup(&mut self) -> Setup {
        let layout = if self.dice.chance(50) { Layout::Split } else { Layout::Packed };
        let all = [MRG_RXBUF, EVENT_IDX, INDIRECT_DESC, GUEST_CSUM];
        Setup::of(layout).with(all.into_iter().filter(|_| self.dice.chance(50)).fold(0, |sum, bit| sum | bit))
    }

    /// A station joins at that place, over a port of its own.
    pub(super) fn join(&mut self, domain: usize, place: u16) -> Result<()> {
        let name = format!("d{domain}p{place}");
        let mut settings = DOMAINS[domain].to_owned();
        if domain == STRICT {
            settings.push_str(&format!(",mac=02:50:00:00:00:{place:02x},spoofcheck=on"));
        }
        self.lab.add_port(&name, &settings)?;
        let setup = self.setup();
        let frontend = Frontend::start(&self.lab.socket(&name), mac(place), setup).with_context(|| name.clone())?;
        let station = Station::new(self.next_id, domain, place, name, frontend);
        self.next_id += 1;
        self.crowd.members().stations.push(station);
        Ok(())
    }

    /// A station leaves: it hangs up before its port is removed, or finds the port removed.
    pub(super) fn leave(&mut self, id: u32) -> Result<()> {
        let mut station = self.crowd.take(id).context("no such station")?;
        if self.dice.chance(50) {
            station.hang_up()?;
        }
        self.lab.del_port(&station.port)?;
        station.listen()
    }

    fn somebody_joins(&mut self) -> Result<&'static str> {
        let domain = self.dice.below(DOMAINS.len() as u64) as usize;
        match (0..MOST).find(|&place| self.station_at(domain, place).is_none()) {
            Some(place) => self.join(domain, place).map(|()| "joins"),
            None => Ok("found no place"),
        }
    }

    fn somebody_leaves(&mut self) -> Result<&'static str> {
        match self.anybody() {
            Some(id) => self.leave(id).map(|()| "leaves"),
            None => Ok("found nobody"),
        }
    }

    fn anybody(&mut self) -> Option<u32> {
        let ids = self.crowd.members().ids();
        self.dice.pick(&ids)
    }

    fn somebody(&mut self, act: impl FnOnce(&mut Station) -> Result<()>) -> Result<()> {
        self.anybody().map_or(Ok(()), |id| self.crowd.with(id, act))
    }

    /// Hangs up and comes back with another guest.
    fn somebody_returns(&mut self) -> Result<&'static str> {
        let setup = self.setup();
        self.somebody(|station| {
            station.hang_up()?;
            station.return_as(setup)
        })?;
        Ok("returns")
    }

    fn pin(&mut self) -> Result<&'static str> {
        let Some(id) = self.anybody() else { return Ok("found nobody") };
        let port = self.crowd.with(id, |station| Ok(station.port.clone()))?;
        let worker = self.dice.below(self.workers).to_string();
        let switch = self.lab.switch()?;
        switch.json(&["worker", "pin", &port, &worker])?;
        if self.dice.chance(70) {
            switch.json(&["worker", "unpin", &port])?;
        }
        Ok("pins")
    }

    /// A port that nobody is behind comes, or goes.
    fn void(&mut self) -> Result<&'static str> {
        let Some((name, settings)) = self.dice.pick(&VOID) else { return Ok("found no port") };
        if self.is_there(name)? {
            self.lab.del_port(name)?;
        } else {
            self.lab.add_port(name, settings)?;
        }
        Ok(if name == VOID[0].0 { "void port" } else { "carrier" })
    }

    fn capture(&mut self) -> Result<&'static str> {
        let Some(id) = self.anybody() else { return Ok("found nobody") };
        let port = self.crowd.with(id, |station| Ok(station.port.clone()))?;
        let file = self.lab.socket(&port).with_extension("pcapng");
        let path = file.to_string_lossy();
        let output = self.lab.switch()?.command(&["capture", &port, "--write", &path, "--count", "40"])?;
        let written = fs::metadata(&file).map_or(0, |metadata| metadata.len());
        let _ = fs::remove_file(&file);
        anyhow::ensure!(output.status.success() && written > 0, "{}", String::from_utf8_lossy(&output.stderr));
        Ok("captures")
    }

    /// A frontend does what comes to its mind, on a network that it has for itself and its victim.
    fn hostile(&mut self) -> Result<&'static str> {
        let mut random = Random::new(self.dice.any(), VICTIM.1)?;
        let setup = random.setup();
        let [evil, victim] = &mut self.dark;
        let mut act = || -> Result<()> {
            evil.reconnect(setup)?;
            for _ in 0..WICKED {
                if !random.act(evil)? {
                    break;
                }
                while victim.receive().is_some() {}
            }
            // A header that is never completed is only given up after a while.
            evil.reconnect(Setup::of(Layout::Split))
        };
        let done = act();
        done.with_context(|| format!("the hostile port is {}", self.evil_state()))?;
        Ok("hostile rounds")
    }

    /// The switch is killed or ended, and started again; or another one takes over (`None`).
    fn restart(&mut self, crash: Option<bool>) -> Result<&'static str> {
        let guests = self.guests.take();
        let done = match guests.as_ref().map(|guests| guests.may_restart(crash == Some(false))) {
            Some(None) => Ok("guests forbade a restart"),
            _allowed => match crash {
                Some(crash) => self.end_and_begin(crash),
                None => self.take_over(),
            },
        };
        self.guests = guests;
        done
    }

    fn end_and_begin(&mut self, crash: bool) -> Result<&'static str> {
        let last_words = Ports::read(self.lab.switch()?)?;
        self.watch.read_log(self.lab.switch()?)?;
        self.lab.switch_mut()?.end(crash)?;
        self.judge_end(&last_words, crash)?;
        self.crashed |= crash;
        self.report.restarted();
        self.lab.switch_mut()?.begin_again()?;
        let ids = self.crowd.members().ids();
        for id in ids {
            self.crowd.with(id, Station::resume)?;
        }
        self.dark.iter_mut().try_for_each(|frontend| frontend.reconnect(Setup::of(Layout::Split)))?;
        Ok(if crash { "kills" } else { "restarts" })
    }

    fn take_over(&mut self) -> Result<&'static str> {
        let still = self.lab.switch_mut()?.take_over()?;
        self.report.stood_still(still);
        Ok("takeovers")
    }
}
