//! The client's side of the control socket.

use std::io;
use std::path::Path;
use std::time::Duration;

use sluice_proto::channel;
use sluice_proto::sluice::v1::control_client::ControlClient;
use tokio::net::UnixStream;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::Failure;

/// How long the switch may take to answer. Changes wait for workers and for the disk.
const PATIENCE: Duration = Duration::from_secs(30);
/// Largest answer: a thousand ports with many queues each.
const MAX_ANSWER: usize = 64 << 20;

pub(crate) type Client = ControlClient<Channel>;

/// Connects, makes one call, and returns the answer.
pub(crate) fn ask<T>(
    socket: &Path,
    call: impl AsyncFnOnce(&mut Client) -> Result<Response<T>, Status>,
) -> Result<T, Failure> {
    with_client(socket, async |mut client| call(&mut client).await.map(Response::into_inner).map_err(refused))
}

/// Connects, and runs `call` with the client.
pub(crate) fn with_client<T>(
    socket: &Path,
    call: impl AsyncFnOnce(Client) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::failed)?;
    runtime.block_on(async {
        let client = connect(socket).await?;
        call(client).await
    })
}

async fn connect(socket: &Path) -> Result<Client, Failure> {
    let stream = UnixStream::connect(socket).await.map_err(|error| cannot_connect(socket, &error))?;
    let channel = channel::over(stream, Some(PATIENCE)).await.map_err(Failure::failed)?;
    Ok(ControlClient::new(channel).max_decoding_message_size(MAX_ANSWER))
}

fn cannot_connect(socket: &Path, error: &io::Error) -> Failure {
    let path = socket.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure::Failed(format!(
            "no switch listens on {path}; start one with 'sluice run', or say where it listens with --socket"
        )),
        io::ErrorKind::PermissionDenied => Failure::Failed(format!(
            "no permission to use control socket {path}; be root, the switch's user, or a member of the socket's group"
        )),
        io::ErrorKind::InvalidInput => {
            Failure::Usage(format!("{path} cannot be the path of a socket; use a shorter one with --socket"))
        }
        _ => Failure::Failed(format!("cannot connect to control socket {path}: {error}")),
    }
}

/// What the switch refused, for the operator.
pub(crate) fn refused(status: Status) -> Failure {
    match status.code() {
        Code::InvalidArgument => Failure::Usage(status.message().into()),
        Code::Cancelled | Code::DeadlineExceeded => {
            Failure::Failed(format!("the switch did not answer within {} s; see its log", PATIENCE.as_secs()))
        }
        Code::Unavailable | Code::Unknown => {
            Failure::Failed(format!("the switch hung up; see its log ({})", status.message()))
        }
        Code::Unimplemented => Failure::Failed("the switch is too old for this command; upgrade it".into()),
        _ => Failure::Failed(status.message().into()),
    }
}
