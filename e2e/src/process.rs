//! Child processes that never outlive us.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::wait;

/// How much of a log is worth showing.
const TAIL: usize = 4000;
/// What programs print is read by us, in no other language than this.
const LANGUAGE: (&str, &str) = ("LC_ALL", "C");

type Job = (Command, mpsc::Sender<io::Result<Child>>);

/// Spawns from a thread that lives as long as the process: the kernel sends the parent-death
/// signal when the *thread* that spawned ends, and threads of tests end before their fixtures.
fn spawn(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in queue {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(jobs)
    });
    let (answer, result) = mpsc::channel();
    spawner.lock().unwrap_or_else(PoisonError::into_inner).send((command, answer)).ok().context("spawner is gone")?;
    Ok(result.recv().context("spawner is gone")??)
}

/// Runs in the child between fork and exec: only plain system calls.
fn prepare_child(parent: i32, cpus: &[usize]) -> io::Result<()> {
    // SAFETY: prctl and getppid take no pointers here.
    let orphaned = unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::getppid() != parent
    };
    if orphaned {
        return Err(io::Error::other("the parent is gone"));
    }
    if cpus.is_empty() {
        return Ok(());
    }
    set_cpus(0, cpus)
}

/// Binds a thread, ourselves if 0, to CPUs.
pub fn set_cpus(thread: libc::pid_t, cpus: &[usize]) -> io::Result<()> {
    // SAFETY: the set is a plain bit array that lives through the call; CPU_SET checks its index.
    let rc = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for &cpu in cpus {
            libc::CPU_SET(cpu, &mut set);
        }
        libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &set)
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A running program; ended at drop, killed by the kernel should we die first.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    /// Where its standard error goes, if not to the log.
    errors: Option<PathBuf>,
}

impl Process {
    /// Starts `command` on the given CPUs (anywhere if none), its output going to the file `log`.
    pub fn start(name: &str, mut command: Command, log: &Path, cpus: &[usize]) -> Result<Self> {
        command.stdin(Stdio::null());
        Self::start_prepared(name, command, log, None, cpus)
    }

    fn start_prepared(
        name: &str,
        mut command: Command,
        log: &Path,
        errors: Option<PathBuf>,
        cpus: &[usize],
    ) -> Result<Self> {
        command.stdout(append(log)?).stderr(append(errors.as_deref().unwrap_or(log))?).env(LANGUAGE.0, LANGUAGE.1);
        // SAFETY: getpid has no conditions.
        let parent = unsafe { libc::getpid() };
        let cpus = cpus.to_vec();
        // A group of its own: Ctrl-C is for us to handle, children end through us.
        command.process_group(0);
        // SAFETY: prepare_child makes system calls only, and allocates only to report an error.
        unsafe { command.pre_exec(move || prepare_child(parent, &cpus)) };
        let program = command.get_program().to_string_lossy().into_owned();
        let child = spawn(command).with_context(|| format!("cannot start {program}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned(), errors })
    }

    /// [`Process::start`] with a pipe to its standard input. Its standard error goes to a file of its own: other threads
    /// of the program tell there what would else stand in the midst of its answers.
    pub fn start_interactive(
        name: &str,
        mut command: Command,
        log: &Path,
        cpus: &[usize],
    ) -> Result<(Self, ChildStdin)> {
        command.stdin(Stdio::piped());
        let errors = log.with_extension("errors");
        let mut process = Self::start_prepared(name, command, log, Some(errors), cpus)?;
        let stdin = process.child.stdin.take().context("no pipe to the program's input")?;
        Ok((process, stdin))
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Binds all its threads to CPUs.
    pub fn set_cpus(&self, cpus: &[usize]) -> Result<()> {
        let tasks = || -> Result<Vec<libc::pid_t>> {
            let names = fs::read_dir(format!("/proc/{}/task", self.pid()))?;
            Ok(names.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
        };
        let mut bound = Vec::new();
        // New threads are where the one is that starts them, which may not have been bound by then.
        while let now = tasks()?
            && now != bound
        {
            for &thread in &now {
                match set_cpus(thread, cpus) {
                    Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error.into()),
                    _ => (),
                }
            }
            bound = now;
        }
        Ok(())
    }

    /// Whether it has ended.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// An error with the end of the log if the program is no longer running.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.exited()? {
            None => Ok(()),
            Some(status) => bail!("{} ended early ({status}):\n{}", self.name, self.log_tail()),
        }
    }

    /// Everything the program has printed; without its standard error if it is interactive.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The end of what the program has printed.
    pub fn log_tail(&self) -> String {
        match &self.errors {
            None => tail(&self.log),
            Some(errors) => format!("{}\n--- standard error:\n{}", tail(&self.log), tail(errors)),
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: the child is not yet reaped (that takes &mut self through wait), so the pid is its own.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Asks the program to end (SIGTERM) and waits; kills it when the time is over.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.exited()? {
            return Ok(status);
        }
        self.signal(libc::SIGTERM);
        self.wait_exit(limit)
    }

    /// Waits for the end; kills the program and gives an error when the time is over.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        wait_child(&mut self.child, &self.name, limit)
    }

    /// Ends the program at once (SIGKILL).
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.terminate(Duration::from_secs(3));
    }
}

