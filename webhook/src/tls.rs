//! The certificate, from a mounted secret that is renewed while the webhook runs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

/// Names that a secret of type `kubernetes.io/tls` has for its files.
const FILES: [&str; 2] = ["tls.crt", "tls.key"];

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {source}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// The two files do not belong together, or are of a kind that is not supported.
    #[error("certificate and key in {path}: {source}")]
    Unusable {
        /// Their folder.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// The certificate of now. It is read anew by [`Certificate::watch`].
#[derive(Debug)]
pub struct Certificate {
    dir: PathBuf,
    provider: Arc<CryptoProvider>,
    current: RwLock<Current>,
}

#[derive(Debug, Clone)]
struct Current {
    files: [Vec<u8>; 2],
    key: Arc<CertifiedKey>,
}

impl Certificate {
    /// Reads `tls.crt` and `tls.key` in `dir`.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn read(dir: &Path) -> Result<Arc<Self>, CertificateError> {
        let provider = Arc::new(ring::default_provider());
        let current = load(dir, &provider, read_files(dir)?)?;
        Ok(Arc::new(Self { dir: dir.into(), provider, current: RwLock::new(current) }))
    }

    /// What a server needs that shows this certificate.
    ///
    /// # Errors
    /// If the cryptography library lacks the usual versions of TLS.
    pub fn server_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let builder =
            ServerConfig::builder_with_provider(self.provider.clone()).with_safe_default_protocol_versions()?;
        Ok(Arc::new(builder.with_no_client_auth().with_cert_resolver(self.clone())))
    }

    /// Looks every `interval` whether the files have changed. A pair that cannot be used changes nothing.
    pub async fn watch(self: Arc<Self>, interval: Duration) {
        loop {
            tokio::time::sleep(interval).await;
            match self.refresh() {
                Ok(true) => tracing::info!("the certificate in {} is a new one", self.dir.display()),
                Ok(false) => {}
                Err(error) => tracing::warn!("keeping the certificate there was: {error}"),
            }
        }
    }

    /// Reads the files again; whether they had changed.
    fn refresh(&self) -> Result<bool, CertificateError> {
        let files = read_files(&self.dir)?;
        if self.current.read().unwrap_or_else(PoisonError::into_inner).files == files {
            return Ok(false);
        }
        let new = load(&self.dir, &self.provider, files)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(true)
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(PoisonError::into_inner).key.clone())
    }
}

fn read_files(dir: &Path) -> Result<[Vec<u8>; 2], CertificateError> {
    let read = |name| {
        let path = dir.join(name);
        std::fs::read(&path).map_err(|source| CertificateError::Read { path, source })
    };
    let [certificate, key] = FILES;
    Ok([read(certificate)?, read(key)?])
}

fn load(dir: &Path, provider: &CryptoProvider, files: [Vec<u8>; 2]) -> Result<Current, CertificateError> {
    let wrong = |name: &str, source| CertificateError::Pem { path: dir.join(name), source };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&files[0]).collect();
    let chain = chain.map_err(|source| wrong(FILES[0], source))?;
    if chain.is_empty() {
        return Err(wrong(FILES[0], pem::Error::NoItemsFound));
    }
    let key = PrivateKeyDer::from_pem_slice(&files[1]).map_err(|source| wrong(FILES[1], source))?;
    // It checks that the two belong together, which they do not while a secret is half changed.
    let key = CertifiedKey::from_der(chain, key, provider);
    let key = key.map_err(|source| CertificateError::Unusable { path: dir.into(), source })?;
    Ok(Current { files, key: Arc::new(key) })
}
