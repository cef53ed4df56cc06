//! The TLS configuration, which is made anew when its files change.

use std::{
    fs,
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
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    time_provider::TimeProvider,
};
use tokio::task;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use zeroize::Zeroizing;

use super::{
    certificate,
    client_verifier::ListedClientVerifier,
    error::{TlsError, malformed, pem_fault},
    revocation::{self, RevocationList, UnlistedCas},
};
use crate::{
    domain::clock::{Clock, Timestamp},
    files::text,
};

/// How often the files are read and compared with those in use.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// A certificate that ends within this time causes a warning each time it is loaded.
const EXPIRY_WARNING: chrono::TimeDelta = chrono::TimeDelta::days(7);

/// The PEM files that the TLS configuration is made from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TlsFiles {
    /// The certificate, followed by the intermediate certificates that link it to its CA.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The CAs of callers' certificates. Without this file, callers can only use bearers.
    pub client_ca: Option<PathBuf>,
    /// Lists of revoked certificates, each signed by the CA that issued the certificates.
    pub client_crl: Option<PathBuf>,
}

/// The TLS configuration in use, and the files that it came from.
pub struct Tls {
    files: TlsFiles,
    pub(super) current: ArcSwap<Loaded>,
    /// The end of the certificate, in seconds since 1970.
    not_after: AtomicI64,
    pub(super) clock: Clock,
    /// The hash of the files that [`Tls::load`] read.
    first_hash: [u8; 32],
}

/// The content of the files.
struct FileContents {
    cert: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Option<Vec<u8>>,
    client_crl: Option<Vec<u8>>,
}

/// The configuration that the files give.
pub(super) struct Loaded {
    config: Arc<ServerConfig>,
    /// Verifies the certificates of callers, as the configuration does during a handshake.
    pub(super) client_verifier: Option<Arc<dyn ClientCertVerifier>>,
    revocation_lists: Vec<RevocationList>,
    unlisted: UnlistedCas,
    not_after: Timestamp,
    /// The first configuration has the number 0; each reload adds one.
    pub(super) generation: u64,
}

/// Lets handshakes take the time from the broker's clock.
#[derive(Debug)]
struct HandshakeTime(Clock);

impl TimeProvider for HandshakeTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(certificate::unix_time(self.0.utc()))
    }
}

impl Tls {
    /// Reads the files. Blocks on disk.
    ///
    /// # Errors
    /// [`TlsError`], which names the faulty file.
    pub fn load(files: TlsFiles, clock: Clock) -> Result<Self, TlsError> {
        let contents = FileContents::of(&files)?;
        let loaded = contents.load(&files, &clock, 0)?;
        let tls = Self {
            first_hash: contents.hash(),
            files,
            not_after: AtomicI64::new(loaded.not_after.timestamp()),
            current: ArcSwap::from_pointee(loaded),
            clock,
        };
        tls.warn_of_what_ends();
        Ok(tls)
    }

