//! What a switch remembers over a restart: its ports and what is pinned to workers, in a directory of its own.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

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
    /// The table cannot be written.
    #[error("cannot write {path}: {source}; nothing was changed")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The table as it is on disk. Ports are written as SPEC, which people can read and which is checked like any other.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    version: u32,
    ports: Vec<String>,
}

/// Pins as they are on disk, written as they can be typed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PinTable {
    version: u32,
    pins: Vec<String>,
}

/// The state directory, ours alone as long as this lives.
#[derive(Debug)]
pub struct StateStore {
    dir: PathBuf,
    ports: Vec<PortConfig>,
    pins: Vec<Pin>,
    /// Goes when the process does, however that ends, unless another process was given it.
    lock: File,
}

impl StateStore {
    /// Makes the directory if it is missing, locks it, and reads the ports of the last run. A table that cannot be
    /// understood is put aside with a warning, so that it does not keep the switch from starting.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let unusable = |source| StateError::Unusable { dir: dir.into(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(unusable)?;
        Self::read(dir, lock(dir)?)
    }

    /// As [`StateStore::open`], with the lock that another process hands over, which writes no more.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn adopt(dir: &Path, lock: OwnedFd) -> Result<Self, StateError> {
        Self::read(dir, lock.into())
    }

    fn read(dir: &Path, lock: File) -> Result<Self, StateError> {
        let unusable = |source| StateError::Unusable { dir: dir.into(), source };
        let ports = read(&dir.join(TABLE), read_table).map_err(unusable)?;
        let pins = read(&dir.join(PINS), read_pins).map_err(unusable)?;
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
        &self.pins
    }

    /// Writes down other pins, in the same way as ports.
    ///
    /// # Errors
    /// [`StateError::Write`]; the old ones stay then.
    pub fn replace_pins(&mut self, pins: Vec<Pin>) -> Result<(), StateError> {
        if pins != self.pins {
            self.write(PINS, &PinTable { version: VERSION, pins: pins.iter().map(ToString::to_string).collect() })?;
            self.pins = pins;
        }
        Ok(())
    }

    /// The ports written down.
    pub fn ports(&self) -> &[PortConfig] {
        &self.ports
    }

    /// The ports written down, less one.
    pub fn without(&self, name: &str) -> Vec<PortConfig> {
        self.ports.iter().filter(|port| port.name != name).cloned().collect()
    }

    /// Writes down other ports. After a crash at any moment the file has either the old or the new table; the new one once
    /// this has returned, unless the machine itself goes down within seconds.
    ///
    /// # Errors
    /// [`StateError::Write`]; the old ports stay then.
    pub fn replace(&mut self, ports: Vec<PortConfig>) -> Result<(), StateError> {
        self.write(TABLE, &Table { version: VERSION, ports: ports.iter().map(ToString::to_string).collect() })?;
        self.ports = ports;
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
    sign(&mut file).map_err(unusable)?;
    Ok(file)
}

fn sign(lock: &mut File) -> io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "{}", std::process::id())
}

/// What a file holds; nothing if it is not there. One that cannot be understood is put aside.
fn read<T>(path: &Path, parse: impl FnOnce(&str) -> Result<Vec<T>, String>) -> io::Result<Vec<T>> {
    match fs::read_to_string(path) {
        Ok(text) => parse(&text).or_else(|problem| put_aside(path, &problem)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => put_aside(path, "it is not text"),
        Err(error) => Err(error),
    }
}

fn check_version(version: u32) -> Result<(), String> {
    let problem = || format!("it is of version {version}, and this switch knows version {VERSION}");
    (version == VERSION).then_some(()).ok_or_else(problem)
}

/// The pins of a table, or why it cannot be understood.
fn read_pins(text: &str) -> Result<Vec<Pin>, String> {
    let table: PinTable = serde_json::from_str(text).map_err(|error| error.to_string())?;
    check_version(table.version)?;
    table.pins.iter().map(|pin| pin.parse()).collect()
}

/// The ports of a table, or why it cannot be understood.
fn read_table(text: &str) -> Result<Vec<PortConfig>, String> {
    let table: Table = serde_json::from_str(text).map_err(|error| error.to_string())?;
    check_version(table.version)?;
    let parse = |spec: &String| spec.parse().map_err(|error| format!("port '{spec}': {error}"));
    table.ports.iter().map(parse).collect()
}

/// Renames a table that cannot be understood, and starts with an empty one.
fn put_aside<T>(path: &Path, problem: &str) -> io::Result<Vec<T>> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("{name}.corrupt-{seconds}"));
    fs::rename(path, &aside)?;
    tracing::warn!(
        "{} cannot be used, since {problem}; it is now {}, and nothing of it is restored",
        path.display(),
        aside.display()
    );
    Ok(Vec::new())
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
        fs::write(dir.path().join(PINS), r#"{"version":1,"pins":["vm1"]}"#).unwrap();
        assert!(StateStore::open(dir.path()).unwrap().pins().is_empty());
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(names.iter().any(|name| name.to_string_lossy().starts_with("pins.json.corrupt-")), "{names:?}");
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
        for text in [
            &b"{"[..],
            b"",
            b"\xff\xfe",
            br#"{"version":2,"ports":[]}"#,
            br#"{"version":1,"ports":["a=tap:"]}"#,
            br#"{"version":1,"ports":[],"more":1}"#,
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(TABLE), text).unwrap();
            assert!(StateStore::open(dir.path()).unwrap().ports().is_empty());
            let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            let aside = names.iter().find(|name| name.to_string_lossy().starts_with("ports.json.corrupt-")).unwrap();
            assert_eq!(fs::read(dir.path().join(aside)).unwrap(), text);
            assert!(!dir.path().join(TABLE).exists());
        }
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
