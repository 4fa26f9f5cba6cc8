//! The fleet's account in the driver: what nodes tell, what they are told, slots. It shares nothing with rounds but the links.

use std::time::Duration;

use theriac_protocol::message::{HealthV1, LeaseReleaseV1, LeaseRequestV1, ToEdge};
use theriac_protocol::units::{Moment, NodeId};

use super::Driver;
use crate::fleet::{Fleet, FleetTerms};
use crate::metrics::{Kind, Outcome};
use crate::store::records;
use crate::store::{Store, StoreError, Urgency};

/// Name of the meta row with the longest term that a slot was ever lent for, in milliseconds.
const META_LONGEST: &str = "fleet_lease_ttl_ms";

/// What a site says to the fleet.
#[derive(Debug, Clone, Copy)]
pub(crate) enum OfFleet {
    /// How its services are.
    Health(HealthV1),
    /// It wants a slot.
    Request(LeaseRequestV1),
    /// It gives one back.
    Release(LeaseReleaseV1),
}

/// The fleet of a process that starts. The longest term is durable before anything is lent for it.
pub(super) async fn begin(
    store: &Store,
    terms: Option<FleetTerms>,
    now: Moment,
) -> Result<Option<Fleet>, StoreError> {
    let Some(terms) = terms else {
        return Ok(None);
    };
    let own = u64::try_from(terms.lease_ttl.as_millis()).unwrap_or(u64::MAX);
    let note = move |work: &crate::store::Work<'_>| {
        let known = match records::meta(work.connection(), META_LONGEST) {
            Ok(bytes) => Some(millis(&bytes)?),
            Err(StoreError::NotFound { .. }) => None,
            // It may have been longer than the present one, and is not to be written over.
            Err(error) => return Err(error),
        };
        let longest = known.unwrap_or(0).max(own);
        if known != Some(longest) {
            records::set_meta(work, META_LONGEST, &longest.to_le_bytes())?;
        }
        Ok(longest)
    };
    let longest = store.write(Urgency::Now, note).await?;
    tracing::info!(
        share = terms.share,
        lends_in_ms = longest,
        "account is kept of the fleet"
    );
    Ok(Some(Fleet::new(
        now,
        terms,
        Duration::from_millis(longest),
        rand::random(),
    )))
}

fn millis(bytes: &[u8]) -> Result<u64, StoreError> {
    let bytes = bytes.try_into().map_err(|_| StoreError::Corrupt {
        row: format!("meta row {META_LONGEST}"),
        reason: format!("it has {} bytes, not 8", bytes.len()),
    })?;
    Ok(u64::from_le_bytes(bytes))
}

impl Driver {
    /// A site speaks to the fleet. One whose Hello did not ask for it is not heard.
    pub(super) fn of_fleet(&mut self, node: &NodeId, said: OfFleet) {
        let now = self.now();
        let asks = self.links.get(node).is_some_and(|link| link.fleet);
        let Some(fleet) = self.fleet.as_mut().filter(|_| asks) else {
            return;
        };
        fleet.age(now);
        let (answer, outcome) = match said {
            OfFleet::Health(health) => {
                let before = fleet.counts();
                fleet.told(now, node, health);
                let after = fleet.counts();
                if before.unhealthy != after.unhealthy {
                    tracing::info!(%node, unhealthy = after.unhealthy, nodes = after.nodes, "nodes are unhealthy");
                }
                (None, None)
            }
            OfFleet::Request(asked) => {
                let nodes = fleet.counts().nodes;
                match fleet.lender.request(now, node, &asked, nodes) {
                    Ok(granted) => {
                        tracing::info!(%node, kind = asked.kind.as_str(), lease = granted.lease, "a slot is lent");
                        (Some(ToEdge::LeaseGranted(granted)), Some("granted"))
                    }
                    Err(refused) => {
                        let why = refused.reason.words();
                        tracing::debug!(%node, kind = asked.kind.as_str(), why, "no slot is lent");
                        (Some(ToEdge::LeaseRefused(refused)), Some("refused"))
                    }
                }
            }
            OfFleet::Release(release) => {
                let freed = fleet.lender.release(now, node, release);
                tracing::debug!(%node, kind = release.kind.as_str(), freed, "a slot is given back");
                (None, freed.then_some("released"))
            }
        };
        if let Some(outcome) = outcome {
            self.metrics.leases.get_or_create(&Outcome { outcome }).inc();
        }
        if matches!(outcome, Some("granted" | "released")) {
            self.show_fleet();
        }
        if let Some(answer) = answer {
            self.send(node, &answer);
        }
        self.tell_fleet();
    }

    /// The first word to a site that has just come; only then does it tell how it is.
    pub(super) fn greet_fleet(&self, node: &NodeId) {
        if let (Some(fleet), Some(link)) = (&self.fleet, self.links.get(node))
            && link.fleet
        {
            link.send(&ToEdge::Fleet(fleet.report(self.now(), node)));
        }
    }

    pub(super) fn fleet_timeout(&self) -> Option<Moment> {
        self.fleet.as_ref().map(Fleet::poll_timeout)
    }

    /// Forgets what is old, tells everybody when it is time, and shows it.
    pub(super) fn tell_fleet(&mut self) {
        let now = self.now();
        let Some(fleet) = &mut self.fleet else {
            return;
        };
        let (aged, due) = (fleet.age(now), fleet.is_due(now));
        if aged || due {
            self.show_fleet();
        }
        let Some(fleet) = self.fleet.as_ref().filter(|_| due) else {
            return;
        };
        let asks = self.links.iter().filter(|(_, link)| link.fleet);
        for (node, link) in asks.filter(|(_, link)| link.has_room()) {
            link.send(&ToEdge::Fleet(fleet.report(now, node)));
        }
    }

    pub(super) fn show_fleet(&self) {
        let now = self.now();
        let Some(status) = self.fleet.as_ref().map(|fleet| fleet.status(now)) else {
            return;
        };
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let metrics = &self.metrics;
        metrics.fleet_nodes.set(gauge(status.counts.nodes));
        metrics.fleet_unhealthy.set(gauge(status.counts.unhealthy));
        metrics.fleet_acting.set(gauge(status.counts.acting));
        for (kind, holders) in [
            ("action", &status.action_holders),
            ("checkpoint", &status.checkpoint_holders),
        ] {
            metrics
                .slots_held
                .get_or_create(&Kind { kind })
                .set(gauge(holders.len()));
        }
        self.with_status(|shown| shown.fleet = Some(status));
    }
}
