//! AF_XDP ports: an uplink over a network interface of the host, around the kernel's stack.
//!
//! Raw system calls, no library: a socket with four rings for each queue (`ring`, `socket`), over a pool of frames
//! (`umem`) that belongs to that queue alone, so that receiving and sending, and two queues, share nothing. `rx` and
//! `tx` are the two queue traits over them, `program` is the XDP program that feeds the sockets, and `device` knows
//! the interface.
//!
//! A thread for each port watches the interface. It may vanish and return, lose its carrier or change its MTU at any
//! time; workers only ever see the port's link go down and come up.
//!
//! What arrives is taken to be as it was on a wire. The other end of a veth pair has to be told so (`ethtool -K IFACE
//! tx off txvlan off tx-vlan-stag-hw-insert off`): its kernel leaves checksums open and tags aside otherwise, and XDP does not
//! say where.

mod bell;
mod device;
mod mapping;
mod napi;
mod netdev;
mod program;
mod queue;
mod ring;
mod rx;
mod socket;
#[cfg(test)]
mod tests;
mod tx;
mod umem;

use std::io::{Error, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::config::AfxdpMode;
use crate::port::stats::PortStats;
use crate::port::watch::{End, Watch};
use crate::port::{Link, Publisher, netlink};
use crate::status::PortState;
use device::{Channels, Device, Promiscuous, State};
use napi::Deferral;
use netlink::Netlink;
use queue::{Queues, Unsent};
use socket::Socket;
use umem::Umem;

/// Time until the interface is looked at again, whether or not there is news of it.
const LOOK: Duration = Duration::from_millis(500);

/// Time for which no news is looked at once the link is down. One that flaps would keep the workers busy with links.
const PAUSE: Duration = Duration::from_millis(100);

/// What the receiving and the sending half of a queue have in common.
#[derive(Debug)]
struct Queue {
    pair: usize,
    socket: Socket,
    umem: Umem,
    shared: Arc<Shared>,
    stats: Arc<PortStats>,
    unsent: Unsent,
    /// Frames that the driver has refused and that still count as sent.
    refused: AtomicU64,
    /// Frames that the kernel has lost, as far as they are counted.
    missed: AtomicU64,
}

/// What an operator can choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// How frames get to us.
    pub mode: AfxdpMode,
    /// Queues to use; `None` means all that the interface has.
    pub queues: Option<u16>,
    /// Take the place of an XDP program that the interface has.
    pub replace: bool,
    /// Let the workers' own calls poll the driver (`SO_PREFER_BUSY_POLL`).
    pub busy_poll: bool,
    /// Leave checksums to who sends the frame, the driver or the kernel before it; `None` means if the driver says that it
    /// completes them.
    pub tx_checksum: Option<bool>,
}

impl Options {
    /// Those of an interface's queues that are used.
    fn served(&self, channels: Channels) -> Channels {
        channels.first(self.queues.map_or(channels.receive, u32::from))
    }
}

/// What the queues of a port know of it.
#[derive(Debug)]
struct Shared {
    mtu: AtomicUsize,
    multi_buffer: bool,
    busy_poll: bool,
    /// The kernel copies what is sent.
    copies: bool,
    /// Whoever sends completes checksums.
    tx_checksum: bool,
}

impl Shared {
    /// Largest layer-3 packet that the interface takes, in bytes.
    #[inline]
    fn mtu(&self) -> usize {
        self.mtu.load(Ordering::Relaxed)
    }
}

/// A running AF_XDP port. The interface is the kernel's again when it is dropped.
pub struct AfxdpPort {
    _watch: Watch,
}

impl std::fmt::Debug for AfxdpPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AfxdpPort").finish_non_exhaustive()
    }
}

impl AfxdpPort {
    /// Takes the interface over and publishes its queues. If it is not there, or not ready, that happens as soon as it
    /// is.
    ///
    /// # Errors
    /// With advice, if waiting would not help: the interface has a program of somebody else, or we may not.
    pub fn start(
        name: &str,
        interface: &str,
        options: Options,
        publisher: Arc<dyn Publisher>,
    ) -> std::io::Result<Self> {
        let mut watcher = Watcher::new(name, interface, options, publisher)?;
        if let Err(e) = watcher.look()
            && matches!(e.kind(), ErrorKind::AlreadyExists | ErrorKind::PermissionDenied | ErrorKind::InvalidInput)
        {
            return Err(e);
        }
        Ok(Self { _watch: Watch::start("sl-afxdp", move |end| watcher.run(end))? })
    }
}

/// An interface that is ours.
#[derive(Debug)]
struct Uplink {
    index: u32,
    program: u32,
    /// What it had when it was opened, or when that last changed.
    channels: Channels,
    _deferral: Option<Deferral>,
    queues: Queues,
    _promiscuous: Promiscuous,
}

/// Looks after the interface.
struct Watcher {
    name: String,
    interface: String,
    options: Options,
    publisher: Arc<dyn Publisher>,
    device: Device,
    news: Netlink,
    requests: Netlink,
    uplink: Option<Uplink>,
    /// Somebody has put a program in the place of ours. It is theirs until they take it away: two that replace each
    /// other would never end.
    yielded: bool,
    /// What the workers and the log were told last.
    shown: Option<(PortState, String)>,
}

