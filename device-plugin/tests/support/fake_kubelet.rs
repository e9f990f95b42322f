//! The kubelet's device manager and pod-resources service, as far as plugins see them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use sluice_proto::authority;
use sluice_proto::kubelet::v1beta1::device_plugin_client::DevicePluginClient;
use sluice_proto::kubelet::v1beta1::registration_server::{Registration, RegistrationServer};
use sluice_proto::kubelet::v1beta1::*;
use sluice_proto::podresources::v1 as pods;
use sluice_proto::podresources::v1::pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status};

use super::authority::{Authority, connect};
use super::until;

/// A container with devices, in the kubelet's records.
#[derive(Debug, Clone)]
pub struct Pod {
    pub name: String,
    pub resource: String,
    pub ids: BTreeSet<String>,
    /// What the kubelet keeps, and uses again whenever the container restarts.
    pub answer: ContainerAllocateResponse,
}

/// What is known about a resource.
#[derive(Debug, Clone)]
struct Known {
    endpoint: String,
    options: DevicePluginOptions,
    client: DevicePluginClient<Channel>,
    /// The last message of the stream; none once it has ended.
    devices: Vec<Device>,
    messages: usize,
}

#[derive(Debug, Default)]
struct State {
    known: BTreeMap<String, Known>,
    registrations: Vec<RegisterRequest>,
    pods: BTreeMap<String, Pod>,
    /// For random orders that are the same in every run.
    random: u64,
    /// Streams that are read.
    streams: Vec<JoinHandle<()>>,
    /// What pod-resources answers instead of a list.
    lists_fail_with: Option<tonic::Code>,
    /// What pod-resources leaves out.
    hidden: BTreeSet<String>,
    lists: usize,
}

/// See the module. Its records of pods outlive restarts, as the real one's checkpoint does. It sends another
/// `:authority` each time that a resource is registered.
#[derive(Debug)]
pub struct FakeKubelet {
    dir: PathBuf,
    pod_resources: PathBuf,
    state: Arc<Mutex<State>>,
    servers: Vec<JoinHandle<()>>,
}

impl FakeKubelet {
    /// Starts a kubelet with its plugins' folder at `dir` and its pod-resources socket at `pod_resources`.
    pub fn start(dir: PathBuf, pod_resources: PathBuf) -> Self {
        let state = State { random: 0x9e37_79b9_7f4a_7c15, ..State::default() };
        let mut kubelet = Self { dir, pod_resources, state: Arc::new(Mutex::new(state)), servers: Vec::new() };
        kubelet.serve();
        kubelet
    }

