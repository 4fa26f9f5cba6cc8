//! A light edge: real certificate, real TLS, real messages, but the update was made beforehand. What is measured is the
//! aggregator.

use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;
use theriac_aggregator::layout::ModelSpec;
use theriac_certs::{Identity, trust};
use theriac_protocol::compress::encode_int8;
use theriac_protocol::message::{
    AnnounceV1, Encoding, FetchModelV1, HelloV1, PROTOCOL_MAX, PROTOCOL_MIN, PrivacyClaimV1, ToAggregator,
    ToEdge, UpdateV1,
};
use theriac_protocol::refusal::RoundOutcome;
use theriac_protocol::units::{Delta, Digest, Epsilon, ModelVersion, NoiseMultiplier};
use theriac_transport::{EdgeSession, Endpoint, connect};
use tokio::sync::{mpsc, watch};

use super::LoadError;

/// An update that is the same in every round, apart from its header.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    encoding: Encoding,
    payload: Bytes,
    digest: Digest,
    values: u32,
}

impl Prepared {
    /// `dimension` values in ±√3, which is noise of standard deviation 1 as agreed, on the int8 grid, the same for the same `seed`.
    pub(super) fn new(dimension: u32, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut unit = move || {
            // xorshift64 (Marsaglia 2003): any numbers do, they only have to be the same every time.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            f32::from(u16::try_from(state >> 48).unwrap_or(0)) / 65_536.0
        };
        let values: Vec<f32> = (0..dimension)
            .map(|_| (unit() * 2.0 - 1.0) * 3.0_f32.sqrt())
            .collect();
        let (encoding, payload) = encode_int8(&values, unit);
        Self {
            encoding,
            digest: Digest::of(&payload),
            payload: payload.into(),
            values: dimension,
        }
    }

    /// The update that answers `announce`, with the claim that the terms ask for.
    fn answer(&self, announce: &AnnounceV1) -> Result<ToAggregator, LoadError> {
        let header = UpdateV1 {
            round: announce.round,
            nonce: announce.nonce,
            kind: announce.kind,
            base_digest: announce.base_digest,
            layout_digest: announce.layout_digest,
            values: self.values,
            encoding: self.encoding,
            payload_digest: self.digest,
            blocks_bound: announce.blocks_max,
            privacy: PrivacyClaimV1 {
                clip_norm: announce.clip_norm,
                noise_multiplier: announce.noise_multiplier,
                epsilon_spent: Epsilon::new(1.0)?,
                delta: Delta::new(1e-6)?,
                ledger_head: Digest::of(&announce.round.0.to_le_bytes()),
                ledger_records: announce.round.0,
            },
        };
        Ok(ToAggregator::Update(header, self.payload.clone()))
    }
}

/// What one edge tells the measurement.
#[derive(Debug)]
pub(super) enum Told {
    /// It was asked for an update.
    Announced { edge: usize, at: Instant },
    /// A round ended for it.
    Closed {
        edge: usize,
        at: Instant,
        published: bool,
    },
    /// Something it sent was refused, or it lost its connection.
    Lost { edge: usize, why: String },
}

/// A connected edge.
pub(super) struct LightEdge {
    index: usize,
    session: EdgeSession,
    held: ModelVersion,
    waiting: Option<AnnounceV1>,
    update: Prepared,
}

impl LightEdge {
    /// Connects, up to Welcome.
    pub(super) async fn connect(
        index: usize,
        endpoint: &Endpoint,
        at: SocketAddr,
        identity: &Identity,
        aggregator_authority: &[u8],
        spec: &ModelSpec,
        update: Prepared,
    ) -> Result<Self, LoadError> {
        let tls = trust::client_config(identity, aggregator_authority)?;
        let (session, welcome) = connect(endpoint, at, "localhost", tls, hello(spec)?).await?;
        Ok(Self {
            index,
            session,
            held: ModelVersion(0),
            waiting: welcome.round,
            update,
        })
    }