/// Opens a file to write on at its end.
fn append(path: &Path) -> Result<File> {
    let file = File::options().create(true).append(true).open(path);
    file.with_context(|| format!("cannot write {}", path.display()))
}

/// The end of a text file, for error messages.
pub fn tail(path: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let mut start = text.len().saturating_sub(TAIL);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].trim_end().to_owned()
}

/// Waits for the end of a child; kills it and gives an error when the time is over.
pub fn wait_child(child: &mut Child, name: &str, limit: Duration) -> Result<ExitStatus> {
    let ended = wait::until(&format!("{name} to end"), limit, || Ok(child.try_wait()?));
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    ended
}

/// [`wait_child`] that also gives what the child printed, where that goes to pipes.
pub fn wait_output(mut child: Child, name: &str, limit: Duration) -> Result<Output> {
    let (stdout, stderr) = (child.stdout.take().map(collect), child.stderr.take().map(collect));
    // Not joined after an error: whatever the child has started may have the other ends.
    let status = wait_child(&mut child, name, limit)?;
    let all = |reader: Option<JoinHandle<Vec<u8>>>| reader.and_then(|reader| reader.join().ok()).unwrap_or_default();
    Ok(Output { status, stdout: all(stdout), stderr: all(stderr) })
}

/// Reads a pipe to its end.
fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

/// As [`Command::output`], of a command that has to end in time.
pub fn output(command: &mut Command, limit: Duration) -> Result<Output> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let name = format!("{command:?}");
    wait_output(child.with_context(|| format!("cannot start {name}"))?, &name, limit)
}

/// Runs a short command to its end and gives what it printed; an error if it fails.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .env(LANGUAGE.0, LANGUAGE.1)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        bail!("{program} {}: {} {errors}", args.join(" "), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    #[test]
    fn what_does_not_end_is_ended() {
        let began = Instant::now();
        let shell = |script: &str, limit| super::output(Command::new("sh").args(["-c", script]), limit);
        let output = shell("head -c 200000 /dev/zero; echo no >&2; exit 3", Duration::from_secs(20)).unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(3), 200_000));
        assert_eq!(output.stderr, b"no\n");
        // What it leaves behind has its pipes.
        let error = shell("sleep 30 & echo $!; wait", Duration::from_millis(200)).unwrap_err().to_string();
        assert!(error.contains("wait") && began.elapsed() < Duration::from_secs(20), "{error}");
    }

    #[test]
    fn programs_speak_the_language_that_we_read() {
        assert_eq!(super::run("sh", &["-c", "echo $LC_ALL"]).unwrap(), "C\n");
    }
}
