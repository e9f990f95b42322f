//! A running switch with four ports: a pair whose traffic is measured, a peer, and the hostile one.

use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::hostile::frontend::{ARRIVAL, Frontend, Setup};
use crate::hostile::leave_the_switch_alone;
use crate::hostile::pair::{Mark, Pair};
use crate::hostile::queue::Layout;
use crate::machine::{self, Exclusive};
use crate::scratch::Scratch;
use crate::switch::{Switch, Usage};
use crate::wait;

/// Name of the hostile frontend's port.
pub const EVIL: &str = "evil";
/// Stations.
pub const EVIL_MAC: u64 = 0x0200_0000_00e0;
/// The one that talks with the hostile frontend.
pub const PEER_MAC: u64 = 0x0200_0000_00a0;
/// Those of the pair.
pub const PAIR_MACS: [u64; 2] = [0x0200_0000_0001, 0x0200_0000_0002];

/// How long the pair is measured alone.
const CALM: Duration = Duration::from_millis(300);
/// The least time over which it is measured beside a case: less says nothing on a machine with other work.
const WINDOW: Duration = Duration::from_millis(40);
/// The switch says what was wrong well before that.
const VERDICT: Duration = Duration::from_secs(6);
/// The pair may do no worse than that beside a case. Both sides of all frontends share one CPU, and the machine may have
/// other work: a case that really held the switch up would show far less.
const LEAST_RATE: f64 = 0.1;
const LONGEST_STALL: Duration = Duration::from_millis(300);
/// A sanitizer makes a switch slower by so much, and whatever else runs takes longer turns with it.
const SANITIZED: u32 = 4;
/// Memory may grow by that much over all cases.
const GROWTH_KIB: u64 = 6 << 10;

/// How long the number of descriptors stays until it is believed.
const SETTLED: Duration = Duration::from_millis(100);

/// What has to come of a case.
#[derive(Debug, Clone, Copy)]
pub enum Expect {
    /// The port is stopped, and `sluice port show` gives a reason that contains this.
    Refused(&'static str),
    /// Frames are dropped, for this reason, at the hostile port or at its peer's.
    Dropped(&'static str),
    /// Nothing: it was allowed, or concerns the hostile guest alone.
    Unharmed,
}

/// How the hostile frontend recovers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recover {
    /// The guest resets its device, over the same connection.
    Reset,
    /// The frontend hangs up and connects again.
    Reconnect,
    /// By what the test does next.
    Later,
}

/// The arena.
#[derive(Debug)]
pub struct Arena {
    pair: Pair,
    /// The hostile frontend.
    pub evil: Frontend,
    /// Its peer.
    pub peer: Frontend,
    /// The switch.
    pub switch: Switch,
    scratch: Scratch,
    calm_rate: f64,
    before: Usage,
    probes: u64,
    cases: usize,
    worst: (f64, Duration),
    _turn: Exclusive,
}

impl Arena {
    /// Starts the switch and the four ports, and measures the pair alone. `further` is put behind the configuration of
    /// the hostile port and of its peer's.
    pub fn start(further: &str) -> Result<Self> {
        let turn = machine::exclusive()?;
        leave_the_switch_alone()?;
        let scratch = Scratch::new("hostile")?;
        let switch = Switch::start(&[])?;
        let port = |name: &str, mac: u64, layout, further: &str| -> Result<Frontend> {
            let path = scratch.join(name);
            switch.add_port(&format!("{name}=vhost-user:{}{further}", path.display()))?;
            Frontend::start(&path, mac, Setup::of(layout)).with_context(|| format!("port {name}"))
        };
        // The pair's addresses are theirs, whoever else claims them.
        let good = port("good1", PAIR_MACS[0], Layout::Split, ",mac=02:00:00:00:00:01")?;
        let best = port("good2", PAIR_MACS[1], Layout::Packed, ",mac=02:00:00:00:00:02")?;
        let peer = port("peer", PEER_MAC, Layout::Split, further)?;
        let evil = port(EVIL, EVIL_MAC, Layout::Split, further)?;
        let pair = Pair::start([good, best]);
        let before = switch.usage()?;
        let (probes, cases, worst, calm_rate) = (0, 0, (f64::MAX, Duration::ZERO), 0.0);
        let mut arena =
            Self { pair, evil, peer, switch, scratch, calm_rate, before, probes, cases, worst, _turn: turn };
        arena.probe()?;
        let mark = arena.pair.mark();
        std::thread::sleep(CALM);
        arena.calm_rate = arena.pair.report(mark)?.rate;
        // What a first connection leaves behind, once, is no leak.
        arena.evil.reconnect(Setup::of(Layout::Split))?;
        arena.probe()?;
        arena.before = arena.settled()?;
        println!("calm: {:.0} frames/s", arena.calm_rate);
        Ok(arena)
    }

    /// A path for further ports of this test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// The present, for [`Arena::judge`].
    pub fn mark(&self) -> Mark {
        self.pair.mark()
    }

    /// Demands that the pair was not harmed since the mark.
    pub fn judge(&mut self, name: &str, mark: Mark) -> Result<()> {
        let report = self.pair.report(mark).with_context(|| format!("{name}: the pair was harmed"))?;
        let share = report.rate / self.calm_rate;
        println!("{name}: {} frames, {:.0} % of the calm rate, stall {:?}", report.frames, share * 100.0, report.stall);
        self.cases += 1;
        self.worst = (self.worst.0.min(share), self.worst.1.max(report.stall));
        let slower = if sanitized() { SANITIZED } else { 1 };
        ensure!(
            share >= LEAST_RATE / f64::from(slower),
            "{name}: the pair fell to {:.0} % of its calm rate",
            share * 100.0
        );
        ensure!(report.stall <= LONGEST_STALL * slower, "{name}: the pair stood still for {:?}", report.stall);
        Ok(())
    }

