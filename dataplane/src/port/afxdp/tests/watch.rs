//! The thread of a port, looking once at a time.

use super::*;
use crate::sandbox::{self, Needs, SandboxMode};
use crate::testing::Told;
use program::{Hook, Program};

fn watcher(interface: &str, options: Options) -> (Watcher, Arc<Told>) {
    let told = Arc::new(Told::default());
    (Watcher::new("up", interface, options, told.clone()).unwrap(), told)
}

fn index(interface: &str) -> u32 {
    Device::new(interface).unwrap().state().unwrap().unwrap().index
}

/// Confines this thread as the whole process is.
fn confine() {
    let (state, control) = (std::env::temp_dir(), std::env::temp_dir().join("control.sock"));
    let (mode, kinds) = (SandboxMode::Auto, vec!["afxdp".into()]);
    sandbox::apply(&Needs { mode, kinds, state, control, socket_root: None }).unwrap();
}

#[test]
fn programs_of_others_are_replaced_from_within_the_sandbox() {
    in_a_namespace(|| {
        for name in ["up0", "up1"] {
            ip(&format!("link add name {name} type veth peer name {name}-far"));
            ip(&format!("link set {name} up"));
            ip(&format!("link set {name}-far up"));
        }
        let replace = Options { replace: true, ..Options::default() };
        program::attach_without_link(index("up0")).unwrap();
        let theirs = Program::attach(index("up1"), Hook::Native, 1).unwrap();
        confine();
        let (mut a, told) = watcher("up0", replace);
        a.look().unwrap();
        assert_eq!(told.state(), Some((PortState::Up, None)));
        a.close(PortState::Down, "");
        // By a link, which is not for us to look up.
        let (mut b, _) = watcher("up1", replace);
        let error = b.look().unwrap_err();
        assert!(
            error.kind() == ErrorKind::AlreadyExists && error.to_string().contains("bpftool link detach"),
            "{error}"
        );
        drop(theirs);
        b.look().unwrap();
        b.close(PortState::Down, "");
    });
}

#[test]
fn what_the_kernel_loses_is_counted_over_all_openings() {
    in_a_namespace(|| {
        ip("link add name up0 type veth peer name far0");
        ip("link set up0 addrgenmode none up");
        ip("link set far0 addrgenmode none up");
        let (mut watcher, told) = watcher("up0", Options::default());
        watcher.look().unwrap();
        let mut far = End::open("far0");
        let frames: Vec<_> = (0..BURST).map(|_| plain(100)).collect();
        for opening in 1..3 {
            // Nobody takes what fits.
            let lost = opening * (100 * BURST as u64 - 2048);
            (0..100).for_each(|_| far.send(&frames));
            let began = Instant::now();
            while told.stats().drops(DropReason::Missed) < lost {
                assert!(began.elapsed() < Duration::from_secs(5), "{}", told.stats().drops(DropReason::Missed));
                far.queues.retry();
                watcher.look().unwrap();
            }
            watcher.close(PortState::Down, "");
            watcher.look().unwrap();
            assert_eq!(told.stats().drops(DropReason::Missed), lost);
        }
        watcher.close(PortState::Down, "");
    });
}

#[test]
fn nothing_is_sent_where_there_are_queues_to_receive_only() {
    in_a_namespace(|| {
        ip("link add name up0 numrxqueues 2 numtxqueues 1 type veth peer name far0 numrxqueues 1 numtxqueues 2");
        ip("link set up0 up");
        ip("link set far0 up");
        let (mut watcher, told) = watcher("up0", Options::default());
        watcher.look().unwrap();
        assert_eq!(told.queues(), (2, 1));
        watcher.close(PortState::Down, "");
    });
}

#[test]
fn queues_that_are_added_are_served() {
    in_a_namespace(|| {
        for name in ["up0", "up1"] {
            ip(&format!("link add name {name} numrxqueues 3 numtxqueues 3 type veth peer name {name}-far"));
            ip(&format!("link set {name} up"));
            ip(&format!("link set {name}-far up"));
            run("ethtool", &format!("-L {name} rx 1 tx 1"));
        }
        let (mut all, told) = watcher("up0", Options::default());
        let (mut one, told_one) = watcher("up1", Options { queues: Some(1), ..Options::default() });
        for watcher in [&mut all, &mut one] {
            watcher.look().unwrap();
        }
        assert_eq!((told.queues(), told_one.queues()), ((1, 1), (1, 1)));
        for name in ["up0", "up1"] {
            run("ethtool", &format!("-L {name} rx 3 tx 2"));
        }
        assert!(all.look().is_err() && told.state().is_some_and(|(state, _)| state == PortState::Down));
        let began = Instant::now();
        while all.look().is_err() {
            assert!(began.elapsed() < Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(told.queues(), (3, 2));
        // As many as were asked for.
        one.look().unwrap();
        assert_eq!((told_one.queues(), told_one.stats.connects.load(Ordering::Relaxed)), ((1, 1), 1));
        for watcher in [&mut all, &mut one] {
            watcher.close(PortState::Down, "");
        }
    });
}

#[test]
fn what_cannot_be_found_out_changes_nothing() {
    in_a_namespace(|| {
        ip("link add name up0 type veth peer name far0");
        ip("link set up0 up");
        ip("link set far0 up");
        let (mut watcher, told) = watcher("up0", Options::default());
        watcher.look().unwrap();
        // Nobody there knows the request.
        watcher.requests = Netlink::open_generic().unwrap();
        assert!(watcher.requests.xdp(index("up0")).is_err());
        watcher.look().unwrap();
        assert_eq!((told.state(), told.stats.connects.load(Ordering::Relaxed)), (Some((PortState::Up, None)), 1));
        watcher.close(PortState::Down, "");
    });
}
