//! How the fleet is, and its slots: who tells what of its services, who may act. In memory: after a restart the nodes tell anew, and nothing is lent
//! until every lease that an earlier process may have lent is over.
//!
//! What is told from here only ever holds something back at an edge. Edges permit; the aggregator does not.

mod terms;

pub use terms::{FleetSettings, FleetTerms};

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_protocol::fleet::Lender;
use theriac_protocol::message::{FleetReportV1, HealthV1, LeaseKind};
use theriac_protocol::units::{Moment, NodeId};

/// Time between two reports when nothing changed: a few of them fit into the shortest age that a policy may ask for.
const REPORT_EVERY: Duration = Duration::from_secs(3);
/// Time between two reports when something did.
const REPORT_EVERY_MIN: Duration = Duration::from_secs(1);
/// Least time after a start in which nothing is told of the nodes: so long it takes until those that were connected have come back and told how they are.
/// Else a start would let go of everybody whom the common cause of a trouble holds back.
const YOUNG_MIN: Duration = Duration::from_secs(15);

/// The fleet as its nodes tell.
#[derive(Debug, Clone)]
pub struct Fleet {
    terms: FleetTerms,
    /// Its slots.
    pub lender: Lender,
    nodes: BTreeMap<NodeId, Told>,
    /// Of `nodes`, kept up with each change: reports go to all of them.
    counts: Counts,
    /// None of `nodes` told before.
    oldest: Moment,
    /// Nobody is told of the nodes before.
    tells_from: Moment,
    reported: Moment,
    /// Whether a count is another one than in the latest report.
    changed: bool,
}

/// What one node told last.
#[derive(Debug, Clone, Copy)]
struct Told {
    at: Moment,
    unhealthy: bool,
    acting: bool,
}

/// How many nodes are how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Nodes that tell how they are.
    pub nodes: usize,
    /// Those of them with an unhealthy service.
    pub unhealthy: usize,
    /// Those that act on one.
    pub acting: usize,
}

impl Counts {
    fn join(&mut self, told: Told) {
        self.nodes += 1;
        self.unhealthy += usize::from(told.unhealthy);
        self.acting += usize::from(told.acting);
    }

    fn leave(&mut self, told: Told) {
        self.nodes -= 1;
        self.unhealthy -= usize::from(told.unhealthy);
        self.acting -= usize::from(told.acting);
    }
}

impl Fleet {
    /// A fleet of which nothing is known. An earlier process may have lent slots for `longest`; `first` is a random number.
    pub fn new(now: Moment, terms: FleetTerms, longest: Duration, first: u64) -> Self {
        Self {
            lender: Lender::new(now, terms.lease_ttl, terms.share, longest, first),
            terms,
            nodes: BTreeMap::new(),
            counts: Counts::default(),
            oldest: now,
            tells_from: now.after(terms.state_age.max(YOUNG_MIN)),
            reported: now,
            changed: false,
        }
    }

    /// A node tells how its services are.
    pub fn told(&mut self, now: Moment, node: &NodeId, health: HealthV1) {
        let before = self.counts;
        let told = Told {
            at: now,
            unhealthy: health.unhealthy > 0,
            acting: health.acting > 0,
        };
        if let Some(former) = self.nodes.insert(node.clone(), told) {
            self.counts.leave(former);
        }
        self.counts.join(told);
        if self.counts.nodes == 1 {
            self.oldest = now;
        }
        self.changed |= before != self.counts;
    }

    /// Forgets what is old: nodes that fell silent, slots whose time is over. Whether anything was.
    pub fn age(&mut self, now: Moment) -> bool {
        let (before, age) = (self.counts.nodes, self.terms.state_age);
        if now.since(self.oldest) >= age {
            let counts = &mut self.counts;
            self.nodes.retain(|_, told| {
                let fresh = now.since(told.at) < age;
                if !fresh {
                    counts.leave(*told);
                }
                fresh
            });
            self.oldest = self.nodes.values().map(|told| told.at).min().unwrap_or(now);
        }
        let silent = self.counts.nodes < before;
        self.changed |= silent;
        self.lender.expire(now) || silent
    }

