//! The pod of a VM: its two containers, as namespaces in which paths are those of KubeVirt's pods.

use anyhow::{Context, Result, ensure};
use e2e::process::{Process, tail};
use e2e::scratch::Scratch;
use e2e::{image, machine, wait};
use serde_json::Value;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The name of the sidecar's container.
pub(crate) const SIDECAR: &str = "hook-sidecar-0";
/// Where containers see what source and target of a migration share.
pub(crate) const SHARED: &str = "/var/run/kubevirt/migrationproxy";
/// What QEMU boots, in the compute container.
pub(crate) const BOOT: &str = "/var/run/kubevirt-boot";
/// Ends of sockets, and what libvirt keeps, in the compute container.
pub(crate) const PRIVATE: &str = "/var/run/kubevirt-private";
const START_LIMIT: Duration = Duration::from_secs(20);

/// Arguments: name, host UUID, the pod's folder, the shared folder, kernel, initramfs, and SOURCE TARGET for each mount.
///
/// A session daemon of an unprivileged user, as in virt-launcher. The shell stays, since QEMU's that libvirt has tried out
/// and killed are the first process's to bury; and it is root, since the kernel forgets to end a process with its parent
/// when the process changes its user.
const COMPUTE: &str = r#"
set -e
name=$1 uuid=$2 pod=$3 shared=$4 kernel=$5 initramfs=$6; shift 6
mount --make-rprivate /
mount -t proc proc /proc
hostname "$name"
(cat /etc/passwd; echo 'qemu:x:107:107::/:/bin/false') >"$pod/passwd"
(grep -v ':107:' /etc/group; echo 'qemu:x:107:') >"$pod/group"
mount --bind "$pod/passwd" /etc/passwd
mount --bind "$pod/group" /etc/group
[ ! -e /usr/bin/ovs-vsctl ] || mount --bind /dev/null /usr/bin/ovs-vsctl
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir -p /run/libvirt /run/kubevirt-boot /run/kubevirt-hooks /run/kubevirt-private /run/kubevirt/migrationproxy
touch /run/kubevirt-boot/kernel /run/kubevirt-boot/initramfs
mount --bind "$kernel" /run/kubevirt-boot/kernel
mount --bind "$initramfs" /run/kubevirt-boot/initramfs
mount --bind "$pod/hooks" /run/kubevirt-hooks
mount --bind "$pod/private" /run/kubevirt-private
mount --bind "$shared" /run/kubevirt/migrationproxy
while [ $# -gt 1 ]; do
    mkdir -p "$2"
    mount --bind "$1" "$2"
    shift 2
done
mkdir -p /run/kubevirt-private/libvirt
cat >/run/kubevirt-private/libvirt/libvirtd.conf <<END
unix_sock_dir = "/run/kubevirt/migrationproxy/$name"
host_uuid = "$uuid"
log_outputs = "3:stderr"
END
cat >/run/kubevirt-private/libvirt/qemu.conf <<END
stdio_handler = "file"
security_driver = "none"
END
mkdir -p "/run/kubevirt/migrationproxy/$name"
chown -R 107:107 /run/libvirt /run/kubevirt-private "/run/kubevirt/migrationproxy/$name"
export XDG_CACHE_HOME=/run/kubevirt-private XDG_CONFIG_HOME=/run/kubevirt-private XDG_RUNTIME_DIR=/run HOME=/
cd /
setpriv --reuid=107 --regid=107 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs libvirtd &
wait $!
"#;

/// Arguments: the pod's folder, the container's name, the sidecar's program.
const HOOK_SIDECAR: &str = r#"
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir -p /run/kubevirt-hooks
touch /run/sidecar
mount --bind "$3" /run/sidecar
mount --bind "$1/hooks/$2" /run/kubevirt-hooks
pod=$(cd "$1/podinfo" && pwd)
mount -t tmpfs -o mode=0755 tmpfs /etc
mkdir /etc/podinfo
mount --bind "$pod" /etc/podinfo
cd /
exec setpriv --reuid=107 --regid=107 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs --pdeathsig=KILL \
    env -i CONTAINER_NAME="$2" NETWORK_BINDING_PLUGIN_NAME=vhostuser XDG_RUNTIME_DIR=/var/run /run/sidecar
"#;

/// See the module.
pub(crate) struct Pod {
    // Dropped in this order: the processes before the folder.
    compute: Process,
    /// None once it has ended.
    sidecar: Option<Process>,
    pub(crate) name: String,
    folder: Scratch,
}

impl Pod {
    /// Starts both containers; the annotation is not there yet. `mounts` are from, to.
    pub(crate) fn start(name: &str, number: u32, mounts: &[(String, String)], shared: &Path) -> Result<Self> {
        let folder = Scratch::new("pod")?;
        for part in ["hooks", "hooks/hook-sidecar-0", "private", "podinfo"] {
            fs::create_dir(folder.join(part))?;
            // Volumes of a pod with fsGroup.
            fs::set_permissions(folder.join(part), Permissions::from_mode(0o777))?;
        }
        fs::write(folder.join("podinfo/network-info"), "")?;
        let image = image::ensure()?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--uts", "--fork", "--kill-child", "sh", "-c", COMPUTE, "compute", name]);
        command.arg(format!("5b1f53ae-0f0c-4e5e-8a3a-{number:012x}")).arg(folder.path()).arg(shared);
        command.arg(image.kernel).arg(image.initramfs);
        for (from, to) in mounts {
            command.args([from, to]);
        }
        let compute = Process::start("compute", command, &folder.join("compute.log"), &machine::cpus()?.load)?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", HOOK_SIDECAR, "sidecar"]).arg(folder.path()).arg(SIDECAR);
        command.arg(machine::built_program("sluice-binding-sidecar", "SLUICE_BINDING_SIDECAR")?);
        let sidecar = Process::start("sidecar", command, &folder.join("sidecar.log"), &[])?;
        let mut pod = Self { compute, sidecar: Some(sidecar), name: name.into(), folder };
        let socket = shared.join(name).join("libvirt-sock");
        wait::until_true("libvirtd to listen", START_LIMIT, || {
            pod.compute.check_alive()?;
            Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok())
        })?;
        Ok(pod)
    }

    /// KubeVirt annotates the pod, and the kubelet refreshes the volume.
    pub(crate) fn annotate(&self, network_info: &Value) -> Result<()> {
        // As the kubelet does it: by renaming.
        let (new, file) = (self.folder.join("podinfo/.new"), self.folder.join("podinfo/network-info"));
        fs::write(&new, network_info.to_string())?;
        Ok(fs::rename(new, file)?)
    }

    /// The hook sockets as virt-launcher finds them: what is no directory in the directories of the sidecars.
    pub(crate) fn hook_sockets(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.folder.join("hooks").join(SIDECAR))?;
        let entries: Vec<_> = entries.collect::<Result<_, _>>()?;
        let sockets = entries.iter().filter(|entry| entry.file_type().is_ok_and(|kind| !kind.is_dir()));
        Ok(sockets.map(fs::DirEntry::path).collect())
    }

    /// Where the link of a network leads to.
    pub(crate) fn link(&self, network: &str) -> Result<PathBuf> {
        let link = self.folder.join("hooks").join(SIDECAR).join("userdata").join(network);
        fs::read_link(&link).with_context(|| link.display().to_string())
    }

    /// A file below [`PRIVATE`].
    pub(crate) fn private(&self, name: &str) -> PathBuf {
        self.folder.join("private").join(name)
    }

    /// The sidecar has to end by itself, well, with no socket left.
    pub(crate) fn wait_sidecar_ended(&mut self) -> Result<()> {
        let mut sidecar = self.sidecar.take().context("it has ended before")?;
        let status = sidecar.wait_exit(START_LIMIT)?;
        ensure!(status.success(), "the sidecar ended with {status}:\n{}", sidecar.log_tail());
        let left = self.hook_sockets()?;
        ensure!(left.is_empty(), "{left:?} is left");
        Ok(())
    }

    /// Resident memory of the sidecar, in KiB.
    pub(crate) fn sidecar_resident(&self) -> Result<u64> {
        let pid = self.sidecar.as_ref().context("it has ended")?.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// What helps to see why something did not work.
    pub(crate) fn diagnosis(&self) -> String {
        let logs = [self.folder.join("compute.log"), self.folder.join("sidecar.log"), self.private("console.log")];
        let mut text = format!("--- pod {}", self.name);
        let qemu = fs::read_dir(self.private("libvirt/qemu/log")).into_iter().flatten().flatten();
        for log in logs.into_iter().chain(qemu.map(|entry| entry.path())) {
            text.push_str(&format!("\n--- {}:\n{}", log.display(), tail(&log)));
        }
        text
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // It does not care for SIGTERM; with it, all that runs in its namespace ends.
        self.compute.kill();
    }
}
