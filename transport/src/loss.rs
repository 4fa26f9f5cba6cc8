//! Why a connection ended, with what to do about it.

use std::fmt;

use quinn::ConnectionError;

/// Why a session is closed, as a number in QUIC's close frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum CloseCode {
    /// All said.
    Done = 0,
    /// Turned away; a Refusal said why.
    Refused = 1,
    /// Bytes that are no message.
    Malformed = 2,
    /// A frame over the limit.
    TooLarge = 3,
    /// Too little in too much time.
    TooSlow = 4,
    /// The registry no longer admits the site.
    Suspended = 5,
    /// The process ends.
    GoingDown = 6,
    /// The same identity has a newer session.
    Replaced = 7,
}

impl CloseCode {
    const ALL: [Self; 8] = [
        Self::Done,
        Self::Refused,
        Self::Malformed,
        Self::TooLarge,
        Self::TooSlow,
        Self::Suspended,
        Self::GoingDown,
        Self::Replaced,
    ];

    fn from_number(number: u64) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|code| u64::from(*code as u32) == number)
    }
}

/// Which side broke off the TLS handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TlsSide {
    /// We did not accept the peer.
    Us,
    /// The peer did not accept us.
    Peer,
}

/// Why a connection is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loss {
    /// The peer closed it.
    Closed {
        /// Its code, when it is one of ours.
        code: Option<CloseCode>,
        /// Its words, at most 200 characters.
        reason: String,
    },
    /// The TLS handshake failed. `alert` is the number of RFC 8446, section 6.
    Tls {
        /// Which side broke off.
        side: TlsSide,
        /// The alert.
        alert: u8,
        /// That side's words, at most 200 characters.
        reason: String,
    },
    /// The server takes no more connections now.
    Busy,
    /// Nothing was heard for too long.
    TimedOut,
    /// We closed it.
    Local,
    /// The other process lost its state, or something broke the rules of QUIC.
    Broken(String),
}

impl Loss {
    /// What to do about it, when there is something to do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Tls { side, alert, .. } => tls_hint(*side, *alert),
            Self::Busy => {
                Some("the aggregator is at a limit of connections; the edge will try again by itself")
            }
            Self::TimedOut => Some("check host, port and that UDP is not blocked between the two"),
            Self::Closed {
                code: Some(CloseCode::Suspended),
                ..
            } => Some("the site is suspended: ask the operator of the aggregator"),
            Self::Closed {
                code: Some(CloseCode::Replaced),
                ..
            } => Some(
                "a second process uses this site's identity: stop one of them, or enrol the other under its own name",
            ),
            Self::Closed { .. } | Self::Local | Self::Broken(_) => None,
        }
    }
}

impl From<ConnectionError> for Loss {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => {
                let code = CloseCode::from_number(close.error_code.into_inner());
                Self::Closed {
                    code,
                    reason: text(&close.reason),
                }
            }
            ConnectionError::ConnectionClosed(close) => {
                from_code(TlsSide::Peer, close.error_code.into(), text(&close.reason))
            }
            ConnectionError::TransportError(error) => {
                from_code(TlsSide::Us, error.code.into(), text(error.reason.as_bytes()))
            }
            ConnectionError::TimedOut => Self::TimedOut,
            ConnectionError::LocallyClosed => Self::Local,
            other @ (ConnectionError::VersionMismatch
            | ConnectionError::Reset
            | ConnectionError::CidsExhausted) => Self::Broken(other.to_string()),
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed {
                code: Some(code),
                reason,
            } if reason.is_empty() => write!(f, "closed by the peer ({code:?})"),
            Self::Closed {
                code: Some(code),
                reason,
            } => write!(f, "closed by the peer ({code:?}): {reason}"),
            Self::Closed { code: None, reason } => write!(f, "closed by the peer: {reason}"),
            Self::Tls {
                side: TlsSide::Us,
                alert,
                reason,
            } => {
                write!(f, "the peer is not who it must be (alert {alert}): {reason}")
            }
            Self::Tls {
                side: TlsSide::Peer,
                alert,
                reason,
            } => {
                write!(f, "the peer did not accept us (alert {alert}): {reason}")
            }
            Self::Busy => f.write_str("the peer takes no more connections now"),
            Self::TimedOut => f.write_str("nothing was heard for too long"),
            Self::Local => f.write_str("closed by this side"),
            Self::Broken(reason) => f.write_str(reason),
        }
    }
}

