//! System calls (seccomp(2)). What is not listed fails with `EPERM`, and the kernel logs it.
//!
//! No list has `execve`, or `clone` for anything but a thread; neither lets memory become executable. `clone3` hides what
//! it is for, so it does not exist here, and the C library falls back.

use std::collections::BTreeMap;
use std::io;

use libc::{
    SYS_accept4, SYS_bind, SYS_bpf, SYS_brk, SYS_clock_getres, SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone,
    SYS_clone3, SYS_close, SYS_connect, SYS_dup, SYS_dup3, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait,
    SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_faccessat, SYS_faccessat2, SYS_fadvise64, SYS_fallocate, SYS_fchmod,
    SYS_fchmodat, SYS_fchmodat2, SYS_fcntl, SYS_fdatasync, SYS_flock, SYS_fstat, SYS_fstatfs, SYS_fsync, SYS_ftruncate,
    SYS_futex, SYS_getcwd, SYS_getdents64, SYS_getegid, SYS_geteuid, SYS_getgid, SYS_getpeername, SYS_getpid,
    SYS_getppid, SYS_getrandom, SYS_getrusage, SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_getuid, SYS_ioctl,
    SYS_listen, SYS_lseek, SYS_madvise, SYS_membarrier, SYS_memfd_create, SYS_mkdirat, SYS_mlock, SYS_mmap,
    SYS_mprotect, SYS_mremap, SYS_munlock, SYS_munmap, SYS_nanosleep, SYS_newfstatat, SYS_openat, SYS_openat2,
    SYS_pipe2, SYS_ppoll, SYS_prctl, SYS_pread64, SYS_preadv2, SYS_prlimit64, SYS_pwrite64, SYS_read, SYS_readlinkat,
    SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_renameat, SYS_renameat2, SYS_restart_syscall, SYS_rseq, SYS_rt_sigaction,
    SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_getaffinity, SYS_sched_setaffinity, SYS_sched_yield, SYS_seccomp,
    SYS_sendmmsg, SYS_sendmsg, SYS_sendto, SYS_set_robust_list, SYS_setsockopt, SYS_shutdown, SYS_sigaltstack,
    SYS_socket, SYS_socketpair, SYS_statx, SYS_sysinfo, SYS_tgkill, SYS_tkill, SYS_uname, SYS_unlinkat, SYS_write,
    SYS_writev,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// What every thread does: frames, memory, time, sleep, and its end.
const WORKER: &[i64] = &[
    SYS_read,
    SYS_write,
    SYS_readv,
    SYS_writev,
    SYS_preadv2,
    SYS_close,
    SYS_futex,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_ppoll,
    SYS_sendto,
    SYS_recvfrom,
    SYS_getsockopt,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_nanosleep,
    SYS_sched_yield,
    SYS_getpid,
    SYS_gettid,
    SYS_tgkill,
    SYS_rt_sigreturn,
    SYS_rt_sigprocmask,
    SYS_rt_sigaction,
    SYS_sigaltstack,
    SYS_munmap,
    SYS_madvise,
    SYS_mremap,
    SYS_brk,
    SYS_exit,
    SYS_exit_group,
    SYS_restart_syscall,
    SYS_rseq,
    SYS_set_robust_list,
    SYS_membarrier,
    SYS_sched_setaffinity,
    SYS_sched_getaffinity,
    SYS_getrandom,
];

/// What the control side does besides: files, sockets, interfaces, threads.
const CONTROL: &[i64] = &[
    SYS_openat,
    SYS_openat2,
    SYS_statx,
    SYS_newfstatat,
    SYS_fstat,
    SYS_fstatfs,
    SYS_readlinkat,
    SYS_lseek,
    SYS_getdents64,
    SYS_getcwd,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_pread64,
    SYS_pwrite64,
    SYS_fadvise64,
    SYS_fcntl,
    SYS_flock,
    SYS_fsync,
    SYS_fdatasync,
    SYS_ftruncate,
    SYS_fallocate,
    SYS_renameat,
    SYS_renameat2,
    SYS_unlinkat,
    SYS_mkdirat,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fchmodat2,
    SYS_dup,
    SYS_dup3,
    SYS_pipe2,
    SYS_memfd_create,
    SYS_ioctl,
    SYS_bpf,
    SYS_socketpair,
    SYS_bind,
    SYS_listen,
    SYS_accept4,
    SYS_connect,
    SYS_getsockname,
    SYS_getpeername,
    SYS_setsockopt,
    SYS_shutdown,
    SYS_sendmsg,
    SYS_sendmmsg,
    SYS_recvmsg,
    SYS_epoll_create1,
    SYS_eventfd2,
    SYS_mlock,
    SYS_munlock,
    SYS_prctl,
    SYS_seccomp,
    SYS_prlimit64,
    SYS_getuid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getegid,
    SYS_getppid,
    SYS_uname,
    SYS_sysinfo,
    SYS_getrusage,
    SYS_tkill,
    SYS_clock_getres,
];

/// The same by other names, which this architecture has from its past.
#[cfg(target_arch = "x86_64")]
const WORKER_BEFORE: &[i64] = &[libc::SYS_poll];
#[cfg(target_arch = "x86_64")]
const CONTROL_BEFORE: &[i64] = &[
    libc::SYS_epoll_wait,
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_readlink,
    libc::SYS_access,
    libc::SYS_rename,
    libc::SYS_unlink,
    libc::SYS_mkdir,
    libc::SYS_chmod,
    libc::SYS_accept,
    libc::SYS_pipe,
    libc::SYS_getrlimit,
];
#[cfg(not(target_arch = "x86_64"))]
const WORKER_BEFORE: &[i64] = &[];
#[cfg(not(target_arch = "x86_64"))]
const CONTROL_BEFORE: &[i64] = &[];

/// Address families of sockets: to guests and clients, to the kernel, and to NICs.
const FAMILIES: &[i32] =
    &[libc::AF_UNIX, libc::AF_NETLINK, libc::AF_INET, libc::AF_INET6, libc::AF_PACKET, libc::AF_XDP];

/// Calls, and for each what one of its rules has to allow; any if it has none.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Confines this thread and all that it starts to what the control side does.
pub(super) fn confine_process() -> io::Result<String> {
    let no_clone3 = filter(Rules::from([(SYS_clone3, Vec::new())]), SeccompAction::Allow, errno(libc::ENOSYS))?;
    let (worker, control) = (worker()?, control()?);
    let counts = format!(" (workers {} system calls, others {})", worker.len(), control.len());
    // Workers install theirs when it is too late to tell.
    only(worker)?;
    install(&only(control)?, LOG)?;
    // Where both refuse, the newer one says with which error. Every start of a thread tries it, so that is not logged.
    install(&no_clone3, 0)?;
    Ok(counts)
}

/// Confines this thread to what a worker does, on top of [`super::apply`].
///
/// # Errors
/// If the kernel refuses.
pub fn confine_worker() -> io::Result<()> {
    install(&only(worker()?)?, LOG)
}

fn worker() -> io::Result<Rules> {
    let mut rules = freely(&[WORKER, WORKER_BEFORE]);
    // For what a worker cannot have allocated, and for memory that was lost: never with a file.
    let anonymous = libc::MAP_ANONYMOUS as u64;
    rules.insert(SYS_mmap, vec![rule([not_executable(2)?, is(3, anonymous, anonymous)?])?]);
    // What the standard library asks before it closes a descriptor, in builds with its checks.
    rules.insert(SYS_fcntl, vec![rule([is(1, libc::F_GETFD as u64, u32::MAX.into())?])?]);
    Ok(rules)
}

fn control() -> io::Result<Rules> {
    let mut rules = freely(&[WORKER, WORKER_BEFORE, CONTROL, CONTROL_BEFORE]);
    for call in [SYS_mmap, SYS_mprotect] {
        rules.insert(call, vec![rule([not_executable(2)?])?]);
    }
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(SYS_clone, vec![rule([is(0, thread, thread)?])?]);
    let family = |family: &i32| rule([is(0, *family as u64, u32::MAX.into())?]);
    rules.insert(SYS_socket, FAMILIES.iter().map(family).collect::<io::Result<_>>()?);
    Ok(rules)
}

fn freely(lists: &[&[i64]]) -> Rules {
    lists.concat().into_iter().map(|call| (call, Vec::new())).collect()
}

fn only(rules: Rules) -> io::Result<BpfProgram> {
    filter(rules, errno(libc::EPERM), SeccompAction::Allow)
}

fn errno(error: i32) -> SeccompAction {
    SeccompAction::Errno(error as u32)
}

fn rule<const N: usize>(conditions: [SeccompCondition; N]) -> io::Result<SeccompRule> {
    SeccompRule::new(conditions.into()).map_err(failed)
}

/// That the bits of `mask` in an argument are those of `value`.
fn is(argument: u8, value: u64, mask: u64) -> io::Result<SeccompCondition> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, value & mask).map_err(failed)
}

