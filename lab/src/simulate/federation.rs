//! Sites and centre together, until the last round is over.
//!
//! Messages lie in one queue, in the order of sending. Time stands still while any message, output or judgement is left, and
//! then jumps to the next deadline. So the same arguments give the same rounds; only privacy noise differs.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};
use rayon::prelude::*;
use theriac_model::detector::Detector;
use theriac_model::feature::FeatureSchema;
use theriac_model::global::GlobalModel;
use theriac_protocol::codec::{self, CodecError, Encoded};
use theriac_protocol::frame::{FrameError, FrameHeader, HEADER_BYTES};
use theriac_protocol::message::{
    AnnounceV1, FetchModelV1, GateVerdict, ModelV1, ToAggregator, ToEdge, WelcomeV1,
};
use theriac_protocol::participant::{Input, Output};
use theriac_protocol::units::{Moment, NodeId};

use super::args::Settings;
use super::center::{Center, RoundRecord};
use super::hostile::Hostile;
use super::member::{Member, MemberError};

/// Why a simulated federation cannot go on. Nothing that a hostile site sends is among it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FederationError {
    /// A site cannot make its update.
    #[error("site `{site}`: {source}")]
    Member {
        /// Which.
        site: NodeId,
        /// Why.
        source: MemberError,
    },
    /// A message of the program itself does not pass the codec.
    #[error("a message cannot be carried: {0}")]
    Codec(#[from] CodecError),
    /// A frame of the program itself is refused.
    #[error("a frame cannot be carried: {0}")]
    Frame(#[from] FrameError),
}

/// Bytes of one site in one round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From the site.
    pub up: u64,
    /// To the site.
    pub down: u64,
}

/// What came of the rounds.
#[derive(Debug)]
pub struct Outcome {
    /// Header of the last published model.
    pub header: ModelV1,
    /// That model.
    pub model: GlobalModel,
    /// The rounds in order.
    pub records: Vec<RoundRecord>,
    /// Bytes by round and site.
    pub traffic: BTreeMap<(u64, NodeId), Traffic>,
    /// How each site stands.
    pub sites: BTreeMap<NodeId, Settled>,
    /// How each newcomer stands, in the order they came.
    pub newcomers: Vec<Settled>,
}

/// How a site stands after the last round.
#[derive(Debug)]
pub struct Settled {
    /// The detector in use; `None` for a site whose gate was not asked.
    pub detector: Option<Detector>,
    /// What its gate decided last.
    pub verdict: Option<GateVerdict>,
    /// By which figures.
    pub reason: Option<String>,
    /// ε spent; `None` without noise.
    pub epsilon: Option<f64>,
}

/// Runs all rounds among `members`; then the `newcomers`, one after another, fetch the model and judge it. They may be the same site with
/// different rows.
///
/// # Errors
/// [`FederationError`]
pub fn run(
    center: Center,
    members: Vec<Member<'_>>,
    newcomers: Vec<Member<'_>>,
    settings: &Settings,
    schema: &FeatureSchema,
) -> Result<Outcome, FederationError> {
    let mut federation = Federation {
        center,
        members: BTreeMap::new(),
        queue: VecDeque::new(),
        judging: Vec::new(),
        hostile: Hostile::new(settings.args.seed),
        traffic: BTreeMap::new(),
        now: Moment::default(),
        settings,
        schema,
    };
    for member in members {
        let node = member.site.name.clone();
        let welcome = federation.center.admit(federation.now, &node);
        federation.join(node, member, welcome)?;
    }
    federation.run()?;
    let mut arrived = Vec::new();
    for member in newcomers {
        let node = member.site.name.clone();
        federation.traffic.retain(|(_, other), _| *other != node);
        let welcome = federation.center.welcome(federation.now, &node);
        federation.join(node.clone(), member, welcome)?;
        federation.run()?;
        arrived.extend(federation.members.remove(&node).map(settled));
    }
    let header = federation.center.model().0.clone();
    let (model, records) = federation.center.into_records();
    let sites = federation.members.into_iter();
    let sites = sites.map(|(node, member)| (node, settled(member))).collect();
    Ok(Outcome {
        header,
        model,
        records,
        traffic: federation.traffic,
        sites,
        newcomers: arrived,
    })
}

