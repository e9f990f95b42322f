//! Every bound of the switch in one place, asserted at compile time.

/// Frames taken from one queue, switched and delivered together.
pub const BURST: usize = 32;

/// Header bytes copied into private memory before any decision is made on them.
pub const SNAPSHOT: usize = 128;

/// Longest Ethernet frame accepted, in bytes: a 64 KiB super-packet, its Ethernet header and two VLAN tags.
pub const MAX_FRAME: usize = 65_535 + 14 + 8;

/// Memory segments that one burst may refer to.
pub const MAX_BURST_SEGMENTS: usize = 8192;

/// Memory segments of one descriptor chain. QEMU's own bound (`VIRTQUEUE_MAX_SIZE`); a longer chain faults the port.
pub const MAX_CHAIN: usize = 1024;

/// Buffers that are looked at for one burst of frames: as many as a burst of the longest chains has. A guest to which
/// frames go could make others pay for more.
pub const MAX_BURST_BUFFERS: u32 = (BURST * MAX_CHAIN) as u32;

/// Largest split or packed ring, in descriptors (virtio 1.2, 2.7).
pub const MAX_RING: u16 = 32_768;

/// Queue pairs that we offer per port, so that a guest asking for many still starts.
pub const MAX_QUEUE_PAIRS: usize = 256;

/// Memory regions of one guest. Equals what the kernel's vhost and rust-vmm allow.
pub const MAX_MEM_SLOTS: usize = 509;

/// Memory of one guest, in bytes, that is looked at at all: a sparse file may claim any size. A port's share of the process's
/// addresses (`mem/room.rs`) is less.
pub const MAX_GUEST_MEMORY: u64 = 16 << 40;

/// What all ports together may have mapped, of the 128 TiB that a process has. One port gets at most a sixteenth of what no
/// other one has.
pub const MAX_MAPPED: u64 = 96 << 40;

/// Mappings of all ports, of the 65,530 that a process can have (`vm.max_map_count`).
pub const MAX_MAPPINGS: u64 = 60_000;

/// Mappings of one port: two memory tables, while one takes the place of the other, and their logs.
pub const MAX_PORT_MAPPINGS: u64 = 1024;

/// Bytes of a dirty log: a bit for each page of 128 TiB of guest physical addresses.
pub const MAX_DIRTY_LOG: u64 = 4 << 30;

/// Frames kept for a guest while it is away in the end of a migration, or while its rings are changed.
pub const MAX_HELD_FRAMES: usize = 1024;

/// Bytes of them.
pub const MAX_HELD_BYTES: usize = 2 << 20;

/// Ports of one switch.
pub const MAX_PORTS: usize = 1024;

/// VLANs of one trunk in which its configured address is its own; in further ones it is learned.
pub const MAX_STATIC_VLANS: usize = 64;

/// Networks (bridge domains) of one switch.
pub const MAX_NETWORKS: usize = 1024;

/// Workers of one switch.
pub const MAX_WORKERS: usize = 64;

/// Rings of all ports whose positions are kept over a crash.
pub const MAX_JOURNAL: usize = 16_384;

/// Longest path of a unix socket, in bytes (`sun_path` less its terminator).
pub const MAX_SOCKET_PATH: usize = 107;

/// Addresses the FDB holds, unless configured.
pub const DEFAULT_FDB_ENTRIES: usize = 65_536;

/// Addresses the FDB learns from one port, unless configured.
pub const DEFAULT_FDB_PER_PORT: usize = 16_384;

/// Seconds after which an address that is not heard any more is forgotten, unless configured.
pub const DEFAULT_FDB_AGE_SECONDS: u64 = 300;

/// Addresses the FDB can be configured to hold.
pub const MAX_FDB_ENTRIES: usize = 1 << 20;

/// Seconds that an unheard address can be configured to stay: a month.
pub const MAX_FDB_AGE_SECONDS: u64 = 31 * 24 * 3600;

/// Longest name of a port or network, in bytes.
pub const MAX_NAME: usize = 64;

/// Longest name of a network interface, in bytes (`IFNAMSIZ` less its terminator).
pub const MAX_INTERFACE_NAME: usize = 15;

/// Longest description of a DPDK device, in bytes.
pub const MAX_DEVICE: usize = 256;

/// Largest VLAN id; 4095 is reserved (IEEE 802.1Q).
pub const MAX_VLAN: u16 = 4094;

/// Smallest rate limit, in bits per second, and smallest burst, in bits.
pub const MIN_RATE: u64 = 1000;

/// Largest rate limit, in bits per second, and largest burst, in bits.
pub const MAX_RATE: u64 = 1_000_000_000_000;

/// Longest owner of a port, in bytes.
pub const MAX_OWNER: usize = 256;

/// Smallest MTU, what IPv4 needs (RFC 791).
pub const MIN_MTU: u16 = 68;

/// CPUs that a thread can be pinned to (`CPU_SETSIZE`).
pub const MAX_CPUS: usize = 1024;

const _: () = assert!(BURST <= 256, "a frame's place in its burst is a u8");
const _: () = assert!(MAX_PORTS <= u16::MAX as usize, "port ids are u16");
const _: () = assert!(MAX_NETWORKS <= u16::MAX as usize, "network ids are u16");
const _: () = assert!(MAX_NETWORKS >= MAX_PORTS, "a port that moves to another network finds room");
const _: () = assert!(MAX_BURST_SEGMENTS >= 2 * MAX_CHAIN, "one chain always fits");
const _: () = assert!(MAX_BURST_SEGMENTS <= u16::MAX as usize);
const _: () =
    assert!(MAX_PORT_MAPPINGS as usize >= 2 * (MAX_MEM_SLOTS + 1), "a guest with all its regions gets another table");
