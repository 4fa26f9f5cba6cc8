//! From a connection to a session that serves one edge until either side ends it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use theriac_protocol::codec::{Encoded, encode_to_edge};
use theriac_protocol::message::{
    AnnounceV1, FEATURE_FLEET, FEATURE_LEDGER_SEAL, FEATURE_VALIDATOR, HelloV1, ToAggregator, ToEdge,
    UpdateKind, UpdateV1,
};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::units::NodeId;
use theriac_transport::{
    AggregatorReceiver, AggregatorSender, AggregatorSession, CloseCode, Endpoint, SessionError,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::admit::{FleetQuota, Quota, check_hello};
use crate::authenticate::Peer;
use crate::config::LimitSettings;
use crate::driver::{Arrival, DriverInput, Link, OUTBOX_MAX, OfFleet, refusal};
use crate::layout::ModelSpec;
use crate::metrics::{Metrics, Outcome, Verdict};
use crate::models::Models;
use crate::robust::RuleName;
use crate::store::records::{self, LedgerHead, Registry};
use crate::store::{Store, Urgency, rounds};
use crate::validate::{RawUpdate, validate};

/// Updates up to this size are checked on the spot; larger ones on a thread for CPU work.
const INLINE_BYTES_MAX: usize = 128 * 1_024;

/// What every session shares.
#[derive(Debug)]
pub(crate) struct Sessions {
    pub(crate) federation: String,
    pub(crate) spec: ModelSpec,
    pub(crate) limits: LimitSettings,
    pub(crate) kind: UpdateKind,
    pub(crate) rule: RuleName,
    pub(crate) update_bytes: u64,
    pub(crate) frame_bytes_max: u32,
    pub(crate) registry: watch::Receiver<Arc<Registry>>,
    pub(crate) terms: watch::Receiver<Option<Arc<AnnounceV1>>>,
    /// Terms of the round whose late updates are taken.
    pub(crate) late_terms: watch::Receiver<Option<Arc<AnnounceV1>>>,
    pub(crate) driver: mpsc::Sender<DriverInput>,
    pub(crate) store: Store,
    pub(crate) models: Arc<Models>,
    pub(crate) metrics: Metrics,
    pub(crate) numbers: AtomicU64,
}

/// Takes sessions until the endpoint closes, then waits for those that are open.
pub(crate) async fn accept(endpoint: Endpoint, sessions: Arc<Sessions>) {
    let mut open = JoinSet::new();
    while let Some(session) = endpoint.accept().await {
        let sessions = Arc::clone(&sessions);
        open.spawn(async move {
            // The first steps and the open session each live on the heap for their own time: an idle task stays small.
            if let Some(open) = Box::pin(sessions.welcome(session)).await {
                open.converse().await;
            }
        });
        while open.try_join_next().is_some() {}
    }
    while open.join_next().await.is_some() {}
}

/// Whether a session goes on.
enum Flow {
    Continue,
    End(CloseCode, &'static str),
}

/// One session after its Welcome.
struct Session {
    shared: Arc<Sessions>,
    number: u64,
    peer: Peer,
    quota: Quota,
    /// What is said to the fleet has nothing to do with rounds.
    fleet_quota: FleetQuota,
    sender: AggregatorSender,
}

/// A session with what it listens to.
struct Open {
    session: Session,
    receiver: AggregatorReceiver,
    outbox: mpsc::Receiver<Arc<Encoded>>,
    registry: watch::Receiver<Arc<Registry>>,
}

impl Sessions {
    /// Certificate, registry, Hello, Welcome. `None`: it was told why not.
    async fn welcome(self: Arc<Self>, session: AggregatorSession) -> Option<Box<Open>> {
        let remote = session.remote();
        let peer = match Peer::from_certificate(session.peer_certificate_der(), &self.federation) {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!(%remote, %error, "not authenticated");
                self.turn_away(session, error.code()).await;
                return None;
            }
        };
        let known = Arc::clone(&self.registry.borrow());
        if let Err(error) = peer.check(&known) {
            tracing::warn!(%remote, node = %peer.node(), %error, "not welcome");
            self.count(peer.node(), error.code()).await;
            self.turn_away(session, error.code()).await;
            return None;
        }
        let (session, outbox, number) = self.admit(session, &peer).await?;
        let (sender, receiver) = session.split();
        let quota = Quota::new(&self.limits, self.update_bytes);
        let registry = self.registry.clone();
        let session = Session {
            shared: self,
            number,
            peer,
            quota,
            fleet_quota: FleetQuota::new(Instant::now()),
            sender,
        };
        Some(Box::new(Open {
            session,
            receiver,
            outbox,
            registry,
        }))
    }

    /// Hello and Welcome.
    async fn admit(
        &self,
        mut session: AggregatorSession,
        peer: &Peer,
    ) -> Option<(AggregatorSession, mpsc::Receiver<Arc<Encoded>>, u64)> {
        let node = peer.node();
        let hello = match session.recv().await {
            Ok(ToAggregator::Hello(hello)) => hello,
            Ok(_) => {
                self.count(node, RefusalCode::OutOfTurn).await;
                self.turn_away(session, RefusalCode::OutOfTurn).await;
                return None;
            }
            Err(error) => {
                tracing::info!(%node, %error, "no Hello");
                match error.refusal() {
                    Some(refusal) => session.refuse(refusal).await,
                    None => session.handle().close(error.close_code(), "no Hello"),
                }
                return None;
            }
        };
        let protocol = match check_hello(&hello, &self.spec, self.kind) {
            Ok(protocol) => protocol,
            Err(error) => {
                tracing::warn!(%node, software = hello.software, %error, "not admitted");
                self.count(node, error.code()).await;
                self.turn_away(session, error.code()).await;
                return None;
            }
        };
        let (outbox, waiting) = mpsc::channel(OUTBOX_MAX);
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let link = Link {
            session: number,
            outbox,
            handle: session.handle().clone(),
            seals: hello.features.iter().any(|name| name == FEATURE_LEDGER_SEAL),
            validates: hello.features.iter().any(|name| name == FEATURE_VALIDATOR),
            fleet: hello.features.iter().any(|name| name == FEATURE_FLEET),
        };
        let arrival = Box::new(arrival(node.clone(), link, protocol, &hello));
        let (reply, answer) = oneshot::channel();
        self.driver
            .send(DriverInput::Arrived { arrival, reply })
            .await
            .ok()?;
        match answer.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%node, %error, "not admitted");
                self.count(node, error.code()).await;
                self.turn_away(session, error.code()).await;
                return None;
            }
            Err(_) => return None,
        }
        // The Welcome waits in the outbox: the edge hears of the larger frames when they are allowed.
        session.admit(self.frame_bytes_max);
        Some((session, waiting, number))
    }

    async fn turn_away(&self, session: AggregatorSession, code: RefusalCode) {
        self.metrics
            .refusals
            .get_or_create(&Outcome { outcome: code.word() })
            .inc();
        session.refuse(refusal(code, None)).await;
    }

    /// Counts a refusal on the site's record. Waiting for the store slows down nobody but the refused one.
    async fn count(&self, node: &NodeId, code: RefusalCode) {
        let node = node.clone();
        let counted = self
            .store
            .write(Urgency::Lazy, move |work| {
                records::count_refusal(work, &node, code)
            })
            .await;
        if let Err(error) = counted {
            tracing::warn!(%error, "a refusal could not be counted");
        }
    }
}

