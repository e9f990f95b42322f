//! The HTTP server of `/metrics`, `/healthz` and `/readyz`.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections served at a time; the others wait.
const MAX_CONNECTIONS: usize = 16;
/// How long a client may take for its request, and stay silent between two.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause after a connection could not be accepted, so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// What a process tells. That it is healthy needs no asking: whatever is vital ends the process when it ends.
pub trait Pages: Send + Sync + 'static {
    /// All metrics, in the OpenMetrics text format.
    ///
    /// # Errors
    /// If they cannot be written.
    fn metrics(&self) -> Result<String, fmt::Error>;

    /// Whether it does its work.
    ///
    /// # Errors
    /// Why it does not, in a few words.
    fn ready(&self) -> Result<(), &'static str>;
}

/// Serves until the runtime ends.
pub async fn serve(listener: TcpListener, pages: Arc<impl Pages>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // The semaphore is never closed, so this never ends.
    while let Ok(place) = places.clone().acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("cannot accept a connection for metrics: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let pages = pages.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let response = answer(&request, &*pages);
                async { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!("connection for metrics: {error}");
            }
            drop(place);
        });
    }
}

fn answer<B>(request: &Request<B>, pages: &impl Pages) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "use GET\n");
    }
    match request.uri().path() {
        "/metrics" => match pages.metrics() {
            Ok(body) => reply(StatusCode::OK, OPENMETRICS, body),
            Err(_) => reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "metrics cannot be written\n"),
        },
        "/healthz" => reply(StatusCode::OK, TEXT, "ok\n"),
        "/readyz" => match pages.ready() {
            Ok(()) => reply(StatusCode::OK, TEXT, "ready\n"),
            Err(reason) => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{reason}\n")),
        },
        _ => reply(StatusCode::NOT_FOUND, TEXT, "see /metrics, /healthz and /readyz\n"),
    }
}

fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Metrics, and readiness.
    struct Told(Result<String, fmt::Error>, Result<(), &'static str>);

    impl Pages for Told {
        fn metrics(&self) -> Result<String, fmt::Error> {
            self.0.clone()
        }

        fn ready(&self) -> Result<(), &'static str> {
            self.1
        }
    }

    #[test]
    fn each_page_says_how_it_is() {
        let status = |method, path, pages: &Told| {
            answer(&Request::builder().method(method).uri(path).body(()).unwrap(), pages).status().as_u16()
        };
        let well = Told(Ok("# EOF\n".into()), Ok(()));
        let ill = Told(Err(fmt::Error), Err("no kubelet"));
        for (path, when_well, when_ill) in
            [("/metrics", 200, 500), ("/healthz", 200, 200), ("/readyz", 200, 503), ("/", 404, 404)]
        {
            assert_eq!((status("GET", path, &well), status("GET", path, &ill)), (when_well, when_ill), "{path}");
            assert_eq!(status("POST", path, &well), 405);
        }
    }
}
