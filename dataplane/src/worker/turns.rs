//! Which queues a worker looks at in a pass: those that had frames lately, and a few of the others by turns. Most of a
//! host's guests are silent at any moment, and looking at each of their rings in every pass would take more time than
//! the frames of the few that speak.

use crate::limits::{MAX_PORTS, MAX_QUEUE_PAIRS};

const WORDS: usize = MAX_PORTS * MAX_QUEUE_PAIRS / u64::BITS as usize;
/// Passes with frames after which a queue that had none in all of them is looked at by turns only.
const PASSES: u32 = 256;
/// Other queues looked at in a pass that found nothing.
const IDLE_LOOKS: usize = 32;
/// Frames for each look at another queue in a pass that found some. A look at a silent queue, which is in no cache, takes
/// as long as two frames.
const FRAMES_PER_LOOK: usize = 128;

/// A worker's memory of its queues, by their places in its plan.
#[derive(Debug)]
pub(super) struct Turns {
    queues: usize,
    /// A bit for each that is looked at in each pass.
    active: Box<[u64]>,
    /// A bit for each that had frames since it was last decided which are active.
    heard: Box<[u64]>,
    /// Whether any is not active.
    others: bool,
    /// The one whose turn it was last.
    last: usize,
    passes: u32,
}

impl Default for Turns {
    fn default() -> Self {
        let none = || vec![0; WORDS].into_boxed_slice();
        Self { queues: 0, active: none(), heard: none(), others: false, last: 0, passes: 0 }
    }
}

impl Turns {
    /// A new plan of so many queues. All are active at first.
    pub(super) fn begin(&mut self, queues: usize) {
        self.queues = queues.min(WORDS * u64::BITS as usize);
        let words = self.words();
        self.active[..words].fill(u64::MAX);
        if let Some(last) = self.active[..words].last_mut() {
            *last = u64::MAX >> ((u64::BITS - self.queues as u32 % u64::BITS) % u64::BITS);
        }
        self.heard[..words].fill(0);
        (self.others, self.last, self.passes) = (false, 0, 0);
    }

    /// Words of 64 queues.
    #[inline]
    pub(super) fn words(&self) -> usize {
        self.queues.div_ceil(u64::BITS as usize)
    }

    /// The active ones of 64 queues.
    #[inline]
    pub(super) fn active(&self, word: usize) -> Active {
        Active { first: word * u64::BITS as usize, left: self.active[word] }
    }

    /// A queue had frames, or says that it has.
    #[inline]
    pub(super) fn hear(&mut self, place: usize) {
        let (word, bit) = (place / u64::BITS as usize, 1 << (place % u64::BITS as usize));
        self.active[word] |= bit;
        self.heard[word] |= bit;
    }

    /// How many of the others to look at after a pass over those that are active, by the frames that it found.
    #[inline]
    pub(super) fn looks(&self, frames: usize) -> usize {
        let looks = if frames == 0 { IDLE_LOOKS } else { 1 + frames / FRAMES_PER_LOOK };
        if self.others { looks.min(self.queues) } else { 0 }
    }

    /// The next queue in turn, unless it is active.
    #[inline]
    pub(super) fn next_other(&mut self) -> Option<usize> {
        self.last += 1;
        if self.last >= self.queues {
            self.last = 0;
        }
        let bit = self.active[self.last / u64::BITS as usize] >> (self.last % u64::BITS as usize);
        (bit & 1 == 0).then_some(self.last)
    }

    /// A pass with frames is over.
    #[inline]
    pub(super) fn passed(&mut self) {
        self.passes += 1;
        if self.passes >= PASSES {
            self.decide();
        }
    }

    #[cold]
    fn decide(&mut self) {
        let words = self.words();
        self.passes = 0;
        self.active[..words].copy_from_slice(&self.heard[..words]);
        self.heard[..words].fill(0);
        let active: u32 = self.active[..words].iter().map(|word| word.count_ones()).sum();
        self.others = (active as usize) < self.queues;
    }
}

/// Places of active queues.
#[derive(Debug, Clone, Copy)]
pub(super) struct Active {
    first: usize,
    left: u64,
}

impl Iterator for Active {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.left == 0 {
            return None;
        }
        let bit = self.left.trailing_zeros() as usize;
        self.left &= self.left - 1;
        Some(self.first + bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn active(turns: &Turns) -> Vec<usize> {
        (0..turns.words()).flat_map(|word| turns.active(word)).collect()
    }

    #[test]
    fn silent_queues_are_looked_at_by_turns() {
        let mut turns = Turns::default();
        turns.begin(0);
        assert_eq!((active(&turns), turns.looks(0)), (vec![], 0));
        turns.begin(200);
        assert_eq!((active(&turns).len(), turns.looks(0)), (200, 0));
        for _ in 0..PASSES {
            turns.hear(3);
            turns.hear(130);
            turns.passed();
        }
        assert_eq!(active(&turns), [3, 130]);
        assert_eq!((turns.looks(0), turns.looks(1), turns.looks(2 * FRAMES_PER_LOOK)), (IDLE_LOOKS, 1, 3));
        let mut seen: Vec<_> = (0..200).filter_map(|_| turns.next_other()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..200).filter(|place| ![3, 130].contains(place)).collect::<Vec<_>>());
        // One that speaks up is active at once, and one that falls silent is not for ever.
        turns.hear(64);
        assert_eq!(active(&turns), [3, 64, 130]);
        for _ in 0..2 * PASSES {
            turns.hear(64);
            turns.passed();
        }
        assert_eq!(active(&turns), [64]);
        turns.begin(64);
        assert_eq!((active(&turns).len(), turns.looks(0)), (64, 0));
    }

    proptest! {
        /// No queue is forgotten, whatever happens to the others: it is active, or has its turn.
        #[test]
        fn each_is_looked_at(queues in 1usize..300, heard in proptest::collection::vec(any::<prop::sample::Index>(), 0..600)) {
            let mut turns = Turns::default();
            turns.begin(queues);
            for place in heard {
                turns.hear(place.index(queues));
                turns.passed();
            }
            let mut seen = active(&turns);
            prop_assert!(seen.iter().all(|place| *place < queues));
            if seen.len() < queues {
                prop_assert!(turns.looks(1) > 0);
            }
            seen.extend((0..queues).filter_map(|_| turns.next_other()));
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..queues).collect::<Vec<_>>());
        }
    }
}