    /// As the real one starts: deletes all sockets in its folder, then makes its own.
    pub fn serve(&mut self) {
        fs::create_dir_all(&self.dir).unwrap();
        for entry in fs::read_dir(&self.dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_socket() {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        self.serve_beside();
    }

    /// Starts, but leaves plugins' sockets alone, as if they had been made after it looked.
    pub fn serve_beside(&mut self) {
        fs::create_dir_all(self.pod_resources.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&self.pod_resources);
        let _ = fs::remove_file(self.dir.join("kubelet.sock"));
        let listener = UnixListener::bind(self.dir.join("kubelet.sock")).unwrap();
        let service = RegistrationServer::new(Service { dir: self.dir.clone(), state: self.state.clone() });
        let server = Server::builder().serve_with_incoming(service, authority::incoming(listener));
        self.servers.push(tokio::spawn(async move { server.await.unwrap() }));
        let listener = UnixListener::bind(&self.pod_resources).unwrap();
        let service = PodResourcesListerServer::new(Lister { state: self.state.clone() });
        let server = Server::builder().serve_with_incoming(service, authority::incoming(listener));
        self.servers.push(tokio::spawn(async move { server.await.unwrap() }));
    }

    /// Stops, as when it is killed: the sockets stay where they are.
    pub async fn stop(&mut self) {
        for server in self.servers.drain(..) {
            server.abort();
            let _ = server.await;
        }
        self.drop_streams();
    }

    /// Stops watching all plugins, but goes on otherwise.
    pub fn drop_streams(&self) {
        let mut state = self.state.lock().unwrap();
        state.streams.drain(..).for_each(|stream| stream.abort());
        state.known.clear();
    }

    /// Registrations so far.
    pub fn registrations(&self) -> Vec<RegisterRequest> {
        self.state.lock().unwrap().registrations.clone()
    }

    /// Lists of pods that were asked for.
    pub fn lists(&self) -> usize {
        self.state.lock().unwrap().lists
    }

    /// Makes pod-resources fail, or not any more.
    pub fn fail_lists(&self, with: Option<tonic::Code>) {
        self.state.lock().unwrap().lists_fail_with = with;
    }

    /// Leaves a pod out of lists, or not any more.
    pub fn hide(&self, pod: &str, hidden: bool) {
        let mut state = self.state.lock().unwrap();
        if hidden {
            state.hidden.insert(pod.into())
        } else {
            state.hidden.remove(pod)
        };
    }

    /// The devices of a resource, as the last message said; none if nobody serves it.
    pub fn devices(&self, resource: &str) -> Vec<Device> {
        self.state.lock().unwrap().known.get(resource).map(|known| known.devices.clone()).unwrap_or_default()
    }

    /// How many devices of a resource can be given out or are.
    pub fn capacity(&self, resource: &str) -> usize {
        self.devices(resource).iter().filter(|device| device.health == HEALTHY).count()
    }

    /// Waits for a capacity.
    pub async fn wait_for_capacity(&self, resource: &str, capacity: usize) {
        let what = format!("{capacity} of {resource}");
        until(&what, async || (self.capacity(resource) == capacity).then_some(())).await;
    }

    /// The name of a resource's socket.
    pub fn endpoint(&self, resource: &str) -> Option<String> {
        self.state.lock().unwrap().known.get(resource).map(|known| known.endpoint.clone())
    }

    /// The plugin's client, to call what a kubelet would not.
    pub fn client(&self, resource: &str) -> DevicePluginClient<Channel> {
        self.state.lock().unwrap().known[resource].client.clone()
    }

    /// Admits a pod with `count` devices: asks for a preference, allocates in random order, and keeps the answer.
    ///
    /// # Errors
    /// If the plugin refuses, or there are not enough devices.
    pub async fn admit(&self, pod: &str, resource: &str, count: usize) -> Result<Pod, Status> {
        let free: Vec<_> = self.free(resource);
        if free.len() < count {
            return Err(Status::resource_exhausted(format!("{} of {resource} are free, not {count}", free.len())));
        }
        let (mut client, options) = {
            let state = self.state.lock().unwrap();
            let known = &state.known[resource];
            (known.client.clone(), known.options)
        };
        let mut ids = free[..count].to_vec();
        if options.get_preferred_allocation_available {
            let request = ContainerPreferredAllocationRequest {
                available_device_i_ds: free.clone(),
                must_include_device_i_ds: Vec::new(),
                allocation_size: count as i32,
            };
            let request = PreferredAllocationRequest { container_requests: vec![request] };
            let answer = client.get_preferred_allocation(request).await?.into_inner();
            ids = answer.container_responses[0].device_i_ds.clone();
            assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), count, "the preference is not what was asked for");
            assert!(ids.iter().all(|id| free.contains(id)));
        }
        self.admit_with(pod, resource, ids).await
    }

    /// Admits a pod with these devices.
    ///
    /// # Errors
    /// If the plugin refuses.
    pub async fn admit_with(&self, pod: &str, resource: &str, mut ids: Vec<String>) -> Result<Pod, Status> {
        self.shuffle(&mut ids);
        let mut client = self.client(resource);
        let request =
            AllocateRequest { container_requests: vec![ContainerAllocateRequest { devices_ids: ids.clone() }] };
        let mut answer = client.allocate(request).await?.into_inner();
        let answer = answer.container_responses.remove(0);
        let ids = ids.into_iter().collect();
        let pod = Pod { name: pod.into(), resource: resource.into(), ids, answer };
        self.state.lock().unwrap().pods.insert(pod.name.clone(), pod.clone());
        self.start_container(&pod).await?;
        Ok(pod)
    }

    /// Starts a pod's container, for the first time or again: with the answer that was kept.
    ///
    /// # Errors
    /// If the plugin refuses.
    pub async fn start_container(&self, pod: &Pod) -> Result<(), Status> {
        let options = self.state.lock().unwrap().known[&pod.resource].options;
        if options.pre_start_required {
            let request = PreStartContainerRequest { devices_ids: pod.ids.iter().cloned().collect() };
            self.client(&pod.resource).pre_start_container(request).await?;
        }
        Ok(())
    }

    /// Forgets a pod. The plugin is not told: there is no such call.
    pub fn remove(&self, pod: &str) {
        self.state.lock().unwrap().pods.remove(pod);
    }

    /// Healthy devices that no pod has, in random order.
    fn free(&self, resource: &str) -> Vec<String> {
        let devices = self.devices(resource);
        let mut free: Vec<_> = {
            let state = self.state.lock().unwrap();
            let taken = |id: &String| state.pods.values().any(|pod| pod.resource == resource && pod.ids.contains(id));
            let healthy = devices.into_iter().filter(|device| device.health == HEALTHY);
            healthy.map(|device| device.id).filter(|id| !taken(id)).collect()
        };
        self.shuffle(&mut free);
        free
    }

