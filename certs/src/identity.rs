//! A key with its certificate, and the name that a certificate gives.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::PublicKeyData;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use sha2::{Digest as _, Sha256};
use theriac_protocol::units::{NodeId, UnitError};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;
use zeroize::Zeroizing;

use crate::authority::Validity;
use crate::files::{self, FileError, KeyFile};

/// Longest federation name, in bytes.
pub const FEDERATION_LEN_MAX: usize = 63;

/// What a peer is. It decides who issued its certificate and which end of a connection it may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// One site.
    Edge,
    /// The fleet's server.
    Aggregator,
    /// A person with a command line.
    Operator,
}

impl Role {
    /// The word that stands in the URI name.
    pub fn word(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::Aggregator => "aggregator",
            Self::Operator => "operator",
        }
    }

    /// The role of a word.
    pub(crate) fn from_word(word: &str) -> Option<Self> {
        [Self::Edge, Self::Aggregator, Self::Operator]
            .into_iter()
            .find(|role| role.word() == word)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The name of a peer: `spiffe://FEDERATION/ROLE/NODE`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerName {
    /// The federation: `a-z`, `0-9`, `.`, `-`, `_`, at most 63 bytes.
    pub federation: String,
    /// What the peer is.
    pub role: Role,
    /// Its own name.
    pub node: NodeId,
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}/{}", self.federation, self.role, self.node)
    }
}

impl std::str::FromStr for PeerName {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let wrong = || IdentityError::NotAName {
            uri: uri.chars().take(200).collect(),
        };
        let mut parts = uri.strip_prefix("spiffe://").ok_or_else(wrong)?.split('/');
        let (Some(federation), Some(role), Some(node), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong());
        };
        check_federation(federation)?;
        Ok(Self {
            federation: federation.to_owned(),
            role: Role::from_word(role).ok_or_else(wrong)?,
            node: NodeId::new(node)?,
        })
    }
}

/// Why a certificate or a key gives no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The bytes are no X.509 certificate.
    #[error("the certificate does not parse: {0}")]
    Unparsable(String),
    /// There must be exactly one URI name.
    #[error(
        "the certificate has {found} URI names; exactly one is needed, of the form spiffe://FEDERATION/ROLE/NAME"
    )]
    UriNames {
        /// How many it has.
        found: usize,
    },
    /// The URI is no name of a peer.
    #[error("`{uri}` names no peer: spiffe://FEDERATION/edge|aggregator|operator/NAME is expected")]
    NotAName {
        /// What was found.
        uri: String,
    },
    /// The federation's name has a character it must not have.
    #[error("`{0}` is no federation name: use 1 to 63 characters of a-z, 0-9, . - and _")]
    Federation(String),
    /// The last part of the name is no node id.
    #[error(transparent)]
    Node(#[from] UnitError),
    /// A certificate of another role.
    #[error("a certificate for {expected} is needed, this one is for {found}")]
    WrongRole {
        /// What is needed here.
        expected: Role,
        /// What the certificate is for.
        found: Role,
    },
    /// A certificate of another federation.
    #[error("the certificate belongs to federation `{found}`, this is `{expected}`")]
    WrongFederation {
        /// Ours.
        expected: String,
        /// Theirs.
        found: String,
    },
    /// Key and certificate do not belong together.
    #[error(
        "the private key is not the one of the certificate: the certificate has key {certificate}, the key file has {key}; restore the file or enrol again"
    )]
    WrongKey {
        /// Fingerprint of the certificate's public key, shortened.
        certificate: String,
        /// Fingerprint of the public half of the key file, shortened.
        key: String,
    },
    /// Not a P-256 key in PKCS#8.
    #[error("the private key does not parse as a P-256 key in PKCS#8: {0}")]
    UnparsableKey(String),
    /// The certificate's time is over.
    #[error("the certificate expired at {}, it is {} now; enrol again with a new token, or set the clock if it is wrong", show(*not_after), show(*now))]
    Expired {
        /// End of its life.
        not_after: SystemTime,
        /// This host's clock.
        now: SystemTime,
    },
    /// The certificate's time has not come.
    #[error("the certificate is valid from {} on, it is {} now; this host's clock is probably behind: set it", show(*not_before), show(*now))]
    NotYetValid {
        /// Begin of its life.
        not_before: SystemTime,
        /// This host's clock.
        now: SystemTime,
    },
}

