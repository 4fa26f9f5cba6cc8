//! Hostile sites of a simulated federation: they wait until the honest updates of the round are on their way, know them all, and
//! agree on what they send.

use std::collections::BTreeMap;

use bytes::Bytes;
use theriac_aggregator::validate::RawUpdate;
use theriac_protocol::compress::encode_f32;
use theriac_protocol::message::{AnnounceV1, Encoding, ToAggregator, UpdateV1};
use theriac_protocol::participant::Input;
use theriac_protocol::units::{Digest, NodeId, Round};

use super::center::Center;
use super::member::Member;
use crate::attack::{Kind, Scene};

/// What they know and wait for.
#[derive(Debug)]
pub(super) struct Hostile {
    seed: u64,
    waiting: Vec<(NodeId, AnnounceV1)>,
    made: Vec<(NodeId, Input)>,
    round: Round,
    /// Honest updates of this round, as they were sent.
    honest: Vec<(RawUpdate, Vec<f32>)>,
    /// Each site's update of the round before and of this one, for replays.
    sent: BTreeMap<NodeId, (UpdateV1, Bytes)>,
    /// Updates that are kept back until their round is over.
    late: Vec<(NodeId, UpdateV1, Bytes)>,
}

impl Hostile {
    /// Nothing known yet.
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            waiting: Vec::new(),
            made: Vec::new(),
            round: Round(0),
            honest: Vec::new(),
            sent: BTreeMap::new(),
            late: Vec::new(),
        }
    }

    /// A hostile site is asked for an update.
    pub(super) fn wait(&mut self, node: NodeId, announce: AnnounceV1) {
        self.waiting.push((node, announce));
    }

    /// An honest site made its update.
    pub(super) fn overhear(&mut self, node: &NodeId, round: Round, member: &Member<'_>) {
        if round != self.round {
            self.round = round;
            self.honest.clear();
        }
        if let Some((header, payload)) = &member.outbox {
            let raw = RawUpdate {
                node: node.clone(),
                header: header.clone(),
                payload: payload.clone(),
            };
            self.honest.push((raw, member.values()));
        }
    }

    /// Whether a hostile site waits.
    pub(super) fn is_due(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Those who wait.
    pub(super) fn take_waiting(&mut self) -> Vec<(NodeId, AnnounceV1)> {
        std::mem::take(&mut self.waiting)
    }

    /// A hostile site has what an honest one would send, or declines.
    pub(super) fn made(&mut self, node: NodeId, input: Input) {
        self.made.push((node, input));
    }

    /// Puts what the attack says into the outboxes of those who made an update; what each machine is told.
    pub(super) fn craft(
        &mut self,
        center: &Center,
        members: &mut BTreeMap<NodeId, Member<'_>>,
    ) -> Vec<(NodeId, Input)> {
        let mut made = std::mem::take(&mut self.made);
        let ready: Vec<NodeId> = made
            .iter()
            .filter(|(_, input)| matches!(input, Input::Trained { .. }))
            .map(|(node, _)| node.clone())
            .collect();
        let attack = ready
            .first()
            .and_then(|node| members.get(node))
            .and_then(|member| member.attack);
        let Some(attack) = attack else {
            return made;
        };
        let of = |node: &NodeId| members.get(node).map(Member::values).unwrap_or_default();
        let own: Vec<Vec<f32>> = ready.iter().map(of).collect();
        let honest: Vec<Vec<f32>> = self.honest.iter().map(|(_, values)| values.clone()).collect();
        let with = |node: &NodeId, values: &[f32]| {
            let (header, payload) = members.get(node)?.with_values(values)?;
            Some(RawUpdate {
                node: node.clone(),
                header,
                payload,
            })
        };
        let deployed = |rows: &[Vec<f32>]| {
            let hostile = ready.iter().zip(rows).filter_map(|(node, row)| with(node, row));
            let all = self.honest.iter().map(|(raw, _)| raw.clone()).chain(hostile);
            center.trial(all.collect())
        };
        let rows = attack.craft(&Scene {
            honest: &honest,
            own: &own,
            round: self.round,
            seed: self.seed,
            previous: center.previous(),
            bound: center.bound(),
            deployed: &deployed,
        });
        let changed: BTreeMap<NodeId, RawUpdate> = ready
            .iter()
            .zip(&rows)
            .zip(&own)
            .filter(|((_, row), own)| *row != *own)
            .filter_map(|((node, row), _)| Some((node.clone(), with(node, row)?)))
            .collect();
        for (node, raw) in changed {
            let digest = raw.header.payload_digest;
            if let Some(member) = members.get_mut(&node) {
                member.outbox = Some((raw.header, raw.payload));
            }
            for (_, input) in made.iter_mut().filter(|(other, _)| *other == node) {
                if let Input::Trained { payload_digest, .. } = input {
                    *payload_digest = digest;
                }
            }
        }
        made
    }

    /// The updates that go out when a site's machine sends: one, or what an attack on messages makes of it.
    pub(super) fn sent(&mut self, node: &NodeId, member: &Member<'_>) -> Vec<(UpdateV1, Bytes)> {
        let Some((header, payload)) = member.outbox.clone() else {
            return Vec::new();
        };
        match member.attack.map(|attack| attack.kind) {
            Some(Kind::WrongLength) => {
                let cut = if matches!(header.encoding, Encoding::F32) {
                    4
                } else {
                    1
                };
                let payload = payload.slice(..payload.len().saturating_sub(cut));
                let header = UpdateV1 {
                    payload_digest: Digest::of(&payload),
                    ..header
                };
                vec![(header, payload)]
            }
            Some(Kind::Replay) => {
                let kept = self.sent.insert(node.clone(), (header.clone(), payload.clone()));
                let earlier = kept.filter(|(kept, _)| kept.round < header.round);
                // In the first round nothing lies ready but what was made for another opening of it.
                let another = UpdateV1 {
                    nonce: header.nonce ^ 1,
                    ..header
                };
                vec![earlier.unwrap_or((another, payload))]
            }
            Some(Kind::Duplicate) => {
                // Other bytes that are as plausible as the first.
                let other: Vec<f32> = member.values().iter().map(|value| value * 0.9375).collect();
                let second = UpdateV1 {
                    encoding: Encoding::F32,
                    payload_digest: Digest::of(&encode_f32(&other)),
                    ..header.clone()
                };
                vec![(header, payload), (second, encode_f32(&other).into())]
            }
            Some(Kind::Late) => {
                self.late.push((node.clone(), header, payload));
                Vec::new()
            }
            _ => vec![(header, payload)],
        }
    }

    /// The next late update whose round is over.
    pub(super) fn overdue(&mut self, center: &Center) -> Option<(NodeId, ToAggregator)> {
        let index = self
            .late
            .iter()
            .position(|(_, header, _)| center.is_over(header.round))?;
        let (node, header, payload) = self.late.remove(index);
        Some((node, ToAggregator::Update(header, payload)))
    }
}
