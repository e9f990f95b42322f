//! What the process gives up, and that it can still do its work.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use e2e::net::Namespace;

use crate::daemon::Daemon;
use crate::vm::Vm;

const NO_PRIVILEGES: &str = "0000000000000000";
/// DAC_OVERRIDE, NET_ADMIN, NET_RAW, IPC_LOCK, BPF.
const ALL_KINDS: u64 = 1 << 1 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 39;
/// Filters of a thread of the control side, and of a worker.
const FILTERS: [&str; 2] = ["2", "3"];
/// QEMU's group in KubeVirt, and a user that is nobody.
const GROUP: u32 = 107;
const USER: u32 = 64_107;

/// Names and states of the process's threads.
fn threads(daemon: &Daemon) -> Vec<(String, BTreeMap<String, String>)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let status = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok());
    let parse = |text: String| {
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        let fields: BTreeMap<_, _> = fields.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect();
        (fields["Name"].clone(), fields)
    };
    status.map(parse).collect()
}

fn is_root() -> bool {
    // SAFETY: the call has no conditions.
    unsafe { libc::geteuid() == 0 }
}

/// Frames between two machines, in both directions, and a third that comes and goes.
fn works(daemon: &mut Daemon) {
    let (mut a, mut b) = (daemon.boot("a", 1), daemon.boot("b", 2));
    daemon.pass(&mut a, &mut b, "there");
    daemon.pass(&mut b, &mut a, "and back");
    drop(daemon.boot("c", 3));
    assert!(daemon.call(&["port", "del", "c"]).status.success());
    a.boot();
    daemon.wait_up("a");
    daemon.pass(&mut a, &mut b, "again");
    let server = daemon.path("server.sock");
    assert!(daemon.call(&["port", "add", &format!("d=vhost-user:{},mode=server", server.display())]).status.success());
    daemon.eventually("socket", |_| server.exists());
    assert!(daemon.call(&["port", "del", "d"]).status.success());
    assert!(!server.exists());
}

#[test]
fn every_thread_is_confined() {
    let mut daemon = Daemon::start(&["--sandbox", "strict"]);
    works(&mut daemon);
    let line = daemon.log().lines().find(|line| line.contains("ready")).unwrap().to_owned();
    for layer in ["no new privileges", "capabilities ", "landlock", "seccomp (workers "] {
        assert!(line.contains(layer), "no {layer} in {line}");
    }
    let threads = threads(&daemon);
    let names: Vec<_> = threads.iter().map(|(name, _)| name.as_str()).collect();
    for expected in ["sluice", "sl-worker-0", "control", "sl-housekeeper", "sl-watchdog", "sl-a"] {
        assert!(names.contains(&expected), "{expected} is not among {names:?}");
    }
    for (name, status) in &threads {
        assert_eq!(status["NoNewPrivs"], "1", "{name}");
        assert_eq!(status["Seccomp"], "2", "{name}: filtered");
        let filters = FILTERS[usize::from(name.starts_with("sl-worker"))];
        if let Some(count) = status.get("Seccomp_filters") {
            assert_eq!(count, filters, "{name}");
        }
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            let left = u64::from_str_radix(&status[set], 16).unwrap();
            assert!(!is_root() && set == "CapBnd" || left & !ALL_KINDS == 0, "{name}: {set} {left:#x}");
        }
        assert_eq!((status["CapInh"].as_str(), status["CapAmb"].as_str()), (NO_PRIVILEGES, NO_PRIVILEGES), "{name}");
    }
}

#[test]
fn only_what_the_kinds_of_port_need() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("sluice.toml");
    fs::write(&file, "[sandbox]\nmode = \"strict\"\nkinds = [\"vhost-user\"]\n").unwrap();
    let daemon = Daemon::start(&["--config", file.to_str().unwrap()]);
    for (name, status) in threads(&daemon) {
        let left = u64::from_str_radix(&status["CapEff"], 16).unwrap();
        assert_eq!(left & !(1 << 1), 0, "{name}: more than DAC_OVERRIDE: {left:#x}");
    }
    let refused = daemon.call(&["port", "add", "t=tap:sluicex0"]);
    let reason = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(reason.contains("add 'tap' to kinds of [sandbox]") && reason.lines().count() == 1, "{reason}");
}

#[test]
fn nothing_at_all_if_the_operator_says_so() {
    let daemon = Daemon::start(&["--sandbox", "off"]);
    assert!(daemon.log().contains("sandbox=none"), "{}", daemon.log());
    assert!(threads(&daemon).iter().all(|(_, status)| status["Seccomp"] == "0"));
}