/// The name in a certificate: its one URI name.
///
/// # Errors
/// [`IdentityError::Unparsable`], [`IdentityError::UriNames`], [`IdentityError::NotAName`],
/// [`IdentityError::Federation`], [`IdentityError::Node`].
pub fn peer_name(certificate_der: &[u8]) -> Result<PeerName, IdentityError> {
    let certificate = parse(certificate_der)?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| IdentityError::Unparsable(error.to_string()))?
        .map_or(&[][..], |extension| &extension.value.general_names);
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris[..] {
        [uri] => uri.parse(),
        _ => Err(IdentityError::UriNames { found: uris.len() }),
    }
}

/// SHA-256 of a certificate's public key (its `SubjectPublicKeyInfo`, DER). It stays when a certificate is renewed
/// with the same key.
///
/// # Errors
/// [`IdentityError::Unparsable`].
pub fn public_key_fingerprint(certificate_der: &[u8]) -> Result<[u8; 32], IdentityError> {
    Ok(Sha256::digest(parse(certificate_der)?.public_key().raw).into())
}

/// SHA-256 of a whole certificate, DER.
pub fn certificate_fingerprint(certificate_der: &[u8]) -> [u8; 32] {
    Sha256::digest(certificate_der).into()
}

/// From when until when a certificate is valid.
///
/// # Errors
/// [`IdentityError::Unparsable`].
pub fn certificate_validity(certificate_der: &[u8]) -> Result<Validity, IdentityError> {
    let certificate = parse(certificate_der)?;
    let time = |seconds: i64| {
        let seconds = u64::try_from(seconds).unwrap_or(0);
        UNIX_EPOCH
            .checked_add(Duration::from_secs(seconds))
            .unwrap_or(UNIX_EPOCH)
    };
    Ok(Validity {
        not_before: time(certificate.validity().not_before.timestamp()),
        not_after: time(certificate.validity().not_after.timestamp()),
    })
}

/// A private key, its certificate, and the authority that issued it.
///
/// On disk it is one file `NAME.pem` of mode 0600, so that key and certificate change in one rename; the file
/// before it stays as `NAME.previous.pem`.
#[derive(Clone)]
pub struct Identity {
    name: PeerName,
    validity: Validity,
    key_pkcs8: Arc<Zeroizing<Vec<u8>>>,
    certificate: CertificateDer<'static>,
    authority: CertificateDer<'static>,
}

impl Identity {
    /// Puts an identity together and checks that key and certificate match. Whether its time is now is another
    /// question: [`Identity::check_valid`].
    pub(crate) fn new(
        key_pkcs8: Zeroizing<Vec<u8>>,
        certificate: Vec<u8>,
        authority: Vec<u8>,
    ) -> Result<Self, IdentityError> {
        check_key(&key_pkcs8, &certificate)?;
        Ok(Self {
            name: peer_name(&certificate)?,
            validity: certificate_validity(&certificate)?,
            key_pkcs8: Arc::new(key_pkcs8),
            certificate: certificate.into(),
            authority: authority.into(),
        })
    }

    /// Writes `DIR/NAME.pem`, keeping the one that was there as `DIR/NAME.previous.pem`.
    ///
    /// # Errors
    /// [`IdentityError::File`].
    pub fn save(&self, dir: &Path, name: &str) -> Result<(), IdentityError> {
        let file = KeyFile {
            key: Zeroizing::new(self.key_pkcs8.to_vec()),
            certificates: vec![self.certificate.to_vec(), self.authority.to_vec()],
        };
        let previous = dir.join(format!("{name}.previous.pem"));
        Ok(files::save_key(&path(dir, name), &file, Some(&previous))?)
    }