    /// Answers every announcement until told to stop; gives the bytes sent and received.
    pub(super) async fn work(
        mut self,
        told: mpsc::Sender<Told>,
        mut stop: watch::Receiver<bool>,
    ) -> (u64, u64) {
        let edge = self.index;
        if let Err(error) = self.serve(&told, &mut stop).await {
            told.send(Told::Lost {
                edge,
                why: error.to_string(),
            })
            .await
            .ok();
        }
        let traffic = self.session.handle().traffic();
        let (sender, receiver) = self.session.split();
        sender.finish().await;
        drop(receiver);
        (traffic.bytes_sent, traffic.bytes_received)
    }

    async fn serve(
        &mut self,
        told: &mpsc::Sender<Told>,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<(), LoadError> {
        if let Some(announce) = self.waiting.take() {
            self.announced(announce, told).await?;
        }
        loop {
            let message = tokio::select! {
                message = self.session.recv() => message?,
                _ = stop.wait_for(|stop| *stop) => return Ok(()),
            };
            let edge = self.index;
            match message {
                ToEdge::Announce(announce) => self.announced(announce, told).await?,
                ToEdge::Model(header, _payload) => {
                    self.held = header.version;
                    if let Some(announce) = self.waiting.take() {
                        self.session.send(&self.update.answer(&announce)?).await?;
                    }
                }
                ToEdge::Closed(closed) => {
                    let published = matches!(closed.outcome, RoundOutcome::Published(_));
                    told.send(Told::Closed {
                        edge,
                        at: Instant::now(),
                        published,
                    })
                    .await
                    .ok();
                }
                ToEdge::Refusal(refusal) => {
                    told.send(Told::Lost {
                        edge,
                        why: format!("refused: {}", refusal.code),
                    })
                    .await
                    .ok();
                }
                ToEdge::Receipt(_)
                | ToEdge::Welcome(_)
                | ToEdge::Seal(_)
                | ToEdge::Candidate(..)
                | ToEdge::Fleet(_)
                | ToEdge::LeaseGranted(_)
                | ToEdge::LeaseRefused(_) => {}
                ToEdge::Goodbye(_) => return Ok(()),
            }
        }
    }

    /// An edge that lacks the base model fetches it first, as a real one does.
    async fn announced(&mut self, announce: AnnounceV1, told: &mpsc::Sender<Told>) -> Result<(), LoadError> {
        told.send(Told::Announced {
            edge: self.index,
            at: Instant::now(),
        })
        .await
        .ok();
        if announce.base_version == self.held {
            self.session.send(&self.update.answer(&announce)?).await?;
        } else {
            let version = announce.base_version;
            self.waiting = Some(announce);
            self.session
                .send(&ToAggregator::FetchModel(FetchModelV1 { version }))
                .await?;
        }
        Ok(())
    }
}

fn hello(spec: &ModelSpec) -> Result<HelloV1, LoadError> {
    Ok(HelloV1 {
        protocol_min: PROTOCOL_MIN,
        protocol_max: PROTOCOL_MAX,
        software: concat!("theriac-lab ", env!("CARGO_PKG_VERSION")).to_owned(),
        features: Vec::new(),
        profile: spec.profile_name().to_owned(),
        profile_digest: spec.profile_digest(),
        layout_digest: spec.layout_digest(),
        noise_multiplier_min: NoiseMultiplier::new(0.1)?,
        ledger_head: Digest::default(),
        ledger_records: 0,
        model_version: ModelVersion(0),
        model_digest: Digest::default(),
        audit_checkpoint: None,
        receipt_missing: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use theriac_protocol::compress::scan;

    #[test]
    fn a_prepared_update_is_finite_small_and_the_same_for_the_same_seed() {
        let (one, same, other) = (
            Prepared::new(1_000, 7),
            Prepared::new(1_000, 7),
            Prepared::new(1_000, 8),
        );
        assert_eq!(one.digest, same.digest);
        assert_ne!(one.digest, other.digest);
        assert_eq!(one.payload.len(), 1_000);
        let norm = scan(one.encoding, &one.payload).unwrap().norm;
        assert!(
            (29.0..34.0).contains(&norm),
            "uniform values in ±√3 have a norm near 31.6, found {norm}"
        );
    }
}
