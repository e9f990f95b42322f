//! The batch path: a burst comes in from one port, is decided on, and goes out to its destinations.

use std::ops::Range;
use std::sync::Arc;

use crate::capture::{Direction, Outcomes};
use crate::frame::{Burst, BurstStorage, ETHERNET_HEADER, Frame, Likeness};
use crate::limits::{BURST, MAX_FRAME, MAX_PORTS};
use crate::mem::SourceSegment;
use crate::port::PortId;
use crate::port::vhost::hold::Label;
use crate::status::PortState;
use crate::switch::DropReason;
use crate::switch::convert::{Accepts, Scratch};
use crate::switch::fdb::{Fdb, Learned, Station};
use crate::switch::gro;
use crate::switch::pairs::{Pair, Pairs, Path};
use crate::switch::snapshot::{Announcement, PortView, Snapshot};
use crate::switch::vlan::VlanPolicy;
use crate::wire::flow::flow_hash;
use crate::wire::offload::VirtioNetHdr;
use crate::wire::rarp;
use crate::worker::meter::{Copies, Probe, Stage};

const MULTICAST: u64 = 1 << 40;

/// Frames of a burst, by their places.
#[derive(Debug, Clone, Copy)]
struct Places {
    count: u8,
    items: [u8; BURST],
}

impl Places {
    const EMPTY: Self = Self { count: 0, items: [0; BURST] };

    #[inline]
    fn push(&mut self, place: u8) {
        if let Some(item) = self.items.get_mut(usize::from(self.count)) {
            *item = place;
            self.count += 1;
        }
    }

    /// Adds `count` places from `first` on.
    #[inline]
    fn push_run(&mut self, first: u8, count: u8) {
        let begin = usize::from(self.count);
        if let Some(items) = self.items.get_mut(begin..begin + usize::from(count)) {
            for (offset, item) in (0u8..).zip(items) {
                *item = first.wrapping_add(offset);
            }
            self.count += count;
        }
    }

    /// Merges segments of the wire, for a receiver that prefers super-packets.
    fn coalesce(&mut self, burst: &mut Burst<'_>, shared: u64, prefers: Accepts) {
        if !(prefers.tso4 || prefers.tso6) {
            return;
        }
        if let Some(items) = self.items.get_mut(..usize::from(self.count)) {
            self.count = gro::coalesce(burst, items, shared, prefers) as u8;
        }
    }

    #[inline]
    fn as_slice(&self) -> &[u8] {
        self.items.get(..usize::from(self.count)).unwrap_or_default()
    }
}

/// Frames in a row that go to one port, as most of a burst do: from `first` on.
#[derive(Debug, Clone, Copy)]
struct Run {
    to: PortId,
    first: u8,
    /// Frames that begin like this belong to it, in this VLAN.
    alike: Likeness,
    vid: u16,
}

impl Run {
    /// Nobody gets any frames, up to `next`.
    #[inline]
    fn before(next: u8) -> Self {
        const { assert!(MAX_PORTS < u16::MAX as usize) };
        Self { to: PortId(u16::MAX), first: next, alike: Likeness::NONE, vid: 0 }
    }

    /// Frames from `first` to this one, which goes that way.
    #[inline]
    fn up_to(frame: &Frame, first: u8, path: Path) -> Self {
        let likeness = frame.likeness();
        // What a tagged frame begins with does not tell its VLAN.
        let alike = if likeness.is_tagged() { Likeness::NONE } else { likeness };
        Self { to: path.egress, first, alike, vid: path.vid }
    }
}

/// A worker's own tools for switching bursts. Allocates only when made.
#[derive(Debug)]
pub struct Forwarder {
    fdb: Arc<Fdb>,
    /// Frames for each port, by port id.
    lists: Box<[Places]>,
    /// Ports that have any.
    touched: Vec<PortId>,
    /// Bits of the frames of a burst that go to more than one port.
    shared: u64,
    /// Bits of those that go to all, however many that are.
    flooded: u64,
    /// What was decided on the frames of a burst. Not the scratch's: frames that were held are sent in between.
    arrivals: Outcomes,
    scratch: Scratch,
    pairs: Pairs,
    /// For frames that were held, delivered in the midst of another burst.
    spare: Option<Box<BurstStorage>>,
}

