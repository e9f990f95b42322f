//! Queues move between running workers: by hand and by load, and what must hold meanwhile.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::publish::PortPublisher;
use super::*;
use crate::config::{Pin, WorkerMode};
use crate::frame::{Burst, BurstStorage};
use crate::mem::SourceSegment;
use crate::port::{Link, Publisher, RxEntry, RxQueue, TxQueue};
use crate::status::PortState;
use crate::switch::convert::Scratch;
use crate::virtq::Fault;

const PATIENCE: Duration = Duration::from_secs(20);
/// Frames of one burst.
const FRAMES: u64 = 4;

/// A queue that always has frames, numbered through, but for every seventh look; it remembers who served it.
#[derive(Debug)]
struct Source {
    station: u8,
    next: AtomicU64,
    looks: AtomicU64,
    inside: AtomicBool,
    /// Time that each burst takes.
    cost: Duration,
    /// Workers, each noted when it follows another one.
    served_by: Mutex<Vec<String>>,
}

impl Source {
    fn new(station: u8, cost: Duration) -> Arc<Self> {
        let (next, looks, served_by) = (AtomicU64::new(0), AtomicU64::new(0), Mutex::default());
        Arc::new(Self { station, next, looks, inside: AtomicBool::new(false), cost, served_by })
    }

    /// Notes the worker that calls.
    fn touch(&self) {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        let mut served_by = lock(&self.served_by);
        if served_by.last().is_none_or(|last| last != name) {
            served_by.push(name.into());
        }
    }

