//! The kubelet's calls, answered for one resource.

use std::sync::Arc;

use sluice_proto::kubelet::v1beta1 as proto;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::kubelet::Link;

/// Something the kubelet can give to containers. The calls may take a moment: they work on files.
pub trait Resource: Send + Sync + std::fmt::Debug + 'static {
    /// The name, like `sluice.io/sockets`.
    fn name(&self) -> &str;
    /// What calls the kubelet should make.
    fn options(&self) -> proto::DevicePluginOptions;
    /// All devices, now and whenever something about them changes.
    fn devices(&self) -> watch::Receiver<Vec<proto::Device>>;
    /// Prepares devices for a container.
    ///
    /// # Errors
    /// For the kubelet, which then refuses the pod.
    fn allocate(&self, ids: Vec<String>) -> Result<proto::ContainerAllocateResponse, Status>;
    /// Chooses devices.
    fn prefer(&self, request: &proto::ContainerPreferredAllocationRequest) -> Vec<String>;
    /// Prepares devices for another start of their container.
    ///
    /// # Errors
    /// For the kubelet, which then tries again.
    fn pre_start(&self, ids: &[String]) -> Result<(), Status>;
    /// Looks whether devices are well, and repairs what can be.
    fn check(&self);
}

/// The service of one resource on one socket.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) resource: Arc<dyn Resource>,
    pub(crate) link: Arc<Link>,
    /// Becomes true, or goes, when the socket is given up.
    pub(crate) closing: watch::Receiver<bool>,
}

impl Service {
    /// Runs `call` where it may wait for the disk.
    async fn off_thread<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Resource) -> Result<T, Status> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        let resource = self.resource.clone();
        let done = tokio::task::spawn_blocking(move || call(&*resource)).await;
        done.unwrap_or_else(|error| Err(Status::internal(format!("the call failed: {error}")))).map(Response::new)
    }
}

/// Sends the list until the other side goes, or we do.
async fn watch_devices(
    mut devices: watch::Receiver<Vec<proto::Device>>,
    mut closing: watch::Receiver<bool>,
    sender: mpsc::Sender<Result<proto::ListAndWatchResponse, Status>>,
) {
    loop {
        let list = devices.borrow_and_update().clone();
        if sender.send(Ok(proto::ListAndWatchResponse { devices: list })).await.is_err() {
            return;
        }
        tokio::select! {
            changed = devices.changed() => if changed.is_err() { return },
            _ = closing.wait_for(|closing| *closing) => return,
            () = sender.closed() => return,
        }
    }
}

#[tonic::async_trait]
impl proto::device_plugin_server::DevicePlugin for Service {
    type ListAndWatchStream = ReceiverStream<Result<proto::ListAndWatchResponse, Status>>;

    async fn get_device_plugin_options(
        &self,
        _request: Request<proto::Empty>,
    ) -> Result<Response<proto::DevicePluginOptions>, Status> {
        Ok(Response::new(self.resource.options()))
    }

    async fn list_and_watch(
        &self,
        _request: Request<proto::Empty>,
    ) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(1);
        let (devices, closing) = (self.resource.devices(), self.closing.clone());
        let stream = self.link.stream();
        tokio::spawn(async move {
            let _stream = stream;
            watch_devices(devices, closing, sender).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<proto::PreferredAllocationRequest>,
    ) -> Result<Response<proto::PreferredAllocationResponse>, Status> {
        let requests = request.into_inner().container_requests;
        self.off_thread(move |resource| {
            let choose =
                |request| proto::ContainerPreferredAllocationResponse { device_i_ds: resource.prefer(request) };
            let container_responses = requests.iter().map(choose).collect();
            Ok(proto::PreferredAllocationResponse { container_responses })
        })
        .await
    }

    async fn allocate(
        &self,
        request: Request<proto::AllocateRequest>,
    ) -> Result<Response<proto::AllocateResponse>, Status> {
        let requests = request.into_inner().container_requests;
        self.off_thread(move |resource| {
            let answers = requests.into_iter().map(|request| resource.allocate(request.devices_ids));
            Ok(proto::AllocateResponse { container_responses: answers.collect::<Result<_, _>>()? })
        })
        .await
    }

    async fn pre_start_container(
        &self,
        request: Request<proto::PreStartContainerRequest>,
    ) -> Result<Response<proto::PreStartContainerResponse>, Status> {
        let ids = request.into_inner().devices_ids;
        self.off_thread(move |resource| resource.pre_start(&ids).map(|()| proto::PreStartContainerResponse {})).await
    }
}
