//! What must hold whatever happens, judged after every step from what the world writes down and what is on the
//! aggregator's disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use theriac_lab::simulate::world::{AggregatorStore, Fact};
use theriac_protocol::round::BaseModel;
use theriac_protocol::units::{Digest, ModelVersion, NodeId, Round};

use crate::op::Tally;

/// A rule that was broken, with what it was seen by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) rule: &'static str,
    evidence: String,
}

impl Violation {
    pub(crate) fn new(rule: &'static str, evidence: &dyn fmt::Debug) -> Self {
        Self {
            rule,
            evidence: format!("{evidence:#?}"),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.evidence)
    }
}

/// One edge's attempt at one round.
type Attempt = (NodeId, Round, u64);

/// Remembers what was promised.
#[derive(Debug)]
pub(crate) struct Oracle {
    quorum: usize,
    base: BaseModel,
    /// Every durable round: its nonce and base, and whether it has ended.
    rounds: BTreeMap<Round, (u64, BaseModel, bool)>,
    /// The first durable update of each node and round.
    updates: BTreeMap<(Round, NodeId), Digest>,
    receipts: BTreeMap<(Round, NodeId), Digest>,
    outboxes: BTreeMap<Attempt, Digest>,
    sent: BTreeMap<Attempt, Digest>,
    /// Attempts that were trained for in the edge's present life.
    trained: BTreeSet<Attempt>,
    last_members: usize,
}

impl Oracle {
    pub(crate) fn new(quorum: usize) -> Self {
        Self {
            quorum,
            base: AggregatorStore::default().base(),
            rounds: BTreeMap::new(),
            updates: BTreeMap::new(),
            receipts: BTreeMap::new(),
            outboxes: BTreeMap::new(),
            sent: BTreeMap::new(),
            trained: BTreeSet::new(),
            last_members: 0,
        }
    }

    /// How many updates the last published round had.
    pub(crate) fn last_members(&self) -> usize {
        self.last_members
    }

