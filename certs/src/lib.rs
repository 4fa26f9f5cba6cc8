//! Who is who: authorities, identities, trust and enrolment.
//!
//! A federation has **two authorities**, one for aggregators and one for edges, each with a subject name of its own.
//! An edge trusts only the first for servers, an aggregator trusts only the second for clients. A certificate says
//! *who* a peer is, in exactly one URI name of SPIFFE form:
//!
//! ```text
//! spiffe://FEDERATION/edge/SITE      spiffe://FEDERATION/aggregator/NAME
//! ```
//!
//! What a peer may *do* is not in here: that is the aggregator's registry, asked on every message.
//!
//! A new edge holds a [`JoinToken`]. It makes its own key ([`PendingIdentity`]), recognises the aggregator by the
//! authority's fingerprint inside the token, and sends a certificate request; [`Authority::sign_csr`] takes nothing
//! from that request but the key. There is no plain-text mode and no switch that skips a check.
//!
//! This crate opens no socket. Start at [`Authority`], [`Identity`] and [`trust`].

pub mod authority;
pub mod enrol;
pub mod files;
pub mod identity;
pub mod token;
pub mod trust;

pub use authority::{Authority, AuthorityError, CLOCK_SKEW, LEAF_LIFETIME, Validity};
pub use enrol::{EnrolError, PendingIdentity, csr_public_key_fingerprint};
pub use files::FileError;
pub use identity::{
    Identity, IdentityError, PeerName, Role, certificate_fingerprint, certificate_validity, peer_name,
    public_key_fingerprint,
};
pub use token::{JoinToken, TokenError, secret_hash, secret_matches};
