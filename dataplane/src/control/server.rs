//! The gRPC server, and the thread on which it and the metrics server run.

use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use sluice_daemon::pages;
use sluice_proto::sluice::v1 as proto;
use sluice_proto::sluice::v1::control_server::{Control, ControlServer};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{IntervalStream, ReceiverStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

use super::gone::Note;
use super::socket::PeerRule;
use super::{ControlError, ControlSocket, Controller, convert};
use crate::config;
use crate::handover::{GiveError, Listeners, is_greeting};
use crate::switch::PortError;

/// Entries of the forwarding table in one message.
const FDB_PIECE: usize = 1024;
/// Time between two looks at what was captured.
const CAPTURE_ROUND: Duration = Duration::from_millis(20);
/// Time between two looks for notes.
const NOTES_ROUND: Duration = Duration::from_secs(5);
/// How long calls under way may take when the switch stops.
const GRACE: Duration = Duration::from_millis(500);
/// Pause after a connection could not be accepted (out of descriptors, mostly), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The running servers.
#[derive(Debug)]
pub struct ServerHandle {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl ServerHandle {
    /// Lets calls under way end, then stops the servers and removes the control socket.
    ///
    /// # Errors
    /// What ended the servers before, if something did.
    pub fn stop(self) -> io::Result<()> {
        // It fails if the servers have ended already; then join tells why.
        let _ = self.stop.send(());
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the control thread panicked")))
    }
}

/// Serves the control socket, and metrics if there is a listener for them, on a thread of its own. `ended` is dropped
/// when the servers have ended, for whatever reason.
///
/// # Errors
/// If the thread cannot be started.
pub fn serve(
    runtime: Runtime,
    controller: Arc<Controller>,
    socket: ControlSocket,
    metrics: Option<TcpListener>,
    ended: impl Send + 'static,
) -> io::Result<ServerHandle> {
    let (stop, stopped) = oneshot::channel();
    let run = move || {
        let _ended = ended;
        let ControlSocket { listener, rule, file } = socket;
        let result = runtime.block_on(serve_until(controller, listener, rule, metrics, stopped));
        // Waits for a takeover under way. If it succeeds the socket's file is the other's, and this process ends here.
        drop(runtime);
        drop(file);
        result
    };
    let thread = thread::Builder::new().name("control".into()).spawn(run)?;
    Ok(ServerHandle { stop, thread })
}

async fn serve_until(
    controller: Arc<Controller>,
    listener: UnixListener,
    rule: PeerRule,
    metrics: Option<TcpListener>,
    stopped: oneshot::Receiver<()>,
) -> io::Result<()> {
    let metrics_fd = metrics.as_ref().map(|metrics| metrics.as_fd().try_clone_to_owned()).transpose()?;
    if let Some(listener) = metrics {
        tokio::spawn(pages::serve(tokio::net::TcpListener::from_std(listener)?, controller.clone()));
    }
    let listeners = Listeners { control: listener.as_fd().try_clone_to_owned()?, metrics: metrics_fd };
    let (sender, incoming) = mpsc::channel(1);
    tokio::spawn(accept(listener, sender, Doorman { controller: controller.clone(), rule, listeners }));
    let (grace, graced) = oneshot::channel();
    let stopping = async {
        let _ = stopped.await;
        let _ = grace.send(());
    };
    tokio::spawn(look_for_notes(controller.clone()));
    let service = ControlServer::with_interceptor(Service { controller }, move |request| admit(request, rule));
    let incoming = ReceiverStream::new(incoming);
    let server = tonic::transport::Server::builder().serve_with_incoming_shutdown(service, incoming, stopping);
    let deadline = async {
        match graced.await {
            Ok(()) => tokio::time::sleep(GRACE).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        result = server => result.map_err(io::Error::other),
        // Streams have no end of their own.
        () = deadline => Ok(()),
    }
}

/// Looks for notes of owners that found nobody to tell.
async fn look_for_notes(controller: Arc<Controller>) {
    let mut interval = tokio::time::interval(NOTES_ROUND);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let notes = Note::read(&controller.about().control);
        // A thread for changes only if there is something to change.
        if !notes.is_empty() {
            let controller = controller.clone();
            let _ = tokio::task::spawn_blocking(move || controller.remove_gone(notes)).await;
        }
    }
}

/// What a process that wants to take over has to get past.
struct Doorman {
    controller: Arc<Controller>,
    rule: PeerRule,
    listeners: Listeners,
}

impl Doorman {
    /// Hands over to the process at the other end, and exits. If that fails, everything is as before.
    fn hand_over(&self, stream: UnixStream) {
        let peer = stream.peer_cred().ok();
        let pid = peer.and_then(|peer| peer.pid());
        if !peer.is_some_and(|peer| self.rule.trusts(&peer)) {
            return tracing::warn!(pid, "takeover refused: only root and this user may");
        }
        let stream = stream.into_std().and_then(|stream| stream.set_nonblocking(false).map(|()| stream));
        let result = stream.map_err(GiveError::from).and_then(|stream| {
            self.controller.hand_over(&stream, &self.listeners)?;
            Ok(stream)
        });
        match result {
            Ok(stream) => {
                tracing::info!(pid, "handed over");
                // It learns that we are gone from the end of the connection, which therefore stays open until then.
                std::mem::forget(stream);
                // No clean-up: sockets, files and guests are the other's by now.
                std::process::exit(0);
            }
            Err(error) => tracing::warn!(pid, "not handed over, going on: {error}"),
        }
    }
}

/// Accepts connections until nobody takes them any more, and sorts out those that want to take over. While one of those
/// does, new ones wait for whoever listens then.
async fn accept(listener: UnixListener, sender: mpsc::Sender<io::Result<UnixStream>>, doorman: Doorman) {
    let doorman = Arc::new(doorman);
    let (takers, mut taking) = mpsc::channel(1);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(stream) = taking.recv() => {
                let doorman = doorman.clone();
                let _ = tokio::task::spawn_blocking(move || doorman.hand_over(stream)).await;
                continue;
            }
        };
        match accepted {
            Ok((stream, _)) => {
                if sender.is_closed() {
                    return;
                }
                tokio::spawn(sort(stream, sender.clone(), takers.clone()));
            }
            Err(error) => {
                tracing::warn!("cannot accept on the control socket: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Looks at how a connection begins, and passes it on to where it belongs.
async fn sort(stream: UnixStream, calls: mpsc::Sender<io::Result<UnixStream>>, takers: mpsc::Sender<UnixStream>) {
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_io(Interest::READABLE, || is_greeting(&stream)) {
            // Whoever serves them may have ended.
            Ok(true) => return drop(takers.send(stream).await),
            Ok(false) => return drop(calls.send(Ok(stream)).await),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// Checks who calls.
fn admit(request: Request<()>, rule: PeerRule) -> Result<Request<()>, Status> {
    let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    match peer {
        Some(peer) if rule.allows(&peer) => Ok(request),
        Some(peer) => {
            tracing::warn!(uid = peer.uid(), gid = peer.gid(), pid = peer.pid(), "call refused");
            Err(Status::permission_denied(format!(
                "user {} may not use this switch; call as root, as the switch's user, or from the socket's group",
                peer.uid()
            )))
        }
        None => Err(Status::permission_denied("the caller's credentials cannot be read")),
    }
}

type Reply<T> = Result<Response<T>, Status>;
type ReplyStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

struct Service {
    controller: Arc<Controller>,
}

impl Service {
    /// Runs a change off the servers' thread: it waits for workers and for the disk.
    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Controller) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let controller = self.controller.clone();
        let task = tokio::task::spawn_blocking(move || change(&controller));
        task.await.unwrap_or_else(|error| Err(Status::internal(format!("the change failed: {error}"))))
    }

    fn workers(&self) -> Vec<proto::WorkerStatus> {
        self.controller.switch().workers().into_iter().map(convert::worker_status).collect()
    }
}

fn stats(controller: &Controller, cycles: bool) -> proto::Stats {
    let switch = controller.switch();
    proto::Stats {
        time_ns: u64::try_from(controller.uptime().as_nanos()).unwrap_or(u64::MAX),
        ports: switch.ports().into_iter().map(convert::port_stats).collect(),
        workers: switch.workers().into_iter().map(convert::worker_status).collect(),
        cycles: cycles.then(|| convert::cycles(switch.cycles())),
    }
}

#[tonic::async_trait]
impl Control for Service {
    async fn get_status(&self, _request: Request<proto::GetStatusRequest>) -> Reply<proto::GetStatusResponse> {
        let controller = &self.controller;
        let about = controller.about();
        Ok(Response::new(proto::GetStatusResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: controller.uptime().as_secs(),
            mode: about.mode.to_string(),
            workers: self.workers(),
            ports: controller.switch().port_configs().len() as u32,
            fdb_entries: controller.switch().fdb_len() as u64,
            control: about.control.display().to_string(),
            state_dir: about.state_dir.display().to_string(),
            totals: Some(convert::totals(controller.switch().totals())),
            memory_bytes: crate::heap::in_use(),
        }))
    }

    async fn list_ports(&self, request: Request<proto::ListPortsRequest>) -> Reply<proto::ListPortsResponse> {
        let wanted = request.into_inner();
        let ports = self.controller.switch().ports_where(|port| {
            port.owner.as_deref().unwrap_or_default().starts_with(&wanted.owner_prefix)
                && port.target.to_string().starts_with(&wanted.target_prefix)
        });
        let ports = ports.into_iter().map(convert::port_status).collect();
        Ok(Response::new(proto::ListPortsResponse { ports }))
    }

    async fn get_port(&self, request: Request<proto::GetPortRequest>) -> Reply<proto::GetPortResponse> {
        let name = request.into_inner().name;
        let found = self.controller.switch().port(&name).map(convert::port_status);
        let port = found.ok_or_else(|| Status::from(ControlError::from(PortError::NotFound(name))))?;
        Ok(Response::new(proto::GetPortResponse { port: Some(port) }))
    }

    async fn add_port(&self, request: Request<proto::AddPortRequest>) -> Reply<proto::AddPortResponse> {
        let request = request.into_inner();
        let replace_owner = request.replace_owner;
        let config = request.config.ok_or_else(|| Status::invalid_argument("config is missing"))?;
        let config = convert::port_from_proto(config).map_err(|error| Status::invalid_argument(error.to_string()))?;
        // Dropped with this call if the client does not wait for its end.
        let (caller, called) = tokio::sync::oneshot::channel::<()>();
        let add =
            move |controller: &Controller| Ok(controller.add_port(config, replace_owner, || !caller.is_closed())?);
        let port = self.change(add).await?;
        drop(called);
        Ok(Response::new(proto::AddPortResponse { port: port.map(convert::port_status) }))
    }

    async fn remove_port(&self, request: Request<proto::RemovePortRequest>) -> Reply<proto::RemovePortResponse> {
        let proto::RemovePortRequest { name, owner } = request.into_inner();
        self.change(move |controller| Ok(controller.remove_port(&name, owner.as_deref())?)).await?;
        Ok(Response::new(proto::RemovePortResponse {}))
    }

    type ListFdbStream = ReplyStream<proto::ListFdbResponse>;

    async fn list_fdb(&self, request: Request<proto::ListFdbRequest>) -> Reply<Self::ListFdbStream> {
        let network = request.into_inner().network;
        let mut entries = self.controller.switch().fdb();
        if let Some(network) = network {
            entries.retain(|entry| entry.network == network);
        }
        let mut entries = entries.into_iter().map(convert::fdb_entry);
        let pieces = std::iter::from_fn(move || {
            let piece: Vec<_> = entries.by_ref().take(FDB_PIECE).collect();
            (!piece.is_empty()).then_some(Ok(proto::ListFdbResponse { entries: piece }))
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(pieces))))
    }

    async fn flush_fdb(&self, request: Request<proto::FlushFdbRequest>) -> Reply<proto::FlushFdbResponse> {
        let network = request.into_inner().network;
        let flush = move |controller: &Controller| Ok(controller.switch().flush_fdb(network.as_deref()));
        let flushed = self.change(flush).await? as u64;
        Ok(Response::new(proto::FlushFdbResponse { flushed }))
    }

    async fn get_stats(&self, request: Request<proto::GetStatsRequest>) -> Reply<proto::GetStatsResponse> {
        let stats = stats(&self.controller, request.into_inner().cycles);
        Ok(Response::new(proto::GetStatsResponse { stats: Some(stats) }))
    }

    type WatchStatsStream = ReplyStream<proto::WatchStatsResponse>;

    async fn watch_stats(&self, request: Request<proto::WatchStatsRequest>) -> Reply<Self::WatchStatsStream> {
        let proto::WatchStatsRequest { interval_ms, cycles } = request.into_inner();
        let milliseconds = match interval_ms {
            0 => 1000,
            given @ 100..=3_600_000 => given,
            _ => return Err(Status::invalid_argument("interval_ms must be 100 to 3600000")),
        };
        let mut interval = tokio::time::interval(Duration::from_millis(milliseconds.into()));
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let controller = self.controller.clone();
        let answers = IntervalStream::new(interval)
            .map(move |_| Ok(proto::WatchStatsResponse { stats: Some(stats(&controller, cycles)) }));
        Ok(Response::new(Box::pin(answers)))
    }

    type CaptureStream = ReplyStream<proto::CaptureResponse>;

    async fn capture(&self, request: Request<proto::CaptureRequest>) -> Reply<Self::CaptureStream> {
        let request = request.into_inner();
        let controller = self.controller.clone();
        let options =
            convert::capture_options(&request).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let capture = controller.switch().capture(&request.name, options);
        let mut capture = capture.map_err(|error| Status::from(ControlError::from(error)))?;
        let mut interval = tokio::time::interval(CAPTURE_ROUND);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first answer, without frames, says that it has begun.
        let mut first = true;
        let answers = IntervalStream::new(interval)
            .map_while(move |_| {
                let is_there = controller.switch().has_captured(&request.name, &capture);
                let frames = || capture.drain().into_iter().map(convert::captured).collect();
                is_there.then(frames).map(|frames| proto::CaptureResponse { frames, lost: capture.lost() })
            })
            .filter(move |answer| std::mem::take(&mut first) || !answer.frames.is_empty());
        Ok(Response::new(Box::pin(answers.map(Ok))))
    }

    async fn list_workers(&self, _request: Request<proto::ListWorkersRequest>) -> Reply<proto::ListWorkersResponse> {
        let switch = self.controller.switch();
        Ok(Response::new(proto::ListWorkersResponse {
            workers: self.workers(),
            mode: self.controller.about().mode.to_string(),
            rebalance: switch.rebalances(),
            queues: switch.queue_loads().into_iter().map(convert::queue_load).collect(),
        }))
    }

    async fn pin_queue(&self, request: Request<proto::PinQueueRequest>) -> Reply<proto::PinQueueResponse> {
        let proto::PinQueueRequest { port, queue, worker } = request.into_inner();
        let pin = config::Pin { queue: convert::port_queue(port, queue)?, worker: worker as usize };
        self.change(move |controller| Ok(controller.pin(pin)?)).await?;
        Ok(Response::new(proto::PinQueueResponse {}))
    }

    async fn unpin_queue(&self, request: Request<proto::UnpinQueueRequest>) -> Reply<proto::UnpinQueueResponse> {
        let proto::UnpinQueueRequest { port, queue } = request.into_inner();
        let queue = convert::port_queue(port, queue)?;
        self.change(move |controller| Ok(controller.unpin(&queue)?)).await?;
        Ok(Response::new(proto::UnpinQueueResponse {}))
    }
}
