//! Installs what demo and tests need; quick when all is there.

use anyhow::{Context, Result, bail, ensure};
use e2e::{image, machine};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::stage::{cargo, must};

/// Debian packages, and what each is for.
const PACKAGES: [(&str, &str); 10] = [
    ("qemu-system-x86", "runs the guests"),
    ("busybox-static", "userland of the guests"),
    ("lz4", "unpacks the guests' kernel, which then boots faster"),
    ("iperf3", "TCP load in the guests"),
    ("ethtool", "switches the guests' offloads"),
    ("iproute2", "namespaces and links of the tests on the host"),
    ("dpdk-dev", "dpdk-testpmd, a second guest driver for the tests"),
    ("socat", "console of the demo's guests"),
    ("tshark", "reads captures, and looks at the frames on a wire"),
    ("pkg-config", "finds libdpdk, for the tests of the feature dpdk"),
];
/// More of them, for the tests alone.
const TEST_PACKAGES: [(&str, &str); 8] = [
    ("libvirt-daemon", "runs guests as KubeVirt does, as daemons of the tests' own"),
    ("libvirt-daemon-driver-qemu", "its driver of QEMU"),
    ("libvirt-clients", "virsh, its command line"),
    ("golang-go", "compiles clients that share no code with ours"),
    ("golang-google-grpc-dev", "gRPC as the kubelet has it"),
    ("golang-github-appc-cni-dev", "libcni, which calls CNI plugins"),
    ("containernetworking-plugins", "CNI plugins that hand out addresses"),
    ("python3-venv", "Python's gRPC, and the checks of deploy/"),
];
/// Only these, and what they share a source with, have to come from elsewhere on Debian 12.
const FROM_BACKPORTS: [&str; 4] =
    ["qemu-system-x86", "libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-clients"];
/// QEMU that was there before may be too old: `reconnect-ms` came with 9.2.
const OLDEST: (&str, &str) = ("qemu-system-x86", "1:9.2");
/// Asking for `qemu-system-x86/bookworm-backports` is not enough: whether apt then takes its dependencies from there too
/// changes with what else is in Debian that day. For all packages (`-t`) it would replace systemd.
const PREFERENCES_FILE: &str = "/etc/apt/preferences.d/sluice-backports";
const PREFERENCES: &str = "Package: qemu-* seabios libvirt*\nPin: release n=bookworm-backports\nPin-Priority: 600\n";
/// A virtual environment in the target folder, and what is in it.
const PYTHON: &str = "grpcio";
const PYTHON_PACKAGE: &str = "grpcio";
/// How long another package manager is waited for.
const APT_LIMIT: Duration = Duration::from_secs(300);
const LISTS_LOCK: &str = "/var/lib/apt/lists/lock";
const BACKPORTS: &str = "bookworm-backports";
const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/sluice-backports.list";
const BACKPORTS_LINE: &str = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm-backports main\n";

/// Tells what is missing; an error if anything is.
pub(crate) fn check() -> Result<()> {
    let missing = missing_packages(PACKAGES.iter().chain(&TEST_PACKAGES));
    for (package, purpose) in &missing {
        println!("missing, or too old: package {package} ({purpose})");
    }
    let has_kernel = image::kernel_is_cached()?;
    if !has_kernel {
        println!("missing: the guests' kernel (in .cache/kernel)");
    }
    ensure!(missing.is_empty() && has_kernel, "this machine is not ready; run `cargo xtask setup`");
    println!("everything is here");
    if let Some(accelerator) = machine::known_accelerator()? {
        println!("guests run with {accelerator}");
    }
    Ok(())
}

/// Installs and makes whatever is missing for the tests.
pub(crate) fn ensure_all() -> Result<()> {
    ensure_root()?;
    install_packages(&missing_packages(PACKAGES.iter().chain(&TEST_PACKAGES)))?;
    install_python()?;
    ensure()
}

/// What tests of other people's programs need, and may be left out for want of.
pub(crate) struct Foreign {
    /// What is left out without it.
    pub(crate) name: &'static str,
    /// Set for the tests, it forbids them to be left out.
    pub(crate) variable: &'static str,
    /// Whether it is here.
    pub(crate) is_here: bool,
}

/// Debian's packages and Python's, which come from different places.
pub(crate) fn foreign() -> [Foreign; 2] {
    let packages = missing_packages(TEST_PACKAGES.iter()).is_empty();
    let python = machine::target().is_ok_and(|target| has_grpcio(&target.join(PYTHON)));
    [
        Foreign { name: "tests with Debian's packages", variable: "SLUICE_REQUIRE_PACKAGES", is_here: packages },
        Foreign { name: "tests with Python's grpcio", variable: "SLUICE_REQUIRE_PYTHON", is_here: python },
    ]
}

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

fn has_grpcio(environment: &Path) -> bool {
    succeeds(Command::new(environment.join("bin/python")).args(["-c", "import grpc"]))
}

