//! The control service as other programs use it: codes, streams, and what is left after a refusal.

// Helpers of tests are not tests to the linter.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice::config::{PortConfig, SwitchConfig, WorkerMode};
use sluice::control::{About, ControlSocket, Controller, ServerHandle, StateStore, port_to_proto, serve};
use sluice::switch::Switch;
use sluice_proto::channel;
use sluice_proto::sluice::v1 as proto;
use sluice_proto::sluice::v1::control_client::ControlClient;
use tempfile::TempDir;
use tonic::Code;
use tonic::transport::Channel;

/// A switch with its control service in this process.
struct Bench {
    dir: TempDir,
    switch: Arc<Switch>,
    controller: Arc<Controller>,
    metrics: SocketAddr,
    server: ServerHandle,
}

impl Bench {
    fn start() -> Self {
        // The server has a runtime of its own, which cannot be entered from within the test's.
        std::thread::spawn(Self::start_here).join().unwrap()
    }

    fn start_here() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let control = dir.path().join("ctl.sock");
        let state_dir = dir.path().join("state");
        let store = StateStore::open(&state_dir).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let socket = runtime.block_on(ControlSocket::bind(&control, None)).unwrap();
        let switch = Switch::start(&SwitchConfig::default()).unwrap();
        let about = About { mode: WorkerMode::Adaptive, control, state_dir };
        let controller = Controller::new(switch.clone(), store, about);
        controller.bring_up(&[], &[], Vec::new()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let metrics = listener.local_addr().unwrap();
        let server = serve(runtime, controller.clone(), socket, Some(listener), ()).unwrap();
        Self { dir, switch, controller, metrics, server }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("ctl.sock")
    }

    fn port(&self, name: &str) -> proto::PortConfig {
        port_to_proto(&port_at(name, &self.dir.path().join(name).with_extension("sock")))
    }

    fn stop(self) {
        let socket = self.socket();
        self.server.stop().unwrap();
        self.switch.stop();
        assert!(!socket.exists());
    }
}

/// A vhost-user port whose frontend listens, or does not, at a path.
fn port_at(name: &str, socket: &Path) -> PortConfig {
    format!("{name}=vhost-user:{}", socket.display()).parse().unwrap()
}

async fn client(socket: &Path) -> ControlClient<Channel> {
    let stream = tokio::net::UnixStream::connect(socket).await.unwrap();
    ControlClient::new(channel::over(stream, None).await.unwrap())
}

async fn add(client: &mut ControlClient<Channel>, port: proto::PortConfig) -> Result<proto::PortStatus, tonic::Status> {
    let request = proto::AddPortRequest { config: Some(port), ..Default::default() };
    client.add_port(request).await.map(|response| response.into_inner().port.unwrap())
}

async fn names(client: &mut ControlClient<Channel>) -> Vec<String> {
    let response = client.list_ports(proto::ListPortsRequest::default()).await.unwrap();
    response.into_inner().ports.into_iter().map(|port| port.name).collect()
}

#[tokio::test]
async fn refusals_have_codes_and_change_nothing() {
    let bench = Bench::start();
    let mut client = client(&bench.socket()).await;
    assert_eq!(add(&mut client, bench.port("vm1")).await.unwrap().name, "vm1");

    type Change = fn(&mut proto::PortConfig);
    let cases: [(Change, Code); 9] = [
        (|port| port.name = "a b".into(), Code::InvalidArgument),
        (|port| port.target = None, Code::InvalidArgument),
        (|port| port.vlan = Some(4095), Code::InvalidArgument),
        (|port| port.mtu = Some(70_000), Code::InvalidArgument),
        (|port| port.trunk = Some(proto::VlanSet::default()), Code::InvalidArgument),
        (|port| port.mac = Some("01:00:00:00:00:01".into()), Code::InvalidArgument),
        (|port| port.spoofcheck = true, Code::InvalidArgument),
        (|port| port.name = "vm1".into(), Code::AlreadyExists),
        (
            |port| {
                let target = proto::VhostUserTarget { path: "/nonexistent/a.sock".into(), mode: 0 };
                port.target = Some(proto::port_config::Target::VhostUser(target));
            },
            Code::FailedPrecondition,
        ),
    ];
    for (change, code) in cases {
        let mut port = bench.port("vm2");
        change(&mut port);
        let status = add(&mut client, port).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(!status.message().contains('\n'));
        assert_eq!(names(&mut client).await, ["vm1"]);
    }
    let gone = client.remove_port(proto::RemovePortRequest { name: "vm2".into(), owner: None }).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    let none = client.add_port(proto::AddPortRequest::default()).await.unwrap_err();
    assert_eq!(none.code(), Code::InvalidArgument);
    let often =
        client.watch_stats(proto::WatchStatsRequest { interval_ms: 1, ..Default::default() }).await.unwrap_err();
    assert_eq!(often.code(), Code::InvalidArgument);
    client.remove_port(proto::RemovePortRequest { name: "vm1".into(), owner: None }).await.unwrap();
    assert!(names(&mut client).await.is_empty());
    bench.stop();
}

