//! What a state lost: when a copy has hardly anything of what one before it had, that one is kept beyond the number asked for.
//!
//! A disk that did not come back leaves an empty directory, a mistake an empty database. Both serve, and both can be copied and proved. Copies of
//! them must not push out the last ones of what was lost before anybody has looked.

use std::time::Duration;

/// When a copy was taken, and how much it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) unix_ms: u64,
    pub(super) bytes: u64,
}

impl Size {
    /// Whether this older copy has so much more than `newest` that it is to be kept for a person: more than [`TIMES`] as much, for [`LASTS`].
    pub(super) fn dwarfs(self, newest: Self) -> bool {
        let age = Duration::from_millis(newest.unix_ms.saturating_sub(self.unix_ms));
        self.bytes / TIMES > newest.bytes && age < LASTS
    }
}

/// Of copies, newest first, the one that is kept for what the newest lost: the newest such one.
pub(super) fn remnant(mut copies: impl Iterator<Item = Size>) -> Option<usize> {
    let newest = copies.next()?;
    copies.position(|older| older.dwarfs(newest)).map(|at| at + 1)
}

/// A state grows and shrinks; to a tenth it hardly does between two copies.
const TIMES: u64 = 10;
/// Time for a person to see it.
const LASTS: Duration = Duration::from_hours(7 * 24);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_copy_from_before_a_loss_is_found_for_a_week() {
        let day = 24 * 3_600_000;
        let of = |bytes: &[u64]| {
            let sizes = (0..).zip(bytes).map(|(age, bytes)| Size {
                unix_ms: 100 * day - age * day,
                bytes: *bytes,
            });
            remnant(sizes)
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[0]), None);
        assert_eq!(of(&[100, 900, 1_000]), None, "it shrank");
        assert_eq!(of(&[0, 0, 9]), None, "there was hardly anything to lose");
        assert_eq!(of(&[90, 80, 1_000, 1_000]), Some(2));
        assert_eq!(of(&[90, 90, 90, 90, 90, 90, 1_000]), Some(6));
        assert_eq!(of(&[90, 90, 90, 90, 90, 90, 90, 1_000]), None, "a week ago");
    }
}
