//! The AF_XDP uplink beside dpdk-testpmd's (net_vhost and net_af_xdp), in one run and on the same wire.
//!
//! `uplink rate`: frames of 64 bytes circulate between two drivers, over a veth pair both of whose ends belong to the
//! switch, and what the switch's process pays for each. `uplink tcp`: a guest sends to a plain host behind the wire,
//! and receives. `uplink flap`: two guests' traffic while the uplink beside them goes up and down, and while another
//! link does. A number behind that says how many rounds (3).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::ChildStdin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::lab::{Lab, iperf_rate, mac};
use e2e::net::Namespace;
use e2e::process::Process;
use e2e::qemu::{Guest, GuestSpec, Nic};
use e2e::scratch::Scratch;
use e2e::switch::{self, Switch};
use e2e::testpmd::{Testpmd, TestpmdSpec};
use e2e::{machine, peer, wait};

const SPAN: Duration = Duration::from_secs(2);
const FLAP_SPAN: Duration = Duration::from_millis(500);
const LIMIT: Duration = Duration::from_secs(60);
/// What a guest's device must not offer where nobody would do it.
const NO_OFFLOADS: &str = "csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,\
     guest_uso4=off,guest_uso6=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off,host_uso=off";

fn main() -> Result<()> {
    let _turn = machine::exclusive()?;
    let program = switch::program()?;
    ensure!(
        !program.components().any(|part| part.as_os_str() == "debug"),
        "the newest build is {}: build it with --release, or set SLUICE_BIN",
        program.display()
    );
    let rounds = std::env::args().nth(2).and_then(|rounds| rounds.parse().ok()).unwrap_or(3);
    match std::env::args().nth(1).as_deref() {
        Some("rate") => rate(rounds),
        Some("tcp") => tcp(rounds),
        Some("flap") => flap(rounds),
        _ => bail!("say what: rate, tcp or flap"),
    }
}

/// The switch that is measured.
enum Peer {
    Sluice(Switch),
    Testpmd { process: Process, _stdin: ChildStdin },
}

impl Peer {
    /// `ports` are pairs that belong together: a socket and an interface.
    /// `options` are of our uplinks; without any it is testpmd.
    fn start(options: Option<&str>, space: &Namespace, ports: &[(String, &str)], scratch: &Scratch) -> Result<Self> {
        if let Some(options) = options {
            let pairs = ports.iter().enumerate().flat_map(|(pair, (socket, interface))| {
                [
                    format!("vm{pair}=vhost-user:{socket},network=n{pair}"),
                    format!("up{pair}=afxdp:{interface},network=n{pair}{options}"),
                ]
            });
            let arguments: Vec<String> = pairs.flat_map(|spec| ["--port".to_owned(), spec]).collect();
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            return Switch::start_in(space, &arguments).map(Self::Sluice);
        }
        peer::reserve_hugepages(512)?;
        let cpu = machine::cpus()?.switch[0];
        let mut command = space.command("stdbuf");
        command.args([
            "-oL",
            "dpdk-testpmd",
            "--lcores",
            &format!("0@{cpu},1@{cpu}"),
            "-m",
            "256",
            "--no-pci",
            "--in-memory",
        ]);
        command.args(["--file-prefix", &format!("sl-up-{}", std::process::id())]);
        for (pair, (socket, interface)) in ports.iter().enumerate() {
            command.args(["--vdev", &format!("net_vhost{pair},iface={socket},client=1,queues=1")]);
            command.args(["--vdev", &format!("net_af_xdp{pair},iface={interface}")]);
        }
        command.args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=32768", "--txd=1024", "--rxd=1024"]);
        command.args(["--port-topology=paired", "--forward-mode=io", "--auto-start"]);
        let (process, stdin) = Process::start_interactive("testpmd", command, &scratch.join("peer.log"), &[])?;
        Ok(Self::Testpmd { process, _stdin: stdin })
    }

    fn pid(&self) -> u32 {
        match self {
            Self::Sluice(switch) => switch.pid(),
            Self::Testpmd { process, .. } => process.pid(),
        }
    }
}

/// User and system time of a process.
fn times(pid: u32) -> Result<[f64; 2]> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let seconds = |at: usize| Some(fields.get(at)?.parse::<f64>().ok()? / 100.0);
    Ok([seconds(11).context("no time")?, seconds(12).context("no time")?])
}

