//! The sidecar as `virt-launcher` meets it: the real program, over the real protocol.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use sluice_proto::channel;
use sluice_proto::kubevirt::info::InfoParams;
use sluice_proto::kubevirt::info::info_client::InfoClient;
use sluice_proto::kubevirt::v1alpha1::callbacks_client::CallbacksClient as V1;
use sluice_proto::kubevirt::v1alpha2::callbacks_client::CallbacksClient as V2;
use sluice_proto::kubevirt::v1alpha3::callbacks_client::CallbacksClient as V3;
use sluice_proto::kubevirt::{v1alpha1, v1alpha2, v1alpha3};
use tonic::Status;
use tonic::transport::Channel;

mod reparse;

use reparse::go_reparse;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Resident memory that the sidecar may take, in KiB.
const MAX_RESIDENT: u64 = 20 * 1024;

fn data(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/domains").join(name)).unwrap()
}

/// A pod with the sidecar in it.
struct Pod {
    dir: tempfile::TempDir,
    child: Child,
}

impl Pod {
    fn hooks(dir: &Path) -> PathBuf {
        dir.join("hooks")
    }

    fn command(dir: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-binding-sidecar"));
        command.env_clear().env("SLUICE_LOG", "off");
        command.env("CONTAINER_NAME", "hook-sidecar-0").env("NETWORK_BINDING_PLUGIN_NAME", "vhostuser");
        command.env("SLUICE_HOOKS", Self::hooks(dir)).env("SLUICE_NETWORK_INFO", dir.join("network-info"));
        command
    }

    async fn start(variables: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(Self::hooks(dir.path())).unwrap();
        Self::start_in(dir, variables).await
    }

    async fn start_in(dir: tempfile::TempDir, variables: &[(&str, &str)]) -> Self {
        let child = Self::command(dir.path()).envs(variables.iter().copied()).spawn().unwrap();
        let pod = Self { dir, child };
        eventually(|| pod.socket().exists() && std::os::unix::net::UnixStream::connect(pod.socket()).is_ok()).await;
        pod
    }

    fn socket(&self) -> PathBuf {
        Self::hooks(self.dir.path()).join("sluice-hook-sidecar-0.sock")
    }

    fn link(&self, network: &str) -> Option<PathBuf> {
        fs::read_link(Self::hooks(self.dir.path()).join("userdata").join(network)).ok()
    }

    fn tell_networks(&self, content: &[u8]) {
        fs::write(self.dir.path().join("network-info"), content).unwrap();
    }

    /// A new connection, as virt-launcher makes one for each call.
    async fn connect(&self) -> Channel {
        let stream = tokio::net::UnixStream::connect(self.socket()).await.unwrap();
        channel::over(stream, Some(PATIENCE)).await.unwrap()
    }

    async fn define(&self, xml: &[u8], vmi: &[u8]) -> Result<String, Status> {
        let params = v1alpha3::OnDefineDomainParams { domain_xml: xml.into(), vmi: vmi.into() };
        let answer = V3::new(self.connect().await).on_define_domain(params).await?;
        Ok(String::from_utf8(answer.into_inner().domain_xml).unwrap())
    }

    fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: it is our own child, and nobody has waited for it.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// A figure in KiB that the kernel has about the sidecar.
    fn memory(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let figure = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        figure.trim().trim_end_matches(" kB").parse().unwrap()
    }

