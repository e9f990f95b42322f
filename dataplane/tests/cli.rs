//! The command as an operator uses it: the real binary, a real socket, a real state directory.

// Helpers of tests are not tests to the linter.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use e2e::process::{wait_child, wait_output};
use e2e::wait;
use serde_json::{Value, json};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);
const NOBODY: u32 = 65_534;

fn sluice() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command.env_remove("SLUICE_SOCKET").env_remove("SLUICE_LOG");
    command
}

/// A folder with a control socket and a state directory, and what was started in it.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn spec(&self, name: &str) -> String {
        format!("{name}=vhost-user:{}", self.path(&format!("{name}.sock")).display())
    }

    fn file(&self, text: &str) -> PathBuf {
        let path = self.path("sluice.toml");
        fs::write(&path, text).unwrap();
        path
    }

    /// `sluice run` in this folder.
    fn run(&self, args: &[&str]) -> Command {
        let mut command = sluice();
        command.arg("run").arg("--control").arg(self.path("ctl.sock")).arg("--state").arg(self.path("state"));
        command.args(args);
        command
    }

    fn start(&self, args: &[&str]) -> Daemon {
        Daemon::spawn(self.run(args))
    }

    /// A client command.
    fn call(&self, args: &[&str]) -> Output {
        ended(sluice().args(args).arg("--socket").arg(self.path("ctl.sock")))
    }

    fn text(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let args: Vec<_> = args.iter().copied().chain(["--json"]).collect();
        serde_json::from_str(&self.text(&args)).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let ports = self.json(&["port", "list"]);
        ports.as_array().unwrap().iter().map(|port| port["name"].as_str().unwrap().into()).collect()
    }

    fn table(&self) -> String {
        fs::read_to_string(self.path("state/ports.json")).unwrap()
    }
}

