//! From a certificate to an enrolled site. The certificate says who; the registry decides, on every message.

use theriac_audit::leaf::SiteStanding;
use theriac_certs::{IdentityError, Role, peer_name, public_key_fingerprint};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::units::NodeId;

use crate::store::records::Registry;

/// Why a peer is no welcome site.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthenticateError {
    /// The certificate's name cannot be read.
    #[error(transparent)]
    Certificate(#[from] IdentityError),
    /// A certificate for another part or another federation.
    #[error("the certificate names {found}, only edges of {expected} are taken")]
    Name {
        /// Our federation.
        expected: String,
        /// What the certificate says.
        found: String,
    },
    /// No such site.
    #[error("site {0} is not enrolled")]
    Unknown(NodeId),
    /// The operator has suspended it.
    #[error("site {0} is suspended")]
    Suspended(NodeId),
    /// The key was revoked, or replaced by a newer one.
    #[error("the key of site {0} is revoked or not the enrolled one")]
    Key(NodeId),
}

impl AuthenticateError {
    /// What the peer is told.
    pub fn code(&self) -> RefusalCode {
        match self {
            Self::Certificate(_) | Self::Name { .. } | Self::Unknown(_) => RefusalCode::UnknownSite,
            Self::Suspended(_) => RefusalCode::Suspended,
            Self::Key(_) => RefusalCode::Revoked,
        }
    }
}

/// A peer whose certificate was read: its name and key do not change for the life of the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    node: NodeId,
    key_fingerprint: [u8; 32],
}

impl Peer {
    /// Reads name and key of a verified certificate.
    ///
    /// # Errors
    /// [`AuthenticateError::Certificate`], [`AuthenticateError::Name`].
    pub fn from_certificate(certificate_der: &[u8], federation: &str) -> Result<Self, AuthenticateError> {
        let name = peer_name(certificate_der)?;
        if name.role != Role::Edge || name.federation != federation {
            let found = format!("{} {} of {}", name.role.word(), name.node, name.federation);
            return Err(AuthenticateError::Name {
                expected: federation.to_owned(),
                found,
            });
        }
        Ok(Self {
            node: name.node,
            key_fingerprint: public_key_fingerprint(certificate_der)?,
        })
    }

    /// The node's name.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// Whether the registry lets it speak now. Called for its Hello and for every message.
    ///
    /// # Errors
    /// [`AuthenticateError::Unknown`], [`AuthenticateError::Suspended`], [`AuthenticateError::Key`].
    pub fn check(&self, registry: &Registry) -> Result<(), AuthenticateError> {
        let node = || self.node.clone();
        let entry = registry
            .get(&self.node)
            .ok_or_else(|| AuthenticateError::Unknown(node()))?;
        if entry.key_fingerprint != self.key_fingerprint {
            return Err(AuthenticateError::Key(node()));
        }
        match entry.state {
            SiteStanding::Active => Ok(()),
            SiteStanding::Suspended => Err(AuthenticateError::Suspended(node())),
            SiteStanding::Revoked => Err(AuthenticateError::Key(node())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::records::{LedgerHead, SiteEntry};

    #[test]
    fn registry_decides_by_state_and_key() {
        let node = NodeId::new("site-1").unwrap();
        let peer = Peer {
            node: node.clone(),
            key_fingerprint: [1; 32],
        };
        let registry = |state, key| {
            let ledger = LedgerHead::default();
            Registry::from([(
                node.clone(),
                SiteEntry {
                    state,
                    key_fingerprint: key,
                    ledger,
                    ledger_unallowed: false,
                },
            )])
        };
        let code = |registry: &Registry| peer.check(registry).map_err(|error| error.code());
        assert_eq!(code(&Registry::new()), Err(RefusalCode::UnknownSite));
        assert_eq!(code(&registry(SiteStanding::Active, [1; 32])), Ok(()));
        assert_eq!(
            code(&registry(SiteStanding::Active, [2; 32])),
            Err(RefusalCode::Revoked)
        );
        assert_eq!(
            code(&registry(SiteStanding::Suspended, [1; 32])),
            Err(RefusalCode::Suspended)
        );
        assert_eq!(
            code(&registry(SiteStanding::Revoked, [1; 32])),
            Err(RefusalCode::Revoked)
        );
    }
}
