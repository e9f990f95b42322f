//! Messages as they are on the wire (vhost-user, "Message Specification").
//!
//! The `vhost` crate parses and answers nearly all of them. Some requests it does not dispatch, and one
//! (`SET_VRING_ENABLE`) it refuses at a time at which QEMU sends it. We look at each header before the crate does and
//! keep those few for ourselves.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

/// Bytes of a header: request, flags and size of what follows.
pub(super) const HEADER: usize = 12;

/// How long the pieces of a message may come for, beside the last one, for which the stream's own timeout is.
const PIECES: Duration = Duration::from_millis(500);

/// Descriptors that come with one piece of a stream at most (`SCM_MAX_FD`).
const MOST_FDS: usize = 253;

/// Pieces of a stream that are unread at the end of a connection: more than there are.
const MOST_UNREAD: usize = 16_384;

const VERSION: u32 = 0x1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;

/// Why a message is not one.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageError {
    /// Not in the specification.
    #[error("request number {0} is unknown")]
    UnknownRequest(u32),
    /// Another version, a reply, or reserved bits.
    #[error("{0:?}: the flags {1:#x} are not those of a request")]
    Flags(FrontendReq, u32),
    /// Larger than any message there is.
    #[error("{0:?}: {1} bytes are more than the {MAX_MSG_SIZE} of the longest message")]
    TooLong(FrontendReq, u32),
    /// Another size than the request has.
    #[error("{0:?}: {1} bytes instead of {2}")]
    Size(FrontendReq, u32, u32),
    /// The rest of the message did not come.
    #[error("{0:?}: cannot read the whole message: {1}")]
    Truncated(FrontendReq, #[source] io::Error),
    /// More than go with any message.
    #[error("more than {MAX_ATTACHED_FD_ENTRIES} descriptors came with a message")]
    Descriptors,
    /// What no message has: closing one can wait.
    #[error("a descriptor that came with a message is a socket")]
    Socket,
    /// The frontend does not read our replies.
    #[error("{0:?}: cannot send the reply: {1}")]
    Reply(FrontendReq, #[source] io::Error),
}

/// A valid header of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    /// What is asked.
    pub(super) request: FrontendReq,
    /// The frontend waits for an answer, if that was negotiated.
    pub(super) need_reply: bool,
    size: u32,
}

impl Header {
    /// Checks a header.
    pub(super) fn parse(bytes: [u8; HEADER]) -> Result<Self, MessageError> {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (number, flags, size) = (word(0), word(4), word(8));
        let request = FrontendReq::try_from(number).map_err(|_| MessageError::UnknownRequest(number))?;
        if flags & VERSION_MASK != VERSION || flags & !(VERSION_MASK | NEED_REPLY) != 0 {
            return Err(MessageError::Flags(request, flags));
        }
        if size as usize > MAX_MSG_SIZE {
            return Err(MessageError::TooLong(request, size));
        }
        Ok(Self { request, need_reply: flags & NEED_REPLY != 0, size })
    }

    /// Takes the whole message, whose payload must be exactly `N` bytes, from the stream. Reading without room for
    /// ancillary data makes the kernel close any descriptors that came along.
    pub(super) fn take<const N: usize>(self, stream: &UnixStream) -> Result<[u8; N], MessageError> {
        if self.size as usize != N {
            return Err(MessageError::Size(self.request, self.size, N as u32));
        }
        let mut payload = [0; N];
        let began = Instant::now();
        let read = read_all(stream, &mut [0; HEADER], began).and_then(|()| read_all(stream, &mut payload, began));
        read.map_err(|error| MessageError::Truncated(self.request, error))?;
        Ok(payload)
    }

    /// Answers with a number, the payload of every reply that we send ourselves.
    pub(super) fn reply(self, mut stream: &UnixStream, value: u64) -> Result<(), MessageError> {
        let mut reply = [0; HEADER + 8];
        for (place, word) in [u32::from(self.request), VERSION | REPLY, 8].into_iter().enumerate() {
            reply[place * 4..place * 4 + 4].copy_from_slice(&word.to_ne_bytes());
        }
        reply[HEADER..].copy_from_slice(&value.to_ne_bytes());
        stream.write_all(&reply).map_err(|error| MessageError::Reply(self.request, error))
    }
}

