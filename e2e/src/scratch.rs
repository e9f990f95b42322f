//! Directories, and other things of the machine, that vanish with us.
//!
//! Normally a guard's `drop` clears up. A second net catches what drops cannot: a janitor, a small
//! shell that waits until this process is gone (its end of a pipe closes, be it by Ctrl-C or
//! SIGKILL) and then runs the undo commands registered here and removes the scratch directory.

use anyhow::{Context, Result, anyhow};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// Undo commands must be harmless when their thing is already gone: they run again at the end.
const JANITOR: &str = r#"trap '' INT TERM HUP
cat >/dev/null
[ -f "$1/undo.sh" ] && sh "$1/undo.sh" >/dev/null 2>&1
rm -rf "$1""#;

struct Root {
    dir: PathBuf,
    // Held, never waited for: it ends after us.
    _janitor: Child,
}

fn root() -> Result<&'static Path> {
    static ROOT: OnceLock<Result<Root, String>> = OnceLock::new();
    match ROOT.get_or_init(|| start_janitor().map_err(|e| format!("{e:#}"))) {
        Ok(root) => Ok(&root.dir),
        Err(e) => Err(anyhow!("{e}")),
    }
}

fn start_janitor() -> Result<Root> {
    let dir = std::env::temp_dir().join(format!("sluice-e2e-{}", std::process::id()));
    // A leftover of an earlier process with our number can only be rubbish.
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let janitor = Command::new("sh")
        .args(["-c", JANITOR, "janitor"])
        .arg(&dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start sh")?;
    Ok(Root { dir, _janitor: janitor })
}

/// Registers a shell command that undoes something outside the scratch directory.
pub fn undo_at_end(command: &str) -> Result<()> {
    let path = root()?.join("undo.sh");
    let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
    writeln!(file, "{command}").with_context(|| format!("cannot write {}", path.display()))
}

/// A directory of its own for sockets, logs and state; removed at drop.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// The path is short: a unix socket's path has to fit in 107 bytes.
    pub fn new(name: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = root()?.join(format!("{name}{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self(dir))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path inside it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
