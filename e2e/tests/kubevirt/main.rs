//! The cluster's side, from the kubelet's call to frames between VMs: our programs as they are, with libvirt and QEMU as
//! they are. The kubelet, Multus and virt-launcher are played, by the wire contracts of the real ones.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "the played kubelet is shared with tests that panic")]

#[path = "../../../device-plugin/tests/support/mod.rs"]
mod kubelet;
mod launcher;
mod libvirt;
mod multus;
mod node;
mod pod;
#[path = "../../../binding-sidecar/tests/reparse/mod.rs"]
mod reparse;
mod vm;

use anyhow::{Result, ensure};
use e2e::machine;
use std::time::Instant;

use multus::MTU;
use node::Cluster;
use vm::Vm;

/// What the two guests are, and where the second one is after it has migrated.
const ADDRESSES: [&str; 2] = ["10.60.0.1", "10.60.0.2"];

#[test]
fn vms_get_ports_talk_migrate_and_leave_nothing() -> Result<()> {
    let _turn = machine::exclusive()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let mut cluster = Cluster::start().await?;
        let mut vms = Vec::new();
        let told = match story(&mut cluster, &mut vms).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        println!("{told:#}\n{}", cluster.diagnosis());
        vms.iter().for_each(|vm| println!("{}", vm.pod.diagnosis()));
        Err(told)
    })
}

async fn story(cluster: &mut Cluster, vms: &mut Vec<Vm>) -> Result<()> {
    for number in [1, 2] {
        let start = Instant::now();
        let mut vm = Vm::create(cluster, &format!("vm{number}"), number).await?;
        vm.start(cluster).await?;
        println!("{}: from its admission to QEMU connected in {:.1} s", vm.name, start.elapsed().as_secs_f64());
        vms.push(vm);
        cluster.restart_kubelet().await;
    }
    for (vm, address) in vms.iter_mut().zip(ADDRESSES) {
        vm.wait_booted()?;
        vm.run(&format!("ip link set eth0 up; ip addr add {address}/24 dev eth0"))?;
        let mtu = vm.run("cat /sys/class/net/eth0/mtu")?;
        ensure!(mtu.trim() == MTU.to_string(), "{} has an MTU of {mtu}", vm.name);
    }
    println!("both are up");
    talk(vms)?;
    migrate(cluster, vms).await?;
    talk(vms)?;
    leave(cluster, vms).await
}

/// Ping and TCP, both ways.
fn talk(vms: &mut [Vm]) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        vms[from].wait_reaches(ADDRESSES[to])?;
        let report = vms[from].run(&format!("ping -c 20 -i 0.05 -W 2 {}", ADDRESSES[to]))?;
        ensure!(report.contains(" 0% packet loss"), "{report}");
        vms[to]
            .run("killall -q iperf3; iperf3 -s -D -1 && while ! netstat -ltn | grep -q :5201; do usleep 20000; done")?;
        let report = vms[from].run(&format!("iperf3 -J -c {} -t 2", ADDRESSES[to]))?;
        let rate = e2e::lab::iperf_rate(&report)?;
        println!("TCP from {} to {}: {rate:.0} Mbit/s", vms[from].name, vms[to].name);
        ensure!(rate > 1.0, "TCP hardly moves: {rate} Mbit/s");
    }
    Ok(())
}

/// The second VM moves to another pod, with another device and so another folder, while it is pinged 100 times a second.
async fn migrate(cluster: &mut Cluster, vms: &mut [Vm]) -> Result<()> {
    let target = vms[1].create_target(cluster).await?;
    ensure!(target.device != vms[1].device, "the target has the source's device");
    let path = vms[1].socket_in_domain()?;
    vms[0].begin_pinging(ADDRESSES[1])?;
    let start = Instant::now();
    let source = vms[1].migrate_to(target)?;
    println!("migrated in {:.1} s", start.elapsed().as_secs_f64());
    ensure!(vms[1].socket_in_domain()? == path, "the path in the domain has changed");
    vms[1].wait_reaches(ADDRESSES[0])?;
    let pings = vms[0].end_pinging()?;
    println!("{pings:?}");
    ensure!(pings.sent > 100, "hardly any pings: {pings:?}");
    ensure!(pings.lost == 0, "pings were lost: {pings:?}");
    source.leave(cluster).await
}

/// Both VMs end; the second one's DEL gets lost, so that GC has something to do. Nothing is left.
async fn leave(cluster: &mut Cluster, vms: &mut Vec<Vm>) -> Result<()> {
    for vm in vms.drain(..) {
        vm.stop()?;
        if vm.name == "vm1" {
            vm.leave(cluster).await?;
        } else {
            vm.vanish(cluster).await?;
        }
    }
    let left = cluster.ports()?;
    ensure!(left.len() == 1, "GC has nothing to do: {left:?}");
    cluster.multus.gc(&[])?;
    cluster.check_empty().await
}