fn settled(member: Member<'_>) -> Settled {
    Settled {
        epsilon: member.epsilon(),
        detector: member.detector.map(|(detector, _)| detector),
        verdict: member.verdict,
        reason: member.reason,
    }
}

/// A message on its way.
#[derive(Debug)]
enum Message {
    Up(Encoded),
    Down(Encoded),
}

struct Federation<'a, 'b> {
    center: Center,
    members: BTreeMap<NodeId, Member<'a>>,
    queue: VecDeque<(NodeId, Message)>,
    /// Sites with a model to judge.
    judging: Vec<NodeId>,
    /// Honest updates of the running round, and hostile sites that wait for them.
    hostile: Hostile,
    traffic: BTreeMap<(u64, NodeId), Traffic>,
    now: Moment,
    settings: &'b Settings,
    schema: &'b FeatureSchema,
}

impl<'a> Federation<'a, '_> {
    fn join(
        &mut self,
        node: NodeId,
        mut member: Member<'a>,
        welcome: WelcomeV1,
    ) -> Result<(), FederationError> {
        member.participant.handle(self.now, Input::Connected);
        self.send(&node, &ToEdge::Welcome(welcome))?;
        self.members.insert(node, member);
        Ok(())
    }

    fn run(&mut self) -> Result<(), FederationError> {
        loop {
            let messages = self.center.poll(self.now);
            for (node, message) in messages {
                self.send(&node, &message)?;
            }
            self.poll_members()?;
            if let Some((node, message)) = self.queue.pop_front() {
                self.deliver(node, message)?;
            } else if self.hostile.is_due() {
                self.craft()?;
            } else if let Some((node, update)) = self.hostile.overdue(&self.center) {
                self.up(node, &update)?;
            } else if !self.judging.is_empty() {
                self.judge();
            } else if !self.pass_time() {
                return Ok(());
            }
        }
    }

    /// Carries out what the participants ask for.
    fn poll_members(&mut self) -> Result<(), FederationError> {
        let mut up = Vec::new();
        for (node, member) in &mut self.members {
            while let Some(output) = member.participant.poll_output() {
                match output {
                    Output::Train { announce } if member.attack.is_some() => {
                        self.hostile.wait(node.clone(), announce);
                    }
                    Output::Train { announce } => {
                        let input = train(member, &announce, self.settings, self.schema)?;
                        member.participant.handle(self.now, input);
                        self.hostile.overhear(node, announce.round, member);
                    }
                    Output::SendUpdate { .. } => {
                        let updates = self.hostile.sent(node, member);
                        up.extend(
                            updates
                                .into_iter()
                                .map(|(h, p)| (node.clone(), ToAggregator::Update(h, p))),
                        );
                    }
                    Output::SendDecline(decline) => up.push((node.clone(), ToAggregator::Decline(decline))),
                    Output::FetchModel { version } => {
                        up.push((node.clone(), ToAggregator::FetchModel(FetchModelV1 { version })));
                    }
                    Output::Judge { .. } => self.judging.push(node.clone()),
                    Output::SendVerdict(verdict) => up.push((node.clone(), ToAggregator::Verdict(verdict))),
                    Output::DropOutbox { .. } => member.outbox = None,
                    Output::CancelTraining { .. } | Output::Report(_) => {}
                }
            }
        }
        for (node, message) in up {
            self.up(node, &message)?;
        }
        Ok(())
    }

    /// Every hostile site makes its update, now that those of the honest are known.
    fn craft(&mut self) -> Result<(), FederationError> {
        for (node, announce) in self.hostile.take_waiting() {
            let Some(member) = self.members.get_mut(&node) else {
                continue;
            };
            let input = train(member, &announce, self.settings, self.schema)?;
            self.hostile.made(node, input);
        }
        for (node, input) in self.hostile.craft(&self.center, &mut self.members) {
            if let Some(member) = self.members.get_mut(&node) {
                member.participant.handle(self.now, input);
            }
        }
        Ok(())
    }

    fn up(&mut self, node: NodeId, message: &ToAggregator) -> Result<(), FederationError> {
        let message = codec::encode_to_aggregator(message)?;
        self.count(&node).up += message.len() as u64;
        self.queue.push_back((node, Message::Up(message)));
        Ok(())
    }

    fn send(&mut self, node: &NodeId, message: &ToEdge) -> Result<(), FederationError> {
        let message = codec::encode_to_edge(message)?;
        self.count(node).down += message.len() as u64;
        self.queue.push_back((node.clone(), Message::Down(message)));
        Ok(())
    }

    /// Where bytes of a site are counted; what is said before the first round counts as its part.
    fn count(&mut self, node: &NodeId) -> &mut Traffic {
        self.traffic
            .entry((self.center.round().max(1), node.clone()))
            .or_default()
    }

    fn deliver(&mut self, node: NodeId, message: Message) -> Result<(), FederationError> {
        match message {
            Message::Up(frame) => {
                let (kind, body) = open(frame)?;
                let message = codec::decode_to_aggregator(kind, body)?;
                if let Some(answer) = self.center.handle(self.now, &node, message) {
                    self.send(&node, &answer)?;
                }
            }
            Message::Down(frame) => {
                let (kind, body) = open(frame)?;
                let message = codec::decode_to_edge(kind, body)?;
                if let Some(member) = self.members.get_mut(&node)
                    && let Some(input) = input(member, message)
                {
                    member.participant.handle(self.now, input);
                }
            }
        }
        Ok(())
    }

    /// Every gate on its own rows, in parallel.
    fn judge(&mut self) {
        let nodes = std::mem::take(&mut self.judging);
        let judged: Vec<_> = self
            .members
            .par_iter_mut()
            .filter(|(node, _)| nodes.contains(node))
            .map(|(node, member)| (node.clone(), member.judge()))
            .collect();
        for (node, verdict) in judged {
            if let Some(member) = self.members.get_mut(&node)
                && let Some((header, _)) = &member.model
            {
                let version = header.version;
                member
                    .participant
                    .handle(self.now, Input::Judged { version, verdict });
            }
        }
    }

    /// Jumps to the next deadline; `false` when there is none and all is over.
    fn pass_time(&mut self) -> bool {
        let members = self
            .members
            .values()
            .filter_map(|member| member.participant.poll_timeout());
        let Some(next) = members.chain(self.center.timeout()).min() else {
            return false;
        };
        self.now = self.now.max(next);
        self.center.handle_timeout(self.now);
        for member in self.members.values_mut() {
            member.participant.handle_timeout(self.now);
        }
        true
    }
}