impl Watcher {
    fn new(name: &str, interface: &str, options: Options, publisher: Arc<dyn Publisher>) -> std::io::Result<Self> {
        Ok(Self {
            name: name.into(),
            interface: interface.into(),
            options,
            publisher,
            device: Device::new(interface)?,
            news: Netlink::subscribe()?,
            requests: Netlink::open()?,
            uplink: None,
            yielded: false,
            shown: None,
        })
    }

    fn run(mut self, end: &End) {
        let mut failed = false;
        while !end.has_come() {
            // An attempt to open makes news of its own; one that fails is not repeated for that.
            end.wait((!failed).then_some(&self.news), Some(LOOK));
            self.news.drain();
            if !end.has_come() {
                let was_up = self.is_up();
                failed = self.look().is_err();
                if was_up && !self.is_up() {
                    end.wait(None, Some(PAUSE));
                }
            }
        }
        self.close(PortState::Down, "");
    }

    fn is_up(&self) -> bool {
        matches!(self.shown, Some((PortState::Up, _)))
    }

    /// Brings the port in line with the interface.
    fn look(&mut self) -> std::io::Result<()> {
        let result = self.try_look();
        if let Err(e) = &result {
            self.close(PortState::Down, &e.to_string());
        }
        result
    }

    fn try_look(&mut self) -> std::io::Result<()> {
        let Some(state) = self.device.state()? else {
            self.close(PortState::Connecting, &format!("there is no interface {}", self.interface));
            return Ok(());
        };
        if let Some(uplink) = self.uplink.as_ref().filter(|uplink| !self.is_ours(uplink, &state)) {
            self.yielded = uplink.index == state.index;
            self.close(PortState::Connecting, "the interface was replaced, or its XDP program removed");
            if self.yielded {
                // Whoever replaces it may have none in place for a moment, which is not an invitation.
                return Err(Error::other("the interface's XDP program was removed or replaced"));
            }
        }
        self.follow_queues(&state)?;
        if self.uplink.is_none() {
            self.uplink = Some(self.open(&state)?);
            // Its own coming up is news.
            return self.try_look();
        }
        if let Some(uplink) = &self.uplink {
            uplink.queues.shared.mtu.store(state.mtu, Ordering::Relaxed);
            // Workers do not go on asking for ever.
            uplink.queues.retry();
            uplink.queues.count_missed();
        }
        match state {
            State { is_up: false, .. } => self.show(PortState::Down, "the interface is down"),
            State { is_running: false, .. } => self.show(PortState::Down, "the interface has no carrier"),
            _ => self.show(PortState::Up, ""),
        }
        Ok(())
    }

    /// Whether the interface, and the program on it, are those that were opened. What cannot be found out has not changed.
    fn is_ours(&self, uplink: &Uplink, state: &State) -> bool {
        let same_program = match self.requests.xdp(state.index) {
            Ok(program) => program.is_some_and(|program| program.id == uplink.program),
            Err(e) => e.raw_os_error() != Some(libc::ENODEV),
        };
        uplink.index == state.index && same_program
    }

    /// Lets go of an interface whose queues were changed (`ethtool -L`), to be opened again: what arrives on a new one would
    /// pass the port by.
    fn follow_queues(&mut self, state: &State) -> std::io::Result<()> {
        // A driver may have others, or none, while its link is down.
        let (Some(uplink), true) = (&mut self.uplink, state.is_up && state.is_running) else { return Ok(()) };
        let Some(channels) = self.device.channels().filter(|channels| *channels != uplink.channels) else {
            return Ok(());
        };
        let [before, now] = [uplink.channels, channels].map(|channels| self.options.served(channels));
        if before == now {
            uplink.channels = channels;
            self.warn_of_others(channels);
            return Ok(());
        }
        // The kernel lets go of a queue a moment after its socket is closed, so it is opened with the next look.
        Err(Error::other("the interface has other queues now"))
    }

    /// Tells of queues that go to the kernel.
    fn warn_of_others(&self, channels: Channels) {
        let (has, count, interface) = (channels.receive, self.options.served(channels).receive, &self.interface);
        if count < has {
            tracing::warn!(
                port = self.name,
                "interface {interface} spreads frames over {has} queues, of which the port serves {count}; \
                 the rest goes to the kernel unless 'ethtool -L {interface} combined {count}' is set"
            );
        }
    }

