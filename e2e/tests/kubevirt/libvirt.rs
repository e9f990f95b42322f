//! The libvirt daemon of a pod.

use anyhow::{Context, Result};
use e2e::process::run;
use std::fs;
use std::path::{Path, PathBuf};

use crate::pod::{Pod, SHARED};

/// See the module.
pub(crate) struct Libvirt {
    uri: String,
    pod: String,
    /// For documents that virsh reads.
    file: PathBuf,
}

impl Libvirt {
    /// That of `pod`, reached from outside of it.
    pub(crate) fn of(pod: &Pod, shared: &Path) -> Self {
        let uri = format!("qemu+unix:///session?socket={}/{}/libvirt-sock", shared.display(), pod.name);
        Self { uri, pod: pod.name.clone(), file: pod.private("document.xml") }
    }

    fn virsh(&self, arguments: &[&str]) -> Result<String> {
        run("virsh", &[&["-q", "-c", &self.uri], arguments].concat())
    }

    fn write(&self, xml: &str) -> Result<&str> {
        fs::write(&self.file, xml)?;
        self.file.to_str().context("not UTF-8")
    }

    /// Defines a domain.
    pub(crate) fn define(&self, xml: &str) -> Result<()> {
        let file = self.write(xml)?;
        self.virsh(&["define", file]).with_context(|| format!("libvirt does not take this:\n{xml}"))?;
        Ok(())
    }

    /// Starts a domain; returns when QEMU's switch has connected.
    pub(crate) fn start(&self, domain: &str) -> Result<()> {
        self.virsh(&["start", domain]).map(drop)
    }

    /// The document of a domain, with `option` such as `--inactive`.
    pub(crate) fn document(&self, domain: &str, option: &str) -> Result<String> {
        self.virsh(&["dumpxml", domain, option])
    }

    /// `running`, `shut off` and so on.
    pub(crate) fn state(&self, domain: &str) -> Result<String> {
        Ok(self.virsh(&["domstate", domain])?.trim().to_owned())
    }

    /// Migrates as KubeVirt does: from daemon to daemon, with the source's own document.
    pub(crate) fn migrate(&self, domain: &str, target: &Self) -> Result<()> {
        let document = self.document(domain, "--migratable")?;
        let file = self.write(&document)?;
        let (daemon, memory) = (
            format!("qemu+unix:///session?socket={SHARED}/{}/libvirt-sock", target.pod),
            format!("unix://{SHARED}/{}/memory", target.pod),
        );
        self.virsh(&["migrate", "--live", "--p2p", "--persistent", "--xml", file, domain, &daemon, &memory]).map(drop)
    }

    /// Ends QEMU.
    pub(crate) fn destroy(&self, domain: &str) -> Result<()> {
        self.virsh(&["destroy", domain]).map(drop)
    }
}