fn arrival(node: NodeId, link: Link, protocol: u16, hello: &HelloV1) -> Arrival {
    Arrival {
        node,
        link,
        protocol,
        ledger: LedgerHead {
            head: hello.ledger_head,
            records: hello.ledger_records,
        },
        audit_size: hello.audit_checkpoint.map(|(size, _)| size),
        receipt_missing: hello.receipt_missing,
    }
}

impl Open {
    /// Serves the edge until either side ends it.
    async fn converse(mut self: Box<Self>) {
        let (code, reason) = loop {
            let Self {
                session,
                receiver,
                outbox,
                registry,
            } = &mut *self;
            let flow = tokio::select! {
                frame = outbox.recv() => match frame {
                    Some(frame) => Box::pin(session.send(&frame)).await,
                    None => Flow::End(CloseCode::GoingDown, "the aggregator goes down"),
                },
                received = receiver.recv() => Box::pin(session.receive(received)).await,
                changed = registry.changed() => {
                    let known = Arc::clone(&registry.borrow_and_update());
                    match changed {
                        Ok(()) => Box::pin(session.check(&known)).await,
                        Err(_) => Flow::End(CloseCode::GoingDown, "the aggregator goes down"),
                    }
                }
            };
            if let Flow::End(code, reason) = flow {
                break (code, reason);
            }
        };
        let Session {
            shared,
            number,
            peer,
            sender,
            ..
        } = self.session;
        Box::pin(sender.finish(code, reason)).await;
        drop(
            shared
                .driver
                .send(DriverInput::Left {
                    node: peer.node().clone(),
                    session: number,
                })
                .await,
        );
    }
}

