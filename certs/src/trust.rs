//! TLS as this federation speaks it: version 1.3 only, both ends with certificates, no resumption, no early data.
//!
//! A resumed session would skip the check of the client's certificate, so a revoked site could return until its
//! ticket expires; early data can be replayed. Both stay off. The key exchange offers X25519MLKEM768 first, so what
//! is recorded today cannot be read by a later quantum computer; certificates are P-256, which a later quantum
//! computer could forge but not use in hindsight.
//!
//! Every configuration is built with [`provider`], never with a process-wide default.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore,
    ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::identity::{Identity, IdentityError, Role, certificate_fingerprint, peer_name};

/// ALPN name of the main listener: the framing's major version.
pub const ALPN: &[u8] = b"theriac/1";

/// ALPN name of the join listener.
pub const ALPN_JOIN: &[u8] = b"theriac-join/1";

/// Why no TLS configuration could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// The identity is for another end of the connection.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The authority's certificate is no good.
    #[error("the certificate of the authority that peers must have cannot be used: {0}")]
    Authority(String),
    /// rustls refused the configuration.
    #[error("the TLS configuration is refused: {0}")]
    Tls(#[from] rustls::Error),
}

/// The cryptography in use: aws-lc-rs with the three suites of TLS 1.3 and three key exchange groups, the hybrid
/// post-quantum one first.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    })
}

/// The aggregator's main listener: demands a certificate that the authority of edges issued, with the name of an
/// edge of the same federation.
///
/// # Errors
/// [`TrustError::Identity`] for an identity that is not an aggregator's, [`TrustError::Authority`], [`TrustError::Tls`].
pub fn server_config(identity: &Identity, edge_authority_der: &[u8]) -> Result<ServerConfig, TrustError> {
    expect_role(identity, Role::Aggregator)?;
    let chain = WebPkiClientVerifier::builder_with_provider(roots(edge_authority_der)?, provider())
        .build()
        .map_err(|error| TrustError::Authority(error.to_string()))?;
    let verifier = EdgesOnly {
        chain,
        federation: identity.name().federation.clone(),
    };
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(
            vec![identity.certificate_der().to_vec().into()],
            identity.key().into(),
        )?;
    Ok(hardened_server(config, ALPN))
}

/// An edge towards its aggregator: the server's certificate must come from the authority of aggregators, carry the
/// host name that is dialled and the name of an aggregator of the same federation.
///
/// # Errors
/// As [`server_config`].
pub fn client_config(
    identity: &Identity,
    aggregator_authority_der: &[u8],
) -> Result<ClientConfig, TrustError> {
    expect_role(identity, Role::Edge)?;
    let chain = server_chain(aggregator_authority_der)?;
    let verifier = AggregatorsOnly {
        chain,
        federation: identity.name().federation.clone(),
    };
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(
            vec![identity.certificate_der().to_vec().into()],
            identity.key().into(),
        )?;
    Ok(hardened_client(config, ALPN))
}

/// The join listener: asks for no client certificate, and sends the authority's certificate along with its own so
/// that a new edge can compare the fingerprint in its token.
///
/// # Errors
/// As [`server_config`].
pub fn join_server_config(identity: &Identity) -> Result<ServerConfig, TrustError> {
    expect_role(identity, Role::Aggregator)?;
    let chain = vec![
        identity.certificate_der().to_vec().into(),
        identity.authority_der().to_vec().into(),
    ];
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, identity.key().into())?;
    Ok(hardened_server(config, ALPN_JOIN))
}

/// A new edge towards the join listener: the server must show the authority whose fingerprint is in the token and a
/// certificate that this authority issued for the host name that is dialled.
///
/// # Errors
/// [`TrustError::Tls`].
pub fn join_client_config(aggregator_authority_fingerprint: [u8; 32]) -> Result<ClientConfig, TrustError> {
    let verifier = PinnedAuthority {
        fingerprint: aggregator_authority_fingerprint,
        provider: provider(),
    };
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok(hardened_client(config, ALPN_JOIN))
}

fn hardened_server(mut config: ServerConfig, alpn: &[u8]) -> ServerConfig {
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config
}

fn hardened_client(mut config: ClientConfig, alpn: &[u8]) -> ClientConfig {
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    config
}

fn expect_role(identity: &Identity, expected: Role) -> Result<(), IdentityError> {
    let found = identity.name().role;
    if found == expected {
        Ok(())
    } else {
        Err(IdentityError::WrongRole { expected, found })
    }
}

