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
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::connections;

/// Connections served at a time.
const MAX_CONNECTIONS: usize = 16;
/// How long a client may take for its request and to read the answer.
const PATIENCE: Duration = Duration::from_secs(10);
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
    connections::serve(listener, MAX_CONNECTIONS, |stream, _| connection(stream, pages.clone())).await;
}

/// Answers one request.
async fn connection(stream: TcpStream, pages: Arc<impl Pages>) {
    let service = service_fn(|request| {
        let response = answer(&request, &*pages);
        async { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
    match timeout(PATIENCE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("connection for metrics: {error}"),
        Err(_) => tracing::debug!("connection for metrics: the client is too slow"),
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
    use std::io::{Read, Write};
    use std::net;

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

    fn ask(address: net::SocketAddr, path: &str) -> net::TcpStream {
        let mut stream = net::TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE / 2)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        stream
    }

    #[test]
    fn clients_that_stay_keep_nobody_waiting() {
        let pages = Told(Ok("#".repeat(16 << 20)), Ok(()));
        let address = connections::tests::start(|listener| serve(listener, Arc::new(pages)));
        let silent: Vec<_> = (0..MAX_CONNECTIONS).map(|_| net::TcpStream::connect(address).unwrap()).collect();
        let unread: Vec<_> = (0..MAX_CONNECTIONS).map(|_| ask(address, "/metrics")).collect();
        let mut answer = String::new();
        // It ends by itself, too.
        ask(address, "/healthz").read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok\n"), "{answer}");
        drop((silent, unread));
    }
}
