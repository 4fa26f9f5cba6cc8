//! An authority: the key that says who may call itself what.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
    SigningKey,
};
use theriac_protocol::units::NodeId;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::files::{self, FileError, KeyFile};
use crate::identity::{
    self, Identity, IdentityError, PeerName, Role, certificate_fingerprint, certificate_validity,
};

/// Life of a certificate for which nobody says otherwise: 7 days. The aggregator renews its own in the last third of
/// that; the edges that it enrols get a longer one ([`Authority::sign_csr`]), since they come back with a new token.
/// Longer: a revoked site that nobody reports lives longer. Shorter: an aggregator that is off for a long weekend
/// comes back with an expired one.
pub const LEAF_LIFETIME: Duration = Duration::from_hours(7 * 24);

/// How long before now a fresh certificate begins, for hosts whose clock is a little behind.
pub const CLOCK_SKEW: Duration = Duration::from_mins(5);

/// Life of an authority: 10 years.
const AUTHORITY_LIFETIME: Duration = Duration::from_hours(3650 * 24);

/// Largest certificate request that is looked at, in bytes.
pub const CSR_BYTES_MAX: usize = 4096;

const FILE: &str = "authority.pem";

/// From when until when a certificate holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Begin.
    pub not_before: SystemTime,
    /// End.
    pub not_after: SystemTime,
}

impl Validity {
    /// From `now` less [`CLOCK_SKEW`] until `lifetime` after `now`.
    pub fn starting(now: SystemTime, lifetime: Duration) -> Self {
        Self {
            not_before: now.checked_sub(CLOCK_SKEW).unwrap_or(UNIX_EPOCH),
            not_after: now.checked_add(lifetime).unwrap_or(now),
        }
    }

    /// Whether `now` lies within.
    ///
    /// # Errors
    /// [`IdentityError::Expired`] and [`IdentityError::NotYetValid`].
    pub fn check(&self, now: SystemTime) -> Result<(), IdentityError> {
        if now > self.not_after {
            Err(IdentityError::Expired {
                not_after: self.not_after,
                now,
            })
        } else if now < self.not_before {
            Err(IdentityError::NotYetValid {
                not_before: self.not_before,
                now,
            })
        } else {
            Ok(())
        }
    }
}

/// Why an authority cannot be made, loaded or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// Key or certificate are no good.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The certificate is not one of an authority of ours.
    #[error("this certificate is no authority of a federation: {0}")]
    NotAnAuthority(&'static str),
    /// An authority issues one role only.
    #[error("this authority issues certificates for {issues}, not for {asked}")]
    WrongRole {
        /// What it is for.
        issues: Role,
        /// What was asked for.
        asked: Role,
    },
    /// A host name or address that no certificate can carry.
    #[error(
        "`{0}` is neither a host name nor an address; an aggregator's certificate must name what edges dial"
    )]
    Host(String),
    /// An aggregator needs a name that edges can dial.
    #[error("an aggregator's certificate needs at least one host name or address")]
    NoHost,
    /// The request is damaged, of a foreign kind or not signed by its own key.
    #[error("the certificate request is no good: {0}")]
    Request(String),
    /// The system gave no random numbers, or signing failed.
    #[error("cannot issue a certificate: {0}")]
    Issue(String),
}

