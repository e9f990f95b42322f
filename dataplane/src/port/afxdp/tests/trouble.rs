//! A kernel that keeps what it was given to send, and a driver that does not want it.

use super::*;

/// Bursts sent into the trouble: several times what the ring holds.
const BURSTS: u64 = 300;
/// System calls for one burst at most: to make room, and to send.
const CALLS: u64 = 2;

fn frames(len: usize) -> Vec<(Offload, Vec<u8>)> {
    (0..BURST).map(|_| plain(len)).collect()
}

/// Sends the bursts. Returns how many frames that were.
fn flood(end: &mut End, frames: &[(Offload, Vec<u8>)]) -> u64 {
    let calls = end.stats.tx(0).read().2;
    (0..BURSTS).for_each(|_| end.send(frames));
    let calls = end.stats.tx(0).read().2 - calls;
    assert!(calls <= CALLS * BURSTS, "{calls} calls for {BURSTS} bursts");
    BURSTS * BURST as u64
}

/// Frames that were sent, and those that were dropped for one of the reasons.
fn counted(end: &End) -> (u64, u64) {
    let drops = [DropReason::Full, DropReason::Refused].map(|reason| end.stats.drops(reason));
    (end.stats.tx(0).read().0, drops.iter().sum())
}

/// Looks at the queue as a worker does that has nothing else to do, until it may sleep.
fn rest(end: &mut End) {
    let link = end.queues.link();
    let (queue, mut looks) = (&link.rx[0].queue, 0);
    while queue.arm() {
        queue.disarm();
        assert_eq!(queue.poll(&mut end.storage, &mut |_| {}).unwrap(), 0);
        looks += 1;
        assert!(looks < 100_000, "a worker that never sleeps");
    }
    queue.disarm();
}

#[test]
fn frames_that_the_kernel_keeps_fill_the_ring_and_nothing_else() {
    on_a_wire(1500, |_, _| {
        // What is sent is queued behind the far end, where it goes out at a byte per second.
        ip("link add name near type veth peer name far");
        ip("link add name hub type bridge mcast_snooping 0");
        ip("link add name sink type veth peer name void");
        for name in ["far", "sink"] {
            ip(&format!("link set {name} master hub"));
        }
        for name in ["near", "far", "hub", "sink", "void"] {
            ip(&format!("link set {name} addrgenmode none up"));
        }
        tc("qdisc add dev sink root tbf rate 8bit burst 2000 limit 100m");
        let mut end = End::open("near");
        let offered = flood(&mut end, &frames(1000));
        let (sent, dropped) = counted(&end);
        assert!(sent + dropped == offered && dropped > offered / 2, "{sent} and {dropped} of {offered}");
        let [rx, tx] = end.audit();
        assert!(rx.is_balanced() && tx.is_balanced() && tx.free == 0 && tx.kernel > 2000, "{tx}");
        rest(&mut end);

        tc("qdisc del dev sink root");
        end.check_books();
        let before = counted(&end);
        end.send(&frames(1000));
        assert_eq!(counted(&end), (before.0 + BURST as u64, before.1), "all is as before");
        end.check_books();
    });
}

#[test]
fn frames_that_the_driver_refuses_are_counted() {
    on_a_wire(1500, |a, b| {
        // The other end takes no frames of that length: the driver drops them.
        ip("link set end-b mtu 500");
        let offered = flood(a, &frames(1000));
        let (sent, dropped) = counted(a);
        assert_eq!(sent + dropped, offered);
        assert!(a.stats.drops(DropReason::Refused) > 0 && a.stats.drops(DropReason::Full) > 0);
        assert!(a.audit().iter().all(umem::Audit::is_balanced), "{:?}", a.audit());
        rest(a);
        assert!(b.receive(1).is_empty());

        ip("link set end-b mtu 1500");
        a.queues.retry();
        let mut arrived = b.receive(usize::MAX).len() as u64;
        // What was refused last shows in the counters with what is sent next.
        for _ in 0..2048 / BURST {
            a.send(&frames(1000));
            arrived += b.receive(BURST).len() as u64;
        }
        arrived += b.receive(usize::MAX).len() as u64;
        assert_eq!(counted(a).0, arrived, "what counts as sent has arrived");
        assert_eq!(a.stats.drops(DropReason::Refused) + a.stats.drops(DropReason::Full) + arrived, offered + 2048);
    });
}

fn tc(arguments: &str) {
    run("tc", arguments);
}

/// Jumbo frames take several of the pool's each.
#[test]
fn what_the_kernel_loses_is_counted_once() {
    for (mode, len) in [(AfxdpMode::Copy, 100), (AfxdpMode::Skb, 100), (AfxdpMode::Copy, 9000)] {
        on_a_wire_with(9000, Options { mode, ..Options::default() }, move |a, b| {
            let frames: Vec<_> = (0..BURST).map(|_| plain(len)).collect();
            b.queues.count_missed();
            assert_eq!(b.stats.drops(DropReason::Missed), 0);
            let mut received = 0;
            for round in 1..3 {
                for _ in 0..100 {
                    a.send(&frames);
                }
                let missed = || b.stats.drops(DropReason::Missed);
                let (sent, before) = (a.stats.tx(0).read().0, missed());
                let began = Instant::now();
                while received + missed() + 2048 < sent || missed() == before {
                    b.queues.count_missed();
                    assert!(began.elapsed() < Duration::from_secs(5), "{sent} {received} {}", missed());
                }
                received += b.receive(usize::MAX).len() as u64;
                b.queues.count_missed();
                let missed = b.stats.drops(DropReason::Missed);
                assert_eq!(received + missed, sent, "{mode:?} {len} {round}");
                assert_eq!(b.stats.rx(0).read().0, received);
            }
        });
    }
}
