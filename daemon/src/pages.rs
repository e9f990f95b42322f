//! The HTTP server of `/metrics`, `/healthz` and `/readyz`.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, oneshot};
use tokio::time::timeout;

use crate::connections;

/// Connections served at a time.
const MAX_CONNECTIONS: usize = 16;
/// How long a client may take for its request and to read the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a text of metrics is good for. They can be asked for as often as anybody on the network likes.
const FRESH: Duration = Duration::from_secs(1);
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";

/// What a process tells. That it is healthy needs no asking: whatever is vital ends the process when it ends.
pub trait Pages: Send + Sync + 'static {
    /// All metrics, in the OpenMetrics text format. Called on a thread that may wait, and not twice at a time.
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
    let site = Arc::new(Site { pages, last: Arc::default() });
    connections::serve(listener, MAX_CONNECTIONS, |stream, _| connection(stream, site.clone())).await;
}

/// When metrics were written last, and their text, unless that failed.
type Last = Option<(Instant, Option<Bytes>)>;

/// The pages, and what is told again meanwhile.
struct Site<P> {
    pages: Arc<P>,
    last: Arc<Mutex<Last>>,
}

impl<P: Pages> Site<P> {
    /// The metrics, at most as old as [`FRESH`] says. Written on a thread of their own, so that nobody waits but who asks for
    /// them, and they do not wait for what else may wait on the runtime's threads.
    async fn metrics(&self) -> Option<Bytes> {
        let mut last = self.last.clone().lock_owned().await;
        if let Some((at, text)) = &*last
            && at.elapsed() < FRESH
        {
            return text.clone();
        }
        let pages = self.pages.clone();
        // It has the lock until it is done, even if the client goes: there is never a second one.
        let (told, text) = oneshot::channel();
        let write = move || {
            let text = pages.metrics().ok().map(Bytes::from);
            *last = Some((Instant::now(), text.clone()));
            // Nobody may be waiting any more.
            let _ = told.send(text);
        };
        if let Err(error) = thread::Builder::new().name("metrics".into()).spawn(write) {
            tracing::warn!("cannot start a thread for metrics: {error}; check the limits of the process");
        }
        text.await.ok().flatten()
    }

    async fn answer<B>(&self, request: Request<B>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET {
            return reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "use GET\n");
        }
        match request.uri().path() {
            "/metrics" => match self.metrics().await {
                Some(body) => reply(StatusCode::OK, OPENMETRICS, body),
                None => reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "metrics cannot be written\n"),
            },
            "/healthz" => reply(StatusCode::OK, TEXT, "ok\n"),
            "/readyz" => match self.pages.ready() {
                Ok(()) => reply(StatusCode::OK, TEXT, "ready\n"),
                Err(reason) => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{reason}\n")),
            },
            _ => reply(StatusCode::NOT_FOUND, TEXT, "see /metrics, /healthz and /readyz\n"),
        }
    }
}

/// Answers one request.
async fn connection(stream: TcpStream, site: Arc<Site<impl Pages>>) {
    let service = service_fn(|request| async { Ok::<_, Infallible>(site.answer(request).await) });
    let connection = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
    match timeout(PATIENCE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("connection for metrics: {error}"),
        Err(_) => tracing::debug!("connection for metrics: the client is too slow"),
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
    use std::sync::atomic::{AtomicUsize, Ordering};

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
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let status = |method, path, site: &Site<Told>| {
            let request = Request::builder().method(method).uri(path).body(()).unwrap();
            runtime.block_on(site.answer(request)).status().as_u16()
        };
        let site = |told| Site { pages: Arc::new(told), last: Arc::default() };
        let well = site(Told(Ok("# EOF\n".into()), Ok(())));
        let ill = site(Told(Err(fmt::Error), Err("no kubelet")));
        for (path, when_well, when_ill) in
            [("/metrics", 200, 500), ("/healthz", 200, 200), ("/readyz", 200, 503), ("/", 404, 404)]
        {
            assert_eq!((status("GET", path, &well), status("GET", path, &ill)), (when_well, when_ill), "{path}");
            assert_eq!(status("POST", path, &well), 405);
        }
    }

    #[test]
    fn metrics_do_not_wait_for_the_threads_of_the_runtime() {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        let (over, wait) = std::sync::mpsc::channel::<()>();
        runtime.spawn_blocking(move || wait.recv());
        let site = Site { pages: Arc::new(Told(Ok("# EOF\n".into()), Ok(()))), last: Arc::default() };
        let request = Request::builder().uri("/metrics").body(()).unwrap();
        let answer = runtime.block_on(async { timeout(PATIENCE, site.answer(request)).await });
        drop(over);
        assert_eq!(answer.unwrap().status(), StatusCode::OK);
    }

    fn ask(address: net::SocketAddr, path: &str) -> net::TcpStream {
        let mut stream = net::TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE / 2)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        stream
    }

    /// Takes long to write metrics, and counts how often.
    struct Slow(AtomicUsize);

    impl Pages for Slow {
        fn metrics(&self) -> Result<String, fmt::Error> {
            std::thread::sleep(FRESH);
            Ok(format!("{}\n", self.0.fetch_add(1, Ordering::Relaxed)))
        }

        fn ready(&self) -> Result<(), &'static str> {
            Ok(())
        }
    }

    #[test]
    fn who_asks_for_metrics_keeps_nobody_waiting() {
        let address = connections::tests::start(|listener| serve(listener, Arc::new(Slow(AtomicUsize::new(0)))));
        let read = |mut stream: net::TcpStream| {
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        // The first ones go to make room for the others.
        let asked: Vec<_> = (0..3 * MAX_CONNECTIONS).map(|_| ask(address, "/metrics")).collect();
        let began = Instant::now();
        for path in ["/healthz", "/readyz"] {
            let answer = read(ask(address, path));
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        assert!(began.elapsed() < FRESH / 2, "{:?}", began.elapsed());
        for stream in asked.into_iter().skip(2 * MAX_CONNECTIONS + 2) {
            let answer = read(stream);
            assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\n0\n"), "{answer}");
        }
        std::thread::sleep(FRESH);
        assert!(read(ask(address, "/metrics")).ends_with("\n1\n"));
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