impl Forwarder {
    /// Tools for one worker.
    pub fn new(fdb: Arc<Fdb>) -> Self {
        Self {
            fdb,
            lists: vec![Places::EMPTY; MAX_PORTS].into_boxed_slice(),
            touched: Vec::with_capacity(MAX_PORTS),
            shared: 0,
            flooded: 0,
            arrivals: Outcomes::default(),
            scratch: Scratch::default(),
            pairs: Pairs::default(),
            spare: Some(Box::default()),
        }
    }

    /// What the worker measures itself with.
    #[inline]
    pub fn meters(&mut self) -> (&mut Probe, &mut Copies) {
        (&mut self.scratch.probe, &mut self.scratch.copies)
    }

    /// Switches a burst that came from `ingress`.
    pub fn forward(&mut self, snapshot: &Snapshot, ingress: &PortView, burst: &mut Burst<'_>) {
        self.scratch.probe.enter(Stage::Classify);
        self.pairs.refresh(snapshot, &self.fdb);
        (self.shared, self.flooded) = (0, 0);
        let offered = burst.count() as u8;
        let mut count = offered;
        if let Some(policer) = &ingress.policers.rx {
            let admitted = policer.admit((0..count).map(|place| burst.frame(place).len()));
            if admitted < count {
                ingress.stats.drop_frames(DropReason::RateRx, u64::from(count - admitted));
                count = admitted;
            }
        }
        self.arrivals.clear();
        self.classify(snapshot, ingress, burst, count);
        if ingress.stats.capture.is_on() {
            self.record_arrival(ingress, burst, offered, count);
        }
        self.scratch.probe.enter(Stage::Deliver);
        let mut unchanged = ingress.is_plain();
        for index in 0..self.touched.len() {
            let id = self.touched[index];
            let list = std::mem::replace(&mut self.lists[usize::from(id.0) % MAX_PORTS], Places::EMPTY);
            if let Some(egress) = snapshot.port(id) {
                // The shortcut is over once a frame has been changed for somebody.
                unchanged &= egress.is_plain();
                self.deliver(snapshot, ingress, egress, burst, list, unchanged);
            }
        }
        self.touched.clear();
        self.scratch.probe.enter(Stage::Publish);
    }

    /// Shows a burst, of which the first `admitted` frames were switched, to who looks at the port.
    #[cold]
    fn record_arrival(&mut self, ingress: &PortView, burst: &Burst<'_>, offered: u8, admitted: u8) {
        let mut all = Places::EMPTY;
        (0..offered).for_each(|place| all.push(place));
        (admitted..offered).for_each(|place| self.arrivals.dropped(place, DropReason::RateRx));
        let outcomes = &self.arrivals;
        ingress.stats.capture.record(burst, all.as_slice(), Direction::Rx, |place| outcomes.reason(place));
    }

    /// Sends, as if it came from the port, what a station would to make itself known.
    pub fn announce(&mut self, snapshot: &Snapshot, storage: &mut BurstStorage, announcement: &Announcement) {
        let Some(port) = snapshot.port(announcement.port) else { return };
        let request = rarp::request(announcement.mac);
        let mut burst = storage.begin();
        let mut frame = burst.start(VirtioNetHdr::LEN);
        let pieces = [&[0; VirtioNetHdr::LEN][..], &request];
        if pieces.into_iter().all(|piece| frame.push(SourceSegment::from_slice(piece))) && frame.finish().is_ok() {
            port.stats.make_frames(1);
            self.forward(snapshot, port, &mut burst);
        }
    }

