//! The edge's half of enrolment: make a key, ask, and check what comes back.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use zeroize::Zeroizing;

use crate::authority::{self, AuthorityError};
use crate::files::{self, FileError, KeyFile};
use crate::identity::{self, Identity, IdentityError, Role, certificate_fingerprint};
use crate::trust;

/// Why enrolment cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrolError {
    /// The key or the certificate is no good.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No key or request could be made.
    #[error("cannot make a key and a certificate request: {0}")]
    Make(String),
    /// The request is damaged.
    #[error("the certificate request is no good: {0}")]
    Request(String),
    /// The certificate was not issued by the authority that came with it.
    #[error("the aggregator sent a certificate that the authority of edges did not issue: {0}")]
    NotIssued(String),
}

impl From<FileError> for EnrolError {
    fn from(error: FileError) -> Self {
        Self::Identity(error.into())
    }
}

/// A key made on the edge that waits for its certificate.
///
/// It is on disk *before* the request is sent ([`PendingIdentity::load_or_generate`]), so that an edge whose answer
/// was lost asks again with the same key, and the same token then gives the same certificate.
pub struct PendingIdentity {
    key: KeyPair,
}

impl PendingIdentity {
    /// Makes a key (P-256) without storing it.
    ///
    /// # Errors
    /// [`EnrolError::Make`].
    pub fn generate() -> Result<Self, EnrolError> {
        Ok(Self {
            key: KeyPair::generate().map_err(|error| EnrolError::Make(error.to_string()))?,
        })
    }

    /// The key in `DIR/NAME.pending.pem`; made and stored there (mode 0600) when there is none.
    ///
    /// # Errors
    /// [`EnrolError::Identity`] when the file cannot be used, [`EnrolError::Make`].
    pub fn load_or_generate(dir: &Path, name: &str) -> Result<Self, EnrolError> {
        let path = pending_path(dir, name);
        if path.exists() {
            return Ok(Self {
                key: identity::key_pair(&files::load_key(&path)?.key)?,
            });
        }
        let pending = Self::generate()?;
        let key = Zeroizing::new(pending.key.serialized_der().to_vec());
        files::save_key(
            &path,
            &KeyFile {
                key,
                certificates: Vec::new(),
            },
            None,
        )?;
        Ok(pending)
    }

    /// Removes `DIR/NAME.pending.pem`: after the identity is saved, or to begin anew.
    ///
    /// # Errors
    /// [`EnrolError::Identity`].
    pub fn discard(dir: &Path, name: &str) -> Result<(), EnrolError> {
        Ok(files::remove(&pending_path(dir, name))?)
    }

    /// A certificate request (PKCS#10, DER): the key and a proof that we hold it, no name.
    ///
    /// # Errors
    /// [`EnrolError::Make`].
    pub fn csr_der(&self) -> Result<Vec<u8>, EnrolError> {
        authority::make_csr(&self.key).map_err(|error| match error {
            AuthorityError::Issue(text) => EnrolError::Make(text),
            other => EnrolError::Make(other.to_string()),
        })
    }

    /// Makes an identity of the answer: the certificate must be for our key, for an edge, and issued by
    /// `edge_authority_der`.
    ///
    /// # Errors
    /// [`EnrolError::Identity`] for a foreign key or name, [`EnrolError::NotIssued`].
    pub fn complete(
        &self,
        certificate_der: &[u8],
        edge_authority_der: &[u8],
    ) -> Result<Identity, EnrolError> {
        let key = Zeroizing::new(self.key.serialized_der().to_vec());
        let identity = Identity::new(key, certificate_der.to_vec(), edge_authority_der.to_vec())?;
        if identity.name().role != Role::Edge {
            let found = identity.name().role;
            return Err(IdentityError::WrongRole {
                expected: Role::Edge,
                found,
            }
            .into());
        }
        check_issued(&identity)?;
        Ok(identity)
    }
}

impl std::fmt::Debug for PendingIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingIdentity")
            .field("key", &"[redacted]")
            .finish()
    }
}

