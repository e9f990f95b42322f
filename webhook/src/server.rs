//! The HTTPS server that the API server and the kubelet call.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use sluice_daemon::connections::{self, Settled};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::review;

/// Connections served at a time. The API server keeps a few open.
const MAX_CONNECTIONS: usize = 64;
/// Largest AdmissionReview. The API server takes objects of 3 MiB at most, and sends two.
const MAX_BODY: usize = 8 << 20;
/// How long a client may take for each step.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves `/mutate` and `/healthz` until it is dropped. Links are to be at `dir` in the pods of VMs.
pub async fn serve(listener: TcpListener, tls: Arc<rustls::ServerConfig>, dir: String) {
    let (acceptor, dir) = (TlsAcceptor::from(tls), Arc::<str>::from(dir));
    let serve = |stream, settled| connection(stream, settled, acceptor.clone(), Arc::clone(&dir));
    connections::serve(listener, MAX_CONNECTIONS, serve).await;
}

async fn connection(stream: TcpStream, settled: Settled, acceptor: TlsAcceptor, dir: Arc<str>) {
    let stream = match timeout(PATIENCE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!("TLS: {error}"),
        Err(_) => return tracing::debug!("TLS: the client is too slow"),
    };
    settled.store(true, Ordering::Relaxed);
    let service = service_fn(|request| {
        let dir = dir.clone();
        async move { Ok::<_, Infallible>(answer(request, &dir).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!("connection: {error}");
    }
}

async fn answer<B>(request: Request<B>, dir: &str) -> Response<Full<Bytes>>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz") => reply(StatusCode::OK, "text/plain", "ok\n"),
        (&Method::POST, "/mutate") => mutate(request.into_body(), dir).await,
        _ => reply(StatusCode::NOT_FOUND, "text/plain", "see POST /mutate and GET /healthz\n"),
    }
}

async fn mutate<B>(body: B, dir: &str) -> Response<Full<Bytes>>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let body = match timeout(PATIENCE, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) => return reply(StatusCode::BAD_REQUEST, "text/plain", format!("{error}\n")),
        Err(_) => return reply(StatusCode::REQUEST_TIMEOUT, "text/plain", "the body takes too long\n"),
    };
    let answer = review::answer(&body, dir).map_err(|error| error.to_string());
    match answer.and_then(|answer| serde_json::to_vec(&answer).map_err(|error| error.to_string())) {
        Ok(json) => reply(StatusCode::OK, "application/json", json),
        Err(problem) => {
            tracing::warn!("{problem}");
            reply(StatusCode::BAD_REQUEST, "text/plain", format!("{problem}\n"))
        }
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