    /// Delivers what was held for guests whose rings run again, or that were heard elsewhere before they could receive there.
    pub fn release_returned(&mut self, snapshot: &Snapshot) {
        for port in snapshot.holding.iter().filter_map(|id| snapshot.port(*id)) {
            if port.link.receives() {
                self.release(snapshot, port, |_| Some(port));
            } else {
                self.release_moved(snapshot, port);
            }
        }
    }

    /// Delivers what is held at a port for stations that were heard elsewhere since.
    fn release_moved(&mut self, snapshot: &Snapshot, from: &PortView) {
        // The time of an empty one runs on.
        if from.link.hold.as_ref().is_none_or(|hold| hold.is_empty()) {
            return;
        }
        let (fdb, network) = (self.fdb.clone(), from.network);
        self.release(snapshot, from, |Label { mac, vlan, is_flooded }| {
            let now =
                fdb.lookup(Station { mac, vid: vlan.vid, network }).filter(|now| *now != from.id && !is_flooded)?;
            snapshot.port(now).filter(|now| now.network == network)
        });
    }

    /// Delivers what is held at a port, as far as `whither` knows a port for it. What moved on meanwhile is looked for when
    /// the next snapshot comes.
    #[cold]
    fn release<'s>(
        &mut self,
        snapshot: &'s Snapshot,
        from: &PortView,
        whither: impl Fn(Label) -> Option<&'s PortView>,
    ) {
        let Some(hold) = &from.link.hold else { return };
        // Where nothing can be delivered it is held again, if not in the same place.
        let receives = |to: &&PortView| to.link.receives() || (to.link.hold.is_some() && to.id != from.id);
        let Some(mut storage) = self.spare.take() else { return };
        // Those of the burst at hand are not those of what is delivered in its midst.
        let flooded = std::mem::take(&mut self.flooded);
        let whither = |label| whither(label).filter(receives);
        hold.release(whither, |to, vlan, bytes| {
            let mut burst = storage.begin();
            let mut frame = burst.start(VirtioNetHdr::LEN);
            if frame.push(SourceSegment::from_slice(bytes)) && frame.finish().is_ok() {
                burst.frame_mut(0).set_vlan(vlan);
                let mut only = Places::EMPTY;
                only.push(0);
                self.deliver(snapshot, to, to, &mut burst, only, false);
            }
        });
        (self.spare, self.flooded) = (Some(storage), flooded);
    }

    /// Decides on the first `count` frames and notes them for their destinations, each in order.
    fn classify(&mut self, snapshot: &Snapshot, ingress: &PortView, burst: &mut Burst<'_>, count: u8) {
        let (mut run, mut next) = (Run::before(0), 0);
        loop {
            let (end, known) = self.follow(ingress, burst, run, next, count);
            if end >= count {
                break;
            }
            next = end + 1;
            let Some(path) = known.or_else(|| self.settle(snapshot, ingress, burst, end, run)) else {
                run = Run::before(next);
                continue;
            };
            let frame = burst.frame_mut(end);
            frame.vid = path.vid;
            let mut first = run.first;
            if path.egress != run.to {
                self.note(run.to, run.first..end);
                first = end;
            }
            run = Run::up_to(frame, first, path);
        }
        self.note(run.to, run.first..count);
    }

    /// Follows frames from `next` on for as long as they are known to belong to the run. Returns the place of the first that
    /// does not, and where that goes if it is known. Few variables, and hardly ever a call: nearly all frames pass through this.
    #[inline]
    fn follow(&self, ingress: &PortView, burst: &mut Burst<'_>, run: Run, next: u8, count: u8) -> (u8, Option<Path>) {
        let longest = ingress.mtu + ETHERNET_HEADER;
        let any_length = longest >= MAX_FRAME;
        let untagged = self.pairs.origin(ingress.id, None);
        let Run { to, mut alike, mut vid, .. } = run;
        for place in next..count.min(BURST as u8) {
            let frame = burst.frame_mut(place);
            let likeness = frame.likeness();
            if !any_length && frame.len() > longest {
                return (place, None);
            }
            // Most of a burst belongs to one flow.
            if likeness != alike {
                let known = if likeness.is_tagged() {
                    // What a tagged frame begins with does not tell its VLAN, which `vid` becomes.
                    alike = Likeness::NONE;
                    self.pairs.get(Pair { likeness, origin: self.pairs.origin(ingress.id, frame.tag()) })
                } else {
                    alike = likeness;
                    self.pairs.get(Pair { likeness, origin: untagged })
                };
                match known {
                    Some(path) if path.egress == to => vid = path.vid,
                    _ => return (place, known),
                }
            }
            frame.vid = vid;
        }
        (count, None)
    }

    /// Decides on a frame whose pair is not known. Returns where it goes if that is one port; else all is done, for the
    /// frames of `run` as well.
    #[inline(never)]
    fn settle(
        &mut self,
        snapshot: &Snapshot,
        ingress: &PortView,
        burst: &mut Burst<'_>,
        place: u8,
        run: Run,
    ) -> Option<Path> {
        let frame = burst.frame_mut(place);
        let pair = Pair { likeness: frame.likeness(), origin: self.pairs.origin(ingress.id, frame.tag()) };
        let decision = self.decide(snapshot, ingress, frame, pair);
        if let Ok(Some(path)) = decision {
            return Some(path);
        }
        let vid = frame.vid;
        // Order is kept for each destination.
        self.note(run.to, run.first..place);
        if let Err(reason) = decision.and_then(|_| self.flood(snapshot, ingress, vid, place)) {
            ingress.stats.drop_frames(reason, 1);
            self.arrivals.dropped(place, reason);
        }
        None
    }

    /// Where a frame goes, and the others of its pair; `None` for all, in the frame's VLAN.
    fn decide(
        &mut self,
        snapshot: &Snapshot,
        ingress: &PortView,
        frame: &mut Frame,
        pair: Pair,
    ) -> Result<Option<Path>, DropReason> {
        let vid = ingress.vlan.ingress(frame.tag()).ok_or(DropReason::VlanDenied)?;
        frame.vid = vid;
        if !frame.fits(ingress.mtu) {
            return Err(DropReason::MtuIngress);
        }
        let (source, destination) = (frame.source(), frame.destination());
        if source & MULTICAST != 0 || ingress.only_source.is_some_and(|only| only != source) {
            return Err(DropReason::Spoofed);
        }
        if is_reserved(destination) {
            return Err(DropReason::Reserved);
        }
        let (learned, to) = self.find(snapshot, ingress, source, destination, vid);
        let Some(egress) = to else { return Ok(None) };
        if egress == ingress.id {
            return Err(DropReason::SamePort);
        }
        let path = Path { egress, vid };
        if learned == Learned::Yes {
            self.pairs.put(pair, path);
        }
        Ok(Some(path))
    }

    /// Learns where the source is and looks up where the destination is; `None` for all.
    fn find(
        &mut self,
        snapshot: &Snapshot,
        ingress: &PortView,
        source: u64,
        destination: u64,
        vid: u16,
    ) -> (Learned, Option<PortId>) {
        let network = ingress.network;
        let station = Station { mac: source, vid, network };
        // Two ports have the same address configured while its guest migrates between them: it is where it speaks.
        let mut learned = self.fdb.learn(station, ingress.id);
        if learned == Learned::Elsewhere {
            learned = self.claim(snapshot, ingress, station);
        }
        if let Learned::Moved(before) = learned
            && let Some(before) = snapshot.port(before).filter(|before| before.network == network)
        {
            // In all VLANs that it may be in there, of which it will hardly be heard in each.
            self.release(snapshot, before, |Label { mac, vlan, is_flooded }| {
                let is_its = mac == source && !is_flooded && ingress.vlan.egress(vlan.vid).is_some();
                is_its.then_some(ingress)
            });
        }
        let known = if destination & MULTICAST == 0 {
            self.fdb.lookup(Station { mac: destination, vid, network })
        } else {
            None
        };
        // An entry can outlive a change by a moment; membership is what counts.
        let to = known.filter(|id| snapshot.port(*id).is_some_and(|egress| egress.network == network));
        (learned, to)
    }

    /// Lets a station be here that is configured to be elsewhere, if it may.
    #[cold]
    fn claim(&self, snapshot: &Snapshot, ingress: &PortView, station: Station) -> Learned {
        if ingress.mac == Some(station.mac) {
            return self.fdb.insert(station, ingress.id, true);
        }
        // Its guest has gone to another host, and is not just having a ring changed. A port that has an address of its own leads
        // to none.
        let home = self.fdb.lookup(station).filter(|_| ingress.mac.is_none());
        let is_there = |home| snapshot.port(home).is_some_and(|home| home.link.state == PortState::Up);
        if let Some(home) = home.filter(|home| !is_there(*home)) {
            return self.fdb.displace(station, home, ingress.id);
        }
        Learned::Elsewhere
    }

    fn flood(&mut self, snapshot: &Snapshot, ingress: &PortView, vid: u16, place: u8) -> Result<(), DropReason> {
        let members = snapshot.networks.get(usize::from(ingress.network)).ok_or(DropReason::NoDestination)?;
        let mut count = 0;
        self.flooded |= 1 << (u32::from(place) % u64::BITS);
        for &id in members {
            let Some(egress) = snapshot.port(id).filter(|egress| egress.id != ingress.id) else { continue };
            if egress.vlan.egress(vid).is_some() {
                self.note(id, place..place + 1);
                count += 1;
            }
        }
        if count > 1 {
            ingress.stats.make_frames(count - 1);
            self.shared |= 1 << (u32::from(place) % u64::BITS);
        }
        if count > 0 { Ok(()) } else { Err(DropReason::NoDestination) }
    }

    /// Notes frames for their destination.
    #[inline]
    fn note(&mut self, to: PortId, places: Range<u8>) {
        if places.is_empty() {
            return;
        }
        let list = &mut self.lists[usize::from(to.0) % MAX_PORTS];
        if list.count == 0 {
            self.touched.push(to);
        }
        list.push_run(places.start, places.end - places.start);
    }

    /// Hands frames to a port's queues, in the form that it takes.
    fn deliver(
        &mut self,
        snapshot: &Snapshot,
        ingress: &PortView,
        egress: &PortView,
        burst: &mut Burst<'_>,
        list: Places,
        unchanged: bool,
    ) {
        let Some(first) = egress.link.tx.first().filter(|_| egress.stats.fault().is_none()) else {
            if let Some(hold) = egress.link.hold.as_ref().filter(|_| !egress.link.receives()) {
                self.scratch.copies.extra += u64::from(list.count);
                hold.keep(burst, list.as_slice(), self.flooded);
                // Who heard a station elsewhere since this burst was decided on has delivered only what was held before.
                if self.pairs.is_outdated(&self.fdb) {
                    self.release_moved(snapshot, egress);
                }
                return;
            }
            return refuse(egress, burst, list.as_slice(), DropReason::LinkDown);
        };
        let mut ready = if unchanged { list } else { adapt(egress, burst, &list) };
        if let Some(policer) = &egress.policers.tx {
            let admitted = policer.admit(ready.as_slice().iter().map(|place| burst.frame(*place).len()));
            if admitted < ready.count {
                refuse(
                    egress,
                    burst,
                    ready.as_slice().get(usize::from(admitted)..).unwrap_or_default(),
                    DropReason::RateTx,
                );
                ready.count = admitted;
            }
        }
        if ingress.link.is_wire && ready.count > 1 {
            let before = ready.count;
            ready.coalesce(burst, self.shared, first.prefers());
            if ready.count < before {
                egress.stats.merge_frames(u64::from(before - ready.count));
            }
        }
        let captured = egress.stats.capture.is_on();
        if captured {
            self.scratch.outcomes.clear();
        }
        if egress.link.tx.len() == 1 {
            self.send(egress, first.as_ref(), burst, ready);
        } else {
            self.spread(egress, burst, ready);
        }
        if captured {
            let outcomes = &self.scratch.outcomes;
            egress.stats.capture.record(burst, ready.as_slice(), Direction::Tx, |place| outcomes.reason(place));
        }
    }

    fn send(&mut self, egress: &PortView, queue: &dyn crate::port::TxQueue, burst: &Burst<'_>, list: Places) {
        if list.count == 0 {
            return;
        }
        if let Err(fault) = queue.send(burst, list.as_slice(), &mut self.scratch) {
            egress.stats.set_fault(fault);
        }
        self.scratch.probe.enter(Stage::Deliver);
    }

    /// Spreads frames over a port's queues so that a flow, in both directions, keeps to one.
    fn spread(&mut self, egress: &PortView, burst: &Burst<'_>, list: Places) {
        let queues = &egress.link.tx;
        let mut chosen = [0u16; BURST];
        for (slot, &place) in chosen.iter_mut().zip(list.as_slice()) {
            let hash = u64::from(flow_hash(burst.frame(place).head()));
            *slot = ((hash * queues.len() as u64) >> 32) as u16;
        }
        let mut left = list;
        while let Some(queue) = chosen.get(..usize::from(left.count)).and_then(|slots| slots.first()).copied() {
            let (mut these, mut others, mut others_chosen) = (Places::EMPTY, Places::EMPTY, [0u16; BURST]);
            for (&slot, &place) in chosen.iter().zip(left.as_slice()) {
                if slot == queue {
                    these.push(place);
                } else {
                    others_chosen[usize::from(others.count)] = slot;
                    others.push(place);
                }
            }
            if let Some(queue) = queues.get(usize::from(queue)) {
                self.send(egress, queue.as_ref(), burst, these);
            }
            (left, chosen) = (others, others_chosen);
        }
    }
}

