//! The resource of the switch: one device, which is the folder of all folders.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use sluice_proto::kubelet::v1beta1 as proto;
use tokio::sync::watch;
use tonic::Status;

use crate::cdi::{self, CdiMount};
use crate::config::Config;
use crate::folder::Root;
use crate::metrics::Metrics;
use crate::service::Resource;

/// Its name, behind the prefix.
pub const RESOURCE: &str = "dataplane";
/// The one device.
pub const DEVICE: &str = "dataplane";
/// Environment variable that tells the switch's pod where the folders are.
pub const ROOT_VARIABLE: &str = "SLUICE_SOCKET_ROOT";

/// The resource `sluice.io/dataplane`. What is in the folders is never touched for it.
#[derive(Debug)]
pub struct Dataplane {
    name: String,
    root: Arc<Root>,
    container_path: PathBuf,
    with_cdi: bool,
    list: watch::Sender<Vec<proto::Device>>,
    metrics: Arc<Metrics>,
}

impl Dataplane {
    /// The resource as configured. Its folder is made at the first [`check`](Resource::check).
    pub fn new(config: &Config, root: Arc<Root>, metrics: Arc<Metrics>) -> Self {
        Self {
            name: config.resource(RESOURCE),
            container_path: config.dataplane_root.clone().unwrap_or_else(|| root.path().to_owned()),
            root,
            with_cdi: config.cdi_dir.is_some(),
            list: watch::Sender::default(),
            metrics,
        }
    }

    /// The mount, for the CDI file.
    pub fn cdi_mounts(&self) -> Vec<CdiMount<'_>> {
        let (host_path, container_path) = (self.root.path().to_owned(), self.container_path.clone());
        vec![CdiMount { id: DEVICE, host_path, container_path }]
    }

    fn answer(&self, ids: &[String]) -> Result<proto::ContainerAllocateResponse, Status> {
        match ids {
            [id] if id == DEVICE => {}
            _ => return Err(Status::not_found(format!("{} has only the device {DEVICE}", self.name))),
        }
        self.root.ensure().map_err(|error| Status::unavailable(error.to_string()))?;
        let mut answer = proto::ContainerAllocateResponse {
            envs: BTreeMap::from([(ROOT_VARIABLE.into(), self.container_path.display().to_string())]),
            ..Default::default()
        };
        if self.with_cdi {
            answer.cdi_devices = vec![proto::CdiDevice { name: cdi::name(&self.name, DEVICE) }];
        } else {
            answer.mounts = vec![proto::Mount {
                container_path: self.container_path.display().to_string(),
                host_path: self.root.path().display().to_string(),
                read_only: false,
            }];
        }
        Ok(answer)
    }
}

impl Resource for Dataplane {
    fn name(&self) -> &str {
        &self.name
    }

    fn options(&self) -> proto::DevicePluginOptions {
        proto::DevicePluginOptions::default()
    }

    fn devices(&self) -> watch::Receiver<Vec<proto::Device>> {
        self.list.subscribe()
    }

    fn allocate(&self, ids: Vec<String>) -> Result<proto::ContainerAllocateResponse, Status> {
        self.metrics.time_allocation(&self.name, || self.answer(&ids))
    }

    fn prefer(&self, request: &proto::ContainerPreferredAllocationRequest) -> Vec<String> {
        request.available_device_i_ds.clone()
    }

    fn pre_start(&self, _ids: &[String]) -> Result<(), Status> {
        Ok(())
    }

    fn check(&self) {
        let result = self.root.ensure().and_then(|()| self.root.check_file_system());
        let health = if result.is_ok() { proto::HEALTHY } else { proto::UNHEALTHY };
        let healthy = usize::from(result.is_ok());
        self.metrics.set_devices(&self.name, healthy, 1 - healthy);
        let now = vec![proto::Device { id: DEVICE.into(), health: health.into(), topology: None }];
        let has_changed = self.list.send_if_modified(|list| {
            let changed = *list != now;
            *list = now;
            changed
        });
        if let (true, Err(error)) = (has_changed, result) {
            tracing::warn!("the switch cannot be given the folders: {error}");
        }
    }
}
