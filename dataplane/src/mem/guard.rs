//! What happens when the memory behind a mapping of ours goes.
//!
//! A mapped file belongs to whoever made it: a VMM that truncates the file, a pool of huge pages that runs dry or a
//! memory error turn the next access into `SIGBUS`, which would end the process and with it everybody's network. A
//! handler looks the address up among the mappings registered here, tells the owner of that mapping, and puts empty
//! private memory in its place, so that the access goes through; the owner's port is stopped by what it was told. Any
//! other `SIGBUS` ends the process as ever.
//!
//! The handler may interrupt anything, so it uses atomics and system calls only. Slots of the register are never freed,
//! only used again.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, Once};

use crate::sync::lock;

/// Is told that the memory of a mapping has gone.
pub trait OnLoss: Send + Sync + std::fmt::Debug {
    /// Called from a signal handler, once for each mapping: stores to atomics are all that is allowed.
    fn memory_lost(&self);
}

/// A place in the register. Fields but `lost` change only while `version` is odd.
#[derive(Debug)]
struct Slot {
    version: AtomicU32,
    start: AtomicUsize,
    /// Zero while the slot is free.
    len: AtomicUsize,
    owner: AtomicPtr<Arc<dyn OnLoss>>,
    lost: AtomicBool,
    next: Option<&'static Slot>,
}

/// All slots there are, linked by `next`.
static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(ptr::null_mut());
/// Those that are free.
static FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());

impl Slot {
    /// A free slot.
    fn obtain() -> &'static Slot {
        let mut free = lock(&FREE);
        if let Some(slot) = free.pop() {
            return slot;
        }
        // Only changed under the lock.
        let newest = SLOTS.load(Ordering::Acquire);
        let slot = Box::leak(Box::new(Slot {
            version: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            owner: AtomicPtr::new(ptr::null_mut()),
            lost: AtomicBool::new(false),
            // SAFETY: null, or a slot that was leaked here.
            next: unsafe { newest.as_ref() },
        }));
        SLOTS.store(slot, Ordering::Release);
        slot
    }

    /// Changes the slot; a reader meanwhile notices.
    fn change(&self, start: usize, len: usize, owner: *mut Arc<dyn OnLoss>) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.owner.store(owner, Ordering::Relaxed);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// The mapping, if the address is in it: where it begins, its length, and whose it is. A slot that changes is not
    /// that of the address, since who faults at an address holds its mapping.
    fn covers(&self, address: usize) -> Option<(usize, usize, *mut Arc<dyn OnLoss>)> {
        let before = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let len = self.len.load(Ordering::Relaxed);
        let owner = self.owner.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let steady = before.is_multiple_of(2) && before == self.version.load(Ordering::Relaxed);
        (steady && address.wrapping_sub(start) < len).then_some((start, len, owner))
    }
}

/// Keeps a mapping in the register. Must be dropped before the mapping is.
#[derive(Debug)]
pub(crate) struct Guard {
    slot: &'static Slot,
    start: usize,
    len: usize,
    /// The same as `slot.owner`: null, or from a box.
    owner: *mut Arc<dyn OnLoss>,
}

impl Guard {
    /// Registers `len` bytes from `start`, the whole of a mapping.
    pub(crate) fn new(start: *mut u8, len: usize) -> Self {
        install();
        let slot = Slot::obtain();
        slot.lost.store(false, Ordering::Relaxed);
        let guard = Self { slot, start: start.addr(), len, owner: ptr::null_mut() };
        slot.change(guard.start, len, ptr::null_mut());
        guard
    }

    /// Says who is told. Before anybody else can touch the mapping.
    pub(super) fn tell(&mut self, owner: Arc<dyn OnLoss>) {
        let owner = Box::into_raw(Box::new(owner));
        self.slot.change(self.start, self.len, owner);
        self.forget_owner();
        self.owner = owner;
    }

    fn forget_owner(&mut self) {
        if !self.owner.is_null() {
            // SAFETY: from a box, and the slot does not have it any more.
            drop(unsafe { Box::from_raw(self.owner) });
        }
    }

    /// Whether the memory has gone.
    pub(super) fn is_lost(&self) -> bool {
        self.slot.lost.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.slot.change(0, 0, ptr::null_mut());
        self.forget_owner();
        lock(&FREE).push(self.slot);
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero action is valid, and the handler has the signature that SA_SIGINFO asks for. It runs on
        // the thread's signal stack where there is one.
        let done = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
            action.sa_sigaction = handler as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigaction(libc::SIGBUS, &action, ptr::null_mut())
        };
        if done != 0 {
            tracing::warn!("cannot handle SIGBUS: a VMM that truncates its memory file will end this process");
        }
    });
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `info`, whose address field is set where the code is positive, and `errno` is
    // this thread's own. Only calls that are safe in a signal handler are made.
    unsafe {
        let errno = *libc::__errno_location();
        // Codes that are not positive are signals that somebody sent.
        if (*info).si_code <= 0 || !replace((*info).si_addr().addr()) {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            libc::raise(libc::SIGBUS);
        }
        *libc::__errno_location() = errno;
    }
}