impl Session {
    async fn send(&mut self, frame: &Encoded) -> Flow {
        match self.sender.send_encoded(frame).await {
            Ok(()) => Flow::Continue,
            Err(error) if error.is_fatal() => {
                tracing::info!(node = %self.peer.node(), %error, "cannot be told anything");
                Flow::End(error.close_code(), "a message was not taken")
            }
            Err(error) => {
                tracing::error!(node = %self.peer.node(), %error, "our own message cannot be sent");
                Flow::Continue
            }
        }
    }

    async fn say(&mut self, message: &ToEdge) -> Flow {
        match encode_to_edge(message) {
            Ok(frame) => self.send(&frame).await,
            Err(error) => {
                tracing::error!(%error, "our own message does not encode");
                Flow::Continue
            }
        }
    }

    async fn refuse(&mut self, code: RefusalCode) -> Flow {
        self.shared
            .metrics
            .refusals
            .get_or_create(&Outcome { outcome: code.word() })
            .inc();
        self.shared.count(&self.peer.node().clone(), code).await;
        self.say(&ToEdge::Refusal(refusal(code, None))).await
    }

    /// The registry's word, asked again for every message and whenever it changes.
    async fn check(&mut self, registry: &Registry) -> Flow {
        let Err(error) = self.peer.check(registry) else {
            return Flow::Continue;
        };
        tracing::warn!(node = %self.peer.node(), %error, "no longer welcome");
        match self.refuse(error.code()).await {
            Flow::Continue => Flow::End(CloseCode::Suspended, "the registry no longer admits this site"),
            end @ Flow::End(..) => end,
        }
    }