    /// Reads `DIR/NAME.pem`. An expired certificate loads; see [`Identity::check_valid`].
    ///
    /// # Errors
    /// [`IdentityError::File`] (also when others may read the key), [`IdentityError::WrongKey`] and the errors of
    /// [`peer_name`].
    pub fn load(dir: &Path, name: &str) -> Result<Self, IdentityError> {
        let path = path(dir, name);
        let mut file = files::load_key(&path)?;
        if file.certificates.len() != 2 {
            let missing = "certificate followed by its authority's";
            return Err(FileError::Unreadable { path, missing }.into());
        }
        let authority = file.certificates.remove(1);
        Self::new(file.key, file.certificates.remove(0), authority)
    }

    /// The name in the certificate.
    pub fn name(&self) -> &PeerName {
        &self.name
    }

    /// The certificate, DER.
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate
    }

    /// The certificate of the authority that issued it, DER.
    pub fn authority_der(&self) -> &[u8] {
        &self.authority
    }

    /// From when until when it is valid.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// End of the certificate's life.
    pub fn expires(&self) -> SystemTime {
        self.validity.not_after
    }

    /// Whether the certificate's time is now.
    ///
    /// # Errors
    /// [`IdentityError::Expired`] and [`IdentityError::NotYetValid`], each with both times.
    pub fn check_valid(&self, now: SystemTime) -> Result<(), IdentityError> {
        self.validity.check(now)
    }

    pub(crate) fn key(&self) -> PrivatePkcs8KeyDer<'static> {
        self.key_pkcs8.to_vec().into()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("name", &self.name.to_string())
            .field("not_before", &show(self.validity.not_before))
            .field("not_after", &show(self.validity.not_after))
            .field("key", &"[redacted]")
            .finish_non_exhaustive()
    }
}

/// Parses one certificate with nothing left over.
pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok((rest, _)) => Err(IdentityError::Unparsable(format!(
            "{} bytes are left over",
            rest.len()
        ))),
        Err(error) => Err(IdentityError::Unparsable(error.to_string())),
    }
}

/// A P-256 key out of PKCS#8.
pub(crate) fn key_pair(key_pkcs8: &[u8]) -> Result<rcgen::KeyPair, IdentityError> {
    rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&key_pkcs8.into(), &rcgen::PKCS_ECDSA_P256_SHA256)
        .map_err(|error| IdentityError::UnparsableKey(error.to_string()))
}

/// Refuses a key that is not the certificate's.
pub(crate) fn check_key(key_pkcs8: &[u8], certificate: &[u8]) -> Result<rcgen::KeyPair, IdentityError> {
    let pair = key_pair(key_pkcs8)?;
    let key = <[u8; 32]>::from(Sha256::digest(pair.subject_public_key_info()));
    let certificate = public_key_fingerprint(certificate)?;
    if key == certificate {
        return Ok(pair);
    }
    let short = |fingerprint: [u8; 32]| data_encoding::HEXLOWER.encode(&fingerprint[..8]);
    Err(IdentityError::WrongKey {
        certificate: short(certificate),
        key: short(key),
    })
}

/// Refuses a federation name that would not survive in a URI.
pub(crate) fn check_federation(name: &str) -> Result<(), IdentityError> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
    if (1..=FEDERATION_LEN_MAX).contains(&name.len()) && name.bytes().all(plain) {
        Ok(())
    } else {
        Err(IdentityError::Federation(name.chars().take(100).collect()))
    }
}

/// A time for people, RFC 3339 in UTC.
pub(crate) fn show(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |span| span.as_secs());
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| format!("{seconds} s after 1970"))
}

