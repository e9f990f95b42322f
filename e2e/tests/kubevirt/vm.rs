//! A VM in its pod, from Allocate to the end.

use anyhow::{Context, Result, ensure};
use e2e::agent::Agent;
use e2e::ping::{self, Pings};
use e2e::qemu::BOOT_LIMIT;
use e2e::{machine, wait};
use serde_json::Value;
use std::time::{Duration, Instant};

use crate::kubelet::SOCKETS;
use crate::launcher::Hooks;
use crate::libvirt::Libvirt;
use crate::multus::{INTERFACE, NETWORK, Sandbox};
use crate::node::Cluster;
use crate::pod::{BOOT, PRIVATE, Pod, SIDECAR};
use crate::reparse::go_reparse;

const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// What the issue allows the sidecar, in KiB.
const SIDECAR_LIMIT: u64 = 20 * 1024;
/// How late the annotation comes.
const ANNOTATION_DELAY: Duration = Duration::from_millis(400);

/// See the module.
pub(crate) struct Vm {
    pub(crate) name: String,
    pub(crate) device: String,
    pub(crate) pod: Pod,
    number: u32,
    sandbox: Sandbox,
    /// What the pod is to be annotated with.
    network_info: Value,
    hooks: Hooks,
    libvirt: Libvirt,
    agent: Option<Agent>,
}

impl Vm {
    /// All up to the sidecar being there: the kubelet admits the pod, Multus makes its network, its containers start.
    pub(crate) async fn create(cluster: &Cluster, name: &str, number: u32) -> Result<Self> {
        Self::create_pod(cluster, name, &format!("virt-launcher-{name}-aaaaa"), number, number).await
    }

    /// The pod that the VM is to migrate to. There, the sidecar is asked once, and what it answers is thrown away.
    pub(crate) async fn create_target(&self, cluster: &Cluster) -> Result<Self> {
        let pod = format!("virt-launcher-{}-bbbbb", self.name);
        let target = Self::create_pod(cluster, &self.name, &pod, self.number, self.number + 16).await?;
        target.pod.annotate(&target.network_info)?;
        target.hooks.define(&target.domain()?, &target.vmi()).await?;
        target.check_link()?;
        Ok(target)
    }

    async fn create_pod(cluster: &Cluster, name: &str, pod_name: &str, number: u32, pod_number: u32) -> Result<Self> {
        let admitted = cluster.kubelet.admit(pod_name, SOCKETS, 1).await?;
        let device = admitted.ids.first().context("no device")?.clone();
        let sandbox = Sandbox {
            pod: pod_name.into(),
            uid: format!("0a5e7c1d-6f43-4c43-9d2f-{pod_number:012x}"),
            container_id: format!("{pod_number:064x}"),
            device: device.clone(),
        };
        let network_info = cluster.multus.add(&sandbox, &mac(number))?;
        let mounts: Vec<_> =
            admitted.answer.mounts.iter().map(|m| (m.host_path.clone(), m.container_path.clone())).collect();
        let pod = Pod::start(pod_name, pod_number, &mounts, cluster.shared.path())?;
        let hooks = Hooks::collect(&pod).await?;
        let libvirt = Libvirt::of(&pod, cluster.shared.path());
        Ok(Self { name: name.into(), device, pod, number, sandbox, network_info, hooks, libvirt, agent: None })
    }

    /// virt-launcher's start: it asks three times, each time with what it understood of the answer before, and of what
    /// libvirt made of that. When it asks first, the pod is not annotated yet.
    pub(crate) async fn start(&mut self, cluster: &Cluster) -> Result<()> {
        let (domain, vmi, start) = (self.domain()?, self.vmi(), Instant::now());
        let annotate = async {
            tokio::time::sleep(ANNOTATION_DELAY).await;
            self.pod.annotate(&self.network_info)
        };
        let (first, annotated) = tokio::join!(self.hooks.define(&domain, &vmi), annotate);
        let (first, ()) = (first?, annotated?);
        ensure!(start.elapsed() >= ANNOTATION_DELAY, "the sidecar did not wait");
        self.check_link()?;
        self.libvirt.define(&first)?;
        let reserved = go_reparse(&self.libvirt.document(&self.domain_name(), "--inactive")?);
        ensure!(!reserved.contains("rx_queue_size"), "nothing was lost on the way: {reserved}");
        let second = self.hooks.define(&reserved, &vmi).await?;
        let third = self.hooks.define(&go_reparse(&second), &vmi).await?;
        ensure!(third.contains(&self.socket_path()), "{third}");
        self.libvirt.define(&third)?;
        let start = Instant::now();
        self.libvirt.start(&self.domain_name())?;
        let port = cluster.switch.port(&self.port())?;
        ensure!(port.state() != "connecting", "QEMU runs without the switch: {}", port.0);
        println!("{}: QEMU started and connected in {:.2} s", self.name, start.elapsed().as_secs_f64());
        let resident = self.pod.sidecar_resident()?;
        println!("{}: the sidecar took {resident} KiB at most", self.name);
        ensure!(resident < SIDECAR_LIMIT, "the sidecar takes {resident} KiB");
        Ok(())
    }

