//! A frontend that does what comes to its mind: valid messages in any order, broken ones, broken rings, rewritten
//! descriptors. Every run can be repeated from its seed.

use anyhow::Result;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;

use crate::hostile::channel::Channel;
use crate::hostile::frontend::*;
use crate::hostile::memory::UVA;
use crate::hostile::message::*;
use crate::hostile::queue::{BUFFER, Desc, INDIRECT, Layout, NEXT, Places, Queue, WRITE};
use crate::hostile::{Dice, eventfd, memfd};

/// A hostile frontend's will.
#[derive(Debug)]
pub struct Random {
    dice: Dice,
    files: Vec<File>,
    peer: u64,
    /// What was done, and how often.
    pub done: BTreeMap<&'static str, u64>,
}

impl Random {
    /// Acts as the seed says. Frames go to `peer` alone: what others get from a flood is no fault of the switch.
    pub fn new(seed: u64, peer: u64) -> Result<Self> {
        let files = vec![eventfd()?, memfd(1 << 20)?, File::open("/dev/null")?, File::open("/")?, memfd(0)?];
        Ok(Self { dice: Dice::new(seed), files, peer, done: BTreeMap::new() })
    }

    /// A driver to come with.
    pub fn setup(&mut self) -> Setup {
        let layout = if self.dice.chance(50) { Layout::Split } else { Layout::Packed };
        let all = [CSUM, GUEST_CSUM, HOST_TSO4, HOST_TSO6, MRG_RXBUF, INDIRECT_DESC, EVENT_IDX];
        let features = all.into_iter().filter(|_| self.dice.chance(50)).fold(0, |sum, bit| sum | bit);
        let size = 1 << self.dice.below(9);
        Setup::of(layout).with(features).sized(size)
    }

    /// Does one thing. `false` if the frontend had better connect anew.
    pub fn act(&mut self, evil: &mut Frontend) -> Result<bool> {
        let roll = self.dice.below(100);
        let name = match roll {
            0..25 => self.post(evil),
            25..40 => self.scribble(evil),
            40..55 => self.frames(evil),
            55..65 => self.restart_ring(evil),
            65..75 => self.valid_message(evil),
            75..80 => self.memory(evil),
            80..86 => self.kick(evil),
            86..90 => return self.counted("reset", |_| Ok(evil.reset().is_ok())),
            90..98 => {
                self.broken_message(&evil.channel);
                "broken message"
            }
            _ => return self.counted("hang up", |_| Ok(false)),
        };
        *self.done.entry(name).or_default() += 1;
        Ok(true)
    }

    fn counted<T>(&mut self, name: &'static str, act: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        *self.done.entry(name).or_default() += 1;
        act(self)
    }

    /// An address: of a buffer, at an edge of memory, or anything.
    fn address(&mut self, evil: &Frontend) -> u64 {
        let size = evil.memory.size();
        match self.dice.below(8) {
            0..4 => SPARE + self.dice.below(size - SPARE),
            4 => size - self.dice.below(32),
            5 => self.dice.below(size),
            6 => SPARE + 16 * self.dice.below(1024),
            _ => self.dice.nasty(),
        }
    }

    fn desc(&mut self, evil: &Frontend, writable: bool) -> Desc {
        let len = match self.dice.below(8) {
            0 => 0,
            1 => self.dice.nasty() as u32,
            2 => 16 * self.dice.below(70) as u32,
            _ => self.dice.below(BUFFER) as u32,
        };
        let mut flags = if writable { WRITE } else { 0 };
        if self.dice.chance(6) {
            flags ^= self.dice.pick(&[NEXT, WRITE, INDIRECT, INDIRECT | NEXT, 0x4, 0xff7f]).unwrap_or(0);
        }
        Desc { addr: self.address(evil), len, flags, next: self.dice.nasty() as u16 }
    }

