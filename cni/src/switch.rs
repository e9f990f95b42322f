//! The switch, over its control socket, within a bounded time.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sluice_proto::channel;
use sluice_proto::sluice::v1 as proto;
use sluice_proto::sluice::v1::control_client::ControlClient;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code as Grpc, Response, Status};

use crate::error::{CniError, Code};

/// How long the switch may take to accept us and to answer a question, in all. The rest of the two seconds that a call
/// may take when the switch is down is for us.
const PATIENCE: Duration = Duration::from_millis(1700);
/// Pause between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a change may take after the switch has shown that it answers: changes come one after the other, and each
/// waits for the disk.
const CHANGE: Duration = Duration::from_secs(20);
/// Largest answer: all ports of a full switch.
const MAX_ANSWER: usize = 64 << 20;

/// A connection to the switch.
pub(crate) struct Switch {
    runtime: Runtime,
    client: ControlClient<Channel>,
    control: PathBuf,
    deadline: Instant,
}

impl Switch {
    /// Connects. With `wait`, a switch that is just being restarted is waited for.
    ///
    /// # Errors
    /// Code 11 if nobody answers, code 5 if we may not.
    pub(crate) fn connect(control: &Path, wait: bool) -> Result<Self, CniError> {
        let deadline = Instant::now() + PATIENCE;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| CniError::io("cannot start", &error))?;
        let give_up = if wait { deadline } else { Instant::now() };
        let client = runtime.block_on(connect(control, give_up))?;
        Ok(Self { runtime, client, control: control.into(), deadline })
    }

    /// Whether it answers.
    ///
    /// # Errors
    /// Code 11 if not.
    pub(crate) fn ping(&mut self) -> Result<(), CniError> {
        let limit = self.question();
        let mut client = self.client.clone();
        self.call(limit, async move { client.get_status(proto::GetStatusRequest {}).await }).map(drop)
    }

    /// Ports whose owner and target begin with these.
    ///
    /// # Errors
    /// Code 11 if it does not answer.
    pub(crate) fn ports(&mut self, owner: &str, target: &str) -> Result<Vec<proto::PortStatus>, CniError> {
        let limit = self.question();
        let mut client = self.client.clone();
        let request = proto::ListPortsRequest { owner_prefix: owner.into(), target_prefix: target.into() };
        Ok(self.call(limit, async move { client.list_ports(request).await })?.ports)
    }

    /// The port with this name, if there is one.
    ///
    /// # Errors
    /// Code 11 if it does not answer.
    pub(crate) fn port(&mut self, name: &str) -> Result<Option<proto::PortStatus>, CniError> {
        let limit = self.question();
        let mut client = self.client.clone();
        let request = proto::GetPortRequest { name: name.into() };
        let none = |status: Status| match status.code() {
            Grpc::NotFound => Ok(Response::new(proto::GetPortResponse::default())),
            _ => Err(status),
        };
        Ok(self.call(limit, async move { client.get_port(request).await.or_else(none) })?.port)
    }

    /// Adds a port, in place of one of another owner if need be.
    ///
    /// # Errors
    /// As the switch says.
    pub(crate) fn add(&mut self, port: proto::PortConfig) -> Result<(), CniError> {
        let mut client = self.client.clone();
        let request = proto::AddPortRequest { config: Some(port), replace_owner: true };
        self.call(CHANGE, async move { client.add_port(request).await }).map(drop)
    }

    /// Removes a port if it (still) has this owner.
    ///
    /// # Errors
    /// As the switch says; not that there is no such port.
    pub(crate) fn remove(&mut self, name: &str, owner: &str) -> Result<(), CniError> {
        let mut client = self.client.clone();
        let request = proto::RemovePortRequest { name: name.into(), owner: Some(owner.into()) };
        let gone = |status: Status| match status.code() {
            // Gone already, or somebody else's by now: not ours in either case.
            Grpc::NotFound | Grpc::FailedPrecondition => Ok(Response::new(proto::RemovePortResponse {})),
            _ => Err(status),
        };
        self.call(CHANGE, async move { client.remove_port(request).await.or_else(gone) }).map(drop)
    }

    /// What is left of the time for questions.
    fn question(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(PAUSE)
    }

    fn call<T>(&self, limit: Duration, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, CniError> {
        let silent = || unavailable(&self.control, "does not answer");
        let answer = self.runtime.block_on(async { tokio::time::timeout(limit, call).await });
        answer.map_err(|_| silent())?.map(Response::into_inner).map_err(|status| self.refused(&status))
    }

    /// What the switch refused, in CNI's terms.
    fn refused(&self, status: &Status) -> CniError {
        let code = match status.code() {
            Grpc::InvalidArgument => Code::InvalidConfig,
            // The device's folder is not there (yet), or the switch is full.
            Grpc::FailedPrecondition | Grpc::ResourceExhausted => Code::TryAgain,
            Grpc::PermissionDenied | Grpc::Internal => Code::Io,
            Grpc::AlreadyExists | Grpc::NotFound => Code::Switch,
            Grpc::Unimplemented => {
                return CniError::new(Code::Switch, "the switch is older than this plugin; upgrade it");
            }
            _ => return unavailable(&self.control, "hung up"),
        };
        CniError::new(code, format!("the switch refused: {}", status.message()))
    }
}

async fn connect(control: &Path, give_up: Instant) -> Result<ControlClient<Channel>, CniError> {
    let stream = loop {
        match UnixStream::connect(control).await {
            Ok(stream) => break stream,
            Err(error) if !may_pass(&error) => return Err(cannot_connect(control, &error)),
            Err(error) if Instant::now() + PAUSE >= give_up => return Err(cannot_connect(control, &error)),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    };
    let channel = channel::over(stream, None).await;
    let client = ControlClient::new(channel.map_err(|_| unavailable(control, "hung up"))?);
    Ok(client.max_decoding_message_size(MAX_ANSWER))
}

/// No socket, nobody on it, or a full queue in front of it.
fn may_pass(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock)
}

fn cannot_connect(control: &Path, error: &io::Error) -> CniError {
    if may_pass(error) {
        return unavailable(control, "is not running");
    }
    CniError::io(format!("cannot use control socket {}", control.display()), error)
}

fn unavailable(control: &Path, how: &str) -> CniError {
    let socket = control.display();
    CniError::new(
        Code::TryAgain,
        format!("the switch {how} (control socket {socket}); is its pod on this node healthy?"),
    )
}
