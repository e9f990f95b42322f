//! Connections of a server that anybody on the network may call.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Pause after a connection could not be accepted, so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves connections, each in a task of its own, until the runtime ends. If there are more than `limit`, the oldest goes: the
/// newest may be the kubelet, who ends a process that does not answer.
pub async fn serve<F>(listener: TcpListener, limit: usize, connection: impl Fn(TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut served: VecDeque<JoinHandle<()>> = VecDeque::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        served.retain(|task| !task.is_finished());
        if served.len() >= limit
            && let Some(oldest) = served.pop_front()
        {
            oldest.abort();
        }
        served.push_back(tokio::spawn(connection(stream)));
        // It has its turn before others can take its place.
        tokio::task::yield_now().await;
    }
}