/// SHA-256 of the public key in a certificate request whose own signature was checked. It equals
/// [`crate::public_key_fingerprint`] of the certificate that the request gets.
///
/// # Errors
/// [`EnrolError::Request`].
pub fn csr_public_key_fingerprint(csr_der: &[u8]) -> Result<[u8; 32], EnrolError> {
    let key = authority::csr_public_key(csr_der).map_err(EnrolError::Request)?;
    Ok(certificate_fingerprint(&key.subject_public_key_info()))
}

/// Checks signature, usage and constraints at the first moment of the certificate's life, so that a wrong clock on
/// this host does not hide the real reason.
fn check_issued(identity: &Identity) -> Result<(), EnrolError> {
    let not_issued = |error: webpki::Error| EnrolError::NotIssued(error.to_string());
    let certificate = CertificateDer::from(identity.certificate_der());
    let authority = CertificateDer::from(identity.authority_der());
    let anchor = webpki::anchor_from_trusted_cert(&authority).map_err(not_issued)?;
    let begin = identity
        .validity()
        .not_before
        .duration_since(std::time::UNIX_EPOCH);
    let time = UnixTime::since_unix_epoch(begin.unwrap_or(Duration::ZERO));
    let algorithms = trust::provider().signature_verification_algorithms.all;
    EndEntityCert::try_from(&certificate)
        .map_err(not_issued)?
        .verify_for_usage(
            algorithms,
            &[anchor],
            &[],
            time,
            KeyUsage::client_auth(),
            None,
            None,
        )
        .map_err(not_issued)?;
    Ok(())
}

fn pending_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.pending.pem"))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use theriac_protocol::units::NodeId;

    use super::*;
    use crate::authority::{Authority, LEAF_LIFETIME};
    use crate::identity::public_key_fingerprint;

    fn edges() -> Authority {
        Authority::generate("plant", Role::Edge, SystemTime::now()).unwrap()
    }

    fn sign(authority: &Authority, pending: &PendingIdentity) -> Vec<u8> {
        let node = NodeId::new("press-1").unwrap();
        authority
            .sign_csr(
                &pending.csr_der().unwrap(),
                &node,
                SystemTime::now(),
                LEAF_LIFETIME,
            )
            .unwrap()
    }

    #[test]
    fn a_request_becomes_an_identity() {
        let (authority, pending) = (edges(), PendingIdentity::generate().unwrap());
        let certificate = sign(&authority, &pending);
        let identity = pending
            .complete(&certificate, authority.certificate_der())
            .unwrap();
        assert_eq!(identity.name().to_string(), "spiffe://plant/edge/press-1");
        let asked = csr_public_key_fingerprint(&pending.csr_der().unwrap()).unwrap();
        assert_eq!(asked, public_key_fingerprint(&certificate).unwrap());
    }

    #[test]
    fn refuses_a_certificate_of_another_key_or_another_authority() {
        let (authority, pending) = (edges(), PendingIdentity::generate().unwrap());
        let foreign_key = sign(&authority, &PendingIdentity::generate().unwrap());
        let refused = pending.complete(&foreign_key, authority.certificate_der());
        assert!(matches!(
            refused,
            Err(EnrolError::Identity(IdentityError::WrongKey { .. }))
        ));
        let refused = pending.complete(&sign(&authority, &pending), edges().certificate_der());
        assert!(matches!(refused, Err(EnrolError::NotIssued(_))));
    }

    #[test]
    fn the_pending_key_stays_the_same_until_discarded() {
        let dir = tempfile::tempdir().unwrap();
        let fingerprint = || {
            let pending = PendingIdentity::load_or_generate(dir.path(), "identity").unwrap();
            csr_public_key_fingerprint(&pending.csr_der().unwrap()).unwrap()
        };
        let first = fingerprint();
        assert_eq!(first, fingerprint());
        PendingIdentity::discard(dir.path(), "identity").unwrap();
        PendingIdentity::discard(dir.path(), "identity").unwrap();
        assert_ne!(first, fingerprint());
    }
}
