//! The plugin's process with a kubelet: starts, restarts, reboots, and pods that come and go.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

#[path = "../support/mod.rs"]
mod support;

mod hostile;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use sluice_proto::kubelet::v1beta1::{HEALTHY, PreferredAllocationRequest, UNHEALTHY};
use support::{DATAPLANE, FakeKubelet, Node, SOCKETS, until};
use tonic::Code;

/// How soon capacity must be back after something has restarted.
const BACK: Duration = Duration::from_secs(2);

fn sockets_of(node: &Node) -> Vec<String> {
    let entries = fs::read_dir(node.path("kubelet/device-plugins")).unwrap().map(Result::unwrap);
    let names = entries.map(|entry| entry.file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("sluice-")).collect()
}

fn endpoints(kubelet: &FakeKubelet) -> BTreeSet<Option<String>> {
    [SOCKETS, DATAPLANE].map(|resource| kubelet.endpoint(resource)).into()
}

#[tokio::test]
async fn a_pod_gets_its_folder() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let _plugin = node.plugin(&["--sockets", "3"]).await;
    kubelet.wait_for_capacity(SOCKETS, 3).await;
    kubelet.wait_for_capacity(DATAPLANE, 1).await;
    let ids: Vec<_> = kubelet.devices(SOCKETS).into_iter().map(|device| device.id).collect();
    assert_eq!(ids, ["sock-0000", "sock-0001", "sock-0002"]);

    let switch = kubelet.admit("switch", DATAPLANE, 1).await.unwrap();
    let mount = &switch.answer.mounts[0];
    assert_eq!((&mount.host_path, mount.read_only), (&mount.container_path, false));
    assert_eq!(switch.answer.envs["SLUICE_SOCKET_ROOT"], node.root().to_str().unwrap());

    let pod = kubelet.admit("vm", SOCKETS, 2).await.unwrap();
    assert_eq!(pod.answer.mounts.len(), 2);
    for (id, mount) in pod.ids.iter().zip(&pod.answer.mounts) {
        assert_eq!(mount.container_path, format!("/var/run/vhostuser/{id}"));
        assert_eq!(mount.host_path, node.root().join(id).to_str().unwrap());
        let text = fs::read_to_string(node.device_info(id)).unwrap();
        let info: serde_json::Value = serde_json::from_str(&text).unwrap();
        let expected = serde_json::json!({
            "type": "vhost-user",
            "version": "1.1.0",
            "vhost-user": {"mode": "server", "path": format!("/var/run/vhostuser/{id}/vhost.sock")},
        });
        assert_eq!(info, expected);
    }
    // What the pod makes in its folder, the switch finds in its own.
    let sockets = node.run_vm(&pod);
    for (path, _) in &sockets {
        UnixStream::connect(path).unwrap();
    }
    let refused = kubelet.admit("vm-2", SOCKETS, 2).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn folders_exist_before_the_kubelet_hears_of_them() {
    let node = Node::new();
    let _plugin = node.plugin(&["--sockets", "12"]).await;
    assert_eq!(fs::read_dir(node.root()).unwrap().count(), 12);
    assert_eq!(node.root().metadata().unwrap().mode() & 0o7777, 0o711);
    assert_eq!(node.root().join("sock-0011").metadata().unwrap().mode() & 0o7777, 0o770);
    // It waits for a kubelet, however late.
    let kubelet = node.kubelet();
    kubelet.wait_for_capacity(SOCKETS, 12).await;
}