    /// How many nodes are how.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// What one node is told: the others count as acting. Of no nodes for a while after the start, which tells it to speak and nothing else.
    pub fn report(&self, now: Moment, node: &NodeId) -> FleetReportV1 {
        if now < self.tells_from {
            return FleetReportV1 {
                nodes: 0,
                unhealthy: 0,
                acting: 0,
            };
        }
        let counts = self.counts;
        let own = self.nodes.get(node).is_some_and(|told| told.acting);
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        FleetReportV1 {
            nodes: number(counts.nodes),
            unhealthy: number(counts.unhealthy),
            acting: number(counts.acting.saturating_sub(usize::from(own))),
        }
    }

    /// Whether it is time to tell everybody; then it counts as told.
    pub fn is_due(&mut self, now: Moment) -> bool {
        let due = now >= self.due();
        if due {
            (self.reported, self.changed) = (now, false);
        }
        due
    }

    fn due(&self) -> Moment {
        let every = if self.changed {
            REPORT_EVERY_MIN
        } else {
            REPORT_EVERY
        };
        self.reported.after(every)
    }

    /// When [`Self::age`] or [`Self::is_due`] has something to do.
    pub fn poll_timeout(&self) -> Moment {
        let any = !self.nodes.is_empty();
        let silent = any.then(|| self.oldest.after(self.terms.state_age));
        let expires = self.lender.poll_timeout();
        [silent, expires]
            .into_iter()
            .flatten()
            .fold(self.due(), Moment::min)
    }

    /// The fleet for people.
    pub fn status(&self, now: Moment) -> FleetStatus {
        let holders = |kind| {
            let holders = self.lender.holders(kind);
            holders.map(|(node, _)| node.to_string()).collect()
        };
        let quiet = self.lender.quiet_until().since(now);
        FleetStatus {
            counts: self.counts(),
            slots: self.lender.slots(self.nodes.len(), 100),
            action_holders: holders(LeaseKind::Action),
            checkpoint_holders: holders(LeaseKind::Checkpoint),
            lends_in_s: quiet.as_secs() + u64::from(quiet.subsec_nanos() > 0),
        }
    }
}

/// See [`Fleet::status`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FleetStatus {
    /// How many nodes are how.
    #[serde(flatten)]
    pub counts: Counts,
    /// Slots of each kind, at most; a node's own policy may allow fewer.
    pub slots: usize,
    /// Nodes that hold one for an action.
    pub action_holders: Vec<String>,
    /// Nodes that hold one for a checkpoint.
    pub checkpoint_holders: Vec<String>,
    /// Seconds until slots are lent again after the start.
    pub lends_in_s: u64,
}

