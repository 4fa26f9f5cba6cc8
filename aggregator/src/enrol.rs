//! The door for new edges: a token and a certificate request in, a certificate out. A listener of its own, because the main
//! one demands a certificate from everybody.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use theriac_certs::{
    Authority, CLOCK_SKEW, certificate_fingerprint, certificate_validity, csr_public_key_fingerprint,
};
use theriac_protocol::message::{JoinRefusal, JoinReplyV1, JoinRequestV1};
use theriac_protocol::units::{NodeId, Timestamp};

use crate::metrics::{Metrics, Outcome};
use crate::store::tokens::{self, Issued, Redemption};
use crate::store::{Store, StoreError, Urgency};

/// How long an edge's certificate is good for.
pub const CERTIFICATE_LIFETIME: Duration = Duration::from_hours(90 * 24);

/// Answers join requests.
#[derive(Debug)]
pub struct Enrolment {
    federation: String,
    advertise: String,
    edge_authority: Arc<Authority>,
    aggregator_authority_der: Vec<u8>,
    store: Store,
    metrics: Metrics,
}

impl Enrolment {
    /// Enrols with `edge_authority`; new edges are told to connect to `advertise`.
    pub fn new(
        federation: String,
        advertise: String,
        edge_authority: Arc<Authority>,
        aggregator_authority_der: Vec<u8>,
        store: Store,
        metrics: Metrics,
    ) -> Self {
        Self {
            federation,
            advertise,
            edge_authority,
            aggregator_authority_der,
            store,
            metrics,
        }
    }

    /// Answers one request. Look-up, certificate, and spending the token are one transaction: a crash leaves the token as it
    /// was, and the same token with the same key gets the same certificate again within its hour.
    pub async fn answer(&self, request: JoinRequestV1) -> JoinReplyV1 {
        let Ok(key_fingerprint) = csr_public_key_fingerprint(&request.csr) else {
            return self.refused(JoinRefusal::BadRequest, "the certificate request does not parse");
        };
        let authority = Arc::clone(&self.edge_authority);
        let redeem = move |work: &crate::store::Work<'_>| match tokens::look_up(
            work,
            &request.token_id,
            &request.secret,
            &key_fingerprint,
        )? {
            Redemption::Refused(reason) => Ok(Err(reason)),
            Redemption::Repeated { node, certificate } => Ok(Ok((node, certificate))),
            Redemption::Fresh { node } => {
                let Some(issued) = issue(&authority, &request.csr, &node, key_fingerprint) else {
                    return Ok(Err(JoinRefusal::BadRequest));
                };
                tokens::spend(work, &request.token_id, &node, &issued)?;
                Ok(Ok((node, issued.certificate)))
            }
        };
        match self.store.write(Urgency::Now, redeem).await {
            Ok(Ok((node, certificate))) => {
                // The registry that sessions see must know the new site before it connects.
                self.store.touch();
                self.count("enrolled");
                tracing::info!(%node, "enrolled");
                JoinReplyV1::Enrolled {
                    node,
                    federation: self.federation.clone(),
                    aggregator: self.advertise.clone(),
                    certificate,
                    edge_authority: self.edge_authority.certificate_der().to_vec(),
                    aggregator_authority: self.aggregator_authority_der.clone(),
                }
            }
            Ok(Err(reason)) => self.refused(reason, "by the token"),
            Err(StoreError::Conflict(_)) => {
                self.refused(JoinRefusal::Spent, "the token was used in the meantime")
            }
            Err(error) => {
                tracing::error!(%error, hint = error.hint(), "an enrolment could not be recorded");
                let reason = match error {
                    StoreError::Full(_) => JoinRefusal::StorageFull,
                    _ => JoinRefusal::Busy,
                };
                self.refused(reason, "the store does not take it now")
            }
        }
    }

    fn refused(&self, reason: JoinRefusal, detail: &str) -> JoinReplyV1 {
        tracing::warn!(?reason, detail, "an enrolment was refused");
        self.count(match reason {
            JoinRefusal::UnknownToken => "unknown_token",
            JoinRefusal::Expired => "expired",
            JoinRefusal::Spent => "spent",
            JoinRefusal::BadRequest => "bad_request",
            JoinRefusal::Busy => "busy",
            JoinRefusal::RevokedKey => "revoked_key",
            JoinRefusal::StorageFull => "storage_full",
        });
        JoinReplyV1::Refused(reason)
    }

    fn count(&self, outcome: &'static str) {
        self.metrics.enrolments.get_or_create(&Outcome { outcome }).inc();
    }
}

fn issue(authority: &Authority, csr: &[u8], node: &NodeId, key_fingerprint: [u8; 32]) -> Option<Issued> {
    let not_before = SystemTime::now().checked_sub(CLOCK_SKEW)?;
    let certificate = match authority.sign_csr(csr, node, not_before, CERTIFICATE_LIFETIME) {
        Ok(certificate) => certificate,
        Err(error) => {
            tracing::warn!(%node, %error, "a certificate request was not signed");
            return None;
        }
    };
    let fingerprint = certificate_fingerprint(&certificate);
    let not_after = not_after(&certificate);
    Some(Issued {
        certificate,
        fingerprint,
        key_fingerprint,
        not_after,
    })
}

/// When a certificate ends; 0 when that cannot be read.
pub(crate) fn not_after(certificate: &[u8]) -> Timestamp {
    let end = certificate_validity(certificate)
        .ok()
        .map(|validity| validity.not_after);
    let since = end
        .and_then(|end| end.duration_since(UNIX_EPOCH).ok())
        .unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
