//! The words of the fleet's brake and of its slots. Only said to and by edges whose Hello lists [`FEATURE_FLEET`], whose own signed policy has
//! `[budgets] fleet`; an edge says none of them before it has heard a [`FleetReportV1`], which tells that it is understood.

use serde::{Deserialize, Serialize};

/// Feature of a [`HelloV1`](super::HelloV1): the edge's policy has budgets of the fleet, so it tells whether services of it are unhealthy
/// or acted on, hears how many others are so, and asks for slots.
pub const FEATURE_FLEET: &str = "fleet-1";

/// How an edge's services are: no name, no class, no measurement. Only whether a count is above zero is used, and edges of this build say no more than
/// 0 or 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthV1 {
    /// Services with an open incident that presses.
    pub unhealthy: u16,
    /// Services on which an action is under way or being verified.
    pub acting: u16,
}

/// What a slot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum LeaseKind {
    /// An action that the policy marks `shared`.
    Action,
    /// A checkpoint that the configuration marks `shared`.
    Checkpoint,
}

impl LeaseKind {
    /// Every kind there is.
    pub const ALL: [Self; 2] = [Self::Action, Self::Checkpoint];

    /// The word in files and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Action => "action",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// Asks for a slot, or for more time with the one that the node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRequestV1 {
    /// Random number of this request; the answer repeats it. The edge counts its lease from the moment at which it sent *this*.
    pub request: u64,
    /// What for.
    pub kind: LeaseKind,
    /// Most nodes that the edge's policy lets hold one, in hundredths of the nodes, 1 to 100 (anything else counts as the nearest of them).
    pub share: u8,
    /// The lease has to last so many milliseconds to be of use; edges of this build round up to ten seconds.
    pub need_ms: u32,
}

/// The slot is free again. Said after the edge has let go of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseReleaseV1 {
    /// What it was for.
    pub kind: LeaseKind,
    /// Which lease.
    pub lease: u64,
}

/// How the fleet is. No nodes at all: the sender keeps account, and has nothing to tell yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetReportV1 {
    /// Nodes that tell how they are.
    pub nodes: u32,
    /// Those of them with an unhealthy service.
    pub unhealthy: u32,
    /// Those that act on one, the receiver left out.
    pub acting: u32,
}

/// A slot is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseGrantedV1 {
    /// Number of the request.
    pub request: u64,
    /// What for.
    pub kind: LeaseKind,
    /// Its number.
    pub lease: u64,
    /// So long, in milliseconds, counted by the edge from when it sent the request and by the aggregator from now.
    pub ttl_ms: u32,
}

/// Why no slot is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LeaseRefusal {
    /// Every slot is taken.
    Taken,
    /// The aggregator has started a short while ago and does not know whose the slots are.
    Young,
    /// No lease here lasts as long as the request needs.
    TooShort,
}

impl LeaseRefusal {
    /// The reason in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Taken => "every slot is taken",
            Self::Young => "the aggregator has just started and lends nothing yet",
            Self::TooShort => "the aggregator's leases are shorter than the action may take",
        }
    }
}

/// No slot is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRefusedV1 {
    /// Number of the request.
    pub request: u64,
    /// What for.
    pub kind: LeaseKind,
    /// Why.
    pub reason: LeaseRefusal,
    /// Not before so many milliseconds is it worth asking again.
    pub retry_after_ms: u32,
}
