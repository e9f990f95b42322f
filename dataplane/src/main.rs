//! The `sluice` command: the switch daemon, and the operator's client of it.

use std::process::ExitCode;

mod cli;

/// Larger pieces of memory, such as the counters of a port, are mapped by themselves, and go back to the system when they
/// are freed. As holes in the heap they would make it grow while ports come and go.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 16 << 10;
/// Heaps, of which each keeps what its threads once needed: many threads, none of which allocates much.
#[cfg(target_env = "gnu")]
const HEAPS: libc::c_int = 2;

fn main() -> ExitCode {
    settle_allocator();
    match cli::main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// The C library keeps freed memory, and more the longer it runs: after a capture, many times what the switch needs.
fn settle_allocator() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_ARENA_MAX, HEAPS)] {
        // SAFETY: takes no pointers, and there is no other thread yet.
        unsafe { libc::mallopt(option, value) };
    }
}
