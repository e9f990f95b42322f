//! A gRPC client's channel over a connection that is there already, as all of ours are: over unix sockets.

use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint, Error};

/// Speaks gRPC over a connection, and ends with that. A call takes `limit` at most, if there is one.
///
/// # Errors
/// If the other side hangs up before the first call.
pub async fn over<S>(stream: S, limit: Option<Duration>) -> Result<Channel, Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // The address is for the protocol only.
    let endpoint = Endpoint::from_static("http://localhost");
    let endpoint = limit.into_iter().fold(endpoint, Endpoint::timeout);
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionReset));
        async { stream }
    });
    endpoint.connect_with_connector(connector).await
}
