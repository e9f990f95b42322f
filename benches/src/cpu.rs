//! Which CPU we run on, how near two of them are, and time in ticks.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const TRIPS: u32 = 20_000;
const PROBE_LIMIT: Duration = Duration::from_secs(1);
/// Two CPUs are near each other when a cache line takes no longer from one to the other, in nanoseconds.
pub const NEAR_NS: f64 = 110.0;

/// Keeps the calling thread on one CPU.
///
/// # Errors
/// If there is no such CPU for us.
pub fn pin(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the set is a plain bit array that lives through the call, and the index was just checked.
    let rc = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets the calling thread run whenever it wants to, before all others of its CPU.
///
/// # Errors
/// If we are not allowed to.
pub fn run_first() -> io::Result<()> {
    // SAFETY: an all-zero parameter is valid, and lives through the call.
    let rc = unsafe {
        let mut parameter: libc::sched_param = std::mem::zeroed();
        parameter.sched_priority = 1;
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameter)
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no pointers. Sleeps end when they should, not 50 µs later.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    Ok(())
}

/// CPU time that the calling thread has used.
pub fn thread_time() -> Duration {
    // SAFETY: an all-zero time is valid, and lives through the call.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time);
        time
    };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// CPU time that the hypervisor has kept from this machine so far, if it tells.
pub fn stolen() -> Duration {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    // SAFETY: no pointers.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) }.max(1) as f64;
    Duration::from_secs_f64(steal(&text) as f64 / per_second)
}

/// The eighth number of the first line of `/proc/stat`.
fn steal(text: &str) -> u64 {
    let mut words = text.lines().next().unwrap_or_default().split_whitespace();
    words.nth(8).and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// Nanoseconds that a cache line takes from one CPU to another, there and back halved; the median of a few rounds.
/// Infinite if the two never meet, as on one CPU.
///
/// # Errors
/// If a thread cannot be kept on its CPU.
pub fn line_ns(a: usize, b: usize) -> io::Result<f64> {
    if a == b {
        return Ok(f64::INFINITY);
    }
    let mut rounds = (0..3).map(|_| ping_pong(a, b)).collect::<io::Result<Vec<f64>>>()?;
    rounds.sort_by(f64::total_cmp);
    Ok(rounds[1])
}

#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicU32);

fn ping_pong(a: usize, b: usize) -> io::Result<f64> {
    let line = Line::default();
    let deadline = Instant::now() + PROBE_LIMIT;
    let wait = |value: u32| {
        let mut spins = 0u32;
        while line.0.load(Ordering::Acquire) != value {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1 << 20) && Instant::now() > deadline {
                return false;
            }
        }
        true
    };
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| {
            pin(b)?;
            for trip in 0..TRIPS {
                if !wait(2 * trip + 1) {
                    break;
                }
                line.0.store(2 * trip + 2, Ordering::Release);
            }
            io::Result::Ok(())
        });
        let ask = scope.spawn(|| {
            pin(a)?;
            let mut began = Instant::now();
            for trip in 0..TRIPS {
                if trip == TRIPS / 10 {
                    began = Instant::now();
                }
                line.0.store(2 * trip + 1, Ordering::Release);
                if !wait(2 * trip + 2) {
                    return Ok(f64::INFINITY);
                }
            }
            Ok(began.elapsed().as_nanos() as f64 / f64::from(TRIPS - TRIPS / 10) / 2.0)
        });
        let failed = || io::Error::other("a thread of the probe has ended early");
        answer.join().map_err(|_| failed())??;
        ask.join().map_err(|_| failed())?
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn stolen_time_is_read() {
        assert_eq!(super::steal("cpu  1 2 3 4 5 6 7 88 0 0\ncpu0 1 1 1 1\n"), 88);
        assert_eq!(super::steal("cpu 1 2"), 0);
    }

    #[test]
    fn a_line_takes_its_time() {
        // There may be one CPU only.
        assert!(super::line_ns(0, 1).is_err() || super::line_ns(0, 1).unwrap() > 1.0);
        assert_eq!(super::line_ns(0, 0).unwrap(), f64::INFINITY);
        assert!(super::pin(usize::MAX).is_err());
    }
}
