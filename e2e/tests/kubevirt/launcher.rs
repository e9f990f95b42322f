//! virt-launcher, as hook sidecars see it.

use anyhow::{Context, Result, bail, ensure};
use e2e::wait;
use sluice_proto::kubevirt::info::InfoParams;
use sluice_proto::kubevirt::info::info_client::InfoClient;
use sluice_proto::kubevirt::v1alpha3::callbacks_client::CallbacksClient;
use sluice_proto::kubevirt::v1alpha3::{OnDefineDomainParams, ShutdownParams};
use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::kubelet::authority::{Authority, connect};
use crate::pod::Pod;

/// Longer than virt-launcher's own 4 minutes is of no use here.
const COLLECT_LIMIT: Duration = Duration::from_secs(20);
const INFO_LIMIT: Duration = Duration::from_secs(1);
const CALLBACK_LIMIT: Duration = Duration::from_secs(60);

/// The one sidecar of a pod.
pub(crate) struct Hooks {
    socket: PathBuf,
    calls: Cell<usize>,
}

impl Hooks {
    /// Finds the sidecar as virt-launcher does: whoever listens must answer at once.
    pub(crate) async fn collect(pod: &Pod) -> Result<Self> {
        let socket = wait::until("a hook socket", COLLECT_LIMIT, || {
            let sockets = pod.hook_sockets()?;
            ensure!(sockets.len() < 2, "one sidecar makes {sockets:?}");
            Ok(sockets.into_iter().find(|socket| std::os::unix::net::UnixStream::connect(socket).is_ok()))
        })?;
        let hooks = Self { socket, calls: Cell::new(0) };
        let mut client = InfoClient::new(hooks.dial().await?);
        let info = timeout(INFO_LIMIT, client.info(InfoParams {})).await.context("Info is late")??.into_inner();
        ensure!(info.versions.iter().any(|version| version == "v1alpha3"), "{info:?}");
        let points: Vec<_> = info.hook_points.iter().map(|point| point.name.as_str()).collect();
        ensure!(points.contains(&"OnDefineDomain") && points.contains(&"Shutdown"), "{info:?}");
        Ok(hooks)
    }

    /// A connection for each call, and each with another authority, as Go's library has had them over the years.
    async fn dial(&self) -> Result<Channel> {
        let call = self.calls.replace(self.calls.get() + 1);
        Ok(connect(&self.socket, Authority::ALL[call % Authority::ALL.len()]).await?)
    }

    /// `OnDefineDomain`.
    pub(crate) async fn define(&self, xml: &str, vmi: &str) -> Result<String> {
        let params = OnDefineDomainParams { domain_xml: xml.into(), vmi: vmi.into() };
        let mut client = CallbacksClient::new(self.dial().await?);
        match timeout(CALLBACK_LIMIT, client.on_define_domain(params)).await.context("OnDefineDomain is late")? {
            Ok(answer) => Ok(String::from_utf8(answer.into_inner().domain_xml)?),
            Err(status) => bail!("OnDefineDomain: {}", status.message()),
        }
    }

    /// `Shutdown`.
    pub(crate) async fn shutdown(&self) -> Result<()> {
        CallbacksClient::new(self.dial().await?).shutdown(ShutdownParams {}).await.context("Shutdown")?;
        Ok(())
    }
}
