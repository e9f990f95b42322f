//! What pods may do to their folders. The tests need root, as the plugin does: else owners stay as they are.

use std::ffi::CString;
use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, FileType, makedev, mknodat};
use tempfile::TempDir;

use super::*;

const ID: &str = "sock-0007";

/// A root, and next to it a file and a folder that nothing may touch.
struct Place {
    dir: TempDir,
    root: Root,
}

impl Place {
    fn new() -> Self {
        Self::with_label(None)
    }

    fn with_label(label: Option<String>) -> Self {
        // On a tmpfs, as /var/run is, where there is one.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/precious"), "precious").unwrap();
        let (user, group) = if is_root() {
            (107, 108)
        } else {
            let data = dir.path().metadata().unwrap();
            (data.uid(), data.gid())
        };
        let root = Root::new(dir.path().join("run/sockets"), Owner { user, group }, label);
        root.ensure().unwrap();
        root.ensure_folder(ID).unwrap();
        Self { dir, root }
    }

    fn folder(&self) -> PathBuf {
        self.root.path().join(ID)
    }

    fn outside(&self) -> PathBuf {
        self.dir.path().join("outside")
    }

    /// Purges, and checks that the folder is as it should be and all else as it was.
    fn purge(&self) -> u64 {
        let inode = self.folder().metadata().unwrap().ino();
        let removed = self.root.purge(ID).unwrap();
        assert_eq!(fs::read_dir(self.folder()).unwrap().count(), 0);
        assert_eq!(self.folder().metadata().unwrap().ino(), inode, "the folder was replaced");
        self.assert_well();
        removed
    }

