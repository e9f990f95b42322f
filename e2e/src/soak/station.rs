//! A station: a frontend and its guest in this process, that sends frames which tell where they belong, and judges those
//! that it receives.

use anyhow::{Result, bail};
use std::collections::{HashMap, VecDeque};

use crate::hostile::Dice;
use crate::hostile::frontend::{Frontend, HEADER, Setup, ethernet};
use crate::soak::frame::{TAG, Tag};

const EVERYBODY: u64 = 0xffff_ffff_ffff;
/// Frames that the switch has not given back yet, at most: a few stations' worth fits into a receiver's ring.
const UNDER_WAY: usize = 48;
/// Frames sent at once, at most.
const BURST: u64 = 8;
/// One of so many goes to everybody.
const BROADCASTS: u64 = 16;
/// Longest payload: a frame of 1514 bytes.
const LONGEST: u64 = 1500;

/// Someone to send to.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// Its number.
    pub id: u32,
    /// Its address.
    pub mac: u64,
}

/// Frames to one station, or to everybody.
#[derive(Debug, Default, Clone, Copy)]
struct Sent {
    /// Given to the switch.
    posted: u32,
    /// Given back by it.
    taken: u32,
}

/// Frames of one sender to one station.
#[derive(Debug, Clone, Copy)]
struct Heard {
    last: u32,
    count: u32,
}

/// A station.
#[derive(Debug)]
pub struct Station {
    /// Its number.
    pub id: u32,
    /// Where it belongs, and its place there.
    pub domain: usize,
    /// See `domain`.
    pub place: u16,
    /// Name of its port.
    pub port: String,
    frontend: Frontend,
    /// Whom the frames are for that the switch has not given back, oldest first.
    under_way: VecDeque<u32>,
    sent: HashMap<u32, Sent>,
    heard: HashMap<(u32, u32), Heard>,
    /// Frames that the switch has taken, and delivered, since the last [`Station::rebase`].
    pub taken: u64,
    /// See `taken`.
    pub delivered: u64,
    /// It was not there all the time since the last audit.
    pub disturbed: bool,
}

/// The address of the station at a place of its domain: the same in every one, so that a mix-up shows.
pub fn mac(place: u16) -> u64 {
    0x0250_0000_0000 | u64::from(place)
}

impl Station {
    /// A station behind a running frontend.
    pub fn new(id: u32, domain: usize, place: u16, port: String, frontend: Frontend) -> Self {
        let (under_way, sent, heard) = (VecDeque::new(), HashMap::new(), HashMap::new());
        let disturbed = true;
        Self { id, domain, place, port, frontend, under_way, sent, heard, taken: 0, delivered: 0, disturbed }
    }

    /// Its address.
    pub fn mac(&self) -> u64 {
        self.frontend.mac
    }