/// Whether a group is for bridges alone, which do not pass it on (IEEE 802.1Q, table 8-1, and Cisco's of that kind): from a guest,
/// such a frame could have the next switch shut the host's port, or stop sending; of a wire, it is none of the guests' business.
fn is_reserved(destination: u64) -> bool {
    const STANDARD: u64 = 0x0180_c200_0000;
    const CISCO: u64 = 0x0100_0ccc_ccc0;
    matches!(destination & !0xf, STANDARD | CISCO)
}

/// Brings frames into the form that a port takes; returns those that may pass.
fn adapt(egress: &PortView, burst: &mut Burst<'_>, list: &Places) -> Places {
    let mut ready = Places::EMPTY;
    for &place in list.as_slice() {
        let Err(reason) = prepare(egress, burst.frame_mut(place)) else {
            ready.push(place);
            continue;
        };
        refuse(egress, burst, &[place], reason);
    }
    ready
}

/// Drops frames that cannot go to a port.
#[cold]
fn refuse(egress: &PortView, burst: &Burst<'_>, places: &[u8], reason: DropReason) {
    egress.stats.drop_frames(reason, places.len() as u64);
    if egress.stats.capture.is_on() {
        egress.stats.capture.record(burst, places, Direction::Tx, |_| Some(reason));
    }
}

/// Gives a frame the form that it has behind a port.
#[inline]
fn prepare(egress: &PortView, frame: &mut Frame) -> Result<(), DropReason> {
    let tagged = egress.vlan.egress(frame.vid).ok_or(DropReason::VlanDenied)?;
    // What is in no VLAN passes as it is, with a tag of priority or none.
    if frame.vid != 0 || egress.vlan != VlanPolicy::All {
        frame.set_tagged(tagged);
    }
    if !tagged && egress.may_have_other_vlans() && frame.bears_own_tag() {
        return Err(DropReason::VlanDenied);
    }
    if !frame.fits(egress.mtu) {
        return Err(DropReason::MtuEgress);
    }
    Ok(())
}
