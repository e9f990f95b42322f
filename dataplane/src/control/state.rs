//! What a switch remembers over a restart: its ports and what is pinned to workers, in a directory of its own.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{Pin, PortConfig};

const LOCK: &str = "lock";
const TABLE: &str = "ports.json";
const PINS: &str = "pins.json";
const RINGS: &str = "rings";
const VERSION: u32 = 1;

/// Why the state directory cannot be used, in one line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another switch uses it.
    #[error("state directory {dir} is in use by pid {pid}; stop that, or choose another with --state")]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// Whose it is.
        pid: String,
    },
    /// It cannot be made or opened.
    #[error("cannot use state directory {dir}: {source}; correct that, or choose another with --state")]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A later version has written a file of it. Without its ports all guests would be cut off, and nobody told.
    #[error(
        "{path} was written by a newer Sluice (version {version}, and this one knows {VERSION}); \
         go back to that, or move the file away"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Of its layout.
        version: u64,
    },
    /// The table cannot be written.
    #[error("cannot write {path}: {source}; nothing was changed")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What all files have in common, whatever has written them.
#[derive(Deserialize)]
struct Stamp {
    version: u64,
}

/// The table as it is on disk. Ports are written as SPEC, which people can read and which is checked like any other.
#[derive(Serialize, Deserialize)]
struct Table {
    version: u32,
    ports: Vec<String>,
    /// What another build has added.
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// Pins as they are on disk, written as they can be typed.
#[derive(Serialize, Deserialize)]
struct PinTable {
    version: u32,
    pins: Vec<String>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// The entries of a file, and what else is in it.
type Contents = (Vec<String>, Map<String, Value>);

/// What a file holds: what this build understands, and what it does not, as another one has written it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entries<T> {
    known: Vec<T>,
    unknown: Vec<String>,
    more: Map<String, Value>,
}

impl<T: FromStr<Err: fmt::Display> + ToString> Entries<T> {
    /// An entry that is not understood is no reason to lose it, or the others.
    fn parse((texts, more): Contents) -> Self {
        let mut entries = Self { known: Vec::new(), unknown: Vec::new(), more };
        for text in texts {
            match text.parse() {
                Ok(entry) => entries.known.push(entry),
                Err(error) => {
                    tracing::warn!("'{text}' of the last run is not restored, but kept for another version: {error}");
                    entries.unknown.push(text);
                }
            }
        }
        entries
    }

    /// With other entries.
    fn with(&self, known: Vec<T>, unknown: Vec<String>) -> Self {
        Self { known, unknown, more: self.more.clone() }
    }

    fn texts(&self) -> Vec<String> {
        self.known.iter().map(ToString::to_string).chain(self.unknown.iter().cloned()).collect()
    }
}

/// The name of a port that is not understood.
fn name_of(spec: &str) -> &str {
    spec.split('=').next().unwrap_or(spec)
}

/// Its owner, if it has one.
fn owner_of(spec: &str) -> Option<&str> {
    spec.split(',').skip(1).find_map(|option| option.strip_prefix("owner="))
}

/// The ports that were written down before a change.
pub(super) struct Before(Entries<PortConfig>);

/// The state directory, ours alone as long as this lives.
#[derive(Debug)]
pub struct StateStore {
    dir: PathBuf,
    ports: Entries<PortConfig>,
    pins: Entries<Pin>,
    /// Goes when the process does, however that ends, unless another process was given it.
    lock: File,
}

impl StateStore {
    /// Makes the directory if it is missing, locks it, and reads the ports of the last run. A file that is no table is put
    /// aside with a warning, so that it does not keep the switch from starting; one of a later version does.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let unusable = |source| StateError::Unusable { dir: dir.into(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(unusable)?;
        Self::read(dir, lock(dir)?, put_aside)
    }

