//! The shim's functions, and safe types over them.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::{Error, Result};
use std::ptr::NonNull;
use std::sync::OnceLock;

use crate::limits::BURST;

/// Buffers that one received frame may span; as in the shim.
const MAX_PIECES: usize = 64;
/// Further arguments for DPDK's environment, for who wants hugepages, PCI devices or more memory.
const ENVIRONMENT: &str = "SLUICE_DPDK_EAL";
/// Without them: software devices, and memory that is not set aside.
const DEFAULT_ARGUMENTS: &str = "--no-huge --no-shconf -m 256 --no-pci";

type Mbuf = NonNull<c_void>;

#[repr(C)]
#[derive(Debug)]
struct RawPort {
    pool: *mut c_void,
    id: u16,
    queues: u16,
    mtu: u16,
    room: u16,
    driver: [c_char; 32],
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RawPiece {
    data: *const u8,
    len: usize,
}

unsafe extern "C" {
    fn sl_init(argc: c_int, argv: *mut *mut c_char) -> c_int;
    fn sl_open(device: *const c_char, queues: u16, mtu: u16, port: *mut RawPort) -> c_int;
    fn sl_close(port: *mut RawPort);
    fn sl_link(id: u16) -> c_int;
    fn sl_receive(id: u16, queue: u16, frames: *mut Option<Mbuf>, max: u16) -> u16;
    fn sl_pieces(frame: Mbuf, pieces: *mut RawPiece) -> u16;
    fn sl_free(frames: *mut Option<Mbuf>, count: u16);
    fn sl_alloc(port: *const RawPort, len: u16, data: *mut *mut u8) -> Option<Mbuf>;
    fn sl_send(id: u16, queue: u16, frames: *mut Option<Mbuf>, count: u16) -> u16;
}

/// The error that a function of the shim has returned.
fn check(result: c_int) -> Result<c_int> {
    if result < 0 { Err(Error::from_raw_os_error(-result)) } else { Ok(result) }
}

/// Starts DPDK, once for the process.
fn start() -> Result<()> {
    static STARTED: OnceLock<std::result::Result<(), i32>> = OnceLock::new();
    let begin = || {
        // It pins the thread that starts it, which must not be one of ours.
        let thread = std::thread::Builder::new().name("sl-dpdk-start".into()).spawn(initialize);
        thread.and_then(|thread| thread.join().unwrap_or_else(|_| Err(Error::other("DPDK panicked"))))
    };
    let outcome = STARTED.get_or_init(|| begin().map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)));
    outcome.map_err(Error::from_raw_os_error)
}

fn initialize() -> Result<()> {
    let chosen = std::env::var(ENVIRONMENT).unwrap_or_else(|_| DEFAULT_ARGUMENTS.into());
    // SAFETY: no pointers. Where this runs we may run.
    let cpu = unsafe { libc::sched_getcpu() }.max(0);
    let fixed = ["sluice", "--no-telemetry", "--iova-mode=va", "--log-level=error", "--lcores"];
    let arguments = fixed.into_iter().map(String::from).chain([format!("0@{cpu}")]);
    let arguments: Vec<CString> = arguments
        .chain(chosen.split_whitespace().map(String::from))
        .filter_map(|text| CString::new(text).ok())
        .collect();
    let mut pointers: Vec<*mut c_char> = arguments.iter().map(|text| text.as_ptr().cast_mut()).collect();
    pointers.push(std::ptr::null_mut());
    // It keeps pointers to its arguments: they stay.
    std::mem::forget(arguments);
    let count = pointers.len() as c_int - 1;
    // SAFETY: terminated strings, and a terminated array of them, which it reorders.
    check(unsafe { sl_init(count, pointers.leak().as_mut_ptr()) }).map(drop)
}

/// A device that was started. Dropping it removes it from DPDK.
#[derive(Debug)]
pub(super) struct Device {
    raw: RawPort,
}