    fn shuffle(&self, items: &mut [String]) {
        let mut state = self.state.lock().unwrap();
        for last in (1..items.len()).rev() {
            // Marsaglia's xorshift.
            state.random ^= state.random << 13;
            state.random ^= state.random >> 7;
            state.random ^= state.random << 17;
            let other = state.random as usize % (last + 1);
            items.swap(last, other);
        }
    }
}

impl Drop for FakeKubelet {
    fn drop(&mut self) {
        self.servers.iter().for_each(JoinHandle::abort);
    }
}

struct Service {
    dir: PathBuf,
    state: Arc<Mutex<State>>,
}

#[tonic::async_trait]
impl Registration for Service {
    /// As the real one: calls the plugin back before it answers.
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<Empty>, Status> {
        let request = request.into_inner();
        if request.version != "v1beta1" || !request.resource_name.contains('/') || request.endpoint.contains('/') {
            return Err(Status::invalid_argument(format!("{request:?}")));
        }
        let endpoint = self.dir.join(&request.endpoint);
        let is_same = |earlier: &&RegisterRequest| earlier.resource_name == request.resource_name;
        let turn = self.state.lock().unwrap().registrations.iter().filter(is_same).count();
        let connected = connect(&endpoint, Authority::ALL[turn % Authority::ALL.len()]).await;
        let channel = connected.unwrap_or_else(|error| panic!("{}: {error}", endpoint.display()));
        let mut client = DevicePluginClient::new(channel);
        let options = client.get_device_plugin_options(Empty {}).await?.into_inner();
        let (resource, endpoint) = (request.resource_name.clone(), request.endpoint.clone());
        let known = Known { endpoint: endpoint.clone(), options, client: client.clone(), devices: vec![], messages: 0 };
        let mut kubelet = self.state.lock().unwrap();
        // First of all: the plugin's list may be here before this goes on, and comes only once.
        kubelet.known.insert(request.resource_name.clone(), known);
        kubelet.registrations.push(request);
        let state = self.state.clone();
        let stream = tokio::spawn(async move {
            // A stream that has ended, or was replaced by another one's, means that there are no devices.
            let with_known = |act: &dyn Fn(&mut Known)| {
                if let Some(known) = state.lock().unwrap().known.get_mut(&resource).filter(|k| k.endpoint == endpoint) {
                    act(known);
                }
            };
            if let Ok(stream) = client.list_and_watch(Empty {}).await {
                let mut stream = stream.into_inner();
                while let Ok(Some(message)) = stream.message().await {
                    with_known(&|known| {
                        known.devices.clone_from(&message.devices);
                        known.messages += 1;
                    });
                }
            }
            with_known(&|known| known.devices.clear());
        });
        kubelet.streams.push(stream);
        Ok(Response::new(Empty {}))
    }
}

struct Lister {
    state: Arc<Mutex<State>>,
}

#[tonic::async_trait]
impl PodResourcesLister for Lister {
    async fn list(
        &self,
        _request: Request<pods::ListPodResourcesRequest>,
    ) -> Result<Response<pods::ListPodResourcesResponse>, Status> {
        let mut state = self.state.lock().unwrap();
        state.lists += 1;
        if let Some(code) = state.lists_fail_with {
            return Err(Status::new(code, "rejected by rate limit"));
        }
        let pod_resources = state.pods.values().filter(|pod| !state.hidden.contains(&pod.name)).map(|pod| {
            // The real one says it device by device.
            let devices = pod.ids.iter().map(|id| pods::ContainerDevices {
                resource_name: pod.resource.clone(),
                device_ids: vec![id.clone()],
                topology: None,
            });
            let container =
                pods::ContainerResources { name: "compute".into(), devices: devices.collect(), ..Default::default() };
            pods::PodResources {
                name: pod.name.clone(),
                namespace: "vms".into(),
                containers: vec![container],
                ..Default::default()
            }
        });
        Ok(Response::new(pods::ListPodResourcesResponse { pod_resources: pod_resources.collect() }))
    }

    async fn get_allocatable_resources(
        &self,
        _request: Request<pods::AllocatableResourcesRequest>,
    ) -> Result<Response<pods::AllocatableResourcesResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn get(
        &self,
        _request: Request<pods::GetPodResourcesRequest>,
    ) -> Result<Response<pods::GetPodResourcesResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }
}