    /// As [`StateStore::open`], with the lock that another process hands over, which writes no more. Until it is gone its files
    /// are left as they are, so that one that is no table is an error.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn adopt(dir: &Path, lock: OwnedFd) -> Result<Self, StateError> {
        let refuse = |path: &Path, problem: &str| Err(io::Error::other(format!("{} {problem}", path.display())));
        Self::read(dir, lock.into(), refuse)
    }

    fn read(dir: &Path, lock: File, no_table: impl Fn(&Path, &str) -> io::Result<()>) -> Result<Self, StateError> {
        let read = |name: &str, parse| read(dir, name, parse, &no_table);
        let ports = Entries::parse(read(TABLE, parse_ports)?);
        let pins = Entries::parse(read(PINS, parse_pins)?);
        Ok(Self { dir: dir.into(), ports, pins, lock })
    }

    /// The directory, and the lock that makes it ours.
    pub fn place(&self) -> (&Path, &File) {
        (&self.dir, &self.lock)
    }

    /// The file in which the positions of rings outlive a crash.
    pub fn rings(&self) -> PathBuf {
        self.dir.join(RINGS)
    }

    /// Leaves our pid in the lock, once it was handed over for good.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn sign(&mut self) -> io::Result<()> {
        sign(&mut self.lock)
    }

    /// The pins written down.
    pub fn pins(&self) -> &[Pin] {
        &self.pins.known
    }

    /// Writes down other pins, in the same way as ports.
    ///
    /// # Errors
    /// [`StateError::Write`]; the old ones stay then.
    pub fn replace_pins(&mut self, pins: Vec<Pin>) -> Result<(), StateError> {
        let pins = self.pins.with(pins, self.pins.unknown.clone());
        if pins != self.pins {
            self.write(PINS, &PinTable { version: VERSION, pins: pins.texts(), more: pins.more.clone() })?;
            self.pins = pins;
        }
        Ok(())
    }

    /// The ports written down, but for those that are not understood.
    pub fn ports(&self) -> &[PortConfig] {
        &self.ports.known
    }

    /// The names of all ports written down.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.ports.known.iter().map(|port| &*port.name).chain(self.ports.unknown.iter().map(|spec| name_of(spec)))
    }

    /// The ports written down, less one.
    pub fn without(&self, name: &str) -> Vec<PortConfig> {
        self.ports().iter().filter(|port| port.name != name).cloned().collect()
    }

    /// Writes down other ports. Those that are not understood stay, but for such of the same names. After a crash at any moment
    /// the file has either the old or the new table; the new one once this has returned, unless the machine itself goes down
    /// within seconds.
    ///
    /// # Errors
    /// [`StateError::Write`]; the old ports stay then.
    pub fn replace(&mut self, ports: Vec<PortConfig>) -> Result<(), StateError> {
        let is_left = |spec: &&String| ports.iter().all(|port| port.name != name_of(spec));
        let unknown = self.ports.unknown.iter().filter(is_left).cloned().collect();
        self.write_ports(self.ports.with(ports, unknown))
    }

    /// Removes a port from what is written down, be it understood or not; one that is not only if it is that of `owner`, where
    /// one is given. Returns whether there was one.
    ///
    /// # Errors
    /// [`StateError::Write`]; nothing is removed then.
    pub fn remove(&mut self, name: &str, owner: Option<&str>) -> Result<bool, StateError> {
        let is_left =
            |spec: &&String| name_of(spec) != name || owner.is_some_and(|owner| owner_of(spec) != Some(owner));
        let unknown = self.ports.unknown.iter().filter(is_left).cloned().collect();
        let left = self.ports.with(self.without(name), unknown);
        let found = left != self.ports;
        self.write_ports(left).map(|()| found)
    }

    /// Removes the ports whose owners begin with this, be they understood or not.
    ///
    /// # Errors
    /// [`StateError::Write`]; nothing is removed then.
    pub(super) fn remove_owned(&mut self, prefix: &str) -> Result<Before, StateError> {
        let before = self.ports.clone();
        let is_left = |owner: Option<&str>| !owner.is_some_and(|owner| owner.starts_with(prefix));
        let mut left = before.clone();
        left.known.retain(|port| is_left(port.owner.as_deref()));
        left.unknown.retain(|spec| is_left(owner_of(spec)));
        self.write_ports(left).map(|()| Before(before))
    }

    /// What is written down now, for a change that may have to be taken back.
    pub(super) fn before(&self) -> Before {
        Before(self.ports.clone())
    }

    /// Takes a change back.
    ///
    /// # Errors
    /// [`StateError::Write`].
    pub(super) fn put_back(&mut self, before: Before) -> Result<(), StateError> {
        self.write_ports(before.0)
    }

    fn write_ports(&mut self, ports: Entries<PortConfig>) -> Result<(), StateError> {
        // A full disk is no trouble to whoever changes nothing.
        if ports != self.ports {
            self.write(TABLE, &Table { version: VERSION, ports: ports.texts(), more: ports.more.clone() })?;
            self.ports = ports;
        }
        Ok(())
    }

    fn write(&self, name: &str, table: &impl Serialize) -> Result<(), StateError> {
        self.try_write(name, table).map_err(|source| StateError::Write { path: self.dir.join(name), source })
    }

    fn try_write(&self, name: &str, table: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(table)?;
        text.push(b'\n');
        let temporary = self.dir.join(format!("{name}.new"));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&text)?;
        // Before the new name, or a machine that loses its power could be left with an empty file. The name itself may take
        // the kernel its few seconds: whoever waits for a port must not wait for the disk twice.
        file.sync_data()?;
        fs::rename(&temporary, self.dir.join(name))
    }
}

