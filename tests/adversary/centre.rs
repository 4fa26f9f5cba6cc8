//! An aggregator without sockets and disks: frames in, answers out, on a clock that the test moves.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use theriac_aggregator::robust::{Options, PayloadRows, RuleName, rule};
use theriac_aggregator::validate::{RawUpdate, ValidatedUpdate, validate};
use theriac_protocol::codec::{body_bytes_max, decode_to_aggregator};
use theriac_protocol::compress::encode_f32;
use theriac_protocol::frame::{FrameHeader, HEADER_BYTES};
use theriac_protocol::message::{AnnounceV1, ToAggregator};
use theriac_protocol::refusal::{RefusalCode, RoundOutcome};
use theriac_protocol::round::{BaseModel, Input, Output, RoundConfig, RoundMachine, RoundTerms};
use theriac_protocol::units::{Digest, ModelVersion, Moment, NodeId, Round};

/// Largest payload that a peer may send.
pub(crate) const PAYLOAD_BYTES_MAX: u32 = 64 * 1024;

/// What a peer is told.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    /// The update is stored.
    Receipt(Digest),
    /// Turned away.
    Refused(RefusalCode),
    /// Nothing: the message needs no answer.
    Silence,
}

/// A round that ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ended {
    pub(crate) round: Round,
    pub(crate) outcome: RoundOutcome,
    /// Who is in the model, in order.
    pub(crate) members: Vec<NodeId>,
    /// The combined values as they would be published.
    pub(crate) combined: Vec<u8>,
}

/// The aggregator.
#[derive(Debug)]
pub(crate) struct Centre {
    machine: RoundMachine,
    now: Moment,
    values: u32,
    announced: Option<AnnounceV1>,
    stored: BTreeMap<(Round, NodeId), ValidatedUpdate>,
    arrived: Option<ValidatedUpdate>,
    combined: Vec<u8>,
    pub(crate) ended: Vec<Ended>,
}

pub(crate) const DEADLINE: Duration = Duration::from_secs(10);
pub(crate) const QUORUM: usize = 3;

impl Centre {
    /// An aggregator to which `nodes` are connected; its first round is open.
    pub(crate) fn new(terms: RoundTerms, nodes: &[NodeId]) -> Self {
        let values = terms.values;
        let config = RoundConfig {
            quorum: QUORUM,
            byzantine: 0,
            deadline: DEADLINE,
            pause: Duration::from_secs(1),
            late_updates: false,
            updates_max: usize::MAX,
            rounds_max: None,
            terms,
        };
        let base = BaseModel {
            version: ModelVersion(0),
            digest: Digest::of(b"initial model"),
        };
        let now = Moment(Duration::from_secs(100));
        let machine = RoundMachine::new(config, base, Round(0), [7; 32], now);
        let mut centre = Self {
            machine,
            now,
            values,
            announced: None,
            stored: BTreeMap::new(),
            arrived: None,
            combined: Vec::new(),
            ended: Vec::new(),
        };
        for node in nodes {
            centre.feed(Input::Admitted { node: node.clone() }, node);
        }
        centre
    }

    /// The terms of the open round.
    pub(crate) fn announced(&self) -> &AnnounceV1 {
        self.announced
            .as_ref()
            .expect("a round is open: the quorum is connected")
    }

    /// A peer's bytes arrive: header, body, message, validation, round; the first that objects answers.
    pub(crate) fn deliver(&mut self, node: &NodeId, frame: &[u8]) -> Answer {
        let refused = Answer::Refused;
        let Some((header, body)) = frame.split_first_chunk::<HEADER_BYTES>() else {
            return refused(RefusalCode::Malformed);
        };
        let header = match FrameHeader::parse(header, PAYLOAD_BYTES_MAX + 65_536 + 4) {
            Ok(header) => header,
            Err(error) => return refused(error.refusal_code()),
        };
        if body_bytes_max(header.kind, PAYLOAD_BYTES_MAX).is_some_and(|most| header.length > most) {
            return refused(RefusalCode::TooLarge);
        }
        // A stream that ends inside a frame never gives a body.
        let Some(body) = body.get(..header.length as usize) else {
            return refused(RefusalCode::Malformed);
        };
        match decode_to_aggregator(header.kind, Bytes::copy_from_slice(body)) {
            Ok(ToAggregator::Update(header, payload)) => self.update(
                node,
                RawUpdate {
                    node: node.clone(),
                    header,
                    payload,
                },
            ),
            Ok(ToAggregator::Decline(decline)) => self.feed(
                Input::Declined {
                    node: node.clone(),
                    round: decline.round,
                    reason: decline.reason,
                },
                node,
            ),
            Ok(ToAggregator::Goodbye) => self.feed(Input::Left { node: node.clone() }, node),
            Ok(
                ToAggregator::Hello(_)
                | ToAggregator::FetchModel(_)
                | ToAggregator::Verdict(_)
                | ToAggregator::Guarantee(_)
                | ToAggregator::Appraisal(_)
                | ToAggregator::Health(_)
                | ToAggregator::LeaseRequest(_)
                | ToAggregator::LeaseRelease(_),
            ) => Answer::Silence,
            Err(error) => refused(error.refusal_code()),
        }
    }