    /// Whether the switch has given back all that was sent.
    pub fn is_quiet(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Takes back what the switch has given back, and takes and judges what it has delivered.
    ///
    /// # Errors
    /// What is wrong with a frame, or with a buffer.
    pub fn listen(&mut self) -> Result<()> {
        while self.frontend.tx.reap().is_some() {
            let Some(to) = self.under_way.pop_front() else {
                bail!("station {} ({}): a buffer came back twice", self.id, self.port);
            };
            self.taken += 1;
            self.sent.entry(to).or_default().taken += 1;
        }
        while let Some((source, payload)) = self.frontend.receive() {
            self.delivered += 1;
            self.judge(source, &payload)?;
        }
        Ok(())
    }

    fn judge(&mut self, source: u64, payload: &[u8]) -> Result<()> {
        let here = || format!("station {} ({}, domain {})", self.id, self.port, self.domain);
        let Some(tag) = Tag::read(payload) else {
            bail!("{}: a foreign or corrupt frame of {} bytes from {source:012x}", here(), payload.len());
        };
        if usize::from(tag.domain) != self.domain {
            bail!("{}: A FRAME OF ANOTHER NETWORK: {tag:?}", here());
        }
        if mac(tag.place) != source || tag.from == self.id {
            bail!("{}: a frame from {source:012x} that is not the sender's: {tag:?}", here());
        }
        match self.heard.get_mut(&(tag.from, tag.to)) {
            Some(heard) if tag.number <= heard.last => {
                bail!("{}: number {} after {}: twice, or out of order: {tag:?}", here(), tag.number, heard.last)
            }
            Some(heard) => (heard.last, heard.count) = (tag.number, heard.count + 1),
            None => {
                self.heard.insert((tag.from, tag.to), Heard { last: tag.number, count: 1 });
            }
        }
        Ok(())
    }

    /// Sends a few frames, to some of the peers and to everybody.
    pub fn talk(&mut self, peers: &[Peer], dice: &mut Dice) {
        let room = UNDER_WAY.saturating_sub(self.under_way.len()) as u64;
        let count = dice.below(BURST + 1).min(room);
        for _ in 0..count {
            let peer = if dice.below(BROADCASTS) == 0 { None } else { dice.pick(peers) };
            let len = if dice.chance(70) { TAG as u64 + dice.below(64) } else { dice.below(LONGEST) };
            self.send(peer, len as usize);
        }
        if count > 0 {
            self.frontend.tx.notify();
        }
    }

    /// Sends one frame to each of the peers, or one to everybody.
    pub fn greet(&mut self, peers: Option<&[Peer]>) {
        match peers {
            Some(peers) => peers.iter().for_each(|peer| self.send(Some(*peer), TAG)),
            None => self.send(None, TAG),
        }
        self.frontend.tx.notify();
    }

    fn send(&mut self, peer: Option<Peer>, len: usize) {
        let Some(slot) = self.frontend.tx.free_slot() else { return };
        let Peer { id: to, mac } = peer.unwrap_or(Peer { id: 0, mac: EVERYBODY });
        let sent = self.sent.entry(to).or_default();
        sent.posted += 1;
        let tag = Tag { domain: self.domain as u16, place: self.place, from: self.id, to, number: sent.posted };
        let mut bytes = vec![0; HEADER];
        bytes.extend(ethernet(mac, self.frontend.mac));
        tag.write(len, &mut bytes);
        self.frontend.memory.write(self.frontend.tx.buffer(slot), &bytes);
        self.frontend.tx.post(bytes.len() as u32);
        self.under_way.push_back(to);
    }

    /// Number of the last frame sent to a station, or to everybody (0).
    pub fn last_sent(&self, to: u32) -> u32 {
        self.sent.get(&to).map_or(0, |sent| sent.posted)
    }

    /// Number of the last frame heard that a sender has sent to a station or to everybody.
    pub fn last_heard(&self, from: u32, to: u32) -> u32 {
        self.heard.get(&(from, to)).map_or(0, |heard| heard.last)
    }

    /// Frames to a station that the switch has taken.
    pub fn taken_for(&self, to: u32) -> u32 {
        self.sent.get(&to).map_or(0, |sent| sent.taken)
    }

    /// Frames from a station to this one that were delivered.
    pub fn heard_from(&self, from: u32) -> u32 {
        self.heard.get(&(from, self.id)).map_or(0, |heard| heard.count)
    }

    /// Counts from zero, as a switch does that has started.
    pub fn rebase(&mut self) {
        (self.taken, self.delivered) = (0, 0);
    }

    /// Forgets those who have left.
    pub fn forget_all_but(&mut self, present: &[u32]) {
        self.sent.retain(|to, _| *to == 0 || present.contains(to));
        self.heard.retain(|(from, _), _| present.contains(from));
    }

    /// The switch has gone and come back: goes on where it was.
    pub fn resume(&mut self) -> Result<()> {
        self.disturbed = true;
        self.frontend.resume()
    }

    /// The guest resets its device, as by a reboot. What the switch has not taken by then is nobody's.
    pub fn reset(&mut self) -> Result<()> {
        self.disturbed = true;
        self.frontend.stop_queues()?;
        self.listen()?;
        self.under_way.clear();
        self.frontend.rx.reset();
        self.frontend.tx.reset();
        self.frontend.start_queues();
        self.frontend.settle()
    }

    /// Hangs up. Afterwards the switch is connected again, to nobody, and all that it did is counted.
    pub fn hang_up(&mut self) -> Result<()> {
        self.disturbed = true;
        self.frontend.hang_up()?;
        self.listen()?;
        self.under_way.clear();
        Ok(())
    }

    /// Comes back after [`Station::hang_up`], with new memory and another driver.
    pub fn return_as(&mut self, setup: Setup) -> Result<()> {
        self.frontend.renew(setup)
    }
}