    /// Returns the configuration for the next connection.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.load().config)
    }

    /// Returns the lists of revoked certificates.
    #[must_use]
    pub fn revocation_lists(&self) -> Vec<RevocationList> {
        self.current.load().revocation_lists.clone()
    }

    /// Returns the CAs that have no revocation list, or only such that write their name in another way. Empty if there
    /// are no lists at all.
    #[must_use]
    pub fn unlisted_cas(&self) -> UnlistedCas {
        self.current.load().unlisted.clone()
    }

    /// Returns the end of the broker's certificate, in seconds since 1970.
    #[must_use]
    pub fn not_after(&self) -> i64 {
        self.not_after.load(Ordering::Relaxed)
    }

    /// Reloads the files when their content changes, until `stop`. If the new files cannot be used, the
    /// configuration in use stays, and the fault is logged once.
    pub async fn reload_on_change(self: Arc<Self>, stop: CancellationToken) {
        let mut seen = self.first_hash;
        loop {
            let this = Arc::clone(&self);
            // The task fails only if it panics. Then the next poll tries again.
            let polled = task::spawn_blocking(move || this.poll(seen)).await;
            seen = polled.unwrap_or(seen);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    }

    /// Reloads the files now, whether or not they have changed, and logs the outcome. If they cannot be used, the
    /// configuration in use stays. Cancel safe.
    pub async fn reload(self: &Arc<Self>) {
        let this = Arc::clone(self);
        // No files have this hash. The task fails only if it panics.
        let _ = task::spawn_blocking(move || this.poll([0xff; 32])).await;
    }

    /// Reads the files, and loads them if their hash differs from `seen`. Returns their hash.
    fn poll(&self, seen: [u8; 32]) -> [u8; 32] {
        const UNREADABLE: [u8; 32] = [0; 32];
        let read = FileContents::of(&self.files);
        let hash = read.as_ref().map_or(UNREADABLE, FileContents::hash);
        if seen == hash {
            return hash;
        }
        let generation = self.current.load().generation + 1;
        match read.and_then(|read| read.load(&self.files, &self.clock, generation)) {
            Ok(loaded) => {
                let not_after = loaded.not_after;
                self.current.store(Arc::new(loaded));
                self.not_after.store(not_after.timestamp(), Ordering::Relaxed);
                info!(cert = %self.files.cert.display(), ends = %not_after, "the TLS files were reloaded");
                self.warn_of_what_ends();
            }
            Err(error) => {
                error!(%error, "the TLS files have changed and cannot be used; the previous ones stay in use");
            }
        }
        hash
    }

    /// Warns of a certificate that ends soon, and of revocation lists that are out of date or missing.
    fn warn_of_what_ends(&self) {
        let (current, now) = (self.current.load(), self.clock.wall());
        let ends = current.not_after;
        if ends - now < EXPIRY_WARNING {
            warn!(cert = %self.files.cert.display(), %ends, "the certificate ends soon");
        }
        for list in current.revocation_lists.iter().filter(|list| list.is_out_of_date(now)) {
            warn!(
                issuer = list.issuer,
                "a certificate revocation list is out of date; it still counts"
            );
        }
        for (list, scope) in
            current.revocation_lists.iter().filter_map(|list| Some((list, list.scope.as_ref()?)))
        {
            info!(
                issuer = list.issuer,
                %scope,
                "a certificate revocation list is about a part of its CA's certificates; those that no list is \
                 about are refused"
            );
        }
        for ca in &current.unlisted.without_list {
            warn!(
                ca,
                "a CA has no certificate revocation list: its certificates cannot be revoked"
            );
        }
        for ca in &current.unlisted.misnamed {
            warn!(
                ca,
                "the certificate revocation lists of a CA write its name in another encoding or case: all its \
                 certificates are refused"
            );
        }
    }
}

impl FileContents {
    fn of(files: &TlsFiles) -> Result<Self, TlsError> {
        let read = |what, file: &Path| {
            fs::read(file)
                .and_then(|bytes| Ok(text::to_utf8(bytes)?.to_vec()))
                .map_err(|error| TlsError::Io { what, file: file.to_owned(), error })
        };
        let read_any =
            |what, file: &Option<PathBuf>| file.as_deref().map(|file| read(what, file)).transpose();
        Ok(Self {
            cert: read("the certificate", &files.cert)?,
            key: Zeroizing::new(read("the private key", &files.key)?),
            client_ca: read_any("the CAs of callers' certificates", &files.client_ca)?,
            client_crl: read_any("the revocation lists", &files.client_crl)?,
        })
    }

    /// Returns a hash of the contents, so that they can be compared without keeping the key in memory.
    fn hash(&self) -> [u8; 32] {
        let mut context = Context::new(&SHA256);
        let parts = [
            &*self.cert,
            &self.key,
            self.client_ca.as_deref().unwrap_or_default(),
            self.client_crl.as_deref().unwrap_or_default(),
        ];
        for part in parts {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        let mut hash = [0; 32];
        hash.copy_from_slice(context.finish().as_ref());
        hash
    }

    fn load(&self, files: &TlsFiles, clock: &Clock, generation: u64) -> Result<Loaded, TlsError> {
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
        let callers = self.load_client_auth(files)?;
        let provider = Arc::new(default_provider());
        let time = Arc::new(HandshakeTime(clock.clone()));
        let builder = ServerConfig::builder_with_details(provider, time)
            .with_safe_default_protocol_versions()
            .map_err(refused)?;
        let builder = match &callers.verifier {
            None => builder.with_no_client_auth(),
            Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier)),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(refused)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would not verify the client's certificate again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Loaded {
            config: Arc::new(config),
            client_verifier: callers.verifier,
            revocation_lists: callers.revocation_lists,
            unlisted: callers.unlisted,
            not_after,
            generation,
        })
    }

    /// Returns what verifies callers' certificates; nothing if there are no CAs for them.
    fn load_client_auth(&self, files: &TlsFiles) -> Result<ClientAuth, TlsError> {
        let Some((file, pem)) = files.client_ca.as_deref().zip(self.client_ca.as_deref()) else {
            return Ok(ClientAuth::default());
        };
        let cas = certificates(file, pem)?;
        let mut roots = RootCertStore::empty();
        for ca in &cas {
            roots.add(ca.clone()).map_err(|error| malformed(file, &error.to_string()))?;
        }
        let provider = Arc::new(default_provider());
        // A caller without a certificate can identify itself by a bearer.
        let mut builder = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
            .allow_unauthenticated();
        let mut auth = ClientAuth::default();
        let mut faulty_file = file;
        if let Some((file, pem)) = files.client_crl.as_deref().zip(self.client_crl.as_deref()) {
            let (lists, ders) = revocation::lists(file, pem)?;
            auth.unlisted = UnlistedCas::of(&cas, &lists);
            auth.revocation_lists = lists;
            // A CA without a list is trusted without one, so that one list can be added after another. That there is
            // none is for `ListedClientVerifier` to say.
            builder = builder.with_crls(ders).allow_unknown_revocation_status();
            faulty_file = file;
        }
        let verifier =
            builder.build().map_err(|error| malformed(faulty_file, &error.to_string()))?;
        let lists = auth.revocation_lists.clone();
        auth.verifier = Some(if lists.is_empty() {
            verifier
        } else {
            Arc::new(ListedClientVerifier::new(verifier, lists))
        });
        Ok(auth)
    }
}