#[tokio::test]
async fn a_name_is_free_again_after_a_failed_write() {
    let bench = Bench::start();
    let mut client = client(&bench.socket()).await;
    let obstacle = bench.dir.path().join("state/ports.json.new");
    std::fs::create_dir(&obstacle).unwrap();
    assert_eq!(add(&mut client, bench.port("vm1")).await.unwrap_err().code(), Code::Internal);
    assert!(names(&mut client).await.is_empty());
    std::fs::remove_dir(&obstacle).unwrap();
    add(&mut client, bench.port("vm1")).await.unwrap();
    bench.stop();
}

#[tokio::test]
async fn watching_starts_at_once_and_ends_with_the_switch() {
    let bench = Bench::start();
    let mut client = client(&bench.socket()).await;
    add(&mut client, bench.port("vm1")).await.unwrap();
    let started = Instant::now();
    let request = proto::WatchStatsRequest { interval_ms: 200, ..Default::default() };
    let mut answers = client.watch_stats(request).await.unwrap().into_inner();
    let mut times = Vec::new();
    for _ in 0..3 {
        let stats = answers.message().await.unwrap().unwrap().stats.unwrap();
        assert_eq!(stats.ports[0].name, "vm1");
        times.push(stats.time_ns);
    }
    let elapsed = started.elapsed();
    assert!(elapsed >= Duration::from_millis(350) && elapsed < Duration::from_secs(10), "{elapsed:?}");
    assert!(times.is_sorted());
    bench.stop();
    // What was under way may still come.
    while let Ok(Some(_)) = answers.message().await {}
}

/// However soon there is another port of its name.
#[tokio::test]
async fn a_capture_ends_with_its_port() {
    let bench = Bench::start();
    let mut client = client(&bench.socket()).await;
    add(&mut client, bench.port("vm1")).await.unwrap();
    let request = proto::CaptureRequest { name: "vm1".into(), ..Default::default() };
    let mut answers = client.capture(request.clone()).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap();
    let config = bench.switch.port_config("vm1").unwrap();
    bench.controller.remove_port("vm1", None).unwrap();
    bench.controller.add_port(config, false, || true).unwrap();
    let end = tokio::time::timeout(Duration::from_secs(5), answers.message()).await;
    assert!(end.expect("the capture goes on").unwrap().is_none());
    client.capture(request).await.unwrap();
    bench.stop();
}

