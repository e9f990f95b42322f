//! The `:authority` that Go's gRPC clients send to unix sockets and Rust's cannot: put in behind the client's back.

use std::io;
use std::path::Path;

use sluice_proto::channel;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::UnixStream;
use tonic::transport::Channel;

/// What stands in `:authority`, depending on the version of Go's library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Authority {
    Localhost,
    /// The path of the socket.
    Path,
    /// The same, percent-encoded.
    Encoded,
}

impl Authority {
    pub const ALL: [Self; 3] = [Self::Localhost, Self::Path, Self::Encoded];

    fn text(self, socket: &Path) -> String {
        match self {
            Self::Localhost => "localhost".into(),
            Self::Path => socket.display().to_string(),
            Self::Encoded => socket.display().to_string().replace('/', "%2F"),
        }
    }
}

/// Connects to a socket.
///
/// # Errors
/// If nobody listens there.
pub async fn connect(socket: &Path, authority: Authority) -> io::Result<Channel> {
    let stream = UnixStream::connect(socket).await?;
    channel::over(through(stream, authority.text(socket).into_bytes()), None).await.map_err(io::Error::other)
}

/// The client's end of a connection whose requests get another authority on their way.
fn through(stream: UnixStream, authority: Vec<u8>) -> DuplexStream {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (mut from_server, to_server) = stream.into_split();
    let (from_client, mut to_client) = tokio::io::split(far);
    tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
    tokio::spawn(async move { rewrite(from_client, to_server, &authority).await });
    near
}

const PREFACE: usize = 24;
const HEADERS: u8 = 1;
/// `:authority: localhost`, to be remembered, as the library encodes it; later requests refer to it by number.
const LOCALHOST: &[u8] = b"\x41\x86\xa0\xe4\x1d\x13\x9d\x09";

/// Passes on a client's frames.
///
/// # Errors
/// At the end of the connection.
async fn rewrite(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    authority: &[u8],
) -> io::Result<()> {
    let mut preface = [0; PREFACE];
    from.read_exact(&mut preface).await?;
    to.write_all(&preface).await?;
    let mut replaced = false;
    loop {
        let mut head = [0; 9];
        from.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        from.read_exact(&mut payload).await?;
        if head[3] == HEADERS
            && let Some(place) = payload.windows(LOCALHOST.len()).position(|part| part == LOCALHOST)
        {
            // The same literal, not Huffman-coded.
            let mut literal = vec![0x41];
            push_length(&mut literal, authority.len());
            literal.extend(authority);
            payload.splice(place..place + LOCALHOST.len(), literal);
            replaced = true;
        }
        assert!(head[3] != HEADERS || replaced, "the library encodes the authority in another way now");
        head[..3].copy_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
        to.write_all(&head).await?;
        to.write_all(&payload).await?;
    }
}

/// An integer with a prefix of 7 bits (RFC 7541, section 5.1).
fn push_length(bytes: &mut Vec<u8>, length: usize) {
    match length {
        0..127 => bytes.push(length as u8),
        127..255 => bytes.extend([127, (length - 127) as u8]),
        _ => panic!("too long for this test: {length}"),
    }
}
