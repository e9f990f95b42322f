//! The webhook as the API server meets it: the real program, over TLS, with the AdmissionReview of a real pod.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// The service's name, which the API server checks.
const NAME: &str = "sluice-webhook.sluice-system.svc";
const PATIENCE: Duration = Duration::from_secs(10);

/// A new certificate for the service, written where the secret is mounted.
fn renew(dir: &Path) -> CertificateDer<'static> {
    let signed = rcgen::generate_simple_self_signed([NAME.to_owned()]).unwrap();
    fs::write(dir.join("tls.crt"), signed.cert.pem()).unwrap();
    fs::write(dir.join("tls.key"), signed.signing_key.serialize_pem()).unwrap();
    signed.cert.der().clone()
}

struct Webhook {
    child: Child,
    // Open as long as the webhook runs, which logs there.
    _log: BufReader<ChildStderr>,
    address: SocketAddr,
}

impl Webhook {
    fn start(tls: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-webhook"));
        command.env_clear().args(["--listen", "127.0.0.1:0", "--tls"]).arg(tls).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        log.read_line(&mut line).unwrap();
        let address = line.rsplit(' ').next().unwrap().trim().parse().unwrap_or_else(|_| panic!("{line}"));
        Self { child, _log: log, address }
    }

    /// Sends something, trusting `root` alone.
    async fn connect(&self, root: &CertificateDer<'static>, what: &[u8]) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(self.address).await?;
        let mut stream =
            TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(NAME).unwrap(), stream).await?;
        stream.write_all(what).await?;
        Ok(stream)
    }

    /// Sends a request, and has it answered.
    async fn call(&self, root: &CertificateDer<'static>, request: &[u8]) -> std::io::Result<(u16, Vec<u8>)> {
        let mut stream = self.connect(root, request).await?;
        let mut answer = Vec::new();
        // The server ends the connection without ceremony when it refuses a body.
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await?;
        let text = String::from_utf8_lossy(&answer);
        let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap();
        let body = text.split_once("\r\n\r\n").map(|(_, body)| body.as_bytes().to_vec());
        Ok((status, body.unwrap()))
    }

    async fn post(&self, root: &CertificateDer<'static>, body: &[u8]) -> (u16, Vec<u8>) {
        let head = format!(
            "POST /mutate?timeout=5s HTTP/1.1\r\nHost: {NAME}\r\nContent-Type: application/json\r\n\
             Connection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.call(root, &[head.as_bytes(), body].concat()).await.unwrap()
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";

#[tokio::test]
async fn a_pod_is_patched() {
    let dir = tempfile::tempdir().unwrap();
    let root = renew(dir.path());
    let webhook = Webhook::start(dir.path());
    let review = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/review.json")).unwrap();
    let (status, body) = webhook.post(&root, &review).await;
    assert_eq!(status, 200);
    let answer: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(answer["apiVersion"], "admission.k8s.io/v1");
    assert_eq!(answer["kind"], "AdmissionReview");
    let response = &answer["response"];
    assert_eq!(response["uid"], "705ab4f5-6393-11e8-b7cc-42010a800002");
    assert_eq!((&response["allowed"], &response["patchType"]), (&Value::Bool(true), &"JSONPatch".into()));
    let patch = STANDARD.decode(response["patch"].as_str().unwrap()).unwrap();
    let patch: Vec<Value> = serde_json::from_slice(&patch).unwrap();
    let paths: Vec<_> = patch.iter().map(|operation| operation["path"].as_str().unwrap()).collect();
    let expected = [
        "/spec/volumes/-",
        "/spec/containers/1/volumeMounts/-",
        "/spec/containers/1/env/-",
        "/spec/containers/1/env/-",
        "/spec/containers/0/volumeMounts/-",
    ];
    assert_eq!(paths, expected);
}

#[tokio::test]
async fn other_requests_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = renew(dir.path());
    let webhook = Webhook::start(dir.path());
    assert_eq!(webhook.call(&root, HEALTH).await.unwrap(), (200, b"ok\n".to_vec()));
    assert_eq!(webhook.post(&root, b"{}").await.0, 400);
    assert_eq!(webhook.call(&root, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap().0, 404);
    let large = format!("POST /mutate HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", 100 << 20);
    match webhook.call(&root, &[large.as_bytes(), &vec![b' '; 9 << 20]].concat()).await {
        Ok((status, body)) => assert_eq!(status, 400, "{}", String::from_utf8_lossy(&body)),
        // It may hang up before all is sent, and what it said is lost then.
        Err(error) => assert!(matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof), "{error}"),
    }
    // Somebody who does not speak TLS harms nobody.
    let mut stranger = TcpStream::connect(webhook.address).await.unwrap();
    stranger.write_all(b"GET /healthz HTTP/1.1\r\n\r\n").await.unwrap();
    let _silent = TcpStream::connect(webhook.address).await.unwrap();
    assert_eq!(webhook.call(&root, HEALTH).await.unwrap().0, 200);
}

#[tokio::test]
async fn clients_that_stay_keep_nobody_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let root = renew(dir.path());
    let webhook = Webhook::start(dir.path());
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(webhook.address).await.unwrap());
    }
    let answered = tokio::time::timeout(PATIENCE / 2, webhook.call(&root, HEALTH)).await;
    assert_eq!(answered.unwrap().unwrap().0, 200);
}

