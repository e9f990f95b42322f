//! The resource of VMs: each device is a folder, in which QEMU makes its socket.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sluice_proto::kubelet::v1beta1 as proto;
use tokio::sync::watch;
use tonic::Status;

use crate::cdi::{self, CdiMount};
use crate::config::{Config, Layout, device_id};
use crate::device_info::DeviceInfoFiles;
use crate::folder::{FolderError, Root};
use crate::metrics::Metrics;
use crate::preference::{self, Candidate};
use crate::service::Resource;

/// Environment variable with the ids of a container's devices, sorted, with commas.
pub const IDS_VARIABLE: &str = "SLUICE_SOCKET_IDS";
/// Environment variable with their folders in the container, in the same order.
pub const FOLDERS_VARIABLE: &str = "SLUICE_SOCKET_DIRS";

/// What is known about one device.
#[derive(Debug, Default)]
struct Slot {
    node: Option<u32>,
    /// Number of its last allocation; 0 for never.
    last_use: u64,
    /// When a list of pods did not have it, and neither did any since; none since it was prepared for a container.
    unused_since: Option<Instant>,
    /// It was cleared, and no pod has had it since.
    clean: bool,
    /// Its folder was made anew, and no pod has had it since: nobody can still have it open.
    fresh: bool,
    /// Its folder could not be emptied; it must be before it is given out.
    dirty: bool,
    /// Why it cannot be given out.
    problem: Option<String>,
}

#[derive(Debug)]
struct State {
    slots: BTreeMap<String, Slot>,
    allocations: u64,
}

/// The resource `sluice.io/sockets`.
#[derive(Debug)]
pub struct Sockets {
    name: String,
    root: Arc<Root>,
    container_root: PathBuf,
    layout: Layout,
    socket_name: String,
    device_info: DeviceInfoFiles,
    with_cdi: bool,
    grace: Duration,
    /// Held for the whole of a change, files included, so that changes come one after the other.
    state: Mutex<State>,
    list: watch::Sender<Vec<proto::Device>>,
    metrics: Arc<Metrics>,
}

impl Sockets {
    /// The resource as configured. Folders are made at the first [`check`](Resource::check).
    pub fn new(config: &Config, root: Arc<Root>, metrics: Arc<Metrics>) -> Self {
        let node = |number: usize| match config.numa_nodes.as_slice() {
            [] => None,
            nodes => Some(nodes[number % nodes.len()]),
        };
        let slot = |number| (device_id(number), Slot { node: node(number), ..Slot::default() });
        let name = config.resource("sockets");
        Self {
            root,
            container_root: config.container_root.clone(),
            layout: config.layout,
            socket_name: config.socket_name.clone(),
            device_info: DeviceInfoFiles::new(config.device_info_dir.clone(), name.clone()),
            with_cdi: config.cdi_dir.is_some(),
            grace: config.grace,
            state: Mutex::new(State { slots: (0..config.sockets).map(slot).collect(), allocations: 0 }),
            list: watch::Sender::default(),
            metrics,
            name,
        }
    }

