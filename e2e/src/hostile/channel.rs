//! The frontend's socket: it listens, as QEMU does, and sends whatever it is told to.

use anyhow::{Context, Result, bail, ensure};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::hostile::message::Message;
use crate::wait;

/// The switch connects, and answers, long before that.
const LIMIT: Duration = Duration::from_secs(10);
/// Descriptors that go with one message at most (`SCM_MAX_FD`).
const MAX_FDS: usize = 253;

/// A listening socket; its file goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens on a path.
    pub fn bind(path: &Path) -> Result<Self> {
        let socket = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// Waits for the switch's next connection.
    pub fn accept(&self) -> Result<Channel> {
        wait::until("the switch to connect", LIMIT, || match self.socket.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Channel::new(stream).map(Some)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One connection with the switch.
#[derive(Debug)]
pub struct Channel {
    /// The socket.
    pub stream: UnixStream,
}

impl Channel {
    /// Over a connected socket.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(Self { stream })
    }

    /// Sends a message. The switch may have hung up: that is for the one who waits for an answer to find out.
    pub fn send(&self, message: &Message) {
        let _ = self.bytes(&message.bytes(), &message.fds);
    }

    /// Sends a message and gives the payload of the answer.
    pub fn ask(&mut self, message: &Message) -> Result<Vec<u8>> {
        let sent = self.bytes(&message.bytes(), &message.fds);
        sent.with_context(|| format!("request {} cannot be sent", message.request))?;
        self.answer(message.request)
    }

    /// Gives the payload of the answer to a request that was sent.
    pub fn answer(&mut self, request: u32) -> Result<Vec<u8>> {
        let unanswered = || format!("request {request} was not answered");
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).with_context(unanswered)?;
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (about, flags, size) = (word(0), word(4), word(8));
        ensure!((about, flags) == (request, 0x5) && size < 4096, "{about} {flags:#x} {size} is no answer to {request}");
        let mut payload = vec![0; size as usize];
        self.stream.read_exact(&mut payload).with_context(unanswered)?;
        Ok(payload)
    }

    /// Sends a message and gives the number of the answer.
    pub fn ask_number(&mut self, message: &Message) -> Result<u64> {
        let payload = self.ask(message)?;
        let payload = <[u8; 8]>::try_from(payload.as_slice()).context("the answer is no number")?;
        Ok(u64::from_ne_bytes(payload))
    }

    /// Sends bytes along with descriptors; gives how many were sent.
    pub fn bytes(&self, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
        send(&self.stream, bytes, fds)
    }

    /// Whether the switch has closed the connection, or gone with it.
    pub fn is_closed(&self) -> bool {
        let (mut byte, flags) = ([0u8; 1], libc::MSG_PEEK | libc::MSG_DONTWAIT);
        // SAFETY: the kernel writes at most one byte into the local.
        match unsafe { libc::recv(self.stream.as_raw_fd(), byte.as_mut_ptr().cast(), 1, flags) } {
            0 => true,
            1 => false,
            _ => io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock,
        }
    }

    /// Waits until the switch has hung up, whatever it sends before.
    pub fn wait_closed(&mut self) -> Result<()> {
        let mut rest = [0; 4096];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => bail!("the switch did not hang up: {error}"),
            }
        }
    }

    /// Bounds each send, for those who do not read the answers.
    pub fn set_patience(&self, limit: Duration) -> Result<()> {
        self.stream.set_write_timeout(Some(limit)).context("cannot set a limit")
    }
}

/// Sends bytes along with descriptors; gives how many were sent.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    let mut data = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let fds = fds.get(..fds.len().min(MAX_FDS)).unwrap_or_default();
    let mut control = [0u64; MAX_FDS / 2 + 4];
    // SAFETY: an all-zero header is valid, the pointers are to locals that outlive the call, and `control` has
    // room for that many descriptors and their header.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut data;
        message.msg_iovlen = 1;
        if !fds.is_empty() {
            let len = size_of_val(fds) as u32;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(len) as usize;
            let first = libc::CMSG_FIRSTHDR(&message);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(len) as usize;
            std::ptr::copy_nonoverlapping(fds.as_ptr(), libc::CMSG_DATA(first).cast(), fds.len());
        }
        libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
