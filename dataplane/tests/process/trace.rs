//! `sluice trace` of frames between machines.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::Value;

use crate::daemon::Daemon;
use crate::vm::Vm;

/// A running trace; killed if the test ends before it does.
struct Trace {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Trace {
    fn start(daemon: &Daemon, args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.arg("trace").args(args).arg("--socket").arg(daemon.path("ctl.sock"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// What it has shown, and said at the end.
    fn finish(mut self) -> (Vec<String>, String) {
        let lines = self.lines.by_ref().lines().map_while(Result::ok).collect();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(self.child.wait().unwrap().success(), "{said}");
        (lines, said)
    }

    /// Has a machine send until the trace has shown as many frames as it is to.
    fn follow(mut self, daemon: &mut Daemon, from: &mut Vm, to: &mut Vm) -> (Vec<String>, String) {
        daemon.eventually("end of the trace", |_| {
            from.send(Some(to), "look at this");
            to.received();
            self.child.try_wait().unwrap().is_some()
        });
        self.finish()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_frame_is_followed_from_port_to_port() {
    let mut daemon = Daemon::start(&[]);
    let (mut a, mut b) = (daemon.boot("a", 1), daemon.boot("b", 2));
    daemon.pass(&mut b, &mut a, "here I am");
    let (lines, said) = Trace::start(&daemon, &["--count", "4"]).follow(&mut daemon, &mut a, &mut b);
    assert_eq!((lines.len(), said.as_str()), (4, "4 frames shown, 0 lost\n"));
    // It may begin in the midst of a frame's way.
    let first = lines.iter().position(|line| line.contains(" a -> rx 64 ")).unwrap();
    assert!(lines[first].ends_with("02:00:00:00:00:01 > 02:00:00:00:00:02 ethertype 0x88b5"), "{lines:?}");
    let after = lines[first + 1..].iter().any(|line| line.contains(" b <- tx 64 "));
    assert!(after, "{lines:?}");

    let json = ["a", "--json", "--direction", "rx", "--filter", "ether proto 0x88b5", "--count", "1"];
    let (lines, said) = Trace::start(&daemon, &json).follow(&mut daemon, &mut a, &mut b);
    let frame: Value = serde_json::from_str(&lines[0]).unwrap();
    assert_eq!((&frame["port"], &frame["direction"], &frame["length"]), (&"a".into(), &"rx".into(), &64.into()));
    assert_eq!((&frame["source"], &frame["dropped"]), (&"02:00:00:00:00:01".into(), &Value::Null));
    assert_eq!(serde_json::from_str::<Value>(&said).unwrap()["frames"], 1);

    // A port that somebody looks at already is left out, unless it was asked for.
    let _other = Trace::start(&daemon, &["b"]);
    daemon.eventually("a trace without it", |daemon| {
        let (_, said) = Trace::start(daemon, &["--count", "1"]).follow(daemon, &mut a, &mut b);
        said.contains("without b: ")
    });
    assert_eq!(daemon.call(&["trace", "b"]).status.code(), Some(1));
}

#[test]
fn drops_have_their_reason_and_ports_their_end() {
    let mut daemon = Daemon::start(&[]);
    let path = daemon.path("a.sock");
    let mut a = Vm::listen(&path, 1);
    let spec = format!("a=vhost-user:{},mac=02:00:00:00:00:99,spoofcheck=on", path.display());
    assert!(daemon.call(&["port", "add", &spec]).status.success());
    a.boot();
    daemon.wait_up("a");
    let mut b = daemon.boot("b", 2);
    let (lines, _) = Trace::start(&daemon, &["--drops", "--count", "2"]).follow(&mut daemon, &mut a, &mut b);
    assert!(lines.iter().all(|line| line.contains(" a -> rx ") && line.ends_with(" dropped: spoofed")), "{lines:?}");

    let output = daemon.call(&["trace", "nobody"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), said.matches('\n').count()), (Some(1), 1));
    assert!(said.contains("no port is named nobody"), "{said}");

    // It has begun once it shows something; then its only port goes.
    let mut trace = Trace::start(&daemon, &["a"]);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| trace.lines.read_line(&mut String::new()).unwrap());
        daemon.eventually("first line", |_| {
            a.send(Some(&b), "spoofed");
            first.is_finished()
        });
    });
    assert!(daemon.call(&["port", "del", "a"]).status.success());
    daemon.eventually("end of the trace", |_| trace.child.try_wait().unwrap().is_some());
    assert!(trace.finish().1.contains(" frames shown, 0 lost"));
}