// SAFETY: the pool is DPDK's, which allows any thread to use it; the rest is not changed after `open`. One queue is
// used by one thread at a time, see `Queue`.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Makes the device that `arguments` describe, such as `net_tap0,iface=up0`, and starts it.
    pub(super) fn open(arguments: &str, queues: u16, mtu: Option<u16>) -> Result<Self> {
        start().map_err(|e| Error::new(e.kind(), format!("DPDK does not start ({e}); its messages tell why")))?;
        let arguments = CString::new(arguments)?;
        // SAFETY: an all-zero value is valid.
        let mut raw: RawPort = unsafe { std::mem::zeroed() };
        // SAFETY: a terminated string, and a local of the shim's own layout.
        check(unsafe { sl_open(arguments.as_ptr(), queues, mtu.unwrap_or(0), &raw mut raw) })?;
        Ok(Self { raw })
    }

    /// Number of queue pairs.
    pub(super) fn queues(&self) -> u16 {
        self.raw.queues
    }

    /// Largest layer-3 packet, in bytes.
    pub(super) fn mtu(&self) -> usize {
        usize::from(self.raw.mtu)
    }

    /// Name of the driver.
    pub(super) fn driver(&self) -> String {
        // SAFETY: the shim leaves a terminator at the end of the array.
        unsafe { CStr::from_ptr(self.raw.driver.as_ptr()) }.to_string_lossy().into_owned()
    }

    /// Whether its link is up.
    ///
    /// # Errors
    /// If it was removed.
    pub(super) fn is_up(&self) -> Result<bool> {
        // SAFETY: no pointers; the number is that of an open port.
        check(unsafe { sl_link(self.raw.id) }).map(|up| up != 0)
    }

    /// Receives frames into `batch`, which must be empty.
    pub(super) fn receive(&self, queue: u16, batch: &mut Batch) {
        batch.free(0);
        // SAFETY: the array has room for a burst, and what is put there is ours to free.
        batch.count = usize::from(unsafe { sl_receive(self.raw.id, queue, batch.frames.as_mut_ptr(), BURST as u16) });
    }

    /// Sends all of `batch` that the device takes, and frees the rest. Returns how many it took.
    pub(super) fn send(&self, queue: u16, batch: &mut Batch) -> usize {
        // SAFETY: so many frames are there and ours; the device owns those that it takes.
        let sent = unsafe { sl_send(self.raw.id, queue, batch.frames.as_mut_ptr(), batch.count as u16) };
        batch.free(usize::from(sent));
        usize::from(sent)
    }

    /// Adds a frame of `len` bytes to a batch, and returns where they go. `None` if there is no buffer.
    pub(super) fn add<'b>(&self, batch: &'b mut Batch, len: usize) -> Option<&'b mut [u8]> {
        let place = batch.frames.get_mut(batch.count)?;
        let mut data = std::ptr::null_mut();
        // SAFETY: the port is open; the place for the answer is a local.
        *place = unsafe { sl_alloc(&raw const self.raw, u16::try_from(len).ok()?, &raw mut data) };
        let data = NonNull::new(data)?;
        (*place)?;
        batch.count += 1;
        // SAFETY: the buffer is new, has that many bytes, and is the batch's, which is borrowed.
        Some(unsafe { std::slice::from_raw_parts_mut(data.as_ptr(), len) })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: the port is open, and no queue of it is in use: each holds the device.
        unsafe { sl_close(&raw mut self.raw) };
    }
}

/// Frames in DPDK's memory that are ours. They must be gone before their device is.
#[derive(Debug, Default)]
pub(super) struct Batch {
    frames: [Option<Mbuf>; BURST],
    count: usize,
}

// SAFETY: frames belong to whoever has them, whatever thread that is.
unsafe impl Send for Batch {}

impl Batch {
    /// Number of frames.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Frees the frames from the `first` on, and forgets those before it.
    pub(super) fn free(&mut self, first: usize) {
        if let Some(rest) = self.frames.get_mut(first..self.count).filter(|rest| !rest.is_empty()) {
            // SAFETY: these places hold frames that are ours, which are forgotten below.
            unsafe { sl_free(rest.as_mut_ptr(), rest.len() as u16) };
        }
        self.count = 0;
    }

    /// The bytes of a frame, in pieces. None if it is in too many.
    pub(super) fn pieces(&self, index: usize) -> impl Iterator<Item = &[u8]> {
        let mut pieces = [RawPiece { data: std::ptr::null(), len: 0 }; MAX_PIECES];
        let frame = self.frames.get(index).copied().flatten().filter(|_| index < self.count);
        // SAFETY: a frame of ours, and an array of as many pieces as the shim may write.
        let count = frame.map_or(0, |frame| unsafe { sl_pieces(frame, pieces.as_mut_ptr()) });
        let pieces = pieces.into_iter().take(count.into()).filter(|piece| !piece.data.is_null());
        // SAFETY: DPDK describes its own buffers, which nobody writes while the batch has them.
        pieces.map(|piece| unsafe { std::slice::from_raw_parts(piece.data, piece.len) })
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.free(0);
    }
}
