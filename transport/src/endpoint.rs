//! Sockets, and who gets through the door.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use aws_lc_rs::hmac;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ConnectionIdGenerator, EndpointConfig, IdleTimeout, Incoming, TokioRuntime, TransportConfig,
    ValidationTokenConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::budget::AddressBudgets;
use crate::limits::Limits;
use crate::loss::{CloseCode, Loss};
use crate::session::{AggregatorSession, Pieces, SessionHandle};
use crate::traffic::{Counters, Traffic};

/// Sessions that wait to be accepted.
const ACCEPTED_MAX: usize = 64;

/// Why an endpoint cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// The address cannot be bound.
    #[error("cannot listen on {addr} (UDP): {source}; {}", bind_hint(source))]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The socket does not work.
    #[error("the UDP socket fails: {0}")]
    Socket(#[from] io::Error),
    /// A TLS configuration without what QUIC needs.
    #[error("this TLS configuration cannot be used for QUIC: {0}")]
    Tls(String),
    /// A limit that QUIC cannot express.
    #[error("the limit `{0}` is too large for QUIC")]
    Limit(&'static str),
}

/// Socket buffers as the kernel granted them, in bytes, in the unit in which they are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketBuffers {
    /// For sending.
    pub send: usize,
    /// For receiving.
    pub receive: usize,
}

/// What became of those who knocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AcceptStats {
    /// Handshakes that gave a session.
    pub accepted: u64,
    /// Handshakes that failed: certificate, protocol, or the peer left.
    pub failed: u64,
    /// Handshakes that took too long.
    pub timed_out: u64,
    /// Told to prove their address.
    pub retried: u64,
    /// Turned away at a limit.
    pub refused: u64,
    /// Handshakes under way now.
    pub pending: u64,
}

/// A UDP socket that speaks QUIC. Cheap to clone. When the last clone of a server endpoint is gone, new connections
/// are refused; open ones live on.
#[derive(Clone)]
pub struct Endpoint {
    inner: Arc<Inner>,
}

struct Inner {
    quinn: quinn::Endpoint,
    limits: Arc<Limits>,
    granted: SocketBuffers,
    counters: Arc<Counters>,
    client_transport: Arc<TransportConfig>,
    door: Option<Door>,
}

struct Door {
    accepted: Mutex<mpsc::Receiver<Pieces>>,
    tally: Arc<Tally>,
    memory: Arc<Semaphore>,
    transport: Arc<TransportConfig>,
    task: JoinHandle<()>,
}

/// Opens a server endpoint that accepts edges. Call it within a tokio runtime.
///
/// # Errors
/// [`EndpointError`].
pub fn bind_server(
    addr: SocketAddr,
    tls: rustls::ServerConfig,
    limits: &Limits,
) -> Result<Endpoint, EndpointError> {
    bind_configured(addr, tls, limits, EndpointConfig::default())
}

/// As [`bind_server`], and known again after a crash: a client that still speaks to an earlier process of the same
/// `secret` on this address is told at its next packet that its session is gone (a stateless reset, RFC 9000, section
/// 10.3), and connects anew. Without, it waits for [`Limits::idle_timeout`]. The secret is kept on disk and used
/// for nothing else; who knows it can end sessions, not read them.
///
/// # Errors
/// [`EndpointError`].
pub fn bind_lasting_server(
    addr: SocketAddr,
    tls: rustls::ServerConfig,
    limits: &Limits,
    secret: &[u8; 32],
) -> Result<Endpoint, EndpointError> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    // Connection ids carry a short mark by which a later process knows that they were given out here.
    let mark = hmac::sign(&key, b"theriac connection ids");
    let mark = mark.as_ref().first_chunk().copied().map_or(0, u64::from_le_bytes);
    let mut config = EndpointConfig::new(Arc::new(key));
    config.cid_generator(move || -> Box<dyn ConnectionIdGenerator> {
        Box::new(HashedConnectionIdGenerator::from_key(mark))
    });
    bind_configured(addr, tls, limits, config)
}