fn path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.pem"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::{Authority, LEAF_LIFETIME};

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn edges() -> Authority {
        Authority::generate("plant", Role::Edge, SystemTime::now()).unwrap()
    }

    /// A certificate with these URI names, signed by nobody in particular.
    fn with_uris(uris: &[&str]) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::new(vec!["host.example".to_owned()]).unwrap();
        for uri in uris {
            params
                .subject_alt_names
                .push(rcgen::SanType::URI((*uri).try_into().unwrap()));
        }
        let key = rcgen::KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn the_name_is_the_one_uri() {
        let name = peer_name(&with_uris(&["spiffe://plant-7.example/edge/press-1"])).unwrap();
        let expected = PeerName {
            federation: "plant-7.example".to_owned(),
            role: Role::Edge,
            node: node("press-1"),
        };
        assert_eq!(name, expected);
        assert_eq!(name.to_string().parse::<PeerName>().unwrap(), expected);
    }

    #[test]
    fn refuses_no_uri_and_two_uris() {
        for (uris, count) in [(&[][..], 0), (&["spiffe://a/edge/b", "spiffe://a/edge/c"][..], 2)] {
            match peer_name(&with_uris(uris)) {
                Err(IdentityError::UriNames { found }) => assert_eq!(found, count),
                other => panic!("{uris:?} gave {other:?}"),
            }
        }
    }

    #[test]
    fn refuses_uris_that_only_look_like_names() {
        for uri in [
            "https://plant/edge/a",
            "SPIFFE://plant/edge/a",
            "spiffe://plant/edge",
            "spiffe://plant/edge/a/b",
            "spiffe://plant/edge/a/",
            "spiffe://plant/Edge/a",
            "spiffe://plant/root/a",
            "spiffe://plant//a",
            "spiffe:///edge/a",
            "spiffe://Plant/edge/a",
            "spiffe://plant:1/edge/a",
            "spiffe://user@plant/edge/a",
            "spiffe://plant/edge/a?x",
            "spiffe://plant/edge/..",
            "spiffe://plant/edge/%61",
        ] {
            assert!(peer_name(&with_uris(&[uri])).is_err(), "{uri} was taken");
        }
    }

    #[test]
    fn identity_survives_disk() {
        let dir = tempfile::tempdir().unwrap();
        let identity = edges().issue_edge(&node("press-1")).unwrap();
        identity.save(dir.path(), "identity").unwrap();
        let loaded = Identity::load(dir.path(), "identity").unwrap();
        assert_eq!(loaded.name(), identity.name());
        assert_eq!(loaded.certificate_der(), identity.certificate_der());
        assert_eq!(loaded.authority_der(), identity.authority_der());
        assert!(!format!("{loaded:?}").contains("key_pkcs8"));
    }

    #[test]
    fn refuses_the_key_of_another_certificate() {
        let authority = edges();
        let (a, b) = (
            authority.issue_edge(&node("a")).unwrap(),
            authority.issue_edge(&node("b")).unwrap(),
        );
        let mixed = Identity::new(
            Zeroizing::new(a.key_pkcs8.to_vec()),
            b.certificate_der().to_vec(),
            a.authority_der().to_vec(),
        );
        assert!(matches!(mixed, Err(IdentityError::WrongKey { .. })));
    }

    #[test]
    fn expiry_and_a_clock_behind_are_told_with_both_times() {
        let identity = edges().issue_edge(&node("a")).unwrap();
        let now = SystemTime::now();
        identity.check_valid(now).unwrap();
        let late = identity.check_valid(now + LEAF_LIFETIME).unwrap_err();
        assert!(matches!(late, IdentityError::Expired { .. }));
        assert!(late.to_string().contains(&show(identity.expires())), "{late}");
        let early = identity.check_valid(now - Duration::from_hours(24)).unwrap_err();
        assert!(matches!(early, IdentityError::NotYetValid { .. }));
        assert!(early.to_string().contains("clock"), "{early}");
    }

    #[test]
    fn a_certificate_with_a_tail_is_refused() {
        let mut der = edges().certificate_der().to_vec();
        der.push(0);
        assert!(matches!(peer_name(&der), Err(IdentityError::Unparsable(_))));
        assert!(matches!(
            public_key_fingerprint(&[1, 2, 3]),
            Err(IdentityError::Unparsable(_))
        ));
    }
}