/// One of a federation's two authorities: it issues certificates for one role, P-256, and nothing else.
pub struct Authority {
    federation: String,
    role: Role,
    validity: Validity,
    certificate: Vec<u8>,
    key_pkcs8: Zeroizing<Vec<u8>>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes an authority that issues certificates for `role` in `federation`, valid from `now` for 10 years. Every
    /// authority has a subject name of its own: role, federation and the beginning of its key's fingerprint.
    ///
    /// # Errors
    /// [`AuthorityError::Identity`] for a name that cannot stand in a URI, [`AuthorityError::Issue`].
    pub fn generate(federation: &str, role: Role, now: SystemTime) -> Result<Self, AuthorityError> {
        identity::check_federation(federation)?;
        let key = KeyPair::generate().map_err(issue)?;
        let key_pkcs8 = Zeroizing::new(key.serialized_der().to_vec());
        let fingerprint = certificate_fingerprint(&key.subject_public_key_info());
        let generation = data_encoding::HEXLOWER.encode(&fingerprint[..4]);

        let mut params = CertificateParams::default();
        let mut subject = DistinguishedName::new();
        subject.push(DnType::OrganizationName, federation);
        subject.push(DnType::OrganizationalUnitName, role.word());
        subject.push(
            DnType::CommonName,
            format!("theriac {role} authority {generation}"),
        );
        params.distinguished_name = subject;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial()?);
        set_validity(&mut params, Validity::starting(now, AUTHORITY_LIFETIME))?;
        let certificate = params.self_signed(&key).map_err(issue)?.der().to_vec();
        Self::new(key_pkcs8, certificate)
    }

    /// Writes `DIR/authority.pem` (key and certificate, mode 0600). Whoever reads it can enrol anyone.
    ///
    /// # Errors
    /// [`AuthorityError::File`].
    pub fn save(&self, dir: &Path) -> Result<(), AuthorityError> {
        let file = KeyFile {
            key: self.key_pkcs8.clone(),
            certificates: vec![self.certificate.clone()],
        };
        Ok(files::save_key(&dir.join(FILE), &file, None)?)
    }

    /// Reads what [`Authority::save`] wrote.
    ///
    /// # Errors
    /// [`AuthorityError::File`] (also when others may read it), [`AuthorityError::Identity`] when key and
    /// certificate do not match, [`AuthorityError::NotAnAuthority`].
    pub fn load(dir: &Path) -> Result<Self, AuthorityError> {
        let path = dir.join(FILE);
        let mut file = files::load_key(&path)?;
        if file.certificates.len() != 1 {
            return Err(FileError::Unreadable {
                path,
                missing: "single certificate of an authority",
            }
            .into());
        }
        Self::new(file.key, file.certificates.remove(0))
    }

    fn new(key_pkcs8: Zeroizing<Vec<u8>>, certificate: Vec<u8>) -> Result<Self, AuthorityError> {
        let key = identity::check_key(&key_pkcs8, &certificate)?;
        let parsed = identity::parse(&certificate)?;
        if !parsed.is_ca() {
            return Err(AuthorityError::NotAnAuthority("it may not issue certificates"));
        }
        let subject = parsed.subject();
        let federation = subject
            .iter_organization()
            .next()
            .and_then(|name| name.as_str().ok())
            .ok_or(AuthorityError::NotAnAuthority("its subject has no organisation"))?
            .to_owned();
        identity::check_federation(&federation)?;
        let role = subject
            .iter_organizational_unit()
            .next()
            .and_then(|name| Role::from_word(name.as_str().ok()?))
            .ok_or(AuthorityError::NotAnAuthority("its subject names no role"))?;
        let issuer = Issuer::from_ca_cert_der(&certificate.as_slice().into(), key).map_err(issue)?;
        let validity = certificate_validity(&certificate)?;
        Ok(Self {
            federation,
            role,
            validity,
            certificate,
            key_pkcs8,
            issuer,
        })
    }

    /// The federation's name.
    pub fn federation(&self) -> &str {
        &self.federation
    }

    /// Whom it issues certificates for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its certificate, DER.
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate
    }

    /// SHA-256 of its certificate, DER: what a join token carries.
    pub fn fingerprint(&self) -> [u8; 32] {
        certificate_fingerprint(&self.certificate)
    }

    /// Issues an aggregator's identity for these host names and addresses, for [`LEAF_LIFETIME`] from now on.
    ///
    /// # Errors
    /// [`AuthorityError::WrongRole`], [`AuthorityError::Host`], [`AuthorityError::NoHost`], [`AuthorityError::Issue`].
    pub fn issue_aggregator(&self, name: &NodeId, hosts: &[String]) -> Result<Identity, AuthorityError> {
        self.expect_role(Role::Aggregator)?;
        self.issue(name, hosts, Validity::starting(SystemTime::now(), LEAF_LIFETIME))
    }

    /// Issues an edge's identity with a key made here. For the lab and for tests; a real edge makes its own key and
    /// sends a request.
    ///
    /// # Errors
    /// [`AuthorityError::WrongRole`], [`AuthorityError::Issue`].
    pub fn issue_edge(&self, node: &NodeId) -> Result<Identity, AuthorityError> {
        self.expect_role(Role::Edge)?;
        self.issue(node, &[], Validity::starting(SystemTime::now(), LEAF_LIFETIME))
    }

    /// Issues an identity of this authority's role with a key made here, valid exactly when told.
    ///
    /// # Errors
    /// As [`Authority::issue_aggregator`].
    pub fn issue(
        &self,
        node: &NodeId,
        hosts: &[String],
        validity: Validity,
    ) -> Result<Identity, AuthorityError> {
        if self.role == Role::Aggregator && hosts.is_empty() {
            return Err(AuthorityError::NoHost);
        }
        let key = KeyPair::generate().map_err(issue)?;
        let certificate = self.sign(&key, node, hosts, validity)?;
        let key = Zeroizing::new(key.serialized_der().to_vec());
        Ok(Identity::new(key, certificate, self.certificate.clone())?)
    }

    /// Signs an edge's request: `node` comes from the token, only the key from the request. Any name, extension or
    /// time inside the request is ignored. The certificate begins exactly at `not_before`: give it the time of now
    /// less [`CLOCK_SKEW`].
    ///
    /// # Errors
    /// [`AuthorityError::WrongRole`], [`AuthorityError::Request`] when the request is too long, does not parse, is
    /// not P-256 or is not signed by its own key, [`AuthorityError::Issue`].
    pub fn sign_csr(
        &self,
        csr_der: &[u8],
        node: &NodeId,
        not_before: SystemTime,
        lifetime: Duration,
    ) -> Result<Vec<u8>, AuthorityError> {
        self.expect_role(Role::Edge)?;
        let key = csr_public_key(csr_der).map_err(AuthorityError::Request)?;
        let not_after = not_before.checked_add(lifetime).unwrap_or(not_before);
        self.sign(
            &key,
            node,
            &[],
            Validity {
                not_before,
                not_after,
            },
        )
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        node: &NodeId,
        hosts: &[String],
        validity: Validity,
    ) -> Result<Vec<u8>, AuthorityError> {
        let mut params = CertificateParams::default();
        for host in hosts {
            let name = match host.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(dns_name(host)?),
            };
            params.subject_alt_names.push(name);
        }
        let name = PeerName {
            federation: self.federation.clone(),
            role: self.role,
            node: node.clone(),
        };
        params
            .subject_alt_names
            .push(SanType::URI(name.to_string().try_into().map_err(issue)?));
        let mut subject = DistinguishedName::new();
        subject.push(DnType::CommonName, node.as_str());
        params.distinguished_name = subject;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match self.role {
            Role::Aggregator => ExtendedKeyUsagePurpose::ServerAuth,
            Role::Edge | Role::Operator => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        let not_after = validity.not_after.min(self.validity.not_after);
        set_validity(
            &mut params,
            Validity {
                not_after,
                ..validity
            },
        )?;
        Ok(params.signed_by(key, &self.issuer).map_err(issue)?.der().to_vec())
    }

    fn expect_role(&self, asked: Role) -> Result<(), AuthorityError> {
        if self.role == asked {
            Ok(())
        } else {
            Err(AuthorityError::WrongRole {
                issues: self.role,
                asked,
            })
        }
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("federation", &self.federation)
            .field("role", &self.role)
            .field("key", &"[redacted]")
            .finish_non_exhaustive()
    }
}