    /// A chain that may or may not be one.
    fn post(&mut self, evil: &mut Frontend) -> &'static str {
        let writable = self.dice.chance(40);
        let most = if self.dice.chance(5) { 300 } else { 5 };
        let count = 1 + self.dice.below(most);
        let descs: Vec<Desc> = (0..count).map(|_| self.desc(evil, writable)).collect();
        if self.dice.chance(30) {
            let layout = evil.setup.layout;
            for (place, desc) in (0..).zip(&descs) {
                evil.memory.write(SPARE + 16 * place, &desc.entry(layout));
            }
        }
        let queue = if writable { &mut evil.rx } else { &mut evil.tx };
        queue.post_chain(&descs);
        if self.dice.chance(5) && queue.layout == Layout::Split {
            queue.set_avail_index(self.dice.nasty() as u16);
        }
        if writable { "chain to receive" } else { "chain to send" }
    }

    /// Anything, anywhere in the rings.
    fn scribble(&mut self, evil: &Frontend) -> &'static str {
        for _ in 0..1 + self.dice.below(8) {
            let queue = if self.dice.chance(50) { &evil.rx } else { &evil.tx };
            let span = 16 * u64::from(queue.size);
            let Places { desc, driver, device } = queue.places;
            let base = self.dice.pick(&[desc, desc, driver, device]).unwrap_or(desc);
            let at = base + 2 * self.dice.below(span / 2);
            evil.memory.half(at).store(self.dice.nasty() as u16, Ordering::Relaxed);
        }
        "scribble"
    }

    /// Frames with headers that ask for anything.
    fn frames(&mut self, evil: &mut Frontend) -> &'static str {
        for _ in 0..1 + self.dice.below(16) {
            let mut bytes = vec![0; HEADER];
            if self.dice.chance(60) {
                bytes.iter_mut().for_each(|byte| *byte = self.dice.nasty() as u8);
                bytes[1] = self.dice.pick(&[0, 1, 3, 4, 5, 0x81]).unwrap_or(0);
            }
            bytes.extend(ethernet(self.peer, evil.mac));
            if self.dice.chance(60) {
                bytes.truncate(HEADER + 12);
                bytes.extend(self.dice.pick(&[[8, 0, 0x45], [0x86, 0xdd, 0x60], [0x81, 0, 0]]).unwrap_or_default());
            }
            let len = self.dice.below(BUFFER - bytes.len() as u64);
            bytes.extend((0..len).map(|_| self.dice.any() as u8));
            evil.send_bytes(&bytes);
        }
        "frames"
    }

    fn index(&mut self) -> u32 {
        match self.dice.below(8) {
            0 => self.dice.nasty() as u32,
            1 => 2 + self.dice.below(510) as u32,
            _ => self.dice.below(2) as u32,
        }
    }

    /// Some of what starts a ring, in any order, while it runs.
    fn restart_ring(&mut self, evil: &mut Frontend) -> &'static str {
        let index = self.dice.below(2) as u32;
        let queue: &Queue = if index == 0 { &evil.rx } else { &evil.tx };
        let mut messages = evil.ring_messages(index, queue);
        for _ in 0..messages.len() {
            let (a, b) = (self.dice.below(messages.len() as u64), self.dice.below(messages.len() as u64));
            messages.swap(a as usize, b as usize);
        }
        messages.truncate(1 + self.dice.below(messages.len() as u64) as usize);
        messages.iter().for_each(|message| evil.channel.send(message));
        "restart ring"
    }

    /// A message by the book, at any time.
    fn valid_message(&mut self, evil: &mut Frontend) -> &'static str {
        let (index, number) = (self.index(), self.dice.nasty());
        let features = self.setup().features | 1 << 30 | 1 << 32;
        let message = match self.dice.below(12) {
            0 => Message::ring(SET_VRING_ENABLE, index, number as u32 & 1),
            1 => Message::ring(SET_VRING_NUM, index, 1 << (number % 16)),
            2 => Message::ring(SET_VRING_BASE, index, number as u32 & 0xffff),
            3 => ring_address(index, Places::at(self.dice.below(64 << 20))),
            4 => Message::number(SET_FEATURES, features | ((number & 1) * LOG_ALL)),
            5 => Message::new(RESET_DEVICE, vec![]),
            6 => Message::number(SEND_RARP, evil.mac),
            7 => Message::number(SET_STATUS, number & 0xf),
            8 => Message::number(NET_SET_MTU, 68 + number % 9000),
            9 => Message::new(SET_LOG_BASE, numbers(&[1 << 20, 0])).with(&[self.files[1].as_raw_fd()]),
            10 => Message::number(SET_VRING_CALL, u64::from(index & 0xff)).with(&[self.files[0].as_raw_fd()]),
            _ => Message::number(SET_VRING_KICK, u64::from(index & 0xff)).with(&[self.files[0].as_raw_fd()]),
        };
        evil.channel.send(&message);
        "valid message"
    }

    /// Another memory table, good or bad.
    fn memory(&mut self, evil: &Frontend) -> &'static str {
        let size = evil.memory.size();
        let mut regions: Vec<Region> = match self.dice.below(3) {
            0 => vec![[0, size, UVA, 0]],
            1 => [0, size / 2].map(|at| [at, size / 2, UVA + at, at]).to_vec(),
            _ => (0..8).map(|part| part * (size / 8)).map(|at| [at, size / 8, UVA + at, at]).collect(),
        };
        if self.dice.chance(20) {
            let place = self.dice.below(regions.len() as u64) as usize;
            regions[place][self.dice.below(4) as usize] = self.dice.nasty();
        }
        let fds = vec![evil.memory.fd(); regions.len()];
        evil.channel.send(&memory_table(&regions).with(&fds));
        "memory table"
    }

    fn kick(&mut self, evil: &mut Frontend) -> &'static str {
        evil.rx.wake();
        evil.tx.wake();
        "kick"
    }

    /// Any request with any flags, payload and descriptors; perhaps only a part of it.
    pub fn broken_message(&mut self, channel: &Channel) {
        let request = self.dice.pick(REQUESTS).unwrap_or(0);
        let request = if self.dice.chance(5) { self.dice.nasty() as u32 } else { request };
        let len = self.dice.pick(&[0, 8, 8, 8, 16, 40, 40, 64, 264, 4096]).unwrap_or(0);
        let payload: Vec<u8> = (0..len / 8).flat_map(|_| self.dice.nasty().to_ne_bytes()).collect();
        let mut message = Message::new(request, payload);
        if self.dice.chance(20) {
            message = message.flags(self.dice.nasty() as u32);
        }
        if self.dice.chance(10) {
            message = message.claiming(self.dice.nasty() as u32);
        }
        let count = self.dice.pick(&[0, 0, 1, 1, 2, 8, 32, 253]).unwrap_or(0);
        let fds: Vec<RawFd> = (0..count)
            .filter_map(|_| self.dice.pick(&[0usize, 1, 2, 3, 4]))
            .map(|at| self.files[at].as_raw_fd())
            .collect();
        let bytes = message.bytes();
        let cut = if self.dice.chance(5) { self.dice.below(bytes.len() as u64) as usize } else { bytes.len() };
        let _ = channel.bytes(&bytes[..cut], &fds);
    }
}