fn bind_configured(
    addr: SocketAddr,
    tls: rustls::ServerConfig,
    limits: &Limits,
    endpoint: EndpointConfig,
) -> Result<Endpoint, EndpointError> {
    let (socket, granted) = bind(addr, limits)?;
    let transport = Arc::new(transport(limits, Side::Server)?);
    let config = server_config(tls, &transport, limits)?;
    let quinn = quinn::Endpoint::new(endpoint, Some(config), socket, Arc::new(TokioRuntime))?;
    let limits = Arc::new(limits.clone());
    let counters = Arc::default();
    let (sender, accepted) = mpsc::channel(ACCEPTED_MAX);
    let tally = Arc::new(Tally::default());
    let loop_ = AcceptLoop {
        quinn: quinn.clone(),
        limits: Arc::clone(&limits),
        counters: Arc::clone(&counters),
        tally: Arc::clone(&tally),
        sender,
    };
    let memory = Arc::new(Semaphore::new(
        (limits.upload_bytes_in_flight_max / 1024) as usize,
    ));
    let door = Door {
        accepted: Mutex::new(accepted),
        tally,
        memory,
        transport,
        task: tokio::spawn(loop_.run()),
    };
    Endpoint::new(quinn, limits, granted, counters, Some(door))
}

/// Opens a client endpoint on a port that the system picks. One serves any number of connections. Call it within a
/// tokio runtime.
///
/// # Errors
/// [`EndpointError`].
pub fn bind_client(limits: &Limits) -> Result<Endpoint, EndpointError> {
    // Both families where the host has both.
    let any_v6 = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0);
    let any_v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
    let (socket, granted) = bind(any_v6, limits).or_else(|_| bind(any_v4, limits))?;
    let quinn = quinn::Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime))?;
    Endpoint::new(quinn, Arc::new(limits.clone()), granted, Arc::default(), None)
}

impl Endpoint {
    fn new(
        quinn: quinn::Endpoint,
        limits: Arc<Limits>,
        granted: SocketBuffers,
        counters: Arc<Counters>,
        door: Option<Door>,
    ) -> Result<Self, EndpointError> {
        let asked = limits.socket_buffer_bytes;
        if granted.send < asked || granted.receive < asked {
            tracing::warn!(
                asked,
                send = granted.send,
                receive = granted.receive,
                "socket buffers are smaller than asked for: raise net.core.rmem_max and net.core.wmem_max"
            );
        }
        let client_transport = Arc::new(transport(&limits, Side::Client)?);
        Ok(Self {
            inner: Arc::new(Inner {
                quinn,
                limits,
                granted,
                counters,
                client_transport,
                door,
            }),
        })
    }

    /// The address that is bound.
    ///
    /// # Errors
    /// [`EndpointError::Socket`].
    pub fn local_addr(&self) -> Result<SocketAddr, EndpointError> {
        Ok(self.inner.quinn.local_addr()?)
    }

    /// The socket buffers that the kernel granted. Export them: too small ones are the commonest cause of slow
    /// handshakes.
    pub fn granted(&self) -> SocketBuffers {
        self.inner.granted
    }

    /// Connections that are open, in handshake or closing.
    pub fn open_connections(&self) -> usize {
        self.inner.quinn.open_connections()
    }

    /// Frames and bytes of all sessions, also of those that have ended.
    pub fn traffic(&self) -> Traffic {
        self.inner.counters.read()
    }

    /// What became of those who knocked; all zero for a client endpoint.
    pub fn accept_stats(&self) -> AcceptStats {
        self.inner
            .door
            .as_ref()
            .map_or_else(AcceptStats::default, |door| door.tally.read())
    }

