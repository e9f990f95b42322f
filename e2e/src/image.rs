//! What guests boot: Debian's cloud kernel, and an initramfs of busybox, iperf3 and our agent.
//!
//! The kernel is fetched once into `.cache/kernel`; the initramfs is made anew whenever its content
//! (programs, modules, agent) changes, which its name tells.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::machine;
use crate::process::run;

/// The metapackage whose dependency is the current kernel.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
/// Modules that guests need; what these depend on is added.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_console", "virtio-rng", "virtio_net", "8021q"];
/// Programs of the host that guests get, with their shared libraries.
const PROGRAMS: [&str; 2] = ["iperf3", "ethtool"];
/// The kernel as it runs, which boots a fifth faster where an emulated processor would have to unpack it.
const UNPACKED: &str = "vmlinux";
const STALE: Duration = Duration::from_secs(24 * 3600);

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/sbin:/usr/sbin HOME=/ TERM=vt100
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev; mount -t tmpfs none /tmp
# Before there is a link: no frames but those that a test asks for, and addresses that can be used at once
# (while an address is still checked for duplicates, the kernel connects from ::1 instead, in vain).
for kind in all default; do
    echo 0 >/proc/sys/net/ipv6/conf/$kind/accept_ra
    echo 0 >/proc/sys/net/ipv6/conf/$kind/accept_dad
done
for module in $(cat /modules/order); do insmod /modules/$module.ko; done
ip link set lo up
(while true; do setsid cttyhack sh </dev/ttyS0 >/dev/ttyS0 2>&1; done) &
while true; do guest-agent; sleep 1; done
"#;

/// The files that QEMU boots.
#[derive(Debug, Clone)]
pub struct Image {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

/// Whether the kernel is already here, so that no download is needed.
pub fn kernel_is_cached() -> Result<bool> {
    Ok(kernel_dir()?.join("vmlinuz").is_file())
}

fn kernel_dir() -> Result<PathBuf> {
    Ok(machine::cache()?.join("kernel"))
}

/// Gives the image, made or fetched if it is not there yet.
pub fn ensure() -> Result<Image> {
    let kernel = kernel_dir()?;
    if !kernel_is_cached()? {
        fetch_kernel(&kernel).context("cannot get the guests' kernel")?;
    }
    let archive = initramfs(&kernel.join("modules"))?;
    let mut hasher = DefaultHasher::new();
    archive.hash(&mut hasher);
    let path = machine::cache()?.join(format!("initramfs-{:016x}.cpio", hasher.finish()));
    if !path.is_file() {
        remove_stale(&machine::cache()?);
        let part = path.with_extension(format!("part{}", std::process::id()));
        fs::write(&part, archive).with_context(|| format!("cannot write {}", part.display()))?;
        fs::rename(&part, &path)?;
    }
    let unpacked = kernel.join(UNPACKED);
    let kernel = if unpacked.is_file() { unpacked } else { kernel.join("vmlinuz") };
    Ok(Image { kernel, initramfs: path })
}

/// Old images go, unless so young that somebody may be about to boot them.
fn remove_stale(cache: &Path) {
    let entries = fs::read_dir(cache).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_name().to_string_lossy().starts_with("initramfs-")) {
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if age.is_some_and(|age| age > STALE) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Downloads the kernel package and unpacks the kernel and its modules; nothing is installed.
fn fetch_kernel(into: &Path) -> Result<()> {
    let depends = run("apt-cache", &["depends", KERNEL_PACKAGE])?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
        .map(|version| format!("linux-image-{version}"))
        .with_context(|| format!("apt knows no kernel for {KERNEL_PACKAGE}; run `apt-get update`"))?;
    let part = into.with_extension(format!("part{}", std::process::id()));
    let _ = fs::remove_dir_all(&part);
    fs::create_dir_all(&part)?;
    let download = Command::new("apt-get").args(["download", "-q", &package]).current_dir(&part).output()?;
    if !download.status.success() {
        bail!("apt-get download {package}: {}", String::from_utf8_lossy(&download.stderr).trim());
    }
    let deb = find_file(&part, &|name| name.ends_with(".deb")).context("apt-get downloaded nothing")?;
    let tree = part.join("tree");
    run("dpkg-deb", &["-x", &deb.to_string_lossy(), &tree.to_string_lossy()])?;
    let kernel = find_file(&tree.join("boot"), &|name| name.starts_with("vmlinuz-")).context("no kernel in it")?;
    fs::rename(kernel, part.join("vmlinuz"))?;
    fs::rename(tree.join("lib/modules"), part.join("modules"))?;
    fs::remove_dir_all(tree)?;
    fs::remove_file(deb)?;
    // Somebody may have been faster: then theirs is as good.
    if fs::rename(&part, into).is_err() {
        fs::remove_dir_all(&part)?;
    }
    Ok(())
}

/// Unpacks the kernel, if it is not yet: what is in its payload (Linux's Documentation/arch/x86/boot.rst), which Debian 12 packs
/// with lz4. QEMU boots it by its PVH note.
///
/// # Errors
/// If that cannot be; guests then boot the packed one.
pub fn unpack_kernel() -> Result<()> {
    let dir = kernel_dir()?;
    let unpacked = dir.join(UNPACKED);
    if unpacked.is_file() {
        return Ok(());
    }
    let image = fs::read(dir.join("vmlinuz"))?;
    let number = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("it is too short")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    let setup_sectors = usize::from(*image.get(0x1f1).context("it is too short")?);
    let (offset, length) = (number(0x248)?, number(0x24c)?);
    let start = (setup_sectors + 1) * 512 + offset;
    // The payload's last four bytes, which the kernel's build appends, are the length of what comes out.
    let end = (start + length).checked_sub(4).context("it has no payload")?;
    let payload = image.get(start..end).context("its payload is beyond its end")?;
    let expected = number(end)?;
    let [packed, part] = ["lz4", "part"].map(|kind| unpacked.with_extension(format!("{kind}{}", std::process::id())));
    let unpack = || -> Result<()> {
        fs::write(&packed, payload)?;
        run("lz4", &["-d", "-q", &packed.to_string_lossy(), &part.to_string_lossy()])?;
        let size = fs::metadata(&part)?.len();
        ensure!(size == expected as u64, "{size} bytes came out instead of {expected}");
        Ok(fs::rename(&part, &unpacked)?)
    };
    let outcome = unpack();
    for file in [packed, part] {
        let _ = fs::remove_file(file);
    }
    outcome
}

fn find_file(dir: &Path, wanted: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    for entry in fs::read_dir(dir).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find_file(&path, wanted) {
                return Some(found);
            }
        } else if wanted(&entry.file_name().to_string_lossy()) {
            return Some(path);
        }
    }
    None
}

