//! Which certificates we trust and show when we speak TLS with Redis. There is no way to leave the check out.

use std::{fs, path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use crate::{address::Access, error::QueueError};

/// Reads the files once. The process' own default provider is not asked, so that nobody need install one first.
pub(crate) fn client_config(access: &Access) -> Result<Arc<ClientConfig>, QueueError> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = &access.ca {
        for certificate in certificates("FLOTILLA_REDIS_CA", path)? {
            roots.add(certificate).map_err(|error| refused("FLOTILLA_REDIS_CA", path, error))?;
        }
    } else {
        // Some of a system's certificates may be unreadable or odd; the rest still counts.
        let (added, ignored) =
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        tracing::debug!(added, ignored, "certificate authorities of the system");
        if added == 0 {
            return Err(QueueError::Config {
                setting: "FLOTILLA_REDIS_CA",
                value: String::new(),
                allowed: "this machine has no certificate authorities of its own: name a PEM file",
            });
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| QueueError::Start(format!("TLS: {error}")))?
        .with_root_certificates(roots);
    let config = match (&access.certificate, &access.key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(chain), Some(key)) => {
            let text = read("FLOTILLA_REDIS_KEY", key)?;
            let private = PrivateKeyDer::from_pem_slice(&text)
                .map_err(|error| refused("FLOTILLA_REDIS_KEY", key, error))?;
            builder
                .with_client_auth_cert(certificates("FLOTILLA_REDIS_CERT", chain)?, private)
                .map_err(|error| refused("FLOTILLA_REDIS_CERT", chain, error))?
        }
        (chain, _) => {
            let (setting, present) = match chain {
                Some(_) => ("FLOTILLA_REDIS_KEY", "FLOTILLA_REDIS_CERT"),
                None => ("FLOTILLA_REDIS_CERT", "FLOTILLA_REDIS_KEY"),
            };
            return Err(QueueError::Config {
                setting,
                value: format!("(not set, although {present} is)"),
                allowed: "a certificate and its key belong together",
            });
        }
    };
    Ok(Arc::new(config))
}

fn certificates(setting: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, QueueError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(&read(setting, path)?)
        .collect::<Result<_, _>>()
        .map_err(|error| refused(setting, path, error))?;
    if found.is_empty() {
        return Err(refused(setting, path, "no certificate in it"));
    }
    Ok(found)
}

fn read(setting: &'static str, path: &Path) -> Result<Vec<u8>, QueueError> {
    fs::read(path).map_err(|error| refused(setting, path, error))
}

fn refused(setting: &'static str, path: &Path, error: impl std::fmt::Display) -> QueueError {
    QueueError::Config {
        setting,
        value: format!("{} ({error})", path.display()),
        allowed: "a PEM file that this process can read is needed",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn files_that_are_missing_or_empty_are_named_with_their_setting() {
        let missing = Access { ca: Some("/nowhere/ca.pem".into()), ..Access::default() };
        let error = client_config(&missing).unwrap_err().to_string();
        assert!(error.contains("FLOTILLA_REDIS_CA is \"/nowhere/ca.pem (No such file"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        fs::write(&path, "not a certificate\n").unwrap();
        let error = client_config(&Access { ca: Some(path), ..Access::default() }).unwrap_err().to_string();
        assert!(error.contains("no certificate in it"), "{error}");
    }

    #[test]
    fn a_certificate_without_its_key_is_refused() {
        let access = Access { key: Some("key.pem".into()), ..Access::default() };
        // Without a CA file of its own the system's may be missing, which is another error.
        if let Err(error) = client_config(&access) {
            let text = error.to_string();
            assert!(text.contains("FLOTILLA_REDIS_CERT") || text.contains("FLOTILLA_REDIS_CA"), "{text}");
        }
    }
}
