use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use clap::Parser;
use tempfile::TempDir;

use super::*;

struct Place {
    dir: TempDir,
    sockets: Sockets,
}

fn place(arguments: &[&str]) -> Place {
    let dir = tempfile::tempdir().unwrap();
    Place { sockets: sockets(dir.path(), arguments), dir }
}

/// As when the plugin starts.
fn sockets(dir: &Path, arguments: &[&str]) -> Sockets {
    let at = |path: &str| dir.join(path).display().to_string();
    let owner = format!("{}:{}", rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let (root, info) = (at("root"), at("info"));
    let fixed = ["x", "--root", &root, "--device-info-dir", &info, "--owner", &owner, "--sockets", "4"];
    let config = Config::try_parse_from([&fixed, arguments].concat()).unwrap();
    let root = Arc::new(Root::new(config.root.clone(), config.owner, None));
    let sockets = Sockets::new(&config, root, Arc::default());
    sockets.check();
    sockets
}

impl Place {
    fn folder(&self, id: &str) -> PathBuf {
        self.dir.path().join("root").join(id)
    }

    fn leave_socket(&self, id: &str) -> PathBuf {
        let path = self.folder(id).join("pod0123456789a");
        drop(UnixListener::bind(&path).unwrap());
        path
    }

    fn has_info(&self, id: &str) -> bool {
        self.dir.path().join(format!("info/sluice.io-sockets-{id}-device.json")).exists()
    }

    fn health(&self) -> Vec<bool> {
        self.sockets.devices().borrow().iter().map(|device| device.health == proto::HEALTHY).collect()
    }
}

fn ids(of: &[&str]) -> Vec<String> {
    of.iter().map(|id| (*id).to_owned()).collect()
}

fn used(of: &[&str]) -> BTreeSet<String> {
    ids(of).into_iter().collect()
}

#[test]
fn an_allocation_answers_in_order_of_ids() {
    let place = place(&[]);
    let answer = place.sockets.allocate(ids(&["sock-0003", "sock-0001"])).unwrap();
    let mounts: Vec<_> = answer.mounts.iter().map(|mount| (&*mount.container_path, &*mount.host_path)).collect();
    let (first, second) = (place.folder("sock-0001"), place.folder("sock-0003"));
    let expected = [
        ("/var/run/vhostuser/sock-0001", first.to_str().unwrap()),
        ("/var/run/vhostuser/sock-0003", second.to_str().unwrap()),
    ];
    assert_eq!(mounts, expected);
    assert!(answer.mounts.iter().all(|mount| !mount.read_only));
    assert_eq!(answer.envs[IDS_VARIABLE], "sock-0001,sock-0003");
    assert_eq!(answer.envs[FOLDERS_VARIABLE], "/var/run/vhostuser/sock-0001,/var/run/vhostuser/sock-0003");
    assert!(answer.cdi_devices.is_empty());
    assert!(place.has_info("sock-0001") && place.has_info("sock-0003"));
}

#[test]
fn with_cdi_there_are_no_mounts() {
    let place = place(&["--cdi-dir", "/var/run/cdi"]);
    let answer = place.sockets.allocate(ids(&["sock-0001"])).unwrap();
    assert!(answer.mounts.is_empty());
    assert_eq!(answer.cdi_devices[0].name, "sluice.io/sockets=sock-0001");
    let mounts = place.sockets.ids();
    let mounts = place.sockets.cdi_mounts(&mounts);
    assert_eq!((mounts.len(), mounts[3].container_path.to_str()), (4, Some("/var/run/vhostuser/sock-0003")));
}

#[test]
fn a_fixed_path_is_for_one() {
    let place = place(&["--layout", "fixed", "--container-root", "/vhost"]);
    let answer = place.sockets.allocate(ids(&["sock-0002"])).unwrap();
    assert_eq!(answer.mounts[0].container_path, "/vhost");
    let info = place.dir.path().join("info/sluice.io-sockets-sock-0002-device.json");
    assert!(fs::read_to_string(info).unwrap().contains(r#""path":"/vhost/vhost.sock""#));
    let refused = place.sockets.allocate(ids(&["sock-0001", "sock-0003"])).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(!place.has_info("sock-0001"));
}

#[test]
fn an_unknown_id_is_refused_before_anything_is_touched() {
    let place = place(&[]);
    let socket = place.leave_socket("sock-0001");
    for id in ["sock-0004", "../x", "", "sock-1"] {
        let refused = place.sockets.allocate(ids(&["sock-0001", id])).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::NotFound);
    }
    assert!(socket.exists());
}

#[test]
fn allocations_and_starts_begin_with_an_empty_folder() {
    let place = place(&[]);
    for round in 0..3 {
        let socket = place.leave_socket("sock-0001");
        match round {
            0 => drop(place.sockets.allocate(ids(&["sock-0001"])).unwrap()),
            // The same id again, before anybody said it was given back.
            1 => drop(place.sockets.allocate(ids(&["sock-0001"])).unwrap()),
            _ => place.sockets.pre_start(&ids(&["sock-0001"])).unwrap(),
        }
        assert!(!socket.exists(), "round {round}");
    }
}

#[test]
fn a_start_brings_back_a_lost_folder() {
    let place = place(&[]);
    place.sockets.allocate(ids(&["sock-0001"])).unwrap();
    fs::remove_dir_all(place.dir.path().join("root")).unwrap();
    fs::remove_dir_all(place.dir.path().join("info")).unwrap();
    place.sockets.check();
    place.sockets.pre_start(&ids(&["sock-0001"])).unwrap();
    assert!(place.folder("sock-0001").is_dir() && place.has_info("sock-0001"));
    assert_eq!(place.health(), [true; 4]);
}

#[test]
fn leftovers_go_after_two_lists_and_the_grace_period() {
    let place = place(&["--grace", "60"]);
    place.sockets.allocate(ids(&["sock-0001", "sock-0002"])).unwrap();
    let (gone, kept) = (place.leave_socket("sock-0001"), place.leave_socket("sock-0002"));
    let start = Instant::now();
    let list = |of: &[&str], after| place.sockets.reconcile(&used(of), start + Duration::from_secs(after));
    list(&["sock-0002"], 100);
    assert!(gone.exists(), "one list is not enough, however late");
    list(&["sock-0002"], 159);
    assert!(gone.exists() && place.has_info("sock-0001"), "two lists within the grace period are not enough");
    list(&["sock-0002"], 160);
    assert!(!gone.exists() && !place.has_info("sock-0001"));
    assert!(kept.exists() && place.has_info("sock-0002"));
}

#[test]
fn lists_that_disagree_begin_again() {
    let place = place(&["--grace", "60"]);
    place.sockets.allocate(ids(&["sock-0001"])).unwrap();
    let socket = place.leave_socket("sock-0001");
    let start = Instant::now();
    let list = |of: &[&str], after| place.sockets.reconcile(&used(of), start + Duration::from_secs(after));
    list(&[], 100);
    list(&["sock-0001"], 200);
    list(&[], 300);
    assert!(socket.exists());
    // A restarted kubelet may not know all pods.
    place.sockets.forget_lists();
    list(&[], 400);
    list(&[], 459);
    assert!(socket.exists());
    list(&[], 460);
    assert!(!socket.exists());
}

#[test]
fn a_reissued_id_is_safe_from_old_lists() {
    let place = place(&["--grace", "60"]);
    let start = Instant::now();
    let list = |after| place.sockets.reconcile(&used(&[]), start + Duration::from_secs(after));
    list(0);
    list(30);
    place.sockets.allocate(ids(&["sock-0001"])).unwrap();
    let socket = place.leave_socket("sock-0001");
    list(59);
    list(60);
    assert!(socket.exists(), "lists from before the allocation must not count");
    assert!(place.has_info("sock-0001"));
}

#[test]
fn pods_get_back_lost_device_info() {
    let place = place(&[]);
    place.sockets.reconcile(&used(&["sock-0003", "sock-9999"]), Instant::now());
    assert!(place.has_info("sock-0003"));
    assert!(!place.has_info("sock-9999") && !place.has_info("sock-0001"));
}

#[test]
fn health_is_what_the_file_system_says() {
    let place = place(&[]);
    assert_eq!(place.health(), [true; 4]);
    let root = place.dir.path().join("root");
    fs::remove_dir_all(&root).unwrap();
    fs::write(&root, "no folder").unwrap();
    place.sockets.check();
    assert_eq!(place.health(), [false; 4]);
    assert_eq!(place.sockets.allocate(ids(&["sock-0001"])).unwrap_err().code(), tonic::Code::Unavailable);
    fs::remove_file(&root).unwrap();
    place.sockets.check();
    assert_eq!(place.health(), [true; 4]);
    place.sockets.allocate(ids(&["sock-0001"])).unwrap();
}

#[test]
fn devices_are_spread_over_nodes() {
    let place = place(&["--numa", "0,2"]);
    let list = place.sockets.devices().borrow().clone();
    let node = |device: &proto::Device| device.topology.as_ref().map(|topology| topology.nodes[0].id);
    assert_eq!(list.iter().map(node).collect::<Vec<_>>(), [Some(0), Some(2), Some(0), Some(2)]);
    let request = proto::ContainerPreferredAllocationRequest {
        available_device_i_ds: ids(&["sock-0000", "sock-0001", "sock-0003", "unknown"]),
        must_include_device_i_ds: Vec::new(),
        allocation_size: 2,
    };
    assert_eq!(place.sockets.prefer(&request), ["sock-0001", "sock-0003"]);
}

#[test]
fn ids_used_longest_ago_are_preferred() {
    let place = place(&[]);
    place.sockets.allocate(ids(&["sock-0001"])).unwrap();
    place.sockets.allocate(ids(&["sock-0000"])).unwrap();
    let request = proto::ContainerPreferredAllocationRequest {
        available_device_i_ds: place.sockets.ids(),
        must_include_device_i_ds: Vec::new(),
        allocation_size: 3,
    };
    assert_eq!(place.sockets.prefer(&request), ["sock-0002", "sock-0003", "sock-0001"]);
}

#[test]
fn a_folder_stays_over_allocations_and_goes_with_the_pod() {
    let place = place(&["--grace", "60"]);
    let inode = || fs::metadata(place.folder("sock-0001")).unwrap().ino();
    let first = inode();
    place.sockets.allocate(ids(&["sock-0001"])).unwrap();
    place.sockets.pre_start(&ids(&["sock-0001"])).unwrap();
    place.sockets.allocate(ids(&["sock-0001"])).unwrap();
    assert_eq!(inode(), first, "a pod may have it mounted");
    let kept = fs::File::open(place.folder("sock-0001")).unwrap();
    let start = Instant::now();
    let list = |of: &[&str], after| place.sockets.reconcile(&used(of), start + Duration::from_secs(after));
    list(&["sock-0001"], 0);
    list(&[], 100);
    list(&["sock-0001"], 200);
    assert_eq!(inode(), first);
    list(&[], 300);
    list(&[], 360);
    place.sockets.check();
    let second = inode();
    assert_ne!(second, first);
    // Whoever has the old one open makes nothing in it.
    let path = format!("/proc/self/fd/{}/socket", kept.as_raw_fd());
    assert!(UnixListener::bind(path).is_err());
    // Nor is it made anew all the time.
    list(&[], 500);
    assert_eq!(inode(), second);
}

#[test]
fn devices_whose_folder_somebody_may_have_open_come_last() {
    let place = place(&["--grace", "60"]);
    let prefer = |sockets: &Sockets, size| {
        sockets.prefer(&proto::ContainerPreferredAllocationRequest {
            available_device_i_ds: sockets.ids(),
            must_include_device_i_ds: Vec::new(),
            allocation_size: size,
        })
    };
    place.sockets.allocate(ids(&["sock-0001"])).unwrap();
    place.sockets.allocate(ids(&["sock-0000"])).unwrap();
    assert_eq!(prefer(&place.sockets, 4), ["sock-0002", "sock-0003", "sock-0001", "sock-0000"]);
    // The pod of one has ended, and that was noticed.
    let start = Instant::now();
    for after in [0, 60] {
        place.sockets.reconcile(&used(&["sock-0001", "sock-0003"]), start + Duration::from_secs(after));
    }
    assert_eq!(prefer(&place.sockets, 4), ["sock-0002", "sock-0000", "sock-0003", "sock-0001"]);
    // After a restart nobody knows who has had which.
    fs::remove_dir(place.folder("sock-0003")).unwrap();
    let sockets = sockets(place.dir.path(), &[]);
    assert_eq!(prefer(&sockets, 2), ["sock-0003", "sock-0000"]);
}
