//! Tap ports: the host's own stack as a station.
//!
//! The tap carries virtio-net headers (`IFF_VNET_HDR`), so super-packets and partial checksums pass in both directions.
//!
//! A thread for each port sleeps until there is news of the host's interfaces, and looks whether its own is still there.

mod device;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::frame::{Burst, BurstStorage};
use crate::limits::MAX_FRAME;
use crate::mem::SourceSegment;
use crate::port::netlink::Netlink;
use crate::port::stats::PortStats;
use crate::port::watch::{End, Watch};
use crate::port::{Link, Publisher, RxEntry, RxQueue, TxQueue};
use crate::status::PortState;
use crate::switch::DropReason;
use crate::switch::convert::{Accepts, Scratch};
use crate::sync::{SpinLock, lock};
use crate::virtq::Fault;
use crate::wire::offload::Offload;
use device::Tap;

/// Length of the virtio-net header that the tap is asked to use.
const HEADER: usize = 12;
/// Frames read at a time. Each has a buffer of its own, of the size of a super-packet.
const READS: usize = 16;

/// Time until it is looked whether an interface that was removed is back.
const LOOK: Duration = Duration::from_secs(1);

/// A running tap port. The interface goes when it is dropped, if it was made by us.
pub struct TapPort {
    interface: String,
    mtu: Option<u16>,
    tap: Arc<Mutex<Arc<Tap>>>,
    _watch: Watch,
}

impl std::fmt::Debug for TapPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TapPort").finish_non_exhaustive()
    }
}

impl TapPort {
    /// Opens the interface, made if need be, brings it up and publishes it.
    ///
    /// # Errors
    /// If the kernel refuses, with advice.
    pub fn start(interface: &str, mtu: Option<u16>, publisher: Arc<dyn Publisher>) -> std::io::Result<Self> {
        Self::with(Tap::open(interface, mtu)?, interface, mtu, publisher)
    }

    /// As [`TapPort::start`] for an interface that another process had open, by its descriptor.
    ///
    /// # Errors
    /// If it is another's.
    pub fn adopt(
        fd: OwnedFd,
        interface: &str,
        mtu: Option<u16>,
        publisher: Arc<dyn Publisher>,
    ) -> std::io::Result<Self> {
        Self::with(Tap::adopt(fd, interface)?, interface, mtu, publisher)
    }

    fn with(tap: Tap, interface: &str, mtu: Option<u16>, publisher: Arc<dyn Publisher>) -> std::io::Result<Self> {
        let (tap, news) = (Arc::new(Mutex::new(Arc::new(tap))), Netlink::subscribe()?);
        let watcher = Watcher { interface: interface.into(), mtu, publisher, tap: tap.clone(), news, problem: None };
        watcher.publish();
        let watch = Watch::start("sl-tap", move |end| watcher.run(end))?;
        Ok(Self { interface: interface.into(), mtu, tap, _watch: watch })
    }

    /// Gives an adopted interface the MTU that it is to have. Not before the other process has let go of it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_mtu(&self) -> std::io::Result<()> {
        self.mtu.map_or(Ok(()), |mtu| device::set_mtu(&self.interface, mtu))
    }

    /// The descriptor, duplicated, for another process to adopt. `None` if the host has removed the interface, or renamed
    /// it: what the port is to have is made anew then.
    ///
    /// # Errors
    /// If this process has no descriptors left.
    pub fn duplicate(&self) -> std::io::Result<Option<OwnedFd>> {
        let tap = current(&self.tap);
        let is_there = tap.is(&self.interface).unwrap_or(false);
        is_there.then(|| tap.duplicate()).transpose()
    }
}

fn current(tap: &Mutex<Arc<Tap>>) -> Arc<Tap> {
    lock(tap).clone()
}

/// Looks after the interface, which the host may remove.
struct Watcher {
    interface: String,
    mtu: Option<u16>,
    publisher: Arc<dyn Publisher>,
    tap: Arc<Mutex<Arc<Tap>>>,
    news: Netlink,
    /// Why there is no interface.
    problem: Option<String>,
}

impl Watcher {
    fn run(mut self, end: &End) {
        while !end.has_come() {
            self.look();
            // An attempt to open makes news of its own.
            match self.problem {
                None => end.wait(Some(&self.news), None),
                Some(_) => end.wait(None, Some(LOOK)),
            }
            self.news.drain();
        }
        self.publisher.publish(Link::down(PortState::Down, None));
        self.publisher.forget_stations();
    }

