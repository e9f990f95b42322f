//! Installs what demo and tests need; quick when all is there.

use anyhow::{Context, Result, bail, ensure};
use e2e::{image, machine, peer};
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::stage::{cargo, must};

/// Debian packages, and what each is for.
const PACKAGES: [(&str, &str); 9] = [
    ("qemu-system-x86", "runs the guests"),
    ("busybox-static", "userland of the guests"),
    ("iperf3", "TCP load in the guests"),
    ("ethtool", "switches the guests' offloads"),
    ("iproute2", "namespaces and links of the tests on the host"),
    ("dpdk-dev", "dpdk-testpmd, a second guest driver for the tests"),
    ("socat", "console of the demo's guests"),
    ("tshark", "reads captures, and looks at the frames on a wire"),
    ("pkg-config", "finds libdpdk, for the tests of the feature dpdk"),
];
/// Only this one has to come from elsewhere on Debian 12.
const QEMU: &str = "qemu-system-x86";
const BACKPORTS: &str = "bookworm-backports";
const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/sluice-backports.list";
const BACKPORTS_LINE: &str = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm-backports main\n";
const TESTPMD_MIB: u32 = 256;

/// Tells what is missing; an error if anything is.
pub(crate) fn check() -> Result<()> {
    let missing = missing_packages();
    for (package, purpose) in &missing {
        println!("missing: package {package} ({purpose})");
    }
    let has_kernel = image::kernel_is_cached()?;
    if !has_kernel {
        println!("missing: the guests' kernel (in .cache/kernel)");
    }
    ensure!(missing.is_empty() && has_kernel, "this machine is not ready; run `cargo xtask setup`");
    println!("everything is here; guests run with {}", machine::accelerator()?);
    Ok(())
}

/// Installs and makes whatever is missing.
pub(crate) fn ensure() -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "guests are x86-64 machines; this host is not");
    ensure!(is_root(), "this needs root, to install packages and to make links; run it as root");
    install_packages(&missing_packages())?;
    peer::reserve_hugepages(TESTPMD_MIB)?;
    must("building the guest agent", cargo(&["build", "--quiet", "-p", "e2e", "--bin", "guest-agent"]))?;
    if !image::kernel_is_cached()? {
        println!("==> fetching Debian's cloud kernel for the guests");
        // Where all packages were there, the package lists need not be.
        apt_get(&["update", "-q"])?;
    }
    image::ensure()?;
    Ok(())
}

fn is_root() -> bool {
    // SAFETY: geteuid has no conditions.
    unsafe { libc::geteuid() == 0 }
}

fn missing_packages() -> Vec<(&'static str, &'static str)> {
    PACKAGES.into_iter().filter(|(package, _)| !is_installed(package)).collect()
}

fn is_installed(package: &str) -> bool {
    let query = Command::new("dpkg-query").args(["-W", "-f", "${Status}", package]).output();
    query.is_ok_and(|output| output.stdout == b"install ok installed")
}

fn install_packages(missing: &[(&str, &str)]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    println!("==> installing Debian packages:");
    for (package, purpose) in missing {
        println!("    {package:<18} {purpose}");
    }
    let needs_backports = missing.iter().any(|(package, _)| *package == QEMU) && is_bookworm();
    if needs_backports && !has_backports() {
        println!("    from {BACKPORTS} ({BACKPORTS_FILE}), whose QEMU fits the one that may be here already");
        fs::write(BACKPORTS_FILE, BACKPORTS_LINE).with_context(|| format!("cannot write {BACKPORTS_FILE}"))?;
    }
    apt_get(&["update", "-q"])?;
    let names: Vec<String> = missing
        .iter()
        .map(|(package, _)| match *package {
            QEMU if needs_backports => format!("{QEMU}/{BACKPORTS}"),
            other => other.to_owned(),
        })
        .collect();
    let mut arguments = vec!["install", "-y", "-q", "--no-install-recommends"];
    arguments.extend(names.iter().map(String::as_str));
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

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    let what = format!("apt-get {}", arguments[0]);
    if let Err(error) = must(&what, command) {
        bail!("{error}: its messages above tell why; is the network there?");
    }
    Ok(())
}
