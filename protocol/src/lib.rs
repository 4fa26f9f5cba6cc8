//! Words and turns of the exchange between edges and their aggregator: messages, their bytes, and the two state
//! machines of a round. No I/O, no clock, no entropy, no threads: time and seeds are handed in, so a round can be
//! replayed bit for bit, and a simulation owns every event.
//!
//! # The exchange, message by message
//!
//! ```text
//!  new edge                                    join listener
//!     │ JoinRequest {token, CSR} ─────────────────▶ │   once; the key never leaves the edge
//!     │ ◀──────────────── JoinReply {certificates}  │
//!
//!  edge                                           aggregator
//!     │ Hello {versions, layouts, ledger head} ───▶ │   the node's name comes from its certificate
//!     │ ◀── Welcome {model version, open round}     │   or Refusal: only a Welcome makes it "connected"
//!     │                                             │
//!     │ ◀── Announce {round, nonce, terms, base}    │   durable before it is said
//!     │ FetchModel {version} ─────────────────────▶ │   only if the base is not held
//!     │ ◀── Model {header} + values                 │
//!     │ Verdict {accepted, or why not} ───────────▶ │
//!     │                                             │
//!     │   charge the ledger, train, clip, noise, write the outbox: then, and never anew
//!     │ Update {round, nonce, digest} + values ───▶ │   or Decline {reason}
//!     │ ◀── Receipt {digest, leaf, signature}       │   durable before it is said; or Refusal {code}
//!     │                                             │   the same bytes again: the same receipt
//!     │ ◀── Closed {published version, or why not}  │   the outbox may be emptied now
//!     │                                             │
//!     │ ◀── Fleet {nodes, unhealthy, acting}        │   only with `fleet-1` in the Hello and [fleet] here
//!     │ Health {services unhealthy, acting} ──────▶ │   counts, from the first Fleet on
//!     │ LeaseRequest {kind, share} ───────────────▶ │   a slot for a shared action or checkpoint
//!     │ ◀── LeaseGranted {ttl} or LeaseRefused      │   LeaseRelease when it is over
//!     │                                             │
//!     │ Goodbye ─────────────▶ or ◀──────── Goodbye │
//! ```
//!
//! # Where to start
//!
//! - [`message`]: one enum for each direction, one struct for each kind and version; [`units`]: the numbers and
//!   names in them, checked when made and when decoded; [`refusal`]: why something is turned away.
//! - [`frame`] and [`codec`]: messages to bounded bytes and back. Tensors travel raw beside their header, and
//!   [`compress`] turns them into `f32` and back, tile by tile.
//! - [`round::RoundMachine`]: the aggregator's half; [`participant::Participant`]: the edge's half. Each takes inputs
//!   (`handle`, `handle_timeout`) and gives outputs (`poll_output`, `poll_timeout`); a driver carries them out.
//!
//! - [`fleet`]: slots that are lent for a time, in two halves as well.
//!
//! # What holds
//!
//! - Acknowledged means durable: a receipt, an announcement and a round's end each follow the write they speak of.
//! - An update counts at most once a round; the first durable bytes of a node win.
//! - One training and one payload for each (round, nonce), over any crash of either side.
//! - No message of one edge moves another edge's round: slow, silent, early, late, repeated and foreign ones are
//!   refused or ignored on purpose, and counted.

pub mod codec;
pub mod compress;
pub mod fleet;
pub mod frame;
pub mod message;
pub mod participant;
pub mod refusal;
pub mod round;
pub mod units;
