//! Slots of a fleet, lent for a time: the aggregator's half ([`Lender`]) and an edge's ([`Borrower`]).
//!
//! ```text
//! edge:        sent ───────── four fifths of ttl ─▶ lets go
//! aggregator:        granted ──────────── ttl ─────────────▶ free again
//! ```
//!
//! At most as many nodes hold a slot, by true time, as there were slots at a grant within the last term (after Gray and Cheriton, *Leases*, SOSP
//! 1989): an edge counts from *before* its request left, on a clock that also counts while the host is suspended, and a fifth less than the term; the
//! aggregator counts from the grant, which is later. Lost, late, repeated and reordered messages only make an edge hold less. It holds while the two
//! clocks run within [`RATE_ERROR_PPM`] of true time each. A lender that has started lends nothing for the longest term that an earlier one may have
//! lent for. An edge that forgets its lease, or is told of it too late, holds none.
//!
//! Neither reads a clock: the moment is handed in.

mod borrower;
mod lender;

pub use borrower::{Borrower, Lease};
pub use lender::{Holder, Lender};

use std::time::Duration;

/// Largest error of a clock's rate under which the promise holds, in millionths. Oscillators are wrong by some hundred at most; the rest is for a
/// time service that turns a clock slowly instead of setting it: Linux lets it change the length of a tick by a tenth (`ADJ_TICK`), and `chronyd`
/// makes use of most of that.
pub const RATE_ERROR_PPM: u32 = 100_000;
/// Shortest term of a lease.
pub const TTL_MIN: Duration = Duration::from_secs(1);
/// Longest term of a lease.
pub const TTL_MAX: Duration = Duration::from_hours(1);

/// So long an edge counts on a lease of this term. Two clocks that are each wrong by [`RATE_ERROR_PPM`] the bad way allow
/// `(1 - 0.1) / (1 + 0.1) > 0.818` of it; this is 0.8.
pub fn counted(ttl: Duration) -> Duration {
    ttl.min(TTL_MAX).saturating_sub(ttl.min(TTL_MAX) / 5)
}

/// Slots for a share of so many nodes, in hundredths: rounded down, and at least one.
pub fn slots(nodes: usize, share: u8) -> usize {
    (nodes.saturating_mul(usize::from(share.clamp(1, 100))) / 100).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_rounded_down_and_leaves_one_slot_at_least() {
        for (nodes, share, expected) in [
            (0, 20, 1),
            (4, 20, 1),
            (5, 20, 1),
            (9, 20, 1),
            (10, 20, 2),
            (20, 0, 1),
            (20, 255, 20),
        ] {
            assert_eq!(slots(nodes, share), expected, "{share} % of {nodes}");
        }
    }

    #[test]
    fn what_an_edge_counts_on_ends_first_on_any_two_clocks_within_their_error() {
        let error = f64::from(RATE_ERROR_PPM) / 1e6;
        for ttl in [TTL_MIN, Duration::from_mins(5), TTL_MAX, Duration::MAX] {
            let (edge, centre) = (
                counted(ttl).as_secs_f64() / (1.0 - error),
                ttl.as_secs_f64() / (1.0 + error),
            );
            assert!(edge < centre, "{edge} {centre}");
        }
    }
}