fn not_executable(argument: u8) -> io::Result<SeccompCondition> {
    is(argument, 0, libc::PROT_EXEC as u64)
}

fn failed(error: BackendError) -> io::Error {
    io::Error::other(error)
}

fn filter(rules: Rules, others: SeccompAction, listed: SeccompAction) -> io::Result<BpfProgram> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(failed)?;
    SeccompFilter::new(rules, others, listed, arch).and_then(BpfProgram::try_from).map_err(failed)
}

/// Has refusals logged by the kernel.
const LOG: libc::c_ulong = libc::SECCOMP_FILTER_FLAG_LOG;
/// Without it old kernels slow the thread down, as if it ran somebody's own code.
const PLAIN: libc::c_ulong = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;

fn install(program: &BpfProgram, log: libc::c_ulong) -> io::Result<()> {
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_ptr().cast::<libc::sock_filter>().cast_mut(),
    };
    // The flags are of kernels 4.14 and 4.17.
    for flags in [log | PLAIN, 0] {
        // SAFETY: the program and its description outlive the call, which copies both. The crate's instructions have the
        // kernel's layout.
        let done = unsafe { libc::syscall(SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const filter) };
        if done == 0 {
            return Ok(());
        }
    }
    Err(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a call returns in a thread of its own, confined.
    fn tried(confine: fn() -> io::Result<()>, call: fn() -> i64) -> Result<i64, Option<i32>> {
        let attempt = move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            confine().unwrap();
            match call() {
                -1 => Err(io::Error::last_os_error().raw_os_error()),
                done => Ok(done),
            }
        };
        std::thread::spawn(attempt).join().unwrap()
    }

    fn as_control() -> io::Result<()> {
        confine_process().map(drop)
    }

    // SAFETY, of all calls below: they get numbers and null pointers only, and would do nothing worse than fail.

    fn execute() -> i64 {
        // SAFETY: see above.
        unsafe { libc::syscall(libc::SYS_execve, 0, 0, 0) }
    }

    fn fork() -> i64 {
        // SAFETY: see above; were it let through, the invalid flags would make it fail.
        unsafe { libc::syscall(SYS_clone, libc::CLONE_NEWUSER | libc::CLONE_FS, 0, 0, 0, 0) }
    }

    fn clone3() -> i64 {
        // SAFETY: see above.
        unsafe { libc::syscall(SYS_clone3, 0, 0) }
    }

    fn executable_memory() -> i64 {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: see above.
        unsafe { libc::syscall(SYS_mmap, 0, 4096, protection, flags, -1, 0) }
    }

    fn memory() -> i64 {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: see above.
        unsafe { libc::syscall(SYS_mmap, 0, 4096, protection, flags, -1, 0) }
    }

    fn unix_socket() -> i64 {
        // SAFETY: see above.
        unsafe { libc::syscall(SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0) }
    }

    fn foreign_socket() -> i64 {
        // SAFETY: see above.
        unsafe { libc::syscall(SYS_socket, libc::AF_VSOCK, libc::SOCK_STREAM, 0) }
    }

    #[test]
    fn the_control_side_starts_no_program() {
        assert_eq!(tried(as_control, execute), Err(Some(libc::EPERM)));
        assert_eq!(tried(as_control, fork), Err(Some(libc::EPERM)));
        assert_eq!(tried(as_control, clone3), Err(Some(libc::ENOSYS)));
        assert_eq!(tried(as_control, executable_memory), Err(Some(libc::EPERM)));
        assert_eq!(tried(as_control, foreign_socket), Err(Some(libc::EPERM)));
        assert!(tried(as_control, unix_socket).is_ok());
        assert!(tried(as_control, memory).is_ok());
        assert!(tried(as_control, || i64::from(std::thread::spawn(|| 7).join().unwrap())).is_ok(), "threads");
    }

    #[test]
    fn a_worker_opens_nothing() {
        assert_eq!(tried(confine_worker, execute), Err(Some(libc::EPERM)));
        assert_eq!(tried(confine_worker, unix_socket), Err(Some(libc::EPERM)));
        assert_eq!(tried(confine_worker, executable_memory), Err(Some(libc::EPERM)));
        // SAFETY: the path is a C string.
        let open = || i64::from(unsafe { libc::open(c"/etc/group".as_ptr(), libc::O_RDONLY) });
        assert_eq!(tried(confine_worker, open), Err(Some(libc::EPERM)));
        assert!(tried(confine_worker, memory).is_ok());
    }
}