    /// The next session: the handshake is done, the client's certificate verified, its stream open; nothing is read
    /// yet. `None`: the endpoint is closed or has failed; bind a new one in the second case. Safe to cancel.
    pub async fn accept(&self) -> Option<AggregatorSession> {
        let pieces = self.accept_pieces().await?;
        let memory = Arc::clone(&self.inner.door.as_ref()?.memory);
        Some(AggregatorSession::new(pieces, &self.inner.limits, memory))
    }

    pub(crate) async fn accept_pieces(&self) -> Option<Pieces> {
        self.inner.door.as_ref()?.accepted.lock().await.recv().await
    }

    /// Exchanges the server's certificate. Open connections are not touched.
    ///
    /// # Errors
    /// [`EndpointError::Tls`]; also for a client endpoint.
    pub fn set_server_tls(&self, tls: rustls::ServerConfig) -> Result<(), EndpointError> {
        let Some(door) = &self.inner.door else {
            return Err(EndpointError::Tls(
                "a client endpoint has no server certificate".to_owned(),
            ));
        };
        let config = server_config(tls, &door.transport, &self.inner.limits)?;
        self.inner.quinn.set_server_config(Some(config));
        Ok(())
    }

    /// Closes the endpoint and all its sessions at once.
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.inner.quinn.close((code as u32).into(), reason.as_bytes());
    }

    /// Waits until no connection is left and the last packets are out. After [`Endpoint::close`], before the end of
    /// the process; seconds at most.
    pub async fn wait_idle(&self) {
        self.inner.quinn.wait_idle().await;
    }

    pub(crate) fn limits(&self) -> &Arc<Limits> {
        &self.inner.limits
    }

    pub(crate) fn quinn(&self) -> &quinn::Endpoint {
        &self.inner.quinn
    }

    pub(crate) fn handle(&self, connection: quinn::Connection) -> SessionHandle {
        SessionHandle::new(connection, Counters::of_session(Arc::clone(&self.inner.counters)))
    }

    pub(crate) fn client_config(
        &self,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<quinn::ClientConfig, EndpointError> {
        let crypto =
            QuicClientConfig::try_from(tls).map_err(|error| EndpointError::Tls(error.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::clone(&self.inner.client_transport));
        Ok(config)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("local_addr", &self.inner.quinn.local_addr().ok())
            .field("granted", &self.inner.granted)
            .field("server", &self.inner.door.is_some())
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(door) = &self.door {
            door.task.abort();
            self.quinn.set_server_config(None);
        }
    }
}

/// Takes connections off the socket and leads each through its handshake, all at once, each within its time.
struct AcceptLoop {
    quinn: quinn::Endpoint,
    limits: Arc<Limits>,
    counters: Arc<Counters>,
    tally: Arc<Tally>,
    sender: mpsc::Sender<Pieces>,
}

/// What to do with one that knocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Handshake,
    /// Prove your address first: costs us nothing, and whoever forged it never hears of it.
    Retry,
    Refuse,
}

impl AcceptLoop {
    async fn run(self) {
        let slots = Arc::new(Semaphore::new(self.limits.handshakes_max));
        let mut budget = AddressBudgets::new(self.limits.address_burst, self.limits.address_per_second);
        while let Some(incoming) = self.quinn.accept().await {
            let address = incoming.remote_address().ip().to_canonical();
            let proven = incoming.remote_address_validated();
            let counted = self.limits.address_budget_on_loopback || !address.is_loopback();
            let within_budget = !counted || budget.take(address, proven, Instant::now());
            let slot = Arc::clone(&slots).try_acquire_owned().ok();
            match (
                self.judge(within_budget, proven || !incoming.may_retry(), slot.is_some()),
                slot,
            ) {
                (Entry::Handshake, Some(slot)) => self.handshake(incoming, slot),
                (Entry::Retry, _) => {
                    self.tally.retried.fetch_add(1, Ordering::Relaxed);
                    if incoming.retry().is_err() {
                        tracing::debug!(%address, "an address that is proven cannot be asked again");
                    }
                }
                (Entry::Handshake | Entry::Refuse, _) => {
                    self.tally.refused.fetch_add(1, Ordering::Relaxed);
                    incoming.refuse();
                }
            }
        }
    }

