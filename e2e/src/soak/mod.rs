//! A soak: for as long as one likes, a switch with guests and stations that join, leave, migrate and break the rules,
//! while it is killed, restarted and upgraded, all at random and from a seed. Every few seconds everything falls silent
//! for an audit: what the switch counts has to add up and to be what the stations have seen, and it may hold no more
//! memory and descriptors than before.
//!
//! - [`frame`]: frames that tell where they belong; [`station`] sends and judges them, [`crowd`] is all stations.
//! - [`guests`]: real guests, which talk, reboot and migrate.
//! - [`events`]: what happens; [`audit`]: what has to hold. [`ledger`] is about counters, [`watch`] about memory.
//! - [`report`]: what is told in the end.

pub mod audit;
pub mod crowd;
pub mod events;
pub mod frame;
pub mod guests;
pub mod ledger;
pub mod report;
pub mod station;
pub mod watch;

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::hostile::Dice;
use crate::hostile::frontend::{Frontend, Setup};
use crate::hostile::queue::Layout;
use crate::lab::Lab;
use crate::machine;
use crate::switch::Switch;
use crowd::Crowd;
use guests::Guests;
use report::Report;
use watch::Watch;

/// Where stations are: by settings of their ports. Stations of different ones never hear each other.
const DOMAINS: [&str; 5] = [
    "network=red",
    "network=blue",
    "network=green,vlan=10",
    "network=green,vlan=20",
    "network=narrow,rate-rx=20M,rate-tx=20M",
];
/// Of the domain in which frames are dropped all the time, since more are sent than may pass.
const NARROW: usize = 4;
/// Stations of each domain at an audit, and at most.
const USUAL: u16 = 3;
const MOST: u16 = 5;
/// Of each period, so much is without restarts of the switch, so that leaks have the time to show.
const STEADY_PERCENT: u128 = 60;
/// The hostile frontend and the one that it talks with.
const EVIL: (&str, u64) = ("evil", 0x0266_0000_0001);
const VICTIM: (&str, u64) = ("victim", 0x0266_0000_0002);
/// Settings of their ports.
const DARK: &str = "network=dark";

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long it goes on.
    pub time: Duration,
    /// All that is random comes from it; when it happens depends on the machine.
    pub seed: u64,
    /// With real guests.
    pub guests: bool,
    /// With restarts of the switch. Without, one process has all the time for a leak to show.
    pub restarts: bool,
}

impl Options {
    /// Time between two audits.
    fn between_audits(&self) -> Duration {
        (self.time / 12).clamp(Duration::from_secs(6), Duration::from_secs(20))
    }

    /// A time with restarts, and one without, take turns.
    fn period(&self) -> Duration {
        (self.time / 2).clamp(Duration::from_secs(40), Duration::from_secs(20 * 60))
    }
}

/// A soak under way.
pub struct Soak {
    options: Options,
    dice: Dice,
    // Dropped in this order.
    guests: Option<Guests>,
    crowd: Crowd,
    dark: [Frontend; 2],
    lab: Lab,
    workers: u64,
    next_id: u32,
    watch: Watch,
    /// What was so at the last audit, if nothing has happened since that makes it meaningless.
    before: Option<audit::Before>,
    /// The switch was killed since.
    crashed: bool,
    events: BTreeMap<&'static str, u64>,
    report: Report,
    begun: Instant,
    slowest: Duration,
}

/// Runs a soak to its end. Progress is printed as it goes.
///
/// # Errors
/// The first thing that was wrong, with what the switch has logged before.
pub fn run(options: &Options) -> Result<Report> {
    let _turn = machine::exclusive()?;
    let mut soak = Soak::start(options)?;
    match soak.go() {
        Ok(()) => Ok(soak.finish()),
        Err(error) => {
            println!("{}", soak.lab.diagnosis());
            Err(error)
        }
    }
}

impl Soak {
    fn start(options: &Options) -> Result<Self> {
        // A worker on each of two CPUs: they meet at every ring.
        let cpus = machine::cpus()?;
        let mut all = [cpus.switch, cpus.load].concat();
        all.dedup();
        all.truncate(2);
        let list = all.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let mut lab = Lab::around(Switch::start(&["--cpu", &list])?)?;
        let guests = if options.guests { Some(Guests::start(&mut lab, options.seed)?) } else { None };
        let dark = [Self::dark(&mut lab, EVIL)?, Self::dark(&mut lab, VICTIM)?];
        let mut soak = Self {
            options: options.clone(),
            dice: Dice::new(options.seed),
            guests,
            crowd: Crowd::new(options.seed),
            dark,
            lab,
            workers: all.len() as u64,
            next_id: 1,
            watch: Watch::default(),
            before: None,
            crashed: false,
            events: BTreeMap::new(),
            report: Report::new(options),
            begun: Instant::now(),
            slowest: Duration::ZERO,
        };
        soak.restore_population()?;
        Ok(soak)
    }

    fn dark(lab: &mut Lab, (name, mac): (&str, u64)) -> Result<Frontend> {
        lab.add_port(name, DARK)?;
        Frontend::start(&lab.socket(name), mac, Setup::of(Layout::Split)).with_context(|| name.to_owned())
    }

    fn go(&mut self) -> Result<()> {
        let end = Instant::now() + self.options.time;
        self.audit().context("at the beginning")?;
        let mut last_audit = Instant::now();
        while Instant::now() < end {
            let name = self.event()?;
            self.check().with_context(|| format!("after: {name}"))?;
            if last_audit.elapsed() >= self.options.between_audits() {
                self.audit().context("in an audit")?;
                last_audit = Instant::now();
                self.progress();
            }
            std::thread::sleep(Duration::from_millis(self.dice.below(250)));
        }
        self.audit().context("in the last audit")?;
        self.progress();
        Ok(())
    }

    /// Whether the switch may be restarted now, or this is a time in which leaks are looked for.
    fn is_stormy(&self) -> bool {
        let period = self.options.period().as_millis();
        self.options.restarts && self.begun.elapsed().as_millis() % period * 100 < period * (100 - STEADY_PERCENT)
    }

    /// Whatever can be seen at any time.
    fn check(&mut self) -> Result<()> {
        self.lab.switch_mut()?.check_alive()?;
        self.crowd.check()?;
        self.guests.as_ref().map_or(Ok(()), Guests::check)
    }

    /// Whether there are real guests.
    fn guests_run(&self) -> bool {
        self.options.guests
    }

    /// Notes that something was done.
    fn count(&mut self, name: &'static str) -> &'static str {
        *self.events.entry(name).or_default() += 1;
        name
    }

    fn progress(&self) {
        let events: u64 = self.events.values().sum();
        println!("{:>5} s: {events} events; {}", self.begun.elapsed().as_secs(), self.report.line());
    }

    fn finish(mut self) -> Report {
        let record = self.guests.as_ref().map(Guests::record);
        self.report.close(&self.events, record, &self.watch, self.slowest, self.begun.elapsed());
        self.report
    }
}