#[tokio::test]
async fn a_restarted_kubelet_gets_all_devices_back() {
    let node = Node::new();
    let mut kubelet = node.kubelet();
    let plugin = node.plugin(&["--sockets", "5"]).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    let pod = kubelet.admit("vm", SOCKETS, 1).await.unwrap();
    let sockets = node.run_vm(&pod);
    let mut endpoints = BTreeSet::from([kubelet.endpoint(SOCKETS).unwrap()]);
    for _ in 0..3 {
        kubelet.stop().await;
        kubelet.serve();
        let start = Instant::now();
        kubelet.wait_for_capacity(SOCKETS, 5).await;
        kubelet.wait_for_capacity(DATAPLANE, 1).await;
        assert!(start.elapsed() < BACK, "{:?}", start.elapsed());
        assert!(endpoints.insert(kubelet.endpoint(SOCKETS).unwrap()), "a socket's name was used again");
    }
    // Old sockets do not pile up.
    until("two sockets", async || (sockets_of(&node).len() == 2).then_some(())).await;
    assert!(sockets[0].0.exists(), "the VM must not notice");
    assert_eq!(plugin.page("/readyz").await.0, 200);
}

/// It may miss a socket that is made while it deletes them.
#[tokio::test]
async fn a_restarted_kubelet_is_noticed_by_its_own_socket() {
    let node = Node::new();
    let mut kubelet = node.kubelet();
    let _plugin = node.plugin(&["--sockets", "5"]).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    kubelet.wait_for_capacity(DATAPLANE, 1).await;
    kubelet.stop().await;
    kubelet.serve_beside();
    let start = Instant::now();
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    kubelet.wait_for_capacity(DATAPLANE, 1).await;
    assert!(start.elapsed() < BACK, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_kubelet_that_stays_away_is_waited_for() {
    let node = Node::new();
    let mut kubelet = node.kubelet();
    let plugin = node.plugin(&["--sockets", "5"]).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    kubelet.stop().await;
    until("not ready", async || (plugin.page("/readyz").await.0 == 503).then_some(())).await;
    assert_eq!(plugin.page("/healthz").await.0, 200);
    // Its socket may go long before it comes back, and ours with it.
    fs::remove_file(node.path("kubelet/device-plugins/kubelet.sock")).unwrap();
    for name in sockets_of(&node) {
        // The plugin may be faster.
        let _ = fs::remove_file(node.path("kubelet/device-plugins").join(name));
    }
    until("it waits", async || sockets_of(&node).is_empty().then_some(())).await;
    assert_eq!(plugin.page("/readyz").await.0, 503);
    kubelet.serve();
    let start = Instant::now();
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    assert!(start.elapsed() < BACK, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_deleted_socket_is_made_anew() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let _plugin = node.plugin(&["--sockets", "5"]).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    let old = kubelet.endpoint(SOCKETS).unwrap();
    fs::remove_file(node.path("kubelet/device-plugins").join(&old)).unwrap();
    let renewed = async || (kubelet.endpoint(SOCKETS)? != old).then_some(());
    until("another socket", renewed).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
}

#[tokio::test]
async fn a_kubelet_that_stops_watching_is_told_again() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let plugin = node.plugin(&["--sockets", "5"]).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    kubelet.wait_for_capacity(DATAPLANE, 1).await;
    kubelet.drop_streams();
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    kubelet.wait_for_capacity(DATAPLANE, 1).await;
    assert_eq!(kubelet.registrations().len(), 4);
    until("ready", async || (plugin.page("/readyz").await.0 == 200).then_some(())).await;
}

/// As while a DaemonSet is updated without care.
#[tokio::test]
async fn two_instances_do_not_fight() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let old = node.plugin(&["--sockets", "5"]).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    kubelet.wait_for_capacity(DATAPLANE, 1).await;
    let _new = node.plugin(&["--sockets", "5"]).await;
    until("both", async || (kubelet.registrations().len() == 4).then_some(())).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    assert_eq!(sockets_of(&node).len(), 4, "the new one must leave the old one's sockets alone");
    old.terminate().await;
    assert_eq!(sockets_of(&node).len(), 2);
    assert_eq!(kubelet.capacity(SOCKETS), 5);
    kubelet.admit("vm", SOCKETS, 5).await.unwrap();
    assert_eq!(kubelet.registrations().len(), 4);
}

#[tokio::test]
async fn a_restarted_plugin_leaves_vms_alone() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let plugin = node.plugin(&["--sockets", "5"]).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    let pod = kubelet.admit("vm", SOCKETS, 2).await.unwrap();
    let sockets = node.run_vm(&pod);
    let inode = |id: &String| node.root().join(id).metadata().unwrap().ino();
    let inodes: Vec<_> = pod.ids.iter().map(inode).collect();
    kubelet.wait_for_capacity(DATAPLANE, 1).await;
    plugin.terminate().await;
    assert_eq!(sockets_of(&node), Vec::<String>::new(), "its own sockets go");
    kubelet.wait_for_capacity(SOCKETS, 0).await;

    let plugin = node.plugin(&["--sockets", "5"]).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    kubelet.wait_for_capacity(DATAPLANE, 1).await;
    let killed = endpoints(&kubelet);
    plugin.kill().await;
    assert_eq!(sockets_of(&node).len(), 2);
    let _plugin = node.plugin(&["--sockets", "5"]).await;
    // A debug build may be slow to start.
    let start = Instant::now();
    // Until then, the killed one's devices may still be there.
    until("both again", async || endpoints(&kubelet).is_disjoint(&killed).then_some(())).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    assert!(start.elapsed() < BACK, "{:?}", start.elapsed());
    assert_eq!(sockets_of(&node).len(), 2, "those of the killed one go");

    for (path, _) in &sockets {
        UnixStream::connect(path).unwrap();
    }
    assert_eq!(pod.ids.iter().map(inode).collect::<Vec<_>>(), inodes, "a pod has these folders mounted");
    assert!(pod.ids.iter().all(|id| node.device_info(id).exists()));
}

