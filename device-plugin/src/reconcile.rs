//! Asks the kubelet which devices pods have, since it never says when one is given back.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_proto::podresources::v1::ListPodResourcesRequest;
use sluice_proto::podresources::v1::pod_resources_lister_client::PodResourcesListerClient;
use tokio::time::timeout;
use tonic::Code;

use crate::kubelet::{Link, RegisterError, connect};
use crate::metrics::Metrics;
use crate::service::Resource;
use crate::sockets::Sockets;

/// How long the kubelet may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Largest list, in bytes.
const MAX_LIST: usize = 64 << 20;

/// Why there is no list to go by.
#[derive(Debug, thiserror::Error)]
enum ListError {
    /// The kubelet could not be asked, or refused.
    #[error(transparent)]
    Call(#[from] RegisterError),
    /// It has not heard of all pods.
    #[error("the kubelet's list lacks our own pod {0}/{1}, so others may be missing too")]
    Incomplete(String, String),
}

/// Compares what devices have left behind with what pods use.
#[derive(Debug)]
pub struct Reconciler {
    /// The resource.
    pub sockets: Arc<Sockets>,
    /// Its registration.
    pub link: Arc<Link>,
    /// The kubelet's pod-resources socket.
    pub socket: PathBuf,
    /// Namespace and name of our own pod, which a complete list has. Without them every list is taken for complete.
    pub own_pod: Option<(String, String)>,
    /// Time between two lists.
    pub interval: Duration,
    /// Where lists are counted.
    pub metrics: Arc<Metrics>,
}

impl Reconciler {
    /// Runs for ever. Lists are asked for only while the kubelet knows and watches the resource, the first one at once.
    /// A new registration may mean a kubelet that has just started and does not know all pods yet, so what lists said
    /// before is forgotten then.
    pub async fn run(self) {
        let mut link = self.link.watch();
        let mut registrations = 0;
        let mut failing = false;
        loop {
            let Ok(state) = link.wait_for(|state| state.is_up()).await.map(|state| *state) else { return };
            if state.registrations != registrations {
                registrations = state.registrations;
                self.sockets.forget_lists();
            }
            let list = timeout(PATIENCE, self.list()).await.unwrap_or(Err(RegisterError::Silence.into()));
            self.metrics.count_pod_list(&list);
            match list {
                // A list from before a restart says nothing about now.
                Ok(used) if self.link.state() == state => {
                    failing = false;
                    let sockets = self.sockets.clone();
                    let done = tokio::task::spawn_blocking(move || sockets.reconcile(&used, Instant::now())).await;
                    if let Err(error) = done {
                        tracing::warn!("reconciling failed: {error}");
                    }
                }
                Ok(_) => {}
                // The kubelet limits the rate for all its clients together. There is a next time.
                Err(ListError::Call(RegisterError::Refused(status))) if status.code() == Code::ResourceExhausted => {}
                Err(error) => {
                    self.note_failure(&error, failing);
                    failing = true;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(self.interval) => {}
                _ = link.wait_for(|now| now.is_up() && now.registrations != registrations) => {}
            }
        }
    }

    fn note_failure(&self, error: &ListError, again: bool) {
        // Lists from before may have been as incomplete, after a restart that nobody noticed.
        if matches!(error, ListError::Incomplete(..)) {
            self.sockets.forget_lists();
        }
        match again {
            true => tracing::debug!("{error}"),
            false => tracing::warn!("cannot list what pods use, so leftovers stay: {error}"),
        }
    }

    /// The ids of our devices that pods have.
    async fn list(&self) -> Result<BTreeSet<String>, ListError> {
        let mut client =
            PodResourcesListerClient::new(connect(&self.socket).await?).max_decoding_message_size(MAX_LIST);
        let pods =
            client.list(ListPodResourcesRequest {}).await.map_err(RegisterError::from)?.into_inner().pod_resources;
        if let Some((namespace, name)) = &self.own_pod
            && !pods.iter().any(|pod| pod.namespace == *namespace && pod.name == *name)
        {
            return Err(ListError::Incomplete(namespace.clone(), name.clone()));
        }
        let containers = pods.into_iter().flat_map(|pod| pod.containers);
        let devices = containers.flat_map(|container| container.devices);
        let ours = devices.filter(|devices| devices.resource_name == self.sockets.name());
        Ok(ours.flat_map(|devices| devices.device_ids).collect())
    }
}