/// A way to join two drivers over a wire.
struct Way {
    name: &'static str,
    /// Of our uplinks; without any it is testpmd.
    options: Option<&'static str>,
    /// What an operator can set of both ends, in `/sys/class/net`.
    settings: &'static [(&'static str, u32)],
}

/// As the kernel's documentation advises for sockets that poll their driver (Documentation/networking/napi.rst).
const DEFERRED: &[(&str, u32)] = &[("napi_defer_hard_irqs", 2), ("gro_flush_timeout", 200_000)];

const WAYS: [Way; 4] = [
    Way { name: "sluice", options: Some(""), settings: &[] },
    Way { name: "testpmd", options: None, settings: &[] },
    Way { name: "sluice, polling", options: Some(",busy-poll=on"), settings: &[] },
    Way { name: "testpmd, deferred", options: None, settings: DEFERRED },
];

/// A namespace with both ends of a wire.
fn loop_wire(settings: &[(&str, u32)]) -> Result<Namespace> {
    let space = Namespace::new()?;
    space.wire("wire0", &space, "wire1", 1500)?;
    for (name, value) in settings {
        space.run(&format!("for link in wire0 wire1; do echo {value} >/sys/class/net/$link/{name}; done"))?;
    }
    Ok(space)
}

/// Frames per second, and user and system time for each, in ns.
type Cost = [f64; 3];

fn rate(rounds: usize) -> Result<()> {
    println!("64 B over one veth pair, frames that both drivers receive together");
    println!("{:>20} {:>8} {:>16} {:>16}", "", "Mpps", "user ns/frame", "system ns/frame");
    let mut costs = WAYS.map(|_| Vec::new());
    for _ in 0..rounds {
        for (way, costs) in WAYS.iter().zip(&mut costs) {
            let cost = circulate(way)?;
            print_cost(way.name, cost);
            costs.push(cost);
        }
    }
    println!("medians");
    for (way, costs) in WAYS.iter().zip(&costs) {
        print_cost(way.name, [0, 1, 2].map(|at| median(costs.iter().map(|cost| cost[at]).collect())));
    }
    for (ours, theirs) in [(0, 1), (2, 1), (2, 3)] {
        // Of the same round each.
        let [frames, user, _] = [0, 1, 2].map(|at| {
            let ratios = costs[ours].iter().zip(&costs[theirs]).map(|(ours, theirs)| ours[at] / theirs[at]);
            median(ratios.collect())
        });
        println!("{} / {}: frames {frames:.2}, user time {user:.2}", WAYS[ours].name, WAYS[theirs].name);
    }
    Ok(())
}

fn print_cost(name: &str, [frames, user, system]: Cost) {
    println!("{name:>20} {:>8.3} {user:>16.0} {system:>16.0}", frames / 1e6);
}

fn circulate(way: &Way) -> Result<Cost> {
    let (space, scratch) = (loop_wire(way.settings)?, Scratch::new("rate")?);
    let sockets = ["a", "b"].map(|name| scratch.join(format!("{name}.sock")));
    let ports = sockets.iter().zip(1..).map(|(socket, number)| (socket.clone(), mac(number))).collect();
    let mut driver = Testpmd::start(&TestpmdSpec { ports, driver: String::new(), queues: 1, length: 64 })?;
    // The second comes when somebody has connected to the first.
    wait::until_true("the first socket", LIMIT, || Ok(sockets[0].exists()))?;
    let links = ["wire0", "wire1"];
    let pairs: Vec<_> = sockets.iter().map(|socket| socket.display().to_string()).zip(links).collect();
    let peer = Peer::start(way.options, &space, &pairs, &scratch)?;
    driver.wait_ready()?;
    std::thread::sleep(Duration::from_millis(500));
    // All of them fit into either driver's ring: none is lost, or fewer and fewer would circulate.
    driver.start_circulating(3)?;
    std::thread::sleep(Duration::from_millis(500));
    let received =
        |driver: &mut Testpmd| -> Result<u64> { Ok(driver.counts()?.iter().map(|port| port.rx_frames).sum()) };
    let (frames, spent, began) = (received(&mut driver)?, times(peer.pid())?, Instant::now());
    std::thread::sleep(SPAN);
    let frames = (received(&mut driver)? - frames) as f64;
    let (seconds, after) = (began.elapsed().as_secs_f64(), times(peer.pid())?);
    let [user, system] = [0, 1].map(|at| (after[at] - spent[at]) * 1e9 / frames);
    if let Peer::Sluice(switch) = &peer {
        for name in ["vm0", "up0", "vm1", "up1"] {
            let dropped = switch.port(name)?.dropped();
            ensure!(dropped == 0, "{name} has dropped {dropped} frames: fewer circulate than should");
        }
    }
    Ok([frames / seconds, user, system])
}