#[tokio::test]
async fn after_a_reboot_pods_find_their_folders() {
    let node = Node::new();
    let mut kubelet = node.kubelet();
    let plugin = node.plugin(&["--sockets", "5"]).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    let pod = kubelet.admit("vm", SOCKETS, 2).await.unwrap();
    drop(node.run_vm(&pod));
    plugin.kill().await;
    kubelet.stop().await;
    node.reboot();

    kubelet.serve();
    let _plugin = node.plugin(&["--sockets", "5", "--reconcile", "0.2"]).await;
    // What the kubelet kept is used as it is: no allocation.
    assert!(pod.answer.mounts.iter().all(|mount| fs::metadata(&mount.host_path).unwrap().is_dir()));
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    let all_there = async || pod.ids.iter().all(|id| node.device_info(id).exists()).then_some(());
    until("device-info files for Multus", all_there).await;
    kubelet.start_container(&pod).await.unwrap();
    node.run_vm(&pod);
}

#[tokio::test]
async fn a_lost_root_is_made_again() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let _plugin = node.plugin(&["--sockets", "5"]).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
    let pod = kubelet.admit("vm", SOCKETS, 1).await.unwrap();
    node.reboot();
    kubelet.start_container(&pod).await.unwrap();
    node.run_vm(&pod);
    until("all folders", async || (fs::read_dir(node.root()).ok()?.count() == 5).then_some(())).await;
    kubelet.wait_for_capacity(SOCKETS, 5).await;
}

#[tokio::test]
async fn a_reissued_id_never_has_an_old_socket() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let plugin = node.plugin(&["--sockets", "1"]).await;
    kubelet.wait_for_capacity(SOCKETS, 1).await;
    let mut inode = None;
    for turn in 0..5 {
        // Nobody says that the last pod has gone, and its CNI DEL is still to come.
        let pod = kubelet.admit_with(&format!("vm-{turn}"), SOCKETS, vec!["sock-0000".into()]).await.unwrap();
        let folder = node.root().join("sock-0000");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        let now = folder.metadata().unwrap().ino();
        assert_eq!(*inode.get_or_insert(now), now, "the folder was replaced");
        drop(node.run_vm(&pod));
        assert!(folder.join("pod0123456789a").symlink_metadata().unwrap().file_type().is_socket());
    }
    plugin.wait_for_metric("sluice_device_plugin_purged_files_total 4").await;
    plugin
        .wait_for_metric(r#"sluice_device_plugin_allocations_total{resource="sluice.io/sockets",result="ok"} 5"#)
        .await;
}