/// QUIC's transport error codes (RFC 9000, section 20.1): 0x02 is refusal, 0x0100 to 0x01ff are TLS alerts.
fn from_code(side: TlsSide, code: u64, reason: String) -> Loss {
    match code {
        0x02 => Loss::Busy,
        0x0100..=0x01ff => Loss::Tls {
            side,
            alert: code.to_le_bytes()[0],
            reason,
        },
        _ => Loss::Broken(format!("QUIC error {code:#x}: {reason}")),
    }
}

/// The alerts of RFC 8446, section 6, that an operator can do something about.
fn tls_hint(side: TlsSide, alert: u8) -> Option<&'static str> {
    match (side, alert) {
        (TlsSide::Peer, 42 | 51) => Some("this host's certificate is damaged: enrol again with a new token"),
        (TlsSide::Peer, 43) => {
            Some("this certificate is not for a client: an edge's certificate comes from `theriac-edge join`")
        }
        (TlsSide::Peer, 44) => {
            Some("this site's certificate is revoked: ask the operator of the aggregator for a new token")
        }
        (TlsSide::Peer, 45) => Some(
            "this host's certificate is expired or not yet valid: check the clocks of both hosts, else enrol again with a new token",
        ),
        (TlsSide::Peer, 46) => Some(
            "the certificate names no edge of this federation: enrol again with a token of this aggregator",
        ),
        (TlsSide::Peer, 48) => Some(
            "the certificate comes from an authority that the aggregator does not trust: this edge is enrolled elsewhere, or the authority was replaced; enrol again with a new token",
        ),
        (TlsSide::Peer, 116) => Some("the aggregator demands a certificate: enrol with `theriac-edge join`"),
        (_, 120) => {
            Some("no protocol in common: is this the port of the join listener, or is one side too old?")
        }
        (_, 40 | 70 | 71) => Some("no common version or key exchange: is one side too old?"),
        (TlsSide::Us, 42) => Some(
            "the aggregator's certificate is not for the name that was dialled: dial one of its names, or list the name in `theriac-aggregator init --hosts`",
        ),
        (TlsSide::Us, 45) => Some(
            "the aggregator's certificate is expired or not yet valid: check the clocks of both hosts, else its operator must renew it",
        ),
        (TlsSide::Us, 46) => Some("the server is no aggregator of this federation: check host and port"),
        (TlsSide::Us, 48 | 51) => Some(
            "the server's certificate comes from another authority: wrong host, another federation, or somebody in between; do not go on before this is clear",
        ),
        _ => None,
    }
}

/// A peer's words: printable, at most 200 characters.
fn text(bytes: &[u8]) -> String {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    String::from_utf8_lossy(bytes)
        .chars()
        .take(200)
        .map(printable)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alert_about_certificates_has_a_hint() {
        for alert in [42, 43, 44, 45, 46, 48, 116, 120] {
            assert!(tls_hint(TlsSide::Peer, alert).is_some(), "alert {alert}");
        }
        for alert in [42, 45, 46, 48, 120] {
            assert!(tls_hint(TlsSide::Us, alert).is_some(), "alert {alert}");
        }
    }

    #[test]
    fn close_codes_survive_the_wire() {
        for code in CloseCode::ALL {
            assert_eq!(CloseCode::from_number(u64::from(code as u32)), Some(code));
        }
        assert_eq!(CloseCode::from_number(1 << 40), None);
    }

    #[test]
    fn a_peers_words_are_cut_and_cannot_write_on_the_terminal() {
        let told = text(format!("\u{1b}[31m{}", "x".repeat(1000)).as_bytes());
        assert_eq!(told.chars().count(), 200);
        assert!(told.starts_with(" [31m"));
    }
}
