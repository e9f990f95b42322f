//! The hook server: what `virt-launcher` calls.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::str::Utf8Error;
use std::sync::Arc;
use std::time::Duration;

use sluice_proto::authority;
use sluice_proto::kubevirt::info::info_server::{Info, InfoServer};
use sluice_proto::kubevirt::info::{HookPoint, InfoParams, InfoResult};
use sluice_proto::kubevirt::{v1alpha1, v1alpha2, v1alpha3};
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::config::{Config, ConfigError};
use crate::domain::{self, DomainError};
use crate::links::LinkError;
use crate::network_info::{self, NetworkInfo, NetworkInfoError};
use crate::plan::{PlanError, plan};
use crate::vmi::Vmi;

/// The name that the sidecar gives itself.
pub const NAME: &str = "network-sluice-binding";
/// Versions of the hook protocol that it speaks.
const VERSIONS: [&str; 3] = ["v1alpha1", "v1alpha2", "v1alpha3"];
/// Hooks that it wants to be called for.
const HOOK_POINTS: [&str; 3] = ["OnDefineDomain", "PreCloudInitIso", "Shutdown"];
/// How long calls under way may take when the sidecar ends.
const GRACE: Duration = Duration::from_secs(2);

/// Why a domain was not changed, in one line for the events of the VM.
#[derive(Debug, thiserror::Error)]
pub enum DefineError {
    /// The sidecar's environment is wrong.
    #[error("configuration of the binding sidecar: {0}")]
    Config(#[from] ConfigError),
    /// The domain is not text.
    #[error("domain XML: {0}")]
    Text(#[from] Utf8Error),
    /// The VM cannot be read.
    #[error("VMI: {0}")]
    Vmi(#[from] serde_json::Error),
    /// The devices are not known.
    #[error(transparent)]
    NetworkInfo(#[from] NetworkInfoError),
    /// An interface cannot be served.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The domain cannot be changed.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// A link cannot be made.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// Answers `OnDefineDomain`: the domain with our interfaces. Their links are made when all else has succeeded.
///
/// # Errors
/// [`DefineError`].
pub async fn define(config: &Config, xml: &[u8], vmi: &[u8]) -> Result<String, DefineError> {
    let (xml, vmi) = (std::str::from_utf8(xml)?, Vmi::parse(vmi)?);
    let networks: Vec<_> = vmi.interfaces(&config.bindings).map(|interface| interface.name.as_str()).collect();
    let info = match networks.is_empty() {
        true => NetworkInfo::default(),
        false => network_info::wait(&config.network_info, &networks, config.patience).await?,
    };
    let plan = plan(&vmi, &info, config)?;
    let edited = domain::apply(xml, &plan.nics)?;
    for link in &plan.links {
        link.make()?;
        tracing::info!("link {} leads to {}", link.path().display(), link.target.display());
    }
    for nic in &plan.nics {
        tracing::info!("interface {} has socket {}", nic.name, nic.path);
    }
    if plan.nics.is_empty() {
        tracing::warn!("the VM has no interface with binding {}", config.bindings.join(" or "));
    }
    Ok(edited)
}

type HttpRequest = http::Request<Body>;
type HttpResponse = http::Response<Body>;
type Answer = BoxFuture<HttpResponse, Infallible>;

/// The services. A copy is as good as the original.
#[derive(Debug, Clone)]
pub struct Hooks {
    // A wrong configuration does not end the sidecar: virt-launcher would wait minutes for its socket, and then say
    // nothing about why. As the answer to OnDefineDomain, the reason gets into the events of the VM.
    config: Arc<Result<Config, ConfigError>>,
    stop: Arc<Notify>,
}

impl Hooks {
    /// Services with this configuration.
    pub fn new(config: Result<Config, ConfigError>) -> Self {
        Self { config: Arc::new(config), stop: Arc::new(Notify::new()) }
    }

    /// Lets [`serve`] end.
    pub fn stop(&self) {
        self.stop.notify_one();
    }

    async fn define(&self, xml: &[u8], vmi: &[u8]) -> Result<Vec<u8>, Status> {
        let defined = match self.config.as_ref() {
            Ok(config) => define(config, xml, vmi).await,
            Err(error) => Err(error.clone().into()),
        };
        defined.map(String::into_bytes).map_err(|error| {
            tracing::error!("{error}");
            Status::failed_precondition(error.to_string())
        })
    }
}

/// Listens on `path` until [`Hooks::stop`] or the `Shutdown` hook, which is answered first.
///
/// # Errors
/// If the socket cannot be made, or fails.
pub async fn serve(path: &Path, hooks: Hooks) -> io::Result<()> {
    remove_stale(path)?;
    let listener = UnixListener::bind(path)?;
    let (stop, stopping) = (hooks.stop.clone(), Arc::new(Notify::new()));
    let stopped = {
        let stopping = stopping.clone();
        async move {
            stop.notified().await;
            stopping.notify_one();
        }
    };
    let incoming = authority::incoming(listener);
    let server = Server::builder().serve_with_incoming_shutdown(services(hooks), incoming, stopped);
    let overdue = async {
        stopping.notified().await;
        tokio::time::sleep(GRACE).await;
    };
    let result = tokio::select! {
        result = server => result.map_err(io::Error::other),
        () = overdue => Ok(()),
    };
    let _ = fs::remove_file(path);
    result
}

/// All services behind one, by the path of the method.
fn services(
    hooks: Hooks,
) -> impl Service<HttpRequest, Response = HttpResponse, Error = Infallible, Future = Answer> + Clone {
    let mut info = InfoServer::new(hooks.clone());
    let mut v1 = v1alpha1::callbacks_server::CallbacksServer::new(hooks.clone());
    let mut v2 = v1alpha2::callbacks_server::CallbacksServer::new(hooks.clone());
    let mut v3 = v1alpha3::callbacks_server::CallbacksServer::new(hooks);
    tower::service_fn(move |request: HttpRequest| -> Answer {
        let service = request.uri().path().trim_start_matches('/').split('/').next().unwrap_or_default();
        match service {
            "kubevirt.hooks.info.Info" => info.call(request),
            "kubevirt.hooks.v1alpha1.Callbacks" => v1.call(request),
            "kubevirt.hooks.v1alpha2.Callbacks" => v2.call(request),
            "kubevirt.hooks.v1alpha3.Callbacks" => v3.call(request),
            _ => Box::pin(async { Ok(Status::unimplemented("no such service").into_http()) }),
        }
    })
}

/// Removes the socket of an earlier run. The name is ours alone, so nobody else listens there.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is not a socket is there")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[tonic::async_trait]
impl Info for Hooks {
    async fn info(&self, _: Request<InfoParams>) -> Result<Response<InfoResult>, Status> {
        let point = |name: &str| HookPoint { name: name.into(), priority: 0 };
        Ok(Response::new(InfoResult {
            name: NAME.into(),
            hook_points: HOOK_POINTS.map(point).into(),
            versions: VERSIONS.map(String::from).into(),
        }))
    }
}

// The versions have the same messages under other names, and each has one more hook than the one before.

#[tonic::async_trait]
impl v1alpha1::callbacks_server::Callbacks for Hooks {
    async fn on_define_domain(
        &self,
        request: Request<v1alpha1::OnDefineDomainParams>,
    ) -> Result<Response<v1alpha1::OnDefineDomainResult>, Status> {
        let v1alpha1::OnDefineDomainParams { domain_xml, vmi } = request.into_inner();
        let domain_xml = self.define(&domain_xml, &vmi).await?;
        Ok(Response::new(v1alpha1::OnDefineDomainResult { domain_xml }))
    }
}

#[tonic::async_trait]
impl v1alpha2::callbacks_server::Callbacks for Hooks {
    async fn on_define_domain(
        &self,
        request: Request<v1alpha2::OnDefineDomainParams>,
    ) -> Result<Response<v1alpha2::OnDefineDomainResult>, Status> {
        let v1alpha2::OnDefineDomainParams { domain_xml, vmi } = request.into_inner();
        let domain_xml = self.define(&domain_xml, &vmi).await?;
        Ok(Response::new(v1alpha2::OnDefineDomainResult { domain_xml }))
    }

    async fn pre_cloud_init_iso(
        &self,
        request: Request<v1alpha2::PreCloudInitIsoParams>,
    ) -> Result<Response<v1alpha2::PreCloudInitIsoResult>, Status> {
        // Nothing to change; without the echo the VM would lose its data.
        let v1alpha2::PreCloudInitIsoParams { cloud_init_no_cloud_source, cloud_init_data, .. } = request.into_inner();
        Ok(Response::new(v1alpha2::PreCloudInitIsoResult { cloud_init_no_cloud_source, cloud_init_data }))
    }
}

#[tonic::async_trait]
impl v1alpha3::callbacks_server::Callbacks for Hooks {
    async fn on_define_domain(
        &self,
        request: Request<v1alpha3::OnDefineDomainParams>,
    ) -> Result<Response<v1alpha3::OnDefineDomainResult>, Status> {
        let v1alpha3::OnDefineDomainParams { domain_xml, vmi } = request.into_inner();
        let domain_xml = self.define(&domain_xml, &vmi).await?;
        Ok(Response::new(v1alpha3::OnDefineDomainResult { domain_xml }))
    }

    async fn pre_cloud_init_iso(
        &self,
        request: Request<v1alpha3::PreCloudInitIsoParams>,
    ) -> Result<Response<v1alpha3::PreCloudInitIsoResult>, Status> {
        let v1alpha3::PreCloudInitIsoParams { cloud_init_no_cloud_source, cloud_init_data, .. } = request.into_inner();
        Ok(Response::new(v1alpha3::PreCloudInitIsoResult { cloud_init_no_cloud_source, cloud_init_data }))
    }

    async fn shutdown(
        &self,
        _: Request<v1alpha3::ShutdownParams>,
    ) -> Result<Response<v1alpha3::ShutdownResult>, Status> {
        tracing::info!("the VM has ended");
        // What is being answered, such as this, is still answered.
        self.stop();
        Ok(Response::new(v1alpha3::ShutdownResult {}))
    }
}
