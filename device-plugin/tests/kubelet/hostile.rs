//! Pods that plant things in their folders. Whatever it is, the next VM finds an empty folder, and nothing outside has
//! been touched.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mkdirat, mknodat, openat};

use super::support::{Node, SOCKETS};

/// How long admission of a pod may take, since the kubelet waits for it. Many times what it takes.
const BRIEF: Duration = Duration::from_secs(5);

/// Lets a pod plant something in its folder, then gives the same device to another one, again and again.
async fn next_vm_is_well(plant: impl Fn(&Path, &Path)) {
    let node = Node::new();
    let outside = node.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("precious"), "precious").unwrap();
    fs::set_permissions(outside.join("precious"), Permissions::from_mode(0o640)).unwrap();
    let kubelet = node.kubelet();
    let _plugin = node.plugin(&["--sockets", "2"]).await;
    kubelet.wait_for_capacity(SOCKETS, 2).await;
    let other = kubelet.admit_with("other", SOCKETS, vec!["sock-0001".into()]).await.unwrap();
    let other = node.run_vm(&other);
    for turn in 0..2 {
        let start = Instant::now();
        let pod = kubelet.admit_with(&format!("vm-{turn}"), SOCKETS, vec!["sock-0000".into()]).await.unwrap();
        assert!(start.elapsed() < BRIEF, "{:?}", start.elapsed());
        let folder = Path::new(&pod.answer.mounts[0].host_path);
        assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
        let sockets = node.run_vm(&pod);
        std::os::unix::net::UnixStream::connect(&sockets[0].0).unwrap();
        plant(folder, &outside);
    }
    let last = kubelet.admit_with("last", SOCKETS, vec!["sock-0000".into()]).await.unwrap();
    node.run_vm(&last);
    // Nothing else was touched.
    let precious = outside.join("precious");
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    assert_eq!(precious.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    std::os::unix::net::UnixStream::connect(&other[0].0).unwrap();
    kubelet.wait_for_capacity(SOCKETS, 2).await;
}

#[tokio::test]
async fn links() {
    next_vm_is_well(|folder, outside| {
        // Under the very name that the switch will connect to, too.
        fs::remove_file(folder.join("pod0123456789a")).unwrap();
        symlink(outside.join("precious"), folder.join("pod0123456789a")).unwrap();
        symlink(outside, folder.join("folder")).unwrap();
        symlink("../sock-0001", folder.join("neighbour")).unwrap();
        fs::create_dir(folder.join("nested")).unwrap();
        symlink(outside, folder.join("nested/folder")).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_fifo() {
    next_vm_is_well(|folder, _| {
        mknodat(CWD, folder.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_device_node() {
    assert!(rustix::process::geteuid().is_root(), "this test runs as root, to make device nodes");
    next_vm_is_well(|folder, _| {
        // Opening the watchdog would reboot the node.
        let mode = Mode::from_raw_mode(0o666);
        mknodat(CWD, folder.join("watchdog"), FileType::CharacterDevice, mode, makedev(10, 130)).unwrap();
        mknodat(CWD, folder.join("disk"), FileType::BlockDevice, mode, makedev(7, 250)).unwrap();
    })
    .await;
}

#[tokio::test]
async fn ten_thousand_files() {
    next_vm_is_well(|folder, _| {
        for i in 0..10_000 {
            mknodat(CWD, folder.join(format!("file-{i}")), FileType::RegularFile, Mode::empty(), 0).unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_deep_path() {
    next_vm_is_well(|folder, outside| {
        let open = |parent: &_, name: &str| openat(parent, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
        let mut here = openat(CWD, folder, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        // Deeper than any path can be long, and than there are descriptors.
        for _ in 0..3_000 {
            mkdirat(&here, "down", Mode::from_raw_mode(0o700)).unwrap();
            here = open(&here, "down").unwrap();
        }
        rustix::fs::symlinkat(outside, &here, "out").unwrap();
    })
    .await;
}

#[tokio::test]
async fn more_than_can_be_removed_at_once() {
    // The device is unhealthy until its folder has been emptied in steps, and other VMs are not held up.
    let node = Node::new();
    let kubelet = node.kubelet();
    let plugin = node.plugin(&["--sockets", "2"]).await;
    kubelet.wait_for_capacity(SOCKETS, 2).await;
    let folder = node.root().join("sock-0000");
    for i in 0..50_500 {
        mknodat(CWD, folder.join(i.to_string()), FileType::RegularFile, Mode::empty(), 0).unwrap();
    }
    let refused = kubelet.admit_with("vm", SOCKETS, vec!["sock-0000".into()]).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable);
    assert!(refused.message().contains("sock-0000 holds more than 50000 files and is being emptied"), "{refused}");
    kubelet.admit_with("other", SOCKETS, vec!["sock-0001".into()]).await.unwrap();
    kubelet.wait_for_capacity(SOCKETS, 2).await;
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    kubelet.admit_with("vm", SOCKETS, vec!["sock-0000".into()]).await.unwrap();
    plugin
        .wait_for_metric(r#"sluice_device_plugin_allocations_total{resource="sluice.io/sockets",result="error"} 1"#)
        .await;
}
