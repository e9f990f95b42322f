//! `sluice run`: the switch itself.

use std::io::IsTerminal;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use sluice::config::{FileConfig, FileError, PortConfig, SwitchConfig, check_workers};
use sluice::control::{About, ControlSocket, Controller, StateStore, serve};
use sluice::handover::Takeover;
use sluice::keeper::{Keeper, Kept};
use sluice::sandbox::{self, DEFAULT_KINDS, Needs, Sandbox, SandboxMode};
use sluice::switch::Switch;
use sluice::virtq::journal::Journal;
use sluice_daemon::listener;
use tokio::runtime::{self, Runtime};
use tracing_subscriber::EnvFilter;

use super::Failure;
use super::args::{DEFAULT_CONTROL, DEFAULT_STATE, LogForm, RunArgs};

/// Threads for changes; they come one after the other anyway.
const CHANGE_THREADS: usize = 2;

/// Runs the switch until a signal ends it.
pub(crate) fn run(args: RunArgs, json: bool) -> Result<(), Failure> {
    forget_children();
    start_log(args.log == LogForm::Json || json, args.verbose)?;
    many_descriptors();
    let takes_over = args.takeover;
    let setup = Setup::new(args)?;
    // From here on, signals wait until we look.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(Failure::failed)?;
    let runtime = new_runtime()?;
    let about = &setup.about;
    let takeover = if takes_over { Takeover::ask(&about.control, &about.state_dir) } else { Ok(None) };
    let start = match takeover.map_err(Failure::failed)? {
        Some(takeover) => take_over(&setup, &runtime, takeover)?,
        None => start(&setup, &runtime)?,
    };
    let Start { switch, controller, socket, metrics, sandbox, keeper } = start;
    // The kernel chooses if the port was 0.
    let metrics_address = metrics.as_ref().and_then(|listener| listener.local_addr().ok());
    controller.set_ready(true);
    let ended = CloseOnDrop(signals.handle());
    let served = serve(runtime, controller.clone(), socket, metrics, ended).map_err(Failure::failed);
    let result = served.and_then(|server| {
        announce(&controller, metrics_address, &sandbox);
        wait(&mut signals);
        controller.set_ready(false);
        server.stop().map_err(|error| Failure::Failed(format!("the control server ended: {error}")))
    });
    switch.stop();
    if let Some(keeper) = keeper {
        keeper.end();
    }
    result
}

/// A switch whose ports are up, and what it is to listen on.
struct Start {
    switch: Arc<Switch>,
    controller: Arc<Controller>,
    socket: ControlSocket,
    metrics: Option<TcpListener>,
    sandbox: Sandbox,
    keeper: Option<Arc<Keeper>>,
}

fn start(setup: &Setup, runtime: &Runtime) -> Result<Start, Failure> {
    let store = StateStore::open(&setup.about.state_dir).map_err(Failure::failed)?;
    let bound = runtime.block_on(ControlSocket::bind(&setup.about.control, setup.gid));
    let socket = bound.map_err(Failure::failed)?;
    let metrics = setup.metrics.map(listen).transpose()?;
    let (keeper, kept) = find_keeper(setup, true);
    let (config, sandbox) = confine(setup, &store)?;
    let switch = start_switch(&config, &store, &keeper)?;
    let controller = Controller::new(switch.clone(), store, setup.about.clone());
    let brought_up = controller.bring_up(&setup.file_ports, &setup.argument_ports, kept).map_err(Failure::failed);
    let mut resumed = brought_up.inspect_err(|_| switch.stop())?;
    if !resumed.is_empty() {
        tracing::info!(ports = resumed.len(), "going on with connections that were kept");
    }
    let anew = switch.start_adopted();
    if let Some(keeper) = &keeper {
        // What was kept of those has to end for their frontends, too.
        resumed.retain(|port| !anew.contains(port));
        keeper.settled(resumed);
    }
    switch.open();
    Ok(Start { switch, controller, socket, metrics, sandbox, keeper })
}

