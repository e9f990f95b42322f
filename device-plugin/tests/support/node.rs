//! Folders of a node, and the plugin's process on it.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use super::{FakeKubelet, PATIENCE, Pod, until};

/// A node: `/var/run` and `/var/lib/kubelet` of its own.
#[derive(Debug)]
pub struct Node {
    dir: TempDir,
}

impl Node {
    pub fn new() -> Self {
        // Short, for the paths of sockets; and a tmpfs, as /var/run is.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        fs::create_dir_all(dir.path().join("var")).unwrap();
        // As on real nodes.
        symlink("../run", dir.path().join("var/run")).unwrap();
        Self { dir }
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// The folder of all VM folders.
    pub fn root(&self) -> PathBuf {
        self.path("var/run/sluice/sockets")
    }

    /// The device-info file of a device.
    pub fn device_info(&self, id: &str) -> PathBuf {
        self.path("var/run/devinfo/dp").join(format!("sluice.io-sockets-{id}-device.json"))
    }

    pub fn kubelet(&self) -> FakeKubelet {
        FakeKubelet::start(self.path("kubelet/device-plugins"), self.path("kubelet/pod-resources/kubelet.sock"))
    }

    /// The node is switched off and on: /var/run is empty.
    pub fn reboot(&self) {
        fs::remove_dir_all(self.path("run")).unwrap();
        fs::create_dir(self.path("run")).unwrap();
    }

    /// Starts the plugin, with short times, folders that are our own, and these arguments more.
    pub async fn plugin(&self, arguments: &[&str]) -> Plugin {
        let Some(binary) = option_env!("CARGO_BIN_EXE_sluice-device-plugin") else {
            panic!("other crates have to say where it is");
        };
        let owner = format!("{}:{}", rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Plugin::start(self, binary.as_ref(), &[&["--owner", &owner], arguments].concat()).await
    }

    /// What runs in a VM's pod: makes a socket in each of its folders, in its own view of them.
    pub fn run_vm(&self, pod: &Pod) -> Vec<(PathBuf, UnixListener)> {
        let listen = |mount: &sluice_proto::kubelet::v1beta1::Mount| {
            let path = Path::new(&mount.host_path).join("pod0123456789a");
            let listener = UnixListener::bind(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            (path, listener)
        };
        pod.answer.mounts.iter().map(listen).collect()
    }
}

/// The plugin's process. Killed when dropped.
#[derive(Debug)]
pub struct Plugin {
    process: Child,
    metrics: String,
}

impl Plugin {
    /// Starts this binary on the node, with short times and these arguments more.
    pub async fn start(node: &Node, binary: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(binary);
        command.arg("--root").arg(node.root());
        command.arg("--device-info-dir").arg(node.path("var/run/devinfo/dp"));
        command.arg("--kubelet-dir").arg(node.path("kubelet/device-plugins"));
        command.arg("--pod-resources").arg(node.path("kubelet/pod-resources/kubelet.sock"));
        command.args(["--check", "0.1", "--metrics", "127.0.0.1:0", "--json"]);
        command.args(arguments).stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut lines = String::new();
        let metrics = loop {
            let line = log.next_line().await.unwrap().unwrap_or_else(|| panic!("the plugin ended:\n{lines}"));
            let json: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
            if let Some(address) = json["fields"]["address"].as_str() {
                break address.to_owned();
            }
            lines += &line;
        };
        // The rest of the log shows when a test fails.
        tokio::spawn(async move {
            while let Ok(Some(line)) = log.next_line().await {
                println!("{line}");
            }
        });
        Self { process, metrics }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id().unwrap() as i32).unwrap()
    }

    /// Ends it with SIGTERM; it must succeed.
    pub async fn terminate(mut self) {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let status = tokio::time::timeout(PATIENCE, self.process.wait()).await.expect("it does not end").unwrap();
        assert!(status.success(), "{status}");
    }

    /// Ends it with SIGKILL.
    pub async fn kill(mut self) {
        self.process.kill().await.unwrap();
    }

    /// Asks for a page; gives its status and body.
    pub async fn page(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.metrics).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// Waits until a line of the metrics begins so.
    pub async fn wait_for_metric(&self, line: &str) {
        let found = async || self.page("/metrics").await.1.lines().any(|l| l.starts_with(line)).then_some(());
        until(line, found).await;
    }
}