    /// Judges one fact. `store` is the aggregator's disk as it is now.
    pub(crate) fn note(
        &mut self,
        fact: &Fact,
        store: &AggregatorStore,
        tally: &mut Tally,
    ) -> Result<(), Violation> {
        let rule = |holds: bool, rule: &'static str| {
            if holds {
                Ok(())
            } else {
                Err(Violation::new(rule, fact))
            }
        };
        match fact {
            Fact::TrainingAsked { node, round, nonce } => {
                tally.trainings += 1;
                let attempt = (node.clone(), *round, *nonce);
                rule(
                    !self.outboxes.contains_key(&attempt),
                    "an edge with an update on its disk trains again",
                )?;
                rule(
                    self.trained.insert(attempt),
                    "an edge trains twice in one life for one attempt",
                )
            }
            Fact::OutboxDurable {
                node,
                round,
                nonce,
                digest,
            } => {
                let first = self.outboxes.insert((node.clone(), *round, *nonce), *digest);
                rule(
                    first.is_none_or(|first| first == *digest),
                    "an edge has two payloads for one attempt",
                )
            }
            Fact::UpdateSent {
                node,
                round,
                nonce,
                digest,
            } => {
                let attempt = (node.clone(), *round, *nonce);
                rule(
                    self.outboxes.get(&attempt) == Some(digest),
                    "an edge sends what was not durable first",
                )?;
                let first = self.sent.insert(attempt, *digest);
                tally.updates_resent += u64::from(first.is_some());
                rule(
                    first.is_none_or(|first| first == *digest),
                    "an edge sends two payloads for one attempt",
                )
            }
            Fact::OutboxMissing { .. } => rule(false, "an edge drops an update it still has to send"),
            Fact::RoundDurable { round, nonce, base } => {
                rule(
                    *base == self.base,
                    "a round builds on something else than the latest model",
                )?;
                rule(
                    self.rounds.values().all(|(_, _, ended)| *ended),
                    "a round opens while another is open",
                )?;
                let fresh = self.rounds.last_key_value().is_none_or(|(last, _)| last < round);
                rule(fresh, "a round's number is used again")?;
                self.rounds.insert(*round, (*nonce, *base, false));
                Ok(())
            }
            Fact::Announced { round, nonce, base } => {
                let known = self.rounds.get(round) == Some(&(*nonce, *base, false));
                rule(known, "an announcement is not the durable open round's")
            }
            Fact::UpdateDurable { node, round, digest } => {
                let open = self.rounds.get(round).is_some_and(|(_, _, ended)| !ended);
                rule(open, "an update is stored for a round that is not open")?;
                let second = self.updates.insert((*round, node.clone()), *digest);
                rule(
                    second.is_none(),
                    "a second update of one node is stored in one round",
                )
            }
            Fact::ReceiptSent { node, round, digest } => {
                let key = (*round, node.clone());
                rule(
                    store.updates.get(&key) == Some(digest),
                    "a receipt for what is not durable",
                )?;
                tally.receipts_repeated += u64::from(self.receipts.insert(key, *digest).is_some());
                Ok(())
            }
            Fact::AggregationAsked { round, base, members } => {
                rule(
                    *base == self.base,
                    "an aggregation builds on something else than the latest model",
                )?;
                self.members(fact, *round, members, store)
            }
            Fact::PublishDurable {
                round,
                version,
                digest,
                members,
            } => {
                self.members(fact, *round, members, store)?;
                rule(
                    *version == self.base.version.next(),
                    "a version does not follow the one before",
                )?;
                self.ended(fact, *round)?;
                self.base = BaseModel {
                    version: *version,
                    digest: *digest,
                };
                self.last_members = members.len();
                tally.published += 1;
                Ok(())
            }
            Fact::AbortDurable { round } => {
                tally.aborted += 1;
                self.ended(fact, *round)
            }
            Fact::ClosedSent { round } => {
                let ended = self.rounds.get(round).is_some_and(|(_, _, ended)| *ended);
                rule(ended, "a round is called closed before its end is durable")
            }
            Fact::AggregatorRestarted { resumed } => {
                tally.resumed += u64::from(resumed.is_some());
                let open = self.rounds.iter().find(|(_, (_, _, ended))| !ended);
                let open = open.map(|(round, (nonce, _, _))| (*round, *nonce));
                rule(
                    *resumed == open,
                    "a restart goes on with another round or nonce than was open",
                )?;
                self.acknowledged(store)
            }
            Fact::EdgeRestarted { node } => {
                tally.edge_restarts += 1;
                self.trained.retain(|(of, _, _)| of != node);
                Ok(())
            }
            Fact::CodecFailed { .. } => rule(false, "a message of ours does not pass our own codec"),
        }
    }

    /// After the last step: nothing that was promised is missing.
    pub(crate) fn end(&self, store: &AggregatorStore) -> Result<(), Violation> {
        rule_of(
            store.base() == self.base,
            "the last model on the disk is not the last published",
            &store.base(),
        )?;
        let models: Vec<ModelVersion> = store.models.keys().copied().collect();
        let dense = models
            .iter()
            .zip(1..)
            .all(|(version, expected)| version.0 == expected);
        rule_of(dense, "model versions are not dense", &models)?;
        self.acknowledged(store)
    }

    /// Members are the stored updates, each node once, in order, and no fewer than the quorum.
    fn members(
        &self,
        fact: &Fact,
        round: Round,
        members: &[(NodeId, Digest)],
        store: &AggregatorStore,
    ) -> Result<(), Violation> {
        rule_of(
            members.len() >= self.quorum,
            "a round with fewer updates than the quorum",
            fact,
        )?;
        rule_of(
            members.is_sorted_by(|one, two| one.0 < two.0),
            "a node counts twice, or out of order",
            fact,
        )?;
        rule_of(
            members == store.updates_of(round),
            "the updates in a model are not the stored ones",
            fact,
        )?;
        let first = members
            .iter()
            .all(|(node, digest)| self.updates.get(&(round, node.clone())) == Some(digest));
        rule_of(first, "an update in a model is not the node's first", fact)
    }

    fn ended(&mut self, fact: &Fact, round: Round) -> Result<(), Violation> {
        let open = self.rounds.get_mut(&round).filter(|(_, _, ended)| !*ended);
        let Some((_, _, ended)) = open else {
            return Err(Violation::new("a round that is not open ends", fact));
        };
        *ended = true;
        Ok(())
    }

    fn acknowledged(&self, store: &AggregatorStore) -> Result<(), Violation> {
        let lost: Vec<_> = self
            .receipts
            .iter()
            .filter(|(key, digest)| store.updates.get(*key) != Some(*digest))
            .collect();
        rule_of(lost.is_empty(), "an acknowledged update is lost", &lost)
    }
}