    async fn receive(&mut self, received: Result<ToAggregator, SessionError>) -> Flow {
        let message = match received {
            Ok(message) => message,
            Err(SessionError::Ended) => return Flow::End(CloseCode::Done, "the edge left"),
            Err(error) => return self.bad(error).await,
        };
        let known = Arc::clone(&self.shared.registry.borrow());
        if let end @ Flow::End(..) = self.check(&known).await {
            return end;
        }
        let bytes = match &message {
            ToAggregator::Update(_, payload) => payload.len() as u64,
            _ => 0,
        };
        let round = self
            .shared
            .terms
            .borrow()
            .as_ref()
            .map_or(0, |terms| terms.round.0);
        let of_fleet = matches!(
            message,
            ToAggregator::Health(_) | ToAggregator::LeaseRequest(_) | ToAggregator::LeaseRelease(_)
        );
        let within = if of_fleet {
            self.fleet_quota.take(Instant::now())
        } else {
            self.quota.take(round, bytes)
        };
        if !within {
            tracing::warn!(node = %self.peer.node(), round, "sends more than its quota");
            return match self.refuse(RefusalCode::Busy).await {
                Flow::Continue => Flow::End(CloseCode::Refused, "the quota of this round is used up"),
                end @ Flow::End(..) => end,
            };
        }
        match message {
            ToAggregator::Hello(_) => self.refuse(RefusalCode::OutOfTurn).await,
            ToAggregator::Update(header, payload) => self.update(header, payload).await,
            ToAggregator::Decline(decline) => {
                let node = self.peer.node().clone();
                self.tell(DriverInput::Declined {
                    node,
                    round: decline.round,
                    reason: decline.reason,
                })
                .await
            }
            ToAggregator::FetchModel(fetch) => self.fetch(fetch.version).await,
            ToAggregator::Verdict(verdict) => {
                let (node, version, verdict) = (self.peer.node().clone(), verdict.version, verdict.verdict);
                let write = move |work: &crate::store::Work<'_>| {
                    records::record_verdict(work, &node, version, verdict)
                };
                if let Err(error) = self.shared.store.write(Urgency::Lazy, write).await {
                    tracing::warn!(%error, "a gate's verdict could not be recorded");
                }
                Flow::Continue
            }
            ToAggregator::Guarantee(guarantee) => {
                self.tell(DriverInput::Declared {
                    node: self.peer.node().clone(),
                    guarantee: Box::new(guarantee),
                })
                .await
            }
            ToAggregator::Appraisal(appraisal) => {
                self.tell(DriverInput::Appraised {
                    node: self.peer.node().clone(),
                    appraisal,
                })
                .await
            }
            ToAggregator::Health(health) => self.tell_fleet(OfFleet::Health(health)).await,
            ToAggregator::LeaseRequest(asked) => self.tell_fleet(OfFleet::Request(asked)).await,
            ToAggregator::LeaseRelease(said) => self.tell_fleet(OfFleet::Release(said)).await,
            ToAggregator::Goodbye => Flow::End(CloseCode::Done, "the edge left"),
        }
    }

    async fn tell_fleet(&mut self, said: OfFleet) -> Flow {
        let node = self.peer.node().clone();
        self.tell(DriverInput::OfFleet { node, said }).await
    }

    async fn bad(&mut self, error: SessionError) -> Flow {
        let fatal = error.is_fatal();
        tracing::info!(node = %self.peer.node(), %error, fatal, "a message was no good");
        if let Some(refusal) = error.refusal() {
            self.shared
                .metrics
                .refusals
                .get_or_create(&Outcome {
                    outcome: refusal.code.word(),
                })
                .inc();
            self.shared.count(&self.peer.node().clone(), refusal.code).await;
            let told = self.say(&ToEdge::Refusal(refusal)).await;
            if let end @ Flow::End(..) = told {
                return end;
            }
        }
        if fatal {
            Flow::End(error.close_code(), "the session cannot go on")
        } else {
            Flow::Continue
        }
    }

    async fn update(&mut self, header: UpdateV1, payload: Bytes) -> Flow {
        let node = self.peer.node().clone();
        let of_this = |terms: &watch::Receiver<Option<Arc<AnnounceV1>>>| {
            let terms = terms.borrow().clone();
            terms.filter(|terms| terms.round == header.round)
        };
        let terms = of_this(&self.shared.terms).or_else(|| of_this(&self.shared.late_terms));
        let Some(terms) = terms else {
            // For another round than the open one: its bytes are of no interest, the machine knows what to answer.
            return self
                .tell(DriverInput::Update {
                    node,
                    header: Box::new(header),
                    validated: None,
                })
                .await;
        };
        let raw = RawUpdate {
            node: node.clone(),
            header: header.clone(),
            payload,
        };
        let judged = if raw.payload.len() > INLINE_BYTES_MAX {
            match tokio::task::spawn_blocking(move || validate(raw, &terms)).await {
                Ok(judged) => judged,
                Err(error) => {
                    tracing::error!(%error, "the check of an update failed");
                    return self.refuse(RefusalCode::Busy).await;
                }
            }
        } else {
            validate(raw, &terms)
        };
        match judged {
            Ok(validated) => {
                let validated = Some(Box::new(validated));
                self.tell(DriverInput::Update {
                    node,
                    header: Box::new(header),
                    validated,
                })
                .await
            }
            Err(error) => {
                let (code, round, rule) = (error.code(), header.round, self.shared.rule);
                tracing::warn!(%node, round = round.0, %error, "an update was refused");
                self.shared
                    .metrics
                    .uploads
                    .get_or_create(&Verdict {
                        verdict: "refused",
                        reason: code.word(),
                    })
                    .inc();
                let (name, detail) = (node.clone(), error.to_string());
                let write = move |work: &crate::store::Work<'_>| {
                    rounds::refuse_upload(work, &name, &header, code, rule, Some(&detail))
                };
                if let Err(error) = self.shared.store.write(Urgency::Lazy, write).await {
                    tracing::error!(%error, "a refusal could not be recorded");
                }
                let told = self.say(&ToEdge::Refusal(refusal(code, Some(round)))).await;
                if matches!(told, Flow::End(..)) || code.retryable() {
                    return told;
                }
                // Nobody waits for this one any more.
                self.tell(DriverInput::Refused { node, round, code }).await
            }
        }
    }

    async fn fetch(&mut self, version: theriac_protocol::units::ModelVersion) -> Flow {
        match self.shared.models.frame(&self.shared.store, version).await {
            Ok(frame) => self.send(&frame).await,
            Err(error) => {
                tracing::info!(node = %self.peer.node(), version = version.0, %error, "asked for a model that is not here");
                self.refuse(RefusalCode::OutOfTurn).await
            }
        }
    }

    async fn tell(&mut self, input: DriverInput) -> Flow {
        match self.shared.driver.send(input).await {
            Ok(()) => Flow::Continue,
            Err(_) => Flow::End(CloseCode::GoingDown, "the aggregator goes down"),
        }
    }
}