/// Takes the directory's lock and leaves our pid in it.
fn lock(dir: &Path) -> Result<File, StateError> {
    lock_with(dir, sign)
}

fn lock_with(dir: &Path, sign: impl FnOnce(&mut File) -> io::Result<()>) -> Result<File, StateError> {
    let unusable = |source| StateError::Unusable { dir: dir.into(), source };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(dir.join(LOCK)).map_err(unusable)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            return Err(StateError::InUse { dir: dir.into(), pid: pid.trim().into() });
        }
        Err(TryLockError::Error(source)) => return Err(unusable(source)),
    }
    // For others to read; what keeps them out is the lock.
    if let Err(error) = sign(&mut file) {
        tracing::warn!("cannot write the pid to {}: {error}", dir.join(LOCK).display());
    }
    Ok(file)
}

fn sign(lock: &mut File) -> io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "{}", std::process::id())
}

/// What a file of the directory holds; nothing if it is not there. `no_table` says what becomes of one that is no table of ours.
fn read(
    dir: &Path,
    name: &str,
    parse: fn(&str) -> Result<Contents, String>,
    no_table: impl Fn(&Path, &str) -> io::Result<()>,
) -> Result<Contents, StateError> {
    let (path, unusable) = (dir.join(name), |source| StateError::Unusable { dir: dir.into(), source });
    let problem = match fs::read_to_string(&path) {
        Ok(text) => match (serde_json::from_str(&text), parse(&text)) {
            (Ok(Stamp { version }), _) if version > VERSION.into() => return Err(StateError::Newer { path, version }),
            (_, Ok(contents)) => return Ok(contents),
            (_, Err(problem)) => problem,
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Contents::default()),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => "it is not text".into(),
        Err(error) => return Err(unusable(error)),
    };
    no_table(&path, &format!("cannot be used, since {problem}")).map_err(unusable)?;
    Ok(Contents::default())
}

fn check_version(version: u32) -> Result<(), String> {
    let problem = || format!("it is of version {version}, and this switch knows version {VERSION}");
    (version == VERSION).then_some(()).ok_or_else(problem)
}

fn parse_pins(text: &str) -> Result<Contents, String> {
    let table: PinTable = serde_json::from_str(text).map_err(|error| error.to_string())?;
    check_version(table.version).map(|()| (table.pins, table.more))
}

fn parse_ports(text: &str) -> Result<Contents, String> {
    let table: Table = serde_json::from_str(text).map_err(|error| error.to_string())?;
    check_version(table.version).map(|()| (table.ports, table.more))
}

