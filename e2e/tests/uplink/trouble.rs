//! Two guests of one network talk all the while one of another network floods an uplink, to which everything happens that
//! can: the pair must not notice.

use anyhow::{Context, Result, ensure};
use e2e::hostile::frontend::{Frontend, Setup};
use e2e::hostile::leave_the_switch_alone;
use e2e::hostile::pair::Pair;
use e2e::hostile::queue::Layout;
use e2e::machine;
use e2e::net::Namespace;
use e2e::scratch::Scratch;
use e2e::switch::Switch;
use e2e::wait;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::rig::is_dpdk;

const MTU: usize = 1500;
const LIMIT: Duration = Duration::from_secs(10);
/// The pair may lose so much: what the machine does besides moves it by more than trouble does.
const LEAST: f64 = 0.9;
/// Frames that are sent to the uplink at a time, and the pause between two times: some 100,000 a second.
const BURST: usize = 32;
const PAUSE: Duration = Duration::from_micros(250);
/// Bytes of such a frame, of which its Ethernet header is not one.
const PAYLOAD: usize = 1000;
/// A station behind the wire.
const FAR_MAC: u64 = 0x0200_0000_0099;

/// The flood's station was never heard; without the uplink there is nobody in its network.
const NOWHERE: (&str, &str) = ("flood", "no_destination");

/// Something that happens to an uplink.
struct Trouble {
    name: &'static str,
    /// What brings it about, at the near end of the wire or at the far one.
    begin: fn(&Wire) -> Result<()>,
    end: fn(&Wire) -> Result<()>,
    /// What becomes of frames, and the port where that is counted.
    reason: (&'static str, &'static str),
}

const TROUBLES: [Trouble; 5] = [
    Trouble {
        name: "the kernel keeps what is sent",
        begin: |wire| wire.far("tc qdisc add dev sink root tbf rate 8bit burst 2000 limit 100m"),
        end: |wire| wire.far("tc qdisc del dev sink root"),
        reason: ("up", "full"),
    },
    Trouble {
        name: "the driver refuses what is sent",
        begin: |wire| wire.far("ip link set far0 mtu 500"),
        end: |wire| wire.far("ip link set far0 mtu 1500"),
        reason: ("up", "refused"),
    },
    Trouble {
        name: "the carrier is lost",
        begin: |wire| wire.far("ip link set far0 down"),
        end: |wire| wire.far("ip link set far0 up"),
        reason: NOWHERE,
    },
    Trouble {
        name: "the interface is down",
        begin: |wire| wire.near("ip link set up0 down"),
        end: |wire| wire.near("ip link set up0 up"),
        reason: NOWHERE,
    },
    Trouble {
        name: "the interface is gone",
        begin: |wire| wire.near("ip link del up0"),
        end: Wire::lay,
        reason: NOWHERE,
    },
];

/// A wire whose far end leads to a bridge and from there to nowhere.
struct Wire([Namespace; 2]);

impl Wire {
    fn new() -> Result<Self> {
        let wire = Self([Namespace::new()?, Namespace::new()?]);
        for end in &wire.0 {
            end.run("for k in all default; do echo 1 >/proc/sys/net/ipv6/conf/$k/disable_ipv6; done")?;
        }
        wire.far(
            "set -e; ip link add hub type bridge mcast_snooping 0; ip link add sink type veth peer name void
             ip link set sink master hub; for link in hub sink void; do ip link set $link up; done",
        )?;
        wire.lay()?;
        Ok(wire)
    }

    fn lay(&self) -> Result<()> {
        self.0[0].wire("up0", &self.0[1], "far0", MTU)?;
        self.far("ip link set far0 master hub")
    }

    fn near(&self, command: &str) -> Result<()> {
        self.0[0].run(command).map(drop)
    }

    fn far(&self, command: &str) -> Result<()> {
        self.0[1].run(command).map(drop)
    }
}

