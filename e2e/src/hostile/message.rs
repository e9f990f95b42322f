//! Messages of the protocol (vhost-user, "Front-end message types"), valid or not.

use std::os::fd::RawFd;

macro_rules! requests {
    ($($name:ident = $number:literal),* $(,)?) => {
        $(#[doc = concat!("Request ", stringify!($number), ".")] pub const $name: u32 = $number;)*
        /// All of them.
        pub const REQUESTS: &[u32] = &[$($number),*];
    };
}

requests! {
    GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, RESET_OWNER = 4, SET_MEM_TABLE = 5, SET_LOG_BASE = 6,
    SET_LOG_FD = 7, SET_VRING_NUM = 8, SET_VRING_ADDR = 9, SET_VRING_BASE = 10, GET_VRING_BASE = 11,
    SET_VRING_KICK = 12, SET_VRING_CALL = 13, SET_VRING_ERR = 14, GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16, GET_QUEUE_NUM = 17, SET_VRING_ENABLE = 18, SEND_RARP = 19, NET_SET_MTU = 20,
    SET_BACKEND_REQ_FD = 21, IOTLB_MSG = 22, SET_VRING_ENDIAN = 23, GET_CONFIG = 24, SET_CONFIG = 25,
    CREATE_CRYPTO_SESSION = 26, CLOSE_CRYPTO_SESSION = 27, POSTCOPY_ADVISE = 28, POSTCOPY_LISTEN = 29,
    POSTCOPY_END = 30, GET_INFLIGHT_FD = 31, SET_INFLIGHT_FD = 32, GPU_SET_SOCKET = 33, RESET_DEVICE = 34,
    VRING_KICK = 35, GET_MAX_MEM_SLOTS = 36, ADD_MEM_REG = 37, REM_MEM_REG = 38, SET_STATUS = 39, GET_STATUS = 40,
    GET_SHARED_OBJECT = 41, SET_DEVICE_STATE_FD = 42, CHECK_DEVICE_STATE = 43,
}

/// Version 1 of the protocol, no reply wanted.
pub const PLAIN: u32 = 0x1;
/// As [`PLAIN`], with a reply.
pub const NEED_REPLY: u32 = 0x9;

/// A message, exactly as it will be on the wire.
#[derive(Debug, Clone)]
pub struct Message {
    /// What is asked.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// What the header says of the payload's length; the payload itself if `None`.
    pub size: Option<u32>,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// Descriptors that go along. Theirs is the sender's.
    pub fds: Vec<RawFd>,
}

impl Message {
    /// A message without descriptors.
    pub fn new(request: u32, payload: Vec<u8>) -> Self {
        Self { request, flags: PLAIN, size: None, payload, fds: Vec::new() }
    }

    /// A message whose payload is a number.
    pub fn number(request: u32, number: u64) -> Self {
        Self::new(request, numbers(&[number]))
    }

    /// A message about a ring: its index and a number.
    pub fn ring(request: u32, index: u32, number: u32) -> Self {
        Self::new(request, words(&[index, number]))
    }

    /// Adds descriptors.
    pub fn with(mut self, fds: &[RawFd]) -> Self {
        self.fds = fds.to_vec();
        self
    }

    /// Changes the flags.
    pub fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    /// Lies about the length.
    pub fn claiming(mut self, size: u32) -> Self {
        self.size = Some(size);
        self
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = words(&[self.request, self.flags, self.size.unwrap_or(self.payload.len() as u32)]);
        bytes.extend(&self.payload);
        bytes
    }
}

/// Numbers of 32 bits, as a payload.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Numbers of 64 bits, as a payload.
pub fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// A region of a memory table: guest address, length, frontend address, offset in its file.
pub type Region = [u64; 4];

/// A memory table. The descriptors have to be added.
pub fn memory_table(regions: &[Region]) -> Message {
    let mut payload = words(&[regions.len() as u32, 0]);
    regions.iter().for_each(|region| payload.extend(numbers(region)));
    Message::new(SET_MEM_TABLE, payload)
}

/// One region more or less.
pub fn memory_region(request: u32, region: Region) -> Message {
    let [gpa, len, uva, offset] = region;
    Message::new(request, numbers(&[0, gpa, len, uva, offset]))
}