/// The public key of a certificate request whose signature by that key was checked.
pub(crate) fn csr_public_key(csr_der: &[u8]) -> Result<rcgen::PublicKey, String> {
    if csr_der.len() > CSR_BYTES_MAX {
        return Err(format!(
            "it has {} bytes, at most {CSR_BYTES_MAX} are taken",
            csr_der.len()
        ));
    }
    let request =
        CertificateSigningRequestParams::from_der(&csr_der.into()).map_err(|error| error.to_string())?;
    if request.public_key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
        return Err("its key is not P-256".to_owned());
    }
    Ok(request.public_key)
}

/// An empty request, signed by `key`.
pub(crate) fn make_csr(key: &impl SigningKey) -> Result<Vec<u8>, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    Ok(params.serialize_request(key).map_err(issue)?.der().to_vec())
}

fn dns_name(host: &str) -> Result<rcgen::string::Ia5String, AuthorityError> {
    let wrong = || AuthorityError::Host(host.chars().take(100).collect());
    rustls_pki_types::DnsName::try_from(host).map_err(|_| wrong())?;
    host.try_into().map_err(|_| wrong())
}

/// 127 random bits: never the same twice, also for a renewed key, so that revocation by serial number is exact.
fn serial() -> Result<SerialNumber, AuthorityError> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes).map_err(issue)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn set_validity(params: &mut CertificateParams, validity: Validity) -> Result<(), AuthorityError> {
    params.not_before = x509_time(validity.not_before)?;
    params.not_after = x509_time(validity.not_after)?;
    Ok(())
}