fn initramfs(modules: &Path) -> Result<Vec<u8>> {
    let mut files = BTreeMap::new();
    files.insert("init".to_owned(), INIT.as_bytes().to_vec());
    files.insert("bin/busybox".to_owned(), read(&find_program("busybox")?)?);
    let agent = machine::built_program("guest-agent", "GUEST_AGENT_BIN")?;
    add_program(&mut files, "usr/bin/guest-agent", &agent)?;
    for name in PROGRAMS {
        add_program(&mut files, &format!("usr/bin/{name}"), &find_program(name)?)?;
    }
    let mut order = Vec::new();
    for name in MODULES {
        add_module(&mut files, &mut order, modules, name)?;
    }
    files.insert("modules/order".to_owned(), order.join("\n").into_bytes());

    let mut archive = Cpio::default();
    for dir in ["dev", "proc", "sys", "tmp", "sbin", "var", "var/run"] {
        archive.dir(dir);
    }
    for (path, content) in &files {
        archive.file(path, content);
    }
    // The kernel gives its first process this one as input and output.
    archive.entry("dev/console", 0o020_600, (5, 1), &[]);
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn find_program(name: &str) -> Result<PathBuf> {
    ["/usr/bin", "/bin", "/usr/sbin", "/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not installed: run `cargo xtask setup`"))
}

/// Adds a program of the host and, under their own paths, the shared libraries it needs.
fn add_program(files: &mut BTreeMap<String, Vec<u8>>, path: &str, program: &Path) -> Result<()> {
    files.insert(path.to_owned(), stripped(program)?);
    let libraries = run("ldd", &[&program.to_string_lossy()])?;
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let inside = library.trim_start_matches('/').to_owned();
        // Programs share most of them.
        if let Entry::Vacant(slot) = files.entry(inside) {
            slot.insert(read(Path::new(library))?);
        }
    }
    Ok(())
}

/// Without debug information a debug build of the agent is a tenth of its size, and so is the boot.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let scratch = crate::scratch::Scratch::new("strip")?;
    let out = scratch.join("out");
    match run("strip", &["-o", &out.to_string_lossy(), &program.to_string_lossy()]) {
        Ok(_) => read(&out),
        Err(_) => read(program),
    }
}

/// Adds a module after those that it depends on.
fn add_module(
    files: &mut BTreeMap<String, Vec<u8>>,
    order: &mut Vec<String>,
    modules: &Path,
    name: &str,
) -> Result<()> {
    // The kernel takes '-' and '_' in names of modules for the same.
    let wanted = format!("{}.ko", name.replace('-', "_"));
    let Some(path) = find_file(modules, &|file| file.replace('-', "_") == wanted) else {
        bail!("the guests' kernel has no module {name}");
    };
    let content = read(&path)?;
    for dependency in module_dependencies(&content) {
        if !order.contains(&dependency) {
            add_module(files, order, modules, &dependency)?;
        }
    }
    if !order.iter().any(|known| known == name) {
        order.push(name.to_owned());
        files.insert(format!("modules/{name}.ko"), content);
    }
    Ok(())
}

/// The `depends=a,b` entry that every module's `.modinfo` section has.
fn module_dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let list = module[start + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(list).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Writer of the "newc" archive format that the kernel unpacks.
#[derive(Default)]
struct Cpio {
    out: Vec<u8>,
    entries: u32,
    dirs: Vec<String>,
}

impl Cpio {
    fn dir(&mut self, path: &str) {
        if !self.dirs.iter().any(|known| known == path) {
            self.dirs.push(path.to_owned());
            self.entry(path, 0o040_755, (0, 0), &[]);
        }
    }

    /// Adds an executable file and the directories above it.
    fn file(&mut self, path: &str, content: &[u8]) {
        for (at, _) in path.match_indices('/') {
            self.dir(&path[..at]);
        }
        self.entry(path, 0o100_755, (0, 0), content);
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries, // inode
            mode,
            0, // uid
            0, // gid
            1, // links
            0, // mtime
            content.len() as u32,
            0, // device that holds the file: major, minor
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0, // checksum, unused
        ];
        self.out.extend_from_slice(b"070701");
        for field in fields {
            self.out.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.out.extend_from_slice(path.as_bytes());
        self.out.push(0);
        self.pad();
        self.out.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.out.resize(self.out.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.out
    }
}
