//! One connected edge as the driver sees it, and how edges come and go.

use std::net::SocketAddr;
use std::sync::Arc;

use theriac_audit::seal::SealBody;
use theriac_protocol::codec::{Encoded, encode_to_edge};
use theriac_protocol::message::{LedgerSealV1, ToEdge, WelcomeV1};
use theriac_protocol::refusal::{RefusalCode, RefusalV1};
use theriac_protocol::round::{Input, Output};
use theriac_protocol::units::{NodeId, Round};
use theriac_transport::{CloseCode, SessionHandle};
use tokio::sync::{mpsc, oneshot};

use super::Driver;
use crate::admit::{AdmitError, check_ledger};
use crate::store::records::LedgerHead;
use crate::store::wall_clock;

/// Messages that may wait for one edge.
pub const OUTBOX_MAX: usize = 32;

/// A way to a connected edge. Dropping it ends the session once everything in its outbox is sent.
#[derive(Debug)]
pub struct Link {
    /// Number of the session, unique in this process.
    pub session: u64,
    /// Messages that wait.
    pub outbox: mpsc::Sender<Arc<Encoded>>,
    /// The connection.
    pub handle: SessionHandle,
    /// Whether the edge keeps counter-signatures of its ledger.
    pub seals: bool,
    /// Whether the edge's operator lets it say what candidates do on its rows.
    pub validates: bool,
    /// Whether the edge's policy has budgets of the fleet.
    pub fleet: bool,
}

impl Link {
    /// Puts a message into the outbox; false: it is full or the session is gone.
    pub(super) fn send(&self, message: &ToEdge) -> bool {
        match encode_to_edge(message) {
            Ok(frame) => self.send_encoded(Arc::new(frame)),
            Err(error) => {
                tracing::error!(%error, "our own message does not encode");
                true
            }
        }
    }

    pub(super) fn send_encoded(&self, frame: Arc<Encoded>) -> bool {
        self.outbox.try_send(frame).is_ok()
    }

    /// Whether half the outbox is free. What is soon said again better is not said else: it is to close no link that takes its time for a long message.
    pub(super) fn has_room(&self) -> bool {
        2 * self.outbox.capacity() >= OUTBOX_MAX
    }

    fn remote(&self) -> SocketAddr {
        self.handle.remote()
    }
}

/// A site that said Hello, is in the registry and speaks our language.
#[derive(Debug)]
pub struct Arrival {
    /// Its name, out of the certificate.
    pub node: NodeId,
    /// The way to it.
    pub link: Link,
    /// Protocol version that both will speak.
    pub protocol: u16,
    /// Its privacy ledger.
    pub ledger: LedgerHead,
    /// Tree size of the last audit checkpoint it has seen.
    pub audit_size: Option<u64>,
    /// The round whose receipt it still misses.
    pub receipt_missing: Option<Round>,
}