fn tcp(rounds: usize) -> Result<()> {
    println!("TCP between a guest ({}) and a plain host on the wire, Mbit/s", machine::accelerator()?);
    let ways = [
        ("sluice", Some(""), ""),
        ("sluice, tx-checksum", Some(",tx-checksum=on"), ""),
        ("sluice, no offloads", Some(""), NO_OFFLOADS),
        ("testpmd", None, NO_OFFLOADS),
    ];
    for (name, options, properties) in ways {
        let scratch = Scratch::new("tcp")?;
        let (space, far) = (Namespace::new()?, Namespace::new()?);
        space.wire("up0", &far, "far0", 1500)?;
        far.run("ip addr add 10.0.0.100/24 dev far0")?;
        let socket = scratch.join("vm.sock");
        let mut nic = Nic::new(&socket, &mac(1));
        if !properties.is_empty() {
            nic = nic.with(properties);
        }
        let mut guest = GuestSpec::new("vm1").nic(nic).start()?;
        let _peer = Peer::start(options, &space, &[(socket.display().to_string(), "up0")], &scratch)?;
        guest.wait_ready(LIMIT)?;
        guest.set_address("eth0", "10.0.0.1/24")?;
        wait::until_true("the wire", LIMIT, || Ok(guest.run("ping -c 1 -W 1 10.0.0.100").is_ok()))?;
        let rates = ["", "-R"].map(|reverse| best(rounds, &guest, &far, &scratch, reverse));
        let [out, back] = rates;
        println!("{name:>22}: to the wire {:>6.0}, from the wire {:>6.0}", out?, back?);
    }
    Ok(())
}

fn best(rounds: usize, guest: &Guest, far: &Namespace, scratch: &Scratch, reverse: &str) -> Result<f64> {
    let mut best = 0.0_f64;
    for _ in 0..rounds {
        let mut server = far.command("iperf3");
        server.args(["-s", "-1", "--forceflush"]);
        let log = scratch.join("iperf.log");
        let _ = std::fs::remove_file(&log);
        let mut server = Process::start("iperf3", server, &log, &[])?;
        wait::until_true("iperf3", LIMIT, || Ok(server.log().contains("Server listening")))?;
        let report = guest.run_for(&format!("iperf3 -J -c 10.0.0.100 -t 3 {reverse}"), LIMIT)?;
        best = best.max(iperf_rate(&report)?);
        server.wait_exit(LIMIT)?;
    }
    Ok(best)
}

fn flap(rounds: usize) -> Result<()> {
    let (space, far) = (Namespace::new()?, Namespace::new()?);
    space.wire("up0", &far, "far0", 1500)?;
    // Links that go down and up cost the kernel something, whoever looks at them.
    space.wire("other0", &far, "other1", 1500)?;
    let mut lab = Lab::around(Switch::start_in(&space, &["--port", "up=afxdp:up0"])?)?;
    let ports = (1..=2).map(|number| (lab.socket(&format!("vm{number}")), mac(number))).collect();
    lab.add_port("vm1", "")?;
    lab.add_port("vm2", "")?;
    let mut driver = Testpmd::start(&TestpmdSpec { ports, driver: String::new(), queues: 1, length: 64 })?;
    driver.wait_ready()?;
    driver.start_circulating(4)?;
    std::thread::sleep(Duration::from_secs(1));
    println!(
        "two guests' Mpps, while a wire that is not the switch's flaps, and while the uplink does; flaps; the port's CPU"
    );
    let (mut falls, mut all) = (Vec::new(), [Vec::new(), Vec::new()]);
    for round in 0..rounds {
        let mut rates = [0.0; 2];
        // Which comes first takes turns.
        for at in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            let before = port_time(lab.switch()?.pid())?;
            let (rate, flaps) = while_flapping(&far, [b"other1", b"far0\0\0"][at], &mut driver)?;
            rates[at] = rate;
            all[at].push(rate);
            if at == 1 {
                let spent = (port_time(lab.switch()?.pid())? - before).as_secs_f64();
                print!("{flaps:>3} flaps, {:>5.2} %: ", spent / FLAP_SPAN.as_secs_f64() * 100.0);
            }
        }
        println!("{:.3} {:.3}", rates[0] / 1e6, rates[1] / 1e6);
        falls.push((1.0 - rates[1] / rates[0]) * 100.0);
    }
    let of_means = (1.0 - mean(&all[1]) / mean(&all[0])) * 100.0;
    let (fall, error) = (mean(&falls), standard_error(&falls));
    println!("flapping costs {fall:.1} % (mean of {rounds} pairs, {:.1} % either way at 95 %)", 1.96 * error);
    println!("{:.1} % by their median, {of_means:.1} % of the mean", median(falls));
    lab.switch()?.wait_port("up", "up")
}