    async fn exit_code(&mut self) -> Option<i32> {
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the sidecar did not end");
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn eventually(condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "it did not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_vm_starts_and_ends() {
    let mut pod = Pod::start(&[]).await;
    let info = InfoClient::new(pod.connect().await).info(InfoParams {}).await.unwrap().into_inner();
    assert_eq!(info.versions, ["v1alpha1", "v1alpha2", "v1alpha3"]);
    let points: Vec<_> = info.hook_points.iter().map(|point| point.name.as_str()).collect();
    assert_eq!(points, ["OnDefineDomain", "PreCloudInitIso", "Shutdown"]);

    // The pod is not annotated yet when the first call comes.
    let (xml, vmi) = (data("one-nic.xml"), data("one-nic.vmi.json"));
    pod.tell_networks(b"");
    let annotate = async {
        tokio::time::sleep(Duration::from_millis(600)).await;
        pod.tell_networks(&data("one-nic.info.json"));
    };
    let (first, ()) = tokio::join!(pod.define(&xml, &vmi), annotate);
    let first = first.unwrap();
    let expected = String::from_utf8(data("one-nic.expected.xml")).unwrap();
    let hooks = Pod::hooks(pod.dir.path());
    assert_eq!(first, expected.replace("/var/run/kubevirt-hooks", hooks.to_str().unwrap()));
    assert_eq!(pod.link("blue").unwrap(), Path::new("/var/run/vhostuser/s3"));

    // The second and the third come with what KubeVirt understood of the one before.
    let second = pod.define(go_reparse(&first).as_bytes(), &vmi).await.unwrap();
    let third = pod.define(go_reparse(&second).as_bytes(), &vmi).await.unwrap();
    assert_eq!(second, third);
    assert!(third.contains("mode='server'") && third.contains("bus='0x02'"), "{third}");

    V3::new(pod.connect().await).shutdown(v1alpha3::ShutdownParams {}).await.unwrap();
    assert_eq!(pod.exit_code().await, Some(0));
    assert!(!pod.socket().exists());
}

#[tokio::test]
async fn a_migration_target_gets_its_own_link() {
    let pod = Pod::start(&[]).await;
    let elsewhere = String::from_utf8(data("one-nic.info.json")).unwrap().replace("/s3", "/s77");
    pod.tell_networks(elsewhere.as_bytes());
    // Called once; the domain that it returns is thrown away.
    let xml = pod.define(&data("one-nic.xml"), &data("one-nic.vmi.json")).await.unwrap();
    assert!(!xml.contains("s77"), "the domain is the same on both sides");
    assert_eq!(pod.link("blue").unwrap(), Path::new("/var/run/vhostuser/s77"));
}

#[tokio::test]
async fn older_versions_are_spoken() {
    let pod = Pod::start(&[]).await;
    pod.tell_networks(&data("one-nic.info.json"));
    let expected = pod.define(&data("one-nic.xml"), &data("one-nic.vmi.json")).await.unwrap();

    let params = v1alpha1::OnDefineDomainParams { domain_xml: data("one-nic.xml"), vmi: data("one-nic.vmi.json") };
    let answer = V1::new(pod.connect().await).on_define_domain(params).await.unwrap();
    assert_eq!(answer.into_inner().domain_xml, expected.as_bytes());

    let params = v1alpha2::OnDefineDomainParams { domain_xml: data("one-nic.xml"), vmi: data("one-nic.vmi.json") };
    let answer = V2::new(pod.connect().await).on_define_domain(params).await.unwrap();
    assert_eq!(answer.into_inner().domain_xml, expected.as_bytes());

    let params = v1alpha2::PreCloudInitIsoParams {
        cloud_init_no_cloud_source: b"{\"a\":1}".into(),
        vmi: b"{}".into(),
        cloud_init_data: b"{\"b\":2}".into(),
    };
    let answer = V2::new(pod.connect().await).pre_cloud_init_iso(params).await.unwrap().into_inner();
    assert_eq!(answer.cloud_init_no_cloud_source, b"{\"a\":1}");
    assert_eq!(answer.cloud_init_data, b"{\"b\":2}");
    let params = v1alpha3::PreCloudInitIsoParams { cloud_init_data: b"{\"b\":2}".into(), ..Default::default() };
    let answer = V3::new(pod.connect().await).pre_cloud_init_iso(params).await.unwrap().into_inner();
    assert_eq!(answer.cloud_init_data, b"{\"b\":2}");
}

#[tokio::test]
async fn errors_say_why_and_leave_no_link() {
    let pod = Pod::start(&[("SLUICE_WAIT_SECONDS", "0")]).await;
    let vmi = data("one-nic.vmi.json");
    let failed = async |xml: &[u8], vmi: &[u8]| pod.define(xml, vmi).await.unwrap_err().message().to_owned();
    assert!(failed(&data("one-nic.xml"), &vmi).await.contains("downwardAPI: device-info"));
    pod.tell_networks(&data("one-nic.info.json"));
    assert!(failed(b"", &vmi).await.contains("not well-formed"));
    assert!(failed(b"\xff", &vmi).await.contains("utf-8"));
    assert!(failed(&data("one-nic.xml"), b"").await.contains("VMI:"));
    assert!(
        failed(b"<domain><memoryBacking><access mode='private'/></memoryBacking><devices/></domain>", &vmi)
            .await
            .contains("memory that can be shared")
    );
    assert_eq!(pod.link("blue"), None);
    // A VM without our interfaces is none of our business.
    assert_eq!(pod.define(&data("one-nic.xml"), b"{}").await.unwrap().as_bytes(), data("one-nic.xml"));
    // And none of it ended the sidecar.
    assert!(pod.define(&data("one-nic.xml"), &vmi).await.is_ok());
}

#[tokio::test]
async fn a_wrong_configuration_is_told_to_the_user() {
    let pod = Pod::start(&[("SLUICE_QUEUE_SIZE", "1000")]).await;
    let error = pod.define(&data("one-nic.xml"), &data("one-nic.vmi.json")).await.unwrap_err();
    assert_eq!(
        error.message(),
        "configuration of the binding sidecar: SLUICE_QUEUE_SIZE=1000: must be 256, 512 or 1024"
    );
}

#[tokio::test]
async fn signals_end_it_well() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        let mut pod = Pod::start(&[]).await;
        let idle = pod.connect().await;
        pod.signal(signal);
        assert_eq!(pod.exit_code().await, Some(0), "signal {signal}");
        assert!(!pod.socket().exists());
        drop(idle);
    }
}

