//! Metrics in the OpenMetrics text format.

use std::fmt;
use std::time::Instant;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tonic::Status;

/// Upper bounds of the allocation times, in seconds.
const ALLOCATE_SECONDS: [f64; 8] = [0.000_5, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0];

type Labels = Vec<(&'static str, String)>;

/// All that is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    allocations: Family<Labels, Counter>,
    allocate_seconds: Histogram,
    devices: Family<Labels, Gauge>,
    registrations: Family<Labels, Counter>,
    /// Container starts that were prepared.
    pub(crate) pre_starts: Counter,
    /// Files and folders removed from VM folders.
    pub(crate) purged: Counter,
    /// Devices cleared after their pod had gone.
    pub(crate) reclaimed: Counter,
    pod_resources: Family<Labels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("sluice_device_plugin"),
            allocations: Family::default(),
            allocate_seconds: Histogram::new(ALLOCATE_SECONDS),
            devices: Family::default(),
            registrations: Family::default(),
            pre_starts: Counter::default(),
            purged: Counter::default(),
            reclaimed: Counter::default(),
            pod_resources: Family::default(),
        };
        let registry = &mut metrics.registry;
        registry.register("allocations", "Allocations, by resource and result", metrics.allocations.clone());
        registry.register("allocate_seconds", "Time an allocation takes", metrics.allocate_seconds.clone());
        registry.register("devices", "Devices, by resource and health", metrics.devices.clone());
        let help = "Registrations with the kubelet, by resource and result";
        registry.register("registrations", help, metrics.registrations.clone());
        registry.register("pre_starts", "Container starts prepared", metrics.pre_starts.clone());
        registry.register("purged_files", "Files and folders removed from VM folders", metrics.purged.clone());
        registry.register("reclaimed", "Devices cleared after their pod had gone", metrics.reclaimed.clone());
        registry.register("pod_lists", "Lists of pods asked for, by result", metrics.pod_resources.clone());
        metrics
    }
}

impl Metrics {
    /// All metrics as text.
    pub(crate) fn render(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// Runs an allocation of `resource`, measures and counts it.
    pub(crate) fn time_allocation<T>(
        &self,
        resource: &str,
        allocate: impl FnOnce() -> Result<T, Status>,
    ) -> Result<T, Status> {
        let start = Instant::now();
        let result = allocate();
        self.allocate_seconds.observe(start.elapsed().as_secs_f64());
        self.allocations.get_or_create(&labels(resource, &result)).inc();
        if let Err(status) = &result {
            tracing::warn!(resource, "allocation refused: {}", status.message());
        }
        result
    }

    /// Counts a registration of `resource`.
    pub(crate) fn count_registration<T, E>(&self, resource: &str, result: &Result<T, E>) {
        self.registrations.get_or_create(&labels(resource, result)).inc();
    }

    /// Counts a list of pods.
    pub(crate) fn count_pod_list<T, E>(&self, result: &Result<T, E>) {
        self.pod_resources.get_or_create(&vec![("result", word(result).into())]).inc();
    }

    /// Says how many devices of `resource` there are.
    pub(crate) fn set_devices(&self, resource: &str, healthy: usize, unhealthy: usize) {
        for (health, count) in [("healthy", healthy), ("unhealthy", unhealthy)] {
            let labels = vec![("resource", resource.to_owned()), ("health", health.to_owned())];
            self.devices.get_or_create(&labels).set(count as i64);
        }
    }
}

fn labels<T, E>(resource: &str, result: &Result<T, E>) -> Labels {
    vec![("resource", resource.to_owned()), ("result", word(result).to_owned())]
}

fn word<T, E>(result: &Result<T, E>) -> &'static str {
    if result.is_ok() { "ok" } else { "error" }
}