#[tokio::test]
async fn ports_come_and_go_side_by_side() {
    let bench = Bench::start();
    let tasks = (0..8).map(|task| {
        let (socket, ports) = (bench.socket(), (0..8).map(|n| bench.port(&format!("p{task}-{n}"))).collect::<Vec<_>>());
        tokio::spawn(async move {
            let mut client = client(&socket).await;
            for port in ports {
                let name = port.name.clone();
                add(&mut client, port).await.unwrap();
                client.remove_port(proto::RemovePortRequest { name, owner: None }).await.unwrap();
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert!(names(&mut client(&bench.socket()).await).await.is_empty());
    let table = std::fs::read_to_string(bench.dir.path().join("state/ports.json")).unwrap();
    assert!(table.contains("\"ports\": []"), "{table}");
    bench.stop();
}

#[test]
fn readiness_follows_the_controller() {
    let bench = Bench::start();
    let ask = || {
        let mut stream = TcpStream::connect(bench.metrics).unwrap();
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().to_owned()
    };
    assert_eq!(ask(), "503");
    bench.controller.set_ready(true);
    assert_eq!(ask(), "200");
    bench.controller.set_ready(false);
    assert_eq!(ask(), "503");
    bench.stop();
}

#[test]
fn a_start_that_fails_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let port = |name: &str, socket: &str| port_at(name, &dir.path().join(socket));
    let (one, same) = (port("vm1", "x.sock"), port("vm2", "x.sock"));
    let mut store = StateStore::open(dir.path()).unwrap();
    store.replace(vec![port("old", "old.sock")]).unwrap();
    let table = std::fs::read_to_string(dir.path().join("ports.json")).unwrap();
    let about = About { mode: WorkerMode::Adaptive, control: "/c".into(), state_dir: dir.path().into() };
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let controller = Controller::new(switch.clone(), store, about);
    let error = controller.bring_up(std::slice::from_ref(&one), &[same], Vec::new()).unwrap_err();
    assert!(error.to_string().contains("is used by port vm1 already"), "{error}");
    assert_eq!(std::fs::read_to_string(dir.path().join("ports.json")).unwrap(), table);
    switch.stop();
}

#[test]
fn a_given_port_takes_the_target_of_an_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let port = |name: &str, socket: &str| port_at(name, &dir.path().join(socket));
    let mut store = StateStore::open(dir.path()).unwrap();
    store.replace(vec![port("old", "x.sock"), port("b", "b.sock")]).unwrap();
    let about = About { mode: WorkerMode::Adaptive, control: "/c".into(), state_dir: dir.path().into() };
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let controller = Controller::new(switch.clone(), store, about);
    controller.bring_up(&[port("new", "x.sock")], &[], Vec::new()).unwrap();
    let names: Vec<_> = switch.ports().into_iter().map(|port| port.name).collect();
    assert_eq!(names, ["b", "new"]);
    let table = std::fs::read_to_string(dir.path().join("ports.json")).unwrap();
    assert!(table.contains("b=vhost") && !table.contains("old=") && !table.contains("new="), "{table}");
    switch.stop();
}

/// What is only a matter of tidiness need not be written, and what is new has to be.
#[test]
fn a_full_disk_does_not_keep_a_switch_from_starting() {
    let dir = tempfile::tempdir().unwrap();
    let port = |name: &str| port_at(name, &dir.path().join(name));
    let start = |arguments: &[PortConfig]| {
        let store = StateStore::open(dir.path()).unwrap();
        let about = About { mode: WorkerMode::Adaptive, control: "/c".into(), state_dir: dir.path().into() };
        let switch = Switch::start(&SwitchConfig::default()).unwrap();
        let result = Controller::new(switch.clone(), store, about).bring_up(&[], arguments, Vec::new());
        let ports = switch.ports().len();
        switch.stop();
        result.map(|_| ports).map_err(|error| error.to_string())
    };
    assert_eq!(start(&[port("a"), port("b")]), Ok(2));
    // In the way of whatever is written.
    std::fs::create_dir(dir.path().join("ports.json.new")).unwrap();
    assert_eq!(start(&[port("a"), port("b")]), Ok(2));
    assert_eq!(start(&[port("a")]), Ok(2), "another order");
    assert!(start(&[port("c")]).unwrap_err().contains("cannot write"));
}

/// A runtime that has given up on a pod asks for its end once, and finds no port then.
#[tokio::test]
async fn a_port_that_nobody_waits_for_is_not_added() {
    let bench = Bench::start();
    let add = |name, until: u32| {
        let asked = std::cell::Cell::new(0);
        let is_wanted = || asked.replace(asked.get() + 1) < until;
        bench
            .controller
            .add_port(port_at(name, &bench.dir.path().join("x.sock")), false, is_wanted)
            .map_err(|error| error.to_string())
    };
    for until in [0, 1] {
        assert!(add("a", until).unwrap_err().contains("did not wait"), "{until}");
        assert!(bench.switch.ports().is_empty());
    }
    add("a", 2).unwrap();
    bench.stop();
}

/// A port that another was to take the place of is there again if that was not to be, as it was: written down or not, and
/// pinned.
#[test]
fn a_port_whose_successor_nobody_waits_for_stays() {
    let dir = tempfile::tempdir().unwrap();
    let port = |name: &str, owner: &str| -> PortConfig {
        format!("{name}=vhost-user:{},owner={owner}", dir.path().join(name).display()).parse().unwrap()
    };
    let mut store = StateStore::open(dir.path()).unwrap();
    // As one that could not be restored, and is tried again at the next start.
    store.replace(vec![port("absent", "first")]).unwrap();
    let about = About { mode: WorkerMode::Adaptive, control: dir.path().join("c"), state_dir: dir.path().into() };
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let controller = Controller::new(switch.clone(), store, about);
    // As one of the file.
    switch.add_port(port("file", "first")).unwrap();
    controller.add_port(port("p", "first"), true, || true).unwrap();
    controller.pin("p=0".parse().unwrap()).unwrap();
    let written = || std::fs::read_to_string(dir.path().join("ports.json")).unwrap();
    let before = written();
    for name in ["file", "p", "absent"] {
        let asked = std::cell::Cell::new(0);
        let error =
            controller.add_port(port(name, "second"), true, || asked.replace(asked.get() + 1) == 0).unwrap_err();
        assert!(error.to_string().contains("did not wait"), "{error}");
        assert_eq!(written(), before, "{name}");
    }
    let owners: Vec<_> = switch.port_configs().into_iter().map(|port| (port.name, port.owner)).collect();
    assert_eq!(owners, ["file", "p"].map(|name| (name.to_owned(), Some("first".to_owned()))));
    controller.unpin(&"p".parse().unwrap()).unwrap();
    switch.stop();
}

/// A pin holds until its port is removed, and one that another takes the place of is.
#[test]
fn a_port_that_is_replaced_leaves_no_pin() {
    let dir = tempfile::tempdir().unwrap();
    let port = |owner: &str| -> PortConfig {
        format!("p=vhost-user:{},owner={owner}", dir.path().join("p").display()).parse().unwrap()
    };
    let store = StateStore::open(dir.path()).unwrap();
    let about = About { mode: WorkerMode::Adaptive, control: "/c".into(), state_dir: dir.path().into() };
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let controller = Controller::new(switch.clone(), store, about);
    controller.add_port(port("first"), true, || true).unwrap();
    controller.pin("p=0".parse().unwrap()).unwrap();
    controller.add_port(port("second"), true, || true).unwrap();
    assert!(controller.unpin(&"p".parse().unwrap()).is_err());
    let pins = std::fs::read_to_string(dir.path().join("pins.json")).unwrap();
    assert!(pins.contains("\"pins\": []"), "{pins}");
    switch.stop();
}

/// Ports whose owners left a note while nobody listened are not even restored. A note is about what was there before it.
#[test]
fn ports_that_are_noted_as_gone_go() {
    let dir = tempfile::tempdir().unwrap();
    let port = |name: &str, owner: &str| -> PortConfig {
        format!("{name}=vhost-user:{},owner={owner}", dir.path().join(name).display()).parse().unwrap()
    };
    let mut store = StateStore::open(dir.path()).unwrap();
    store.replace(vec![port("a", "cni/a/if/x"), port("b", "cni/b/if/x")]).unwrap();
    let control = dir.path().join("c.sock");
    let leave = |owner: &str| std::fs::write(sluice_proto::gone::note(&control, owner).unwrap(), "").unwrap();
    let notes = || {
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().contains(".gone.")).count()
    };
    leave("cni/a/if/");
    let about = About { mode: WorkerMode::Adaptive, control: control.clone(), state_dir: dir.path().into() };
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let controller = Controller::new(switch.clone(), store, about);
    controller.bring_up(&[], &[], Vec::new()).unwrap();
    let names = || switch.ports().into_iter().map(|port| port.name).collect::<Vec<_>>();
    assert_eq!((names(), notes()), (vec!["b".to_owned()], 0));
    let table = std::fs::read_to_string(dir.path().join("ports.json")).unwrap();
    assert!(table.contains("b=vhost") && !table.contains("a=vhost"), "{table}");

    leave("cni/c/if/");
    leave("cni/d/if/");
    controller.add_port(port("c", "cni/c/if/x"), true, || true).unwrap();
    assert_eq!((names(), notes()), (vec!["b".to_owned(), "c".to_owned()], 1));
    switch.stop();
}

/// A bench with one worker: what can be pinned, what is refused, and what is kept.
#[tokio::test]
async fn pins_are_checked_and_kept() {
    let bench = Bench::start();
    let mut client = client(&bench.socket()).await;
    add(&mut client, bench.port("vm1")).await.unwrap();
    let pin = |port: &str, queue, worker| proto::PinQueueRequest { port: port.into(), queue, worker };
    let unpin = |port: &str, queue| proto::UnpinQueueRequest { port: port.into(), queue };
    let kept = || std::fs::read_to_string(bench.dir.path().join("state/pins.json")).unwrap_or_default();
    client.pin_queue(pin("vm1", None, 0)).await.unwrap();
    client.pin_queue(pin("vm1", Some(3), 0)).await.unwrap();
    assert!(kept().contains("\"vm1=0\"") && kept().contains("\"vm1:3=0\""), "{}", kept());
    let before = kept();
    for (request, code) in [
        (pin("vm1", None, 1), Code::InvalidArgument),
        (pin("vm1", Some(256), 0), Code::InvalidArgument),
        (pin("vm 1", None, 0), Code::InvalidArgument),
        (pin("vm2", None, 0), Code::NotFound),
    ] {
        let status = client.pin_queue(request).await.unwrap_err();
        assert_eq!((status.code(), kept()), (code, before.clone()), "{status:?}");
    }
    assert_eq!(client.unpin_queue(unpin("vm1", Some(2))).await.unwrap_err().code(), Code::NotFound);
    client.unpin_queue(unpin("vm1", Some(3))).await.unwrap();
    assert!(kept().contains("\"vm1=0\"") && !kept().contains("vm1:3"), "{}", kept());
    // They go with their port.
    client.remove_port(proto::RemovePortRequest { name: "vm1".into(), owner: None }).await.unwrap();
    assert!(!kept().contains("vm1"), "{}", kept());
    assert_eq!(client.unpin_queue(unpin("vm1", None)).await.unwrap_err().code(), Code::NotFound);

    let list = client.list_workers(proto::ListWorkersRequest {}).await.unwrap().into_inner();
    assert_eq!((list.workers.len(), list.mode.as_str(), list.rebalance, list.queues.len()), (1, "adaptive", true, 0));
    let stats = async |client: &mut ControlClient<Channel>, cycles| {
        client.get_stats(proto::GetStatsRequest { cycles }).await.unwrap().into_inner().stats.unwrap()
    };
    assert!(stats(&mut client, false).await.cycles.is_none());
    assert_eq!(stats(&mut client, true).await.cycles.unwrap().workers.len(), 1);
    bench.stop();
}

/// An owner manages its ports without stepping on those of others.
#[tokio::test]
async fn owners_keep_their_ports() {
    let bench = Bench::start();
    let mut client = client(&bench.socket()).await;
    let owned = |owner: &str| proto::PortConfig { owner: Some(owner.into()), ..bench.port("vm1") };
    let replace = |config| proto::AddPortRequest { config: Some(config), replace_owner: true };
    let remove = |owner: &str| proto::RemovePortRequest { name: "vm1".into(), owner: Some(owner.into()) };

    // Once more is as good as once; something else is not.
    add(&mut client, owned("a/1")).await.unwrap();
    add(&mut client, owned("a/1")).await.unwrap();
    client.add_port(replace(owned("a/1"))).await.unwrap();
    let other = proto::PortConfig { mtu: Some(1400), ..owned("a/1") };
    assert_eq!(add(&mut client, other.clone()).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(client.add_port(replace(other)).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(add(&mut client, owned("a/2")).await.unwrap_err().code(), Code::AlreadyExists);

    // The old owner comes late.
    let port = client.add_port(replace(owned("a/2"))).await.unwrap().into_inner().port.unwrap();
    assert_eq!(port.owner.as_deref(), Some("a/2"));
    let late = client.remove_port(remove("a/1")).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition);
    assert!(late.message().contains("belongs to a/2, not to a/1"), "{late}");
    let list = async |client: &mut ControlClient<Channel>, owner: &str, target: &str| {
        let request = proto::ListPortsRequest { owner_prefix: owner.into(), target_prefix: target.into() };
        client.list_ports(request).await.unwrap().into_inner().ports.len()
    };
    let folder = bench.dir.path().to_str().unwrap().to_owned();
    assert_eq!(list(&mut client, "a/", "").await, 1);
    assert_eq!(list(&mut client, "a/1", "").await, 0);
    assert_eq!(list(&mut client, "", &format!("{folder}/")).await, 1);
    assert_eq!(list(&mut client, "", &format!("{folder}/vm2")).await, 0);
    client.remove_port(remove("a/2")).await.unwrap();
    assert_eq!(client.remove_port(remove("a/2")).await.unwrap_err().code(), Code::NotFound);

    // What the operator has added nobody takes away.
    add(&mut client, bench.port("vm1")).await.unwrap();
    assert_eq!(add(&mut client, bench.port("vm1")).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(client.add_port(replace(owned("a/1"))).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(client.remove_port(remove("a/1")).await.unwrap_err().code(), Code::FailedPrecondition);
    client.remove_port(proto::RemovePortRequest { name: "vm1".into(), owner: None }).await.unwrap();
    bench.stop();
}
