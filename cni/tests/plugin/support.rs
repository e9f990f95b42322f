//! A switch, and the plugin called the way that Multus calls it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// The plugin.
pub(crate) const PLUGIN: &str = env!("CARGO_BIN_EXE_sluice-cni");

/// The switch's program: `SLUICE_BIN`, or what is built beside the plugin.
fn sluice() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(program) = std::env::var_os("SLUICE_BIN") {
            return program.into();
        }
        let folder = Path::new(PLUGIN).parent().unwrap();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "sluice", "--bin", "sluice", "--target-dir"]);
        build.arg(folder.parent().unwrap());
        if folder.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success(), "the switch does not build");
        folder.join("sluice")
    })
}

/// A folder with a control socket, a state directory and devices.
pub(crate) struct Bench {
    dir: TempDir,
    switch: Option<Child>,
}

impl Bench {
    /// Without a switch.
    pub(crate) fn down() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap(), switch: None };
        fs::create_dir(bench.path("s")).unwrap();
        bench
    }

    pub(crate) fn new() -> Self {
        let mut bench = Self::down();
        bench.start();
        bench
    }

    pub(crate) fn start(&mut self) {
        let mut command = Command::new(sluice());
        command.args(["run", "--mode", "interrupt", "--control"]).arg(self.path("ctl.sock"));
        command.arg("--state").arg(self.path("state")).stdout(Stdio::null()).stderr(Stdio::null());
        self.switch = Some(command.spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(self.path("ctl.sock")).is_err() {
            assert!(Instant::now() < deadline, "the switch does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        // It listens before it has all its ports.
        self.ports();
    }

    pub(crate) fn stop(&mut self) {
        if let Some(mut switch) = self.switch.take() {
            self.signal(&switch, "TERM");
            switch.wait().unwrap();
        }
    }

    /// Ends the switch without giving it a chance to tidy up.
    pub(crate) fn kill(&mut self) {
        if let Some(mut switch) = self.switch.take() {
            switch.kill().unwrap();
            switch.wait().unwrap();
        }
    }

    /// Sends a signal to the switch.
    pub(crate) fn signal_switch(&self, name: &str) {
        self.signal(self.switch.as_ref().unwrap(), name);
    }

    fn signal(&self, switch: &Child, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(switch.id().to_string()).status().unwrap();
        assert!(status.success());
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text_path(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().into()
    }

    /// What the device plugin does for a device.
    pub(crate) fn device(&self, id: &str) -> String {
        fs::create_dir_all(self.path("s").join(id)).unwrap();
        id.into()
    }

    /// Runs a command of the switch's own.
    pub(crate) fn operate(&self, args: &[&str]) -> Output {
        Command::new(sluice()).args(args).arg("--socket").arg(self.path("ctl.sock")).output().unwrap()
    }

    pub(crate) fn ports(&self) -> Vec<Value> {
        let output = self.operate(&["port", "list", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub(crate) fn port_names(&self) -> Vec<String> {
        self.ports().iter().map(|port| port["name"].as_str().unwrap().into()).collect()
    }

    /// A network's configuration for a device.
    pub(crate) fn config(&self, version: &str, device: &str) -> Value {
        json!({
            "cniVersion": version, "name": "blue", "type": "sluice-cni", "control": self.path("ctl.sock"),
            "socketRoot": self.path("s"), "deviceID": device,
        })
    }

    /// An executable file, in a folder for `CNI_PATH`.
    pub(crate) fn script(&self, name: &str, text: &str) -> String {
        let folder = self.path("bin");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), text).unwrap();
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        folder.to_str().unwrap().into()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One pod's interface, as the runtime sees it.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    pub(crate) container: String,
    pub(crate) interface: String,
    pub(crate) uid: String,
    pub(crate) name: String,
    pub(crate) path: String,
}

impl Pod {
    pub(crate) fn new(number: usize) -> Self {
        Self {
            container: format!("{number:064x}"),
            interface: "pod6c270ef2f25".into(),
            uid: format!("6f1cc5f2-0000-4000-8000-{number:012x}"),
            name: format!("virt-launcher-vm{number}-abcde"),
            path: String::new(),
        }
    }

    pub(crate) fn netns(&self) -> String {
        format!("/var/run/netns/cni-{}", &self.container[56..])
    }

    /// Multus' environment.
    pub(crate) fn environment(&self, command: &str) -> Vec<(&'static str, String)> {
        let args = format!(
            "IgnoreUnknown=true;K8S_POD_NAMESPACE=ns;K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.name, self.container, self.uid
        );
        vec![
            ("CNI_COMMAND", command.into()),
            ("CNI_CONTAINERID", self.container.clone()),
            ("CNI_NETNS", self.netns()),
            ("CNI_IFNAME", self.interface.clone()),
            ("CNI_ARGS", args),
            ("CNI_PATH", if self.path.is_empty() { "/opt/cni/bin".into() } else { self.path.clone() }),
        ]
    }

    pub(crate) fn call(&self, command: &str, config: &Value) -> Answer {
        run(&self.environment(command), config.to_string().as_bytes())
    }

    pub(crate) fn add(&self, config: &Value) -> Value {
        self.call("ADD", config).result()
    }
}

/// What the plugin answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) exit: Option<i32>,
    pub(crate) printed: Option<Value>,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Answer {
    /// The result of a success.
    pub(crate) fn result(self) -> Value {
        assert_eq!(self.exit, Some(0), "{self:?}");
        self.printed.unwrap()
    }

    /// A success that prints nothing.
    pub(crate) fn silent(self) {
        assert!(self.exit == Some(0) && self.printed.is_none(), "{self:?}");
    }

    /// Code and message of a failure.
    pub(crate) fn error(self) -> (u64, String) {
        assert_eq!(self.exit, Some(1), "{self:?}");
        let error = self.printed.unwrap();
        assert!(error["cniVersion"].is_string(), "{error}");
        let message = error["msg"].as_str().unwrap().to_owned();
        assert!(!message.is_empty() && !message.contains('\n'), "{error}");
        (error["code"].as_u64().unwrap(), message)
    }
}

/// Runs the plugin with exactly this environment.
pub(crate) fn run(environment: &[(&str, String)], input: &[u8]) -> Answer {
    use std::io::Write;
    let began = Instant::now();
    let mut command = Command::new(PLUGIN);
    command.env_clear().env("PATH", "/usr/bin:/bin").env("SLUICE_CNI_DEVICE_INFO_DIR", std::env::temp_dir());
    command.envs(environment.iter().map(|(key, value)| (key, value)));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // It may have refused before it read.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    let took = began.elapsed();
    let printed = match output.stdout.is_empty() {
        true => None,
        false => Some(serde_json::from_slice(&output.stdout).unwrap()),
    };
    Answer { exit: output.status.code(), printed, stderr: String::from_utf8(output.stderr).unwrap(), took }
}