/// A guest that sends at an even rate, to a station on the wire, until it is dropped.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    fn start(mut guest: Frontend) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let thread = thread::spawn(move || {
            let _ = leave_the_switch_alone();
            let payload = [0x5a; PAYLOAD];
            while !ended.load(Ordering::Acquire) {
                for _ in 0..BURST {
                    guest.send(FAR_MAC, &payload);
                }
                guest.tx.notify();
                while guest.receive().is_some() {}
                thread::sleep(PAUSE);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The switch, and who is at it.
struct Scene {
    pair: Pair,
    flood: Option<Flood>,
    /// A guest of a third network, which hears nothing.
    ear: Frontend,
    switch: Switch,
    wire: Wire,
    _scratch: Scratch,
}

impl Scene {
    fn new() -> Result<Self> {
        leave_the_switch_alone()?;
        let (scratch, wire) = (Scratch::new("trouble")?, Wire::new()?);
        let switch = Switch::start_in(&wire.0[0], &["--sandbox", "strict"])?;
        let guest = |name: &str, network: &str, mac: u64, layout| -> Result<Frontend> {
            let path = scratch.join(name);
            switch.add_port(&format!("{name}=vhost-user:{},network={network}", path.display()))?;
            Frontend::start(&path, mac, Setup::of(layout)).with_context(|| format!("port {name}"))
        };
        let pair = [
            guest("good1", "green", 0x0200_0000_0001, Layout::Split)?,
            guest("good2", "green", 0x0200_0000_0002, Layout::Packed)?,
        ];
        let flooding = guest("flood", "blue", 0x0200_0000_0003, Layout::Split)?;
        let ear = guest("ear", "red", 0x0200_0000_0004, Layout::Split)?;
        switch.add_port("up=afxdp:up0,network=blue")?;
        switch.wait_port("up", "up")?;
        let flood = Some(Flood::start(flooding));
        Ok(Self { pair: Pair::start(pair), flood, ear, switch, wire, _scratch: scratch })
    }

    /// The pair's rate over some time, in frames per second.
    fn rate(&self, window: Duration) -> Result<f64> {
        let mark = self.pair.mark();
        thread::sleep(window);
        Ok(self.pair.report(mark)?.rate)
    }

    /// The rate in trouble and without.
    fn round(&self, trouble: &Trouble, window: Duration) -> Result<[f64; 2]> {
        (trouble.begin)(&self.wire)?;
        let (port, reason) = trouble.reason;
        let count = || Ok::<_, anyhow::Error>(self.switch.port(port)?.dropped_for(reason));
        let before = count()?;
        wait::until_true(reason, LIMIT, || Ok(count()? > before + 100)).context(trouble.name)?;
        let troubled = self.rate(window).context(trouble.name)?;
        (trouble.end)(&self.wire)?;
        self.switch.wait_port("up", "up")?;
        let sent = self.switch.port("up")?.count("tx_frames");
        wait::until_true("frames to be sent again", LIMIT, || {
            Ok(self.switch.port("up")?.count("tx_frames") > sent + 5000)
        })?;
        Ok([troubled, self.rate(window)?])
    }

    /// Ends the flood, and demands that every frame and every piece of memory is accounted for.
    fn finish(mut self) -> Result<()> {
        drop(self.flood.take());
        let port = |name| self.switch.port(name);
        let from_guest = || Ok::<_, anyhow::Error>(port("flood")?.count("rx_frames"));
        let last = wait::until_stays("the last frames", LIMIT, Duration::from_millis(50), from_guest)?;
        let (flood, up) = (port("flood")?, port("up")?);
        let (sent, dropped) = (up.count("tx_frames"), up.dropped() + flood.dropped());
        println!("{last} frames to the uplink: {sent} sent, dropped {} and {}", up.0["drops"], flood.0["drops"]);
        ensure!(sent + dropped == last, "{last} frames, of which {sent} sent and {dropped} dropped");

        let mark = self.pair.mark();
        self.pair.report(mark)?;
        drop(self.pair);
        let sum = |counter| Ok::<_, anyhow::Error>(port("good1")?.count(counter) + port("good2")?.count(counter));
        ensure!(sum("rx_frames")? == sum("tx_frames")?, "somebody else's frames in the pair's network");
        ensure!(self.ear.receive().is_none() && port("ear")?.count("tx_frames") == 0, "a frame in a third network");

        self.switch.del_port("up")?;
        let log = self.switch.log();
        let books: Vec<_> = log.lines().filter(|line| line.contains("of the pool")).collect();
        let all_free = books.last().is_some_and(|line| line.contains("to_send=2048: 2048 free"));
        ensure!(all_free && !log.contains("not accounted for"), "{books:#?}");
        Ok(())
    }
}

#[test]
fn an_uplink_in_trouble_is_nobody_elses() -> Result<()> {
    if is_dpdk() {
        return Ok(());
    }
    let _turn = machine::exclusive()?;
    let scene = Scene::new()?;
    for trouble in &TROUBLES {
        let (mut best, mut rounds) = ([0f64; 2], 0);
        // The best of as many rounds as it takes on a machine that has other work, too.
        while rounds < 2 || best[0] < LEAST * best[1] {
            ensure!(rounds < 20, "{}: the pair fell from {:.0} to {:.0} frames/s", trouble.name, best[1], best[0]);
            let rates = scene.round(trouble, Duration::from_millis(300))?;
            best = [best[0].max(rates[0]), best[1].max(rates[1])];
            rounds += 1;
        }
        println!("{}: {:.0} frames/s instead of {:.0}, {rounds} rounds", trouble.name, best[0], best[1]);
    }
    scene.finish()
}

/// Not a test: what each trouble costs the pair, on a quiet machine and with a release build.
#[test]
#[ignore = "a measurement"]
fn what_trouble_costs() -> Result<()> {
    let _turn = machine::exclusive()?;
    let scene = Scene::new()?;
    for trouble in &TROUBLES {
        let mut shares = Vec::new();
        for _ in 0..15 {
            let [troubled, calm] = scene.round(trouble, Duration::from_millis(700))?;
            shares.push(100.0 * troubled / calm);
        }
        shares.sort_by(f64::total_cmp);
        let [first, median, last] = [0, shares.len() / 2, shares.len() - 1].map(|at| shares[at]);
        println!("{}: {median:.1} % of the rate without ({first:.1} to {last:.1})", trouble.name);
    }
    scene.finish()
}