/// In a folder of its own, which that user owns, and with machines whose sockets belong to the group.
#[test]
fn a_stranger_in_the_right_group_can_run_it() {
    assert!(is_root(), "this test runs as root");
    let dir = tempfile::tempdir().unwrap();
    chown(dir.path(), Some(USER), Some(GROUP)).unwrap();
    let (user, group) = (format!("--reuid={USER}"), format!("--regid={GROUP}"));
    // The program may lie where only root can go.
    let program = dir.path().join("sluice");
    fs::copy(env!("CARGO_BIN_EXE_sluice"), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut daemon =
        Daemon::start_by(dir, &["setpriv", &user, &group, "--clear-groups"], &program, &["--sandbox", "strict"]);
    for (name, status) in threads(&daemon) {
        assert_eq!(status["CapEff"], NO_PRIVILEGES, "{name}");
        assert!(status["Uid"].starts_with(&USER.to_string()), "{name}: {}", status["Uid"]);
    }
    let boot = |daemon: &mut Daemon, name: &str, number: u8| {
        let path = daemon.path(name);
        let mut vm = Vm::listen(&path, number);
        daemon.add(name, &path);
        daemon.eventually("refusal", |daemon| daemon.state(name).1.contains("no permission"));
        // As QEMU makes it, with umask 2.
        chown(&path, None, Some(GROUP)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o775)).unwrap();
        vm.boot();
        daemon.wait_up(name);
        vm
    };
    let (mut a, mut b) = (boot(&mut daemon, "a", 1), boot(&mut daemon, "b", 2));
    daemon.pass(&mut a, &mut b, "there");
    daemon.pass(&mut b, &mut a, "and back");
    let refused = daemon.call(&["port", "add", "t=tap:sluicex0"]);
    assert_eq!(refused.status.code(), Some(1));
}

#[test]
fn sockets_stay_under_their_root() {
    let dir = tempfile::tempdir().unwrap();
    let (root, outside) = (dir.path().join("sockets"), dir.path().join("outside"));
    for folder in [&root, &outside] {
        fs::create_dir(folder).unwrap();
    }
    let root_word = root.to_str().unwrap().to_owned();
    let mut daemon = Daemon::start_in(dir, &["--sandbox", "strict", "--socket-root", &root_word]);
    let mut inside = Vm::listen(&root.join("a.sock"), 1);
    daemon.add("a", &root.join("a.sock"));
    inside.boot();
    daemon.wait_up("a");

    let refused = |path: &Path| {
        let output = daemon.call(&["port", "add", &format!("x=vhost-user:{}", path.display())]);
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let reason = refused(&outside.join("x.sock"));
    assert!(reason.contains("is not under") && reason.contains("socket_root"), "{reason}");

    std::os::unix::fs::symlink(&outside, root.join("vm")).unwrap();
    daemon.add("planted", &root.join("vm/x.sock"));
    daemon.eventually("refusal", |daemon| daemon.state("planted").1.contains("leads through a symbolic link"));
}

/// Mappings of guest memory are not in core dumps.
#[test]
fn core_dumps_leave_guests_out() {
    let mut daemon = Daemon::start(&["--sandbox", "off"]);
    let vm = daemon.boot("a", 1);
    let maps = fs::read_to_string(format!("/proc/{}/smaps", daemon.pid())).unwrap();
    let (mut guest, mut seen) = (false, 0);
    for line in maps.lines() {
        if line.contains("/memfd:guest") {
            guest = true;
        } else if guest && line.starts_with("VmFlags:") {
            assert!(line.split_whitespace().any(|flag| flag == "dd"), "{line}");
            (guest, seen) = (false, seen + 1);
        }
    }
    assert!(seen > 0, "no guest memory is mapped");
    drop(vm);
}

#[test]
fn uplinks_and_taps_can_be_added_later() {
    assert!(is_root(), "this test runs as root");
    let namespace = Namespace::new().unwrap();
    let ip = |arguments: &str| namespace.run(&format!("ip {arguments}")).unwrap();
    ip("link add up0 type veth peer name far0");
    for end in ["up0", "far0"] {
        ip(&format!("link set {end} up"));
    }
    let dir = tempfile::tempdir().unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_sluice"));
    let mut daemon =
        Daemon::start_by(dir, &["ip", "netns", "exec", namespace.name()], program, &["--sandbox", "strict"]);
    for (name, spec) in [("up", "up=afxdp:up0"), ("host", "host=tap:sluice0")] {
        let added = daemon.call(&["port", "add", spec]);
        assert!(added.status.success(), "{added:?}");
        daemon.wait_up(name);
    }
    let mut vm = daemon.boot("vm", 1);
    vm.send(None, "to all");
    for name in ["up", "host"] {
        daemon.eventually("frame", |daemon| daemon.number(name, "tx_frames") > 0);
    }
    ip("link set far0 down");
    daemon.eventually("lost link", |daemon| daemon.state("up").0 != "up");
    ip("link set far0 up");
    daemon.wait_up("up");
    ip("link del sluice0");
    daemon.eventually("lost tap", |daemon| daemon.state("host").0 != "up");
    ip("tuntap add sluice0 mode tap");
    daemon.wait_up("host");
    for name in ["up", "host"] {
        assert!(daemon.call(&["port", "del", name]).status.success());
    }
}
