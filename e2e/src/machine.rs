//! This machine: its CPUs, whether KVM truly works, where the repository is, one test at a time.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::qemu::GuestSpec;

/// A kernel that KVM runs is up in under two seconds.
const KVM_PROBE_LIMIT: Duration = Duration::from_secs(15);

/// The repository this harness was built in.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// The folder of things that are costly to make again; never committed.
pub fn cache() -> Result<PathBuf> {
    let dir = repository().join(".cache");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

/// The target folder that this program was built into, wherever cargo was told to have it.
pub fn target() -> Result<PathBuf> {
    let me = std::env::current_exe().context("cannot tell my own path")?;
    target_of(&me).context("I am not in a target folder").map(Path::to_owned)
}

/// We are in `target/PROFILE`, or as a test in `target/PROFILE/deps`. Cargo marks a folder that it has made, but not one that was
/// there.
fn target_of(program: &Path) -> Option<&Path> {
    let marked = program.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    marked.or_else(|| program.ancestors().skip(1).find(|dir| !dir.ends_with("deps"))?.parent())
}

/// A program of this workspace: what the variable names, else the newest build of any profile.
pub fn built_program(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        // Relative means relative to the repository: tests run in their package's folder.
        return Ok(repository().join(path));
    }
    let target = target()?;
    let builds = ["release", "debug"].map(|profile| target.join(profile).join(name));
    let age = |path: &PathBuf| path.metadata().and_then(|metadata| metadata.modified()).ok();
    match builds.into_iter().filter(|path| path.is_file()).max_by_key(age) {
        Some(path) => Ok(path),
        None => {
            bail!("{name} is not built: run `cargo build --workspace --bins`, or set {variable}")
        }
    }
}

/// Who runs where: the switch has a CPU of its own where there are two.
#[derive(Debug, Clone)]
pub struct Cpus {
    /// The switch's CPU.
    pub switch: Vec<usize>,
    /// The CPUs of guests and other load.
    pub load: Vec<usize>,
}

/// Splits the CPUs that we may use.
pub fn cpus() -> Result<Cpus> {
    // SAFETY: the set is a plain bit array that the call fills; CPU_ISSET checks its index.
    let allowed: Vec<usize> = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return Err(std::io::Error::last_os_error()).context("cannot read the CPU affinity");
        }
        (0..libc::CPU_SETSIZE as usize).filter(|&cpu| libc::CPU_ISSET(cpu, &set)).collect()
    };
    match allowed.split_first() {
        None => bail!("no CPU to run on"),
        Some((only, [])) => Ok(Cpus { switch: vec![*only], load: vec![*only] }),
        Some((first, rest)) => Ok(Cpus { switch: vec![*first], load: rest.to_vec() }),
    }
}

/// `kvm` where it truly runs a guest's kernel, else `tcg`. A `/dev/kvm` that opens proves little
/// (nested virtualisation is often half there), so a real boot decides, once per boot of the machine.
pub fn accelerator() -> Result<String> {
    if let Some(known) = known_accelerator()? {
        return Ok(known);
    }
    // What could not be started, for want of an image or of QEMU, proves nothing.
    let mut guest = GuestSpec::new("kvm-probe").accelerator("kvm").start()?;
    let found = if guest.wait_ready(KVM_PROBE_LIMIT).is_ok() { "kvm" } else { "tcg" };
    let answer = answer_file()?;
    fs::write(&answer, found).with_context(|| format!("cannot write {}", answer.display()))?;
    Ok(found.to_owned())
}

/// What [`accelerator`] gives, if that is known without a boot.
pub fn known_accelerator() -> Result<Option<String>> {
    match std::env::var("SLUICE_ACCEL") {
        Ok(forced) => Ok(Some(forced)),
        Err(_) if !Path::new("/dev/kvm").exists() => Ok(Some("tcg".to_owned())),
        Err(_) => Ok(fs::read_to_string(answer_file()?).ok()),
    }
}

fn answer_file() -> Result<PathBuf> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").context("cannot read the boot id")?;
    Ok(cache()?.join(format!("accelerator-{}", boot.trim())))
}

/// Held by whoever starts guests or switches: one at a time on this machine.
pub type Exclusive = MutexGuard<'static, ()>;

/// Waits for our turn, among the threads of this process and among processes.
pub fn exclusive() -> Result<Exclusive> {
    static LOCK_FILE: OnceLock<File> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if LOCK_FILE.get().is_none() {
        let path = std::env::temp_dir().join("sluice-e2e.lock");
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        if !lock(&file, libc::LOCK_EX | libc::LOCK_NB) {
            println!("waiting for other tests on this machine ({})", path.display());
            if !lock(&file, libc::LOCK_EX) {
                return Err(std::io::Error::last_os_error()).context("cannot lock the machine for tests");
            }
        }
        let _ = LOCK_FILE.set(file);
    }
    Ok(turn)
}

/// Locks a file; the lock goes with the process.
fn lock(file: &File, how: i32) -> bool {
    // SAFETY: flock takes no pointers.
    unsafe { libc::flock(file.as_raw_fd(), how) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_folder_is_found_without_a_mark() {
        for program in ["/nowhere/out/debug/xtask", "/nowhere/out/debug/deps/e2e-0123"] {
            assert_eq!(target_of(Path::new(program)), Some(Path::new("/nowhere/out")));
        }
        let here = target().unwrap();
        assert!(std::env::current_exe().unwrap().starts_with(here));
    }
}