/// Renames a file that is no table of ours, to start with an empty one.
fn put_aside(path: &Path, problem: &str) -> io::Result<()> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("{name}.corrupt-{seconds}"));
    fs::rename(path, &aside)?;
    tracing::warn!("{} {problem}; it is now {}, and nothing of it is restored", path.display(), aside.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn port(name: &str) -> PortConfig {
        format!("{name}=vhost-user:/run/{name}.sock,trunk=1,3-5,vlan=9").parse().unwrap()
    }

    #[test]
    fn remembers() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("deep/state");
        let mut store = StateStore::open(&dir).unwrap();
        assert!(store.ports().is_empty());
        store.replace(vec![port("a"), port("b")]).unwrap();
        drop(store);
        let store = StateStore::open(&dir).unwrap();
        assert_eq!(store.ports(), [port("a"), port("b")]);
        assert_eq!(store.without("a"), [port("b")]);
        let mode = |path: PathBuf| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(dir.join(TABLE)), 0o600);
        assert_eq!(mode(dir.clone()), 0o700);
        assert!(!dir.join("ports.json.new").exists());
    }

    #[test]
    fn remembers_pins_apart_from_ports() {
        let dir = tempfile::tempdir().unwrap();
        let pins: Vec<Pin> = ["vm1=1", "vm1:3=0"].iter().map(|pin| pin.parse().unwrap()).collect();
        let mut store = StateStore::open(dir.path()).unwrap();
        store.replace_pins(Vec::new()).unwrap();
        assert!(!dir.path().join(PINS).exists());
        store.replace_pins(pins.clone()).unwrap();
        drop(store);
        let store = StateStore::open(dir.path()).unwrap();
        assert_eq!((store.pins(), store.ports()), (&pins[..], &[][..]));
        drop(store);
        fs::write(dir.path().join(PINS), r#"{"version":1,"pins":["vm1=first","vm2=1"]}"#).unwrap();
        let mut store = StateStore::open(dir.path()).unwrap();
        assert_eq!(store.pins(), ["vm2=1".parse().unwrap()]);
        store.replace_pins(pins).unwrap();
        let text = fs::read_to_string(dir.path().join(PINS)).unwrap();
        assert!(text.contains("vm1:3=0") && text.contains("vm1=first"), "{text}");
        drop(store);
        fs::write(dir.path().join(PINS), r#"{"version":1,"pins":"vm1"}"#).unwrap();
        assert!(StateStore::open(dir.path()).unwrap().pins().is_empty());
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(names.iter().any(|name| name.to_string_lossy().starts_with("pins.json.corrupt-")), "{names:?}");
    }

    /// A restarted switch serves its guests, whatever becomes of its pid.
    #[test]
    fn needs_no_room_for_the_pid() {
        let dir = tempfile::tempdir().unwrap();
        let full = |_: &mut File| Err(io::ErrorKind::StorageFull.into());
        let lock = lock_with(dir.path(), full).unwrap();
        assert!(matches!(StateStore::open(dir.path()), Err(StateError::InUse { .. })));
        drop(lock);
    }

    #[test]
    fn is_ours_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = StateStore::open(dir.path()).unwrap();
        let error = StateStore::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("in use by pid {}", std::process::id())), "{error}");
        drop(store);
        StateStore::open(dir.path()).unwrap();
    }

    #[test]
    fn a_corrupt_table_is_put_aside() {
        for text in [&b"{"[..], b"", b"\xff\xfe", br#"{"version":0,"ports":[]}"#, br#"{"version":1,"ports":1}"#] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(TABLE), text).unwrap();
            assert!(StateStore::open(dir.path()).unwrap().ports().is_empty());
            let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            let aside = names.iter().find(|name| name.to_string_lossy().starts_with("ports.json.corrupt-")).unwrap();
            assert_eq!(fs::read(dir.path().join(aside)).unwrap(), text);
            assert!(!dir.path().join(TABLE).exists());
        }
    }

    /// As after a rollback. Its ports are for the one that knows them.
    #[test]
    fn a_table_of_a_later_version_is_left_where_it_is() {
        for (name, text) in
            [(TABLE, r#"{"version":2,"ports":{"a":{}}}"#), (PINS, r#"{"pins":[],"version":99999999999}"#)]
        {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            let lock = OwnedFd::from(File::open(dir.path()).unwrap());
            for result in [StateStore::open(dir.path()), StateStore::adopt(dir.path(), lock)] {
                let error = result.unwrap_err().to_string();
                assert!(error.contains(&format!("{} was written by a newer Sluice", path.display())), "{error}");
                assert!(!error.contains('\n') && error.ends_with("move the file away"), "{error}");
                assert_eq!(fs::read_to_string(&path).unwrap(), text);
            }
            // As it says.
            fs::remove_file(&path).unwrap();
            StateStore::open(dir.path()).unwrap();
        }
    }

    #[test]
    fn what_another_build_has_added_to_a_table_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let value =
            |name: &str| -> Value { serde_json::from_slice(&fs::read(dir.path().join(name)).unwrap()).unwrap() };
        let more = serde_json::json!({ "colour": ["blue"] });
        for (name, key) in [(TABLE, "ports"), (PINS, "pins")] {
            let table = serde_json::json!({ "more": more, "version": 1, key: ["a=tap:a0", "a=0"] });
            fs::write(dir.path().join(name), table.to_string()).unwrap();
        }
        let mut store = StateStore::open(dir.path()).unwrap();
        assert_eq!((store.ports().len(), store.pins().len()), (1, 1));
        store.replace(vec![port("b")]).unwrap();
        store.replace_pins(Vec::new()).unwrap();
        store.remove("b", None).unwrap();
        for (name, key) in [(TABLE, "ports"), (PINS, "pins")] {
            let table = value(name);
            assert_eq!(table["more"], more);
            assert!(!table[key].to_string().contains("b="), "{table}");
        }
    }

    #[test]
    fn what_another_version_has_written_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let table = dir.path().join(TABLE);
        let odd = ["b=tap:b0,colour=blue,owner=me", "c=warp:c0", "d=tap:"];
        let all = serde_json::json!({"version": 1, "ports": ["a=tap:a0", odd[0], odd[1], odd[2]]});
        fs::write(&table, all.to_string()).unwrap();
        let mut store = StateStore::open(dir.path()).unwrap();
        assert_eq!(store.ports(), ["a=tap:a0".parse().unwrap()]);
        assert_eq!(store.names().collect::<Vec<_>>(), ["a", "b", "c", "d"]);
        let has = |spec: &str| fs::read_to_string(&table).unwrap().contains(&format!("\"{spec}\""));
        // A port of its name takes the place of one.
        store.replace(vec![port("new"), port("d")]).unwrap();
        assert!(has(odd[0]) && has(odd[1]) && !has(odd[2]) && !has("a=tap:a0"));
        let before = store.remove_owned("m").unwrap();
        assert!(!has(odd[0]) && has(odd[1]));
        store.put_back(before).unwrap();
        assert!(!store.remove("b", Some("you")).unwrap() && has(odd[0]));
        assert!(store.remove("b", Some("me")).unwrap() && !has(odd[0]));
        assert!(store.remove("c", None).unwrap() && !has(odd[1]));
        assert!(!store.remove("c", None).unwrap());
        assert_eq!(store.names().collect::<Vec<_>>(), ["new", "d"]);
    }

    /// The process that hands over may go on, and would find its ports gone at the next start.
    #[test]
    fn a_takeover_leaves_files_in_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let lock = || OwnedFd::from(File::open(dir.path()).unwrap());
        fs::write(dir.path().join(TABLE), "{").unwrap();
        let error = StateStore::adopt(dir.path(), lock()).unwrap_err().to_string();
        assert!(error.contains("ports.json cannot be used, since"), "{error}");
        assert_eq!(fs::read_to_string(dir.path().join(TABLE)).unwrap(), "{");
    }

    #[test]
    fn a_failed_write_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = StateStore::open(dir.path()).unwrap();
        store.replace(vec![port("a")]).unwrap();
        // A folder in the way of the temporary file makes writing fail, for root too.
        fs::create_dir(dir.path().join("ports.json.new")).unwrap();
        assert!(matches!(store.replace(vec![]), Err(StateError::Write { .. })));
        assert_eq!(store.ports(), [port("a")]);
        drop(store);
        assert_eq!(StateStore::open(dir.path()).unwrap().ports(), [port("a")]);
    }
}
