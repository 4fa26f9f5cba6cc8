//! Endpoints, frames, sessions and limits over QUIC: the only crate that names quinn.
//!
//! One session is one QUIC connection with one bidirectional stream, opened by the edge, and on it the frames of
//! `theriac-protocol`. Both ends hold certificates; an edge is **connected only after the aggregator's Welcome**,
//! because in TLS 1.3 a client's handshake ends before the server has judged its certificate.
//!
//! ```text
//! edge                                   aggregator
//! bind_client, connect ── TLS 1.3 ─────▶ bind_server … Endpoint::accept → AggregatorSession
//!                      ── Hello ───────▶ recv            (small frames only, little window, little time)
//!                      ◀─ Welcome ────── send, admit     (larger frames and windows from here on)
//! EdgeSession::{send, recv, split}       AggregatorSession::{send, recv, split, close}
//! ```
//!
//! This crate does not know what a round is, decides nobody's admission, and keeps nothing on disk. Every number that
//! a peer could drive up is in [`Limits`].

pub mod backoff;
pub mod connect;
pub mod endpoint;
pub mod join;
pub mod limits;
pub mod loss;
pub mod session;
pub mod traffic;

mod budget;
mod frame;

pub use backoff::Backoff;
pub use connect::{ConnectError, common_version, connect};
pub use endpoint::{
    AcceptStats, Endpoint, EndpointError, SocketBuffers, bind_client, bind_lasting_server, bind_server,
};
pub use limits::Limits;
pub use loss::{CloseCode, Loss, TlsSide};
pub use session::{
    AggregatorReceiver, AggregatorSender, AggregatorSession, EdgeReceiver, EdgeSender, EdgeSession,
    SessionError, SessionHandle,
};
pub use traffic::Traffic;
