//! Foreign gRPC clients against our servers on unix sockets, with each style of `:authority` that they send.
//!
//! Python's client needs `grpcio`, which is installed into a virtual environment under `target/` on first use. Go's
//! needs Debian's `golang-go` and `golang-google-grpc-dev`. Where one of them cannot be had, its test says so and passes,
//! unless `SLUICE_REQUIRE_PYTHON` or `SLUICE_REQUIRE_PACKAGES` is set.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::process::Stdio;

use sluice_proto::authority;
use sluice_proto::kubelet::v1beta1::device_plugin_server::{DevicePlugin, DevicePluginServer};
use sluice_proto::kubelet::v1beta1::*;
use tokio::net::UnixListener;
use tokio::process::Command;
use tonic::transport::Server;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

struct Plugin;

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    type ListAndWatchStream = tokio_stream::Iter<std::vec::IntoIter<Result<ListAndWatchResponse, Status>>>;

    async fn get_device_plugin_options(
        &self,
        request: Request<Empty>,
    ) -> Result<Response<DevicePluginOptions>, Status> {
        // The wrapper must not hide who calls.
        let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        peer.ok_or_else(|| Status::internal("no peer credentials"))?;
        let options = DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available: true };
        Ok(Response::new(options))
    }

    async fn list_and_watch(&self, _: Request<Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let devices = (0..500).map(|i| Device { id: format!("sock-{i:04}"), ..Device::default() }).collect();
        let message = ListAndWatchResponse { devices };
        Ok(Response::new(tokio_stream::iter(vec![Ok(message.clone()), Ok(message.clone()), Ok(message)])))
    }

    async fn get_preferred_allocation(
        &self,
        _: Request<PreferredAllocationRequest>,
    ) -> Result<Response<PreferredAllocationResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn allocate(&self, _: Request<AllocateRequest>) -> Result<Response<AllocateResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn pre_start_container(
        &self,
        _: Request<PreStartContainerRequest>,
    ) -> Result<Response<PreStartContainerResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }
}

/// Serves a plugin and runs `client SOCKET` and `client SOCKET AUTHORITY` for each style.
async fn run_with_each_authority(client: &[&Path]) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("plugin.sock");
    let incoming = authority::incoming(UnixListener::bind(&socket).unwrap());
    tokio::spawn(Server::builder().serve_with_incoming(DevicePluginServer::new(Plugin), incoming));
    let path = socket.to_str().unwrap();
    let styles = [
        // Whatever the library makes of the target.
        None,
        Some("localhost".to_owned()),
        Some(path.to_owned()),
        Some(path.replace('/', "%2F")),
        Some("a".to_owned()),
    ];
    for style in styles {
        let mut command = Command::new(client[0]);
        command.args(&client[1..]).arg(path).args(&style).stdin(Stdio::null());
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "authority {style:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().to_owned()
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/foreign").join(name)
}

const PYTHON: &str = "SLUICE_REQUIRE_PYTHON";
const PACKAGES: &str = "SLUICE_REQUIRE_PACKAGES";

/// Runs a command that prepares a client; false if it cannot be had here, which the variable forbids.
async fn prepare(command: &mut Command, variable: &str) -> bool {
    let problem = match command.stdin(Stdio::null()).output().await {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    assert!(std::env::var_os(variable).is_none(), "{command:?}: {problem}");
    eprintln!("skipped, since this failed: {command:?}: {problem}");
    false
}

#[tokio::test]
async fn python_is_answered() {
    let environment = target().join("grpcio");
    let python = environment.join("bin/python");
    let ready = python.exists()
        || prepare(Command::new("python3").args(["-m", "venv"]).arg(&environment), PYTHON).await
            && prepare(Command::new(&python).args(["-m", "pip", "install", "-q", "grpcio"]), PYTHON).await;
    if !ready || !prepare(Command::new(&python).args(["-c", "import grpc"]), PYTHON).await {
        return;
    }
    run_with_each_authority(&[&python, &source("client.py")]).await;
}

#[tokio::test]
async fn go_is_answered() {
    let client = target().join("tmp/foreign-client-go");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&client).arg(source("client.go"));
    // Debian's Go packages are a GOPATH.
    build.env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode").env("GOFLAGS", "");
    build.env("GOCACHE", target().join("tmp/go-cache"));
    if prepare(&mut build, PACKAGES).await {
        run_with_each_authority(&[&client]).await;
    }
}
