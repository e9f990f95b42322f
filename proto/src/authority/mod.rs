//! Servers on unix sockets that answer whatever `:authority` a client sends.
//!
//! Go's gRPC clients, depending on their version, put `localhost`, the path of the socket, or the path percent-encoded
//! into the `:authority` of a request to a unix socket. The HTTP/2 library below tonic resets a stream whose authority
//! is not that of a URL, so such a client gets nothing but `PROTOCOL_ERROR`
//! (<https://github.com/hyperium/h2/issues/487>). Nobody needs an authority on a unix socket: [`AnyAuthority`] sits
//! between the socket and the library and puts a harmless one in its place.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, UdsConnectInfo};

mod frames;
mod hpack;

use frames::Rewriter;

/// Bytes read from the socket at once.
const READ: usize = 8 * 1024;
/// Pause after a connection could not be accepted (out of descriptors, mostly), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The connections of `listener`, for [`serve_with_incoming`](tonic::transport::Server::serve_with_incoming).
/// They are accepted by a task that ends, and closes the listener, when the stream is dropped.
///
/// # Panics
/// Outside a tokio runtime.
pub fn incoming(listener: UnixListener) -> ReceiverStream<io::Result<AnyAuthority<UnixStream>>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, &sender) => {}
            () = sender.closed() => {}
        }
    });
    ReceiverStream::new(receiver)
}

/// Accepts until nobody takes the connections any more.
async fn accept(listener: UnixListener, sender: &mpsc::Sender<io::Result<AnyAuthority<UnixStream>>>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if sender.send(Ok(AnyAuthority::new(stream))).await.is_err() {
                    return;
                }
            }
            // It passes; an error in the stream would end the server.
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// The server's side of an HTTP/2 connection, with every `:authority` that comes in replaced. What goes out is not
/// touched. Bytes that are no HTTP/2 end the connection with [`io::ErrorKind::InvalidData`].
#[derive(Debug)]
pub struct AnyAuthority<S> {
    stream: S,
    rewriter: Rewriter,
    /// Rewritten, not yet read.
    output: Vec<u8>,
    /// How much of `output` has been read.
    taken: usize,
}

impl<S> AnyAuthority<S> {
    /// Wraps a connection of which nothing has been read yet.
    pub fn new(stream: S) -> Self {
        Self { stream, rewriter: Rewriter::default(), output: Vec::new(), taken: 0 }
    }

    /// Copies what is ready into `buffer`; false if nothing was.
    fn hand_out(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let ready = &self.output[self.taken..];
        let count = ready.len().min(buffer.remaining());
        buffer.put_slice(&ready[..count]);
        self.taken += count;
        if self.taken == self.output.len() {
            self.output.clear();
            self.taken = 0;
        }
        count > 0
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AnyAuthority<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        // A piece of a header block gives nothing to hand out yet.
        while buffer.remaining() > 0 && !this.hand_out(buffer) {
            let mut bytes = [0; READ];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                break;
            }
            this.rewriter.push(read.filled(), &mut this.output)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for AnyAuthority<UnixStream> {
    type ConnectInfo = UdsConnectInfo;

    fn connect_info(&self) -> UdsConnectInfo {
        self.stream.connect_info()
    }
}
