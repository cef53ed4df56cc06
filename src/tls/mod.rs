//! TLS towards callers: certificate, key and the callers' CAs, read anew when their files change.

mod certificate;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use aws_lc_rs::digest::{Context, SHA256};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use thiserror::Error;
use tokio::task;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use zeroize::Zeroizing;

pub use self::certificate::PeerIdentity;
use crate::domain::clock::{Clock, Timestamp};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// The end of a certificate that is nearer than this is warned of at each load.
const ENDS_SOON: chrono::TimeDelta = chrono::TimeDelta::days(7);

/// Where what TLS is served with lies, all of it PEM.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TlsFiles {
    /// The certificate and what links it to its CA.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The CAs of callers' certificates; without it, callers show bearers alone.
    pub client_ca: Option<PathBuf>,
}

/// Why TLS cannot be served with these files. No message holds a key.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{file}: {error}")]
    Io {
        /// Which.
        file: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{file}: {why}")]
    Malformed {
        /// Which.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Certificate and key are sound, and not each other's; or the library refuses them.
    #[error("{cert} and {key} cannot be used: {why}")]
    Refused {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// Why.
        why: String,
    },
}

/// What TLS is served with at present.
pub struct Tls {
    files: TlsFiles,
    config: ArcSwap<ServerConfig>,
    not_after: AtomicI64,
    clock: Clock,
}

/// The files as they were read.
struct Read {
    cert: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Option<Vec<u8>>,
}

/// What was made of them.
struct Loaded {
    config: ServerConfig,
    not_after: Timestamp,
}

impl Tls {
    /// Reads the files. Blocks on I/O.
    ///
    /// # Errors
    /// Names the file at fault.
    pub fn load(files: TlsFiles, clock: Clock) -> Result<Self, TlsError> {
        let loaded = Read::of(&files)?.load(&files)?;
        let tls = Self {
            files,
            config: ArcSwap::from_pointee(loaded.config),
            not_after: AtomicI64::new(loaded.not_after.timestamp()),
            clock,
        };
        tls.warn_of_end(loaded.not_after);
        Ok(tls)
    }

    /// What the next connection is served with.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        self.config.load_full()
    }

    /// When our certificate ends, in seconds since 1970.
    #[must_use]
    pub fn not_after(&self) -> i64 {
        self.not_after.load(Ordering::Relaxed)
    }

    /// Takes up what the files hold when they change, until `stop`. Files that cannot be used change
    /// nothing: the present ones stay in use, and the fault is logged once.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut seen = None;
        loop {
            let this = Arc::clone(&self);
            // Its end can only be a panic, after which the next look is tried.
            let look = task::spawn_blocking(move || this.look(seen)).await;
            seen = look.ok().or(seen);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Looks at the files once; what they were, by a hash. Of the first look nothing is made: it was
    /// loaded.
    fn look(&self, seen: Option<[u8; 32]>) -> [u8; 32] {
        const UNREADABLE: [u8; 32] = [0; 32];
        let read = Read::of(&self.files);
        let hash = read.as_ref().map_or(UNREADABLE, Read::hash);
        if seen.is_none_or(|seen| seen == hash) {
            return hash;
        }
        match read.and_then(|read| read.load(&self.files)) {
            Ok(Loaded { config, not_after }) => {
                self.config.store(Arc::new(config));
                self.not_after.store(not_after.timestamp(), Ordering::Relaxed);
                info!(cert = %self.files.cert.display(), ends = %not_after, "TLS files were read anew");
                self.warn_of_end(not_after);
            }
            Err(error) => {
                error!(%error, "TLS files have changed and cannot be used: those before stay");
            }
        }
        hash
    }

    fn warn_of_end(&self, not_after: Timestamp) {
        if not_after - self.clock.now() < ENDS_SOON {
            warn!(cert = %self.files.cert.display(), ends = %not_after, "the certificate ends soon");
        }
    }
}

impl Read {
    fn of(files: &TlsFiles) -> Result<Self, TlsError> {
        let read = |file: &Path| {
            fs::read(file).map_err(|error| TlsError::Io { file: file.to_owned(), error })
        };
        Ok(Self {
            cert: read(&files.cert)?,
            key: Zeroizing::new(read(&files.key)?),
            client_ca: files.client_ca.as_deref().map(read).transpose()?,
        })
    }

    /// What tells one content from another, without keeping the key.
    fn hash(&self) -> [u8; 32] {
        let mut context = Context::new(&SHA256);
        for part in [&self.cert, &*self.key, self.client_ca.as_ref().unwrap_or(&Vec::new())] {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        let mut hash = [0; 32];
        hash.copy_from_slice(context.finish().as_ref());
        hash
    }

    fn load(&self, files: &TlsFiles) -> Result<Loaded, TlsError> {
        let chain = certificates(&files.cert, &self.cert)?;
        let not_after = certificate::not_after(&chain[0])
            .ok_or_else(|| malformed(&files.cert, "the certificate cannot be read"))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| malformed(&files.key, "it holds no private key in PEM"))?;
        let refused = |error: rustls::Error| TlsError::Refused {
            cert: files.cert.clone(),
            key: files.key.clone(),
            why: error.to_string(),
        };
        let provider = Arc::new(default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(refused)?;
        let builder = match files.client_ca.as_deref().zip(self.client_ca.as_deref()) {
            None => builder.with_no_client_auth(),
            Some((file, pem)) => {
                let mut roots = RootCertStore::empty();
                for ca in certificates(file, pem)? {
                    roots.add(ca).map_err(|error| malformed(file, &error.to_string()))?;
                }
                // A caller without a certificate shows a bearer.
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                    .allow_unauthenticated()
                    .build()
                    .map_err(|error| malformed(file, &error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(refused)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Loaded { config, not_after })
    }
}

/// The certificates in a file, of which there must be one.
fn certificates(file: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(malformed(file, "it holds no certificate in PEM")),
        Err(error) => Err(malformed(file, &format!("it is no PEM: {error}"))),
    }
}

fn malformed(file: &Path, why: &str) -> TlsError {
    TlsError::Malformed { file: file.to_owned(), why: why.to_owned() }
}