    fn look(&mut self) {
        let problem = if self.problem.is_none() {
            current(&self.tap).is(&self.interface).err().map(|_| "the interface was removed".into())
        } else if !device::exists(&self.interface) {
            // Who has removed it may not want it back, so it is not made anew.
            return;
        } else {
            self.reopen().err().map(|e| e.to_string())
        };
        if self.problem != problem {
            self.problem = problem;
            self.publish();
            let interface = &self.interface;
            match &self.problem {
                Some(reason) => tracing::warn!(interface, reason, "tap down"),
                None => tracing::info!(interface, "tap up again"),
            }
        }
    }

    fn reopen(&self) -> std::io::Result<()> {
        let tap = Arc::new(Tap::open(&self.interface, self.mtu)?);
        *lock(&self.tap) = tap;
        Ok(())
    }

    /// Tells the workers how it is.
    fn publish(&self) {
        let link = Link::down(PortState::Down, self.problem.clone());
        if self.problem.is_some() {
            return self.publisher.publish(link);
        }
        let (tap, stats) = (current(&self.tap), self.publisher.stats().clone());
        let buffers = (0..READS).map(|_| vec![0; HEADER + MAX_FRAME].into_boxed_slice()).collect();
        let rx = TapRx { tap: tap.clone(), buffers: SpinLock::new(buffers), stats: stats.clone() };
        self.publisher.publish(Link {
            state: PortState::Up,
            rx: vec![RxEntry { pair: 0, queue: Arc::new(rx) }],
            tx: vec![Arc::new(TapTx { tap, stats })],
            ..link
        });
    }
}

/// Frames that the host sends.
#[derive(Debug)]
struct TapRx {
    tap: Arc<Tap>,
    buffers: SpinLock<Vec<Box<[u8]>>>,
    stats: Arc<PortStats>,
}

impl RxQueue for TapRx {
    fn poll(&self, storage: &mut BurstStorage, forward: &mut dyn FnMut(&mut Burst<'_>)) -> Result<usize, Fault> {
        // Asking the kernel costs more than a look at a ring, so it is asked only when it has something.
        let Some(mut buffers) = self.buffers.try_lock() else { return Ok(0) };
        let mut taken = 0;
        let mut lengths = [0usize; READS];
        for (length, buffer) in lengths.iter_mut().zip(buffers.iter_mut()) {
            match self.tap.read(buffer) {
                Some(count) => *length = count,
                None => break,
            }
            taken += 1;
        }
        if taken == 0 {
            return Ok(0);
        }
        let mut burst = storage.begin();
        let mut bytes = 0;
        for (length, buffer) in lengths.iter().zip(buffers.iter()).take(taken) {
            let mut frame = burst.start(HEADER);
            let fits = frame.push(SourceSegment::from_slice(buffer.get(..*length).unwrap_or_default()));
            match if fits { frame.finish() } else { frame.refuse() } {
                Ok(len) => bytes += len as u64,
                Err(reason) => self.stats.refuse(&burst, reason),
            }
        }
        self.stats.rx(0).add(burst.count() as u64, bytes);
        if burst.count() > 0 {
            forward(&mut burst);
        }
        Ok(taken)
    }

    fn arm(&self) -> bool {
        // The descriptor stays readable while there is something to read: nothing can be missed.
        false
    }

    fn disarm(&self) {}

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.as_fd())
    }

    fn drain_event(&self) {}

    fn copies(&self) -> u64 {
        1
    }
}

/// Frames for the host.
#[derive(Debug)]
struct TapTx {
    tap: Arc<Tap>,
    stats: Arc<PortStats>,
}

/// What a tap takes, which is everything the kernel knows.
const HOST: Accepts = Accepts { csum: true, tso4: true, tso6: true, ecn: true, uso4: false, uso6: false };

impl TapTx {
    fn write(&self, offload: Offload, head: &[u8], tail: &[SourceSegment<'_>]) -> Result<u64, DropReason> {
        let header = offload.to_virtio(0).to_bytes();
        let len = head.len() + tail.iter().map(|piece| piece.len()).sum::<usize>();
        self.tap.write(&header, head, tail).map(|()| len as u64)
    }
}

impl TxQueue for TapTx {
    fn send(&self, burst: &Burst<'_>, frames: &[u8], scratch: &mut Scratch) -> Result<(), Fault> {
        let stats = &self.stats;
        let (mut count, mut bytes) = (0, 0);
        let Scratch { rebuilt, outcomes, copies, .. } = scratch;
        let mut account = |place, outcome: Result<u64, DropReason>| match outcome {
            Ok(len) => {
                count += 1;
                bytes += len;
            }
            Err(reason) => outcomes.count_dropped(stats, &[place], reason),
        };
        for &place in frames {
            let frame = burst.frame(place);
            if HOST.takes(frame.offload()) {
                account(place, self.write(*frame.offload(), frame.head(), burst.tail(frame)));
                continue;
            }
            let mut outcomes = 0u64;
            let converted = rebuilt.convert(burst, frame, HOST, |offload, head, payload| {
                copies.extra += 1;
                outcomes += 1;
                account(place, self.write(offload, head, &[SourceSegment::from_slice(payload)]));
                true
            });
            if !converted {
                outcomes += 1;
                account(place, Err(DropReason::CannotConvert));
            }
            stats.make_frames(outcomes.saturating_sub(1));
        }
        // Several workers may send to the host at once.
        stats.tx(0).add_shared(count, bytes);
        copies.delivered += count;
        Ok(())
    }

