//! A snapshot that every worker has acknowledged is the only one in use.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use models::sync::epoch::Epoch;
use models::sync::mailbox::Mailbox;

mod event;

use event::Event;

/// Some of what a snapshot leads to, such as guest memory. Loom tells when it is used and changed at once.
struct Memory(UnsafeCell<u32>);

// SAFETY: that this holds is what the model shows.
unsafe impl Sync for Memory {}
// SAFETY: as above.
unsafe impl Send for Memory {}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self(UnsafeCell::new(1)))
    }

    fn in_use(&self) -> u32 {
        // SAFETY: loom checks it.
        self.0.with(|value| unsafe { *value })
    }

    fn unmap(&self) {
        // SAFETY: loom checks it.
        self.0.with_mut(|value| unsafe { *value = 0 });
    }
}

struct Snapshot {
    epoch: u64,
    memory: Arc<Memory>,
}

#[derive(Default)]
struct Worker {
    mailbox: Mailbox<Snapshot>,
    acknowledged: Epoch,
    wake: Event,
}

impl Worker {
    /// As `worker::Worker::run`, with a burst wherever there is nothing to take up, and sleep after it.
    fn run(&self, mut snapshot: Arc<Snapshot>, last: u64) {
        loop {
            if let Some(newer) = self.mailbox.take() {
                snapshot = newer;
                self.acknowledged.acknowledge(snapshot.epoch);
            }
            assert_eq!(snapshot.memory.in_use(), 1, "a burst uses memory that is gone");
            if snapshot.epoch == last {
                return;
            }
            self.wake.wait();
        }
    }
}

/// As `switch::Inner::publish`.
fn publish(worker: &Worker, snapshot: Snapshot) {
    let epoch = snapshot.epoch;
    worker.mailbox.put(Arc::new(snapshot));
    worker.wake.signal();
    while !worker.acknowledged.reached(epoch) {
        thread::yield_now();
    }
}

#[test]
fn memory_is_unmapped_when_no_burst_uses_it() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let memories: Vec<_> = (0..3).map(|_| Memory::new()).collect();
        let worker = Arc::new(Worker::default());
        let first = Arc::new(Snapshot { epoch: 0, memory: memories[0].clone() });
        let theirs = worker.clone();
        let thread = thread::spawn(move || theirs.run(first, 2));
        for epoch in [1, 2] {
            publish(&worker, Snapshot { epoch, memory: memories[epoch as usize].clone() });
            memories[epoch as usize - 1].unmap();
        }
        thread.join().ok();
    });
}

/// Snapshots that nobody has taken are replaced: the newest arrives, none is leaked.
#[test]
fn the_newest_snapshot_arrives() {
    loom::model(|| {
        let (mailbox, one, two) = (Arc::new(Mailbox::default()), Arc::new(1), Arc::new(2));
        let (theirs, values) = (mailbox.clone(), [one.clone(), two.clone()]);
        let thread = thread::spawn(move || values.into_iter().for_each(|value| theirs.put(value)));
        let early = mailbox.take();
        thread.join().ok();
        let late = mailbox.take();
        let newest = late.or(early);
        assert_eq!(newest.as_deref(), Some(&2));
        drop((newest, mailbox));
        assert_eq!((Arc::strong_count(&one), Arc::strong_count(&two)), (1, 1));
    });
}
