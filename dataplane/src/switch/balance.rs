//! Which worker serves which queue: a pure function of measured loads and what is pinned by hand.
//!
//! Queues are moved one by one from the busiest worker to the idlest, as long as that helps, and all of it is done only if
//! the busiest worker gains enough by it: a move costs an interruption of some microseconds and cold caches.

/// Load of a worker below which nothing is moved: there is room, and load comes and goes. In parts per million of its
/// time, as all loads here.
const WORTH_A_MOVE: u64 = 500_000;
/// What the busiest worker has to gain, in percent of its load.
const GAIN_PERCENT: u64 = 15;

/// A queue and what it costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueLoad {
    /// Who serves it; less than the number of workers.
    pub(super) worker: usize,
    /// It stays there, whatever the load.
    pub(super) pinned: bool,
    /// Time its worker spends on it, in parts per million.
    pub(super) load: u64,
}

/// The workers that should serve the queues, in their order.
pub(super) fn plan(queues: &[QueueLoad], workers: usize) -> Vec<usize> {
    let current: Vec<usize> = queues.iter().map(|queue| queue.worker).collect();
    let mut planned = current.clone();
    let mut sums = sums(queues, &current, workers);
    let before = sums.iter().copied().max().unwrap_or(0);
    if before < WORTH_A_MOVE {
        return current;
    }
    while let Some((queue, to)) = best_move(queues, &planned, &sums) {
        sums[planned[queue]] -= queues[queue].load;
        sums[to] += queues[queue].load;
        planned[queue] = to;
    }
    let after = sums.iter().copied().max().unwrap_or(0);
    if (before - after) * 100 >= before * GAIN_PERCENT { planned } else { current }
}

fn sums(queues: &[QueueLoad], assignment: &[usize], workers: usize) -> Vec<u64> {
    let mut sums = vec![0; workers];
    for (queue, &worker) in queues.iter().zip(assignment) {
        sums[worker] += queue.load;
    }
    sums
}

/// The queue of the busiest worker that leaves the higher one of both loads lowest when the idlest worker has it, if that
/// is less than the busiest has now. Since each move makes the highest load of two lower, they come to an end.
fn best_move(queues: &[QueueLoad], assignment: &[usize], sums: &[u64]) -> Option<(usize, usize)> {
    // The first of several.
    let (busiest, _) = sums.iter().enumerate().rev().max_by_key(|(_, sum)| **sum)?;
    let (idlest, _) = sums.iter().enumerate().min_by_key(|(_, sum)| **sum)?;
    let higher = |load: u64| (sums[busiest] - load).max(sums[idlest] + load);
    let movable = |place: &usize| assignment[*place] == busiest && !queues[*place].pinned;
    let best = (0..queues.len()).filter(movable).min_by_key(|place| higher(queues[*place].load))?;
    (higher(queues[best].load) < sums[busiest]).then_some((best, idlest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PERCENT: u64 = 10_000;

    fn queue(worker: usize, percent: u64) -> QueueLoad {
        QueueLoad { worker, pinned: false, load: percent * PERCENT }
    }

    fn pinned(worker: usize, percent: u64) -> QueueLoad {
        QueueLoad { pinned: true, ..queue(worker, percent) }
    }

    #[test]
    fn two_busy_queues_part() {
        assert_eq!(plan(&[queue(0, 50), queue(0, 50)], 2), [1, 0]);
        assert_eq!(plan(&[queue(1, 60), queue(1, 30), queue(0, 5)], 2), [1, 0, 0]);
        assert_eq!(plan(&[queue(0, 30), queue(0, 30), queue(0, 40)], 3), [2, 0, 1]);
    }

    #[test]
    fn as_few_as_needed_move() {
        let queues: Vec<_> = (0..8).map(|place| queue(usize::from(place >= 6), 12)).collect();
        let moved = plan(&queues, 2).iter().zip(&queues).filter(|(to, queue)| **to != queue.worker).count();
        assert_eq!(moved, 2);
    }

    #[test]
    fn what_does_not_help_is_left_alone() {
        // One queue cannot be divided.
        assert_eq!(plan(&[queue(0, 100), queue(1, 0)], 2), [0, 1]);
        // Nobody is busy.
        assert_eq!(plan(&[queue(0, 20), queue(0, 20)], 2), [0, 0]);
        // 10 percent of the busiest is not worth it: 55 for 60.
        assert_eq!(plan(&[queue(0, 55), queue(0, 5), queue(1, 40)], 2), [0, 0, 1]);
        assert_eq!(plan(&[queue(0, 90), queue(0, 5)], 1), [0, 0]);
        assert_eq!(plan(&[], 3), [0; 0]);
    }

    #[test]
    fn what_is_pinned_stays_and_others_go_around_it() {
        assert_eq!(plan(&[pinned(0, 50), pinned(0, 50)], 2), [0, 0]);
        assert_eq!(plan(&[pinned(0, 60), queue(0, 40)], 2), [0, 1]);
    }

    prop_compose! {
        fn any_case()(workers in 1..9usize)(
            queues in prop::collection::vec((0..workers, prop::bool::weighted(0.2), 0..1_000_000u64), 0..40),
            workers in Just(workers),
        ) -> (Vec<QueueLoad>, usize) {
            let queue = |(worker, pinned, load)| QueueLoad { worker, pinned, load };
            (queues.into_iter().map(queue).collect(), workers)
        }
    }

    fn highest(queues: &[QueueLoad], assignment: &[usize], workers: usize) -> u64 {
        sums(queues, assignment, workers).into_iter().max().unwrap_or(0)
    }

    proptest! {
        #[test]
        fn no_queue_is_lost_and_pins_hold((queues, workers) in any_case()) {
            let planned = plan(&queues, workers);
            prop_assert_eq!(planned.len(), queues.len());
            for (queue, worker) in queues.iter().zip(&planned) {
                prop_assert!(*worker < workers);
                prop_assert!(!queue.pinned || queue.worker == *worker);
            }
            prop_assert_eq!(&planned, &plan(&queues, workers));
        }

        #[test]
        fn a_change_is_an_improvement_and_there_is_no_second_one((queues, workers) in any_case()) {
            let current: Vec<_> = queues.iter().map(|queue| queue.worker).collect();
            let planned = plan(&queues, workers);
            let (before, after) = (highest(&queues, &current, workers), highest(&queues, &planned, workers));
            if planned != current {
                prop_assert!(before >= WORTH_A_MOVE && after * 100 <= before * (100 - GAIN_PERCENT));
            }
            let moved: Vec<_> =
                queues.iter().zip(&planned).map(|(queue, worker)| QueueLoad { worker: *worker, ..*queue }).collect();
            prop_assert_eq!(plan(&moved, workers), planned);
        }

        /// At the end not even the smallest queue of the busiest worker would fit on the idlest one.
        #[test]
        fn small_queues_spread_evenly(loads in prop::collection::vec(1..100_000u64, 40..80), workers in 2..5usize) {
            let queues: Vec<_> = loads.iter().map(|&load| QueueLoad { worker: 0, pinned: false, load }).collect();
            let planned = plan(&queues, workers);
            let (sum, largest) = (loads.iter().sum::<u64>(), loads.iter().max().copied().unwrap_or(0));
            if sum >= WORTH_A_MOVE {
                prop_assert!(highest(&queues, &planned, workers) <= sum / workers as u64 + largest + 1);
            }
        }
    }
}