    fn wait_for(&self, worker: usize) {
        let (name, begun) = (format!("sl-worker-{worker}"), Instant::now());
        while lock(&self.served_by).last() != Some(&name) {
            assert!(begun.elapsed() < PATIENCE, "worker {worker} does not come: {:?}", lock(&self.served_by));
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl RxQueue for Source {
    fn poll(&self, storage: &mut BurstStorage, forward: &mut dyn FnMut(&mut Burst<'_>)) -> Result<usize, Fault> {
        self.touch();
        assert!(!self.inside.swap(true, Ordering::AcqRel), "two workers at once");
        let some = !self.looks.fetch_add(1, Ordering::Relaxed).is_multiple_of(7);
        if some {
            let first = self.next.fetch_add(FRAMES, Ordering::Relaxed);
            let frames: Vec<_> = (first..first + FRAMES).map(|number| numbered(self.station, number)).collect();
            let mut burst = storage.begin();
            for bytes in &frames {
                let mut frame = burst.start(12);
                assert!(frame.push(SourceSegment::from_slice(bytes)) && frame.finish().is_ok());
            }
            forward(&mut burst);
            std::thread::sleep(self.cost);
        }
        self.inside.store(false, Ordering::Release);
        Ok(if some { FRAMES as usize } else { 0 })
    }

    fn arm(&self) -> bool {
        self.touch();
        false
    }

    fn disarm(&self) {
        self.touch();
    }

    fn event_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }

    fn drain_event(&self) {}
}

/// A frame to everybody with a number behind its header.
fn numbered(station: u8, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; 12];
    bytes.extend([0xff; 6]);
    bytes.extend([2, 0, 0, 0, 0, station, 0x88, 0xb5]);
    bytes.extend(number.to_be_bytes());
    bytes
}

/// Counts the frames of each station and complains about those that are out of order.
#[derive(Debug, Default)]
struct Sink {
    counts: Mutex<[u64; 8]>,
    disorder: AtomicU64,
}

impl TxQueue for Sink {
    fn send(&self, burst: &Burst<'_>, frames: &[u8], scratch: &mut Scratch) -> Result<(), Fault> {
        let mut counts = lock(&self.counts);
        for &place in frames {
            let head = burst.frame(place).head();
            let number = u64::from_be_bytes(head[14..22].try_into().unwrap());
            let expected = &mut counts[usize::from(head[11])];
            self.disorder.fetch_add(u64::from(number != *expected), Ordering::Relaxed);
            *expected = number + 1;
        }
        scratch.copies.delivered += frames.len() as u64;
        Ok(())
    }
}

struct Bench {
    switch: Arc<Switch>,
    sources: Vec<Arc<Source>>,
    sink: Arc<Sink>,
}

impl Bench {
    /// Port `a` with a queue for each of these pairs, and port `b`, which takes everything.
    fn new(mode: WorkerMode, pairs: &[usize], cost: Duration) -> Self {
        let config = SwitchConfig { workers: vec![None, None], mode, ..SwitchConfig::default() };
        let switch = Switch::start(&config).unwrap();
        let sources: Vec<_> = pairs.iter().map(|pair| Source::new(*pair as u8, cost)).collect();
        let sink = Arc::new(Sink::default());
        let down = || Link::down(PortState::Up, None);
        publish(&switch, "b=tap:unused-b", Link { tx: vec![sink.clone()], ..down() });
        let entry = |(pair, queue): (&usize, &Arc<Source>)| RxEntry { pair: *pair, queue: queue.clone() };
        let rx = pairs.iter().zip(&sources).map(entry).collect();
        publish(&switch, "a=tap:unused-a", Link { rx, ..down() });
        Self { switch, sources, sink }
    }

    fn workers(&self) -> Vec<usize> {
        self.switch.queue_loads().iter().map(|queue| queue.worker).collect()
    }
}

/// A port without anything behind it.
fn publish(switch: &Switch, spec: &str, link: Link) -> PortPublisher {
    let config: PortConfig = spec.parse().unwrap();
    let (id, stats) = switch.inner.reserve(&config).unwrap();
    let publisher = PortPublisher::new(Arc::downgrade(&switch.inner), id, stats);
    publisher.publish(link);
    publisher
}

fn pin(text: &str) -> Pin {
    text.parse().unwrap()
}

/// Tells which thread frees it.
#[derive(Debug)]
struct Last(std::sync::mpsc::Sender<String>);

impl TxQueue for Last {
    fn send(&self, _burst: &Burst<'_>, _frames: &[u8], _scratch: &mut Scratch) -> Result<(), Fault> {
        Ok(())
    }
}

impl Drop for Last {
    fn drop(&mut self) {
        let _ = self.0.send(std::thread::current().name().unwrap_or_default().into());
    }
}

#[test]
fn no_worker_frees_what_was_published() {
    let config = SwitchConfig { workers: vec![None, None], mode: WorkerMode::Poll, ..SwitchConfig::default() };
    let switch = Switch::start(&config).unwrap();
    let (told, freed) = std::sync::mpsc::channel();
    for number in 0..20 {
        let link = Link { tx: vec![Arc::new(Last(told.clone()))], ..Link::down(PortState::Up, None) };
        let publisher = publish(&switch, &format!("p{number}=tap:unused-{number}"), link);
        publisher.publish(Link::down(PortState::Down, None));
        // By the time that it is published.
        let thread = freed.try_recv().unwrap();
        assert!(!thread.starts_with("sl-worker"), "{thread}");
    }
    switch.stop();
}

/// Workers go on with what wakes them, and with what they know of their queues, for as long as they have the same.
#[test]
fn what_stays_the_same_is_not_made_anew() {
    let config = SwitchConfig { workers: vec![None, None], rebalance: false, ..SwitchConfig::default() };
    let switch = Switch::start(&config).unwrap();
    let source = |number| -> Arc<dyn RxQueue> { Source::new(number, Duration::from_micros(100)) };
    let [first, second, third] = [1, 2, 3].map(source);
    let link = |queues: &[&Arc<dyn RxQueue>]| {
        let rx = queues.iter().enumerate().map(|(pair, queue)| RxEntry { pair, queue: Arc::clone(queue) }).collect();
        Link { rx, ..Link::down(PortState::Up, None) }
    };
    let publisher = publish(&switch, "a=tap:unused-a", link(&[&first, &second]));
    let plans = || {
        let shown = lock(&switch.inner.tables).shown.clone().unwrap();
        let plan = |plan: &snapshot::Plan| (Arc::as_ptr(plan.alarm.as_ref().unwrap()), plan.since);
        (shown.plans.iter().map(plan).collect::<Vec<_>>(), shown)
    };
    let of = |shown: &snapshot::Snapshot, queue: &Arc<dyn RxQueue>| {
        let mut served = shown.plans.iter().flat_map(|plan| &plan.queues);
        served.find(|served| Arc::ptr_eq(&served.queue, queue)).unwrap().armed.clone()
    };
    let (before, shown) = plans();
    // Something else of the port changes.
    publisher.publish(Link { memory_bytes: 1, tx: vec![Arc::<Sink>::default()], ..link(&[&first, &second]) });
    let (now, again) = plans();
    assert_eq!(now, before);
    assert!(Arc::ptr_eq(&of(&again, &first), &of(&shown, &first)) && again.epoch > shown.epoch);
    // One worker has another queue.
    publisher.publish(link(&[&first, &third]));
    let (now, again) = plans();
    assert_eq!(now.iter().zip(&before).filter(|(now, before)| now == before).count(), 1);
    assert!(Arc::ptr_eq(&of(&again, &first), &of(&shown, &first)));
    assert!(!Arc::ptr_eq(&of(&again, &third), &of(&shown, &second)));
    switch.stop();
}

#[test]
fn frames_stay_in_order_while_their_queue_moves() {
    for mode in [WorkerMode::Interrupt, WorkerMode::Poll] {
        let bench = Bench::new(mode, &[0, 1], Duration::ZERO);
        // `b` has the first place, so that queue 0 of `a` begins at worker 1.
        assert_eq!(bench.workers(), [1, 0]);
        bench.sources[0].wait_for(1);
        for round in 0..40 {
            let worker = round % 2;
            bench.switch.pin(&pin(&format!("a:0={worker}"))).unwrap();
            bench.sources[0].wait_for(worker);
        }
        bench.switch.stop();
        assert_eq!(bench.sink.disorder.load(Ordering::Relaxed), 0);
        // Once another worker has it, the one before never touches it again.
        assert_eq!(lock(&bench.sources[0].served_by).len(), 41);
        assert_eq!(lock(&bench.sources[1].served_by).len(), 1);
        let counts = lock(&bench.sink.counts);
        for source in &bench.sources {
            let sent = source.next.load(Ordering::Relaxed);
            assert!(sent > 0);
            assert_eq!(counts[usize::from(source.station)], sent);
        }
    }
}

/// It may never wake again.
#[test]
fn a_sleep_is_told_of_while_it_lasts() {
    let config = SwitchConfig { workers: vec![None], mode: WorkerMode::Interrupt, ..SwitchConfig::default() };
    let switch = Switch::start(&config).unwrap();
    let worker = || switch.workers().remove(0);
    let (begun, mut first) = (Instant::now(), worker());
    loop {
        std::thread::sleep(Duration::from_millis(20));
        let now = worker();
        assert!(now.asleep_ns >= first.asleep_ns && now.asleep_ns <= now.up_ns, "{now:?}");
        if now.sleeps != first.sleeps {
            first = now;
        } else if now.sleeps > 0 && now.asleep_ns > first.asleep_ns + 50_000_000 {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{first:?}");
    }
}

#[test]
fn two_busy_queues_of_one_worker_part() {
    let bench = Bench::new(WorkerMode::Adaptive, &[1, 3], Duration::from_micros(200));
    assert_eq!(bench.workers(), [0, 0]);
    let begun = Instant::now();
    while bench.workers() == [0, 0] {
        assert!(begun.elapsed() < PATIENCE, "{:?} {:?}", bench.switch.workers(), bench.switch.queue_loads());
        std::thread::sleep(Duration::from_millis(20));
    }
    let workers = bench.workers();
    assert_ne!(workers[0], workers[1]);
    let moved = workers.iter().position(|worker| *worker == 1).unwrap();
    bench.sources[moved].wait_for(1);
    let begun = Instant::now();
    while bench.switch.workers().iter().any(|worker| worker.busy_percent < 50.0 || worker.queues != 1) {
        assert!(begun.elapsed() < PATIENCE, "{:?}", bench.switch.workers());
        std::thread::sleep(Duration::from_millis(20));
    }
    let loads = bench.switch.queue_loads();
    assert!(loads.iter().all(|queue| queue.load_percent > 50.0), "{loads:?}");
    bench.switch.stop();
    assert_eq!(bench.sink.disorder.load(Ordering::Relaxed), 0);
}

#[test]
fn pins_hold_and_are_taken_back() {
    let bench = Bench::new(WorkerMode::Interrupt, &[0, 1, 2], Duration::ZERO);
    let pinned = || bench.switch.queue_loads().iter().map(|queue| queue.pinned).collect::<Vec<_>>();
    assert_eq!((bench.workers(), pinned()), (vec![1, 0, 1], vec![false; 3]));
    bench.switch.pin(&pin("a=1")).unwrap();
    bench.switch.pin(&pin("a:2=0")).unwrap();
    assert_eq!((bench.workers(), pinned()), (vec![1, 1, 0], vec![true; 3]));
    // Back under the pin of its port.
    bench.switch.unpin(&"a:2".parse().unwrap()).unwrap();
    assert_eq!(bench.workers(), [1, 1, 1]);
    // Where it is, it stays.
    bench.switch.unpin(&"a".parse().unwrap()).unwrap();
    assert_eq!((bench.workers(), pinned()), (vec![1, 1, 1], vec![false; 3]));

    assert!(matches!(bench.switch.pin(&pin("a=2")), Err(PortError::NoWorker { worker: 2, workers: 2 })));
    assert!(matches!(bench.switch.pin(&pin("c=1")), Err(PortError::NotFound(_))));
    assert!(matches!(bench.switch.unpin(&"a:1".parse().unwrap()), Err(PortError::NotPinned(_))));
    assert_eq!(bench.switch.restore_pins(&[pin("c=1"), pin("d=7")]), [pin("d=7")]);
    bench.switch.stop();
}

#[test]
fn cycles_tell_where_time_goes() {
    let bench = Bench::new(WorkerMode::Poll, &[0], Duration::from_micros(50));
    let begun = Instant::now();
    let sampled = || bench.switch.cycles().workers[1].sampled_frames;
    while sampled() == 0 {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
    bench.switch.stop();
    let cycles = bench.switch.cycles();
    let (idle, busy) = (&cycles.workers[0], &cycles.workers[1]);
    assert_eq!((idle.frames, idle.busy), (0, 0));
    assert!(busy.busy > 0 && busy.busy <= busy.up, "{busy:?}");
    assert_eq!(busy.bursts.iter().sum::<u64>() * FRAMES, busy.frames);
    assert_eq!(busy.bursts[2], busy.bursts.iter().sum::<u64>());
    assert_eq!((busy.delivered, busy.copies), (busy.frames, busy.frames));
    // The sleep is between the end of forwarding and the end of polling.
    assert!(busy.stages["publish"] > busy.stages["classify"], "{busy:?}");
    let (a, b) = (&cycles.ports[0], &cycles.ports[1]);
    assert_eq!((a.name.as_str(), b.cycles, a.cycles), ("a", 0, busy.busy));
    assert!(cycles.frequency > 1e8);
}