/// The guests' rate while a link flaps, and how often it did.
fn while_flapping(far: &Namespace, link: &[u8; 6], driver: &mut Testpmd) -> Result<(f64, u32)> {
    let (flaps, stop) = (AtomicU32::new(0), AtomicBool::new(false));
    let rate = std::thread::scope(|scope| {
        let thread = scope.spawn(|| flap_until(far, link, &stop, &flaps));
        let rate = per_span(driver);
        stop.store(true, Ordering::Relaxed);
        thread.join().map_err(|_| anyhow::anyhow!("the flapping failed"))??;
        rate
    })?;
    Ok((rate, flaps.into_inner()))
}

/// CPU time of the threads that look after uplinks.
fn port_time(pid: u32) -> Result<Duration> {
    let mut spent = Duration::ZERO;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = thread?.path();
        if std::fs::read_to_string(path.join("comm"))?.trim() == "sl-afxdp" {
            let times = std::fs::read_to_string(path.join("schedstat"))?;
            spent += Duration::from_nanos(times.split(' ').next().context("no time")?.parse()?);
        }
    }
    Ok(spent)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Of the mean, from how far the values scatter.
fn standard_error(values: &[f64]) -> f64 {
    let (mean, count) = (mean(values), values.len() as f64);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (count - 1.0) / count).sqrt()
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or_default()
}

fn per_span(driver: &mut Testpmd) -> Result<f64> {
    let received =
        |driver: &mut Testpmd| -> Result<u64> { Ok(driver.counts()?.iter().map(|port| port.rx_frames).sum()) };
    let (before, began) = (received(driver)?, Instant::now());
    std::thread::sleep(FLAP_SPAN);
    Ok((received(driver)? - before) as f64 / began.elapsed().as_secs_f64())
}

/// Takes a link down and up again, twenty times a second, without a process for each.
fn flap_until(space: &Namespace, link: &[u8; 6], stop: &AtomicBool, flaps: &AtomicU32) -> Result<()> {
    let file = File::open(format!("/run/netns/{}", space.name()))?;
    // SAFETY: no pointers; it moves this thread only, which ends here.
    if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    while !stop.load(Ordering::Relaxed) {
        for up in [false, true] {
            set_up(socket.as_raw_fd(), link, up)?;
            std::thread::sleep(Duration::from_millis(25));
        }
        flaps.fetch_add(1, Ordering::Relaxed);
    }
    set_up(socket.as_raw_fd(), link, true)
}

fn set_up(socket: i32, link: &[u8; 6], up: bool) -> Result<()> {
    // SAFETY: an all-zero request is valid; the name fits with its terminator, and the calls read and write the local.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(link) {
            *to = *from as libc::c_char;
        }
        if libc::ioctl(socket, libc::SIOCGIFFLAGS, &raw mut request) == 0 {
            let flag = libc::IFF_UP as libc::c_short;
            request.ifr_ifru.ifru_flags = request.ifr_ifru.ifru_flags & !flag | if up { flag } else { 0 };
            if libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw mut request) == 0 {
                return Ok(());
            }
        }
    }
    Err(std::io::Error::last_os_error().into())
}