fn x509_time(time: SystemTime) -> Result<OffsetDateTime, AuthorityError> {
    let seconds = time.duration_since(UNIX_EPOCH).map_err(issue)?.as_secs();
    OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).map_err(issue)?).map_err(issue)
}

fn issue(error: impl std::fmt::Display) -> AuthorityError {
    AuthorityError::Issue(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{peer_name, public_key_fingerprint};

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn authority(role: Role) -> Authority {
        Authority::generate("plant", role, SystemTime::now()).unwrap()
    }

    #[test]
    fn authority_survives_disk() {
        let dir = tempfile::tempdir().unwrap();
        let made = authority(Role::Edge);
        made.save(dir.path()).unwrap();
        let loaded = Authority::load(dir.path()).unwrap();
        assert_eq!(loaded.federation(), "plant");
        assert_eq!(loaded.role(), Role::Edge);
        assert_eq!(loaded.fingerprint(), made.fingerprint());
        loaded.issue_edge(&node("a")).unwrap();
    }

    #[test]
    fn every_authority_has_a_subject_name_of_its_own() {
        let made = [
            authority(Role::Edge),
            authority(Role::Aggregator),
            authority(Role::Edge),
        ];
        let mut subjects: Vec<String> = made
            .iter()
            .map(|authority| {
                identity::parse(authority.certificate_der())
                    .unwrap()
                    .subject()
                    .to_string()
            })
            .collect();
        subjects.sort();
        subjects.dedup();
        assert_eq!(subjects.len(), 3, "{subjects:?}");
    }

    #[test]
    fn an_authority_issues_its_own_role_only() {
        let (edges, aggregators) = (authority(Role::Edge), authority(Role::Aggregator));
        let hosts = ["localhost".to_owned()];
        assert!(matches!(
            edges.issue_aggregator(&node("a"), &hosts),
            Err(AuthorityError::WrongRole { .. })
        ));
        assert!(matches!(
            aggregators.issue_edge(&node("a")),
            Err(AuthorityError::WrongRole { .. })
        ));
        assert!(matches!(
            aggregators.issue_aggregator(&node("a"), &[]),
            Err(AuthorityError::NoHost)
        ));
        let bad = aggregators.issue_aggregator(&node("a"), &["not a host".to_owned()]);
        assert!(matches!(bad, Err(AuthorityError::Host(_))));
    }

    #[test]
    fn a_leaf_does_not_load_as_an_authority() {
        let dir = tempfile::tempdir().unwrap();
        let leaf = authority(Role::Edge).issue_edge(&node("a")).unwrap();
        let file = KeyFile {
            key: Zeroizing::new(leaf.key().secret_pkcs8_der().to_vec()),
            certificates: vec![leaf.certificate_der().to_vec()],
        };
        files::save_key(&dir.path().join(FILE), &file, None).unwrap();
        assert!(matches!(
            Authority::load(dir.path()),
            Err(AuthorityError::NotAnAuthority(_))
        ));
    }

    #[test]
    fn takes_only_the_key_from_a_request() {
        let edges = authority(Role::Edge);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        params
            .subject_alt_names
            .push(SanType::URI("spiffe://plant/aggregator/root".try_into().unwrap()));
        params.distinguished_name.push(DnType::CommonName, "root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let csr = params.serialize_request(&key).unwrap().der().to_vec();
        let begin = UNIX_EPOCH + Duration::from_hours(500_000);
        let certificate = edges
            .sign_csr(&csr, &node("press-1"), begin, LEAF_LIFETIME)
            .unwrap();

        assert_eq!(
            peer_name(&certificate).unwrap().to_string(),
            "spiffe://plant/edge/press-1"
        );
        let key_fingerprint = certificate_fingerprint(&key.subject_public_key_info());
        assert_eq!(public_key_fingerprint(&certificate).unwrap(), key_fingerprint);
        let validity = certificate_validity(&certificate).unwrap();
        assert_eq!(
            validity,
            Validity {
                not_before: begin,
                not_after: begin + LEAF_LIFETIME
            }
        );
        let parsed = identity::parse(&certificate).unwrap();
        assert!(!parsed.is_ca());
        assert_eq!(parsed.subject().to_string(), "CN=press-1");
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth);
        assert_eq!(
            parsed
                .subject_alternative_name()
                .unwrap()
                .unwrap()
                .value
                .general_names
                .len(),
            1
        );
    }

    #[test]
    fn refuses_a_request_that_is_damaged_too_long_or_of_another_kind() {
        let edges = authority(Role::Edge);
        let key = KeyPair::generate().unwrap();
        let good = make_csr(&key).unwrap();
        let now = SystemTime::now();
        let sign = |csr: &[u8]| edges.sign_csr(csr, &node("a"), now, LEAF_LIFETIME);
        sign(&good).unwrap();
        let mut taken = 0;
        let fingerprint = certificate_fingerprint(&key.subject_public_key_info());
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 1;
            match sign(&bad) {
                Err(AuthorityError::Request(_)) => {}
                // Some bits are outside the signature and mean nothing; the key must still be the one that signed.
                Ok(certificate) => {
                    assert_eq!(
                        public_key_fingerprint(&certificate).unwrap(),
                        fingerprint,
                        "bit flip at {position}"
                    );
                    taken += 1;
                }
                Err(other) => panic!("bit flip at {position} gave {other:?}"),
            }
        }
        assert!(taken <= 2, "{taken} of {} bit flips were taken", good.len());
        assert!(matches!(sign(&[]), Err(AuthorityError::Request(_))));
        assert!(matches!(
            sign(&[0x30; CSR_BYTES_MAX + 1]),
            Err(AuthorityError::Request(_))
        ));
        let other = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        assert!(matches!(
            sign(&make_csr(&other).unwrap()),
            Err(AuthorityError::Request(_))
        ));
    }

    #[test]
    fn no_certificate_outlives_its_authority() {
        let edges = authority(Role::Edge);
        let validity = Validity::starting(SystemTime::now(), Duration::from_hours(24 * 365 * 50));
        let identity = edges.issue(&node("a"), &[], validity).unwrap();
        assert!(identity.expires() <= certificate_validity(edges.certificate_der()).unwrap().not_after);
    }
}
