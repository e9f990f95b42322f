//! Records and descriptors on a stream socket.
//!
//! A record is its length and its number of descriptors, 32 bits each, little-endian; then the record, in JSON; then the
//! descriptors, each batch with one byte.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// First bytes of a connection that is about a takeover. A gRPC client begins with a `P`.
pub(super) const GREETING: [u8; 16] = *b"SLUICE-TAKEOVER\n";

/// Longest record, in bytes: a table of a million stations fits.
const MAX_RECORD: usize = 256 << 20;
/// Descriptors of one record.
const MAX_FDS: usize = 1 << 20;
/// Descriptors sent at once; the kernel takes 253.
const BATCH: usize = 128;

/// Why a record did not get across, or is none.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other side closed the connection.
    #[error("the other process hung up")]
    HungUp,
    /// It said nothing for too long.
    #[error("the other process was silent for {} ms", .0.as_millis())]
    Silent(Duration),
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(io::Error),
    /// What came is no record.
    #[error("what the other process sent is not understood: {0}")]
    Invalid(String),
}

impl WireError {
    fn of(error: io::Error, limit: Duration) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent(limit),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::HungUp,
            _ => Self::Io(error),
        }
    }
}

/// Descriptors that go with a record, which refers to them by their places.
#[derive(Debug, Default)]
pub struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    /// Adds a duplicate; returns its place.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn put(&mut self, fd: BorrowedFd<'_>) -> io::Result<u32> {
        self.0.push(Some(fd.try_clone_to_owned()?));
        Ok((self.0.len() - 1) as u32)
    }

    /// Takes the descriptor at a place out. `None` if there is none, or it was taken already.
    pub fn take(&mut self, place: u32) -> Option<OwnedFd> {
        self.0.get_mut(usize::try_from(place).ok()?)?.take()
    }

    /// The descriptor at a place.
    pub(crate) fn get(&self, place: u32) -> Option<BorrowedFd<'_>> {
        self.0.get(usize::try_from(place).ok()?)?.as_ref().map(AsFd::as_fd)
    }

    /// The same descriptors once more.
    pub(crate) fn duplicate(&self) -> io::Result<Self> {
        let each = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Self(self.0.iter().map(each).collect::<io::Result<_>>()?))
    }

    /// Number of places.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds all of another list behind these.
    pub(crate) fn append(&mut self, other: Fds) {
        self.0.extend(other.0);
    }

    /// Splits the first `count` off. `None` if there are fewer.
    pub(crate) fn split_first(&mut self, count: usize) -> Option<Fds> {
        let rest = (count <= self.0.len()).then(|| self.0.split_off(count))?;
        Some(Fds(std::mem::replace(&mut self.0, rest)))
    }
}

/// Sends a record and its descriptors, for each part of which the other side has `limit`.
pub(crate) fn send(
    mut stream: &UnixStream,
    record: &impl Serialize,
    fds: &Fds,
    limit: Duration,
) -> Result<(), WireError> {
    let failed = |error| WireError::of(error, limit);
    stream.set_write_timeout(Some(limit)).map_err(failed)?;
    let mut bytes = vec![0; 8];
    serde_json::to_writer(&mut bytes, record).map_err(|error| WireError::Invalid(error.to_string()))?;
    let len = u32::try_from(bytes.len() - 8).map_err(|error| WireError::Invalid(error.to_string()))?;
    let fds: Vec<RawFd> = fds.0.iter().flatten().map(AsRawFd::as_raw_fd).collect();
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes[4..8].copy_from_slice(&(fds.len() as u32).to_le_bytes());
    stream.write_all(&bytes).map_err(failed)?;
    fds.chunks(BATCH).try_for_each(|batch| send_batch(stream, batch)).map_err(failed)
}

/// Receives a record and its descriptors.
pub(crate) fn receive<T: DeserializeOwned>(mut stream: &UnixStream, limit: Duration) -> Result<(T, Fds), WireError> {
    let failed = |error| WireError::of(error, limit);
    stream.set_read_timeout(Some(limit)).map_err(failed)?;
    let mut head = [0; 8];
    stream.read_exact(&mut head).map_err(failed)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
    let (len, count) = (word(0), word(4));
    if len > MAX_RECORD || count > MAX_FDS {
        return Err(WireError::Invalid(format!("a record of {len} bytes with {count} descriptors")));
    }
    let mut bytes = Vec::new();
    stream.take(len as u64).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() < len {
        return Err(WireError::HungUp);
    }
    let mut fds = Fds::default();
    while fds.len() < count {
        receive_batch(stream, &mut fds).map_err(failed)?;
    }
    let record = serde_json::from_slice(&bytes).map_err(|error| WireError::Invalid(error.to_string()))?;
    Ok((record, fds))
}

/// Whether a connection begins like one about a takeover, whose bytes stay in it. `WouldBlock` until one has come.
pub(crate) fn is_greeting(stream: &impl AsRawFd) -> io::Result<bool> {
    let mut first = 0u8;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most one byte to a local.
    let count = unsafe { libc::recv(stream.as_raw_fd(), (&raw mut first).cast(), 1, flags) };
    if count < 0 { Err(io::Error::last_os_error()) } else { Ok(count == 1 && first == GREETING[0]) }
}