fn roots(authority_der: &[u8]) -> Result<Arc<RootCertStore>, TrustError> {
    let mut roots = RootCertStore::empty();
    roots
        .add(authority_der.to_vec().into())
        .map_err(|error| TrustError::Authority(error.to_string()))?;
    Ok(Arc::new(roots))
}

fn server_chain(authority_der: &[u8]) -> Result<Arc<WebPkiServerVerifier>, TrustError> {
    WebPkiServerVerifier::builder_with_provider(roots(authority_der)?, provider())
        .build()
        .map_err(|error| TrustError::Authority(error.to_string()))
}

/// The name must be that of `role` in `federation` (any, when `None`).
fn check_name(
    certificate: &CertificateDer<'_>,
    role: Role,
    federation: Option<&str>,
) -> Result<(), rustls::Error> {
    let name = peer_name(certificate).map_err(refused)?;
    if name.role != role {
        return Err(refused(IdentityError::WrongRole {
            expected: role,
            found: name.role,
        }));
    }
    match federation {
        Some(expected) if expected != name.federation => {
            let expected = expected.to_owned();
            Err(refused(IdentityError::WrongFederation {
                expected,
                found: name.federation,
            }))
        }
        _ => Ok(()),
    }
}

/// Alert 46, `certificate_unknown`, with the reason as text.
fn refused(error: impl std::error::Error) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(Reason(error.to_string())))).into()
}

/// A reason that reads the same in `Debug`, which is how rustls shows it in logs and to the peer.
struct Reason(String);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Reason {}

/// The usual check of the chain, then our own check of the name: webpki does not judge URI names.
#[derive(Debug)]
struct EdgesOnly {
    chain: Arc<dyn ClientCertVerifier>,
    federation: String,
}

impl ClientCertVerifier for EdgesOnly {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        check_name(end_entity, Role::Edge, Some(&self.federation))?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// The usual check of chain and host name, then our own check of the URI name.
#[derive(Debug)]
struct AggregatorsOnly {
    chain: Arc<WebPkiServerVerifier>,
    federation: String,
}

impl ServerCertVerifier for AggregatorsOnly {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified =
            self.chain
                .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        check_name(end_entity, Role::Aggregator, Some(&self.federation))?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// The server shows another authority than the token's.
#[derive(Debug, thiserror::Error)]
#[error(
    "the server does not show the authority that the token names ({expected}…): this is another federation, or \
     somebody between you and it"
)]
struct WrongAuthority {
    expected: String,
}