    /// One case: the hostile frontend comes with that driver, acts, is judged, recovers, and is of use again.
    pub fn case(
        &mut self,
        name: &str,
        setup: Setup,
        act: impl FnOnce(&mut Frontend) -> Result<()>,
        expect: Expect,
        recover: Recover,
    ) -> Result<()> {
        if self.evil.setup != setup {
            self.evil.reconnect(setup).with_context(|| format!("before {name}"))?;
        }
        let before = self.drops(expect)?;
        let (mark, begin) = (self.mark(), Instant::now());
        act(&mut self.evil).with_context(|| format!("in {name}"))?;
        self.evil.tx.notify();
        self.expect(expect, before).with_context(|| format!("after {name}"))?;
        if let Some(left) = WINDOW.checked_sub(begin.elapsed()) {
            std::thread::sleep(left);
        }
        self.judge(name, mark)?;
        match recover {
            Recover::Later => return Ok(()),
            Recover::Reset => self.evil.reset(),
            Recover::Reconnect => self.evil.reconnect(setup),
        }
        .and_then(|()| self.probe())
        .with_context(|| format!("the port is of no use after {name}"))
    }

    /// Frames dropped for the expected reason, if that is to be a drop.
    fn drops(&self, expect: Expect) -> Result<u64> {
        match expect {
            Expect::Dropped(reason) => {
                Ok(self.switch.port(EVIL)?.dropped_for(reason) + self.switch.port("peer")?.dropped_for(reason))
            }
            _ => Ok(0),
        }
    }

    fn expect(&self, expect: Expect, before: u64) -> Result<()> {
        let what = format!("{expect:?}");
        let done = wait::until_true(&what, VERDICT, || match expect {
            Expect::Refused(reason) => {
                Ok(self.switch.port(EVIL)?.0["reason"].as_str().is_some_and(|shown| shown.contains(reason)))
            }
            Expect::Dropped(_) => Ok(self.drops(expect)? > before),
            Expect::Unharmed => Ok(true),
        });
        done.with_context(|| format!("the port is {:?}", self.switch.port(EVIL).map(|port| port.0)))
    }

    /// Demands that the hostile frontend's port passes frames, in both directions.
    pub fn probe(&mut self) -> Result<()> {
        self.probes += 1;
        let mut payload = b"PROBE".to_vec();
        payload.extend(self.probes.to_le_bytes());
        payload.resize(64, 0);
        pass(&mut self.evil, &mut self.peer, PEER_MAC, &payload).context("from the hostile guest")?;
        pass(&mut self.peer, &mut self.evil, EVIL_MAC, &payload).context("to the hostile guest")
    }

    /// What an operator does who will not wait: the hostile frontend's port is added anew.
    pub fn renew_port(&mut self) -> Result<()> {
        self.switch.del_port(EVIL)?;
        self.switch.add_port(&format!("{EVIL}=vhost-user:{}", self.path(EVIL).display()))?;
        self.evil.reconnect(self.evil.setup)?;
        self.probe()
    }

    /// What the switch uses once it has closed what it no longer needs, which is a matter of other threads.
    fn settled(&self) -> Result<Usage> {
        let fds = || Ok(self.switch.usage()?.fds);
        let fds = wait::until_stays("as many descriptors", ARRIVAL, SETTLED, fds)?;
        Ok(Usage { fds, ..self.switch.usage()? })
    }

    /// Demands that nothing was left behind by all cases, and sums them up.
    pub fn finish(mut self) -> Result<()> {
        self.evil.reconnect(Setup::of(Layout::Split))?;
        self.probe()?;
        let (before, now) = (self.before, self.settled()?);
        println!(
            "{} cases: worst {:.0} % of the calm rate, longest stall {:?}; memory {} to {} KiB, descriptors {} to {}",
            self.cases,
            self.worst.0 * 100.0,
            self.worst.1,
            before.resident_kib,
            now.resident_kib,
            before.fds,
            now.fds,
        );
        ensure!(now.fds == before.fds, "descriptors went from {} to {}", before.fds, now.fds);
        // One that has changed ports stays for a second, in case there is more to do.
        let threads = || Ok(self.switch.usage()?.threads <= before.threads);
        wait::until_true("the threads to be as few as before", ARRIVAL, threads)
            .with_context(|| format!("threads went from {} to {}", before.threads, now.threads))?;
        let grown = now.resident_kib.saturating_sub(before.resident_kib);
        // A sanitizer keeps what is freed.
        ensure!(
            sanitized() || grown <= GROWTH_KIB,
            "memory went from {} to {} KiB",
            before.resident_kib,
            now.resident_kib
        );
        Ok(())
    }
}

/// Whether the switch is a build with the address sanitizer.
fn sanitized() -> bool {
    std::env::var_os("ASAN_OPTIONS").is_some()
}

/// Sends a frame until it arrives. The pair's broadcasts fill a small ring between two looks at it, and what comes then
/// is rightly lost, so once is not enough.
fn pass(from: &mut Frontend, to: &mut Frontend, address: u64, payload: &[u8]) -> Result<()> {
    wait::until_true("a frame", ARRIVAL, || {
        if to.takes(payload) {
            return Ok(true);
        }
        from.send(address, payload);
        from.tx.notify();
        Ok(false)
    })
}