/// Takes everything over from a running switch, which goes on if this fails. Before [`Takeover::commit`] nothing here may change
/// what that has on disk or in its keeper, and after it nothing may fail.
fn take_over(setup: &Setup, runtime: &Runtime, mut takeover: Takeover) -> Result<Start, Failure> {
    let incomplete = || Failure::Failed("the running switch hands over no control socket or state directory".into());
    let (control, lock) = takeover.control().zip(takeover.state_lock()).ok_or_else(incomplete)?;
    let listener = runtime.block_on(async { ControlSocket::listener(control, &setup.about.control) });
    let listener = listener.map_err(Failure::failed)?;
    let store = StateStore::adopt(&setup.about.state_dir, lock).map_err(Failure::failed)?;
    let metrics = match (setup.metrics, takeover.metrics().map(TcpListener::from)) {
        (Some(wanted), Some(given)) if given.local_addr().is_ok_and(|at| listener::is_wanted(at, wanted)) => {
            Some(given)
        }
        (Some(wanted), _) => Some(listen(wanted)?),
        (None, _) => None,
    };
    let (keeper, _) = find_keeper(setup, false);
    let (config, sandbox) = confine(setup, &store)?;
    let switch = start_switch(&config, &store, &keeper)?;
    let controller = Controller::new(switch.clone(), store, setup.about.clone());
    let (file, arguments) = (&setup.file_ports, &setup.argument_ports);
    controller.adopt(&mut takeover, file, arguments).map_err(Failure::failed)?;
    let still = takeover.commit(&switch).map_err(Failure::failed)?;
    takeover.wait_gone();
    controller.complete(&mut takeover, file, arguments);
    match &keeper {
        Some(keeper) => keeper.settled(switch.port_configs().into_iter().map(|port| port.name).collect()),
        None if !setup.keeper => Keeper::dismiss(&setup.about.state_dir),
        None => {}
    }
    tracing::info!(pid = takeover.pid(), still_us = still.as_micros() as u64, "taken over");
    let _inside = runtime.enter();
    let socket = ControlSocket::adopt(listener, &setup.about.control, setup.gid);
    Ok(Start { switch, controller, socket, metrics, sandbox, keeper })
}

/// Starts the switch with nothing to do yet.
fn start_switch(
    config: &SwitchConfig,
    store: &StateStore,
    keeper: &Option<Arc<Keeper>>,
) -> Result<Arc<Switch>, Failure> {
    let switch = Switch::start_frozen(config)
        .map_err(|error| Failure::Failed(format!("cannot start the workers: {error}; check --cpu")))?;
    keep_journal(&switch, store);
    if let Some(keeper) = keeper {
        switch.keep_connections(keeper.clone());
    }
    Ok(switch)
}

/// What keeps connections over a crash, and what it has kept. Before the process may start no other any more.
fn find_keeper(setup: &Setup, alone: bool) -> (Option<Arc<Keeper>>, Vec<Kept>) {
    if !setup.keeper {
        // In a takeover it is the other's, who may go on.
        if alone {
            Keeper::dismiss(&setup.about.state_dir);
        }
        return (None, Vec::new());
    }
    match Keeper::find(&setup.about.state_dir, alone) {
        Ok((keeper, kept)) => (Some(keeper), kept),
        Err(error) => {
            tracing::warn!("{error}; should this process crash, guests see their link go down");
            (None, Vec::new())
        }
    }
}

/// Without it, a crash can double the frames under way, and guests with packed rings have to be reset.
fn keep_journal(switch: &Switch, store: &StateStore) {
    match Journal::open(&store.rings()) {
        Ok(journal) => switch.keep_journal(journal),
        Err(error) => tracing::warn!("cannot keep the rings' positions in {}: {error}", store.rings().display()),
    }
}

/// Every guest needs some ten descriptors, and as many again while it is handed over. The usual limit is there for old programs
/// that cannot do with more.
pub(super) fn many_descriptors() {
    // SAFETY: reads and writes a local; if it fails the limit stays.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Nobody waits for the keeper, our only child: should it end first, the kernel is to forget it.
fn forget_children() {
    // SAFETY: a setting of the process, which runs no code.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
    }
}