    fn assert_well(&self) {
        let data = self.folder().symlink_metadata().unwrap();
        assert!(data.is_dir());
        assert_eq!(data.mode() & 0o7777, 0o770);
        assert_eq!((data.uid(), data.gid()), (self.root.owner.user, self.root.owner.group));
        assert_eq!(fs::read_to_string(self.outside().join("precious")).unwrap(), "precious");
        assert_eq!(fs::read_dir(self.outside()).unwrap().count(), 1);
        assert_eq!(fs::read_dir(self.root.path()).unwrap().count(), 1);
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn folders_are_made_with_owner_and_mode() {
    let place = Place::new();
    assert_eq!(place.root.path().metadata().unwrap().mode() & 0o7777, 0o711);
    place.assert_well();
    assert_eq!(place.purge(), 0);
}

#[test]
fn what_is_there_stays_when_folders_are_made_again() {
    let place = Place::new();
    let _listener = UnixListener::bind(place.folder().join("pod0123456789a")).unwrap();
    place.root.ensure().unwrap();
    place.root.ensure_folder(ID).unwrap();
    assert!(place.folder().join("pod0123456789a").symlink_metadata().unwrap().file_type().is_socket());
}

#[test]
fn a_stale_socket_goes() {
    let place = Place::new();
    drop(UnixListener::bind(place.folder().join("pod0123456789a")).unwrap());
    assert_eq!(place.purge(), 1);
}

#[test]
fn links_go_and_what_they_lead_to_stays() {
    let place = Place::new();
    symlink(place.outside().join("precious"), place.folder().join("file")).unwrap();
    symlink(place.outside(), place.folder().join("folder")).unwrap();
    symlink("/nowhere", place.folder().join("dangling")).unwrap();
    symlink("self", place.folder().join("self")).unwrap();
    symlink("../..", place.folder().join("up")).unwrap();
    fs::hard_link(place.outside().join("precious"), place.folder().join("hard")).unwrap();
    assert_eq!(place.purge(), 6);
}

#[test]
fn a_link_deep_inside_goes_too() {
    let place = Place::new();
    fs::create_dir_all(place.folder().join("a/b")).unwrap();
    symlink(place.outside(), place.folder().join("a/b/folder")).unwrap();
    symlink(place.outside(), place.folder().join("a/folder")).unwrap();
    place.purge();
}

#[test]
fn a_fifo_is_not_waited_for() {
    let place = Place::new();
    mknodat(CWD, place.folder().join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    assert_eq!(place.purge(), 1);
}

#[test]
fn a_device_node_is_not_opened() {
    assert!(is_root(), "this test runs as root, to make device nodes");
    let place = Place::new();
    let (disk, mode) = (makedev(7, 250), Mode::from_raw_mode(0o666));
    mknodat(CWD, place.folder().join("disk"), FileType::BlockDevice, mode, disk).unwrap();
    mknodat(CWD, place.folder().join("watchdog"), FileType::CharacterDevice, mode, makedev(10, 130)).unwrap();
    assert_eq!(place.purge(), 2);
}

#[test]
fn ten_thousand_files_go() {
    let place = Place::new();
    for i in 0..10_000 {
        fs::write(place.folder().join(format!("file-{i}")), "").unwrap();
    }
    assert_eq!(place.purge(), 10_000);
}

#[test]
fn too_many_files_go_in_several_steps() {
    let mut place = Place::new();
    place.root.purge_limit = 100;
    let some = place.folder().join("nested");
    fs::create_dir(&some).unwrap();
    for i in 0..190 {
        let parent = if i % 2 == 0 { &some } else { &place.folder() };
        rustix::fs::mknodat(CWD, parent.join(i.to_string()), FileType::RegularFile, Mode::empty(), 0).unwrap();
    }
    assert!(matches!(place.root.purge(ID), Err(FolderError::Overfull { .. })));
    assert!(place.purge() <= 100);
}

#[test]
fn a_path_deeper_than_any_path_can_be_goes() {
    const DEPTH: usize = 5_000;
    let place = Place::new();
    let (mut here, _) = place.root.folder(ID).unwrap();
    for level in 0..DEPTH {
        mknodat(&here, "file", FileType::RegularFile, Mode::empty(), 0).unwrap();
        // Names that get in the way of those we give.
        let name = CString::new(format!("{LIFTED}{}", level % 7 + 1)).unwrap();
        rustix::fs::mkdirat(&here, &name, Mode::from_raw_mode(0o700)).unwrap();
        here = open_folder(&here, &name).unwrap();
    }
    drop(here);
    // Each level is a file, a folder that is brought up, and the same folder when its turn comes.
    assert!(place.purge() >= 2 * DEPTH as u64);
}

#[test]
fn unreadable_folders_go() {
    assert!(is_root(), "this test runs as root, as the plugin does");
    let place = Place::new();
    fs::create_dir_all(place.folder().join("a/b/c")).unwrap();
    for path in ["a/b/c", "a/b", "a", ""] {
        fs::set_permissions(place.folder().join(path), Permissions::from_mode(0o0)).unwrap();
    }
    place.purge();
}

#[test]
fn odd_names_go() {
    let place = Place::new();
    for name in [b"\xff\xfe".as_slice(), b"...", b"-rf", b"new\nline", b" ", &[b'x'; 255]] {
        let name = CString::new(name).unwrap();
        mknodat(place.root.folder(ID).unwrap().0, &name, FileType::RegularFile, Mode::empty(), 0).unwrap();
    }
    assert_eq!(place.purge(), 6);
}

#[test]
fn modes_and_access_lists_of_the_pod_go() {
    let place = Place::new();
    // user::rwx, user:4242:rwx, group::rwx, mask::rwx, other::rwx
    let entries: [(u16, u16, u32); 5] = [(1, 7, !0), (2, 7, 4242), (4, 7, !0), (0x10, 7, !0), (0x20, 7, !0)];
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    let folder = open_folder(&place.root.open().unwrap(), ID).unwrap();
    for name in ACCESS_LISTS {
        match rustix::fs::fsetxattr(&folder, name, &list, XattrFlags::empty()) {
            Err(Errno::OPNOTSUPP) => {}
            result => result.unwrap(),
        }
    }
    fs::set_permissions(place.folder(), Permissions::from_mode(0o7777)).unwrap();
    place.purge();
    for name in ACCESS_LISTS {
        assert!(rustix::fs::fgetxattr(&folder, name, &mut [0u8; 128]).is_err(), "{name:?}");
    }
}

/// A pod has given its folder away, and what it has made in it, before it ended.
#[test]
fn who_has_a_replaced_folder_open_has_nothing() {
    let place = Place::new();
    let ino = |folder: &OwnedFd| rustix::fs::fstat(folder).unwrap().st_ino;
    let (kept, made) = place.root.folder(ID).unwrap();
    assert!(!made);
    rustix::fs::mkdirat(&kept, "nested", Mode::from_raw_mode(0o700)).unwrap();
    let nested = open_folder(&kept, "nested").unwrap();
    let _listener = UnixListener::bind(place.folder().join("pod0123456789a")).unwrap();
    assert_eq!(place.root.replace(ID).unwrap(), 2);
    place.assert_well();
    let (new, made) = place.root.folder(ID).unwrap();
    assert!(!made && ino(&new) != ino(&kept));
    mknodat(&new, "socket", FileType::Socket, Mode::from_raw_mode(0o700), 0).unwrap();
    for folder in [&kept, &nested] {
        let file = mknodat(folder, "file", FileType::RegularFile, Mode::empty(), 0);
        assert_eq!((file, open_folder(folder, ".").err()), (Err(Errno::NOENT), None));
        assert_eq!(rustix::fs::statat(folder, "socket", AtFlags::empty()).err(), Some(Errno::NOENT));
        assert!(open_folder(folder, "..").is_err());
    }
}

/// Somebody who fills the old folder does not harm the new one, and a run that was cut off is made up for.
#[test]
fn a_folder_that_could_not_be_removed_is_next_time() {
    let place = Place::new();
    let spare = place.root.path().join(format!("{SPARE}{ID}"));
    fs::create_dir(&spare).unwrap();
    fs::write(spare.join("file"), "").unwrap();
    assert_eq!(place.root.replace(ID).unwrap(), 1);
    place.assert_well();
    fs::remove_dir(place.folder()).unwrap();
    assert!(place.root.ensure_folder(ID).unwrap());
    assert_eq!(place.root.replace(ID).unwrap(), 0);
    place.assert_well();
}

#[test]
fn a_link_in_place_of_the_folder_is_replaced() {
    let place = Place::new();
    fs::remove_dir(place.folder()).unwrap();
    symlink(place.outside(), place.folder()).unwrap();
    place.root.ensure_folder(ID).unwrap();
    place.assert_well();
    // A file as well.
    fs::remove_dir(place.folder()).unwrap();
    fs::write(place.folder(), "").unwrap();
    place.purge_new();
}

impl Place {
    fn purge_new(&self) {
        self.root.purge(ID).unwrap();
        self.assert_well();
    }
}

#[test]
fn a_link_in_place_of_the_root_is_refused() {
    let place = Place::new();
    fs::remove_dir(place.folder()).unwrap();
    fs::remove_dir(place.root.path()).unwrap();
    symlink(place.outside(), place.root.path()).unwrap();
    assert!(place.root.ensure().is_err());
    assert!(place.root.ensure_folder(ID).is_err());
    assert!(place.root.purge(ID).is_err());
    assert_eq!(fs::read_dir(place.outside()).unwrap().count(), 1);
}

/// A pod that still runs exchanges folders for links all the time.
#[test]
fn a_race_is_not_lost() {
    let place = Place::new();
    fs::create_dir(place.outside().join("in")).unwrap();
    fs::write(place.outside().join("in/precious"), "precious").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (victim, spare) = (place.folder().join("in"), place.folder().join("link"));
            while !stop.load(Ordering::Relaxed) {
                let _ = fs::create_dir(&victim);
                let _ = fs::create_dir(victim.join("in"));
                let _ = symlink(place.outside(), &spare);
                let _ = rustix::fs::renameat_with(CWD, &victim, CWD, &spare, RenameFlags::EXCHANGE);
            }
        });
        for _ in 0..300 {
            // Whether one call gets everything is luck; that it gets nothing else is not.
            let _ = place.root.purge(ID);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(fs::read_to_string(place.outside().join("in/precious")).unwrap(), "precious");
    fs::remove_dir_all(place.outside().join("in")).unwrap();
    place.purge();
}

#[test]
fn the_label_is_set() {
    assert!(is_root(), "this test runs as root, to set labels");
    let label = "system_u:object_r:container_file_t:s0";
    let place = Place::with_label(Some(label.into()));
    for path in [place.root.path(), &place.folder()] {
        let mut value = [0; 128];
        let length = rustix::fs::getxattr(path, LABEL, &mut value).unwrap();
        assert_eq!(&value[..length], format!("{label}\0").as_bytes());
    }
}