/// Puts empty memory in place of the mapping that the address is in, if it is one of ours.
fn replace(address: usize) -> bool {
    let mut next = SLOTS.load(Ordering::Acquire);
    // SAFETY: null, or a slot, and slots are never freed.
    while let Some(slot) = unsafe { next.as_ref() } {
        if let Some((start, len, owner)) = slot.covers(address) {
            return slot.lose(start, len, owner);
        }
        next = slot.next.map_or(ptr::null_mut(), |slot| ptr::from_ref(slot).cast_mut());
    }
    false
}

impl Slot {
    fn lose(&self, start: usize, len: usize, owner: *mut Arc<dyn OnLoss>) -> bool {
        if !self.lost.swap(true, Ordering::AcqRel)
            // SAFETY: null or the owner of this mapping, which lives as long as its guard, and that as long as whoever
            // faulted holds the mapping.
            && let Some(owner) = unsafe { owner.as_ref() }
        {
            owner.memory_lost();
        }
        let place = ptr::without_provenance_mut::<libc::c_void>(start);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: replaces a mapping of ours, which stays mapped throughout: the kernel exchanges it under its lock.
        // Nothing in it is referred to but by raw pointers.
        unsafe {
            let mapped = libc::mmap(place, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            mapped == place && libc::madvise(place, len, libc::MADV_DONTDUMP) == 0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::tests::memfd;
    use crate::mem::{GuestMemory, Region};

    #[derive(Debug, Default)]
    struct Count(AtomicUsize);

    impl OnLoss for Count {
        fn memory_lost(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_truncated_file_is_survived() {
        let counts: [Arc<Count>; 2] = Default::default();
        let files = [memfd(1 << 20), memfd(1 << 20)];
        let region = |place: usize| {
            let region = Region::map(files[place].try_clone().unwrap(), (place as u64) << 20, 1 << 20, 0, 0).unwrap();
            GuestMemory::new(vec![region.telling(counts[place].clone())]).unwrap()
        };
        let memories = [region(0), region(1)];
        let at = |place: usize, offset: u64| {
            memories[place].translate(((place as u64) << 20) + offset, 8, &mut 0).unwrap().ptr.cast::<u64>()
        };
        // SAFETY: within the mappings, which `memories` holds.
        unsafe { (at(0, 0).write_volatile(1), at(1, 0).write_volatile(2)) };
        files[0].set_len(4096).unwrap();
        assert!(!memories[0].is_lost());
        let threads: Vec<_> = (1..5)
            .map(|page| at(0, page * 4096).addr())
            .map(|place| {
                // SAFETY: as above; the thread is joined before they go.
                std::thread::spawn(move || unsafe {
                    let place = ptr::with_exposed_provenance_mut::<u64>(place);
                    place.write_volatile(3);
                    place.read_volatile()
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| assert!(thread.join().is_ok()));
        assert!(memories[0].is_lost() && !memories[1].is_lost());
        assert_eq!(counts[0].0.load(Ordering::SeqCst), 1, "told once");
        assert_eq!(counts[1].0.load(Ordering::SeqCst), 0);
        // SAFETY: as above.
        assert_eq!(unsafe { (at(0, 0).read_volatile(), at(1, 0).read_volatile()) }, (0, 2));
        drop(memories);
        assert_eq!(Arc::strong_count(&counts[0]), 1, "let go of");
    }

    #[test]
    fn slots_are_used_again() {
        let owner = Arc::new(Count::default());
        for _ in 0..1000 {
            let region = Region::map(memfd(4096), 0, 4096, 0, 0).unwrap().telling(owner.clone());
            assert!(!region.is_lost(), "a slot's past is forgotten");
        }
        let mut count = 0;
        let mut next = SLOTS.load(Ordering::Acquire);
        // SAFETY: null, or a slot, and slots are never freed.
        while let Some(slot) = unsafe { next.as_ref() } {
            count += 1;
            next = slot.next.map_or(ptr::null_mut(), |slot| ptr::from_ref(slot).cast_mut());
        }
        // Other tests map memory, too.
        assert!(count < 500, "{count} slots");
    }

    /// Runs this test alone in another process, which does `what`, and tells which signal ended that.
    fn ended_by(what: &str) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt;
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "mem::guard::tests::foreign_faults_end_the_process"]).env("SLUICE_TEST_SIGBUS", what);
        child.output().unwrap().status.signal()
    }

    #[test]
    fn foreign_faults_end_the_process() {
        match std::env::var("SLUICE_TEST_SIGBUS").as_deref() {
            Err(_) => {
                assert_eq!(ended_by("fault"), Some(libc::SIGBUS));
                assert_eq!(ended_by("sent"), Some(libc::SIGBUS));
            }
            Ok(what) => {
                let _ours = Region::map(memfd(4096), 0, 4096, 0, 0).unwrap();
                let foreign = vm_memory::MmapRegion::<()>::from_file(vm_memory::FileOffset::new(memfd(4096), 0), 4096);
                if what == "fault" {
                    let foreign = foreign.unwrap();
                    foreign.file_offset().unwrap().file().set_len(0).unwrap();
                    // SAFETY: mapped, but without a page: this is to end the process.
                    unsafe { foreign.as_ptr().read_volatile() };
                } else {
                    // SAFETY: a signal to this process, which is to end it.
                    unsafe { libc::raise(libc::SIGBUS) };
                }
            }
        }
    }
}