/// Where the package cannot be had, tests do without.
fn install_python() -> Result<()> {
    let environment = machine::target()?.join(PYTHON);
    if has_grpcio(&environment) {
        return Ok(());
    }
    println!("==> installing Python's {PYTHON_PACKAGE} into {}", environment.display());
    let python = environment.join("bin/python");
    let made = succeeds(Command::new("python3").args(["-m", "venv"]).arg(&environment))
        && succeeds(Command::new(python).args(["-m", "pip", "install", "-q", PYTHON_PACKAGE]));
    if !made {
        println!("    it cannot be had; tests go without clients in Python");
        let _ = fs::remove_dir_all(environment);
    }
    Ok(())
}

/// Installs and makes whatever is missing to run guests.
pub(crate) fn ensure() -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "guests are x86-64 machines; this host is not");
    ensure_root()?;
    install_packages(&missing_packages(PACKAGES.iter()))?;
    must("building the guest agent", cargo(&["build", "--quiet", "-p", "e2e", "--bin", "guest-agent"]))?;
    if !image::kernel_is_cached()? {
        println!("==> fetching Debian's cloud kernel for the guests");
        // Where all packages were there, the package lists need not be.
        apt_get(&["update", "-q"])?;
    }
    image::ensure()?;
    if let Err(error) = image::unpack_kernel() {
        println!("    the guests' kernel stays packed, and boots slower: {error:#}");
    }
    Ok(())
}

fn ensure_root() -> Result<()> {
    // SAFETY: geteuid has no conditions.
    let is_root = unsafe { libc::geteuid() == 0 };
    ensure!(is_root, "this needs root, to install packages and to make links; run it as root");
    Ok(())
}

type Package = (&'static str, &'static str);

fn missing_packages<'a>(wanted: impl Iterator<Item = &'a Package>) -> Vec<Package> {
    wanted.filter(|(package, _)| !is_installed(package)).copied().collect()
}

fn is_installed(package: &str) -> bool {
    let query = Command::new("dpkg-query").args(["-W", "-f", "${Status} ${Version}", package]).output();
    let text = query.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let version = text.strip_prefix("install ok installed ");
    version.is_some_and(|version| package != OLDEST.0 || is_as_new(version, OLDEST.1))
}

fn is_as_new(version: &str, oldest: &str) -> bool {
    Command::new("dpkg")
        .args(["--compare-versions", version, "ge", oldest])
        .status()
        .is_ok_and(|status| status.success())
}

fn install_packages(missing: &[Package]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    println!("==> installing Debian packages:");
    for (package, purpose) in missing {
        println!("    {package:<27} {purpose}");
    }
    let needs_backports = missing.iter().any(|(package, _)| FROM_BACKPORTS.contains(package)) && is_bookworm();
    if needs_backports {
        println!("    some from {BACKPORTS} ({PREFERENCES_FILE}), whose packages fit those that may be here already");
        fs::write(PREFERENCES_FILE, PREFERENCES).with_context(|| format!("cannot write {PREFERENCES_FILE}"))?;
        if !has_backports() {
            fs::write(BACKPORTS_FILE, BACKPORTS_LINE).with_context(|| format!("cannot write {BACKPORTS_FILE}"))?;
        }
    }
    apt_get(&["update", "-q"])?;
    let mut arguments = vec!["install", "-y", "-q", "--no-install-recommends"];
    arguments.extend(missing.iter().map(|(package, _)| *package));
    apt_get(&arguments)
}

fn is_bookworm() -> bool {
    fs::read_to_string("/etc/os-release").is_ok_and(|text| text.contains("VERSION_CODENAME=bookworm"))
}

fn has_backports() -> bool {
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|entry| entry.path());
    parts
        .chain([Path::new("/etc/apt/sources.list").to_owned()])
        .filter_map(|path| fs::read_to_string(path).ok())
        .any(|text| text.lines().any(|line| !line.starts_with('#') && line.contains(BACKPORTS)))
}

/// Waits while another program has apt's lists, for which apt itself does not wait.
fn wait_for_lists() {
    let end = Instant::now() + APT_LIMIT;
    let is_locked = || {
        let Ok(file) = fs::File::open(LISTS_LOCK) else { return false };
        // SAFETY: an all-zero value is valid.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::F_WRLCK as libc::c_short;
        // SAFETY: the kernel reads and writes the local.
        let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) };
        asked == 0 && i32::from(lock.l_type) != libc::F_UNLCK
    };
    if is_locked() {
        println!("==> waiting for another package manager");
    }
    while is_locked() && Instant::now() < end {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    wait_for_lists();
    let mut command = Command::new("apt-get");
    // Others may be at it, as unattended upgrades are after a boot.
    command.args(["-o", "DPkg::Lock::Timeout=300"]).args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    let what = format!("apt-get {}", arguments[0]);
    if let Err(error) = must(&what, command) {
        bail!("{error}: its messages above tell why; is the network there?");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{OLDEST, is_as_new};

    #[test]
    fn old_versions_of_qemu_do_not_do() {
        assert!(!is_as_new("1:7.2+dfsg-7+deb12u18", OLDEST.1) && is_as_new("1:10.0.2+ds-2+deb13u1~bpo12+1", OLDEST.1));
    }
}