    /// Time passes.
    pub(crate) fn wait(&mut self, span: Duration) {
        let until = self.now.after(span);
        while let Some(due) = self.machine.poll_timeout().filter(|due| *due <= until) {
            self.now = self.now.max(due);
            self.machine.handle_timeout(self.now);
            self.carry_out(None);
        }
        self.now = until;
    }

    fn update(&mut self, node: &NodeId, raw: RawUpdate) -> Answer {
        let header = raw.header.clone();
        match validate(raw, self.announced()) {
            Err(error) => Answer::Refused(error.code()),
            Ok(valid) => {
                self.arrived = Some(valid);
                let input = Input::Update {
                    node: node.clone(),
                    round: header.round,
                    nonce: header.nonce,
                    base_digest: header.base_digest,
                    payload_digest: header.payload_digest,
                };
                let answer = self.feed(input, node);
                self.arrived = None;
                answer
            }
        }
    }

    fn feed(&mut self, input: Input, node: &NodeId) -> Answer {
        self.machine.handle(self.now, input);
        self.carry_out(Some(node))
    }

    /// Does what the machine asks for; every disk is prompt. Gives the answer to `node`.
    fn carry_out(&mut self, to: Option<&NodeId>) -> Answer {
        let mut answer = Answer::Silence;
        while let Some(output) = self.machine.poll_output() {
            let done = match output {
                Output::Open { announce, .. } => Some(Input::Opened {
                    round: announce.round,
                }),
                Output::Announce { announce, .. } => {
                    self.announced = Some(announce);
                    None
                }
                Output::Refuse { node, code, .. } => {
                    assert_eq!(Some(&node), to, "a refusal went to a bystander");
                    answer = Answer::Refused(code);
                    None
                }
                Output::Store {
                    node,
                    round,
                    payload_digest,
                } => {
                    let valid = self
                        .arrived
                        .take()
                        .expect("what is to be stored has just arrived");
                    assert_eq!(valid.header().payload_digest, payload_digest);
                    self.stored.insert((round, node.clone()), valid);
                    Some(Input::Stored { node, round })
                }
                Output::StoreLate { node, round, .. } => Some(Input::StoreFailed { node, round }),
                Output::Receipt {
                    node, payload_digest, ..
                } => {
                    assert_eq!(Some(&node), to, "a receipt went to a bystander");
                    answer = Answer::Receipt(payload_digest);
                    None
                }
                Output::Aggregate { round, members, .. } => {
                    let rows = members
                        .iter()
                        .map(|(node, _)| self.stored[&(round, node.clone())].row())
                        .collect();
                    let rows = PayloadRows::new(rows, self.values).unwrap();
                    let combined = rule(RuleName::TRIMMED_MEAN, 1, &Options::default())
                        .unwrap()
                        .combine(&rows)
                        .unwrap();
                    self.combined = encode_f32(&combined.values);
                    Some(Input::Aggregated {
                        round,
                        version: ModelVersion(round.0),
                        digest: Digest::of(&self.combined),
                    })
                }
                Output::Publish {
                    round,
                    version,
                    members,
                    ..
                } => {
                    self.ended.push(Ended {
                        round,
                        outcome: RoundOutcome::Published(version),
                        members: members.into_iter().map(|(node, _)| node).collect(),
                        combined: std::mem::take(&mut self.combined),
                    });
                    Some(Input::Published { round })
                }
                Output::Abort { round, reason } => {
                    let outcome = RoundOutcome::Aborted(reason);
                    self.ended.push(Ended {
                        round,
                        outcome,
                        members: Vec::new(),
                        combined: Vec::new(),
                    });
                    Some(Input::Aborted { round })
                }
                Output::Closed { .. } => {
                    self.announced = None;
                    None
                }
            };
            if let Some(done) = done {
                self.machine.handle(self.now, done);
            }
        }
        answer
    }
}