/// As `read_exact`, but not byte by byte for as long as the frontend likes: the stream's timeout is for one call.
fn read_all(mut stream: &UnixStream, mut bytes: &mut [u8], began: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.read(bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => bytes = bytes.get_mut(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if !bytes.is_empty() && began.elapsed() > PIECES {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// Writes a request, with a number as its payload or without one.
pub(super) fn request(stream: &mut UnixStream, request: FrontendReq, payload: Option<u64>) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(HEADER + 8);
    for word in [u32::from(request), VERSION, if payload.is_some() { 8 } else { 0 }] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(payload.into_iter().flat_map(u64::to_ne_bytes));
    stream.write_all(&bytes)
}

/// Copies the bytes at the head of the stream, up to a header's worth, and leaves them there. Returns how many there
/// are; 0 means that the frontend has hung up.
///
/// # Errors
/// `ENOBUFS` if more descriptors come with them than any message has, `EMFILE` if we have none left to take them. The crate
/// would take the bytes, lose the descriptors, and wait for a header that it has had. `EPROTOTYPE` if one is a socket.
pub(super) fn peek(stream: &UnixStream, header: &mut [u8; HEADER]) -> io::Result<usize> {
    let mut control = [0u64; MAX_ATTACHED_FD_ENTRIES / 2 + 2];
    let received = receive(stream, header, &mut control, libc::MSG_PEEK)?;
    if received.cut {
        let code = if received.fds < MAX_ATTACHED_FD_ENTRIES { libc::EMFILE } else { libc::ENOBUFS };
        return Err(io::Error::from_raw_os_error(code));
    }
    if received.sockets { Err(io::Error::from_raw_os_error(libc::EPROTOTYPE)) } else { Ok(received.bytes) }
}

/// Ends a connection and takes what was not read of it, lest a descriptor in there be closed unseen.
pub(super) fn end(stream: &UnixStream) {
    // It fails only if the other side has already hung up. Nothing more comes after it.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    let (mut bytes, mut control) = ([0; 4096], [0u64; MOST_FDS / 2 + 3]);
    for _ in 0..MOST_UNREAD {
        match receive(stream, &mut bytes, &mut control, libc::MSG_DONTWAIT) {
            Ok(received) if received.bytes > 0 => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => break,
        }
    }
}

/// What [`receive`] has found.
struct Received {
    bytes: usize,
    fds: usize,
    /// Some of them are sockets.
    sockets: bool,
    /// There were more of them than we had room for.
    cut: bool,
}

/// Receives bytes and closes what comes with them, without waiting: the sender can have a socket wait in `close` for its
/// data to be read (`SO_LINGER`), which is switched off here, also for the copies that a look ahead leaves in the stream.
fn receive(stream: &UnixStream, bytes: &mut [u8], control: &mut [u64], flags: libc::c_int) -> io::Result<Received> {
    let mut data = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: an all-zero header is valid; its pointers are to buffers that outlive the calls, and their lengths. What the
    // kernel writes to `control` is well-formed, and lies within the length that it sets. The descriptors are ours.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&mut data, 1);
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(control);
        let count = libc::recvmsg(stream.as_raw_fd(), &mut message, flags | libc::MSG_CMSG_CLOEXEC);
        let bytes = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        let (fds, sockets) = close_all(&message);
        Ok(Received { bytes, fds, sockets, cut: message.msg_flags & libc::MSG_CTRUNC != 0 })
    }
}

/// Closes the descriptors that came with a message. Returns how many there were, and whether some were sockets.
///
/// # Safety
/// The control data must be what the kernel wrote, and nobody else may own the descriptors.
unsafe fn close_all(message: &libc::msghdr) -> (usize, bool) {
    let (mut closed, mut sockets) = (0, false);
    // SAFETY: by the contract.
    unsafe {
        let mut part = libc::CMSG_FIRSTHDR(message);
        while let Some(header) = part.as_ref() {
            if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let fds = libc::CMSG_DATA(part).cast::<RawFd>();
                for place in 0..(header.cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>() {
                    let fd = OwnedFd::from_raw_fd(fds.add(place).read_unaligned());
                    closed += 1;
                    sockets |= set_socket_linger(&fd, None) != Err(Errno::NOTSOCK);
                }
            }
            part = libc::CMSG_NXTHDR(message, part);
        }
    }
    (closed, sockets)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::*;

    fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&request.to_ne_bytes());
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[8..].copy_from_slice(&size.to_ne_bytes());
        bytes
    }

    #[test]
    fn checks_headers() {
        assert!(Header::parse(header(39, 9, 8)).unwrap().need_reply);
        assert!(matches!(Header::parse(header(0, 1, 0)), Err(MessageError::UnknownRequest(0))));
        assert!(matches!(Header::parse(header(u32::MAX, 1, 0)), Err(MessageError::UnknownRequest(_))));
        for flags in [0, 2, 3, 5, 0x11, 0x8000_0001] {
            assert!(matches!(Header::parse(header(1, flags, 0)), Err(MessageError::Flags(..))), "{flags}");
        }
        assert!(Header::parse(header(1, 1, 4096)).is_ok());
        assert!(matches!(Header::parse(header(1, 1, 4097)), Err(MessageError::TooLong(..))));
    }

    /// In a process of its own, since its other threads would have none left either.
    #[test]
    fn want_of_descriptors_is_not_the_frontends_fault() {
        const ALONE: &str = "SLUICE_TEST_ALONE";
        const NAME: &str = "port::vhost::message::tests::want_of_descriptors_is_not_the_frontends_fault";
        if std::env::var_os(ALONE).is_none() {
            let test = std::env::current_exe().unwrap();
            let mut alone = std::process::Command::new(test);
            let output = alone.args(["--exact", NAME]).env(ALONE, "1").output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains("1 passed"), "{text}");
            return;
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let event = crate::virtq::notify::EventFd::new().unwrap();
        let taken = |count: usize| {
            theirs.send_with_fds(&[&header(1, 1, 0)[..]], &vec![event.as_raw_fd(); count]).unwrap();
            let outcome = peek(&ours, &mut [0; HEADER]).map_err(|error| error.raw_os_error());
            (&ours).read_exact(&mut [0; HEADER]).unwrap();
            outcome
        };
        assert_eq!(taken(2), Ok(HEADER));
        assert_eq!(taken(MAX_ATTACHED_FD_ENTRIES + 1), Err(Some(libc::ENOBUFS)));
        let next = OwnedFd::from(theirs.try_clone().unwrap()).as_raw_fd() as libc::rlim_t;
        let limit = libc::rlimit { rlim_cur: next + 1, rlim_max: next + 1 };
        // SAFETY: reads a local.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
        assert_eq!(taken(2), Err(Some(libc::EMFILE)));
    }

    #[test]
    fn no_end_of_a_connection_waits() {
        use rustix::net::sockopt::socket_linger;
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let sockets = [(); 3].map(|()| std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        for (place, socket) in sockets.iter().enumerate() {
            set_socket_linger(socket, Some(Duration::from_secs(1000))).unwrap();
            (&theirs).write_all(b"something else").unwrap();
            theirs.send_with_fds(&[&[place as u8][..]], &[socket.as_raw_fd(); MOST_FDS]).unwrap();
        }
        end(&ours);
        assert!((&theirs).write_all(b"more").is_err());
        assert!(sockets.iter().all(|socket| socket_linger(socket).unwrap().is_none()));
        // What is read is refused.
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.send_with_fds(&[&header(1, 1, 0)[..]], &[sockets[0].as_raw_fd()]).unwrap();
        let refused = peek(&ours, &mut [0; HEADER]).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPROTOTYPE));
    }

    #[test]
    fn takes_exactly_one_message() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&header(20, 1, 8)).unwrap();
        theirs.write_all(&1500u64.to_ne_bytes()).unwrap();
        theirs.write_all(&header(40, 1, 0)).unwrap();
        let mut bytes = [0; HEADER];
        assert_eq!(peek(&ours, &mut bytes).unwrap(), HEADER);
        let first = Header::parse(bytes).unwrap();
        assert!(matches!(first.take::<4>(&ours), Err(MessageError::Size(FrontendReq::NET_SET_MTU, 8, 4))));
        assert_eq!(first.take::<8>(&ours).unwrap(), 1500u64.to_ne_bytes());
        assert_eq!(peek(&ours, &mut bytes).unwrap(), HEADER);
        assert_eq!(Header::parse(bytes).unwrap().request, FrontendReq::GET_STATUS);
        Header::parse(bytes).unwrap().take::<0>(&ours).unwrap();
        drop(theirs);
        assert_eq!(peek(&ours, &mut bytes).unwrap(), 0);
    }
}