impl FleetStatus {
    /// In a sentence.
    pub fn words(&self) -> String {
        let Counts {
            nodes,
            unhealthy,
            acting,
        } = self.counts;
        let counts = format!("{nodes} nodes tell how they are, {unhealthy} unhealthy, {acting} acting");
        if self.lends_in_s > 0 {
            return format!("{counts}; slots are lent in {} s", self.lends_in_s);
        }
        let kinds = [
            ("actions", &self.action_holders),
            ("checkpoints", &self.checkpoint_holders),
        ];
        let held = kinds.into_iter().filter(|(_, holders)| !holders.is_empty());
        let held = held.map(|(what, holders)| {
            let (count, slots, names) = (holders.len(), self.slots, holders.join(", "));
            format!("{count} of {slots} slots for {what}: {names}")
        });
        std::iter::once(counts).chain(held).collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn fleet() -> Fleet {
        Fleet::new(
            at(0),
            FleetSettings::default().check().unwrap(),
            Duration::ZERO,
            0,
        )
    }

    fn says(unhealthy: u16, acting: u16) -> HealthV1 {
        HealthV1 { unhealthy, acting }
    }

    #[test]
    fn nodes_are_counted_once_whatever_they_say_and_each_is_told_of_the_others() {
        let mut fleet = fleet();
        fleet.told(at(1), &node("a"), says(u16::MAX, u16::MAX));
        fleet.told(at(1), &node("b"), says(0, 1));
        fleet.told(at(1), &node("c"), says(0, 0));
        fleet.told(at(2), &node("a"), says(3, 1));
        let report = |name: &str| {
            let FleetReportV1 {
                nodes,
                unhealthy,
                acting,
            } = fleet.report(at(30), &node(name));
            (nodes, unhealthy, acting)
        };
        assert_eq!(
            (report("a"), report("c"), report("new")),
            ((3, 1, 1), (3, 1, 2), (3, 1, 2))
        );
    }

    #[test]
    fn nobody_is_told_of_the_nodes_before_those_that_were_there_can_have_come_back() {
        for (state_age, young) in [(10, 15), (60, 60)] {
            let settings = FleetSettings {
                state_age: Duration::from_secs(state_age),
                ..FleetSettings::default()
            };
            let mut fleet = Fleet::new(at(100), settings.check().unwrap(), Duration::ZERO, 0);
            fleet.told(at(100), &node("a"), says(1, 1));
            let nodes = |seconds| fleet.report(at(seconds), &node("b")).nodes;
            assert_eq!((nodes(100), nodes(99 + young), nodes(100 + young)), (0, 0, 1));
        }
    }

    #[test]
    fn the_running_counts_are_those_of_the_nodes_after_anything() {
        let mut fleet = fleet();
        let mut now = 0;
        for turn in 0..2_000_u16 {
            // Ten nodes, of which some fall silent for a while; no two of them alike for long.
            let name = format!("n{}", (turn * 7 + turn / 13) % 10);
            fleet.told(at(now), &node(&name), says(turn % 3, turn % 5 / 3));
            now += u64::from(turn % 11);
            fleet.age(at(now));
            let count = |which: fn(&Told) -> bool| fleet.nodes.values().filter(|told| which(told)).count();
            let found = Counts {
                nodes: fleet.nodes.len(),
                unhealthy: count(|told| told.unhealthy),
                acting: count(|told| told.acting),
            };
            assert_eq!(fleet.counts(), found, "turn {turn}");
            let old = Duration::from_secs(30);
            assert!(fleet.nodes.values().all(|told| at(now).since(told.at) < old));
        }
    }

    #[test]
    fn a_node_that_falls_silent_counts_for_its_time_and_no_longer() {
        let mut fleet = fleet();
        fleet.told(at(1), &node("a"), says(1, 0));
        fleet.told(at(20), &node("b"), says(0, 0));
        assert!(!fleet.age(at(30)));
        assert!(fleet.age(at(31)));
        let counts = Counts {
            nodes: 1,
            ..Counts::default()
        };
        assert_eq!(fleet.counts(), counts);
    }

    #[test]
    fn a_change_is_told_within_a_second_and_everything_else_every_three() {
        let mut fleet = fleet();
        assert!(!fleet.is_due(at(2)) && fleet.is_due(at(3)));
        fleet.told(at(3), &node("a"), says(0, 0));
        assert_eq!(fleet.poll_timeout(), at(4));
        assert!(fleet.is_due(at(4)) && !fleet.is_due(at(6)));
        fleet.told(at(6), &node("a"), says(0, 0));
        assert!(!fleet.is_due(at(6)) && fleet.is_due(at(7)));
    }

    #[test]
    fn it_says_in_words_who_holds_what() {
        use theriac_protocol::message::LeaseRequestV1;
        let mut fleet = fleet();
        fleet.told(at(1), &node("a"), says(1, 1));
        let words = fleet.status(at(1)).words();
        assert_eq!(
            words,
            "1 nodes tell how they are, 1 unhealthy, 1 acting; slots are lent in 299 s"
        );
        let asked = LeaseRequestV1 {
            request: 1,
            kind: LeaseKind::Action,
            share: 100,
            need_ms: 1_000,
        };
        fleet.lender.request(at(300), &node("a"), &asked, 1).unwrap();
        let words = fleet.status(at(300)).words();
        assert!(words.ends_with("; 1 of 1 slots for actions: a"), "{words}");
    }
}
