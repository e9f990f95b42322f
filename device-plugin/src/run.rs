//! The running plugin: puts the parts together.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use sluice_daemon::listener;
use sluice_daemon::pages::{self, Pages};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::cdi;
use crate::config::{self, Config};
use crate::dataplane::{Dataplane, RESOURCE};
use crate::folder::Root;
use crate::kubelet::{Link, Registrar, remove_stale_sockets};
use crate::metrics::Metrics;
use crate::reconcile::Reconciler;
use crate::service::Resource;
use crate::sockets::Sockets;

/// What is told over HTTP.
struct Told {
    metrics: Arc<Metrics>,
    links: Vec<Arc<Link>>,
}

impl Pages for Told {
    fn metrics(&self) -> Result<String, fmt::Error> {
        self.metrics.render()
    }

    fn ready(&self) -> Result<(), &'static str> {
        let up = self.links.iter().all(|link| link.state().is_up());
        if up { Ok(()) } else { Err("the kubelet does not watch all resources") }
    }
}

/// Runs the plugin until SIGTERM or SIGINT. Our sockets in the kubelet's folder go then; the folders of VMs, and all in
/// them, stay.
///
/// # Errors
/// If it cannot start, or a part of it ends.
pub async fn run(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let metrics = Arc::new(Metrics::default());
    let root = Arc::new(Root::new(config.root.clone(), config.owner, config.label()));
    let sockets = Arc::new(Sockets::new(&config, root.clone(), metrics.clone()));
    let is_wanted = config.dataplane == config::Dataplane::On;
    let dataplane = is_wanted.then(|| Arc::new(Dataplane::new(&config, root, metrics.clone())));
    write_cdi(&config, &sockets, dataplane.as_deref())?;
    let mut resources: Vec<Arc<dyn Resource>> = vec![sockets.clone()];
    resources.extend(dataplane.map(|dataplane| dataplane as Arc<dyn Resource>));
    // Folders are there before the kubelet hears of them: pods that it knows already mount them without asking us.
    resources.iter().for_each(|resource| resource.check());
    remove_stale_sockets(&config.kubelet_dir).await;

    let links: Vec<Arc<Link>> = resources.iter().map(|_| Arc::default()).collect();
    let (stop, stopping) = watch::channel(false);
    let mut registrars = JoinSet::new();
    let mut others = JoinSet::new();
    if let Some(address) = config.metrics {
        let failed = || format!("cannot listen on {address}; choose another with --metrics, or SLUICE_METRICS");
        let listener = listener::listen(address).and_then(TcpListener::from_std).with_context(failed)?;
        tracing::info!(address = %listener.local_addr().unwrap_or(address), "metrics");
        let told = Arc::new(Told { metrics: metrics.clone(), links: links.clone() });
        others.spawn(pages::serve(listener, told));
    }
    for (resource, link) in resources.iter().zip(&links) {
        let dir = config.kubelet_dir.clone();
        let registrar = Registrar::new(resource.clone(), link.clone(), dir, metrics.clone());
        registrars.spawn(registrar.run(stopping.clone()));
    }
    let reconciler = Reconciler {
        sockets,
        link: links[0].clone(),
        socket: config.pod_resources,
        own_pod: config.pod_namespace.zip(config.pod_name),
        interval: config.reconcile,
        metrics,
    };
    others.spawn(reconciler.run());
    others.spawn(check_always(resources, config.check));

    let broken = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        broken = registrars.join_next() => broken,
        broken = others.join_next() => broken,
    };
    tracing::info!("stopping");
    stop.send_replace(true);
    while registrars.join_next().await.is_some() {}
    match broken {
        None => Ok(()),
        Some(Ok(())) => anyhow::bail!("a part of the plugin has ended"),
        Some(Err(error)) => Err(error).context("a part of the plugin has failed"),
    }
}

/// Looks after the folders for ever.
async fn check_always(resources: Vec<Arc<dyn Resource>>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let resources = resources.clone();
        let check = move || resources.iter().for_each(|resource| resource.check());
        if let Err(error) = tokio::task::spawn_blocking(check).await {
            tracing::error!("checking the folders failed: {error}");
        }
    }
}

fn write_cdi(config: &Config, sockets: &Sockets, dataplane: Option<&Dataplane>) -> Result<()> {
    let Some(dir) = &config.cdi_dir else { return Ok(()) };
    let failed = || format!("cannot write CDI files to {}", dir.display());
    cdi::write(dir, sockets.name(), &sockets.cdi_mounts(&sockets.ids())).with_context(failed)?;
    match dataplane {
        Some(dataplane) => cdi::write(dir, dataplane.name(), &dataplane.cdi_mounts()).with_context(failed),
        // One that ran before us may have offered it.
        None => cdi::remove(dir, &config.resource(RESOURCE))
            .with_context(|| format!("cannot remove the CDI file of the dataplane from {}", dir.display())),
    }
}