/// The user of the process at the other end of a connection.
pub(crate) fn peer_uid(stream: &UnixStream) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let (level, option) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
    // SAFETY: the kernel writes at most `len` bytes to a local of that size.
    let done = unsafe { libc::getsockopt(stream.as_raw_fd(), level, option, (&raw mut peer).cast(), &raw mut len) };
    if done == 0 { Ok(peer.uid) } else { Err(io::Error::last_os_error()) }
}

/// The user of this process.
pub(crate) fn own_uid() -> u32 {
    // SAFETY: the call has no conditions.
    unsafe { libc::geteuid() }
}

/// Room for the header and the descriptors of a batch, aligned as the header has to be.
type Ancillary = [u64; (BATCH * size_of::<RawFd>()).div_ceil(8) + 4];

/// A message of one byte, with room for descriptors.
fn message(byte: &mut libc::iovec, ancillary: &mut Ancillary, len: usize) -> libc::msghdr {
    // SAFETY: an all-zero header is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = byte;
    message.msg_iovlen = 1;
    message.msg_control = ancillary.as_mut_ptr().cast();
    message.msg_controllen = len as _;
    message
}

fn send_batch(stream: &UnixStream, fds: &[RawFd]) -> io::Result<()> {
    let (mut byte, mut ancillary): (u8, Ancillary) = (0, [0; _]);
    let mut piece = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let bytes = size_of_val(fds) as libc::c_uint;
    // SAFETY: arithmetic.
    let len = unsafe { libc::CMSG_SPACE(bytes) } as usize;
    let message = message(&mut piece, &mut ancillary, len);
    // SAFETY: the message refers to locals, and the buffer has room for a batch and its header, which is what
    // `CMSG_SPACE` of at most BATCH descriptors is; so the first header and its data lie inside.
    let sent = unsafe {
        let first = libc::CMSG_FIRSTHDR(&message);
        (*first).cmsg_level = libc::SOL_SOCKET;
        (*first).cmsg_type = libc::SCM_RIGHTS;
        (*first).cmsg_len = libc::CMSG_LEN(bytes) as _;
        std::ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(first), size_of_val(fds));
        libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL)
    };
    match io::Error::last_os_error() {
        _ if sent == 1 => Ok(()),
        // Whoever ends a port has interrupted its thread.
        error if error.kind() == io::ErrorKind::Interrupted => send_batch(stream, fds),
        error => Err(error),
    }
}

fn receive_batch(stream: &UnixStream, fds: &mut Fds) -> io::Result<()> {
    let (mut byte, mut ancillary): (u8, Ancillary) = (0, [0; _]);
    let mut piece = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let mut message = message(&mut piece, &mut ancillary, size_of::<Ancillary>());
    // SAFETY: the message refers to locals of the sizes given.
    let count = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    let before = fds.len();
    // SAFETY: the kernel has filled the buffer with well-formed headers, over which these calls go; descriptors among
    // them are new and ours alone.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if ((*header).cmsg_level, (*header).cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let bytes = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for place in 0..bytes / size_of::<RawFd>() {
                    fds.0.push(Some(OwnedFd::from_raw_fd(data.add(place).read_unaligned())));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    if count == 0 || fds.len() == before {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        // The kernel closes what it has no place for: this process has no descriptors left.
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(200);

    #[test]
    fn records_and_descriptors_get_across() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut fds = Fds::default();
        let files: Vec<File> = (0..3 * BATCH / 2).map(|_| tempfile::tempfile().unwrap()).collect();
        for file in &files {
            fds.put(file.as_fd()).unwrap();
        }
        send(&ours, &("first", 7), &fds, LIMIT).unwrap();
        send(&ours, &"second", &Fds::default(), LIMIT).unwrap();
        let (record, mut got): ((String, u32), Fds) = receive(&theirs, LIMIT).unwrap();
        assert_eq!((record.0.as_str(), record.1, got.len()), ("first", 7, files.len()));
        for (place, file) in files.iter().enumerate() {
            let same = File::from(got.take(place as u32).unwrap());
            assert_eq!(same.metadata().unwrap().ino(), file.metadata().unwrap().ino());
        }
        assert!(got.take(0).is_none() && got.take(9999).is_none());
        assert_eq!(receive::<String>(&theirs, LIMIT).unwrap().0, "second");
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let send = |bytes: &[u8]| {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            drop(ours);
            receive::<String>(&theirs, LIMIT).map(|(text, _)| text)
        };
        assert!(matches!(send(b""), Err(WireError::HungUp)));
        assert!(matches!(send(b"\x02\0\0\0\0\0\0\0\""), Err(WireError::HungUp)));
        assert!(matches!(send(b"\x01\0\0\0\0\0\0\0\""), Err(WireError::Invalid(_))));
        assert!(matches!(send(b"\xff\xff\xff\xff\0\0\0\0"), Err(WireError::Invalid(_))));
        assert!(matches!(send(b"\x02\0\0\0\xff\xff\xff\xff\"\""), Err(WireError::Invalid(_))));
        // Descriptors that were announced do not come.
        assert!(matches!(send(b"\x02\0\0\0\x01\0\0\0\"\"x"), Err(WireError::HungUp)));
        assert_eq!(send(b"\x02\0\0\0\0\0\0\0\"\"").unwrap(), "");
    }

    #[test]
    fn silence_ends() {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        assert!(matches!(receive::<String>(&theirs, Duration::from_millis(5)), Err(WireError::Silent(_))));
    }
}