    fn open(&mut self, state: &State) -> std::io::Result<Uplink> {
        self.make_way(state)?;
        let interface = &self.interface;
        self.device.prepare().map_err(|e| explain(&format!("cannot bring up interface {interface}"), &e))?;
        let channels = self.device.channels().unwrap_or(Channels::ONE);
        let (has, served) = (channels.receive, self.options.served(channels));
        let count = served.receive;
        if count > has {
            let problem = format!("interface {interface} has {has} queues, fewer than queues={count}");
            return Err(Error::new(ErrorKind::InvalidInput, problem));
        }
        let promiscuous = Promiscuous::new(state.index)?;
        let (queues, failures) = Queues::open(state.index, served, state.mtu, &self.options, self.publisher.stats())
            .map_err(|e| explain(&format!("cannot open interface {interface} for AF_XDP"), &e))?;
        let program = self.requests.xdp(state.index)?.map_or(0, |program| program.id);
        let deferral = self.defer(state.index);
        self.publisher.stats().connects.fetch_add(1, Ordering::Relaxed);
        tracing::info!(
            port = self.name,
            interface,
            mode = queues.mode,
            queues = count,
            multi_buffer = queues.shared.multi_buffer,
            tx_checksum = queues.shared.tx_checksum,
            rejected = (!failures.is_empty()).then_some(failures),
            "uplink open"
        );
        if self.options.tx_checksum == Some(true) && !queues.shared.tx_checksum {
            let port = &self.name;
            tracing::warn!(port, "the driver of {interface} does not complete checksums, so the switch does");
        }
        self.warn_of_others(channels);
        // A driver may take some for itself while it has a program, which is no change.
        let channels = self.device.channels().unwrap_or(channels);
        Ok(Uplink { index: state.index, program, channels, _deferral: deferral, queues, _promiscuous: promiscuous })
    }

    /// Has the driver wait for our calls, where the kernel can do that; or for nobody's any more.
    fn defer(&self, index: u32) -> Option<Deferral> {
        if !self.options.busy_poll {
            // A kernel that cannot be asked has nothing left behind either.
            let _ = Deferral::end_left(index);
            return None;
        }
        let deferral = Deferral::new(index);
        if let Err(error) = &deferral {
            let port = &self.name;
            tracing::info!(port, %error, "the kernel does not wait for the workers to poll the driver");
        }
        deferral.ok()
    }

    /// Sees to it that the interface has no XDP program.
    fn make_way(&mut self, state: &State) -> std::io::Result<()> {
        let Some(attached) = self.requests.xdp(state.index)? else {
            self.yielded = false;
            return Ok(());
        };
        let interface = &self.interface;
        if !self.options.replace || self.yielded {
            let problem = format!(
                "interface {interface} has an XDP program already (id {}); remove it with \
                 'ip link set dev {interface} xdp off', or add the port with replace=on",
                attached.id
            );
            return Err(Error::new(ErrorKind::AlreadyExists, problem));
        }
        tracing::warn!(port = self.name, interface, program = attached.id, "removing another XDP program (replace=on)");
        match program::detach_foreign_link(state.index) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            // Whose link it is, if it is one, only CAP_SYS_ADMIN may ask, which the sandbox takes away.
            Err(e) if e.kind() == ErrorKind::PermissionDenied => {}
            Err(e) => return Err(e),
        }
        self.requests.clear_xdp(state.index, attached.mode).map_err(|e| match e.kind() {
            ErrorKind::ResourceBusy => {
                let problem = format!(
                    "the XDP program of interface {interface} (id {}) is attached by a link, which only CAP_SYS_ADMIN may \
                     detach, and the sandbox takes that away; use 'bpftool link detach id'",
                    attached.id
                );
                Error::new(ErrorKind::AlreadyExists, problem)
            }
            _ => explain(&format!("cannot remove the XDP program of interface {interface}"), &e),
        })
    }

    /// Tells the workers and the log, if it is news.
    fn show(&mut self, state: PortState, reason: &str) {
        if self.shown.as_ref().is_some_and(|shown| *shown == (state, reason.to_owned())) {
            return;
        }
        let link = match &self.uplink {
            Some(uplink) if state == PortState::Up => uplink.queues.link(),
            _ => Link::down(state, (!reason.is_empty()).then(|| reason.into())),
        };
        self.publisher.publish(link);
        let (port, interface) = (&self.name, &self.interface);
        match state {
            PortState::Up => tracing::info!(port, interface, "uplink up"),
            _ if reason.is_empty() => {}
            _ => tracing::warn!(port, interface, reason, "uplink down"),
        }
        self.shown = Some((state, reason.into()));
    }

    /// Takes the queues from the workers and closes them.
    fn close(&mut self, state: PortState, reason: &str) {
        self.show(state, reason);
        let Some(uplink) = self.uplink.take() else { return };
        uplink.queues.count_missed();
        for (queue, [to_receive, to_send]) in uplink.queues.audit().iter().enumerate() {
            if to_receive.is_balanced() && to_send.is_balanced() {
                tracing::info!(port = self.name, queue, %to_receive, %to_send, "all frames of the pool accounted for");
            } else {
                tracing::error!(port = self.name, queue, ?to_receive, ?to_send, "frames of the pool not accounted for");
            }
        }
    }
}

fn explain(what: &str, e: &Error) -> Error {
    let hint = match e.kind() {
        ErrorKind::PermissionDenied => "; run as root, or with CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF",
        ErrorKind::ResourceBusy => "; another socket has a queue of it open",
        _ => "",
    };
    Error::new(e.kind(), format!("{what}: {e}{hint}"))
}