/// Gives up what the switch does not need for its ports. Threads started before would not, so there must be none yet.
fn confine(setup: &Setup, store: &StateStore) -> Result<(SwitchConfig, Sandbox), Failure> {
    let mut config = setup.switch.clone();
    let mut kinds = config.kinds.take().unwrap_or_else(|| DEFAULT_KINDS.map(str::to_owned).to_vec());
    for port in setup.file_ports.iter().chain(&setup.argument_ports).chain(store.ports()) {
        let kind = port.target.kind();
        if !kinds.iter().any(|known| known == kind) {
            kinds.push(kind.to_owned());
        }
    }
    let sandbox = sandbox::apply(&Needs {
        mode: setup.sandbox,
        kinds: kinds.clone(),
        state: setup.about.state_dir.clone(),
        control: setup.about.control.clone(),
        socket_root: config.socket_root.clone(),
    });
    let sandbox = sandbox.map_err(Failure::failed)?;
    config.confine_workers = sandbox.workers;
    // What there is no privilege for is refused with a better reason than the kernel's.
    config.kinds = (setup.sandbox != SandboxMode::Off).then_some(kinds);
    Ok((config, sandbox))
}

/// Everything that was asked for, checked.
#[derive(Debug)]
struct Setup {
    switch: SwitchConfig,
    sandbox: SandboxMode,
    about: About,
    gid: Option<u32>,
    metrics: Option<SocketAddr>,
    keeper: bool,
    file_ports: Vec<PortConfig>,
    argument_ports: Vec<PortConfig>,
}

impl Setup {
    fn new(args: RunArgs) -> Result<Self, Failure> {
        let file = read_file(args.config)?;
        check_together(&file.ports, &args.ports)?;
        let workers = if args.cpus.is_empty() { file.workers } else { args.cpus.into_iter().map(Some).collect() };
        check_workers(&workers).map_err(Failure::Usage)?;
        let mode = args.mode.or(file.mode).unwrap_or_default();
        let rebalance = args.rebalance.or(file.rebalance).unwrap_or(SwitchConfig::default().rebalance);
        let absolute = |path: PathBuf| std::path::absolute(path).map_err(|error| Failure::Usage(error.to_string()));
        let control = absolute(args.control.or(file.control).unwrap_or_else(|| DEFAULT_CONTROL.into()))?;
        ControlSocket::check_path(&control).map_err(Failure::Usage)?;
        // Before a running switch is asked for anything: later there may be no way back.
        let gid = file.group.as_deref().map(ControlSocket::group_id).transpose().map_err(Failure::failed)?;
        let state_dir = absolute(args.state.or(file.state).unwrap_or_else(|| DEFAULT_STATE.into()))?;
        let socket_root = args.socket_root.or(file.socket_root).map(absolute).transpose()?;
        for port in &args.ports {
            port.check_folder().map_err(Failure::failed)?;
        }
        Ok(Self {
            switch: SwitchConfig {
                workers,
                mode,
                fdb: file.fdb,
                rebalance,
                socket_root,
                kinds: file.kinds,
                confine_workers: false,
            },
            sandbox: args.sandbox.or(file.sandbox).unwrap_or_default(),
            about: About { mode, control, state_dir },
            gid,
            metrics: args.metrics.or(file.metrics),
            keeper: args.keeper.or(file.keeper).unwrap_or(true),
            file_ports: file.ports,
            argument_ports: args.ports,
        })
    }
}

fn read_file(path: Option<PathBuf>) -> Result<FileConfig, Failure> {
    let Some(path) = path else { return Ok(FileConfig::default()) };
    FileConfig::read(&path).map_err(|error| match error {
        FileError::Read { .. } => Failure::failed(error),
        FileError::Invalid { .. } => Failure::Usage(error.to_string()),
    })
}

/// Checks that the ports of the command line can be beside each other and beside those of the file.
fn check_together(file: &[PortConfig], arguments: &[PortConfig]) -> Result<(), Failure> {
    for (place, port) in arguments.iter().enumerate() {
        port.check_beside(file.iter().chain(&arguments[..place])).map_err(|error| Failure::Usage(error.problem))?;
    }
    Ok(())
}

fn start_log(json: bool, verbose: u8) -> Result<(), Failure> {
    let default = match verbose {
        0 => "info",
        1 => "info,sluice=debug",
        _ => "trace",
    };
    let filter = match std::env::var("SLUICE_LOG") {
        Ok(text) => EnvFilter::try_new(&text)
            .map_err(|error| Failure::Usage(format!("SLUICE_LOG={text} is not understood: {error}")))?,
        Err(_) => EnvFilter::new(default),
    };
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = if json { log.json().try_init() } else { log.with_ansi(std::io::stderr().is_terminal()).try_init() };
    started.map_err(Failure::failed)
}