    /// Waits until the guest's agent answers.
    pub(crate) fn wait_booted(&mut self) -> Result<()> {
        let socket = self.pod.private("agent.sock");
        let agent = &mut self.agent;
        wait::until_true(&format!("{} to boot", self.name), BOOT_LIMIT, || match agent {
            Some(agent) => agent.poll_hello(),
            None => {
                *agent = Agent::connect(&socket).ok();
                Ok(false)
            }
        })
    }

    /// Runs a shell command in the guest and gives what it printed.
    pub(crate) fn run(&mut self, command: &str) -> Result<String> {
        let agent = self.agent.as_mut().context("the guest is not up")?;
        let (code, output) = agent.run(command, COMMAND_LIMIT)?;
        ensure!(code == 0, "in {}: `{command}` ended with {code}: {output}", self.name);
        Ok(output)
    }

    /// Waits until the guest reaches an address.
    pub(crate) fn wait_reaches(&mut self, address: &str) -> Result<()> {
        let what = format!("{} to reach {address}", self.name);
        wait::until_true(&what, COMMAND_LIMIT, || Ok(self.run(&format!("ping -c 1 -W 1 {address}")).is_ok()))
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        self.agent.as_mut().context("the guest is not up")?.call(request, COMMAND_LIMIT)
    }

    /// A hundred pings a second from now on.
    pub(crate) fn begin_pinging(&mut self, address: &str) -> Result<()> {
        self.ask(&ping::begin_request(address)).map(drop)
    }

    /// Ends that; none may have been answered twice.
    pub(crate) fn end_pinging(&mut self) -> Result<Pings> {
        ping::read(&self.ask(&ping::end_request())?)
    }

    /// Migrates to another pod, which becomes this VM's; gives what is left at the source.
    pub(crate) fn migrate_to(&mut self, target: Self) -> Result<Self> {
        self.libvirt.migrate(&self.domain_name(), &target.libvirt)?;
        let source = std::mem::replace(self, target);
        ensure!(source.libvirt.state(&source.domain_name())? == "shut off", "the VM is still at the source");
        ensure!(self.libvirt.state(&self.domain_name())? == "running", "the VM is not at the target");
        self.agent = Some(Agent::connect(&self.pod.private("agent.sock"))?);
        Ok(source)
    }

    /// The path of the socket in the running domain.
    pub(crate) fn socket_in_domain(&self) -> Result<String> {
        let document = self.libvirt.document(&self.domain_name(), "--migratable")?;
        let path = self.socket_path();
        ensure!(document.contains(&format!("path='{path}'")), "another path than {path} in {document}");
        Ok(path)
    }

    /// Ends QEMU.
    pub(crate) fn stop(&self) -> Result<()> {
        self.libvirt.destroy(&self.domain_name())
    }

    /// The pod ends as it should.
    pub(crate) async fn leave(mut self, cluster: &Cluster) -> Result<()> {
        self.end_sidecar().await?;
        cluster.multus.del(&self.sandbox)?;
        let port = self.port();
        let left = cluster.ports()?;
        ensure!(left.iter().all(|other| other["name"] != port.as_str()), "port {port} is left");
        self.remove(cluster)
    }

    /// The pod ends, and nobody calls DEL.
    pub(crate) async fn vanish(mut self, cluster: &Cluster) -> Result<()> {
        self.end_sidecar().await?;
        cluster.multus.forget(&self.sandbox);
        self.remove(cluster)
    }

    /// virt-launcher tells the sidecar when QEMU has ended, at the source of a migration too.
    async fn end_sidecar(&mut self) -> Result<()> {
        self.hooks.shutdown().await?;
        self.pod.wait_sidecar_ended()
    }

    fn remove(self, cluster: &Cluster) -> Result<()> {
        let Self { device, pod, .. } = self;
        cluster.kubelet.remove(&pod.name);
        drop(pod);
        cluster.wait_reclaimed(&device)
    }

    /// The link leads to the folder of this very pod.
    fn check_link(&self) -> Result<()> {
        let (link, folder) = (self.pod.link(NETWORK)?, format!("/var/run/vhostuser/{}", self.device));
        ensure!(link.to_str() == Some(&folder), "the link leads to {}, not {folder}", link.display());
        Ok(())
    }

    fn socket_path(&self) -> String {
        format!("/var/run/kubevirt-hooks/{SIDECAR}/userdata/{NETWORK}/{INTERFACE}")
    }

    fn port(&self) -> String {
        format!("{}.{INTERFACE}", self.device)
    }

    fn domain_name(&self) -> String {
        format!("default_{}", self.name)
    }

    /// What virt-handler sends along, as far as it matters to sidecars.
    fn vmi(&self) -> String {
        include_str!("vmi.json").replace("NAME", &self.name).replace("MAC", &mac(self.number))
    }

    /// The domain as virt-launcher makes it, without the interface.
    fn domain(&self) -> Result<String> {
        let cpu = machine::cpus()?.load.last().copied().unwrap_or(0);
        let text = include_str!("domain.xml").replace("NAME", &self.domain_name());
        let text = text.replace("NUMBER", &format!("{:012x}", self.number)).replace("CPU", &cpu.to_string());
        Ok(text.replace("BOOT", BOOT).replace("PRIVATE", PRIVATE))
    }
}

/// The Nth guest's MAC address, as the sample VMs have it.
fn mac(number: u32) -> String {
    format!("02:5c:1e:00:00:{number:02x}")
}