impl Webhook {
    /// The most memory it has used, in MiB.
    fn peak(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() >> 10
    }
}

/// Bodies that are many small things, or one large one; all at once, and below the pod's limit of 64 MiB.
#[tokio::test]
async fn large_bodies_do_not_fill_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    let root = renew(dir.path());
    let webhook = Webhook::start(dir.path());
    let pod = |spec: &str| {
        let object = format!(r#"{{"metadata":{{"labels":{{"kubevirt.io":"virt-launcher"}}}},"spec":{spec}}}"#);
        format!(r#"{{"apiVersion":"admission.k8s.io/v1","request":{{"uid":"u","object":{object}}}}}"#).into_bytes()
    };
    let many = |thing: &str, size: usize| vec![thing; size / (thing.len() + 1)].join(",");
    let size = 7 << 20;
    let bodies = [
        pod(&format!(r#"{{"containers":[{}]}}"#, many("{}", size))),
        pod(&format!(r#"{{"volumes":[{}]}}"#, many(r#"{"name":""}"#, size))),
        pod(&format!(r#"{{"other":[{}]}}"#, many("[]", size))),
        pod(&format!(r#"{{"containers":[{{"name":"{}"}}]}}"#, "\\n".repeat(size / 2))),
    ];
    let webhook = Arc::new(webhook);
    let mut calls = tokio::task::JoinSet::new();
    for (number, body) in bodies.iter().enumerate().chain(bodies.iter().enumerate()) {
        let (webhook, root, body) = (webhook.clone(), root.clone(), body.clone());
        calls.spawn(async move { (number, webhook.post(&root, &body).await.0) });
    }
    let mut answers = calls.join_all().await;
    // A debug build is slow, so the time may be up for the last ones; but then they are told, and come again.
    for (number, body) in bodies.iter().enumerate() {
        for _ in 0..3 {
            if !answers.contains(&(number, 200)) {
                answers.push((number, webhook.post(&root, body).await.0));
            }
        }
        assert!(answers.contains(&(number, 200)), "never answered: {number} of {answers:?}");
    }
    assert!(answers.iter().all(|(_, status)| [200, 408].contains(status)), "{answers:?}");
    assert!(webhook.peak() < 56, "{} MiB", webhook.peak());
    // Those of a usual size do not wait for large ones that do not come.
    let head = "POST /mutate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n";
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(webhook.connect(&root, head.as_bytes()).await.unwrap());
    }
    let answered = tokio::time::timeout(PATIENCE / 2, webhook.post(&root, &pod("{}"))).await;
    assert_eq!(answered.unwrap().0, 200);
}

#[tokio::test]
async fn a_renewed_certificate_is_used_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let old = renew(dir.path());
    let webhook = Webhook::start(dir.path());
    // Half a change: the new key with the old certificate. The old pair stays in use.
    let certificate = fs::read(dir.path().join("tls.crt")).unwrap();
    renew(dir.path());
    fs::write(dir.path().join("tls.crt"), certificate).unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(webhook.call(&old, HEALTH).await.unwrap().0, 200);

    let new = renew(dir.path());
    let started = Instant::now();
    while webhook.call(&new, HEALTH).await.is_err() {
        assert!(started.elapsed() < PATIENCE, "the new certificate is not used");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(webhook.call(&old, HEALTH).await.is_err());
}

#[test]
fn a_missing_certificate_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_sluice-webhook")).arg("--tls").arg(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(complaint.starts_with("sluice-webhook: cannot read") && complaint.lines().count() == 1, "{complaint}");
}