    /// The mounts of all devices, for the CDI file.
    pub fn cdi_mounts<'a>(&self, ids: &'a [String]) -> Vec<CdiMount<'a>> {
        let mount = |id: &'a String| CdiMount {
            id,
            host_path: self.root.path().join(id),
            container_path: self.container_path(id),
        };
        ids.iter().map(mount).collect()
    }

    /// The ids of all devices, sorted.
    pub fn ids(&self) -> Vec<String> {
        self.lock().slots.keys().cloned().collect()
    }

    /// Forgets what lists of pods have said: the next ones may be incomplete.
    pub fn forget_lists(&self) {
        for slot in self.lock().slots.values_mut() {
            slot.unused_since = None;
        }
    }

    /// Takes a list of the devices that pods have, made at `now`. A device that is not in it, and was not in an earlier one
    /// at least the grace period ago, nor in any between, is cleared of what was left in it, and gets a new folder: so two
    /// lists must agree, and a pod that is admitted meanwhile has the grace period to get onto the list. Devices in use get
    /// back a device-info file that is missing, as all are when the node has started anew.
    pub fn reconcile(&self, used: &BTreeSet<String>, now: Instant) {
        let mut state = self.lock();
        for (id, slot) in &mut state.slots {
            if used.contains(id) {
                slot.take_up();
                if !self.device_info.exists(id)
                    && let Err(error) = self.write_device_info(id)
                {
                    tracing::warn!(device = id, "{error}");
                }
                continue;
            }
            match slot.unused_since {
                None => slot.unused_since = Some(now),
                Some(since) if !slot.clean && now.duration_since(since) >= self.grace => self.reclaim(id, slot),
                Some(_) => {}
            }
        }
        self.publish(&state);
    }

    fn reclaim(&self, id: &str, slot: &mut Slot) {
        let had_info = self.device_info.exists(id);
        if let Err(error) = self.device_info.remove(id) {
            tracing::warn!(device = id, "cannot remove its device-info file: {error}");
            return;
        }
        // No pod can have the folder mounted, so it need not stay the same one.
        let result = self.empty(slot, || self.root.replace(id));
        slot.note(id, result.as_ref().err());
        if let Ok(removed) = result {
            (slot.clean, slot.fresh) = (true, true);
            if had_info || removed > 0 {
                self.metrics.reclaimed.inc();
                tracing::info!(device = id, removed, "reclaimed");
            }
        }
    }

    /// Empties a folder in some way, and remembers if that has yet to be done.
    fn empty(&self, slot: &mut Slot, how: impl FnOnce() -> Result<u64, FolderError>) -> Result<u64, FolderError> {
        let result = how();
        slot.dirty = result.is_err();
        self.metrics.purged.inc_by(*result.as_ref().unwrap_or(&0));
        result
    }

    /// Makes a device ready for a container that starts: an empty folder, and a device-info file.
    fn prepare(&self, id: &str, slot: &mut Slot) -> Result<(), Status> {
        let result = self.empty(slot, || self.root.purge(id));
        slot.note(id, result.as_ref().err());
        result.map_err(unavailable)?;
        self.write_device_info(id)
    }

    fn write_device_info(&self, id: &str) -> Result<(), Status> {
        let socket = self.container_path(id).join(&self.socket_name);
        self.device_info.write(id, &socket).map_err(|error| {
            Status::unavailable(format!("cannot write {}: {error}", self.device_info.path(id).display()))
        })
    }

    /// Where a device's folder is in its container.
    fn container_path(&self, id: &str) -> PathBuf {
        match self.layout {
            Layout::ById => self.container_root.join(id),
            Layout::Fixed => self.container_root.clone(),
        }
    }

    fn prepare_all(&self, ids: &[String], allocate: bool) -> Result<(), Status> {
        let mut state = self.lock();
        if let Some(id) = ids.iter().find(|id| !state.slots.contains_key(*id)) {
            return Err(Status::not_found(format!("{} has no device {id}", self.name)));
        }
        // It may have been lost since the last check.
        self.root.ensure().map_err(unavailable)?;
        if allocate {
            state.allocations += 1;
        }
        let number = state.allocations;
        let mut result = Ok(());
        for id in ids {
            let Some(slot) = state.slots.get_mut(id) else { continue };
            if allocate {
                slot.last_use = number;
            }
            slot.take_up();
            result = result.and(self.prepare(id, slot));
        }
        self.publish(&state);
        result
    }

    fn answer(&self, mut ids: Vec<String>) -> Result<proto::ContainerAllocateResponse, Status> {
        // The kubelet has no order; people and Multus like one.
        ids.sort();
        ids.dedup();
        if self.layout == Layout::Fixed && ids.len() > 1 {
            return Err(Status::failed_precondition(format!(
                "a container can have one of {} where --layout is fixed, not {}",
                self.name,
                ids.len()
            )));
        }
        self.prepare_all(&ids, true)?;
        let folders: Vec<_> = ids.iter().map(|id| self.container_path(id).display().to_string()).collect();
        let mut answer = proto::ContainerAllocateResponse {
            envs: BTreeMap::from([(IDS_VARIABLE.into(), ids.join(",")), (FOLDERS_VARIABLE.into(), folders.join(","))]),
            ..Default::default()
        };
        if self.with_cdi {
            let device = |id: &String| proto::CdiDevice { name: cdi::name(&self.name, id) };
            answer.cdi_devices = ids.iter().map(device).collect();
        } else {
            let mount = |(id, container_path): (&String, _)| proto::Mount {
                container_path,
                host_path: self.root.path().join(id).display().to_string(),
                read_only: false,
            };
            answer.mounts = ids.iter().zip(folders).map(mount).collect();
        }
        tracing::info!(devices = ids.join(","), "allocated");
        Ok(answer)
    }

    /// Tells the kubelet what has changed.
    fn publish(&self, state: &State) {
        let device = |(id, slot): (&String, &Slot)| proto::Device {
            id: id.clone(),
            health: if slot.problem.is_none() { proto::HEALTHY } else { proto::UNHEALTHY }.into(),
            topology: slot.node.map(|node| proto::TopologyInfo { nodes: vec![proto::NumaNode { id: node.into() }] }),
        };
        let unhealthy = state.slots.values().filter(|slot| slot.problem.is_some()).count();
        self.metrics.set_devices(&self.name, state.slots.len() - unhealthy, unhealthy);
        let now: Vec<_> = state.slots.iter().map(device).collect();
        self.list.send_if_modified(|list| {
            let changed = *list != now;
            *list = now;
            changed
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic leaves a folder half empty at most, and the next allocation empties it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unavailable(error: FolderError) -> Status {
    Status::unavailable(error.to_string())
}

impl Slot {
    /// A pod has it, or is about to.
    fn take_up(&mut self) {
        (self.unused_since, self.clean, self.fresh) = (None, false, false);
    }

    /// Remembers what is wrong with the device, and logs it when that changes.
    fn note(&mut self, id: &str, problem: Option<&FolderError>) {
        let problem = problem.map(ToString::to_string);
        if problem == self.problem {
            return;
        }
        match &problem {
            Some(problem) => tracing::warn!(device = id, "unhealthy: {problem}"),
            None => tracing::info!(device = id, "healthy again"),
        }
        self.problem = problem;
    }
}

impl Resource for Sockets {
    fn name(&self) -> &str {
        &self.name
    }

    fn options(&self) -> proto::DevicePluginOptions {
        proto::DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available: true }
    }

    fn devices(&self) -> watch::Receiver<Vec<proto::Device>> {
        self.list.subscribe()
    }

    fn allocate(&self, ids: Vec<String>) -> Result<proto::ContainerAllocateResponse, Status> {
        self.metrics.time_allocation(&self.name, || self.answer(ids))
    }

    fn prefer(&self, request: &proto::ContainerPreferredAllocationRequest) -> Vec<String> {
        let state = self.lock();
        let candidate = |id: &String| {
            let slot = state.slots.get(id)?;
            Some(Candidate { id: id.clone(), node: slot.node, fresh: slot.fresh, last_use: slot.last_use })
        };
        let available = request.available_device_i_ds.iter().filter_map(candidate).collect();
        let size = usize::try_from(request.allocation_size).unwrap_or_default();
        preference::choose(available, &request.must_include_device_i_ds, size)
    }

    /// The container's last run may have left sockets behind, or the node may have lost its folders since.
    fn pre_start(&self, ids: &[String]) -> Result<(), Status> {
        self.metrics.pre_starts.inc();
        self.prepare_all(ids, false)
    }

    fn check(&self) {
        let mut state = self.lock();
        let root = self.root.ensure().and_then(|()| self.root.check_file_system());
        for (id, slot) in &mut state.slots {
            // Of what is in the way, a part goes each time; all the more if the file system is full.
            let folder = match slot.dirty {
                true => self.empty(slot, || self.root.purge(id)).map(|_| false),
                false => self.root.ensure_folder(id),
            };
            slot.fresh |= matches!(folder, Ok(true));
            slot.note(id, root.as_ref().err().or(folder.as_ref().err()));
        }
        self.publish(&state);
    }
}

#[cfg(test)]
mod tests;
