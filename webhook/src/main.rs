//! The `sluice-webhook` command.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Parser;
use sluice_daemon::listener;
use sluice_webhook::server::serve;
use sluice_webhook::tls::Certificate;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// How often the certificate is looked at. It is two small files, and half a change should not last.
const CERTIFICATE_INTERVAL: Duration = Duration::from_secs(2);
/// How long calls under way may take when the webhook ends.
const GRACE: Duration = Duration::from_secs(1);

/// Admission webhook of Sluice: gives the pods of VMs a directory for the links of the binding sidecar. Only KubeVirt
/// before 1.6 needs it.
#[derive(Debug, Parser)]
#[command(name = "sluice-webhook", version)]
struct Cli {
    /// Where to listen
    #[arg(long, env = "SLUICE_LISTEN", value_name = "ADDR", default_value = "[::]:8443")]
    listen: SocketAddr,
    /// Folder with tls.crt and tls.key; they may change at any time
    #[arg(long, env = "SLUICE_TLS", value_name = "DIR", default_value = "/etc/sluice/tls")]
    tls: PathBuf,
    /// Where the links are in the pods of VMs
    #[arg(long, env = "SLUICE_LINKS_DIR", value_name = "DIR", default_value = "/var/run/kubevirt/vhostuser")]
    links_dir: String,
    /// What to log, like 'debug'
    #[arg(long, env = "SLUICE_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sluice-webhook: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_env_filter(cli.log).with_writer(std::io::stderr).with_ansi(false).init();
    ensure!(cli.links_dir.starts_with('/'), "--links-dir must be an absolute path, not '{}'", cli.links_dir);
    let certificate = Certificate::read(&cli.tls)?;
    let tls = certificate.server_config()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let listener = listener::listen(cli.listen).and_then(TcpListener::from_std);
        let failed = || format!("cannot listen on {}; choose another with --listen, or SLUICE_LISTEN", cli.listen);
        let listener = listener.with_context(failed)?;
        tracing::info!("listening on {}", listener.local_addr()?);
        tokio::select! {
            () = serve(listener, tls, cli.links_dir) => {}
            () = certificate.watch(CERTIFICATE_INTERVAL) => {}
            _ = terminate.recv() => tokio::time::sleep(GRACE).await,
            _ = interrupt.recv() => {}
        }
        Ok(())
    });
    runtime.shutdown_background();
    result
}