#[tokio::test]
async fn only_its_own_stale_socket_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let hooks = Pod::hooks(dir.path());
    fs::create_dir(&hooks).unwrap();
    let (own, other) = (hooks.join("sluice-hook-sidecar-0.sock"), hooks.join("passt.sock"));
    drop(std::os::unix::net::UnixListener::bind(&own).unwrap());
    drop(std::os::unix::net::UnixListener::bind(&other).unwrap());
    let pod = Pod::start_in(dir, &[]).await;
    InfoClient::new(pod.connect().await).info(InfoParams {}).await.unwrap();
    assert!(fs::symlink_metadata(other).unwrap().file_type().is_socket());

    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(Pod::hooks(dir.path())).unwrap();
    fs::write(Pod::hooks(dir.path()).join("sluice-hook-sidecar-0.sock"), "").unwrap();
    let output = Pod::command(dir.path()).stderr(Stdio::piped()).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("something that is not a socket is there"));
}

#[tokio::test]
async fn memory_stays_small() {
    let pod = Pod::start(&[]).await;
    pod.tell_networks(&data("numa-hugepages.info.json"));
    for _ in 0..50 {
        pod.define(&data("numa-hugepages.xml"), &data("numa-hugepages.vmi.json")).await.unwrap();
    }
    let usual = pod.memory("VmRSS:");
    // Hostile documents that are as large as the limits let them be.
    let many = format!("<domain><devices/>{}</domain>", "<a b=''/>".repeat(29_000));
    let deep = format!("<domain><devices/>{}", "<a>".repeat(200_000));
    for xml in [many, deep] {
        let _ = pod.define(xml.as_bytes(), &data("numa-hugepages.vmi.json")).await;
    }
    let peak = pod.memory("VmHWM:");
    println!("resident memory: {usual} KiB, with hostile documents {peak} KiB at its peak");
    assert!(peak < MAX_RESIDENT, "{peak} KiB");
}

/// Python's gRPC, which shares no code with ours, with messages put together by hand.
#[tokio::test]
async fn a_foreign_client_is_answered() {
    let Some(python) = python_with_grpc() else {
        eprintln!("skipped, since Python's grpcio cannot be had");
        return;
    };
    let mut pod = Pod::start(&[]).await;
    pod.tell_networks(&data("one-nic.info.json"));
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let output = Command::new(python)
        .arg(tests.join("launcher.py"))
        .args([pod.socket(), tests.join("domains/one-nic.xml"), tests.join("domains/one-nic.vmi.json")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(pod.exit_code().await, Some(0));
}

/// The interpreter of a virtual environment in the target folder, which is made the first time.
fn python_with_grpc() -> Option<PathBuf> {
    let environment = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?.join("grpcio");
    let python = environment.join("bin/python");
    let run = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    let ready = run(Command::new(&python).args(["-c", "import grpc"]))
        || run(Command::new("python3").args(["-m", "venv"]).arg(&environment))
            && run(Command::new(&python).args(["-m", "pip", "install", "-q", "grpcio"]));
    assert!(ready || std::env::var_os("SLUICE_REQUIRE_PYTHON").is_none(), "grpcio cannot be had");
    ready.then_some(python)
}

// -- for people to try

fn check(files: &[&str]) -> Output {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/domains");
    let files = files.iter().map(|file| tests.join(file));
    Command::new(env!("CARGO_BIN_EXE_sluice-binding-sidecar")).env_clear().arg("--check").args(files).output().unwrap()
}

#[test]
fn check_prints_the_result() {
    let output = check(&["one-nic.xml", "one-nic.vmi.json", "one-nic.info.json"]);
    assert!(output.status.success());
    assert_eq!(output.stdout, data("one-nic.expected.xml"));
    let links = String::from_utf8(output.stderr).unwrap();
    assert_eq!(links, "link /var/run/kubevirt-hooks/userdata/blue -> /var/run/vhostuser/s3\n");

    let output = check(&["one-nic.xml", "one-nic.vmi.json"]);
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("/userdata/blue/pod16477688c0e'"));
}

#[test]
fn check_says_what_is_wrong_in_one_line() {
    let output = check(&["one-nic.vmi.json", "one-nic.vmi.json"]);
    assert_eq!(output.status.code(), Some(1));
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(complaint.starts_with("sluice-binding-sidecar: domain XML: not well-formed"), "{complaint}");
    assert_eq!(complaint.lines().count(), 1);
    let output = check(&["missing.xml", "one-nic.vmi.json"]);
    assert!(String::from_utf8(output.stderr).unwrap().contains("cannot read"));
}