fn rule_of(holds: bool, rule: &'static str, evidence: &dyn fmt::Debug) -> Result<(), Violation> {
    if holds {
        Ok(())
    } else {
        Err(Violation::new(rule, evidence))
    }
}

/// An oracle that never speaks proves nothing: each rule, broken by hand.
mod tests {
    use theriac_lab::simulate::world::node;

    use super::*;

    fn digest(fill: u8) -> Digest {
        Digest([fill; 32])
    }

    const ROUND: Round = Round(1);

    fn base() -> BaseModel {
        AggregatorStore::default().base()
    }

    /// A disk with round 1's updates of edges 0 and 1.
    fn store() -> AggregatorStore {
        let mut store = AggregatorStore::default();
        store.updates.insert((ROUND, node(0)), digest(10));
        store.updates.insert((ROUND, node(1)), digest(11));
        store
    }

    fn stored(edge: usize, fill: u8) -> Fact {
        Fact::UpdateDurable {
            node: node(edge),
            round: ROUND,
            digest: digest(fill),
        }
    }

    fn publish(members: &[(usize, u8)], version: u64) -> Fact {
        let members = members
            .iter()
            .map(|(edge, fill)| (node(*edge), digest(*fill)))
            .collect();
        Fact::PublishDurable {
            round: ROUND,
            version: ModelVersion(version),
            digest: digest(1),
            members,
        }
    }