    fn judge(&self, within_budget: bool, proven: bool, slot_free: bool) -> Entry {
        let pending = self.tally.pending.load(Ordering::Relaxed);
        if !slot_free || self.quinn.open_connections() >= self.limits.connections_max {
            Entry::Refuse
        } else if !proven && (pending >= self.limits.handshakes_before_retry || !within_budget) {
            Entry::Retry
        } else if within_budget {
            Entry::Handshake
        } else {
            Entry::Refuse
        }
    }

    fn handshake(&self, incoming: Incoming, slot: OwnedSemaphorePermit) {
        let pending = Pending::begin(&self.tally);
        let (counters, limits, tally) = (
            Arc::clone(&self.counters),
            Arc::clone(&self.limits),
            Arc::clone(&self.tally),
        );
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let remote = incoming.remote_address();
            let outcome = timeout(limits.handshake_timeout, handshake(incoming, counters)).await;
            // A slot is for the handshake; who waits to be accepted holds it no longer than the queue is full.
            match outcome {
                Ok(Ok(pieces)) => {
                    tally.accepted.fetch_add(1, Ordering::Relaxed);
                    if sender.send(pieces).await.is_err() {
                        tracing::debug!(%remote, "nobody accepts sessions any more");
                    }
                }
                Ok(Err(loss)) => {
                    tally.failed.fetch_add(1, Ordering::Relaxed);
                    // Many at once are an attack or a restart, and not worth a line each.
                    if tally.pending.load(Ordering::Relaxed) < limits.handshakes_before_retry {
                        tracing::info!(%remote, reason = %loss, "handshake failed");
                    } else {
                        tracing::debug!(%remote, reason = %loss, "handshake failed");
                    }
                }
                Err(_) => {
                    tally.timed_out.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%remote, "handshake took too long");
                }
            }
            drop((slot, pending));
        });
    }
}

async fn handshake(incoming: Incoming, counters: Arc<Counters>) -> Result<Pieces, Loss> {
    let connection = incoming.await?;
    let (send, receive) = connection.accept_bi().await?;
    Ok(Pieces {
        handle: SessionHandle::new(connection, Counters::of_session(counters)),
        send,
        receive,
    })
}

#[derive(Debug, Default)]
struct Tally {
    accepted: AtomicU64,
    failed: AtomicU64,
    timed_out: AtomicU64,
    retried: AtomicU64,
    refused: AtomicU64,
    pending: AtomicUsize,
}

impl Tally {
    fn read(&self) -> AcceptStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        AcceptStats {
            accepted: load(&self.accepted),
            failed: load(&self.failed),
            timed_out: load(&self.timed_out),
            retried: load(&self.retried),
            refused: load(&self.refused),
            pending: self.pending.load(Ordering::Relaxed) as u64,
        }
    }
}

/// Counts a handshake as pending while it lives, also when its task panics.
struct Pending(Arc<Tally>);

impl Pending {
    fn begin(tally: &Arc<Tally>) -> Self {
        tally.pending.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(tally))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Server,
    Client,
}

fn transport(limits: &Limits, side: Side) -> Result<TransportConfig, EndpointError> {
    let mut config = TransportConfig::default();
    let (streams, window) = match side {
        Side::Server => (
            (limits.bidirectional_streams, limits.unidirectional_streams),
            limits.receive_window_bytes_before_admission,
        ),
        // An aggregator opens no streams.
        Side::Client => ((0, 0), limits.receive_window_bytes),
    };
    let idle =
        IdleTimeout::try_from(limits.idle_timeout).map_err(|_| EndpointError::Limit("idle_timeout"))?;
    config
        .max_concurrent_bidi_streams(streams.0.into())
        .max_concurrent_uni_streams(streams.1.into())
        .stream_receive_window(VarInt::from_u32(limits.stream_window_bytes))
        .receive_window(VarInt::from_u32(window))
        .send_window(limits.send_window_bytes)
        .datagram_receive_buffer_size(None)
        .datagram_send_buffer_size(0)
        .max_idle_timeout(Some(idle))
        .keep_alive_interval((side == Side::Client).then_some(limits.keep_alive));
    Ok(config)
}

