//! The frontend's side of vhost-user, as QEMU does it: listen, wait for the switch, hand over memory and rings.

use anyhow::{Context, Result, bail, ensure};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

use super::log::DirtyLog;
use super::memory::Memory;
use super::ring::Ring;

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Where guest memory is in the frontend's address space, as far as the switch is concerned.
const UVA: u64 = 0x7f00_0000_0000;
/// How long a switch may take to answer one message.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A socket that waits for a switch.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens; what an earlier run has left there is replaced.
    ///
    /// # Errors
    /// If the path cannot be listened on.
    pub(super) fn bind(path: &Path) -> Result<Self> {
        let _ = std::fs::remove_file(path);
        let socket = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path: path.to_owned() })
    }

    /// Waits for the switch to connect.
    ///
    /// # Errors
    /// If it does not by the deadline.
    pub(super) fn accept(&self, deadline: Instant) -> Result<UnixStream> {
        loop {
            match self.socket.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => (),
                Err(error) => return Err(error).with_context(|| format!("on {}", self.path.display())),
            }
            if Instant::now() >= deadline {
                bail!("no switch has connected to {}", self.path.display());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Negotiates, with a dirty log if the guest migrates, and starts the rings: pairs of one that the switch writes to and one
/// that it reads from, in this order (virtio 1.2, 5.1.2). The rings run as long as what is given back lives.
///
/// # Errors
/// If the switch lacks a feature, or refuses something.
pub(super) fn start(
    stream: UnixStream,
    memory: &Memory,
    features: u64,
    rings: &[&Ring],
    log: Option<&DirtyLog>,
) -> Result<Frontend> {
    let mut frontend = Frontend::from_stream(stream, rings.len() as u64);
    frontend.set_owner().context("SET_OWNER")?;
    let offered = frontend.get_features().context("GET_FEATURES")?;
    let missing = features & !offered;
    ensure!(missing == 0, "the switch does not offer feature bits {missing:#x}");
    ensure!(offered & PROTOCOL_FEATURES != 0, "the switch does not offer protocol features");
    let wanted =
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::LOG_SHMFD;
    let common = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")? & wanted;
    frontend.set_protocol_features(common).context("SET_PROTOCOL_FEATURES")?;
    if let Some(log) = log {
        frontend.set_log_base(0, Some(log.region())).context("SET_LOG_BASE")?;
    }
    frontend.set_features(features | PROTOCOL_FEATURES).context("SET_FEATURES")?;
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: memory.size() as u64,
        userspace_addr: UVA,
        mmap_offset: 0,
        mmap_handle: memory.file().as_raw_fd(),
    };
    frontend.set_mem_table(&[region]).context("SET_MEM_TABLE")?;
    for (index, ring) in rings.iter().enumerate() {
        start_ring(&mut frontend, index, ring, log.is_some()).with_context(|| format!("ring {index}"))?;
    }
    for index in 0..rings.len() {
        frontend.set_vring_enable(index, true).context("SET_VRING_ENABLE")?;
    }
    // An answer means that all before it was done.
    frontend.get_features().context("the switch gave up")?;
    Ok(frontend)
}

fn start_ring(frontend: &mut Frontend, index: usize, ring: &Ring, logged: bool) -> Result<()> {
    let layout = ring.layout();
    let place = VringConfigData {
        queue_max_size: layout.size,
        queue_size: layout.size,
        // `VHOST_VRING_F_LOG`
        flags: u32::from(logged),
        desc_table_addr: UVA + layout.at as u64,
        avail_ring_addr: UVA + layout.avail() as u64,
        used_ring_addr: UVA + layout.used() as u64,
        log_addr: logged.then_some(layout.used() as u64),
    };
    // A packed ring begins with its wrap counter set.
    let base = if layout.packed { 1 << 15 } else { 0 };
    frontend.set_vring_num(index, layout.size).context("SET_VRING_NUM")?;
    frontend.set_vring_base(index, base).context("SET_VRING_BASE")?;
    frontend.set_vring_addr(index, &place).context("SET_VRING_ADDR")?;
    frontend.set_vring_kick(index, ring.kick_event()).context("SET_VRING_KICK")?;
    frontend.set_vring_call(index, ring.call_event()).context("SET_VRING_CALL")?;
    Ok(())
}
