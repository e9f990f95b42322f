//! The XDP program that hands an interface's frames to our sockets, and its attachment.
//!
//! The program is six instructions, so we assemble it ourselves (`linux/bpf.h`). It is attached by a link, which is a
//! descriptor of ours: however the process ends, the interface is as it was before. Frames of queues that we do not
//! serve go on to the kernel.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const LINK_CREATE: libc::c_int = 28;
const LINK_GET_FD_BY_ID: libc::c_int = 30;
const LINK_GET_NEXT_ID: libc::c_int = 31;
const LINK_DETACH: libc::c_int = 34;

const MAP_TYPE_XSKMAP: u32 = 17;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_TYPE_XDP: u32 = 37;
const LINK_TYPE_XDP: u32 = 6;
/// `BPF_F_XDP_HAS_FRAGS`: the program copes with frames of several buffers.
const HAS_FRAGS: u32 = 1 << 5;

/// Where the driver runs the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Hook {
    /// In the kernel's network stack, for every driver (`XDP_FLAGS_SKB_MODE`).
    Generic = 1 << 1,
    /// In the driver (`XDP_FLAGS_DRV_MODE`).
    Native = 1 << 2,
}

/// One instruction (`struct bpf_insn`).
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// `return bpf_redirect_map(map, ctx->rx_queue_index, XDP_PASS)`
fn redirect(map: RawFd) -> [Instruction; 6] {
    const XDP_PASS: i32 = 2;
    const REDIRECT_MAP: i32 = 51;
    const RX_QUEUE_INDEX: i16 = 16;
    const PSEUDO_MAP_FD: u8 = 1;
    let instruction = |code, destination: u8, source: u8, offset, immediate| Instruction {
        code,
        registers: destination | source << 4,
        offset,
        immediate,
    };
    [
        // r2 = *(u32 *)(r1 + 16)
        instruction(0x61, 2, 1, RX_QUEUE_INDEX, 0),
        // r1 = map, in two slots
        instruction(0x18, 1, PSEUDO_MAP_FD, 0, map),
        instruction(0, 0, 0, 0, 0),
        // r3 = XDP_PASS
        instruction(0xb7, 3, 0, 0, XDP_PASS),
        // r0 = bpf_redirect_map(r1, r2, r3)
        instruction(0x85, 0, 0, 0, REDIRECT_MAP),
        // return r0
        instruction(0x95, 0, 0, 0, 0),
    ]
}

/// The program, attached. Detached when dropped.
#[derive(Debug)]
pub(super) struct Program {
    sockets: OwnedFd,
    link: OwnedFd,
}

impl Program {
    /// Loads the program and attaches it, for queues below `queues`.
    pub(super) fn attach(ifindex: u32, hook: Hook, queues: u32) -> Result<Self> {
        let sockets = create_map(queues)?;
        let program = load(sockets.as_raw_fd())?;
        let mut attributes = [program.as_raw_fd() as u32, ifindex, ATTACH_TYPE_XDP, hook as u32];
        let link = bpf_fd(LINK_CREATE, &mut attributes)?;
        Ok(Self { sockets, link })
    }

    /// Hands the frames of a queue to a socket.
    pub(super) fn set_socket(&self, queue: u32, socket: RawFd) -> Result<()> {
        #[repr(C)]
        struct Update {
            map: u32,
            _padding: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let socket = socket as u32;
        let mut update = Update {
            map: self.sockets.as_raw_fd() as u32,
            _padding: 0,
            key: address(&queue),
            value: address(&socket),
            flags: 0,
        };
        bpf(MAP_UPDATE_ELEM, &mut update).map(drop)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // The last descriptor does it too, but a child that is about to start a program may have another for a moment.
        let _ = bpf(LINK_DETACH, &mut [self.link.as_raw_fd() as u32]);
    }
}

/// Attaches a program without a link, as `ip link set … xdp` does.
#[cfg(test)]
pub(super) fn attach_without_link(ifindex: u32) -> Result<()> {
    let sockets = create_map(1)?;
    let program = load(sockets.as_raw_fd())?;
    super::netlink::Netlink::open()?.put_xdp(ifindex, 1, program.as_raw_fd())
}

fn create_map(queues: u32) -> Result<OwnedFd> {
    let (key_size, value_size) = (4u32, 4u32);
    bpf_fd(MAP_CREATE, &mut [MAP_TYPE_XSKMAP, key_size, value_size, queues.max(1)])
}

fn load(map: RawFd) -> Result<OwnedFd> {
    /// The beginning of the kernel's structure for this command; what it lacks counts as zero.
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        attach_type: u32,
    }
    let instructions = redirect(map);
    let license = c"Apache-2.0";
    let mut name = [0; 16];
    name[..6].copy_from_slice(b"sluice");
    let mut load = Load {
        kind: PROG_TYPE_XDP,
        count: instructions.len() as u32,
        instructions: address(&instructions),
        license: license.as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: HAS_FRAGS,
        name,
        ifindex: 0,
        attach_type: ATTACH_TYPE_XDP,
    };
    bpf_fd(PROG_LOAD, &mut load)
}

/// Detaches the program that another process has attached by a link to an interface. `false` if there is none.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN.
pub(super) fn detach_foreign_link(ifindex: u32) -> Result<bool> {
    let mut id = 0u32;
    loop {
        let mut next = [id, 0, 0];
        match bpf(LINK_GET_NEXT_ID, &mut next) {
            Ok(_) => id = next[1],
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e),
        }
        // It may be gone by now.
        let Ok(link) = bpf_fd(LINK_GET_FD_BY_ID, &mut [id, 0, 0]) else { continue };
        if xdp_link_interface(&link) == Some(ifindex) {
            bpf(LINK_DETACH, &mut [link.as_raw_fd() as u32])?;
            return Ok(true);
        }
    }
}

fn xdp_link_interface(link: &OwnedFd) -> Option<u32> {
    #[repr(C)]
    #[derive(Default)]
    struct LinkInfo {
        kind: u32,
        id: u32,
        program: u32,
        _padding: u32,
        ifindex: u32,
        _rest: [u32; 11],
    }
    #[repr(C)]
    struct Query {
        fd: u32,
        len: u32,
        info: u64,
    }
    let mut info = LinkInfo::default();
    let place = (&raw mut info).expose_provenance() as u64;
    let mut query = Query { fd: link.as_raw_fd() as u32, len: size_of::<LinkInfo>() as u32, info: place };
    bpf(OBJ_GET_INFO_BY_FD, &mut query).ok()?;
    // SAFETY: the kernel has written to the local through the address in `query`.
    let info = unsafe { std::ptr::read_volatile(&raw const info) };
    (info.kind == LINK_TYPE_XDP).then_some(info.ifindex)
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value).expose_provenance() as u64
}

/// The `bpf(2)` system call. `attributes` is laid out as the beginning of `union bpf_attr` for the command.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> Result<libc::c_long> {
    // SAFETY: the kernel reads, and for some commands writes, the given size of a value that is borrowed uniquely. The
    // addresses in it are of locals of the callers that outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

fn bpf_fd<T>(command: libc::c_int, attributes: &mut T) -> Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: these commands return a new descriptor, which is ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