/// What the files say about callers' certificates.
#[derive(Default)]
struct ClientAuth {
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    revocation_lists: Vec<RevocationList>,
    unlisted: UnlistedCas,
}

/// Returns the certificates in a PEM file. At least one is required.
fn certificates(file: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(malformed(file, "it holds no certificate in PEM")),
        Err(error) => Err(malformed(file, &format!("it is not PEM: {}", pem_fault(&error)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_certificate(files: &TlsFiles) {
        let names = vec!["broker.example".to_owned()];
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(names).unwrap();
        fs::write(&files.cert, cert.pem()).unwrap();
        fs::write(&files.key, signing_key.serialize_pem()).unwrap();
    }

    fn utf16(text: &str, unit: fn(u16) -> [u8; 2]) -> Vec<u8> {
        text.encode_utf16().flat_map(unit).collect()
    }

    #[test]
    fn files_of_windows_tools_are_read_or_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let [cert, key, ca] = ["cert.pem", "key.pem", "ca.pem"].map(|it| directory.path().join(it));
        let files = TlsFiles {
            cert: cert.clone(),
            key: key.clone(),
            client_ca: Some(ca.clone()),
            client_crl: None,
        };
        let encodings: [fn(&str) -> Vec<u8>; 3] = [
            |text| format!("\u{feff}{}", text.replace('\n', "\r\n")).into_bytes(),
            |text| utf16(&format!("\u{feff}{text}"), u16::to_le_bytes),
            |text| utf16(&format!("\u{feff}{text}"), u16::to_be_bytes),
        ];
        let load = || Tls::load(files.clone(), Clock::System);
        for encode in encodings {
            write_certificate(&files);
            fs::copy(&cert, &ca).unwrap();
            for file in [&cert, &key, &ca] {
                let text = fs::read_to_string(file).unwrap();
                fs::write(file, encode(&text)).unwrap();
                load().unwrap();
            }
        }
        for file in [&cert, &key, &ca] {
            let good = fs::read(file).unwrap();
            fs::write(file, utf16("-----BEGIN", u16::to_le_bytes)).unwrap();
            let error = load().err().unwrap().to_string();
            assert!(error.contains(file.to_str().unwrap()), "{error}");
            assert!(error.contains("UTF-16 without a byte order mark"), "{error}");
            fs::write(file, good).unwrap();
        }
    }

    #[test]
    fn files_that_changed_before_the_first_poll_are_reloaded_once() {
        let directory = tempfile::tempdir().unwrap();
        let files = TlsFiles {
            cert: directory.path().join("cert.pem"),
            key: directory.path().join("key.pem"),
            client_ca: None,
            client_crl: None,
        };
        write_certificate(&files);
        let tls = Tls::load(files.clone(), Clock::System).unwrap();
        let first = tls.config();
        let seen = tls.poll(tls.first_hash);
        assert!(Arc::ptr_eq(&first, &tls.config()), "the files have not changed");

        write_certificate(&files);
        let seen_after = tls.poll(seen);
        let second = tls.config();
        assert!(!Arc::ptr_eq(&first, &second));
        assert_eq!(tls.poll(seen_after), seen_after);
        assert!(Arc::ptr_eq(&second, &tls.config()));
        assert_ne!(tls.first_hash, seen_after);
    }
}