/// A running switch; killed when it goes out of scope.
struct Daemon {
    child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Daemon {
    fn spawn(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, copy) = (child.stderr.take().unwrap(), log.clone());
        let reader = thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = copy.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        let mut daemon = Self { child, log, reader: Some(reader) };
        daemon.wait_for("ready");
        daemon
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in {:?}", self.log());
            assert!(self.child.try_wait().unwrap().is_none(), "ended early: {:?}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(self.child.id().to_string()).status().unwrap();
        assert!(sent.success());
    }

    /// Stops it, and returns its log.
    fn stop(mut self, signal: &str) -> String {
        self.signal(signal);
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "does not stop");
            thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(status.code(), Some(0), "{}", self.log());
        self.reader.take().unwrap().join().unwrap();
        self.log()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Checks for exactly one line on standard error that says `expected`, nothing else, and the exit code.
#[track_caller]
fn assert_refused(output: &Output, code: i32, expected: &str) {
    let line = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{line}");
    assert!(line.starts_with("sluice: ") && line.contains(expected), "{line:?} does not say {expected:?}");
    assert_eq!(line.matches('\n').count(), 1, "{line:?}");
    assert!(output.stdout.is_empty());
}

/// What a command prints that has to end by itself.
fn ended(command: &mut Command) -> Output {
    e2e::process::output(command, PATIENCE).unwrap()
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").unwrap().uid() == 0
}

fn long_path(dir: &Path) -> String {
    format!("{}/{}", dir.display(), "x".repeat(108))
}

#[test]
fn a_life() {
    let bench = Bench::new();
    let daemon =
        bench.start(&["--mode", "poll", "--cpu", "0", "--port", &bench.spec("vm1"), "--port", &bench.spec("vm2")]);
    assert_eq!(bench.names(), ["vm1", "vm2"]);

    assert_eq!(
        bench.text(&["port", "add", &(bench.spec("vm3") + ",network=blue,vlan=7,trunk=10,20-22,mtu=9000,queues=4")]),
        ""
    );
    assert_eq!(bench.names(), ["vm1", "vm2", "vm3"]);
    let shown = bench.json(&["port", "show", "vm3"]);
    for (key, value) in [
        ("name", json!("vm3")),
        ("kind", json!("vhost-user")),
        ("target", json!(bench.path("vm3.sock"))),
        ("network", json!("blue")),
        ("vlan", json!(7)),
        ("trunk", json!([10, 20, 21, 22])),
        ("mtu", json!(9000)),
        ("mac", Value::Null),
        ("spoofcheck", json!(false)),
        ("state", json!("connecting")),
        ("rx_frames", json!(0)),
        ("queues", json!([])),
    ] {
        assert_eq!(shown[key], value, "{key}");
    }
    assert!(shown["drops"].is_object() && shown["features"].is_array());
    let text = bench.text(&["port", "show", "vm3"]);
    assert!(text.contains("vlan        7,trunk=10,20-22\n"), "{text}");
    let list = bench.text(&["port", "list"]);
    let rows: Vec<_> = list.lines().collect();
    assert!(rows[0].starts_with("NAME  KIND ") && rows.len() == 4, "{list}");

    assert_eq!(bench.text(&["port", "del", "vm1"]), "");
    assert_eq!(bench.json(&["port", "del", "vm2"]), json!({ "removed": "vm2" }));
    assert_eq!(bench.names(), ["vm3"]);
    assert_eq!(bench.json(&["port", "add", &bench.spec("vm1")])["name"], "vm1");
    daemon.stop("TERM");
    assert!(!bench.path("ctl.sock").exists());
}

#[test]
fn ports_that_come_and_go_leave_nothing() {
    let bench = Bench::new();
    let daemon = bench.start(&["--port", &bench.spec("stays")]);
    let count = |what: &str| fs::read_dir(format!("/proc/{}/{what}", daemon.child.id())).unwrap().count();
    let counts = || (count("fd"), count("task"));
    // When it answers it has all that it needs; what the answer took is gone a moment later.
    assert_eq!(bench.names(), ["stays"]);
    let settled = wait::until_stays("a daemon at rest", PATIENCE, Duration::from_secs(2), || Ok(counts()));
    let before = settled.unwrap();
    for _ in 0..2 {
        for n in 0..32 {
            let mode = if n % 2 == 0 { ",mode=server" } else { "" };
            bench.text(&["port", "add", &(bench.spec(&format!("p{n}")) + mode)]);
        }
        assert_eq!(bench.names().len(), 33);
        for n in 0..32 {
            bench.text(&["port", "del", &format!("p{n}")]);
        }
    }
    assert_eq!(bench.names(), ["stays"]);
    // The last connections, and the thread that changes run on, take a moment to end.
    let deadline = Instant::now() + PATIENCE;
    while counts() != before {
        assert!(Instant::now() < deadline, "{before:?} became {:?}", counts());
        thread::sleep(Duration::from_millis(50));
    }
    daemon.stop("TERM");
}

#[test]
fn the_switch_tells_about_itself() {
    let bench = Bench::new();
    let daemon = bench.start(&["--port", &bench.spec("vm1")]);
    let status = bench.json(&["status"]);
    let mut keys: Vec<_> = status.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    let expected = [
        "control",
        "fdb_entries",
        "memory_bytes",
        "mode",
        "pid",
        "ports",
        "state_dir",
        "totals",
        "uptime_seconds",
        "version",
        "workers",
    ];
    assert_eq!(keys, expected);
    assert_eq!((&status["totals"]["rx_frames"], &status["totals"]["drops"]), (&json!(0), &json!({})));
    let memory = status["memory_bytes"].as_u64().unwrap();
    assert!((1 << 20..64 << 20).contains(&memory), "{memory}");
    assert_eq!(status["pid"], daemon.child.id());
    assert_eq!((&status["mode"], &status["ports"]), (&json!("adaptive"), &json!(1)));
    assert_eq!(status["control"], json!(bench.path("ctl.sock")));
    assert!(bench.text(&["status"]).contains("mode       adaptive"));
    assert_eq!(bench.json(&["fdb", "show"]), json!([]));
    assert_eq!(bench.json(&["fdb", "flush", "--network", "blue"]), json!({ "flushed": 0 }));
    assert_eq!(bench.text(&["fdb", "flush"]), "0 addresses forgotten\n");
    assert_eq!(bench.json(&["stats"])["ports"][0]["name"], "vm1");
    assert!(bench.text(&["stats"]).starts_with("PORT  STATE "));
}

#[test]
fn workers_are_listed_and_queues_pinned() {
    let bench = Bench::new();
    let two = bench.file("[[worker]]\n[[worker]]\n");
    let two = two.to_str().unwrap();
    let daemon = bench.start(&["--config", two, "--rebalance", "off", "--port", &bench.spec("vm1")]);
    let list = bench.text(&["worker", "list"]);
    let rows: Vec<_> = list.lines().collect();
    assert!(rows[0].starts_with("WORKER  CPU  MODE ") && rows[2].contains(" 1    -  adaptive "), "{list}");
    assert!(list.contains("'rebalance' is off"), "{list}");
    let json = bench.json(&["worker", "list"]);
    assert_eq!((json["workers"].as_array().unwrap().len(), &json["rebalance"]), (2, &json!(false)));

    assert_eq!(bench.text(&["worker", "pin", "vm1", "1"]), "");
    assert_eq!(bench.json(&["worker", "pin", "vm1:2", "0"]), json!({ "pinned": "vm1:2", "worker": 0 }));
    assert_refused(&bench.call(&["worker", "pin", "vm1", "2"]), 2, "there is no worker 2; this switch has 2");
    assert_refused(&bench.call(&["worker", "pin", "vm2", "1"]), 1, "no port is named vm2");
    assert_refused(&bench.call(&["worker", "pin", "vm1:x", "1"]), 2, "queue must be a number from 0 to 255");
    assert_refused(&bench.call(&["worker", "unpin", "vm1:1"]), 1, "vm1:1 is not pinned; see 'sluice worker list'");
    daemon.stop("TERM");

    // Kept for the next run; a worker that this one lacks is only told about.
    let daemon = bench.start(&[]);
    assert!(daemon.log().contains("vm1 is pinned to worker 1, which this run does not have"), "{}", daemon.log());
    daemon.stop("TERM");
    let _daemon = bench.start(&["--config", two]);
    assert_eq!(bench.json(&["worker", "list"])["rebalance"], json!(true));
    assert_eq!(bench.json(&["worker", "unpin", "vm1"]), json!({ "unpinned": "vm1" }));
    assert_refused(&bench.call(&["worker", "unpin", "vm1"]), 1, "vm1 is not pinned");
}

#[test]
fn cycles_are_told_once_and_again() {
    let bench = Bench::new();
    let _daemon = bench.start(&["--port", &bench.spec("vm1")]);
    let text = bench.text(&["stats", "--cycles"]);
    for title in ["WORKER ", " BUSY ", " CYCLES/FRAME ", " COPIES/FRAME ", "FROM PORT ", "BURSTS OF ", " GHz"] {
        assert!(text.contains(title), "{title} is not in\n{text}");
    }
    let json = bench.json(&["stats", "--cycles"]);
    assert_eq!((&json["ports"][0]["name"], &json["workers"][0]["cycles_per_frame"]), (&json!("vm1"), &Value::Null));
    assert_eq!(json["workers"][0]["bursts"][7], json!({ "up_to": null, "bursts": 0 }));
    let mut watch = sluice();
    watch.args(["stats", "--cycles", "--watch", "--interval", "0.1", "--json"]);
    let mut child = watch.arg("--socket").arg(bench.path("ctl.sock")).stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let seconds: Vec<f64> =
        lines.take(2).map(|line| serde_json::from_str::<Value>(&line).unwrap()["seconds"].as_f64().unwrap()).collect();
    assert!(seconds.iter().all(|seconds| *seconds > 0.05 && *seconds < 5.0), "{seconds:?}");
    let _ = child.kill();
    let _ = child.wait();
}

#[test]
fn ports_come_back_after_a_restart() {
    let bench = Bench::new();
    let daemon = bench.start(&["--port", &bench.spec("vm1")]);
    bench.text(&["port", "add", &(bench.spec("vm2") + ",mode=server,mtu=1400")]);
    bench.text(&["port", "add", &bench.spec("vm3")]);
    bench.text(&["port", "del", "vm3"]);
    drop(daemon); // killed: the stale socket is replaced
    assert!(bench.path("ctl.sock").exists());

    let daemon = bench.start(&[]);
    assert_eq!(bench.names(), ["vm1", "vm2"]);
    assert_eq!(bench.json(&["port", "show", "vm2"])["mtu"], 1400);
    daemon.stop("INT");

    // What is given now beats the same name of the last run, and stays.
    let daemon = bench.start(&["--port", &(bench.spec("vm2") + ",mtu=1300")]);
    assert_eq!(bench.json(&["port", "show", "vm2"])["mtu"], 1300);
    assert!(bench.table().contains("mtu=1300") && !bench.table().contains("mtu=1400"));
    assert_eq!(bench.names(), ["vm1", "vm2"]);
    daemon.stop("TERM");
}

#[test]
fn ports_of_the_file_stay_in_the_file() {
    let bench = Bench::new();
    let target = bench.path("missing/f.sock");
    let port = format!("[[port]]\nname = \"f\"\nkind = \"vhost-user\"\ntarget = \"{}\"\n", target.display());
    let file = bench.file(&format!("[switch]\nmode = \"interrupt\"\n{port}"));
    let file = file.to_str().unwrap();
    // Its folder is missing, which means waiting.
    let daemon = bench.start(&["--config", file, "--port", &bench.spec("vm1")]);
    assert_eq!(bench.names(), ["f", "vm1"]);
    assert_eq!(bench.json(&["status"])["mode"], "interrupt");
    daemon.stop("TERM");
    let daemon = bench.start(&["--mode", "poll"]);
    assert_eq!(bench.names(), ["vm1"]);
    assert_eq!(bench.json(&["status"])["mode"], "poll");
    daemon.stop("TERM");
}

#[test]
fn a_restored_port_waits_for_its_folder() {
    let bench = Bench::new();
    fs::create_dir(bench.path("vm")).unwrap();
    let daemon = bench.start(&[]);
    bench.text(&["port", "add", &format!("vm1=vhost-user:{}", bench.path("vm/a.sock").display())]);
    daemon.stop("TERM");
    fs::remove_dir(bench.path("vm")).unwrap();
    let _daemon = bench.start(&[]);
    assert_eq!(bench.names(), ["vm1"]);
}

#[test]
fn a_port_that_cannot_be_restored_is_an_error_of_the_log() {
    let bench = Bench::new();
    bench.start(&["--port", &bench.spec("vm1")]).stop("TERM");
    let root = bench.path("other").display().to_string();
    let daemon = bench.start(&["--socket-root", &root]);
    let log = daemon.log();
    assert!(log.contains("ERROR") && log.contains("tried again at the next start only"), "{log}");
    daemon.stop("TERM");
    let _daemon = bench.start(&[]);
    assert_eq!(bench.names(), ["vm1"]);
}

#[test]
fn a_corrupt_table_does_not_keep_the_switch_down() {
    let bench = Bench::new();
    fs::create_dir(bench.path("state")).unwrap();
    fs::write(bench.path("state/ports.json"), "{\"version\":1,").unwrap();
    let daemon = bench.start(&["--port", &bench.spec("vm1")]);
    assert!(daemon.log().contains("ports.json.corrupt-"), "{}", daemon.log());
    assert_eq!(bench.names(), ["vm1"]);
}

#[test]
fn relative_paths_are_taken_from_the_current_folder() {
    let bench = Bench::new();
    let mut command = sluice();
    command.args(["run", "--control", "ctl.sock", "--state", "state", "--port", "vm1=vhost-user:a.sock"]);
    command.current_dir(bench.dir.path());
    let _daemon = Daemon::spawn(command);
    assert_eq!(bench.json(&["port", "show", "vm1"])["target"], json!(bench.path("a.sock")));
    let output = ended(sluice().args(["port", "list"]).env("SLUICE_SOCKET", bench.path("ctl.sock")));
    assert!(output.status.success());
}

#[test]
fn the_socket_of_run_has_two_names() {
    let bench = Bench::new();
    let socket = bench.path("ctl.sock");
    let run = |words: &[&str]| {
        let mut command = sluice();
        command.arg("run").arg("--state").arg(bench.path("state")).args(words);
        command
    };
    let path = socket.to_str().unwrap();
    for words in [&["--socket", path][..], &["--socket", path, "--control", path]] {
        let daemon = Daemon::spawn(run(words));
        assert!(bench.names().is_empty());
        daemon.stop("TERM");
    }
    for words in [&[][..], &["--control", path]] {
        let variable = if words.is_empty() { socket.clone() } else { bench.path("other.sock") };
        let mut command = run(words);
        command.env("SLUICE_SOCKET", variable);
        let daemon = Daemon::spawn(command);
        assert!(bench.names().is_empty() && !bench.path("other.sock").exists());
        daemon.stop("TERM");
    }
}

/// `capture --write -` has its frames on standard output, so it tells how many on standard error.
#[test]
fn a_capture_to_standard_output_tells_its_counts() {
    let bench = Bench::new();
    let _daemon = bench.start(&["--port", &bench.spec("vm1")]);
    let capture = ["capture", "vm1", "--write", "-", "--count", "0"];
    let output = bench.call(&capture);
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "0 frames captured, 0 lost\n");
    let output = bench.call(&[&capture[..], &["--json"]].concat());
    let counts: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(counts, json!({ "frames": 0, "lost": 0 }));
    assert!(!output.stdout.is_empty());
}

#[test]
fn signals() {
    let bench = Bench::new();
    let mut daemon = bench.start(&[]);
    daemon.signal("HUP");
    daemon.wait_for("SIGHUP ignored");
    assert!(bench.names().is_empty());
    assert!(daemon.stop("INT").contains("stopping"));
    assert!(!bench.path("ctl.sock").exists());
}

#[test]
fn a_watching_client_does_not_hold_up_the_end() {
    let bench = Bench::new();
    let daemon = bench.start(&[]);
    let mut watch = sluice();
    watch.args(["stats", "--watch", "--json"]).arg("--socket").arg(bench.path("ctl.sock"));
    let mut child = watch.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    let started = Instant::now();
    daemon.stop("TERM");
    assert!(started.elapsed() < Duration::from_secs(5));
    let output = wait_output(child, "the watching client", PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(line.starts_with("sluice: the switch hung up") && line.matches('\n').count() == 1, "{line:?}");
}

#[test]
fn wrong_words() {
    let bench = Bench::new();
    let dir = bench.dir.path();
    let long = format!("vm1=vhost-user:{}", long_path(dir));
    let cases: &[(&[&str], &str)] = &[
        (&["--port", "vm1"], "not of the form NAME=KIND:TARGET"),
        (&["--port", "vm1=foo:/x"], "unknown kind 'foo'; use vhost-user, tap or afxdp"),
        (&["--port", "up=dpdk:net_tap0"], "kind dpdk is not built in"),
        (&["--port", "vm1=vhost-user:/tmp/x,colour=red"], "unknown key 'colour'"),
        (&["--port", "vm1=vhost-user:/tmp/x,vlan=4095"], "vlan must be a number from 1 to 4094"),
        (&["--port", "vm1=vhost-user:/tmp/x,spoofcheck=on"], "add mac="),
        (&["--port", "vm1=vhost-user:/tmp/a", "--port", "vm1=vhost-user:/tmp/b"], "port vm1 is given twice"),
        (&["--port", &long], "the kernel takes at most 107; use a shorter one"),
        (&["--control", &long_path(dir)], "cannot be used multiple times"),
        (&["--foo"], "unknown argument '--foo'; see 'sluice run --help'"),
        (&["--sandbox", "on"], "sandbox mode must be auto, off or strict"),
        (&["--mode", "fast"], "mode must be adaptive, poll or interrupt"),
        (&["--cpu", "0,0"], "CPU 0 is given twice"),
        (&["--cpu", "x"], "cpu must be a number"),
        (&["--metrics", "here"], "'--metrics <ADDR>'"),
        (&["--socket", "/x"], "'--control' and '--socket' are two names for the same and differ"),
        (&["--port"], "'--port <SPEC>'"),
    ];
    for (args, expected) in cases {
        assert_refused(&ended(&mut bench.run(args)), 2, expected);
    }
    let control = long_path(dir);
    let output = ended(sluice().args(["run", "--control", &control]).arg("--state").arg(bench.path("state")));
    assert_refused(&output, 2, "the path of the control socket is");
    assert_refused(&ended(&mut sluice()), 2, "a command is missing; see 'sluice --help'");
    assert_refused(&ended(sluice().args(["port", "show"])), 2, "see 'sluice port show --help'");
    assert_refused(&ended(sluice().args(["status", "--control", "/x"])), 2, "take '--socket'");
    let help_has_socket = |command: &str| {
        let output = ended(sluice().args([command, "--help"]));
        String::from_utf8(output.stdout).unwrap().contains("--socket <PATH>")
    };
    assert_eq!(["run", "status"].map(help_has_socket), [true, true]);
    assert_refused(&ended(sluice().args(["stats", "--watch", "--interval", "0"])), 2, "0.1 to 3600");
    assert_refused(&ended(bench.run(&[]).env("SLUICE_LOG", "a=b=c")), 2, "SLUICE_LOG=a=b=c");
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0, "something was made");
}

#[test]
fn wrong_files() {
    let bench = Bench::new();
    let port = "[[port]]\nname = \"vm1\"\nkind = \"tap\"\ntarget = \"t0\"\n";
    let cases = [
        (
            "[control]\nsokcet = \"/x\"\n".to_owned(),
            "sluice.toml:2:1: unknown key `sokcet`, expected one of `socket`, `group`, `socket_root` (in 'sokcet = \"/x\"')",
        ),
        ("mode = \"poll\"\n".into(), "sluice.toml:1:1: unknown key `mode`"),
        (format!("{port}vlan = 5000\n"), "sluice.toml:5:8: vlan must be a number from 1 to 4094"),
        (format!("{port}{port}"), "sluice.toml:6:8: port vm1 is given twice"),
        ("[control\n".into(), "sluice.toml:1:9: "),
        ("[sandbox]\nmode = \"on\"\n".into(), "sluice.toml:2:8: sandbox mode must be auto, off or strict, not 'on'"),
        ("[sandbox]\nkinds = [\"tap\", \"vhost\"]\n".into(), "sluice.toml:2:9: 'vhost' is no kind of port"),
        ("[control]\nsocket_root = \"here\"\n".into(), "sluice.toml:2:15: the path must start with '/'"),
    ];
    for (text, expected) in cases {
        let file = bench.file(&text);
        assert_refused(&ended(&mut bench.run(&["--config", file.to_str().unwrap()])), 2, expected);
    }
    let file = bench.file(port);
    let args = ["--config", file.to_str().unwrap(), "--port", "vm1=vhost-user:/tmp/x"];
    assert_refused(&ended(&mut bench.run(&args)), 2, "port vm1 is given twice");
    assert_refused(&ended(&mut bench.run(&["--config", "/nonexistent.toml"])), 1, "cannot read /nonexistent.toml");
    fs::remove_file(file).unwrap();
    assert_eq!(fs::read_dir(bench.dir.path()).unwrap().count(), 0, "something was made");
}

#[test]
fn a_switch_that_cannot_start_leaves_nothing() {
    let bench = Bench::new();
    let missing = format!("vm1=vhost-user:{}", bench.path("no/a.sock").display());
    let expected = format!("folder {} does not exist; create it", bench.path("no").display());
    assert_refused(&ended(&mut bench.run(&["--port", &missing])), 1, &expected);
    assert!(!bench.path("state").exists());

    let twice = bench.spec("vm1").replacen("vm1", "vm2", 1);
    let output = ended(&mut bench.run(&["--port", &bench.spec("vm1"), "--port", &twice]));
    assert_refused(&output, 2, "ports vm1 and vm2 have the same target");
    assert_eq!(fs::read_dir(bench.dir.path()).unwrap().count(), 0, "something was made");

    fs::write(bench.path("plain"), "").unwrap();
    let run = |control: &str, state: &str| {
        let mut command = sluice();
        command.arg("run").arg("--control").arg(bench.path(control)).arg("--state").arg(bench.path(state));
        ended(&mut command)
    };
    assert_refused(&run("plain", "state"), 1, "is not a socket; remove it");
    assert_refused(&run("no/ctl.sock", "state"), 1, "of the control socket does not exist; create it");
    assert_refused(&run("ctl.sock", "plain/state"), 1, "cannot use state directory");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    assert_refused(&ended(&mut bench.run(&["--metrics", &address])), 1, "choose another with --metrics");
    let file = bench.file("[control]\ngroup = \"no such group\"\n");
    let output = ended(&mut bench.run(&["--config", file.to_str().unwrap()]));
    assert_refused(&output, 1, "group 'no such group' is not in /etc/group");
    assert!(!bench.path("ctl.sock").exists());
}

#[test]
fn one_switch_per_socket_and_per_state() {
    let bench = Bench::new();
    let daemon = bench.start(&["--port", &bench.spec("vm1")]);
    let pid = daemon.child.id();
    let mut command = sluice();
    command.arg("run").arg("--control").arg(bench.path("ctl.sock")).arg("--state").arg(bench.path("other"));
    let expected = format!("ctl.sock is in use by pid {pid}; stop that switch, or choose another with --control");
    assert_refused(&ended(&mut command), 1, &expected);
    let mut command = sluice();
    command.arg("run").arg("--control").arg(bench.path("other.sock")).arg("--state").arg(bench.path("state"));
    let expected = format!("state is in use by pid {pid}; stop that, or choose another with --state");
    assert_refused(&ended(&mut command), 1, &expected);
    assert!(!bench.path("other.sock").exists());
    assert_eq!(bench.names(), ["vm1"]);
}

#[test]
fn what_is_refused_changes_nothing() {
    let bench = Bench::new();
    let _daemon = bench.start(&["--port", &bench.spec("vm1")]);
    let before = bench.table();
    let same_target = bench.spec("vm1").replacen("vm1", "vm2", 1);
    let missing = format!("vm2=vhost-user:{}", bench.path("no/a.sock").display());
    let long = format!("vm2=vhost-user:{}", long_path(bench.dir.path()));
    let cases: &[(&[&str], i32, &str)] = &[
        (&["port", "add", "vm2"], 2, "not of the form"),
        (&["port", "add", "vm2=vhost-user:/tmp/x,colour=red"], 2, "unknown key 'colour'; the keys are mode"),
        (&["port", "add", &long], 2, "the kernel takes at most 107"),
        (&["port", "add", &bench.spec("vm1")], 1, "port vm1 exists already; choose another name, or remove it"),
        (&["port", "add", &same_target], 1, "vm1.sock is used by port vm1 already; remove that"),
        (&["port", "add", &missing], 1, "does not exist; create it"),
        (&["port", "del", "vm2"], 1, "no port is named vm2; see 'sluice port list'"),
        (&["port", "show", "vm2"], 1, "no port is named vm2; see 'sluice port list'"),
    ];
    for (args, code, expected) in cases {
        assert_refused(&bench.call(args), *code, expected);
        assert_eq!((bench.names(), bench.table()), (vec!["vm1".to_owned()], before.clone()), "{args:?}");
    }

    // The state cannot be written: neither adding nor removing does half of it.
    fs::create_dir(bench.path("state/ports.json.new")).unwrap();
    assert_refused(&bench.call(&["port", "add", &bench.spec("vm2")]), 1, "cannot write");
    assert_refused(&bench.call(&["port", "del", "vm1"]), 1, "cannot write");
    assert_eq!((bench.names(), bench.table()), (vec!["vm1".to_owned()], before));
    fs::remove_dir(bench.path("state/ports.json.new")).unwrap();
    bench.text(&["port", "add", &bench.spec("vm2")]);
    assert_eq!(bench.names(), ["vm1", "vm2"]);
}

#[test]
fn nobody_listens() {
    let bench = Bench::new();
    assert_refused(&bench.call(&["port", "list"]), 1, "start one with 'sluice run'");
    drop(std::os::unix::net::UnixListener::bind(bench.path("ctl.sock")).unwrap());
    assert_refused(&bench.call(&["status"]), 1, "no switch listens on");
    let output = ended(sluice().args(["status", "--socket", &long_path(bench.dir.path())]));
    assert_refused(&output, 2, "use a shorter one with --socket");
}

#[test]
fn permissions() {
    assert!(is_root(), "this test runs as root, to become somebody else");
    const GROUP: u32 = 65_533;
    let bench = Bench::new();
    fs::set_permissions(bench.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // The target folder need not be open to everybody.
    let binary = bench.path("sluice");
    fs::copy(env!("CARGO_BIN_EXE_sluice"), &binary).unwrap();
    let file = bench.file(&format!("[control]\ngroup = \"{GROUP}\"\n"));
    let _daemon = bench.start(&["--config", file.to_str().unwrap()]);
    let socket = bench.path("ctl.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
    let call = |gid: u32| {
        let mut command = Command::new(&binary);
        ended(command.args(["port", "list", "--socket"]).arg(&socket).uid(NOBODY).gid(gid))
    };
    assert_refused(&call(NOBODY), 1, "no permission to use control socket");
    assert!(call(GROUP).status.success());

    let mut supplementary = Command::new("setpriv");
    supplementary.args(["--reuid=65534", "--regid=65534", "--groups=65533"]).arg(&binary);
    let output = ended(supplementary.args(["port", "list", "--socket"]).arg(&socket));
    assert!(output.status.success(), "{output:?}");

    // The credentials are checked even if somebody opens the file to all.
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    assert_refused(&call(NOBODY), 1, "user 65534 may not use this switch");

    fs::create_dir(bench.path("nobody")).unwrap();
    std::os::unix::fs::chown(bench.path("nobody"), Some(NOBODY), Some(NOBODY)).unwrap();
    let mut command = Command::new(&binary);
    command.arg("run").arg("--control").arg(bench.path("b.sock")).arg("--state").arg(bench.path("nobody"));
    let output = ended(command.uid(NOBODY).gid(NOBODY));
    assert_refused(&output, 1, "cannot make control socket");
    let mut command = Command::new(&binary);
    command.arg("run").arg("--control").arg(bench.path("nobody/b.sock")).arg("--state").arg(bench.path("no"));
    let output = ended(command.uid(NOBODY).gid(NOBODY));
    assert_refused(&output, 1, "Permission denied");
}

#[test]
fn metrics_over_http() {
    let bench = Bench::new();
    let daemon = bench.start(&["--metrics", "127.0.0.1:0", "--cpu", "0", "--port", &bench.spec("vm1")]);
    let log = daemon.log();
    let address = log.split("metrics=").nth(1).unwrap().split_whitespace().next().unwrap();
    let get = |path: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(get("/healthz").starts_with("HTTP/1.1 200"));
    assert!(get("/readyz").starts_with("HTTP/1.1 200"));
    assert!(get("/").starts_with("HTTP/1.1 404"));
    let metrics = get("/metrics");
    for line in [
        "content-type: application/openmetrics-text",
        "sluice_port_rx_frames_total{port=\"vm1\",network=\"default\"} 0",
        "sluice_port_drops_total{port=\"vm1\",network=\"default\",reason=\"full\"} 0",
        "sluice_port_state{port=\"vm1\",network=\"default\",kind=\"vhost-user\",state=\"connecting\"} 1",
        "sluice_port_state{port=\"vm1\",network=\"default\",kind=\"vhost-user\",state=\"up\"} 0",
        "sluice_fdb_entries{} 0",
        "sluice_held_frames{} 0",
        "sluice_made_frames_total{} 0",
        "# TYPE sluice_worker_busy_seconds counter",
        "sluice_worker_burst_frames_bucket{le=\"32.0\",worker=\"0\",cpu=\"0\"} 0",
        "sluice_worker_burst_frames_bucket{le=\"+Inf\",worker=\"0\",cpu=\"0\"} 0",
        "sluice_worker_stage_cycles_total{worker=\"0\",cpu=\"0\",stage=\"deliver\"} 0",
        "sluice_worker_sampled_frames_total{worker=\"0\",cpu=\"0\"} 0",
        "sluice_worker_busy_cycles_total{worker=\"0\",cpu=\"0\"} 0",
        "sluice_worker_copies_total{worker=\"0\",cpu=\"0\"} 0",
        "# EOF",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    daemon.stop("TERM");
}

#[test]
fn watching_prints_again_and_again() {
    let bench = Bench::new();
    let _daemon = bench.start(&["--port", &bench.spec("vm1")]);
    let mut watch = sluice();
    watch.args(["stats", "--watch", "--interval", "0.1"]).arg("--socket").arg(bench.path("ctl.sock"));
    let mut child = watch.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let titles = lines.filter(|line| line.starts_with("PORT ") && line.contains("RX FRAMES/S")).take(3).count();
    assert_eq!(titles, 3);
    // Its output is closed now, as `| head` does it. That is no failure.
    assert_eq!(wait_child(&mut child, "the watching client", PATIENCE).unwrap().code(), Some(0));
}

#[test]
fn logs_for_machines() {
    let bench = Bench::new();
    for option in [&["--log", "json"][..], &["--json"]] {
        let daemon = bench.start(option);
        let log = daemon.stop("TERM");
        let first: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
        assert_eq!(first["fields"]["message"], "ready");
    }
}

#[test]
fn help_and_completions() {
    for args in
        [&["--help"][..], &["run", "--help"], &["port", "add", "--help"], &["--version"], &["completions", "bash"]]
    {
        let output = ended(sluice().args(args));
        assert!(output.status.success() && !output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
}