fn server_config(
    tls: rustls::ServerConfig,
    transport: &Arc<TransportConfig>,
    limits: &Limits,
) -> Result<quinn::ServerConfig, EndpointError> {
    let crypto = QuicServerConfig::try_from(tls).map_err(|error| EndpointError::Tls(error.to_string()))?;
    // The key of Retry tokens is random for each process; no other address token is given out.
    let mut no_tokens = ValidationTokenConfig::default();
    no_tokens.sent(0);
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::clone(transport))
        .validation_token_config(no_tokens)
        // What waits in quinn before our own loop sees it, which is at once.
        .max_incoming(limits.handshakes_max)
        .incoming_buffer_size(16 * 1024)
        .incoming_buffer_size_total(4 << 20);
    Ok(config)
}

fn bind(addr: SocketAddr, limits: &Limits) -> Result<(UdpSocket, SocketBuffers), EndpointError> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        socket.set_only_v6(false)?;
    }
    socket.set_send_buffer_size(limits.socket_buffer_bytes)?;
    socket.set_recv_buffer_size(limits.socket_buffer_bytes)?;
    // Linux grants twice what it allows, half of it for its own bookkeeping (socket(7)).
    let halved = if cfg!(target_os = "linux") { 2 } else { 1 };
    let granted = SocketBuffers {
        send: socket.send_buffer_size()? / halved,
        receive: socket.recv_buffer_size()? / halved,
    };
    socket
        .bind(&addr.into())
        .map_err(|source| EndpointError::Bind { addr, source })?;
    Ok((socket.into(), granted))
}

fn bind_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another process has this port: stop it, or choose another port",
        io::ErrorKind::AddrNotAvailable => "this host has no such address",
        io::ErrorKind::PermissionDenied => "ports below 1024 need a privilege: choose a higher one",
        _ => "check the address",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn buffers_asked_for_are_read_back() {
        let asked = Limits {
            socket_buffer_bytes: 64 * 1024,
            ..Limits::default()
        };
        let granted = bind_client(&asked).unwrap().granted();
        assert_eq!(
            granted,
            SocketBuffers {
                send: 64 * 1024,
                receive: 64 * 1024
            }
        );
    }

    #[tokio::test]
    async fn a_port_in_use_is_told_with_what_to_do() {
        let limits = Limits::default();
        let (first, _) = bind("127.0.0.1:0".parse().unwrap(), &limits).unwrap();
        let told = bind(first.local_addr().unwrap(), &limits)
            .unwrap_err()
            .to_string();
        assert!(told.contains("another process has this port"), "{told}");
    }

    #[tokio::test]
    async fn the_door_judges_by_room_proof_and_budget() {
        let (sender, _receiver) = mpsc::channel(1);
        let door = AcceptLoop {
            quinn: bind_client(&Limits::default()).unwrap().quinn().clone(),
            limits: Arc::new(Limits::default()),
            counters: Arc::default(),
            tally: Arc::default(),
            sender,
        };
        assert_eq!(door.judge(true, false, true), Entry::Handshake);
        assert_eq!(door.judge(false, false, true), Entry::Retry);
        assert_eq!(door.judge(false, true, true), Entry::Refuse);
        assert_eq!(door.judge(true, true, false), Entry::Refuse);
        door.tally.pending.store(100, Ordering::Relaxed);
        assert_eq!(door.judge(true, false, true), Entry::Retry);
        assert_eq!(door.judge(true, true, true), Entry::Handshake);
    }
}