fn new_runtime() -> Result<Runtime, Failure> {
    let mut builder = runtime::Builder::new_current_thread();
    builder.enable_all().max_blocking_threads(CHANGE_THREADS).thread_name("control-change");
    builder.thread_keep_alive(Duration::from_secs(1)).build().map_err(Failure::failed)
}

fn listen(address: SocketAddr) -> Result<TcpListener, Failure> {
    listener::listen(address).map_err(|error| {
        Failure::Failed(format!(
            "cannot listen on {address} for metrics: {error}; choose another with --metrics, or `listen` in `[metrics]` of the \
             configuration file"
        ))
    })
}

fn announce(controller: &Arc<Controller>, metrics: Option<SocketAddr>, sandbox: &Sandbox) {
    let about = controller.about();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        control = %about.control.display(),
        state = %about.state_dir.display(),
        mode = %about.mode,
        ports = controller.switch().port_configs().len(),
        metrics = metrics.map(tracing::field::display),
        %sandbox,
        "ready"
    );
}

/// Waits until we are asked to stop, or until the servers have ended.
fn wait(signals: &mut Signals) {
    for signal in signals.forever() {
        if signal == SIGHUP {
            tracing::info!("SIGHUP ignored; restart to read the file again");
            continue;
        }
        tracing::info!(signal, "stopping");
        return;
    }
}

/// Ends the wait for signals when the servers end by themselves.
struct CloseOnDrop(Handle);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;
    use sluice::config::PortText;
    use sluice::limits::{MAX_JOURNAL, MAX_NETWORKS, MAX_PORTS, MAX_QUEUE_PAIRS, MAX_WORKERS};

    use super::super::args::{Cli, Command};
    use super::*;

    /// docs/configuration.md, and the file in it.
    fn page() -> (String, String) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        let page = std::fs::read_to_string(path).unwrap();
        let file = page.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap().to_owned();
        (page, file)
    }

    /// Keys that can be beside this line, or sections.
    fn known_after(text: &str) -> Vec<String> {
        let error = FileConfig::parse(Path::new(""), text).unwrap_err().to_string();
        let keys = error.split("expected ").nth(1).and_then(|rest| rest.split(" (in").next()).unwrap_or_default();
        keys.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    }

    #[test]
    fn the_documented_file_holds_the_defaults() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), page().1).unwrap();
        let setup = |arguments: &[&str]| {
            let Command::Run(args) = Cli::parse_from([&["sluice", "run"], arguments].concat()).command else {
                panic!()
            };
            Setup::new(args).unwrap()
        };
        let mut bare = setup(&[]);
        bare.switch.kinds = Some(DEFAULT_KINDS.map(str::to_owned).to_vec());
        assert_eq!(format!("{:?}", setup(&["--config", file.path().to_str().unwrap()])), format!("{bare:?}"));
    }

    #[test]
    fn the_documented_file_has_every_key_and_its_examples_are_right() {
        let (_, file) = page();
        let all: String = file
            .lines()
            .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line).to_owned() + "\n")
            .collect();
        let config = FileConfig::parse(Path::new("configuration.md"), &all).unwrap();
        assert_eq!((config.workers.len(), config.ports.len()), (1, 3));
        let sections = known_after("x = 1");
        assert!(sections.len() > 5, "{sections:?}");
        for section in sections {
            let title =
                [format!("[[{section}]]"), format!("[{section}]")].into_iter().find(|title| all.contains(title));
            let keys = known_after(&format!("{}\nx = 1", title.unwrap_or_default()));
            assert!(!keys.is_empty(), "{section}");
            for key in keys {
                assert!(all.contains(&format!("\n{key} = ")), "{section}: {key}");
            }
        }
        assert!(PortText::KEYS.iter().all(|key| all.contains(&format!("\n{key} = "))));
    }

    #[test]
    fn the_documented_limits_are_those() {
        let (page, _) = page();
        for (what, limit) in [
            ("ports", MAX_PORTS),
            ("networks", MAX_NETWORKS),
            ("workers", MAX_WORKERS),
            ("queue pairs of a port", MAX_QUEUE_PAIRS),
            ("rings whose positions outlive a crash", MAX_JOURNAL),
        ] {
            assert!(page.contains(&format!("| {what} | {limit} |")), "{what} {limit}");
        }
    }
}