#[tokio::test]
async fn a_restarted_container_begins_with_an_empty_folder() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let _plugin = node.plugin(&["--sockets", "2"]).await;
    kubelet.wait_for_capacity(SOCKETS, 2).await;
    let pod = kubelet.admit("vm", SOCKETS, 2).await.unwrap();
    for _ in 0..3 {
        drop(node.run_vm(&pod));
        kubelet.start_container(&pod).await.unwrap();
    }
    node.run_vm(&pod);
}

#[tokio::test]
async fn the_switch_never_loses_what_vms_have() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let _plugin = node.plugin(&["--sockets", "2"]).await;
    kubelet.wait_for_capacity(SOCKETS, 2).await;
    let vm = kubelet.admit("vm", SOCKETS, 1).await.unwrap();
    let sockets = node.run_vm(&vm);
    for turn in 0..2 {
        let switch = kubelet.admit(&format!("switch-{turn}"), DATAPLANE, 1).await.unwrap();
        kubelet.start_container(&switch).await.unwrap();
        kubelet.remove(&switch.name);
    }
    UnixStream::connect(&sockets[0].0).unwrap();
}

#[tokio::test]
async fn five_hundred_devices_are_churned() {
    const DEVICES: usize = 500;
    let node = Node::new();
    let mut kubelet = node.kubelet();
    let arguments = ["--sockets", "500", "--reconcile", "0.2", "--grace", "0.1"];
    let mut plugin = node.plugin(&arguments).await;
    kubelet.wait_for_capacity(SOCKETS, DEVICES).await;
    for turn in 0..3 {
        let mut pods = Vec::new();
        for vm in 0..DEVICES / 4 {
            let pod = kubelet.admit(&format!("vm-{turn}-{vm}"), SOCKETS, 4).await.unwrap();
            // Fails if an older VM's socket is there.
            drop(node.run_vm(&pod));
            pods.push(pod);
        }
        let endpoint = kubelet.endpoint(SOCKETS);
        let mut start = Instant::now();
        match turn {
            0 => {
                kubelet.stop().await;
                kubelet.serve();
            }
            1 => {
                plugin.kill().await;
                plugin = node.plugin(&arguments).await;
                // A debug build may be slow to start.
                start = Instant::now();
                // Until then, the old one's devices may still be there.
                let renewed = async || (kubelet.endpoint(SOCKETS) != endpoint).then_some(());
                until("another registration", renewed).await;
            }
            _ => {}
        }
        kubelet.wait_for_capacity(SOCKETS, DEVICES).await;
        assert!(start.elapsed() < BACK, "turn {turn}: {:?}", start.elapsed());
        pods.iter().for_each(|pod| kubelet.remove(&pod.name));
    }
    // In the end, nothing is left.
    let empty = async || {
        let mut folders = fs::read_dir(node.root()).unwrap().map(|folder| folder.unwrap().path());
        // One that is being exchanged may go meanwhile.
        folders.all(|folder| fs::read_dir(folder).is_ok_and(|mut inside| inside.next().is_none())).then_some(())
    };
    until("all folders are empty", empty).await;
    let no_info = async || fs::read_dir(node.path("run/devinfo/dp")).unwrap().next().is_none().then_some(());
    until("all device-info files have gone", no_info).await;
}

#[tokio::test]
async fn leftovers_are_reclaimed_but_never_a_pods() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let plugin = node.plugin(&["--sockets", "3", "--reconcile", "0.1", "--grace", "0.3"]).await;
    kubelet.wait_for_capacity(SOCKETS, 3).await;
    let (gone, kept) = (kubelet.admit("a", SOCKETS, 1).await.unwrap(), kubelet.admit("b", SOCKETS, 1).await.unwrap());
    let (gone_sockets, kept_sockets) = (node.run_vm(&gone), node.run_vm(&kept));
    // While lists fail, nobody knows.
    kubelet.fail_lists(Some(Code::ResourceExhausted));
    kubelet.remove("a");
    let lists = kubelet.lists();
    until("lists fail", async || (kubelet.lists() > lists + 5).then_some(())).await;
    assert!(gone_sockets[0].0.exists());
    kubelet.fail_lists(None);
    until("the leftover goes", async || (!gone_sockets[0].0.exists()).then_some(())).await;
    plugin.wait_for_metric("sluice_device_plugin_reclaimed_total 1").await;
    assert!(gone.ids.iter().all(|id| !node.device_info(id).exists()));
    UnixStream::connect(&kept_sockets[0].0).unwrap();
    assert!(kept.ids.iter().all(|id| node.device_info(id).exists()));
}