    fn prefers(&self) -> Accepts {
        HOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Told;
    use crate::wire::offload::VirtioNetHdr;

    /// A super-packet of UDP with three datagrams of 100 bytes, with its virtio-net header.
    fn three_datagrams() -> Vec<u8> {
        let mut bytes = vec![1, 5, 42, 0, 100, 0, 34, 0, 6, 0, 0, 0];
        bytes.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
        bytes.extend([0x45, 0, 1, 72, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        bytes.extend([0, 80, 1, 0, 1, 52]);
        bytes.extend(crate::wire::checksum::Sum::pseudo_v4([10, 0, 0, 1], [10, 0, 0, 2], 17, 308).fold().to_be_bytes());
        bytes.extend([7; 300]);
        bytes
    }

    /// Runs a test in a network of its own. As root.
    fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(|| {
            // SAFETY: no pointers are passed; it changes this thread only.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "this test runs as root");
            test();
        });
        thread.join().unwrap();
    }

    fn ip(arguments: &str) {
        assert!(
            std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap().success(),
            "ip {arguments}"
        );
    }

    #[test]
    fn frames_for_an_interface_that_was_removed_find_the_link_down() {
        in_a_namespace(|| {
            let tap = Tap::open("t0", None).unwrap();
            let write = || tap.write(&[0; HEADER], &[2; 60], &[]);
            assert!(write().is_ok() && tap.is("t0").unwrap());
            ip("link set t0 down");
            assert_eq!(write(), Err(DropReason::LinkDown));
            ip("link set t0 name t1");
            assert!(!tap.is("t0").unwrap());
            ip("link del t1");
            assert_eq!(write(), Err(DropReason::LinkDown));
            assert!(tap.is("t1").is_err());
        });
    }

    #[test]
    fn an_interface_may_be_removed_and_return() {
        in_a_namespace(|| {
            let told = Arc::new(Told::default());
            let port = TapPort::start("t0", Some(1400), told.clone()).unwrap();
            assert_eq!(told.state(), Some((PortState::Up, None)));
            assert!(port.duplicate().unwrap().is_some());
            ip("link del t0");
            told.wait_for(PortState::Down);
            assert_eq!(told.state(), Some((PortState::Down, Some("the interface was removed".into()))));
            assert!(port.duplicate().unwrap().is_none());
            // What is no tap is not for us.
            ip("link add name t0 type veth peer name t1");
            std::thread::sleep(LOOK * 3 / 2);
            let (state, reason) = told.state().unwrap();
            assert!(
                state == PortState::Down && reason.as_ref().is_some_and(|why| why.contains("cannot open tap")),
                "{reason:?}"
            );
            ip("link del t0");
            ip("tuntap add t0 mode tap");
            told.wait_for(PortState::Up);
            assert!(port.duplicate().unwrap().is_some());
            drop(port);
            assert_eq!(told.state(), Some((PortState::Down, None)));
        });
    }

    #[test]
    fn datagrams_that_are_made_here_are_counted() {
        in_a_namespace(|| {
            let (tap, stats) = (Arc::new(Tap::open("t0", None).unwrap()), Arc::new(PortStats::default()));
            let (mut storage, mut scratch) = (BurstStorage::default(), Scratch::default());
            let mut burst = storage.begin();
            let mut frame = burst.start(VirtioNetHdr::LEN);
            let bytes = three_datagrams();
            assert!(frame.push(SourceSegment::from_slice(&bytes)) && frame.finish().is_ok());
            TapTx { tap, stats: stats.clone() }.send(&burst, &[0], &mut scratch).unwrap();
            // One has come, three have gone.
            assert_eq!((stats.tx(0).read().0, stats.made()), (3, 2));
        });
    }
}