    /// The rule that these facts break after a round with two stored updates was opened.
    fn broken_by(facts: &[Fact]) -> &'static str {
        let mut oracle = Oracle::new(2);
        let mut tally = Tally::default();
        let open = Fact::RoundDurable {
            round: ROUND,
            nonce: 7,
            base: base(),
        };
        for fact in [open, stored(0, 10), stored(1, 11)] {
            oracle.note(&fact, &store(), &mut tally).unwrap();
        }
        let broken = facts
            .iter()
            .find_map(|fact| oracle.note(fact, &store(), &mut tally).err());
        broken
            .unwrap_or_else(|| panic!("the oracle sees nothing wrong with {facts:?}"))
            .rule
    }

    #[test]
    fn honest_round_breaks_no_rule() {
        let mut oracle = Oracle::new(2);
        let mut tally = Tally::default();
        let (node_0, nonce) = (node(0), 7);
        let facts = [
            Fact::RoundDurable {
                round: ROUND,
                nonce,
                base: base(),
            },
            Fact::Announced {
                round: ROUND,
                nonce,
                base: base(),
            },
            Fact::TrainingAsked {
                node: node_0.clone(),
                round: ROUND,
                nonce,
            },
            Fact::OutboxDurable {
                node: node_0.clone(),
                round: ROUND,
                nonce,
                digest: digest(10),
            },
            Fact::UpdateSent {
                node: node_0.clone(),
                round: ROUND,
                nonce,
                digest: digest(10),
            },
            stored(0, 10),
            stored(1, 11),
            Fact::ReceiptSent {
                node: node_0.clone(),
                round: ROUND,
                digest: digest(10),
            },
            Fact::EdgeRestarted { node: node_0.clone() },
            Fact::UpdateSent {
                node: node_0,
                round: ROUND,
                nonce,
                digest: digest(10),
            },
            Fact::AggregatorRestarted {
                resumed: Some((ROUND, nonce)),
            },
            publish(&[(0, 10), (1, 11)], 1),
            Fact::ClosedSent { round: ROUND },
        ];
        for fact in &facts {
            oracle.note(fact, &store(), &mut tally).unwrap();
        }
        assert_eq!((tally.published, tally.resumed, tally.updates_resent), (1, 1, 1));
    }

    #[test]
    fn oracle_notices_a_breach_of_each_rule() {
        let attempt = || (node(0), ROUND, 7);
        let outbox = |fill| {
            let (node, round, nonce) = attempt();
            Fact::OutboxDurable {
                node,
                round,
                nonce,
                digest: digest(fill),
            }
        };
        let sent = |fill| {
            let (node, round, nonce) = attempt();
            Fact::UpdateSent {
                node,
                round,
                nonce,
                digest: digest(fill),
            }
        };
        let training = || {
            let (node, round, nonce) = attempt();
            Fact::TrainingAsked { node, round, nonce }
        };
        let restarted = || Fact::EdgeRestarted { node: node(0) };
        let cases: [(&[Fact], &str); 15] = [
            (
                &[publish(&[(0, 10)], 1)],
                "a round with fewer updates than the quorum",
            ),
            (
                &[publish(&[(0, 10), (0, 10)], 1)],
                "a node counts twice, or out of order",
            ),
            (
                &[publish(&[(0, 10), (1, 99)], 1)],
                "the updates in a model are not the stored ones",
            ),
            (
                &[publish(&[(0, 10), (1, 11)], 2)],
                "a version does not follow the one before",
            ),
            (
                &[
                    publish(&[(0, 10), (1, 11)], 1),
                    Fact::AbortDurable { round: ROUND },
                ],
                "a round that is not open ends",
            ),
            (
                &[stored(0, 12)],
                "a second update of one node is stored in one round",
            ),
            (
                &[Fact::ReceiptSent {
                    node: node(2),
                    round: ROUND,
                    digest: digest(1),
                }],
                "a receipt for what is not durable",
            ),
            (
                &[Fact::AggregatorRestarted {
                    resumed: Some((ROUND, 8)),
                }],
                "a restart goes on with another round or nonce than was open",
            ),
            (
                &[Fact::AggregatorRestarted { resumed: None }],
                "a restart goes on with another round or nonce than was open",
            ),
            (
                &[Fact::Announced {
                    round: ROUND,
                    nonce: 8,
                    base: base(),
                }],
                "an announcement is not the durable open round's",
            ),
            (
                &[Fact::ClosedSent { round: ROUND }],
                "a round is called closed before its end is durable",
            ),
            (
                &[training(), training()],
                "an edge trains twice in one life for one attempt",
            ),
            (
                &[outbox(1), restarted(), training()],
                "an edge with an update on its disk trains again",
            ),
            (&[sent(1)], "an edge sends what was not durable first"),
            (
                &[outbox(1), sent(1), outbox(2)],
                "an edge has two payloads for one attempt",
            ),
        ];
        for (facts, rule) in cases {
            assert_eq!(broken_by(facts), rule);
        }
    }

    #[test]
    fn oracle_notices_a_lost_acknowledged_update() {
        let mut oracle = Oracle::new(1);
        let mut tally = Tally::default();
        let receipt = Fact::ReceiptSent {
            node: node(0),
            round: ROUND,
            digest: digest(10),
        };
        oracle.note(&receipt, &store(), &mut tally).unwrap();
        assert_eq!(
            oracle.end(&AggregatorStore::default()).unwrap_err().rule,
            "an acknowledged update is lost"
        );
        oracle.end(&store()).unwrap();
    }
}
