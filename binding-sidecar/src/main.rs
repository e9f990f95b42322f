//! The `sluice-binding-sidecar` command.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use sluice_binding_sidecar::config::{self, Config, VARIABLES};
use sluice_binding_sidecar::domain;
use sluice_binding_sidecar::network_info::NetworkInfo;
use sluice_binding_sidecar::plan::plan;
use sluice_binding_sidecar::server::{Hooks, serve};
use sluice_binding_sidecar::vmi::Vmi;
use tokio::signal::unix::{SignalKind, signal};

/// KubeVirt network binding plugin of Sluice: a hook sidecar of virt-launcher.
#[derive(Debug, Parser)]
#[command(name = "sluice-binding-sidecar", version, after_help = VARIABLES)]
struct Cli {
    /// Print what would become of a domain, and end; links are told but not made
    #[arg(long, num_args = 2..=3, value_names = ["DOMAIN.xml", "VMI.json", "NETWORK-INFO.json"])]
    check: Vec<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.check.as_slice() {
        [] => run(),
        [domain, vmi] => check(domain, vmi, None),
        [domain, vmi, info, ..] => check(domain, vmi, Some(info)),
        [_] => Err(anyhow::anyhow!("--check takes two or three files; see --help")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sluice-binding-sidecar: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn variable(name: &'static str) -> Option<String> {
    std::env::var(name).ok()
}

fn run() -> anyhow::Result<()> {
    let filter = variable("SLUICE_LOG").unwrap_or_else(|| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    let config = Config::from_env(&variable);
    if let Err(error) = &config {
        tracing::error!("{error}");
    }
    let path = config::socket_path(&variable);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let hooks = Hooks::new(config);
        stop_at_signals(&hooks)?;
        tracing::info!("listening on {}", path.display());
        serve(&path, hooks).await.with_context(|| format!("cannot serve {}", path.display()))
    })
}

fn stop_at_signals(hooks: &Hooks) -> anyhow::Result<()> {
    let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup(), SignalKind::quit()];
    for kind in kinds {
        let (mut signals, hooks) = (signal(kind)?, hooks.clone());
        tokio::spawn(async move {
            signals.recv().await;
            hooks.stop();
        });
    }
    Ok(())
}

fn check(domain: &Path, vmi: &Path, info: Option<&PathBuf>) -> anyhow::Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    // Outside of a pod there is no container, and any name does.
    let lookup = |name| variable(name).or_else(|| (name == "CONTAINER_NAME").then(|| "hook-sidecar-0".into()));
    let config = Config::from_env(&lookup)?;
    let xml = String::from_utf8(read(domain)?).with_context(|| domain.display().to_string())?;
    let vmi = Vmi::parse(&read(vmi)?).with_context(|| vmi.display().to_string())?;
    let info = match info {
        Some(path) => NetworkInfo::parse(&read(path)?).with_context(|| path.display().to_string())?,
        None => {
            let networks = vmi.interfaces(&config.bindings).map(|interface| interface.name.as_str());
            NetworkInfo::example(networks, &config.container_root)
        }
    };
    let plan = plan(&vmi, &info, &config)?;
    let edited = domain::apply(&xml, &plan.nics)?;
    for link in &plan.links {
        eprintln!("link {} -> {}", link.path().display(), link.target.display());
    }
    if plan.nics.is_empty() {
        eprintln!("nothing to do: the VM has no interface with binding {}", config.bindings.join(" or "));
    }
    match std::io::stdout().write_all(edited.as_bytes()) {
        // Nobody reads our output any more, as with `| head`.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("cannot print the result"),
    }
}