/// Makes a member's update; what its machine is told.
fn train(
    member: &mut Member<'_>,
    announce: &AnnounceV1,
    settings: &Settings,
    schema: &FeatureSchema,
) -> Result<Input, FederationError> {
    let (round, nonce) = (announce.round, announce.nonce);
    let made = member
        .train(announce, settings, schema)
        .map_err(|source| FederationError::Member {
            site: member.site.name.clone(),
            source,
        })?;
    Ok(match made {
        Ok(payload_digest) => Input::Trained {
            round,
            nonce,
            payload_digest,
        },
        Err(reason) => Input::CannotTrain { round, nonce, reason },
    })
}

/// What a site's machine is told of a message.
fn input(member: &mut Member<'_>, message: ToEdge) -> Option<Input> {
    Some(match message {
        ToEdge::Welcome(welcome) => Input::Welcome(welcome),
        ToEdge::Refusal(refusal) => Input::Refusal(refusal),
        ToEdge::Announce(announce) => Input::Announce(announce),
        ToEdge::Receipt(receipt) => Input::Receipt(receipt),
        ToEdge::Model(header, payload) => {
            member.receive(header.clone(), &payload);
            Input::Model { header }
        }
        ToEdge::Closed(closed) => Input::Closed(closed),
        ToEdge::Goodbye(_)
        | ToEdge::Seal(_)
        | ToEdge::Candidate(..)
        | ToEdge::Fleet(_)
        | ToEdge::LeaseGranted(_)
        | ToEdge::LeaseRefused(_) => return None,
    })
}

/// What a reader does with a frame: its header, then its body.
fn open(frame: Encoded) -> Result<(u16, Bytes), FederationError> {
    let mut bytes = BytesMut::with_capacity(frame.len());
    bytes.extend_from_slice(&frame.head);
    bytes.extend_from_slice(&frame.payload);
    let mut bytes = bytes.freeze();
    let head = bytes.split_to(HEADER_BYTES.min(bytes.len()));
    let mut header = [0; HEADER_BYTES];
    header[..head.len()].copy_from_slice(&head);
    let header = FrameHeader::parse(&header, u32::MAX)?;
    Ok((header.kind, bytes))
}