/// A kubelet that restarts without the API server knows static pods only.
#[tokio::test]
async fn a_list_without_ourselves_says_nothing() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let own = ["--pod-namespace", "vms", "--pod-name", "plugin"];
    let _plugin = node.plugin(&[&["--sockets", "2", "--reconcile", "0.1", "--grace", "8"], &own[..]].concat()).await;
    kubelet.wait_for_capacity(SOCKETS, 2).await;
    kubelet.wait_for_capacity(DATAPLANE, 1).await;
    kubelet.admit("plugin", DATAPLANE, 1).await.unwrap();
    let vm = kubelet.admit("vm", SOCKETS, 1).await.unwrap();
    let sockets = node.run_vm(&vm);
    let some_lists = async |more| {
        let lists = kubelet.lists();
        until("lists", async || (kubelet.lists() > lists + more).then_some(())).await;
    };
    kubelet.hide("vm", true);
    some_lists(2).await;
    kubelet.hide("plugin", true);
    tokio::time::sleep(Duration::from_secs(9)).await;
    assert!(sockets[0].0.exists(), "an incomplete list was believed");
    // Nor does the time count that has passed before and meanwhile.
    kubelet.hide("plugin", false);
    some_lists(2).await;
    assert!(sockets[0].0.exists(), "the waiting time did not begin anew");
    until("the leftover goes", async || (!sockets[0].0.exists()).then_some(())).await;
}

#[tokio::test]
async fn a_vm_stays_on_one_numa_node() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let _plugin = node.plugin(&["--sockets", "8", "--numa", "0,1"]).await;
    kubelet.wait_for_capacity(SOCKETS, 8).await;
    let numa = |id: &String| {
        let devices = kubelet.devices(SOCKETS);
        devices.iter().find(|device| device.id == *id).unwrap().topology.clone().unwrap().nodes[0].id
    };
    for (pod, count) in [("a", 3), ("b", 3)] {
        let pod = kubelet.admit(pod, SOCKETS, count).await.unwrap();
        assert_eq!(pod.ids.iter().map(numa).collect::<BTreeSet<_>>().len(), 1, "{pod:?}");
    }
    assert!(kubelet.devices(DATAPLANE)[0].topology.is_none());
    // More requests than one in a call are answered in order, should that ever come.
    let empty = PreferredAllocationRequest { container_requests: Vec::new() };
    let answer = kubelet.client(SOCKETS).get_preferred_allocation(empty).await.unwrap().into_inner();
    assert!(answer.container_responses.is_empty());
}

/// Whoever is given it has the sockets of all VMs.
#[tokio::test]
async fn the_folder_of_all_folders_need_not_be_offered() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let plugin = node.plugin(&["--sockets", "2", "--dataplane", "off"]).await;
    kubelet.wait_for_capacity(SOCKETS, 2).await;
    until("the plugin to be ready", async || (plugin.page("/readyz").await.0 == 200).then_some(())).await;
    assert_eq!((kubelet.endpoint(DATAPLANE), sockets_of(&node).len()), (None, 1));
    assert!(kubelet.admit("curious", DATAPLANE, 1).await.is_err());
    kubelet.admit("vm", SOCKETS, 1).await.unwrap();
}

