//! Connections of a server that anybody on the network may call.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Pause after a connection could not be accepted, so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a connection sets once its client has shown who it is, or done anything that costs it more than to connect.
pub type Settled = Arc<AtomicBool>;

/// Serves connections, each in a task of its own, until the runtime ends. If there are more than `limit`, the oldest goes, of those
/// that have settled or of those that have not, whichever are more: the newest may be the kubelet, who ends a process that
/// does not answer.
pub async fn serve<F>(listener: TcpListener, limit: usize, connection: impl Fn(TcpStream, Settled) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut served: VecDeque<(JoinHandle<()>, Settled)> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        served.retain(|(task, _)| !task.is_finished());
        if served.len() >= limit {
            let has_settled = |(_, settled): &(_, Settled)| settled.load(Ordering::Relaxed);
            let most = served.iter().filter(|served| has_settled(served)).count() > limit / 2;
            let oldest = served.iter().position(|served| has_settled(served) == most).unwrap_or(0);
            if let Some((task, _)) = served.remove(oldest) {
                task.abort();
            }
        }
        let settled = Settled::default();
        served.push_back((tokio::spawn(connection(stream, settled.clone())), settled));
        // It has its turn before others can take its place.
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net;

    use tokio::io::Interest;

    use super::*;

    /// Has a server of a test run in a thread of its own, and gives its address.
    pub(crate) fn start<F: Future>(server: impl FnOnce(TcpListener) -> F + Send + 'static) -> net::SocketAddr {
        let listener = crate::listener::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        std::thread::spawn(move || {
            runtime.block_on(async { server(TcpListener::from_std(listener).unwrap()).await });
        });
        address
    }

    /// Settles by a byte, which it answers, and stays.
    async fn connection(stream: TcpStream, settled: Settled) {
        let mut byte = [0];
        // Until it is there: readiness may be told too early.
        let read = stream.async_io(Interest::READABLE, || stream.try_read(&mut byte));
        assert_eq!(read.await.unwrap(), 1);
        settled.store(true, Ordering::Relaxed);
        assert_eq!(stream.try_write(&byte).unwrap(), 1);
        std::future::pending().await
    }

    #[test]
    fn who_has_settled_stays_longest() {
        let address = start(|listener| serve(listener, 4, connection));
        let connect = || {
            let stream = net::TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            stream
        };
        let settle = |mut stream: &net::TcpStream| {
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        };
        let first = connect();
        settle(&first);
        let silent: Vec<_> = (0..5).map(|_| connect()).collect();
        // Those that came before the last two are gone by now.
        let last = connect();
        settle(&last);
        for mut stream in &silent[..3] {
            let end = stream.read(&mut [0]);
            assert!(
                end.as_ref().is_ok_and(|count| *count == 0)
                    || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
            );
        }
        first.set_nonblocking(true).unwrap();
        assert_eq!((&first).read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    }
}