impl Driver {
    pub(super) fn arrived(&mut self, arrival: Arrival, reply: oneshot::Sender<Result<(), AdmitError>>) {
        let Arrival {
            node,
            link,
            protocol,
            ledger,
            audit_size,
            receipt_missing,
        } = arrival;
        let allowed = match self.check_new_ledger(&node) {
            Ok(()) => check_ledger(self.ledger(&node), ledger),
            refused => refused,
        };
        if let Err(error) = allowed {
            drop(reply.send(Err(error)));
            return;
        }
        self.replace(&node, link.remote());
        let now = self.now();
        self.machine.handle(now, Input::Admitted { node: node.clone() });
        // An announcement that is for this node alone travels inside its Welcome.
        let mut outputs = Vec::new();
        let mut round = None;
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::Announce { to, announce } if to.as_slice() == [node.clone()] => {
                    round = Some(announce);
                }
                other => outputs.push(other),
            }
        }
        let (audit_checkpoint, audit_consistency) = self.store.audit_log().head_since(audit_size);
        let base = self.machine.status().base;
        let welcome = WelcomeV1 {
            protocol,
            federation: self.federation.clone(),
            node: node.clone(),
            time: wall_clock(),
            frame_bytes_max: self.frame_bytes_max,
            model_version: base.version,
            model_digest: base.digest,
            audit_checkpoint,
            audit_consistency,
            round,
        };
        link.send(&ToEdge::Welcome(welcome));
        if link.seals {
            // Also of nothing: it tells the edge that its guarantee is wanted.
            link.send(&ToEdge::Seal(self.seal(&node)));
        }
        self.with_status(|status| {
            status.connected.insert(node.clone());
        });
        self.links.insert(node.clone(), link);
        self.count_links();
        self.heed_validators();
        tracing::info!(%node, "connected");
        self.ask_validator(&node);
        self.greet_fleet(&node);
        drop(reply.send(Ok(())));
        self.carry_out_all(outputs, None);
        if let Some(round) = receipt_missing {
            self.find_receipt(node, round);
        }
        self.pump(None);
    }

    /// Whether a site that began a new ledger may take part. Sessions that were admitted before are not asked again: they are of the key that is in the registry.
    fn check_new_ledger(&self, node: &NodeId) -> Result<(), AdmitError> {
        let unallowed = self
            .registry
            .borrow()
            .get(node)
            .is_some_and(|site| site.ledger_unallowed);
        if unallowed && self.floor.ledger_continuity {
            return Err(AdmitError::NewLedger);
        }
        Ok(())
    }

    /// A newer session of the same identity takes the place of the older one.
    fn replace(&mut self, node: &NodeId, remote: SocketAddr) {
        let Some(older) = self.links.remove(node) else {
            return;
        };
        let before = older.remote();
        if before.ip() != remote.ip() {
            self.metrics.identity_alarms.inc();
            tracing::warn!(%node, %before, now = %remote, "one identity from two addresses: a copied key or a moved host");
        }
        older
            .handle
            .close(CloseCode::Replaced, "the same identity has a newer session");
    }

    pub(super) fn left(&mut self, node: &NodeId, session: u64) {
        if self.links.get(node).is_none_or(|link| link.session != session) {
            return;
        }
        self.links.remove(node);
        self.count_links();
        self.heed_validators();
        self.with_status(|status| {
            status.connected.remove(node);
        });
        tracing::info!(%node, "left");
        let now = self.now();
        self.machine.handle(now, Input::Left { node: node.clone() });
        self.pump(None);
    }

    /// Tells an edge how far its ledger is on record here.
    pub(super) fn send_seal(&mut self, node: &NodeId) {
        if self.links.get(node).is_some_and(|link| link.seals) {
            let seal = self.seal(node);
            self.send(node, &ToEdge::Seal(seal));
        }
    }

    fn seal(&self, node: &NodeId) -> LedgerSealV1 {
        let LedgerHead { head, records } = self.ledger(node);
        let body = SealBody {
            node: node.clone(),
            records,
            head,
            signed: wall_clock(),
        };
        body.sign(self.key.log_key())
    }

    pub(super) fn send(&mut self, node: &NodeId, message: &ToEdge) {
        match encode_to_edge(message) {
            Ok(frame) => self.send_frame(node, Arc::new(frame)),
            Err(error) => tracing::error!(%error, "our own message does not encode"),
        }
    }

    pub(super) fn send_frame(&mut self, node: &NodeId, frame: Arc<Encoded>) {
        let Some(link) = self.links.get(node) else { return };
        if !link.send_encoded(frame) && !link.outbox.is_closed() {
            self.metrics.slow_readers.inc();
            tracing::warn!(%node, "takes messages too slowly");
            // The session notices and leaves by the usual way.
            link.handle
                .close(CloseCode::TooSlow, "messages were not taken in time");
        }
    }

    pub(super) fn send_refusal(&mut self, node: &NodeId, round: Option<Round>, code: RefusalCode) {
        self.send(node, &ToEdge::Refusal(refusal(code, round)));
    }

    fn count_links(&self) {
        self.metrics
            .connected
            .set(i64::try_from(self.links.len()).unwrap_or(i64::MAX));
    }
}

/// A refusal with the time after which it is worth trying again.
pub(crate) fn refusal(code: RefusalCode, round: Option<Round>) -> RefusalV1 {
    let retry_after_ms = match code {
        RefusalCode::Busy => 1_000,
        RefusalCode::StorageFull => 10_000,
        _ => 0,
    };
    RefusalV1 {
        code,
        round,
        retry_after_ms,
    }
}