#[tokio::test]
async fn health_follows_the_file_system() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let plugin = node.plugin(&["--sockets", "2"]).await;
    kubelet.wait_for_capacity(SOCKETS, 2).await;
    // Something is in the way that no repair may remove.
    fs::remove_dir_all(node.path("run/sluice")).unwrap();
    fs::write(node.path("run/sluice"), "").unwrap();
    kubelet.wait_for_capacity(SOCKETS, 0).await;
    kubelet.wait_for_capacity(DATAPLANE, 0).await;
    let devices = kubelet.devices(SOCKETS);
    // They stay listed: the kubelet would not restart containers whose device is unknown.
    assert!(devices.len() == 2 && devices.iter().all(|device| device.health == UNHEALTHY));
    let line = r#"sluice_device_plugin_devices{resource="sluice.io/sockets",health="unhealthy"} 2"#;
    plugin.wait_for_metric(line).await;
    fs::remove_file(node.path("run/sluice")).unwrap();
    kubelet.wait_for_capacity(SOCKETS, 2).await;
    kubelet.wait_for_capacity(DATAPLANE, 1).await;
    assert!(kubelet.devices(SOCKETS).iter().all(|device| device.health == HEALTHY));
}

#[tokio::test]
async fn with_cdi_devices_are_named_and_described() {
    let node = Node::new();
    let kubelet = node.kubelet();
    let cdi = node.path("run/cdi");
    let _plugin = node.plugin(&["--sockets", "2", "--cdi-dir", cdi.to_str().unwrap()]).await;
    kubelet.wait_for_capacity(SOCKETS, 2).await;
    let pod = kubelet.admit("vm", SOCKETS, 1).await.unwrap();
    assert!(pod.answer.mounts.is_empty());
    let id = pod.ids.first().unwrap();
    assert_eq!(pod.answer.cdi_devices[0].name, format!("sluice.io/sockets={id}"));
    for (file, count) in [("sluice.io-sockets.json", 2), ("sluice.io-dataplane.json", 1)] {
        let text = fs::read_to_string(cdi.join(file)).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["devices"].as_array().unwrap().len(), count);
    }
}

/// What a runtime would still mount for whoever names it is not left behind.
#[tokio::test]
async fn a_resource_that_is_off_leaves_no_cdi_file() {
    let node = Node::new();
    let cdi = node.path("run/cdi");
    let arguments = ["--sockets", "2", "--cdi-dir", cdi.to_str().unwrap()];
    let files = || ["sluice.io-sockets.json", "sluice.io-dataplane.json"].map(|file| cdi.join(file).exists());
    node.plugin(&arguments).await.kill().await;
    assert_eq!(files(), [true, true]);
    let off = [&arguments[..], &["--dataplane", "off"]].concat();
    // The second time there is nothing to remove.
    for _ in 0..2 {
        let plugin = node.plugin(&off).await;
        assert_eq!(files(), [true, false]);
        plugin.kill().await;
    }
}

#[tokio::test]
async fn privileges_are_given_up() {
    let node = Node::new();
    let plugin = node.plugin(&["--sockets", "2"]).await;
    let pid = plugin.pid().as_raw_nonzero();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
    };
    // CHOWN 0, DAC_OVERRIDE 1, FOWNER 3.
    for set in ["CapPrm", "CapEff"] {
        assert_eq!(field(set) & !0b1011, 0, "{set}");
    }
    assert_eq!(field("CapInh"), 0);
    assert_eq!(field("NoNewPrivs"), 1);
    if rustix::process::geteuid().is_root() {
        assert_eq!(field("CapBnd"), 0);
    }
}

#[tokio::test]
async fn what_cannot_work_is_told_in_a_line() {
    for (arguments, complaint) in [
        (["--sockets", "0"], "sluice-device-plugin: --sockets must be 1 to 1000: a switch has 1024 ports"),
        (["--owner", "root"], "write it like 107:107"),
        (["--kubelet-dir", "relative"], "--kubelet-dir must be an absolute path without '..': relative"),
    ] {
        let binary = env!("CARGO_BIN_EXE_sluice-device-plugin");
        let output = tokio::process::Command::new(binary).args(arguments).output().await.unwrap();
        assert!(!output.status.success());
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(complaint), "{error}");
    }
}