/// Trusts one authority, known by the fingerprint of its certificate alone.
#[derive(Debug)]
struct PinnedAuthority {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| certificate_fingerprint(certificate) == self.fingerprint)
            .ok_or_else(|| {
                let expected = data_encoding::HEXLOWER.encode(&self.fingerprint[..8]);
                refused(WrongAuthority { expected })
            })?;
        let verified = server_chain(authority).map_err(refused)?.verify_server_cert(
            end_entity,
            &[],
            server_name,
            ocsp_response,
            now,
        )?;
        check_name(end_entity, Role::Aggregator, None)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use rustls::NamedGroup;
    use theriac_protocol::units::NodeId;

    use super::*;
    use crate::authority::{Authority, Validity};

    struct Federation {
        aggregators: Authority,
        edges: Authority,
    }

    impl Federation {
        fn new(name: &str) -> Self {
            let make = |role| Authority::generate(name, role, SystemTime::now()).unwrap();
            Self {
                aggregators: make(Role::Aggregator),
                edges: make(Role::Edge),
            }
        }

        fn aggregator(&self) -> Identity {
            self.aggregators
                .issue_aggregator(&node("main"), &["localhost".to_owned()])
                .unwrap()
        }

        fn edge(&self) -> Identity {
            self.edges.issue_edge(&node("press-1")).unwrap()
        }
    }

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn der(bytes: &[u8]) -> CertificateDer<'static> {
        bytes.to_vec().into()
    }

    fn localhost() -> ServerName<'static> {
        "localhost".try_into().unwrap()
    }

    #[test]
    fn hybrid_key_exchange_is_offered_first() {
        let groups: Vec<NamedGroup> = provider().kx_groups.iter().map(|group| group.name()).collect();
        assert_eq!(
            groups,
            [
                NamedGroup::X25519MLKEM768,
                NamedGroup::X25519,
                NamedGroup::secp256r1
            ]
        );
        let plant = Federation::new("plant");
        let client = client_config(&plant.edge(), plant.aggregators.certificate_der()).unwrap();
        assert_eq!(
            client.crypto_provider().kx_groups[0].name(),
            NamedGroup::X25519MLKEM768
        );
        let server = server_config(&plant.aggregator(), plant.edges.certificate_der()).unwrap();
        assert_eq!(
            server.crypto_provider().kx_groups[0].name(),
            NamedGroup::X25519MLKEM768
        );
    }

    #[test]
    fn nothing_can_be_resumed_or_replayed() {
        let plant = Federation::new("plant");
        let main = server_config(&plant.aggregator(), plant.edges.certificate_der()).unwrap();
        let join = join_server_config(&plant.aggregator()).unwrap();
        for (config, alpn) in [(main, ALPN), (join, ALPN_JOIN)] {
            assert_eq!((config.send_tls13_tickets, config.max_early_data_size), (0, 0));
            assert!(!config.session_storage.can_cache() && !config.ticketer.enabled());
            assert_eq!(config.alpn_protocols, [alpn]);
        }
        let client = client_config(&plant.edge(), plant.aggregators.certificate_der()).unwrap();
        assert!(!client.enable_early_data);
        assert_eq!(client.alpn_protocols, [ALPN]);
    }

    #[test]
    fn each_end_takes_only_its_own_role() {
        let plant = Federation::new("plant");
        assert!(matches!(
            server_config(&plant.edge(), plant.edges.certificate_der()),
            Err(TrustError::Identity(IdentityError::WrongRole { .. }))
        ));
        assert!(matches!(
            client_config(&plant.aggregator(), plant.aggregators.certificate_der()),
            Err(TrustError::Identity(IdentityError::WrongRole { .. }))
        ));
    }

    #[test]
    fn another_federation_is_refused_even_when_its_chain_is_good() {
        let (plant, other) = (Federation::new("plant"), Federation::new("other"));
        let chain = WebPkiClientVerifier::builder_with_provider(
            roots(other.edges.certificate_der()).unwrap(),
            provider(),
        )
        .build()
        .unwrap();
        let verifier = EdgesOnly {
            chain,
            federation: "plant".to_owned(),
        };
        let found = verifier.verify_client_cert(&der(other.edge().certificate_der()), &[], UnixTime::now());
        assert!(found.unwrap_err().to_string().contains("federation"));

        let chain = server_chain(other.aggregators.certificate_der()).unwrap();
        let verifier = AggregatorsOnly {
            chain,
            federation: "plant".to_owned(),
        };
        let leaf = der(other.aggregator().certificate_der());
        let found = verifier.verify_server_cert(&leaf, &[], &localhost(), &[], UnixTime::now());
        assert!(found.unwrap_err().to_string().contains("federation"));
        drop(plant);
    }

    #[test]
    fn the_pin_takes_only_the_authority_of_the_token() {
        let (plant, other) = (Federation::new("plant"), Federation::new("plant"));
        let verify = |pinned: &Authority, shown: &Identity, name: &str| {
            PinnedAuthority {
                fingerprint: pinned.fingerprint(),
                provider: provider(),
            }
            .verify_server_cert(
                &der(shown.certificate_der()),
                &[der(shown.authority_der())],
                &name.to_owned().try_into().unwrap(),
                &[],
                UnixTime::now(),
            )
        };
        verify(&plant.aggregators, &plant.aggregator(), "localhost").unwrap();
        let told = verify(&plant.aggregators, &other.aggregator(), "localhost")
            .unwrap_err()
            .to_string();
        assert!(told.contains("another federation"), "{told}");
        assert!(verify(&plant.aggregators, &plant.aggregator(), "elsewhere").is_err());
        // The right authority beside a leaf that it did not issue.
        let forged = PinnedAuthority {
            fingerprint: plant.aggregators.fingerprint(),
            provider: provider(),
        }
        .verify_server_cert(
            &der(other.aggregator().certificate_der()),
            &[der(plant.aggregators.certificate_der())],
            &localhost(),
            &[],
            UnixTime::now(),
        );
        assert!(forged.is_err());
        // An expired leaf of the right authority.
        let past = SystemTime::now() - Duration::from_hours(24 * 30);
        let validity = Validity::starting(past, Duration::from_mins(1));
        let expired = plant
            .aggregators
            .issue(&node("main"), &["localhost".to_owned()], validity)
            .unwrap();
        assert!(
            verify(&plant.aggregators, &expired, "localhost")
                .unwrap_err()
                .to_string()
                .contains("expired")
        );
    }

    #[test]
    fn an_authority_that_does_not_parse_is_told() {
        let plant = Federation::new("plant");
        assert!(matches!(
            server_config(&plant.aggregator(), b"junk"),
            Err(TrustError::Authority(_))
        ));
    }
}
