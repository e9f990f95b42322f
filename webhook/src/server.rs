//! The HTTPS server that the API server and the kubelet call.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Buf, Bytes};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use sluice_daemon::connections::{self, Settled};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::review;

/// Connections served at a time. The API server keeps a few open.
const MAX_CONNECTIONS: usize = 64;
/// Largest AdmissionReview. The API server takes objects of 3 MiB at most, and sends two.
const MAX_BODY: usize = 8 << 20;
/// Larger ones than any pod of a VM makes wait for each other, so that nobody fills our memory by sending many at once.
const LARGE_BODY: u64 = 128 << 10;
/// How many of these are read at a time.
const LARGE_BODIES: usize = 2;
/// How long a client may take for each step.
const PATIENCE: Duration = Duration::from_secs(10);

/// What all connections share.
struct Shared {
    /// Where links are to be in the pods of VMs.
    dir: String,
    large: Semaphore,
}

/// Serves `/mutate` and `/healthz` until it is dropped. Links are to be at `dir` in the pods of VMs.
pub async fn serve(listener: TcpListener, tls: Arc<rustls::ServerConfig>, dir: String) {
    let (acceptor, shared) = (TlsAcceptor::from(tls), Arc::new(Shared { dir, large: Semaphore::new(LARGE_BODIES) }));
    let serve = |stream, settled| connection(stream, settled, acceptor.clone(), Arc::clone(&shared));
    connections::serve(listener, MAX_CONNECTIONS, serve).await;
}

async fn connection(stream: TcpStream, settled: Settled, acceptor: TlsAcceptor, shared: Arc<Shared>) {
    let stream = match timeout(PATIENCE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!("TLS: {error}"),
        Err(_) => return tracing::debug!("TLS: the client is too slow"),
    };
    settled.store(true, Ordering::Relaxed);
    let service = service_fn(|request| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(answer(request, &shared).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!("connection: {error}");
    }
}

async fn answer<B>(request: Request<B>, shared: &Shared) -> Response<Full<Bytes>>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz") => reply(StatusCode::OK, "text/plain", "ok\n"),
        (&Method::POST, "/mutate") => mutate(request.into_body(), shared).await,
        _ => reply(StatusCode::NOT_FOUND, "text/plain", "see POST /mutate and GET /healthz\n"),
    }
}

async fn mutate<B>(body: B, shared: &Shared) -> Response<Full<Bytes>>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let is_large = body.size_hint().upper().is_none_or(|bytes| bytes > LARGE_BODY);
    let read = async {
        let turn = if is_large { shared.large.acquire().await.ok() } else { None };
        collect(body).await.map(|bytes| (bytes, turn))
    };
    // Its turn lasts until it is answered.
    let (body, _turn) = match timeout(PATIENCE, read).await {
        Ok(Ok(read)) => read,
        Ok(Err(error)) => return reply(StatusCode::BAD_REQUEST, "text/plain", format!("{error}\n")),
        Err(_) => return reply(StatusCode::REQUEST_TIMEOUT, "text/plain", "the body takes too long\n"),
    };
    let answer = review::answer(&body, &shared.dir).map_err(|error| error.to_string());
    match answer.and_then(|answer| serde_json::to_vec(&answer).map_err(|error| error.to_string())) {
        Ok(json) => reply(StatusCode::OK, "application/json", json),
        Err(problem) => {
            tracing::warn!("{problem}");
            reply(StatusCode::BAD_REQUEST, "text/plain", format!("{problem}\n"))
        }
    }
}

/// All of a body, in memory once.
async fn collect<B>(body: B) -> Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (mut body, mut bytes) = (pin!(Limited::new(body, MAX_BODY)), Vec::new());
    while let Some(frame) = body.frame().await {
        if let Ok(mut data) = frame?.into_data() {
            while data.has_remaining() {
                bytes.extend_from_slice(data.chunk());
                data.advance(data.chunk().len());
            }
        }
    }
    Ok(bytes)
}

fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
